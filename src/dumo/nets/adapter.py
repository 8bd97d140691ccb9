"""LoRA (Hu et al. 2021) by peft: beside a linear layer W that rests, a product B A of low rank that is trained.

peft names the parameters `lora_A.default.weight` and `lora_B.default.weight`, and B starts at zero.
"""

import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from pydantic import Field
from torch import nn

from dumo.bound import CHANNELS, FACTOR
from dumo.flow import dropout
from dumo.nets.half import halve
from dumo.nets.twin import put
from dumo.types import Array, Spec, UserError

MODULATION = re.compile(r"norm|mod|ada", re.IGNORECASE)  # in the path of a layer that sees the time alone


class Lora(Spec):
    """Which layers are adapted, and how. The lab's rank is 64, with as much alpha (TwinFlow)."""

    rank: int = Field(default=64, ge=1, le=CHANNELS)
    alpha: float | None = Field(default=None, gt=0, le=FACTOR)  # B A counts alpha / rank; None: alpha = rank
    rslora: bool = False  # alpha / sqrt(rank) (Kalajdzievski 2023)
    dropout: float = Field(default=0.0, ge=0, lt=1)  # of what goes into A
    # Ends of the names of layers, as peft's target_modules; None: attention and perceptrons of every block.
    targets: tuple[str, ...] | None = Field(default=None, min_length=1)
    frozen: Literal["float32", "bfloat16"] = "float32"  # what linear layers that rest are kept in (`dumo.nets.half`)


class Dropout(nn.Module):
    """peft's, but with masks that are keyed by row, step and layer."""

    def __init__(self, p: float, layer: int) -> None:
        """The layer's number tells its masks from others'."""
        super().__init__()
        self.p, self.layer = p, layer

    def forward(self, x: Array) -> Array:
        """x (b, ...), a row of the batch each."""
        rows = dropout.current(x.shape[0]) if self.training else None
        return x if rows is None else dropout.drop(x, dropout.layer_keys(rows, self.layer), self.p)


def adapt(
    model: nn.Module, lora: Lora, blocks: Sequence[nn.Module], idle: Sequence[str], trained: Sequence[str]
) -> None:
    """Add adapters to a model, in place; all else in it rests, and is kept as `lora.frozen` says.

    What lies at or below the paths `idle` gets none, nor at or below `trained`, which stays in float32. Raises
    UserError where peft is not there, or no layer is meant.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError("net.lora needs peft: pip install 'dumo[pretrained]'") from error
    left = tuple(f"{path}." for path in (*idle, *trained))
    if not (names := [name for name in targets(model, lora, blocks) if not f"{name}.".startswith(left)]):
        raise UserError(
            f"net.lora.targets {', '.join(lora.targets or ())} are no linear layers of this model: give ends of names "
            "as peft does, such as to_q, or null for all attention and perceptrons"
        )
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha or lora.rank,  # pyright: ignore[reportArgumentType], a number
        use_rslora=lora.rslora,
        target_modules=names,
    )
    if lora.frozen == "bfloat16":
        halve(model, trained)
    model.requires_grad_(False)
    peft.inject_adapter_in_model(config, model)
    if lora.dropout:
        for i, layer in enumerate(adapters(model)):
            layer.lora_dropout["default"] = Dropout(lora.dropout, i)


def targets(model: nn.Module, lora: Lora, blocks: Sequence[nn.Module]) -> Iterator[str]:
    """The names of the linear layers that are meant."""
    inside = {id(layer) for block in blocks for layer in block.modules()}
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        if lora.targets is None:
            if id(layer) in inside and not MODULATION.search(name):
                yield name
        elif any(name == end or name.endswith(f".{end}") for end in lora.targets):
            yield name


def adapters(model: nn.Module) -> list[Any]:
    """The layers of peft, as peft types them."""
    return [layer for layer in model.modules() if hasattr(layer, "lora_A")]


@contextmanager
def off(model: nn.Module) -> Generator[None, None, None]:
    """Inside, the adapters say nothing. peft's own switch would change which parameters are trained, too."""
    layers = adapters(model)
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


def merge(model: nn.Module) -> None:
    """Add the adapters to the layers beside them, in place and in float32, and leave them out."""
    nn.Module.float(model)  # diffusers' own warns that no layer may stay in half precision
    there = {id(layer): layer for layer in adapters(model)}
    for name, place in [*model.named_modules()]:
        if layer := there.get(id(place)):
            layer.merge()
            put(model, name, layer.get_base_layer())
