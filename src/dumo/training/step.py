"""One optimizer step, and its record.

The gradient is that of the mean loss over the global batch. A batch is split over ranks, and a rank's rows over its
passes, in pieces of consecutive rows, of nearly equal size, equally many on every rank. A piece adds the gradient of
its sum over the batch size, and ranks are added up after the last. So the split changes rounding alone, and two ranks
equal one rank with two passes, to the bit.

A step whose loss or gradient is not finite is skipped on all ranks (`dumo.training.record`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from math import ceil, lcm

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from dumo.flow.draw import Draws
from dumo.flow.flow import Flow, Loss
from dumo.flow.path import Path
from dumo.runtime import dist
from dumo.training import layout
from dumo.training.burst import begins
from dumo.training.record import Probe, Record, ask, blame, measure
from dumo.training.spec import Train
from dumo.training.state import Diverged as Diverged
from dumo.training.state import State
from dumo.types import Noised, Objective, Taught, Terms, Time, UserError
from dumo.types.rows import to_device

Batch = Sequence[Tensor]  # (x, c); with the noise of x, (x, c, z); and with what is between, (x, c, z, between)


def flow_of(
    state: State,
    spec: Train,
    objective: Objective,
    path: Path,
    classes: int,
    *,
    teacher: Taught | None = None,
    prior: float | None = None,
) -> Flow:
    """The net of a state, and the objective that teaches it; `teacher` replaces the data's velocity.

    `classes` is the label of no class, `prior` the share of a batch's rows that the teacher answers (None: all).
    """
    return Flow(
        state.net,
        objective,
        path=path,
        classes=classes,
        seed=spec.seed,
        coupling=spec.coupling,
        teacher=teacher,
        prior=prior,
        ref=None if spec.ref == "self" else state.averages[spec.ref].module,
        precision=spec.precision,
    )


def together(spec: Train, objective: Objective) -> int:
    """How many neighbouring rows share times, noise or targets: no pass may part them."""
    return lcm(objective.times.group, objective.needs.group, spec.coupling.group if spec.coupling else 1)


def cuts(batch: int, *, ranks: int = 1, micro_batch: int | None = None, group: int = 1) -> list[list[slice]]:
    """The rows of every pass, by rank: at most `micro_batch` (None: all of a rank's), in whole groups of `group` rows.

    Raises UserError if the batch is not a multiple of `group`, a group exceeds `micro_batch`, or there are fewer groups
    than passes.
    """
    if batch % group:
        raise UserError(f"train.batch = {batch} is no multiple of {group}, the rows that belong together: change it")
    if micro_batch is not None and micro_batch < group:
        raise UserError(
            f"train.micro_batch = {micro_batch} parts {group} rows that belong together: raise it to {group} or more"
        )
    groups, most = batch // group, batch if micro_batch is None else micro_batch // group
    passes = ceil(groups / (most * ranks))
    if (pieces := ranks * passes) > groups:
        what = f"{groups} rows" if group == 1 else f"{groups} groups of {group} rows"
        raise UserError(
            f"train.batch = {batch} is {what}, too few for {passes} passes on each of {ranks} ranks: raise it, "
            "or take fewer ranks"
        )
    ends = [groups * i // pieces * group for i in range(pieces + 1)]
    rows = [slice(start, end) for start, end in pairwise(ends)]
    return [rows[rank * passes : (rank + 1) * passes] for rank in range(ranks)]


def passes(spec: Train, objective: Objective, ranks: int) -> list[list[slice]]:
    """The rows of every pass of a step, by rank. Raises UserError as `cuts`."""
    return cuts(spec.batch, ranks=ranks, micro_batch=spec.micro_batch, group=together(spec, objective))


def span(rows: list[slice]) -> slice:
    """All rows of a rank, given those of its passes."""
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
) -> Record:
    """Make one step: update net, optimizer, averages and counters of `state`, and return what was measured.

    `flow` is of this net (`flow_of`); `batch` is this rank's rows of the global one; `loss` the objective's, or a
    compiled one; `draws` the step's random numbers from `draws_of`, or None to draw them here. If the spec says so, the
    last piece is probed after the update.
    Every rank must call it; `due` on rank 0 says that it is time for a checkpoint, which the record passes on to all.
    A step whose loss or gradient norm is not finite is counted and not applied, and the record says why.
    """
    mine = Pieces(state, flow, batch, spec, loss, draws)
    times: list[Time] = []
    seen: list[Terms] = []
    state.net.train()
    state.optimizer.zero_grad()
    for rows in mine.cuts:
        layout.finish(state.net, rows is mine.cuts[-1], reshard=spec.reshard)
        b = mine.draw(rows)
        terms = mine.loss_of(b, rows)
        (terms.loss.sum() / (spec.batch / dist.world())).backward()  # torch takes the mean over ranks
        times.append(b.t)
        seen.append(terms.detach())

    parameters = list(state.net.parameters())
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    t, terms, rate, probed = torch.cat(times), joined(seen), spec.rate(state.step), spec.probes(state.step)
    record = measure(state, t, terms, layout.whole(norm), images=spec.batch, lr=rate, due=due)
    if not record.finite:
        record = replace(record, skipped=blame(record, t, mine.c, terms))
    elif spec.clip is not None:
        clip_grads_with_norm_(parameters, spec.clip, norm)
    record = watch(state, record)
    advance(state, record)
    return replace(record, probe=mine.probe(terms.parts)) if probed and not record.skipped else record


class Pieces:
    """A rank's rows of a batch, in pieces; draws are keyed by the step at which it was made."""

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
        self.cuts = pieces(spec, flow.objective)
        all_rows = span(self.cuts)
        self.first = all_rows.start
        self.x, self.c, *paired = batch
        self.z, self.between = (*paired, None, None)[:2]
        if len(self.x) != (mine := all_rows.stop - self.first):
            raise ValueError(f"here are {len(self.x)} rows, and {mine} of a batch of {spec.batch} are this rank's")
        self.flow = flow
        self.loss = loss
        self.draws = draws or draws_of(flow, spec, state.step, self.x.shape[1:], z=self.z is None)
        self.keys = to_device(self.draws.keys, self.x.device)
        self.progress = state.step / spec.steps
        self.keep_casts = not layout.gives_back(spec.reshard)

    def here(self, rows: slice) -> slice:
        """Rows of the global batch, counted from this rank's first."""
        return slice(rows.start - self.first, rows.stop - self.first)

    def draw(self, rows: slice) -> Noised:
        """Draw these rows of the global batch."""
        here = self.here(rows)
        z, between = (None if paired is None else paired[here] for paired in (self.z, self.between))
        return self.flow.noised(
            self.draws[here], self.x[here], self.c[here], z=z, between=between, progress=self.progress
        )

    def loss_of(self, b: Noised, rows: slice) -> Terms:
        """The loss of these rows, in the run's precision, with their dropout masks."""
        return self.flow.terms(b, self.keys[self.here(rows)], self.loss, keep=self.keep_casts)

    def probe(self, parts: Iterable[str]) -> Probe | None:
        """Probe the net as it is now on the last piece."""
        b, rows = self.draw(self.cuts[-1]), self.cuts[-1]
        found = ask(self.flow.net, self.flow.reads, parts, b, lambda: self.loss_of(b, rows))
        layout.release(self.flow.net)
        return found


def draws_of(flow: Flow, spec: Train, step: int, shape: Sequence[int], *, z: bool = True) -> Draws:
    """This rank's random numbers for the step after `step` done ones, for samples of this shape."""
    rows = span(pieces(spec, flow.objective))
    return flow.drawn(step, shape, batch=spec.batch, rows=rows, z=z)


def pieces(spec: Train, objective: Objective) -> list[slice]:
    """The rows of the global batch that this rank takes, pass by pass. Raises UserError as `cuts`."""
    return passes(spec, objective, dist.world())[dist.rank()]


def joined(terms: Sequence[Terms]) -> Terms:
    """The terms of the pieces of a batch as those of the whole."""
    first = terms[0]
    return Terms(
        torch.cat([piece.loss for piece in terms]),
        {name: torch.cat([piece.parts[name] for piece in terms]) for name in first.parts},
        {name: torch.cat([piece.notes[name] for piece in terms]) for name in first.notes},
    )


def watch(state: State, record: Record) -> Record:
    """The record with what the norms of the last steps say; those of a skipped step are left out."""
    if record.skipped:
        return record
    before = state.gradients
    state.gradients = before.after(record.grad_norms)
    return replace(record, grad_peaks=state.gradients.peaks(), burst=begins(before, state.gradients))


def advance(state: State, record: Record) -> None:
    """Count the step, and apply the gradients unless it is skipped.

    A skipped step counts, too: so the batch and draws of later steps do not depend on it.
    """
    state.step, state.images = record.step, record.images
    if record.skipped:
        state.skips += 1
        return
    for group in state.optimizer.param_groups:
        group["lr"] = record.lr * group.get("ratio", 1.0)
    state.optimizer.step()
    if after_step := getattr(state.net, "after_step", None):  # a net may hold its weights to a norm
        after_step()
    for average in state.averages.values():
        average.update(state.net, state.step)
    state.skips, state.trend = 0, state.trend.after(sum(map(abs, record.parts.values())) or abs(record.loss))
