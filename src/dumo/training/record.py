"""What a step measures, reduced over ranks at once.

A step calls `measure`, which returns its `Record`. If a number in it is not finite, the step calls `skip_reason`, and
if the step is probed, `probe_net`.

All numbers are reduced once and copied from the device once, the only point where a step waits for its device. They are
sums and counts by time, gradient norms and a few flags, so all ranks decide alike: a loss that is not finite on one
rank is not finite in the sum.

Some steps are probed: do the parts of the loss pull the net the same way, and do its heads agree? A step of length h
down the gradient g_a of part a changes part b by -h |g_b| cos(g_a, g_b) to first order. So a cosine of 1 means that
what serves one part serves the other, 0 that they are independent, and below 0 that each undoes part of the other's
work. App. D of the paper claims that velocity and flow map do not conflict: this measures it. Along the exact flow the
endpoint rests. DuMo's is x_t - t u, and moves by v - (u + t du/dt). So the drift of the endpoint along the net's own
velocity is how far its two readings are from one flow.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations, islice
from typing import Any

import torch
from torch import Tensor, nn

from dumo.flow import dropout
from dumo.runtime import dist, signals
from dumo.training.burst import local_squares
from dumo.training.deadline import Timing
from dumo.training.layout import full_tensor, trains_in_16_bits
from dumo.training.state import State
from dumo.types import Cond, Noised, PerSample, Reads, Terms, Time, mean_square

_BINS = 10  # of t, equally wide: ours
MAX_LISTED_ROWS = 16  # of a skipped step: ours
# Fields of a record that are no measurement, or that few steps have.
_UNLOGGED_FIELDS = ("received_signal", "due", "timing", "skipped", "burst")

_HALF_STEP = 0.005  # of the probe's difference, as `dumo.flow.slope.CentralSlope`

Gradient = list[Tensor | None]  # by parameter
BatchRow = dict[str, float | int | None]  # t, class, place in the batch, and rank


@dataclass(frozen=True)
class Probe:
    """How the gradients of the parts' means agree on the trunk, the parameters that all reach; and the drift."""

    norms: dict[str, float]  # by part, without its weight in the loss
    cosines: dict[str, float]  # of two parts, as "v,u", in [-1, 1] to rounding; nan if they share no parameter
    # Mean square of d/dt of the endpoint along the velocity; None if the net lacks one, or is trained in 16 bits.
    drift: float | None


@dataclass(frozen=True)
class Skipped:
    """Why a step was not applied, and the rows that are to blame: all of them if only the gradient is not finite.

    The names of the fields are keys in the log.
    """

    what: str  # loss, the names of parts or notes, or the gradient norm
    count: int
    of: int  # the number of rows of the batch
    t: tuple[float, float]  # the earliest and the latest of these rows
    rows: list[BatchRow]  # the first MAX_LISTED_ROWS of them; none if only the gradient is to blame

    def __str__(self) -> str:
        low, high = self.t
        return f"{self.what} is not finite, in {self.count} of {self.of} rows, t in [{low:.3f}, {high:.3f}]"


@dataclass(frozen=True)
class Record:
    """What one step measured: means over the global batch."""

    step: int  # steps done, this one included
    images: int  # images seen, this batch included
    loss: float
    parts: dict[str, float]  # the loss's named parts
    notes: dict[str, float]  # what else the objective watches
    bins: dict[str, list[float]]  # loss, parts and notes in ten bins of t, data to noise; nan if empty
    counts: list[int]  # rows per bin
    grad_norm: float  # before clipping, as all norms
    lr: float
    probe: Probe | None = None  # whether parts and heads agree, after the step; None if it was not probed
    skipped: Skipped | None = None  # why it was not applied; None: it was
    grad_norms: dict[str, float] = field(default_factory=dict[str, float])  # by module (`dumo.training.burst`)
    grad_peaks: dict[str, float] = field(default_factory=dict[str, float])  # the largest of the last steps
    burst: dict[str, float] = field(default_factory=dict[str, float])  # modules whose burst begins, times the median
    received_signal: int | None = None  # the number of the signal that a rank got, the same on all
    due: bool = False  # whether a checkpoint is due by rank 0's clock
    timing: Timing | None = None  # how far it is by rank 0's clock, before this step; None: it ends by its steps

    @property
    def is_finite(self) -> bool:
        """Whether the step may be applied."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    def row(self) -> dict[str, Any]:
        """The record as a row of the log."""
        row = asdict(self)
        rarely_logged = {name: row[name] for name in ("skipped", "burst") if row[name]}
        return {name: value for name, value in row.items() if name not in _UNLOGGED_FIELDS} | rarely_logged


def measure(
    state: State,
    t: Time,
    terms: Terms,
    norm: Tensor,
    *,
    images: int,
    lr: float,
    due: bool = False,
    timing: Timing | None = None,
) -> Record:
    """The record of the step about to be made on a batch of `images` rows. Every rank must call it.

    `norm` is the gradient norm, on the device; `due` and `timing` count on rank 0 alone, whose clock decides.
    """
    columns = _columns_of(terms)
    bins = (t * _BINS).long().clamp(0, _BINS - 1)
    squares_here = local_squares([*state.module_parameters.values()])
    is_over_here = timing is not None and timing.is_over and dist.is_main()
    times_here = [timing.seconds, timing.share] if timing and dist.is_main() else [0.0, 0.0]
    signal_here = signals.poll()
    sums_here = {f"sums of {name}": _sums_by_bin(bins, column.to(t)) for name, column in columns.items()}
    means = _mean_over_ranks(
        {
            **sums_here,
            "counts": _sums_by_bin(bins, torch.ones_like(t)),
            "squares": torch.stack(squares_here) if squares_here else t.new_zeros(len(state.module_parameters)),
            "signals": _filled(t, [signal_here == number for number in signals.SIGNALS]),
            "flags": _filled(t, [due and dist.is_main(), is_over_here]),
            "clock": _filled(t, times_here),
            "norm": norm.reshape(1),
        },
        like=t,
    )
    counts = means["counts"]
    sums = {name: means[f"sums of {name}"] for name in columns}
    column_means = {name: sum(row) / sum(counts) for name, row in sums.items()}

    # what ranks decide together: signals, a checkpoint that is due, the clock
    signals_received = [number for number, flag in zip(signals.SIGNALS, means["signals"], strict=True) if flag]
    due_flag, over_flag = means["flags"]
    if timing and over_flag > 0:
        timing = timing.at_end()
    elif timing:
        # the mean over ranks of what rank 0 alone wrote
        seconds, share = (value * dist.world() for value in means["clock"])
        timing = timing.model_copy(update={"seconds": seconds, "share": share})
    return Record(
        step=state.step + 1,
        images=state.images + images,
        loss=column_means["loss"],
        parts={name: column_means[name] for name in terms.parts},
        notes={name: column_means[name] for name in terms.notes},
        bins={name: _means_by_bin(row, counts) for name, row in sums.items()},
        counts=[round(n * dist.world()) for n in counts],
        grad_norm=means["norm"][0],
        grad_norms={
            name: math.sqrt(square) for name, square in zip(state.module_parameters, means["squares"], strict=True)
        },
        lr=lr,
        received_signal=signals_received[0] if signals_received else None,
        due=due_flag > 0,
        timing=timing,
    )


def _mean_over_ranks(parts: Mapping[str, Tensor], like: Tensor) -> dict[str, list[float]]:
    """The mean over ranks of each tensor, flat, by name: one reduction, and one copy from the device of `like`."""
    flat = torch.cat([part.to(like).flatten() for part in parts.values()])
    numbers = iter(dist.mean(flat).tolist())
    return {name: list(islice(numbers, part.numel())) for name, part in parts.items()}


def _sums_by_bin(bins: Tensor, column: PerSample) -> Tensor:
    """The sum of the rows of each bin, of shape (_BINS,). `bins` has the bin of each row."""
    return column.new_zeros(_BINS).index_add_(0, bins, column)


def _filled(t: Time, values: Sequence[float | bool]) -> Tensor:
    """Numbers of the host on t's device, put in one by one: a copy would wait for the device."""
    row = t.new_zeros(len(values))
    for place, value in enumerate(values):
        if value:  # else it is 0 already
            row[place] = value
    return row


def _means_by_bin(sums: Sequence[float], counts: Sequence[float]) -> list[float]:
    """The mean of each bin; nan if it is empty."""
    return [total / n if n else math.nan for total, n in zip(sums, counts, strict=True)]


def _columns_of(terms: Terms) -> dict[str, PerSample]:
    """The loss, its parts and notes, by name."""
    return {"loss": terms.loss, **terms.parts, **terms.notes}


def skip_reason(record: Record, t: Time, c: Cond, terms: Terms) -> Skipped:
    """The rows, of all ranks, that make a record not finite. Every rank must call it."""
    times_by_rank = dist.all_gather_ragged(t)
    times = torch.cat(times_by_rank)
    rank_of_row: list[int] = []
    for rank, times_of_rank in enumerate(times_by_rank):
        rank_of_row += [rank] * len(times_of_rank)

    # which columns are not finite, and in which rows
    broken: dict[str, Tensor] = {}
    for name, column in _columns_of(terms).items():
        is_broken = ~torch.cat(dist.all_gather_ragged(column)).isfinite()
        if is_broken.any():
            broken[name] = is_broken
    labels: list[int | None] = [None] * len(times)
    if c.ndim == 1:
        labels = torch.cat(dist.all_gather_ragged(c)).tolist()

    if broken:
        what = ", ".join(broken)
        places = torch.stack([*broken.values()]).any(0).nonzero().flatten()
        listed = places[:MAX_LISTED_ROWS].tolist()
    else:
        what = "the mean loss" if math.isfinite(record.grad_norm) else "the gradient norm"
        places = torch.arange(len(times))
        listed = []
    rows: list[BatchRow] = []
    for place in listed:
        t_of_row = times[place].item()
        rows.append({"t": t_of_row, "class": labels[place], "place": place, "rank": rank_of_row[place]})
    earliest = times[places].min().item()
    latest = times[places].max().item()
    return Skipped(what, len(places), len(times), (earliest, latest), rows)


def probe_net(net: nn.Module, reads: Reads, parts: Iterable[str], b: Noised, loss: Callable[[], Terms]) -> Probe | None:
    """Probe a net on these rows, whose loss is `loss()`; None if there is nothing to compare.

    Each of two or more parts costs a loss and a backward pass, the drift three passes. Weights and buffers stay.
    Gradients are dropped, but stay where there are fewer than two parts. Every rank must call it; the result is over
    all ranks' rows.
    """
    saved_buffers = [(buffer, buffer.clone()) for buffer in net.buffers()]
    norms, cosines = compare_gradients(net, parts, loss)
    drift = None
    if not trains_in_16_bits(net):  # so short a difference would be of rounding
        drift = endpoint_drift(reads, b)
    for buffer, saved in saved_buffers:
        buffer.copy_(saved)
    if not cosines and drift is None:
        return None
    return Probe(norms, cosines, drift)


def compare_gradients(
    net: nn.Module, parts: Iterable[str], loss: Callable[[], Terms]
) -> tuple[dict[str, float], dict[str, float]]:
    """Norms and cosines of the gradients, as in `Probe`; none of a single part."""
    names = list(parts)
    if len(names) < 2:
        return {}, {}
    gradients = [_part_gradient(net, name, loss) for name in names]
    net.zero_grad()
    shared = [row for row in zip(*gradients, strict=True) if _reached_by_all(row)]  # by parameter, then by part

    def product(i: int, j: int) -> float:
        return math.fsum(full_tensor((row[i] * row[j]).sum()).item() for row in shared)  # the sum over all shards

    norms = [math.sqrt(product(i, i)) for i in range(len(names))]
    cosines: dict[str, float] = {}
    for i, j in combinations(range(len(names)), 2):
        cosine = product(i, j) / (norms[i] * norms[j]) if shared else math.nan
        cosines[f"{names[i]},{names[j]}"] = cosine
    return dict(zip(names, norms, strict=True)), cosines


def _reached_by_all(gradients: Iterable[Tensor | None]) -> bool:
    """Whether each part has a gradient of this parameter that is not 0. Every rank must call it."""
    return all(g is not None and bool(full_tensor(g.abs().sum())) for g in gradients)


def _part_gradient(net: nn.Module, part: str, loss: Callable[[], Terms]) -> Gradient:
    """The gradient of the mean of one part of a loss, averaged over ranks by the net's wrapper."""
    net.zero_grad()
    terms = loss()
    (terms.parts[part].mean() + 0 * terms.loss.mean()).backward()  # reaches all: a replicated net waits for each
    return [p.grad for p in net.parameters()]


@torch.no_grad()
def endpoint_drift(reads: Reads, b: Noised) -> float | None:
    """The drift of `Probe` by a central difference, so for time_scale <= 10, without dropout."""
    if reads.velocity is None or reads.endpoint is None:
        return None
    with dropout.off():
        v = reads.velocity(b.x_t, b.t, b.c)
        behind = reads.endpoint(b.x_t - _HALF_STEP * v, b.t - _HALF_STEP, b.c)
        ahead = reads.endpoint(b.x_t + _HALF_STEP * v, b.t + _HALF_STEP, b.c)
    return dist.mean(mean_square((ahead - behind) / (2 * _HALF_STEP)).mean()).item()
