"""Train a run: where data, net, objective and folder meet.

A run is a folder: run.yaml (complete), data.json, metrics.jsonl, checkpoints/, milestones/, grids/, samples/,
evaluation.json, report.html with its pictures in report/.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dumo import dist
from dumo.config.advice import advice
from dumo.config.check import check_pieces
from dumo.config.spec import Run
from dumo.data.source import Source
from dumo.data.store import some
from dumo.preflight import cost, doctor
from dumo.progress import Bar, no_bar
from dumo.run import deviation, teacher
from dumo.run.folder import begin, held, note
from dumo.training import agreement, checkpoint, layout, log, loop
from dumo.training.cut import share_of, span
from dumo.training.state import State
from dumo.training.step import Batch, Record, Task, pieces
from dumo.types import UserError


def train(
    run: Run,
    folder: Path,
    *,
    device: str = "auto",
    bar: Bar = no_bar,
    tell: Callable[[str], None] | None = None,
) -> State:
    """Train, or go on where the folder's last checkpoint stands. Returns the state at the end.

    Under torchrun the ranks share the work, each with a part of every batch; every rank must call it, and rank 0 alone
    writes and tells. `tell` hears, before the first step, what is trained on what (`outlook`), and what is not as its
    sources have it. Raises UserError if the run does not fit so many ranks, the folder holds another run or another
    process trains there, or if the slope fails its examination, before the first step or on the weights of the first
    checkpoint; Diverged if the loss is no longer a number.
    """
    rank, ranks = dist.launched()
    require_room(run, dist.device(device), ranks)
    check_pieces(run, ranks)
    with held(run, folder) if rank == 0 else nullcontext(), dist.join():
        if rank:
            bar, tell = no_bar, None
        return go_on(run, folder, dist.device(device), bar, tell)


def go_on(run: Run, folder: Path, here: torch.device, bar: Bar, tell: Callable[[str], None] | None) -> State:
    """Train in a folder that is held. Returns and raises as `train`."""
    source = opened(run)
    doctor.examine(run, here).require()
    known = agreement.own(lambda: run.teacher and teacher.opened(run.teacher, run, here))
    state = begin(run, folder, here)
    if tell:
        tell(outlook(run, folder, source.size, state.step, here))
    if known:
        known.check(folder)
    dist.barrier()  # the folder is read by all before it is written
    if dist.is_main():
        log.rewind(folder / "metrics.jsonl", state.step)
        note(run, folder)
        for line in advice(run, deviation.note(folder, source)):
            if tell:
                tell(line)
    if known:
        source = known.begin(source, run, folder, here, bar)

    rows = span(pieces(run.train, run.objective))

    def batches(step: int) -> Batch:
        return [part.to(here) for part in source.batch(step, run.train.batch, run.train.seed, rows)]

    journal = Journal(run, folder, here)
    journal.open(state)
    task = Task(run.objective, run.path, run.data.classes, known and known.velocity)
    with bar(f"training {folder.name}", run.train.steps) as tick:
        tick(state.step, "")
        show = loop.Every(1, lambda state, record: tick(state.step, f"loss {record.loss:.4f}"))
        loop.train(state, task, batches, run.train, (show, *journal.hooks))
    return state


def require_room(run: Run, here: torch.device, ranks: int) -> None:
    """Raise UserError where a rank's weights, gradients, two moments, averages and batch are more than its memory."""
    run.require_room(here, (4 + len(run.train.ema)) / share_of(run.train.share, ranks), -(-run.train.batch // ranks))


def opened(run: Run) -> Source:
    """The data, as all ranks see them. Raises UserError on all of them where one cannot open them, or sees fewer."""
    source = agreement.own(run.data.open)
    if len(set(sizes := agreement.agreed(lambda: source.size))) > 1:
        there = ", ".join(f"{size:,}" for size in sizes if size is not None)
        raise UserError(f"the ranks see different data, by rank {there} rows: give all of them the same files")
    return source


def outlook(run: Run, folder: Path, size: int | None, step: int, here: torch.device) -> str:
    """What is trained on what, and what a step costs, in a line."""
    net, what = run.outline(), "images" if len(run.pixels) == 3 else "points"
    many = f"{size:,} {what}" if size is not None else f"{what} drawn anew"
    names = f": {some(run.class_names)}" if run.class_names else ""
    classes = f" in {run.data.classes} classes{names}" if run.data.classes else ""
    units = cost.forward_units(net, run.objective, run.path, run.data.shape, ref=run.train.ref)
    return (
        f"training {folder} on {where(run, here)}: "
        f"data {run.data.kind} ({many}{classes}), "
        f"net {run.net.kind} ({sum(p.numel() for p in net.parameters()):,} parameters), "
        f"{units:.2f} F a step (1 F: one forward pass), "
        f"steps {step:,} to {run.train.steps:,} of {run.train.batch:,} {what}"
    )


def where(run: Run, here: torch.device) -> str:
    """The device, and how the weights lie on several ranks."""
    name = f"{here}{f' ({torch.cuda.get_device_name(here)})' if here.type == 'cuda' else ''}"
    if (ranks := dist.world()) == 1:
        return name
    share = share_of(run.train.share, ranks)
    lie = "each with all weights" if share == 1 else f"the weights in parts over {'all' if share == ranks else share}"
    return f"{ranks} ranks of {name}, {lie}"


@dataclass(frozen=True)
class Journal:
    """What a run writes down as it trains: its log, its milestones, its checkpoints."""

    run: Run
    folder: Path
    device: torch.device

    @property
    def first(self) -> int:
        """The step of the first checkpoint, whose weights are examined."""
        return min(self.run.train.save_every, self.run.train.steps)

    @property
    def hooks(self) -> tuple[loop.Every, ...]:
        """What the loop calls after its steps, in this order."""
        return loop.Every(1, self.log), loop.Every(1, self.mark), loop.Every(1, self.keep)

    def open(self, state: State) -> None:
        """Before the next step: refuse again what was refused at the first checkpoint; the milestone of this step."""
        if 0 < state.step <= self.first:
            self.examine(state)
        if state.step not in checkpoint.milestones(self.folder / "milestones"):
            self.mark(state)
        if state.step == self.run.train.steps:  # there is nothing to do but to keep no more than is asked
            self.save(state)

    def log(self, state: State, record: Record) -> None:
        """A line of the log, where one is due."""
        if dist.is_main() and (record.probe or state.step % self.run.train.log_every == 0):
            log.append(self.folder / "metrics.jsonl", asdict(record))

    def mark(self, state: State, record: Record | None = None) -> None:
        """The weights that are shown, at a milestone."""
        if state.step in self.run.train.milestones:
            checkpoint.mark(self.folder / "milestones", state)

    def keep(self, state: State, record: Record) -> None:
        """A checkpoint, where one is due and at the end; the first one's weights are examined."""
        if state.step % self.first == 0 or state.step == self.run.train.steps:
            self.save(state)
        if state.step == self.first:
            self.examine(state)

    def save(self, state: State) -> None:
        """A checkpoint of this step."""
        checkpoint.save(self.folder / "checkpoints", state, self.run.train.keep)

    def examine(self, state: State) -> None:
        """Refuse a slope that is not the derivative at the weights in training."""
        doctor.examine_weights(self.run, layout.gathered(state.net, self.run.build), self.device).require()
