"""Metrics of a training step: `StepMetrics.reduce` averages them over ranks.

All numbers are reduced at once and copied from the device once; this is the only synchronization of a step. They are
sums and counts by bins of t, the gradient norm, and a few flags. All ranks make the same decisions, because a loss that
is not finite on one rank is not finite in the sum. `find_bad_rows` then finds the rows that caused it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from dumo.runtime import dist, signals
from dumo.training.duration import Timing
from dumo.types import Cond, PerSample, Terms, Time

# Bins of equal width over t.
_BINS = 10
# Rows of a skipped step that the log lists.
MAX_LISTED_ROWS = 16
# Fields that are not logged, because they are not metrics or are usually empty.
_UNLOGGED_FIELDS = ("received_signal", "checkpoint_due", "timing", "skipped")

# The t, class, index in the batch, and rank of a row.
BatchRow = dict[str, float | int | None]


@dataclass(frozen=True)
class Skipped:
    """The reason that a step was skipped, and the rows that caused it. The field names are keys in the log."""

    # The names of the non-finite values: loss, parts, notes, or the gradient norm.
    what: str
    # The number of bad rows, and of all rows of the batch.
    count: int
    of: int
    # The smallest and the largest t of the bad rows.
    t: tuple[float, float]
    # The first MAX_LISTED_ROWS bad rows; empty if only the gradient is not finite.
    rows: list[BatchRow]

    def __str__(self) -> str:
        low, high = self.t
        return f"{self.what} is not finite, in {self.count} of {self.of} rows, t in [{low:.3f}, {high:.3f}]"


@dataclass(frozen=True)
class StepMetrics:
    """The metrics of a step: means over the global batch."""

    # Steps done and images seen, including this step.
    step: int
    images: int
    loss: float
    # Named terms of the loss, and further values that the objective reports.
    parts: dict[str, float]
    notes: dict[str, float]
    # Loss, parts and notes in ten bins of t, from data to noise; nan for an empty bin. `counts` are the rows per bin.
    bins: dict[str, list[float]]
    counts: list[int]
    # The norm of the gradient of all trained weights, before clipping.
    grad_norm: float
    lr: float
    # The reason that the step was skipped; None if it was applied.
    skipped: Skipped | None = None
    # The number of a signal that any rank received; the same on all ranks.
    received_signal: int | None = None
    # Whether a checkpoint is due by rank 0's clock.
    checkpoint_due: bool = False
    # Progress by rank 0's clock before this step; None without a time limit.
    timing: Timing | None = None

    @classmethod
    def reduce(
        cls,
        t: Time,
        terms: Terms,
        norm: Tensor,
        *,
        step: int,
        images: int,
        lr: float,
        checkpoint_due: bool = False,
        timing: Timing | None = None,
    ) -> "StepMetrics":
        """Average the metrics of a step over ranks. Every rank must call it.

        - `t` (b,), `terms` (b,) each: the times and loss terms of this rank's rows
        - `norm` (): the gradient norm, on the device
        - `step`, `images`: steps done and images seen, including this step
        - `checkpoint_due`, `timing`: used on rank 0 only, whose clock decides for all ranks
        """
        # Reduce everything at once: sums by bins of t, and flags of ranks.
        columns = _columns_of(terms)
        bins = (t * _BINS).long().clamp(0, _BINS - 1)
        is_over_here = timing is not None and timing.share >= 1 and dist.is_main()
        times_here = [timing.seconds, timing.share] if timing and dist.is_main() else [0.0, 0.0]
        signal_here = signals.poll()
        sums_here = {f"sums of {name}": _sums_by_bin(bins, column.to(t)) for name, column in columns.items()}
        means = _mean_over_ranks(
            {
                **sums_here,
                "counts": _sums_by_bin(bins, torch.ones_like(t)),
                "signals": _filled(t, [signal_here == number for number in signals.SIGNALS]),
                "flags": _filled(t, [checkpoint_due and dist.is_main(), is_over_here]),
                "clock": _filled(t, times_here),
                "norm": norm.reshape(1),
            },
            like=t,
        )
        counts = means["counts"]
        sums = {name: means[f"sums of {name}"] for name in columns}
        column_means = {name: sum(row) / sum(counts) for name, row in sums.items()}

        # Read the shared flags: signals, a due checkpoint, the clock.
        signals_received = [number for number, flag in zip(signals.SIGNALS, means["signals"], strict=True) if flag]
        due_flag, over_flag = means["flags"]
        if timing and over_flag > 0:
            timing = timing.at_end()
        elif timing:
            # Only rank 0 contributed its clock, so multiply the mean by the number of ranks.
            seconds, share = (value * dist.world() for value in means["clock"])
            timing = timing.model_copy(update={"seconds": seconds, "share": share})
        return cls(
            step=step,
            images=images,
            loss=column_means["loss"],
            parts={name: column_means[name] for name in terms.parts},
            notes={name: column_means[name] for name in terms.notes},
            bins={name: _means_by_bin(row, counts) for name, row in sums.items()},
            counts=[round(n * dist.world()) for n in counts],
            grad_norm=means["norm"][0],
            lr=lr,
            received_signal=signals_received[0] if signals_received else None,
            checkpoint_due=due_flag > 0,
            timing=timing,
        )

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient norm are finite, so that the step may be applied."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def error(self) -> float:
        """The size of the error: the sum of the loss's parts, or the loss itself if it has none.

        A loss may be weighted by its own size, and is then constant; its parts are mean squares.
        """
        return sum(map(abs, self.parts.values())) or abs(self.loss)

    def row(self) -> dict[str, Any]:
        """Return the metrics as a log row."""
        row = asdict(self)
        logged = {name: value for name, value in row.items() if name not in _UNLOGGED_FIELDS}
        if self.skipped:
            logged["skipped"] = row["skipped"]
        return logged


def join_terms(terms: Sequence[Terms]) -> Terms:
    """Concatenate the terms of micro-batches."""
    first = terms[0]
    return Terms(
        torch.cat([part.loss for part in terms]),
        {name: torch.cat([part.parts[name] for part in terms]) for name in first.parts},
        {name: torch.cat([part.notes[name] for part in terms]) for name in first.notes},
    )


def find_bad_rows(metrics: StepMetrics, t: Time, c: Cond, terms: Terms) -> Skipped:
    """Find the rows of all ranks with non-finite values. Every rank must call it."""
    times_by_rank = dist.all_gather(t)
    times = torch.cat(times_by_rank)
    rank_of_row: list[int] = []
    for rank, times_of_rank in enumerate(times_by_rank):
        rank_of_row += [rank] * len(times_of_rank)

    # Find the columns that are not finite, and their rows.
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
        what = "the mean loss" if math.isfinite(metrics.grad_norm) else "the gradient norm"
        places = torch.arange(len(times))
        listed = []
    rows: list[BatchRow] = []
    for place in listed:
        t_of_row = times[place].item()
        rows.append({"t": t_of_row, "class": labels[place], "place": place, "rank": rank_of_row[place]})
    earliest = times[places].min().item()
    latest = times[places].max().item()
    return Skipped(what, len(places), len(times), (earliest, latest), rows)


def _mean_over_ranks(parts: Mapping[str, Tensor], like: Tensor) -> dict[str, list[float]]:
    """Average tensors over ranks with one reduction and one copy from the device of `like`. Return flat lists."""
    flat = torch.cat([part.to(like).flatten() for part in parts.values()])
    numbers = iter(dist.mean(flat).tolist())
    return {name: list(islice(numbers, part.numel())) for name, part in parts.items()}


def _sums_by_bin(bins: Tensor, column: PerSample) -> Tensor:
    """Return the sum of the rows of each bin, (_BINS,). `bins` (b,) is the bin of each row."""
    return column.new_zeros(_BINS).index_add_(0, bins, column)


def _filled(t: Time, values: Sequence[float | bool]) -> Tensor:
    """Create a tensor on t's device, filled element by element, because a copy would synchronize with the device."""
    row = t.new_zeros(len(values))
    for place, value in enumerate(values):
        if value:
            row[place] = value
    return row


def _means_by_bin(sums: Sequence[float], counts: Sequence[float]) -> list[float]:
    """Return the mean of each bin; nan if it is empty."""
    return [total / n if n else math.nan for total, n in zip(sums, counts, strict=True)]


def _columns_of(terms: Terms) -> dict[str, PerSample]:
    """Return the loss, its parts and notes by name."""
    return {"loss": terms.loss, **terms.parts, **terms.notes}
