"""One optimizer step: `train_step` makes it and returns its `Record`.

The order of a step:

1. Loss and backward pass of each micro-batch (`MicroBatches`), whose gradients add up.
2. `measure` reduces what was measured over ranks. A step whose loss or gradient is not finite is skipped on all ranks
   (`dumo.training.record`). Else gradients are clipped.
3. `advance` counts the step and updates weights and averages.

The caller makes ahead what a step takes: `draws_of` draws random numbers, and `passes_of_rank` says which rows of the
batch this rank takes.

The gradient is that of the mean loss over the global batch. A batch is split over ranks, and a rank's rows over its
passes, in micro-batches of consecutive rows, of nearly equal size, equally many on every rank. A micro-batch adds the
gradient of its sum over the batch size, and ranks are added up after the last. So the split changes rounding alone, and
two ranks equal one rank with two passes, to the bit.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import ceil, lcm

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from dumo.flow.module import Flow, Loss
from dumo.flow.noise import Draws
from dumo.flow.trainable import group_size
from dumo.runtime import dist
from dumo.training import layout
from dumo.training.duration import Timing
from dumo.training.record import Record, measure, skip_reason
from dumo.training.spec import Train
from dumo.training.state import State
from dumo.types import NoisyBatch, Objective, Terms, Time, UserError
from dumo.types.rows import to_device

Batch = Sequence[Tensor]  # (x, c); with the noise of x, (x, c, z); and with what is between, (x, c, z, between)


def rows_kept_together(spec: Train, objective: Objective) -> int:
    """How many neighbouring rows share times, noise or targets: no pass may part them."""
    return lcm(group_size(objective), spec.coupling.group if spec.coupling else 1)


def split_into_passes(spec: Train, objective: Objective, ranks: int) -> list[list[slice]]:
    """Split a step's batch into passes: for each rank, the rows of the global batch that each of its passes takes.

    A pass has at most `train.micro_batch` rows (None: all of a rank's), and never parts rows that belong together.
    Raises UserError if the batch is not a multiple of a group of such rows, a group exceeds `train.micro_batch`, or
    there are fewer groups than passes.
    """
    batch = spec.batch
    micro_batch = spec.micro_batch
    group = rows_kept_together(spec, objective)  # rows
    if batch % group:
        raise UserError(f"train.batch = {batch} is no multiple of {group}, the rows that belong together: change it")
    if micro_batch is not None and micro_batch < group:
        raise UserError(
            f"train.micro_batch = {micro_batch} parts {group} rows that belong together: raise it to {group} or more"
        )
    groups = batch // group
    max_groups_per_pass = batch if micro_batch is None else micro_batch // group
    passes_per_rank = ceil(groups / (max_groups_per_pass * ranks))
    total_passes = ranks * passes_per_rank
    if total_passes > groups:
        content = f"{groups} rows" if group == 1 else f"{groups} groups of {group} rows"
        raise UserError(
            f"train.batch = {batch} is {content}, too few for {passes_per_rank} passes on each of {ranks} ranks: raise "
            "it, or take fewer ranks"
        )
    ends = [groups * i // total_passes * group for i in range(total_passes + 1)]
    rows = [slice(start, end) for start, end in pairwise(ends)]
    return [rows[rank * passes_per_rank : (rank + 1) * passes_per_rank] for rank in range(ranks)]


def span(rows: list[slice]) -> slice:
    """All rows of a rank as one slice, given those of its passes, which are neighbours."""
    return slice(rows[0].start, rows[-1].stop)


def train_step(
    state: State,
    flow: Flow,
    batch: Batch,
    spec: Train,
    loss: Loss | None = None,
    draws: Draws | None = None,
    *,
    due: bool = False,
    timing: Timing | None = None,
) -> Record:
    """Make one step: update net, optimizer, averages and counters of `state`, and return what was measured.

    - `flow`: of this net
    - `batch`: this rank's rows of the global one
    - `loss`: the objective's, or a compiled one; None: the objective's
    - `draws`: the step's random numbers (`draws_of`); None: they are drawn here
    - `due`: whether it is time for a checkpoint, and `timing`: how far a run is that ends by the clock. Rank 0's count,
      and the record passes both on to all ranks.

    Every rank must call it. A step whose loss or gradient norm is not finite is counted and not applied, and the record
    says why.
    """
    micro_batches = MicroBatches(state, flow, batch, spec, loss, draws)
    times: list[Time] = []
    terms_by_pass: list[Terms] = []

    # gradients, added up over passes
    state.net.train()
    state.optimizer.zero_grad()
    for rows in micro_batches.row_slices:
        is_last = rows is micro_batches.row_slices[-1]
        layout.prepare_backward(state.net, is_last, reshard=spec.reshard)
        b = micro_batches.draw(rows)
        terms = micro_batches.loss_of(b, rows)
        (terms.loss.sum() / (spec.batch / dist.world())).backward()  # torch takes the mean over ranks
        times.append(b.t)
        terms_by_pass.append(terms.detach())

    # what was measured, over ranks
    parameters = list(state.net.parameters())
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    t = torch.cat(times)
    terms = _join_terms(terms_by_pass)
    lr = spec.optimizer.lr * state.duration.rate_factor(spec.schedule, state.step)
    record = measure(state, t, terms, layout.full_tensor(norm), images=spec.batch, lr=lr, due=due, timing=timing)
    if not record.is_finite:
        record = replace(record, skipped=skip_reason(record, t, micro_batches.c, terms))
    elif spec.clip is not None:
        clip_grads_with_norm_(parameters, spec.clip, norm)

    # the update
    advance(state, record)
    return record


class MicroBatches:
    """A rank's rows of a batch, in micro-batches. Random numbers are keyed by the step at which it was made."""

    def __init__(
        self,
        state: State,
        flow: Flow,
        batch: Batch,
        spec: Train,
        loss: Loss | None = None,
        draws: Draws | None = None,
    ) -> None:
        """Take the step's random numbers, or draw them. Raises ValueError for other rows than this rank's."""
        self.row_slices = passes_of_rank(spec, flow.objective)
        rank_rows = span(self.row_slices)
        self.first_row = rank_rows.start
        self.x, self.c, *paired = batch
        self.z = paired[0] if paired else None
        self.between = paired[1] if len(paired) > 1 else None
        expected_rows = rank_rows.stop - rank_rows.start
        if len(self.x) != expected_rows:
            raise ValueError(
                f"the batch has {len(self.x)} rows, but {expected_rows} of train.batch = {spec.batch} are this rank's"
            )
        self.flow = flow
        self.loss = loss
        self.draws = draws or draws_of(flow, spec, state.step, self.x.shape[1:], z=self.z is None)
        self.keys = to_device(self.draws.keys, self.x.device)
        self.progress = state.progress
        self.cache_casts = not layout.frees_gathered_weights(spec.reshard)

    def local_rows(self, rows: slice) -> slice:
        """Rows of the global batch, counted from this rank's first."""
        return slice(rows.start - self.first_row, rows.stop - self.first_row)

    def draw(self, rows: slice) -> NoisyBatch:
        """Noise these rows of the global batch, with the times and labels drawn for them."""
        local_rows = self.local_rows(rows)
        return self.flow.add_noise(
            self.x[local_rows],
            self.c[local_rows],
            self.draws[local_rows],
            z=None if self.z is None else self.z[local_rows],
            between=None if self.between is None else self.between[local_rows],
            progress=self.progress,
        )

    def loss_of(self, b: NoisyBatch, rows: slice) -> Terms:
        """The loss of these rows, in the run's precision, with their dropout masks."""
        keys = self.keys[self.local_rows(rows)]
        return self.flow.compute_loss(b, keys, loss=self.loss, cache_casts=self.cache_casts)


def draws_of(flow: Flow, spec: Train, step: int, shape: Sequence[int], *, z: bool = True) -> Draws:
    """This rank's random numbers for the step after `step` done ones, for samples of this shape."""
    rows = span(passes_of_rank(spec, flow.objective))
    return flow.make_draws(step, shape, batch=spec.batch, rows=rows, z=z)


def passes_of_rank(spec: Train, objective: Objective) -> list[slice]:
    """The rows of the global batch that this rank takes, pass by pass. Raises UserError as `split_into_passes`."""
    return split_into_passes(spec, objective, dist.world())[dist.rank()]


def _join_terms(terms: Sequence[Terms]) -> Terms:
    """The terms of all micro-batches as those of the whole batch."""
    first = terms[0]
    return Terms(
        torch.cat([part.loss for part in terms]),
        {name: torch.cat([part.parts[name] for part in terms]) for name in first.parts},
        {name: torch.cat([part.notes[name] for part in terms]) for name in first.notes},
    )


def advance(state: State, record: Record) -> None:
    """Count the step, and apply the gradients unless it is skipped.

    A skipped step counts, too: so the batch and draws of later steps do not depend on it.
    """
    state.step = record.step
    state.images = record.images
    if record.timing:
        state.duration = replace(state.duration, timing=record.timing)
    if record.skipped:
        state.skips += 1
        return
    for group in state.optimizer.param_groups:
        group["lr"] = record.lr * group.get("ratio", 1.0)
    state.optimizer.step()
    after_step = getattr(state.net, "after_step", None)  # a net may hold its weights to a norm
    if after_step:
        after_step()
    for average in state.averages.values():
        average.update(state.net, state.step)
    state.skips = 0
    error = sum(map(abs, record.parts.values())) or abs(record.loss)
    state.trend = state.trend.after(error)
