"""LoRA (Hu et al. 2021) with peft: a trained low-rank product B A is added to each frozen linear layer W.

`Lora` is the spec. `dumo.nets.dualized` calls `adapt` when a net is made, `with_adapters` around a pass with other
adapters, and `merge` for an export. `adapters` returns the layers that peft has wrapped.

- For a convolution, A is a convolution with the same kernel and stride to `rank` channels, and B is a 1 x 1 convolution
  (LoCon).
- peft names the parameters `lora_A.default.weight` and `lora_B.default.weight`, also in checkpoints. B is initially
  zero. B A is added without scaling: alpha equals the rank, as in TwinFlow.
- A second adapter may be trained on top of that of a few-step run (`Lora.subject`). Both are active, only
  `lora_A.subject.weight` and its B are trained, and everything that the few-step run trained is frozen.
- The fake score of DMD2 is a second adapter of the same layers. Only one of the two is active in a pass, but both
  require gradients, so both are in checkpoints and in the optimizer.
- Frozen linear layers may be stored in fewer bits (`dumo.nets.lowbit`); norms, tables and trained parameters stay in
  float32. Published weights are mostly stored in bf16. These are mapped from their file without a copy, so the
  processes of a machine share them until each has sharded or quantised them, layer by layer.
"""

import re
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from dumo.nets.lowbit import Coding, quantise, store_in_bf16
from dumo.runtime import import_bitsandbytes, require
from dumo.runtime.limits import CHANNELS
from dumo.types import QUIET, Spec

# The names in peft, and so in parameter names, of the adapters of a few-step run, of a subject on top of it, and of the
# fake score.
FEW_STEP = "default"
SUBJECT = "subject"
FAKE = "fake"
# Matches the path of a layer whose input is the time alone, in all models of `dumo.nets.family`.
_MODULATION = re.compile(r"norm|mod|ada|time_emb", re.IGNORECASE)


class Lora(Spec):
    """Adapters of the linear layers of every block, and of its convolutions if `convolutions` is set."""

    # The default is TwinFlow's.
    rank: int = Field(default=64, ge=1, le=CHANNELS)
    # The storage type of frozen linear layers.
    frozen: Literal["float32", "bfloat16", "int8", "nf4"] = "float32"
    # Whether convolutions in a UNet's blocks also have adapters (LCM-LoRA).
    convolutions: bool = Field(default=False, json_schema_extra=QUIET)
    # The rank of adapters on top of the frozen run given by `start`. None means no such adapters.
    subject: int | None = Field(default=None, ge=1, le=CHANNELS, json_schema_extra=QUIET)

    @property
    def coding(self) -> Coding | None:
        """The quantisation of frozen layers. None means that they are floating-point numbers."""
        return self.frozen if self.frozen in ("int8", "nf4") else None


def adapt(
    model: nn.Module,
    lora: Lora,
    blocks: Sequence[nn.Module],
    unused: Sequence[str],
    trained: Sequence[str],
    *,
    fake_score: bool = False,
) -> None:
    """Add adapters to the layers of a model's blocks, in place, and freeze everything else.

    Layers at or below the paths `unused` and `trained` get no adapters; those in `trained` stay in float32. With
    `fake_score`, each layer gets a second, inactive adapter of the same rank. Raises UserError if peft is missing, or
    bitsandbytes for quantised layers.
    """
    import_bitsandbytes()
    peft = require("peft", "pretrained", "net.lora")
    excluded = tuple(f"{path}." for path in (*unused, *trained))
    paths = [path for path in _target_paths(model, blocks, lora) if not f"{path}.".startswith(excluded)]
    ranks = {FEW_STEP: lora.rank}
    if lora.subject:
        ranks[SUBJECT] = lora.subject
    if fake_score:
        ranks[FAKE] = lora.rank

    # Reduce the precision of frozen layers before peft wraps them.
    if lora.frozen == "bfloat16":
        store_in_bf16(model, trained)
    elif lora.coding:
        quantise(model, blocks, trained, lora.coding)

    model.requires_grad_(False)
    with warnings.catch_warnings():
        # A second adapter is intended.
        warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
        for name, rank in ranks.items():
            config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=paths)
            generator_state = torch.get_rng_state()
            peft.inject_adapter_in_model(config, model, adapter_name=name)
            torch.set_rng_state(generator_state)
            _draw_adapter(model, name)
    for layer in adapters(model):
        layer.set_adapter([*ranks])
        if fake_score:
            layer._active_adapter = [FEW_STEP]


def _draw_adapter(model: nn.Module, name: str) -> None:
    """Initialize the weights of an adapter as peft does, on the default device.

    peft has moved them to the device of their layers, which have no values if it is the meta device.
    """
    device = torch.get_default_device()
    for layer in adapters(model):
        for part in (layer.lora_A[name], layer.lora_B[name]):
            part.to_empty(device=device)
            part.reset_parameters()
        layer.reset_lora_parameters(name, True)


def _target_paths(model: nn.Module, blocks: Sequence[nn.Module], lora: Lora) -> Iterator[str]:
    """Yield the paths of the blocks' linear layers, except modulations, and of convolutions if `lora` includes them."""
    layers_of_blocks = {id(layer) for block in blocks for layer in block.modules()}
    layer_classes = (nn.Linear, nn.Conv2d) if lora.convolutions else nn.Linear
    for path, layer in model.named_modules():
        if isinstance(layer, layer_classes) and id(layer) in layers_of_blocks and not _MODULATION.search(path):
            yield path


def adapters(model: nn.Module) -> list[Any]:
    """Return the layers of a model that peft has wrapped."""
    return [layer for layer in model.modules() if hasattr(layer, "lora_A")]


def active_adapters(model: nn.Module) -> list[str] | None:
    """Return the names of the active adapters, which are the same in all layers. None if a model has no adapters."""
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            names: Any = layer.active_adapters
            return [*names]
    return None


@contextmanager
def with_adapters(model: nn.Module, *names: str) -> Generator[None, None, None]:
    """Within the context, only the adapters with these names are active; without names, no adapter is active.

    peft's own methods would also change which parameters require gradients, so this sets their private field.
    """
    # Iterating over all layers is slow, and recomputed blocks request adapters that are already active.
    if active_adapters(model) == [*names]:
        yield
        return
    layers = adapters(model)
    active_before = [layer.active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = [*names]
    try:
        yield
    finally:
        for layer, active in zip(layers, active_before, strict=True):
            layer._active_adapter = active


def merge(model: nn.Module) -> None:
    """Add the adapters to the weights of their layers, in place and in float32, and remove them."""
    nn.Module.float(model)  # diffusers' own method warns that no layer may stay in half precision
    for path, layer in [*model.named_modules()]:
        if hasattr(layer, "lora_A"):
            adapted: Any = layer
            adapted.merge()
            model.set_submodule(path, adapted.get_base_layer())
