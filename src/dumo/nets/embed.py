"""Embeddings that the nets of dumo share: of times and knobs, of classes, and of positions on a grid.

A net makes these when it is built, and calls them in each pass, in this order:

1. `HeadEmbeddings` splits the inputs into those that all heads share and those of single heads, which it embeds.
2. `Scalars` embeds the shared inputs, and `Gauges` makes learned numbers of them, which the net returns behind its
   heads. `label_table` has a row per class.
3. `grid_waves` are positions that are added to the tokens. `rotary_tables` are positions that `apply_rotary` puts into
   queries and keys.

`side_of` and `require_inputs` check what a net is built for and called with. A knob is a further input of an objective,
one number a row, as a time is. The names of modules and parameters are those in checkpoints, so a rename breaks runs.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import reduce
from math import log
from operator import add

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from dumo.types import Array, Needs, Time, UserError

FREQUENCIES = 128  # DiT: 256 features, half cosines, half sines
PERIOD = 10_000.0  # DiT: the quickest wave is nearly this many times as quick as the slowest
SLOPE_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # the times t at which `Scalars.slope` is taken (ours)
_ROTARY_PERIOD = 100.0  # as PERIOD, of rotary positions (Heo et al. 2024)


class Scalars(nn.Module):
    """Embeds times and knobs, and sums the embeddings. All are multiplied by `time_scale`; r enters as the gap t - r.

    The quickest angle is time_scale * t radians. DiT feeds 1000 t, few-step models 1 t to 10 t: d/dt of a net is a
    derivative worth regressing only where its inputs are smooth in t (UCGM and MeanFlow feed raw t).
    """

    embeds_times = True  # `dumo.training.optim` may give the weights of such modules a learning rate of their own
    frequencies: Tensor

    def __init__(self, names: tuple[str, ...], width: int, time_scale: float, *, count: int = FREQUENCIES) -> None:
        """Make a two-layer perceptron of `width` for each name (DiT's timestep embedder).

        It reads cosines and sines of the input at `count` frequencies.
        """
        super().__init__()
        self.names = names
        decay = torch.exp(-log(PERIOD) * torch.arange(count) / count)
        self.register_buffer("frequencies", time_scale * decay, persistent=False)
        self.embedders = nn.ModuleDict({name: _embedder(2 * count, width) for name in names})

    def forward(self, wave_offset: Array | None = None, /, **inputs: Time) -> Array:
        """Embed the inputs, (b,) each, and return (b, width).

        `wave_offset` (b, 2 count), if given, is added to the waves of every input; EDM's U-Net gives its embedding of
        the class. Raises TypeError for other inputs than the net was built for.
        """
        require_inputs(self.names, inputs)
        numbers = dict(inputs)
        if "r" in numbers:
            numbers["r"] = inputs["t"] - inputs["r"]
        embeddings: list[Array] = []
        for name, embedder in self.embedders.items():
            waves = self._waves(numbers[name])
            if wave_offset is not None:
                waves = waves + wave_offset
            embeddings.append(embedder(waves))
        return reduce(add, embeddings)

    @torch.no_grad()
    def slope(self, weights: Mapping[str, Tensor]) -> float:
        """Return how quickly the embedding e of time changes, at SLOPE_TIMES: the RMS of de/dt over the RMS of e.

        A run's log has it, because du/dt has de/dt as a factor. e is the embedding of t plus, where there is one, that
        of the gap t - r at r = 0. `weights` are this module's, by name: the caller gathers them, because a sharded net
        has none in one piece. Raises KeyError if there is no t.
        """
        precise_weights: dict[str, Tensor] = {}  # at least in float32
        for name, weight in weights.items():
            precise_weights[name] = weight.to(torch.promote_types(weight.dtype, torch.float32))
        first_weight = precise_weights["embedders.t.0.weight"]
        t = torch.tensor(SLOPE_TIMES, device=first_weight.device, dtype=first_weight.dtype)

        def embedding(t: Tensor) -> Tensor:
            parts: list[Tensor] = []
            for name in ("t", "r"):  # at r = 0 the gap t - r is t
                embedder_weights = _weights_under(f"embedders.{name}.", precise_weights)
                if embedder_weights:
                    parts.append(functional_call(self.embedders[name], embedder_weights, (self._waves(t),)))
            return torch.stack(parts).sum(0)

        e, de_dt = jvp(embedding, (t,), (torch.ones_like(t),))  # pyright: ignore[reportAssignmentType]
        return (de_dt.norm() / e.norm()).item()

    def _waves(self, number: Array) -> Array:
        """Return the cosines, then the sines, (b, 2 count), of a number (b,) at all frequencies."""
        angles = number[:, None] * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], -1)


class HeadEmbeddings(nn.Module):
    """Embeds the inputs that only one head reads, together with t, for each head that has such inputs (ours)."""

    def __init__(self, needs: Needs, width: int, time_scale: float) -> None:
        """Make a `Scalars` of `width` for each such head. Where all heads have the same inputs, there are none."""
        super().__init__()
        self.shared = needs.shared
        self.names = needs.names
        self.heads = nn.ModuleDict(
            {head: Scalars(("t", *names), width, time_scale) for head, names in needs.own.items()}
        )

    def forward(self, **inputs: Time) -> tuple[dict[str, Time], dict[str, Array]]:
        """Return the inputs that all heads share, (b,) each, and the embeddings (b, width) by head.

        Raises TypeError for other inputs than the net was built for.
        """
        require_inputs(self.names, inputs)
        shared = {name: inputs[name] for name in self.shared}
        embeddings: dict[str, Array] = {}
        for head, scalars in self.heads.items():
            assert isinstance(scalars, Scalars)  # a ModuleDict has no types
            head_inputs = {name: inputs[name] for name in scalars.names}
            embeddings[head] = scalars(**head_inputs)
        return shared, embeddings


class Gauges(nn.Module):
    """Makes an objective's gauges: numbers that are learned with the net, one per row (sCT: a log-variance).

    They depend on times and knobs alone, and are zero at the start (ours).
    """

    def __init__(self, needs: Needs, width: int, time_scale: float) -> None:
        """Make a linear layer over an embedding of its own, so the trunk does not depend on the gauges."""
        super().__init__()
        self.embed = Scalars(needs.shared, width, time_scale)
        self.out = nn.Linear(width, len(needs.gauges))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, **inputs: Time) -> tuple[Array, ...]:
        """Return one tensor (b,) per gauge, from the shared inputs, (b,) each."""
        return self.out(self.embed(**inputs)).unbind(1)


def label_table(classes: int, width: int) -> nn.Embedding:
    """Make a table with one row per class and one for the null class, index `classes`, from N(0, 0.02^2) (DiT)."""
    table = nn.Embedding(classes + 1, width)
    nn.init.normal_(table.weight, std=0.02)
    return table


def grid_waves(rows: int, columns: int, width: int, device: torch.device | None = None) -> Tensor:
    """Return fixed positions of a grid: sines and cosines (rows columns, width), width a multiple of 4 (DiT).

    The waves do not depend on the shape of the grid: row i and column j have the same waves in grids of all shapes.
    """
    indices = _arange(max(rows, columns), device)
    count = width // 4
    angles = indices[:, None] * torch.exp(-log(PERIOD) * _arange(count, device) / count)
    waves = torch.cat([angles.sin(), angles.cos()], -1)
    return _on_grid(waves, rows, columns).float()


def rotary_tables(rows: int, columns: int, head_dim: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Return rotary positions of a grid (Su et al. 2021): cosines and sines, each (rows columns, head_dim / 2).

    `head_dim`, a multiple of 4, is the width of an attention head. Half of its numbers turn with the column and half
    with the row (Heo et al. 2024, "axial"). The product of a pair turned by a p at position p and one turned by a q at
    position q depends on p - q alone: attention sees how far apart two tokens are and in which direction, but not where
    they are.
    """
    indices = _arange(max(rows, columns), device)
    count = head_dim // 4
    frequencies = torch.exp(-log(_ROTARY_PERIOD) * _arange(count, device) / count)
    angles = _on_grid(indices[:, None] * frequencies, rows, columns)
    return angles.cos().float(), angles.sin().float()


def apply_rotary(a: Array, cos: Array, sin: Array) -> Array:
    """Turn queries or keys a (b, heads, tokens, head_dim) by `rotary_tables`; returns their shape and type.

    The numbers i and i + head_dim / 2 are a pair.
    """
    first, second = a.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(a.dtype)


def side_of(shape: Sequence[int], kind: str) -> int:
    """Return the side of images of `shape`, (channels, side, side). Raises UserError for samples of other shapes.

    `kind` is the net's, which the message names.
    """
    if len(shape) != 3 or shape[1] != shape[2]:
        raise UserError(f"net '{kind}' takes square images, not samples of shape {tuple(shape)}: use net.kind mlp")
    return shape[1]


def require_inputs(names: Collection[str], inputs: Collection[str]) -> None:
    """Raise TypeError unless the names of a net's inputs are `names`."""
    if set(inputs) != set(names):
        raise TypeError(f"this net takes {', '.join(names)}; it got {', '.join(inputs) or 'nothing'}")


def _weights_under(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights whose names begin with `prefix`, by the rest of their names."""
    selected: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name.startswith(prefix):
            selected[name.removeprefix(prefix)] = weight
    return selected


def _embedder(features: int, width: int) -> nn.Sequential:
    """Make a perceptron of two layers, with weights from N(0, 0.02^2) (DiT)."""
    layers = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return layers


def _arange(n: int, device: torch.device | None) -> Tensor:
    """Return 0 ... n - 1, (n,), in float64 where the device has it."""
    has_float64 = device is None or device.type != "mps"
    return torch.arange(n, dtype=torch.float64 if has_float64 else torch.float32, device=device)


def _on_grid(table: Tensor, rows: int, columns: int) -> Tensor:
    """Return for each position of a grid the table's row for its column, then that for its row.

    The table is (max(rows, columns), n); the result is (rows columns, 2 n).
    """
    by_column = table[:columns].repeat(rows, 1)
    by_row = table[:rows].repeat_interleave(columns, 0)
    return torch.cat([by_column, by_row], -1)
