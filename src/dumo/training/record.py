"""What a training step measures, reduced over ranks: `measure` returns the step's `Record`.

All numbers are reduced at once and copied from the device once, which is the only point where a step waits for its
device. They are sums and counts by bins of t, the gradient norm and a few flags, so all ranks decide alike: a loss that
is not finite on one rank is not finite in the sum. `skip_reason` then says which rows are to blame.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from dumo.runtime import dist, signals
from dumo.training.deadline import Timing
from dumo.training.state import State
from dumo.types import Cond, PerSample, Terms, Time

_BINS = 10  # equally wide bins of t
MAX_LISTED_ROWS = 16  # rows of a skipped step that the log lists
# Fields of a record that are not measurements, or that most steps lack.
_UNLOGGED_FIELDS = ("received_signal", "due", "timing", "skipped")

BatchRow = dict[str, float | int | None]  # t, class, place in the batch, and rank


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
    grad_norm: float  # of all trained weights, before clipping
    lr: float
    skipped: Skipped | None = None  # why it was not applied; None: it was
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
        logged = {name: value for name, value in row.items() if name not in _UNLOGGED_FIELDS}
        if self.skipped:
            logged["skipped"] = row["skipped"]
        return logged


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
    is_over_here = timing is not None and timing.is_over and dist.is_main()
    times_here = [timing.seconds, timing.share] if timing and dist.is_main() else [0.0, 0.0]
    signal_here = signals.poll()
    sums_here = {f"sums of {name}": _sums_by_bin(bins, column.to(t)) for name, column in columns.items()}
    means = _mean_over_ranks(
        {
            **sums_here,
            "counts": _sums_by_bin(bins, torch.ones_like(t)),
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
    times_by_rank = dist.all_gather(t)
    times = torch.cat(times_by_rank)
    rank_of_row: list[int] = []
    for rank, times_of_rank in enumerate(times_by_rank):
        rank_of_row += [rank] * len(times_of_rank)

    # which columns are not finite, and in which rows
    broken: dict[str, Tensor] = {}
    for name, column in _columns_of(terms).items():
        is_broken = ~torch.cat(dist.all_gather(column)).isfinite()
        if is_broken.any():
            broken[name] = is_broken
    labels: list[int | None] = [None] * len(times)
    if c.ndim == 1:
        labels = torch.cat(dist.all_gather(c)).tolist()

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
