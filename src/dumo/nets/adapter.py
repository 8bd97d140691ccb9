"""LoRA (Hu et al. 2021) by peft: next to a frozen linear layer W, a product B A of low rank that is trained.

Next to a convolution, A is one of the same kernel and stride to `rank` channels, and B one of 1 x 1 (LoCon).

peft names the parameters `lora_A.default.weight` and `lora_B.default.weight`, and B starts at zero. B A counts in full:
alpha is the rank, as in TwinFlow.

A second adapter may be trained on top of a few-step run's (`Lora.subject`): both add, `lora_A.subject.weight` is
trained, and all else that the few-step run trained is frozen.

Frozen linear layers may be kept in fewer bits (`dumo.nets.lowbit`); norms, tables and all that is trained stay in
float32. Published weights are mostly stored in bf16: those are mapped from their file, not copied, so the processes of
a machine share them until each has taken its part, or has coded them layer by layer.
"""

import re
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from pydantic import Field
from torch import nn

from dumo.nets.lowbit import Coding, halve, quantise
from dumo.runtime import import_bitsandbytes, install
from dumo.runtime.bound import CHANNELS
from dumo.types import QUIET, Spec, UserError

# Adapters by their names in peft.
FEW_STEP = "default"
SUBJECT = "subject"  # the one on top of it
MODULATION = re.compile(r"norm|mod|ada|time_emb", re.IGNORECASE)  # in the path of a layer whose input is the time alone


class Lora(Spec):
    """Adapters of the attention and the perceptrons of every block, and of its convolutions."""

    rank: int = Field(default=64, ge=1, le=CHANNELS)  # TwinFlow
    frozen: Literal["float32", "bfloat16", "int8", "nf4"] = "float32"  # the type of frozen linear layers
    convolutions: bool = Field(default=False, json_schema_extra=QUIET)  # those of a UNet's blocks, too (LCM-LoRA)
    # The rank of adapters on top of those of the run that `start` names, which is frozen; None: there are none.
    subject: int | None = Field(default=None, ge=1, le=CHANNELS, json_schema_extra=QUIET)

    @property
    def coding(self) -> Coding | None:
        """How frozen layers are coded; None: they are numbers."""
        return self.frozen if self.frozen in ("int8", "nf4") else None


def adapt(
    model: nn.Module, lora: Lora, blocks: Sequence[nn.Module], idle: Sequence[str], trained: Sequence[str]
) -> None:
    """Add adapters to a model, in place, and freeze everything else.

    Layers at or below the paths `idle` get none, nor do those at or below `trained`, which stay in float32. Raises
    UserError where peft is missing, or what codes need.
    """
    import_bitsandbytes()
    try:
        import peft
    except ImportError as error:
        raise UserError(f"net.lora needs peft: {install('pretrained')}") from error
    left = tuple(f"{path}." for path in (*idle, *trained))
    names = [name for name in targets(model, blocks, lora) if not f"{name}.".startswith(left)]
    ranks = {FEW_STEP: lora.rank} | ({SUBJECT: lora.subject} if lora.subject else {})
    if lora.frozen == "bfloat16":
        halve(model, trained)
    elif lora.coding:
        quantise(model, blocks, trained, lora.coding)
    model.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)  # a second adapter is meant
        for name, rank in ranks.items():
            config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
            peft.inject_adapter_in_model(config, model, adapter_name=name)
    for layer in adapters(model):
        layer.set_adapter([*ranks])


def targets(model: nn.Module, blocks: Sequence[nn.Module], lora: Lora) -> Iterator[str]:
    """The names of the linear layers of the blocks, without their modulations, and of convolutions if wanted."""
    inside = {id(layer) for block in blocks for layer in block.modules()}
    kinds = (nn.Linear, nn.Conv2d) if lora.convolutions else nn.Linear
    for name, layer in model.named_modules():
        if isinstance(layer, kinds) and id(layer) in inside and not MODULATION.search(name):
            yield name


def adapters(model: nn.Module) -> list[Any]:
    """The layers of peft, as peft types them."""
    return [layer for layer in model.modules() if hasattr(layer, "lora_A")]


@contextmanager
def without_subject(model: nn.Module) -> Generator[None, None, None]:
    """Inside, the adapters on top add nothing. peft's own switch would also change which parameters are trained."""
    layers = adapters(model)
    before = [layer.active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = [FEW_STEP]
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._active_adapter = was


@contextmanager
def off(model: nn.Module) -> Generator[None, None, None]:
    """Inside, adapters add nothing. peft's own switch would also change which parameters are trained."""
    layers = adapters(model)
    before = [layer.disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


def merge(model: nn.Module) -> None:
    """Add the adapters to their layers, in place and in float32, and drop them."""
    nn.Module.float(model)  # diffusers' own warns that no layer may stay in half precision
    for name, layer in [*model.named_modules()]:
        if hasattr(layer, "lora_A"):  # as `adapters`
            adapted: Any = layer
            adapted.merge()
            model.set_submodule(name, adapted.get_base_layer())
