"""Embeddings of numbers: of the times and knobs that an objective names, of classes, and of places on a grid."""

from collections.abc import Collection, Mapping, Sequence
from functools import reduce
from math import log
from operator import add

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from dumo.types import Array, Needs, Time, UserError

FREQUENCIES = 128  # DiT: 256 features, half cosines, half sines
PERIOD = 10_000.0  # DiT: the slowest wave is nearly PERIOD times as slow as the quickest
SLOPE_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # at which `Scalars.slope` is taken: ours
ROTARY_PERIOD = 100.0  # Heo et al. 2024: the same of rotary positions


class Scalars(nn.Module):
    """The sum of one embedding per input. Inputs enter raw, times `time_scale`, and r enters as the gap t - r.

    The quickest angle is time_scale * t radians. DiT feeds 1000 t, few-step models 1 t to 10 t: d/dt of a net is a
    derivative worth regressing only where its inputs are smooth in t (UCGM and MeanFlow feed raw t).
    """

    embeds_times = True  # an optimizer may give its weights a rate of their own
    frequencies: Tensor

    def __init__(self, names: tuple[str, ...], width: int, time_scale: float, *, count: int = FREQUENCIES) -> None:
        """One two-layer perceptron of `width` per name (DiT's timestep embedder), over waves of `count` frequencies."""
        super().__init__()
        self.names = names
        falling = torch.exp(-log(PERIOD) * torch.arange(count) / count)
        self.register_buffer("frequencies", time_scale * falling, persistent=False)
        self.embedders = nn.ModuleDict({name: _embedder(2 * count, width) for name in names})

    def forward(self, shift: Array | None = None, /, **inputs: Time) -> Array:
        """Return (b, width); `shift` (b, 2 count), if given, is added to the waves of every input.

        Raises TypeError for other inputs than the net was built for.
        """
        require_inputs(self.names, inputs)
        if "r" in inputs:
            inputs["r"] = inputs["t"] - inputs["r"]
        embeddings: list[Array] = []
        for name, embedder in self.embedders.items():
            waves = self._waves(inputs[name])
            embeddings.append(embedder(waves if shift is None else waves + shift))
        return reduce(add, embeddings)

    @torch.no_grad()
    def slope(self, weights: Mapping[str, Tensor]) -> float:
        """How fast the embedding of time turns: the root mean square of de/dt over that of e, at SLOPE_TIMES.

        With `weights` by their names here, for a sharded net has none in one piece. e is the embedding of t and, where
        there is one, of the gap t - r at r = 0: du/dt has de/dt as a factor. KeyError if there is no t.
        """
        precise = {name: w.to(torch.promote_types(w.dtype, torch.float32)) for name, w in weights.items()}
        first_weight = precise["embedders.t.0.weight"]
        t = torch.tensor(SLOPE_TIMES, device=first_weight.device, dtype=first_weight.dtype)

        def embedding(t: Tensor) -> Tensor:
            parts: list[Tensor] = []
            for name in ("t", "r"):
                prefix = f"embedders.{name}."
                own_weights = {full.removeprefix(prefix): w for full, w in precise.items() if full.startswith(prefix)}
                if own_weights:
                    parts.append(functional_call(self.embedders[name], own_weights, (self._waves(t),)))
            return torch.stack(parts).sum(0)

        e, de_dt = jvp(embedding, (t,), (torch.ones_like(t),))  # pyright: ignore[reportAssignmentType]
        return (de_dt.norm() / e.norm()).item()

    def _waves(self, number: Array) -> Array:
        angles = number[:, None] * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], -1)


class HeadEmbeddings(nn.Module):
    """An embedding for each head that has inputs of its own: of the time and of those inputs (ours)."""

    def __init__(self, needs: Needs, width: int, time_scale: float) -> None:
        """Embeddings of `width`. There are no parameters where all heads have the same inputs."""
        super().__init__()
        self.shared = needs.shared
        self.names = needs.names
        self.heads = nn.ModuleDict(
            {head: Scalars(("t", *names), width, time_scale) for head, names in needs.own.items()}
        )

    def forward(self, **inputs: Time) -> tuple[dict[str, Time], dict[str, Array]]:
        """Return the inputs that all heads share, and an embedding (b, width) for each head with its own.

        Raises TypeError for other inputs than the net was built for.
        """
        require_inputs(self.names, inputs)
        shared = {name: inputs[name] for name in self.shared}
        own: dict[str, Array] = {}
        for head, scalars in self.heads.items():
            if isinstance(scalars, Scalars):
                own_inputs = {name: inputs[name] for name in scalars.names}
                own[head] = scalars(**own_inputs)
        return shared, own


def require_inputs(names: Collection[str], inputs: Collection[str]) -> None:
    """Raise TypeError where the inputs have other names than these."""
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


def grid_waves(rows: int, columns: int, width: int, device: torch.device | None = None) -> Tensor:
    """Fixed sine and cosine positions of a grid, (rows columns, width), width a multiple of 4 (DiT).

    A grid of another shape has other places in the same waves: patches next to each other differ as they do elsewhere.
    """
    places = _count(max(rows, columns), device)
    count = width // 4
    angles = places[:, None] * torch.exp(-log(PERIOD) * _count(count, device) / count)
    waves = torch.cat([angles.sin(), angles.cos()], -1)
    return _on_grid(waves, rows, columns).float()


def turns(rows: int, columns: int, size: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Rotary positions (Su et al. 2021): cosines and sines of angles on a grid, each (rows columns, size / 2).

    Of a head's `size` numbers, a multiple of 4, half turn with the column and half with the row (Heo et al. 2024,
    "axial"). A pair turned by a p at place p, times one turned by a q at place q, depends on p - q alone: attention
    sees how far apart two tokens are and in which direction, but not where they are.
    """
    places = _count(max(rows, columns), device)
    count = size // 4
    frequencies = torch.exp(-log(ROTARY_PERIOD) * _count(count, device) / count)
    angles = _on_grid(places[:, None] * frequencies, rows, columns)
    return angles.cos().float(), angles.sin().float()


def _count(n: int, device: torch.device | None) -> Tensor:
    """0 ... n - 1, in float64 where the device has it."""
    has_float64 = device is None or device.type != "mps"
    return torch.arange(n, dtype=torch.float64 if has_float64 else torch.float32, device=device)


def _on_grid(places: Tensor, rows: int, columns: int) -> Tensor:
    """What a place has by its column, then by its row, (rows columns, 2 n), of a table (places, n)."""
    by_column = places[:columns].repeat(rows, 1)
    by_row = places[:rows].repeat_interleave(columns, 0)
    return torch.cat([by_column, by_row], -1)


def turn(a: Array, cos: Array, sin: Array) -> Array:
    """Turn a (b, heads, tokens, size) by the tables of `turns`: number i and number i + size / 2 are a pair."""
    one, other = a.chunk(2, -1)
    return torch.cat([one * cos - other * sin, other * cos + one * sin], -1).to(a.dtype)


class Gauges(nn.Module):
    """One learned number per row and gauge, from times and knobs alone; zero at the start (ours)."""

    def __init__(self, needs: Needs, width: int, time_scale: float) -> None:
        """One linear layer over an embedding of its own, so the trunk stays as it is without gauges."""
        super().__init__()
        self.embed = Scalars(needs.shared, width, time_scale)
        self.out = nn.Linear(width, len(needs.gauges))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, **inputs: Time) -> tuple[Array, ...]:
        """Return one (b,) tensor per gauge."""
        return self.out(self.embed(**inputs)).unbind(1)


def side_of(shape: Sequence[int], kind: str) -> int:
    """The side of square images of this shape. Raises UserError for other samples, which net `kind` does not take."""
    if len(shape) != 3 or shape[1] != shape[2]:
        raise UserError(f"net '{kind}' takes square images, not samples of shape {tuple(shape)}: use net.kind mlp")
    return shape[1]
