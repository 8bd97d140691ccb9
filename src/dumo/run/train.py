"""Train a run: where data, net, objective and folder meet.

A run is a folder: run.yaml (complete), metrics.jsonl, checkpoints/, milestones/, grids/, samples/, evaluation.json,
report.html.
"""

from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from dumo import dist
from dumo.config.spec import Run
from dumo.preflight import doctor
from dumo.progress import Bar, no_bar
from dumo.run import teacher
from dumo.run.folder import claim, note
from dumo.run.start import begin_from
from dumo.training import checkpoint, log
from dumo.training import loop as training
from dumo.training.state import State
from dumo.training.step import Record
from dumo.types import UserError


def train(run: Run, folder: Path, *, device: str = "auto", bar: Bar = no_bar) -> State:
    """Train, or go on where the folder's last checkpoint stands. Returns the state at the end.

    Raises UserError if the folder holds another run, or the slope fails its examination, before the first step or on
    the weights of the first checkpoint; Diverged if the loss is no longer a number.
    """
    here, metrics = dist.device(device), folder / "metrics.jsonl"
    claim(run, folder)
    source, spec = run.data.open(), run.train
    doctor.examine(run, here).require()
    known = teacher.opened(run.teacher, run, here) if run.teacher else None
    last = checkpoint.latest(folder / "checkpoints")
    net = begin_from(run, run.start, here) if run.start and not last else run.build(here)
    state = training.begin(net, run.train)
    if last:
        checkpoint.restore(last, state)
    if state.step > run.train.steps:
        raise UserError(f"{folder} has {state.step} steps behind it, so train.steps={run.train.steps} is no more to do")
    if known:
        known.check(folder)
    log.rewind(metrics, state.step)
    note(run, folder)
    if run.teacher and known:
        known.note(folder)
        if pairs := run.teacher.pairs:
            source = teacher.couple(run, pairs, known.reads, folder / "pairs", here, bar)

    first = min(spec.save_every, spec.steps)  # the step of the first checkpoint
    if 0 < state.step <= first:  # what was refused there still is
        doctor.examine_weights(run, state.net, here).require()

    def batches(step: int) -> tuple[Tensor, ...]:
        return tuple(part.to(here) for part in source.batch(step, spec.batch, spec.seed))

    def mark(state: State, record: Record) -> None:
        if state.step in spec.milestones:
            checkpoint.mark(folder / "milestones", state)

    def save(state: State, record: Record) -> None:
        checkpoint.save(folder / "checkpoints", state, spec.keep)
        if state.step == first:
            doctor.examine_weights(run, state.net, here).require()

    def keep(state: State, record: Record) -> None:
        if record.probe or state.step % spec.log_every == 0:
            log.append(metrics, asdict(record))

    if state.step in {*spec.milestones} - checkpoint.milestones(folder / "milestones").keys():
        checkpoint.mark(folder / "milestones", state)
    with bar(f"training {folder.name}", spec.steps) as tick:
        tick(state.step, "")
        hooks = (
            training.Every(1, lambda state, record: tick(state.step, f"loss {record.loss:.4f}")),
            training.Every(1, keep),
            training.Every(1, mark),
            training.Every(first, save),
        )
        training.train(state, batches, run.objective, run.path, run.data.classes, spec, hooks, known and known.velocity)
    checkpoint.save(folder / "checkpoints", state, spec.keep)
    return state
