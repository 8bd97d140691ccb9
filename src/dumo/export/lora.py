"""A LoRA that `pipe.load_lora_weights(OUT)` puts on the untouched model, with all else that was trained.

Adapters go as they are. The layers that were trained in full, the last one and the time embedder, go as products of
full rank, which are exact:

    W' x + b' = W x + b + B (A x) + c      with  (B, A) = (1, W' - W) or (W' - W, 1), whichever is smaller,  c = b' - b.

The bias c is peft's `lora_bias`, which is for all layers of a LoRA or for none, so the others have zeros. It loads and
switches as any LoRA does; where a layer of the model has no bias, `fuse_lora` refuses it.
"""

from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from dumo.export import card
from dumo.export.model import SCHEDULER, Exported, require, write_scheduler
from dumo.nets.adapter import adapters
from dumo.nets.dualized import Dualized
from dumo.types import UserError

FILE, PREFIX = "pytorch_lora_weights.safetensors", "transformer."  # as diffusers looks for it, and for its tensors
NOTES = {"format": "pt"}


def write(exported: Exported, made: card.Provenance, out: Path, name: str, *, dtype: str = "float32") -> None:
    """Write the LoRA, its scheduler and its card into the folder `out`, which is there and empty, to be called `name`.

    Raises UserError where the run tuned all weights, the class takes no LoRA, or a part of another kind was trained.
    """
    stock = require(exported, lora=True)
    layers = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors(exported).items()}
    safetensors.torch.save_file({PREFIX + name: x for name, x in layers.items()}, out / FILE, NOTES)
    if exported.head == "u":
        write_scheduler(out / SCHEDULER, stock, exported.solver)
    if codes := exported.codes:
        safetensors.torch.save_file(codes, out / card.CODED, NOTES)
    (out / "README.md").write_text(card.of_tuned(exported, made, stock, name), encoding="utf-8")


def tensors(exported: Exported) -> dict[str, Tensor]:
    """The LoRA by peft's names; biases where any has changed."""
    found: dict[str, Tensor] = {}
    products = [*adapted(exported.net), *full(exported.net, exported.head)]
    biased = any(bool(bias.any()) for *_, bias in products)
    for path, a, b, bias in products:
        layer = {"lora_A.weight": a, "lora_B.weight": b, **({"lora_B.bias": bias} if biased else {})}
        found |= {f"{path}.{name}": tensor.detach().contiguous() for name, tensor in layer.items()}
    return found


Product = tuple[str, Tensor, Tensor, Tensor]  # path, A, B and c


def adapted(net: Dualized) -> Iterator[Product]:
    """The adapters."""
    mine = {id(layer) for layer in adapters(net.model)}
    for path, layer in net.model.named_modules():
        if id(layer) in mine:
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            yield path, a, b, b.new_zeros(len(b))


def full(net: Dualized, head: str) -> Iterator[Product]:
    """The layers that were trained in full. Raises UserError for a change that is in no linear layer."""
    model: nn.Module = net.stock(head)
    for path, part in zip(net.paths, net.old, strict=True):
        for name, old in part.named_modules():
            new = model.get_submodule(where := f"{path}.{name}".rstrip("."))
            both = zip(old.parameters(recurse=False), new.parameters(recurse=False), strict=True)
            if all(torch.equal(was, now) for was, now in both):
                continue
            if not isinstance(old, nn.Linear):
                raise UserError(f"{where} was trained, and no LoRA can say it: take --to diffusers")
            yield product(where, old, new)


def product(path: str, old: nn.Linear, new: nn.Module) -> Product:
    """The change of a layer, exactly."""
    assert isinstance(new, nn.Linear)
    change = new.weight.detach() - old.weight
    high, wide = change.shape
    a, b = (change, torch.eye(high).to(change)) if high <= wide else (torch.eye(wide).to(change), change)
    return path, a, b, change.new_zeros(high) if getattr(old, "bias", None) is None else new.bias.detach() - old.bias
