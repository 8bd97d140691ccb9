"""Embeddings of times and knobs, of classes, and of positions on a grid, for dumo's own networks.

1. `HeadEmbeddings` splits the inputs into those of all heads and those of single heads, which it embeds.
2. `Scalars` embeds the shared inputs, and `Gauges` computes learned numbers from them, which the network returns after
   its heads. `label_table` has a row per class.
3. `grid_waves` are positions that are added to the tokens. `apply_rotary` applies the positions of `rotary_tables` to
   queries and keys.

`side_of` and `require_inputs` check the shapes and inputs of a network. A knob is an additional input of an objective,
one number per row, like a time. Module and parameter names are the keys in checkpoints, so renaming them breaks runs.
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
PERIOD = 10_000.0  # DiT: about the ratio of the highest to the lowest frequency
SLOPE_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # the times t at which `Scalars.slope` is measured (our choice)
_ROTARY_PERIOD = 100.0  # as PERIOD, for rotary positions (Heo et al. 2024)


class Scalars(nn.Module):
    """The sum of the embeddings of times and knobs, multiplied by `time_scale`. r is embedded as the gap t - r.

    The largest angle is time_scale * t radians: 1000 t in DiT, 1 t to 10 t in few-step models, because du/dt is a
    suitable target only if the embedding is smooth in t (UCGM and MeanFlow use t).
    """

    # `dumo.training.optim` may use a separate learning rate for modules with this attribute.
    embeds_times = True
    frequencies: Tensor

    def __init__(self, names: tuple[str, ...], width: int, time_scale: float, *, count: int = FREQUENCIES) -> None:
        """Create a two-layer MLP of `width` for each name (DiT's timestep embedder), with `count` frequencies."""
        super().__init__()
        self.names = names
        decay = torch.exp(-log(PERIOD) * torch.arange(count) / count)
        self.register_buffer("frequencies", time_scale * decay, persistent=False)
        self.embedders = nn.ModuleDict({name: _embedder(2 * count, width) for name in names})

    def forward(self, wave_offset: Array | None = None, /, **inputs: Time) -> Array:
        """Embed the inputs, (b,) each, and return (b, width).

        wave_offset: (b, 2 count), added to the waves of every input, such as the class embedding of EDM's U-Net.

        Raises TypeError if the names of the inputs differ from those of the network.
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
        """Return the RMS of de/dt over the RMS of the time embedding e, at SLOPE_TIMES, for a run's log.

        e is the embedding of t plus that of the gap t - r at r = 0, if there is one.

        weights: the weights of this module by name, which the caller gathers from a sharded network.

        Raises KeyError if there is no t.
        """
        precise_weights: dict[str, Tensor] = {}
        for name, weight in weights.items():
            precise_weights[name] = weight.to(torch.promote_types(weight.dtype, torch.float32))
        first_weight = precise_weights["embedders.t.0.weight"]
        t = torch.tensor(SLOPE_TIMES, device=first_weight.device, dtype=first_weight.dtype)

        def embedding(t: Tensor) -> Tensor:
            parts: list[Tensor] = []
            # At r = 0 the gap t - r is t.
            for name in ("t", "r"):
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
    """The embeddings of inputs of a single head, together with t, for each head with such inputs (ours)."""

    def __init__(self, needs: Needs, width: int, time_scale: float) -> None:
        """Create a `Scalars` of `width` for each such head."""
        super().__init__()
        self.shared = needs.shared
        self.names = needs.names
        self.heads = nn.ModuleDict(
            {head: Scalars(("t", *names), width, time_scale) for head, names in needs.own.items()}
        )

    def forward(self, **inputs: Time) -> tuple[dict[str, Time], dict[str, Array]]:
        """Return the inputs that all heads share, (b,) each, and the embeddings (b, width) by head.

        Raises TypeError if the names of the inputs differ from those of the network.
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
    """An objective's gauges: learned numbers, one per row, such as sCT's log variance.

    They depend only on times and knobs, and are initialized to zero (our choice).
    """

    def __init__(self, needs: Needs, width: int, time_scale: float) -> None:
        """Create a linear layer on a separate embedding, so the trunk does not depend on the gauges."""
        super().__init__()
        self.embed = Scalars(needs.shared, width, time_scale)
        self.out = nn.Linear(width, len(needs.gauges))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, **inputs: Time) -> tuple[Array, ...]:
        """Return one tensor (b,) per gauge, from the shared inputs, (b,) each."""
        return self.out(self.embed(**inputs)).unbind(1)


def label_table(classes: int, width: int) -> nn.Embedding:
    """Create a table with one row per class and one for the null class `classes`, from N(0, 0.02^2) (DiT)."""
    table = nn.Embedding(classes + 1, width)
    nn.init.normal_(table.weight, std=0.02)
    return table


def grid_waves(rows: int, columns: int, width: int, device: torch.device | None = None) -> Tensor:
    """Return fixed positions of a grid: sines and cosines (rows columns, width), width a multiple of 4 (DiT).

    Row i and column j have the same waves in grids of all shapes.
    """
    indices = _arange(max(rows, columns), device)
    count = width // 4
    angles = indices[:, None] * torch.exp(-log(PERIOD) * _arange(count, device) / count)
    waves = torch.cat([angles.sin(), angles.cos()], -1)
    return _on_grid(waves, rows, columns).float()


def rotary_tables(rows: int, columns: int, head_dim: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Return rotary positions of a grid (Su et al. 2021): cosines and sines, each (rows columns, head_dim / 2).

    `head_dim`, a multiple of 4, is the width of an attention head. Half of its channels rotate with the column and half
    with the row (Heo et al. 2024, "axial"). Attention scores therefore depend only on the relative positions of tokens.
    """
    indices = _arange(max(rows, columns), device)
    count = head_dim // 4
    frequencies = torch.exp(-log(_ROTARY_PERIOD) * _arange(count, device) / count)
    angles = _on_grid(indices[:, None] * frequencies, rows, columns)
    return angles.cos().float(), angles.sin().float()


def apply_rotary(a: Array, cos: Array, sin: Array) -> Array:
    """Rotate queries or keys a (b, heads, tokens, head_dim) by `rotary_tables`, with the same shape and dtype.

    Channels i and i + head_dim / 2 are a pair.
    """
    first, second = a.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(a.dtype)


def side_of(shape: Sequence[int], kind: str) -> int:
    """Return the side of images of `shape` (channels, side, side). Raises UserError for other shapes.

    kind: the network's kind, for the message.
    """
    if len(shape) != 3 or shape[1] != shape[2]:
        raise UserError(f"net '{kind}' needs square images, not samples of shape {tuple(shape)}: set net.kind=mlp")
    return shape[1]


def require_inputs(names: Collection[str], inputs: Collection[str]) -> None:
    """Raise TypeError unless the inputs have the names `names`."""
    if set(inputs) != set(names):
        raise TypeError(f"this network has the inputs {', '.join(names)}, got {', '.join(inputs) or 'none'}")


def _weights_under(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with a name prefix, without the prefix."""
    selected: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name.startswith(prefix):
            selected[name.removeprefix(prefix)] = weight
    return selected


def _embedder(features: int, width: int) -> nn.Sequential:
    """Create a two-layer MLP with weights from N(0, 0.02^2) (DiT)."""
    layers = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return layers


def _arange(n: int, device: torch.device | None) -> Tensor:
    """Return 0 ... n - 1, (n,), in float64 if the device supports it."""
    has_float64 = device is None or device.type != "mps"
    return torch.arange(n, dtype=torch.float64 if has_float64 else torch.float32, device=device)


def _on_grid(table: Tensor, rows: int, columns: int) -> Tensor:
    """Concatenate, for each position of a grid, the table's entries for its column and its row.

    The table is (max(rows, columns), n), and the result (rows columns, 2 n).
    """
    by_column = table[:columns].repeat(rows, 1)
    by_row = table[:rows].repeat_interleave(columns, 0)
    return torch.cat([by_column, by_row], -1)
