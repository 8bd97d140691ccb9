"""Export a LoRA for diffusers and ComfyUI, which includes the layers that were trained in full.

Adapters are written unchanged. The layers that were trained in full (the last layer and the time embedder) are written
as full-rank products, which are exact:

    W' x + b = W x + b + B (A x)      with  (B, A) = (1, W' - W) or (W' - W, 1), whichever is smaller.

Their biases b stay fixed in training (`dumo.nets.dualized`). So peft's `lora_bias` is not needed, which `fuse_lora`
refuses for layers without a bias, quantised layers cannot merge, and ComfyUI does not read. The last layer of a U-Net
is a convolution.

diffusers and ComfyUI read the same file:

- Layers of transformers have diffusers' names, `transformer.X.lora_A.weight`. The header has the ranks for diffusers;
  ComfyUI adds B A without scaling.
- Layers of U-Nets have kohya's names, `lora_unet_X.lora_down.weight`, with their rank as alpha.
- A few layers that ComfyUI does not find by diffusers' names are duplicated under ComfyUI's names
  (`StockPipeline.comfyui_names`), which diffusers ignores.

Adapters trained on top of a few-step run (`net.lora.subject`) are merged with the few-step adapters by concatenation,

    B_1 A_1 + B_2 A_2 = [B_1 B_2] [A_1; A_2],

for use with the base model; with `subject_only` they are written alone, for use with the export of the few-step run.

`write` writes a folder for diffusers, with a scheduler and a model card; `write_for_comfyui` writes only the file.
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
from dumo.nets.lora import SUBJECT, adapters
from dumo.types import UserError

# The file that diffusers looks for.
FILE = "pytorch_lora_weights.safetensors"
_METADATA = {"format": "pt"}
# The prefix of U-Net layers in kohya's scripts, which A1111 reads as well.
_KOHYA_PREFIX = "lora_unet_"

Layer = nn.Linear | nn.Conv2d


class LayerProduct(NamedTuple):
    """The change of a layer's weight: the product B A."""

    # The layer's path in the model.
    path: str
    a: Tensor
    b: Tensor


def write(exported: ExportedModel, provenance: model_card.Provenance, out: Path, name: str, *, dtype: str) -> None:
    """Write the LoRA, its scheduler and its card into the empty folder `out`, which will be called `name`.

    Raises UserError as `lora_products`, and if no diffusers pipeline loads a LoRA for the class.
    """
    stock = require_pipeline(exported)
    if not stock.loads_lora:
        raise UserError(f"no diffusers pipeline loads a LoRA for {exported.model_class}: export to diffusers")
    save_file(exported, out / FILE, dtype=dtype, metadata=_METADATA)
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


def write_for_comfyui(exported: ExportedModel, file: Path, *, dtype: str, metadata: Mapping[str, str]) -> None:
    """Write the LoRA as one file for ComfyUI, which diffusers also reads if it supports LoRA for the class.

    Raises UserError as `lora_products`, and if ComfyUI could not use the file.
    """
    stock = require_pipeline(exported)
    if exported.class_embeddings:
        raise UserError("net.texts.kind=codes uses class embeddings, but ComfyUI needs texts: export to lora")
    if stock.comfyui_names is None:
        raise UserError(
            f"ComfyUI does not support the diffusers layer names of {exported.model_class}: export to lora or diffusers"
        )
    save_file(exported, file, dtype=dtype, metadata=metadata)


def save_file(exported: ExportedModel, file: Path, *, dtype: str, metadata: Mapping[str, str]) -> None:
    """Write the tensors of a LoRA in `dtype`, with `metadata` and the ranks for diffusers in the header."""
    products = lora_products(exported)
    weights: dict[str, Tensor] = {}
    for name, tensor in named_tensors(exported, products).items():
        # Alphas stay in float32, because a short dtype may not represent them.
        weight_dtype = getattr(torch, dtype) if tensor.ndim else torch.float32
        weights[name] = tensor.detach().to(weight_dtype).contiguous()
    header = dict(metadata)
    # diffusers refuses a header with ranks if the names are kohya's, which have alphas.
    if exported.component_name != UNET:
        header["lora_adapter_metadata"] = json.dumps(adapter_config(products, exported.component_name))
    safetensors.torch.save_file(weights, file, header)


def named_tensors(exported: ExportedModel, products: list[LayerProduct]) -> dict[str, Tensor]:
    """Return the tensors of a LoRA under the names that diffusers and ComfyUI read."""
    weights: dict[str, Tensor] = {}
    if exported.component_name == UNET:
        for path, a, b in products:
            name = _KOHYA_PREFIX + path.replace(".", "_")
            weights[f"{name}.lora_down.weight"] = a
            weights[f"{name}.lora_up.weight"] = b
            weights[f"{name}.alpha"] = torch.tensor(float(len(a)))
        return weights
    stock = exported.stock
    comfyui_name_by_path = (stock.comfyui_names or {}) if stock else {}
    for path, a, b in products:
        weights[f"{exported.component_name}.{path}.lora_A.weight"] = a
        weights[f"{exported.component_name}.{path}.lora_B.weight"] = b
        if path in comfyui_name_by_path:
            # Clone, because safetensors does not save tensors that share memory.
            weights[f"{comfyui_name_by_path[path]}.lora_A.weight"] = a.clone()
            weights[f"{comfyui_name_by_path[path]}.lora_B.weight"] = b.clone()
    return weights


def adapter_config(products: list[LayerProduct], component: str) -> dict[str, Any]:
    """Return the fields of peft's `LoraConfig` for diffusers, prefixed by the name of the component.

    Each layer's alpha is its rank, so that its product is not scaled. Without these fields, diffusers 0.36 uses the
    most frequent rank as the alpha of all layers.
    """
    rank_by_path = {path: len(a) for path, a, _ in products}
    [(frequent_rank, _)] = Counter(rank_by_path.values()).most_common(1)
    # peft matches a pattern at the end of a layer's path unless it begins with ^.
    other_ranks = {f"^{re.escape(path)}": rank for path, rank in rank_by_path.items() if rank != frequent_rank}
    fields: dict[str, Any] = {
        "r": frequent_rank,
        "lora_alpha": frequent_rank,
        "rank_pattern": other_ranks,
        "alpha_pattern": other_ranks,
        "target_modules": sorted(rank_by_path),
    }
    return {f"{component}.{name}": value for name, value in fields.items()}


def lora_products(exported: ExportedModel) -> list[LayerProduct]:
    """Return the changes of all layers: adapted layers, then layers that were trained in full.

    Raises UserError if the run tuned all weights, or for a change that is not a product.
    """
    if exported.spec.lora is None:
        raise UserError(
            "net.lora is null, and all weights were trained, which a LoRA cannot contain: export to diffusers"
        )
    products = list(_adapter_products(exported))
    for path, old, new in _changed_layers(exported):
        products.append(change_as_product(path, old, new))
    return products


def _adapter_products(exported: ExportedModel) -> Iterator[LayerProduct]:
    """Yield the product of each adapted layer: both adapters merged, or with `subject_only` the subject's adapter."""
    model: nn.Module = exported.net.model
    adapter_layers = {id(layer): layer for layer in adapters(model)}
    for path, module in model.named_modules():
        layer = adapter_layers.get(id(module))
        if layer is None:
            continue
        names = [SUBJECT] if exported.subject_only else layer.active_adapters
        a = [layer.lora_A[name].weight for name in names]
        b = [layer.lora_B[name].weight for name in names]
        yield LayerProduct(path, torch.cat(a), torch.cat(b, 1))


def _changed_layers(exported: ExportedModel) -> Iterator[tuple[str, Layer, Layer]]:
    """Yield the path, the original and the trained layer of each layer that was trained in full and has changed.

    With `subject_only` nothing is yielded, because the export of the few-step run has these layers. Raises UserError
    for a change that is not in the weight of a linear layer or convolution.
    """
    if exported.subject_only:
        return
    net = exported.net
    model: nn.Module = net.single_head_model(exported.head, time_layer=exported.time_layer)
    for trained_path, original in zip(net.trained_paths, net.old, strict=True):
        for name, old in original.named_modules():
            path = f"{trained_path}.{name}".rstrip(".")
            new = model.get_submodule(path)
            parameters = dict(new.named_parameters(recurse=False))
            changed = {key for key, p in old.named_parameters(recurse=False) if not torch.equal(p, parameters[key])}
            if not changed:
                continue
            if not isinstance(old, Layer) or changed != {"weight"}:
                raise UserError(
                    f"head {exported.head} changes the {' and '.join(sorted(changed))} of {path}, which a LoRA cannot "
                    "store: export to diffusers"
                )
            assert isinstance(new, Layer)
            yield path, old, new


def change_as_product(path: str, old: Layer, new: Layer) -> LayerProduct:
    """Return the exact change from the layer `old` to the layer `new`, at `path` in the model.

    For a convolution, A is a convolution with the same kernel size, and B a 1 x 1 convolution.
    """
    change = new.weight.detach() - old.weight
    outputs, inputs, *kernel = change.shape
    if kernel:
        return LayerProduct(path, a=change, b=torch.eye(outputs).to(change)[..., None, None])
    if outputs <= inputs:
        return LayerProduct(path, a=change, b=torch.eye(outputs).to(change))
    return LayerProduct(path, a=torch.eye(inputs).to(change), b=change)
