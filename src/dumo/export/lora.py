"""A LoRA that `pipe.load_lora_weights(OUT)` puts on the untouched model, with all else that was trained.

Adapters are written as they are. The layers that were trained in full, the last one and the time embedder, are written
as products of full rank, which are exact:

    W' x + b' = W x + b + B (A x) + c      with  (B, A) = (1, W' - W) or (W' - W, 1), whichever is smaller,  c = b' - b.

The bias c is peft's `lora_bias`, which all layers of a LoRA have or none, so the others have zeros. It loads and
switches as any LoRA does; `fuse_lora` refuses it if a layer of the model has no bias. A U-Net's last layer is a
convolution.

ComfyUI reads no `lora_bias`, but changes of whole layers, `X.diff` and `X.diff_b`: its file has these. It finds layers
by the names of diffusers, and the rows of q, k and v in layers that it fuses, so adapters stay as they are.

Adapters on top of those of a few-step run (`net.lora.subject`) are added to them by concatenated ranks,

    B_1 A_1 + B_2 A_2 = [B_1 B_2] [A_1; A_2],

for the untouched model; or they are written without those, for the few-step run's export (`subject_only`).

`write` writes the folder for diffusers, whose tensors `diffusers_tensors` makes; `comfyui_tensors` makes those of the
file for ComfyUI. Both go through the adapters, then through the layers that were trained in full.

To add a class of models that ComfyUI knows, add a row to `COMFYUI`.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from dumo.encoders.pipeline_folder import UNET
from dumo.export import model_card
from dumo.export.model import ExportedModel, require_pipeline
from dumo.export.scheduler import SCHEDULER, write_flow_map_scheduler
from dumo.nets.heads import bias_or_none
from dumo.nets.lora import SUBJECT, adapters
from dumo.types import UserError

# The file that diffusers looks for.
FILE = "pytorch_lora_weights.safetensors"
_METADATA = {"format": "pt"}
# The classes of diffusers whose layers ComfyUI finds by their names there, with ComfyUI's own names of the few layers
# that it does not find so. Read in `model_lora_keys_unet` of comfy/lora.py at its commit 17358c8, and the maps of
# comfy/utils.py at 09708ea.
_FLUX2_TIME = "time_guidance_embed.timestep_embedder"
COMFYUI: dict[str, dict[str, str]] = {
    "SD3Transformer2DModel": {},
    "FluxTransformer2DModel": {},
    "Flux2Transformer2DModel": {
        f"{_FLUX2_TIME}.linear_1": "time_in.in_layer",
        f"{_FLUX2_TIME}.linear_2": "time_in.out_layer",
    },
    "ChromaTransformer2DModel": {},
    "QwenImageTransformer2DModel": {},
    "ZImageTransformer2DModel": {},
    "AuraFlowTransformer2DModel": {},
    "UNet2DConditionModel": {},
}
# Begins the names that kohya's scripts give to layers of U-Nets, which A1111 reads, too.
_KOHYA_PREFIX = "lora_unet_"

Layer = nn.Linear | nn.Conv2d


class LayerProduct(NamedTuple):
    """The change of a layer: the product B A, which is applied to the layer's input, and a bias."""

    # The layer's path in the model.
    path: str
    a: Tensor
    b: Tensor
    # c above; zeros if the layer's bias has not changed.
    bias: Tensor


def write(exported: ExportedModel, provenance: model_card.Provenance, out: Path, name: str, *, dtype: str) -> None:
    """Write the LoRA, its scheduler and its card into the empty folder `out`, which will be called `name`.

    Raises UserError if the run tuned all weights, the class takes no LoRA, or a layer of another kind was trained.
    """
    stock = require_pipeline(exported, lora=True)
    tensors = diffusers_tensors(exported)
    weights: dict[str, Tensor] = {}
    for weight_name, tensor in tensors.items():
        weights[f"{exported.component_name}.{weight_name}"] = tensor.to(getattr(torch, dtype))
    config = adapter_config(tensors, exported.component_name)
    metadata = _METADATA | {"lora_adapter_metadata": json.dumps(config)}
    safetensors.torch.save_file(weights, out / FILE, metadata)
    # A subject alone is sampled with the scheduler of the few-step run's export.
    if exported.head == "u" and not exported.subject_only:
        write_flow_map_scheduler(
            out / SCHEDULER,
            exported.solver,
            exported.net.diffusion,
            takes_times=bool(stock.time_arguments),
            makes_hops=exported.makes_hops,
        )
    codes = exported.class_embeddings
    if codes:
        safetensors.torch.save_file(codes, out / model_card.CODES, _METADATA)
    (out / "README.md").write_text(model_card.tuned_card(exported, provenance, stock, name), encoding="utf-8")


def comfyui_tensors(exported: ExportedModel, *, dtype: str = "float32") -> dict[str, Tensor]:
    """The tensors of a file for ComfyUI: adapters by their factors, whole layers by their changes.

    Raises UserError as `write`, and for a class whose layers ComfyUI does not find by their names in diffusers.
    """
    require_pipeline(exported, lora=True)
    if exported.class_embeddings:
        raise UserError("net.texts is codes for classes, and ComfyUI reads texts: export to lora")
    own_name_by_path = COMFYUI.get(exported.model_class)
    if own_name_by_path is None:
        raise UserError(
            f"ComfyUI does not know the layers of a {exported.model_class} by their names in diffusers: export to lora "
            "or diffusers"
        )

    def comfyui_name(path: str) -> str:
        if exported.component_name == UNET:
            return _KOHYA_PREFIX + path.replace(".", "_")
        if path in own_name_by_path:
            return f"diffusion_model.{own_name_by_path[path]}"
        return f"{exported.component_name}.{path}"

    weights: dict[str, Tensor] = {}
    for adapter in _adapter_products(exported):
        name = comfyui_name(adapter.path)
        weights[f"{name}.lora_down.weight"] = adapter.a
        weights[f"{name}.lora_up.weight"] = adapter.b
        if exported.component_name == UNET:
            rank = len(adapter.a)
            weights[f"{name}.alpha"] = torch.tensor(float(rank))
    for path, old, new in _changed_layers(exported):
        name = comfyui_name(path)
        weights[f"{name}.diff"] = new.weight - old.weight
        if bias_or_none(old) is not None:
            weights[f"{name}.diff_b"] = _bias_of(new) - _bias_of(old)
    return {name: x.detach().to(getattr(torch, dtype)).contiguous() for name, x in weights.items()}


def diffusers_tensors(exported: ExportedModel) -> dict[str, Tensor]:
    """The tensors of the LoRA by peft's names. Every layer has a bias if that of any has changed."""
    products = list(_adapter_products(exported))
    for path, old, new in _changed_layers(exported):
        products.append(change_as_product(path, old, new))
    has_bias = any(bool(layer.bias.any()) for layer in products)
    weights: dict[str, Tensor] = {}
    for path, a, b, bias in products:
        weights[f"{path}.lora_A.weight"] = a.detach().contiguous()
        weights[f"{path}.lora_B.weight"] = b.detach().contiguous()
        if has_bias:
            weights[f"{path}.lora_B.bias"] = bias.detach().contiguous()
    return weights


def adapter_config(tensors: Mapping[str, Tensor], component: str) -> dict[str, Any]:
    """The fields of peft's `LoraConfig`, after the name of the component, with which diffusers loads a LoRA.

    `tensors` are those of `diffusers_tensors`.

    Each layer's alpha is its rank, so that its product is added as it is. Without these fields diffusers takes the most
    frequent rank as alpha of all layers, as of 0.36.
    """
    rank_by_path: dict[str, int] = {}
    for name, tensor in tensors.items():
        path, _, end = name.rpartition(".lora_A.")
        if end == "weight":
            rank_by_path[path] = len(tensor)
    [(frequent_rank, _)] = Counter(rank_by_path.values()).most_common(1)
    # peft looks for a pattern at the end of a layer's path unless it begins with ^.
    other_ranks = {f"^{re.escape(path)}": rank for path, rank in rank_by_path.items() if rank != frequent_rank}
    fields: dict[str, Any] = {
        "r": frequent_rank,
        "lora_alpha": frequent_rank,
        "rank_pattern": other_ranks,
        "alpha_pattern": other_ranks,
        "target_modules": sorted(rank_by_path),
        "lora_bias": any(name.endswith(".lora_B.bias") for name in tensors),
    }
    return {f"{component}.{name}": value for name, value in fields.items()}


def _adapter_products(exported: ExportedModel) -> Iterator[LayerProduct]:
    """Yield the product of each adapted layer: two adapters as one, or with `subject_only` that of the subject."""
    model: nn.Module = exported.net.model
    adapter_layers = {id(layer): layer for layer in adapters(model)}
    for path, module in model.named_modules():
        layer = adapter_layers.get(id(module))
        if layer is None:
            continue
        names = [SUBJECT] if exported.subject_only else layer.active_adapters
        a = [layer.lora_A[name].weight for name in names]
        b = [layer.lora_B[name].weight for name in names]
        yield LayerProduct(path, torch.cat(a), torch.cat(b, 1), bias=b[0].new_zeros(len(b[0])))


def _changed_layers(exported: ExportedModel) -> Iterator[tuple[str, Layer, Layer]]:
    """Yield the layers that were trained in full and have changed: the path, the layer before, and the layer now.

    With `subject_only` there are none: the few-step run's export has them. Raises UserError for a change that is in no
    linear layer or convolution.
    """
    if exported.subject_only:
        return
    net = exported.net
    model: nn.Module = net.single_head_model(exported.head, time_layer=exported.time_layer)
    for trained_path, original in zip(net.trained_paths, net.old, strict=True):
        for name, old in original.named_modules():
            path = f"{trained_path}.{name}".rstrip(".")
            new = model.get_submodule(path)
            weights = zip(old.parameters(recurse=False), new.parameters(recurse=False), strict=True)
            if all(torch.equal(before, after) for before, after in weights):
                continue
            if not isinstance(old, Layer):
                raise UserError(f"{path} was trained, and no LoRA can hold it: export to diffusers")
            assert isinstance(new, Layer)
            yield path, old, new


def change_as_product(path: str, old: Layer, new: Layer) -> LayerProduct:
    """The exact change from the layer `old` to the layer `new`, at `path` in the model.

    Of a convolution, A is a convolution with its kernel, and B one of 1 x 1 behind that.
    """
    change = new.weight.detach() - old.weight
    outputs, inputs, *kernel = change.shape
    if kernel:
        a = change
        b = torch.eye(outputs).to(change)[..., None, None]
    elif outputs <= inputs:
        a = change
        b = torch.eye(outputs).to(change)
    else:
        a = torch.eye(inputs).to(change)
        b = change
    bias = change.new_zeros(outputs) if bias_or_none(old) is None else _bias_of(new) - _bias_of(old)
    return LayerProduct(path, a, b, bias)


def _bias_of(layer: Layer) -> Tensor:
    """The bias of a layer that has one, (outputs,)."""
    assert layer.bias is not None
    return layer.bias.detach()
