"""A residual perceptron, for points in the plane."""

from math import prod
from typing import ClassVar, Literal

from pydantic import Field
from torch import nn
from torch.nn import functional as F

from dumo.nets.embed import Gauges, HeadEmbeddings, Scalars, label_table
from dumo.nets.precondition import Precondition
from dumo.runtime.bound import BLOCKS, CHANNELS, FACTOR
from dumo.types import Array, Cond, Heads, Needs, Sample, Spec, Time


class MLP(Spec):
    """`depth` residual layers of `width`; times and label are added to the input's embedding."""

    kind: Literal["mlp"] = "mlp"
    precondition: ClassVar[Precondition] = "none"
    texts: ClassVar[None] = None
    augment: ClassVar[int] = 0
    lora: ClassVar[None] = None
    checkpoint: ClassVar[None] = None
    width: int = Field(default=256, ge=1, le=CHANNELS)
    depth: int = Field(default=4, ge=1, le=BLOCKS)
    time_scale: float = Field(default=1.0, gt=0, le=FACTOR)  # times enter raw (UCGM)

    def build(self, needs: Needs, shape: tuple[int, ...], classes: int) -> "Perceptron":
        """A net with the inputs, heads and gauges of `needs` for samples of `shape`; 0 classes: no label."""
        return Perceptron(self, needs, shape, classes)


class Perceptron(nn.Module):
    """The net of an `MLP` spec. The heads start at zero, as DiT's do."""

    def __init__(self, spec: MLP, needs: Needs, shape: tuple[int, ...], classes: int) -> None:
        """See `MLP.build`."""
        super().__init__()
        dim = prod(shape)
        width = spec.width
        self.scalars = Scalars(needs.shared, width, spec.time_scale)
        self.own = HeadEmbeddings(needs, width, spec.time_scale)
        self.label = label_table(classes, width) if classes else None
        self.embed = nn.Linear(dim, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(spec.depth))
        self.heads = nn.ModuleDict({name: nn.Linear(width, dim) for name in needs.heads})
        self.gauges = Gauges(needs, width, spec.time_scale) if needs.gauges else None
        for head in self.heads.values():
            nn.init.zeros_(head.weight)  # pyright: ignore[reportArgumentType]
            nn.init.zeros_(head.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Sample, c: Cond, /, **inputs: Time) -> Heads:
        """Return the heads, shaped like x, then the gauges, in the order of the needs."""
        shared, own = self.own(**inputs)
        h: Array = self.embed(x.flatten(1)) + self.scalars(**shared)
        if self.label is not None:
            h = h + self.label(c)
        for layer in self.layers:
            h = h + layer(F.silu(h))
        last = F.silu(h)
        heads = (head(F.silu(h + own[k]) if k in own else last).view(x.shape) for k, head in self.heads.items())
        return *heads, *(self.gauges(**shared) if self.gauges else ())
