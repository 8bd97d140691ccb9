"""Numbers in: sinusoidal embeddings of the times and knobs that an objective names, and of places on a grid."""

from collections.abc import Collection
from functools import reduce
from math import log
from operator import add

import torch
from torch import Tensor, nn

from dumo.types import Array, Needs, Time

FREQUENCIES = 128  # DiT: 256 features, half cosines, half sines
PERIOD = 10_000.0  # DiT: angles run from 1 down to nearly 1 / PERIOD as fast


class Scalars(nn.Module):
    """Sum of one embedding per named input; all enter raw, times `time_scale`, and r enters as the gap t - r.

    With `aux`, a net without the input r has an embedding for it still, and always r = 0: the gap is t.

    The quickest angle is time_scale * t radians. DiT feeds 1000 t, few-step models 1 t to 10 t: d/dt of a net is a
    derivative worth regressing only where its inputs are smooth in t (UCGM and MeanFlow feed raw t).
    """

    frequencies: Tensor

    def __init__(
        self, names: tuple[str, ...], width: int, time_scale: float, *, count: int = FREQUENCIES, aux: bool = False
    ) -> None:
        """One two-layer perceptron of `width` per name (DiT's timestep embedder), over waves of `count` frequencies."""
        super().__init__()
        self.names, self.aux = names, aux and "r" not in names
        falling = torch.exp(-log(PERIOD) * torch.arange(count) / count)
        self.register_buffer("frequencies", time_scale * falling, persistent=False)
        self.embedders = nn.ModuleDict({name: _embedder(2 * count, width) for name in (*names, *("r",) * self.aux)})

    def forward(self, shift: Array | None = None, /, **inputs: Time) -> Array:
        """Return (b, width); `shift` (b, 2 count), if given, is added to the waves of every input.

        Raises TypeError where the names are not those the net was built for.
        """
        check(self.names, inputs)
        if "r" in inputs:
            inputs["r"] = inputs["t"] - inputs["r"]
        elif self.aux:
            inputs["r"] = inputs["t"]
        waves = ((name, self._waves(inputs[name])) for name in self.embedders)
        return reduce(add, (self.embedders[name](w if shift is None else w + shift) for name, w in waves))

    def _waves(self, number: Array) -> Array:
        angles = number[:, None] * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], -1)


class Own(nn.Module):
    """An embedding for every head that is told more than the others, of time and of what it alone is told (ours)."""

    def __init__(self, needs: Needs, width: int, time_scale: float) -> None:
        """Embeddings of `width`. A net whose heads are all told the same has no parameter here."""
        super().__init__()
        self.shared, self.names = needs.shared, needs.names
        self.heads = nn.ModuleDict(
            {head: Scalars(("t", *names), width, time_scale) for head, names in needs.own.items()}
        )

    def forward(self, **inputs: Time) -> tuple[dict[str, Time], dict[str, Array]]:
        """Return what all heads are told, and (b, width) for each that is told more.

        Raises TypeError where the names are not those the net was built for.
        """
        check(self.names, inputs)
        more = {
            head: scalars(**{name: inputs[name] for name in scalars.names})
            for head, scalars in self.heads.items()
            if isinstance(scalars, Scalars)
        }
        return {name: inputs[name] for name in self.shared}, more


def check(names: Collection[str], inputs: Collection[str]) -> None:
    """Raise TypeError where the inputs are not those of these names."""
    if set(inputs) != set(names):
        raise TypeError(f"this net takes {', '.join(names)}; it got {', '.join(inputs) or 'nothing'}")


def _embedder(features: int, width: int) -> nn.Sequential:
    """DiT: both weights from N(0, 0.02^2)."""
    layers = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return layers


def label_table(classes: int, width: int) -> nn.Embedding:
    """One row per class and one for the null class, index `classes`; N(0, 0.02^2) (DiT)."""
    table = nn.Embedding(classes + 1, width)
    nn.init.normal_(table.weight, std=0.02)
    return table


def grid_waves(side: int, width: int) -> Tensor:
    """Fixed sine and cosine positions of a side x side grid, (side^2, width), width a multiple of 4 (DiT)."""
    quarter = torch.exp(-log(PERIOD) * torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    place = torch.arange(side, dtype=torch.float64)
    waves = torch.cat([(a := place[:, None] * quarter).sin(), a.cos()], -1)
    column, row = waves.repeat(side, 1), waves.repeat_interleave(side, 0)
    return torch.cat([column, row], -1).float()
