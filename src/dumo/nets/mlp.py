"""A residual MLP, for points in the plane.

`MLP` is the spec; `MLP.build` creates the module, a `Perceptron`. A pass embeds the point, adds the embeddings of times
and class, and runs the residual layers and the heads.
"""

from math import prod
from typing import ClassVar, Literal

from pydantic import Field
from torch import nn
from torch.nn import functional as F

from dumo.nets.embed import Gauges, HeadEmbeddings, Scalars, label_table
from dumo.nets.precondition import Precondition
from dumo.runtime.limits import BLOCKS, CHANNELS, FACTOR
from dumo.types import Array, Cond, Heads, Needs, Sample, Spec, Time


class MLP(Spec):
    """The sizes of an MLP: `depth` residual layers of `width`."""

    kind: Literal["mlp"] = "mlp"
    # Attributes of every network spec that an MLP does not support.
    precondition: ClassVar[Precondition] = "none"
    texts: ClassVar[None] = None
    augment: ClassVar[int] = 0
    lora: ClassVar[None] = None
    checkpoint: ClassVar[None] = None
    width: int = Field(default=256, ge=1, le=CHANNELS)
    depth: int = Field(default=4, ge=1, le=BLOCKS)
    # By default, times are not scaled (UCGM).
    time_scale: float = Field(default=1.0, gt=0, le=FACTOR)

    def build(self, needs: Needs, shape: tuple[int, ...], classes: int) -> "Perceptron":
        """Create the network with the inputs, heads and gauges of `needs` for samples of `shape`.

        With 0 classes it has no label.
        """
        return Perceptron(self, needs, shape, classes)


class Perceptron(nn.Module):
    """The network of an `MLP` spec. The heads are initialized to zero, as DiT's."""

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
        """Return the heads, shaped like x (b, ...), then the gauges, (b,) each, in the order of the needs.

        c and each of the inputs that the needs name are (b,). Raises TypeError for other inputs.
        """
        shared_inputs, head_embeddings = self.own(**inputs)
        h: Array = self.embed(x.flatten(1)) + self.scalars(**shared_inputs)
        if self.label is not None:
            h = h + self.label(c)
        for layer in self.layers:
            h = h + layer(F.silu(h))
        shared_features = F.silu(h)
        outputs: list[Array] = []
        for name, head in self.heads.items():
            features = shared_features
            if name in head_embeddings:
                features = F.silu(h + head_embeddings[name])
            outputs.append(head(features).view(x.shape))
        if self.gauges:
            outputs += self.gauges(**shared_inputs)
        return tuple(outputs)
