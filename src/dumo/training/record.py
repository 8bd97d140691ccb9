"""What a step measures, and what it agrees on with other ranks: one table of numbers.

It goes over ranks in one all-reduce and from the device in one copy, the only point at which a step waits for its
device. Sums and counts by time, the gradient norm and a few words of yes or no stand in it, so all ranks decide alike:
a loss that is not finite on one of them is not finite in the sum.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dumo import dist, stop
from dumo.training.probe import Probe
from dumo.training.state import State
from dumo.types import Cond, PerSample, Terms, Time

BINS = 10  # of t, equally wide: ours
LISTED = 16  # rows of a skipped step that are named: ours
OWN = (
    "asked",
    "due",
    "skipped",
)  # fields of a record that are no measurement: in the log only where they say something

Row = dict[str, float | int | None]  # of a batch: t, its class, its place in the batch and its rank


@dataclass(frozen=True)
class Skipped:
    """Why a step was not applied, and which rows of its batch are to blame: all of them where only the gradient is."""

    what: str  # loss, the names of parts or notes, or the gradient norm
    count: int
    of: int  # rows of the batch
    t: tuple[float, float]  # the earliest and the latest of these rows
    rows: list[Row]  # the first LISTED of them; none where only the gradient is to blame

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
    bins: dict[str, list[float]]  # loss, parts and notes in ten bins of t, data to noise; nan where no row fell
    counts: list[int]  # rows per bin
    grad_norm: float  # before clipping
    lr: float
    probe: Probe | None = None  # whether parts and heads agree, after the step; None where that was not asked
    skipped: Skipped | None = None  # why it was not applied; None: it was
    asked: int | None = None  # the signal by which a rank was asked to stop, the same on all
    due: bool = False  # whether a checkpoint is due by rank 0's clock

    @property
    def finite(self) -> bool:
        """Whether the step may be applied."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    def row(self) -> dict[str, Any]:
        """The record as a row of the log: what it measured, and why it was skipped, if it was."""
        row = asdict(self)
        why = {"skipped": row["skipped"]} if self.skipped else {}
        return {name: value for name, value in row.items() if name not in OWN} | why


def measure(state: State, t: Time, terms: Terms, norm: Tensor, *, images: int, lr: float, due: bool = False) -> Record:
    """The record of the step about to be made on a batch of `images` rows. Every rank must call it.

    `norm` is the gradient's, a number on the device; `due` what rank 0's clock says, of others it is ignored.
    """
    words = [*(stop.asked() == number for number in stop.SIGNALS), due and dist.is_main()]
    named = values(terms)
    *table, counts, rest = dist.mean(table_of(t, [*named.values()], norm, words)).tolist()
    sums = dict(zip(named, table, strict=True))
    grad_norm, *said = rest[: 1 + len(words)]
    means = {name: sum(row) / sum(counts) for name, row in sums.items()}
    return Record(
        step=state.step + 1,
        images=state.images + images,
        loss=means["loss"],
        parts={name: means[name] for name in terms.parts},
        notes={name: means[name] for name in terms.notes},
        bins={name: [s / n if n else math.nan for s, n in zip(row, counts, strict=True)] for name, row in sums.items()},
        counts=[round(n * dist.world()) for n in counts],
        grad_norm=grad_norm,
        lr=lr,
        asked=next((number for number, yes in zip(stop.SIGNALS, said, strict=False) if yes), None),
        due=said[-1] > 0,
    )


def table_of(t: Time, columns: Sequence[PerSample], norm: Tensor, words: Sequence[bool]) -> Tensor:
    """Sums of the columns by bin of t, then the number of rows, then the norm and words; where t is."""
    bins = (t * BINS).long().clamp(0, BINS - 1)
    table = t.new_zeros(len(columns) + 2, BINS)
    for row, value in zip(table, [*columns, torch.ones_like(t)], strict=False):
        row.index_add_(0, bins, value.to(t))
    table[-1, 0] = norm
    for place in (place for place, word in enumerate(words, 1) if word):
        table[-1, place] = 1
    return table


def values(terms: Terms) -> dict[str, PerSample]:
    """The loss, its parts and notes, by name."""
    return {"loss": terms.loss, **terms.parts, **terms.notes}


def blame(record: Record, t: Time, c: Cond, terms: Terms) -> Skipped:
    """Which rows, of all ranks', make a record not finite. Every rank must call it."""
    named = values(terms)
    at = dist.gathered(t)
    columns = {name: torch.cat(dist.gathered(value)) for name, value in named.items()}
    broken = {name: ~value.isfinite() for name, value in columns.items() if not value.isfinite().all()}
    what = ", ".join(broken) or ("the mean loss" if math.isfinite(record.grad_norm) else "the gradient norm")
    ranks = [rank for rank, part in enumerate(at) for _ in range(len(part))]
    labels = torch.cat(dist.gathered(c)).tolist() if c.ndim == 1 else [None] * len(ranks)
    times = torch.cat(at)
    places = torch.stack([*broken.values()]).any(0).nonzero().flatten() if broken else torch.arange(len(times))
    rows: list[Row] = [
        {"t": times[place].item(), "class": labels[place], "place": place, "rank": ranks[place]}
        for place in (places[:LISTED].tolist() if broken else [])
    ]
    low, high = times[places].min().item(), times[places].max().item()
    return Skipped(what, len(places), len(times), (low, high), rows)
