"""A LoRA that `pipe.load_lora_weights(OUT)` puts on the untouched model, with all else that was trained.

Adapters go as they are. The layers that were trained in full, the last one and the time embedder, go as products of
full rank, which are exact:

    W' x + b' = W x + b + B (A x) + c      with  (B, A) = (1, W' - W) or (W' - W, 1), whichever is smaller,  c = b' - b.

The bias c is peft's `lora_bias`, which is for all layers of a LoRA or for none, so the others have zeros. It loads and
switches as any LoRA does; where a layer of the model has no bias, `fuse_lora` refuses it. A UNet's last layer is a
convolution.

ComfyUI reads no `lora_bias`, but changes of whole layers, `X.diff` and `X.diff_b`: its file has these. It finds layers
by the names of diffusers, and the rows of q, k and v in layers that it fuses, so adapters stay as they are.

Adapters on top of a few-step run's (`net.lora.subject`) are added to those by concatenated ranks,

    B_1 A_1 + B_2 A_2 = [B_1 B_2] [A_1; A_2],

for the untouched model; or they go `alone`, for the few-step run's export.
"""

from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from dumo.encoders.pipeline import UNET
from dumo.export import card
from dumo.export.model import Exported, require
from dumo.export.scheduler import SCHEDULER, write_scheduler
from dumo.nets.adapter import SUBJECT, adapters
from dumo.nets.twin import bias_or_none
from dumo.types import UserError

FILE = "pytorch_lora_weights.safetensors"  # as diffusers looks for it
NOTES = {"format": "pt"}
# Classes whose layers ComfyUI finds by the names of diffusers, and those few that it finds by its own alone. Read in
# `model_lora_keys_unet` of comfy/lora.py at its commit 17358c8, and the maps of comfy/utils.py at 09708ea.
FLUX2 = "time_guidance_embed.timestep_embedder"
COMFYUI: dict[str, dict[str, str]] = {
    "SD3Transformer2DModel": {},
    "FluxTransformer2DModel": {},
    "Flux2Transformer2DModel": {f"{FLUX2}.linear_1": "time_in.in_layer", f"{FLUX2}.linear_2": "time_in.out_layer"},
    "ChromaTransformer2DModel": {},
    "QwenImageTransformer2DModel": {},
    "ZImageTransformer2DModel": {},
    "AuraFlowTransformer2DModel": {},
    "UNet2DConditionModel": {},
}
KOHYA = "lora_unet_"  # of names that kohya's scripts gave to layers of UNets, which A1111 reads, too


def write(exported: Exported, made: card.Provenance, out: Path, name: str, *, dtype: str = "float32") -> None:
    """Write the LoRA, its scheduler and its card into the folder `out`, which is there and empty, to be called `name`.

    Raises UserError where the run tuned all weights, the class takes no LoRA, or a part of another kind was trained.
    """
    stock = require(exported, lora=True)
    layers = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors(exported).items()}
    safetensors.torch.save_file({f"{exported.part}.{name}": x for name, x in layers.items()}, out / FILE, NOTES)
    if exported.head == "u" and not exported.alone:  # the few-step run's export has one
        write_scheduler(
            out / SCHEDULER, exported.solver, exported.net.frame, takes_times=bool(stock.times), hops=exported.hops
        )
    if codes := exported.codes:
        safetensors.torch.save_file(codes, out / card.CODED, NOTES)
    (out / "README.md").write_text(card.of_tuned(exported, made, stock, name), encoding="utf-8")


def comfyui(exported: Exported, *, dtype: str = "float32") -> dict[str, Tensor]:
    """The file for ComfyUI: adapters by their factors, whole layers by their changes.

    Raises UserError as `write`, and for a class whose layers ComfyUI finds by no name of diffusers.
    """
    require(exported, lora=True)
    if exported.codes:
        raise UserError("this run was tuned on codes for classes, and ComfyUI reads texts: take --to lora")
    if (own := COMFYUI.get(exported.kind)) is None:
        raise UserError(
            f"ComfyUI does not know the layers of a {exported.kind} by their names in diffusers, and fuses some: take "
            "--to lora or --to diffusers, and diffusers"
        )
    found: dict[str, Tensor] = {}

    def called(path: str) -> str:
        if exported.part == UNET:
            return KOHYA + path.replace(".", "_")
        return f"diffusion_model.{own[path]}" if path in own else f"{exported.part}.{path}"

    for path, a, b, _ in adapted(exported):
        found |= {f"{called(path)}.lora_down.weight": a, f"{called(path)}.lora_up.weight": b}
        found |= {f"{called(path)}.alpha": torch.tensor(float(len(a)))} if exported.part == UNET else {}
    for path, old, new in changed(exported):
        name = called(path)
        found[f"{name}.diff"] = new.weight - old.weight
        if bias_or_none(old) is not None:
            found[f"{name}.diff_b"] = bias_of(new) - bias_of(old)
    return {name: x.detach().to(getattr(torch, dtype)).contiguous() for name, x in found.items()}


def tensors(exported: Exported) -> dict[str, Tensor]:
    """The LoRA by peft's names; biases where any has changed."""
    found: dict[str, Tensor] = {}
    full = (product(*layer) for layer in changed(exported))
    products = [*adapted(exported), *full]
    biased = any(bool(bias.any()) for *_, bias in products)
    for path, a, b, bias in products:
        layer = {"lora_A.weight": a, "lora_B.weight": b, **({"lora_B.bias": bias} if biased else {})}
        found |= {f"{path}.{name}": tensor.detach().contiguous() for name, tensor in layer.items()}
    return found


Product = tuple[str, Tensor, Tensor, Tensor]  # path, A, B and c
Layer = nn.Linear | nn.Conv2d


def adapted(exported: Exported) -> Iterator[Product]:
    """The adapters: of a layer with two, both as one; `alone`, that of the subject."""
    model: nn.Module = exported.net.model
    mine = {id(layer): layer for layer in adapters(model)}
    for path, place in model.named_modules():
        if layer := mine.get(id(place)):
            names = [SUBJECT] if exported.alone else layer.active_adapters
            a, b = ([part[name].weight for name in names] for part in (layer.lora_A, layer.lora_B))
            yield path, torch.cat(a), torch.cat(b, 1), b[0].new_zeros(len(b[0]))


def changed(exported: Exported) -> Iterator[tuple[str, Layer, Layer]]:
    """The layers that were trained in full, of a subject `alone` none: path, before and now.

    Raises UserError for a change that is in no linear layer or convolution.
    """
    net = exported.net
    model: nn.Module = net.stock(exported.head, last=exported.last)
    for path, part in zip(net.trained_paths, net.old, strict=True) if not exported.alone else ():
        for name, old in part.named_modules():
            new = model.get_submodule(where := f"{path}.{name}".rstrip("."))
            both = zip(old.parameters(recurse=False), new.parameters(recurse=False), strict=True)
            if all(torch.equal(was, now) for was, now in both):
                continue
            if not isinstance(old, Layer):
                raise UserError(f"{where} was trained, and no LoRA can say it: take --to diffusers")
            assert isinstance(new, Layer)
            yield where, old, new


def product(path: str, old: Layer, new: Layer) -> Product:
    """The change of a layer, exactly; of a convolution as one of this kernel, and one of 1 x 1 behind it."""
    change = new.weight.detach() - old.weight
    high, wide, *kernel = change.shape
    if kernel:
        a, b = change, torch.eye(high).to(change)[..., None, None]
    else:
        a, b = (change, torch.eye(high).to(change)) if high <= wide else (torch.eye(wide).to(change), change)
    return path, a, b, change.new_zeros(high) if bias_or_none(old) is None else bias_of(new) - bias_of(old)


def bias_of(layer: Layer) -> Tensor:
    """That of a layer which has one."""
    assert layer.bias is not None
    return layer.bias.detach()
