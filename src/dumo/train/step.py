"""One optimizer step, and what is worth knowing of it.

The gradient is that of the mean loss over the global batch. The batch is drawn as a whole and taken in `accumulate`
pieces, each of which adds the gradient of its sum over the batch size: so the split changes nothing but rounding.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from dumo import dist
from dumo.flow import mask
from dumo.flow.draw import draw
from dumo.train.state import State
from dumo.types import Cond, Frozen, Net, Noised, Objective, Path, PerSample, Sample, Terms, Time

Precision = Literal["fp32", "bf16"]
Loss = Callable[[Net, Frozen, Noised], Terms]
BINS = 10  # of t, equally wide: ours


class Diverged(RuntimeError):  # noqa: N818, a state of the run
    """The loss or its gradient is no longer a number. The weights are those before the step."""


@dataclass(frozen=True)
class Record:
    """What one step measured: means over the global batch."""

    step: int  # updates done, this one included
    images: int  # images seen, this batch included
    loss: float
    parts: dict[str, float]  # the loss's named parts
    bins: dict[str, list[float]]  # the loss and its parts in ten bins of t, data to noise; nan where no row fell
    counts: list[int]  # rows per bin
    grad_norm: float  # before clipping
    lr: float


def train_step(
    state: State,
    objective: Objective,
    path: Path,
    x: Sample,
    c: Cond,
    null: Cond,
    *,
    ref: Frozen,
    lr: float,
    seed: int = 0,
    progress: float = 0.0,
    accumulate: int = 1,
    clip: float | None = None,
    precision: Precision = "fp32",
    loss: Loss | None = None,
) -> Record:
    """Update net, optimizer, averages and counters of `state` once, and say what was measured.

    (x, c) is the global batch, of which each rank takes its rows; `progress` is the share of the training done; `loss`
    is the objective's, compiled, or None for as it is. Raises Diverged, and updates nothing, if the loss or the norm of
    its gradient is not finite.
    """
    noised = partial(draw, objective, path, seed=seed, step=state.step, batch=len(x), progress=progress)
    keys = mask.keys(seed, state.step, len(x))
    share = len(x) // dist.world()
    times: list[Time] = []
    seen: list[dict[str, PerSample]] = []

    state.net.train()
    state.optimizer.zero_grad()
    for rows in pieces(share, accumulate):
        b = noised(x[rows], c[rows], null[rows], first=rows.start)
        low = torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16")
        with low, mask.masks(keys[rows].to(x.device)):
            terms = (loss or objective.loss)(state.net, ref, b)
        (terms.loss.sum() / share).backward()
        times.append(b.t)
        seen.append(detached(terms))

    parameters = list(state.net.parameters())
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    t, values = torch.cat(times), {name: torch.cat([piece[name] for piece in seen]) for name in seen[0]}
    record = measure(state, t, values, images=len(x), grad_norm=norm.item(), lr=lr)
    if not math.isfinite(record.loss + record.grad_norm):
        raise Diverged(diagnose(record, t, values))

    if clip is not None:
        clip_grads_with_norm_(parameters, clip, norm)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.step()
    state.step, state.images = record.step, record.images
    for average in state.averages.values():
        average.update(state.net, state.step)
    return record


def pieces(share: int, accumulate: int) -> Iterator[slice]:
    """This rank's rows of the global batch, `share` in number, in `accumulate` consecutive pieces."""
    first = dist.rank() * share
    for start, end in pairwise(first + share * i // accumulate for i in range(accumulate + 1)):
        yield slice(start, end)


def detached(terms: Terms) -> dict[str, PerSample]:
    """The loss and its parts by name, without the graph of the pass."""
    return {name: value.detach() for name, value in {"loss": terms.loss, **terms.parts}.items()}


def measure(
    state: State, t: Time, values: Mapping[str, PerSample], *, images: int, grad_norm: float, lr: float
) -> Record:
    """The record of the step about to be made on a batch of `images` rows."""
    sums, counts = by_time(t, values)
    means = {name: sum(row) / sum(counts) for name, row in sums.items()}
    return Record(
        step=state.step + 1,
        images=state.images + images,
        loss=means.pop("loss"),
        parts=means,
        bins={name: [s / n if n else math.nan for s, n in zip(row, counts, strict=True)] for name, row in sums.items()},
        counts=[round(n * dist.world()) for n in counts],
        grad_norm=grad_norm,
        lr=lr,
    )


def by_time(t: Time, values: Mapping[str, PerSample]) -> tuple[dict[str, list[float]], list[float]]:
    """Sums of each value and the number of rows, by bin of t; both are means over ranks."""
    bins = (t * BINS).long().clamp(0, BINS - 1)
    table = t.new_zeros(len(values) + 1, BINS)
    for row, value in zip(table, [*values.values(), torch.ones_like(t)], strict=True):
        row.index_add_(0, bins, value.to(t))
    *sums, counts = dist.mean(table).tolist()
    return dict(zip(values, sums, strict=True)), counts


def diagnose(record: Record, t: Time, values: Mapping[str, PerSample]) -> str:
    """What is not finite, where, and what to try."""
    broken = {name: ~value.isfinite() for name, value in values.items() if not value.isfinite().all()}
    what = ", ".join(broken) or ("the mean loss" if math.isfinite(record.grad_norm) else "the gradient norm")
    rows = torch.stack(list(broken.values())).any(0) if broken else torch.ones_like(t, dtype=torch.bool)
    low, high = t[rows].min().item(), t[rows].max().item()
    return (
        f"step {record.step} diverged: {what} is not finite, in {int(rows.sum())} of {len(t)} rows, t in "
        f"[{low:.3f}, {high:.3f}] (loss {record.loss:g}, gradient norm {record.grad_norm:g}). The weights are "
        "those before this step. Try a lower learning rate, gradient clipping, another slope, or precision fp32."
    )
