"""Train a run: where data, net, objective and folder meet.

A run is a folder: run.yaml (complete), data.json, metrics.jsonl, speed.jsonl, checkpoints/, milestones/, sheets/,
best/, grids/, samples/, evaluation.json, report.html with its pictures in report/.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dumo.config.advice import advice
from dumo.config.check import check_pieces
from dumo.config.load import FILE, dump, load
from dumo.config.spec import Run
from dumo.config.word import method
from dumo.data import Data, Latents
from dumo.data.store import some
from dumo.flow.draw import Draws
from dumo.flow.path import Path as FlowPath
from dumo.flow.slope import CentralSlope, DualSlope
from dumo.io.content import hashes_of
from dumo.io.source import Bucketed, Source
from dumo.nets.dualized import Dualized
from dumo.nets.lowbit import saved
from dumo.objectives import Objective
from dumo.run import content, deviation, encode, teacher
from dumo.run.folder import held
from dumo.run.journal import History, Journal, way_back
from dumo.run.net import outline, require_room
from dumo.run.plan import cost, doctor, machine
from dumo.run.resolve import pinned, placed, resolve, resolve_again
from dumo.run.sheet import Sheets
from dumo.run.speed import Meter
from dumo.run.validation import Validation
from dumo.run.weights import begin
from dumo.runtime import dist, threads
from dumo.runtime.progress import Bar, no_bar, quiet
from dumo.runtime.threads import StepThreads
from dumo.training import agreement, frozen, loop, manifest
from dumo.training.layout import share_of
from dumo.training.spec import Train
from dumo.training.state import Diverged, State
from dumo.training.state import begin as begin_state
from dumo.training.step import Batch, Task, draws_of, pieces, span, train_step
from dumo.types import UserError
from dumo.types.rows import pin, to_device


def train(
    run: Run,
    folder: Path,
    *,
    device: str = "auto",
    bar: Bar = no_bar,
    tell: Callable[[str], None] | None = None,
    step: int | None = None,
    accept: bool = False,
    verify: bool = False,
    hooks: Sequence[loop.Every] = (),
) -> State:
    """Train, or go on where the folder's last checkpoint stands, or that of `step`. Returns the state at the end.

    Under torchrun the ranks share the work, each with a part of every batch; every rank must call it, and rank 0 alone
    writes and tells. `hooks` are called after dumo's own, on every rank. `verify`: all images are hashed first.
    `tell` hears, before the first step, what is trained on what (`outlook`), and what is not as its sources have it, or
    not as it was; then of steps that are skipped. Raises UserError if the run does not fit the ranks, the folder holds
    another run or another process trains there, its data or fields have changed (and no `accept` says that they may),
    or if the slope fails its examination, before the first step or on the weights that would be saved first; Diverged
    if the loss is no longer a number; Stopped, once a checkpoint is saved, if a signal asked for it.
    """
    rank, ranks = dist.launched()
    before = load(folder) if (folder / FILE).is_file() else None
    run = resolve(placed(run, before))
    rows, share = -(-run.train.batch // ranks), share_of(run.train.share, ranks)
    require_room(run, dist.device(device), run.train.copies, rows, share)  # of a rank
    check_pieces(run.train, run.objective, ranks)
    if rank == 0:
        encode.make_tokens(run)
    run = pinned(resolve_again(run), before)
    with held(run, folder, step, accept=accept) if rank == 0 else nullcontext(), dist.join():
        tell = tell if rank == 0 and tell else quiet
        run = resolve_again(run)  # with what the first rank has made
        more: dict[str, Any] = {"accept": accept, "verify": verify, "hooks": hooks}
        return go_on(run, folder, dist.device(device), no_bar if rank else bar, tell, step, **more)


def go_on(
    run: Run,
    folder: Path,
    here: torch.device,
    bar: Bar,
    tell: Callable[[str], None],
    step: int | None = None,
    *,
    accept: bool = False,
    verify: bool = False,
    hooks: Sequence[loop.Every] = (),
) -> State:
    """Train in a folder that is held. Returns and raises as `train`."""
    data = open_data(run.data)
    with threads.fewer_when_busy(here, quiet):
        doctor.examine(run, here).require()

    @cache
    def step_cost() -> cost.StepCost:
        return cost.step_cost(outline(run), run.objective, run.path, run.data.shape, ref=run.train.ref)

    meter, sheets = Meter(run.train, folder, here, lambda: step_cost().flops), Sheets(run, folder, tell)
    state, last = begin(run, folder, here, step)
    validation = Validation(run, folder, state, tell, meter.leave_out)
    known = agreement.own(lambda: run.teacher and teacher.open_teacher(run.teacher, run, state, here))
    change, hashes = content.prove(data, folder, last, accept=accept, verify=verify), hashes_of(data)
    history = agreement.own(
        lambda: (
            History.of(run, folder, data, state.step, last, accept=accept, change=change) if dist.is_main() else None
        )
    )
    tell(outlook(run, folder, data.size, state.step, here, step_cost().units))
    if isinstance(data, Bucketed):
        tell(f"images are in {data.about}")
    tell(f"objective: {method(run.objective)}")
    left = (run.train.steps - state.step) * run.train.batch / dist.world()
    for line in machine.unfit(run.train, left * step_cost().flops, here):
        tell(line)
    for fit in state.net.fits if isinstance(state.net, Dualized) and not last else ():
        tell(str(fit))
    if known:
        known.check(folder)
    dist.barrier()  # the folder is read by all before it is written
    lines = agreement.own(lambda: [*history.write(rewound=step is not None)] if history else [])
    for line in (*lines, *(advice(run, deviation.noted(folder)) if history else ())):
        tell(line)
    source, points = data, run.objective.needs.teacher.points
    if known:
        with threads.fewer_when_busy(here, tell):
            source = known.begin(data, points, run.path, run.data, folder, here, bar)

    step_threads = step_threads_of(run, last, here, tell)
    text = dump(run, history.changed) if history else ""
    journal = Journal(run, folder, here, source, tell, hashes, text, validation, step_threads)
    journal.open(state)
    sheets.open(state)
    prior = run.data.prior if isinstance(run.data, Latents) else None
    task = Task(run.objective, run.path, run.data.classes, known and known.velocity, prior)
    try:
        with (
            step_threads,
            journal.saver,
            fed(run.train, shapes(source, run.train, run.data.shape), source, task, here) as (batches, draws),
            bar(f"training {folder.name}", run.train.steps) as tick,
        ):
            tick(state.step, "the first step" + ", compiled first" * (run.train.compile != "none"))
            meter.begin(state.step)
            show = loop.Every(1, lambda state, record: tick(state.step, meter.note(record)))
            begin_step = loop.Every(1, lambda state, record: step_threads.begin())
            end_step = loop.Every(1, lambda state, record: step_threads.end())
            every = (end_step, show, *journal.hooks, loop.Every(1, sheets.draw), *hooks, begin_step)
            if state.step < run.train.steps:
                step_threads.choose(trial_step(run.train, state, task, source))
            step_threads.begin()
            loop.train(state, task, batches, run.train, every, journal.due, draws)
    except Diverged as error:
        raise Diverged(
            f"{error} {agreement.main(lambda: way_back(run.train, folder, state.step - state.skips))}"
        ) from error
    for line in agreement.main(lambda: [*validation.outcome()]):
        tell(line)
    return state


def step_threads_of(run: Run, last: Path | None, device: torch.device, tell: Callable[[str], None]) -> StepThreads:
    """The chooser of the number of threads for steps; `last` is the checkpoint that the run resumes from, if any.

    A resumed run keeps the checkpoint's number if this machine has as many cores. With compile there is no choice:
    compiled code is for one number.
    """
    if last is None:
        return StepThreads(device, tell, fixed=run.train.compile != "none")
    about = manifest.read(last)
    return StepThreads(
        device,
        tell,
        fixed=run.train.compile != "none",
        recorded=about.threads if about.cores == threads.cores() else None,
        step=about.step,
    )


def trial_step(train: Train, state: State, task: Task, source: Source | teacher.Coupled) -> Callable[[], object]:
    """What makes a step like the training's next one, on a copy of its state, which the first call makes."""

    @cache
    def copied_state() -> State:
        trial = begin_state(frozen.copied(state.net), train)
        trial.step = state.step
        return trial

    def try_step() -> None:
        batch = source.batch(state.step, train.batch, train.seed, span(pieces(train, task.objective)))
        train_step(copied_state(), task, batch, train)

    return try_step


@contextmanager
def fed(
    train: Train,
    shape: Callable[[int], tuple[int, ...]],
    source: Source | teacher.Coupled,
    task: Task,
    here: torch.device,
) -> Generator[tuple[Callable[[int], Batch], Callable[[int], Draws]], None, None]:
    """A step's batch on the device, and what it draws, by its number; both made ahead, for a GPU in pinned memory.

    `shape` is that of a step's samples.
    """
    rows, gpu = span(pieces(train, task.objective)), here.type == "cuda"
    own = not isinstance(source, teacher.Coupled)  # a teacher's pairs bring their noise

    def read(step: int) -> Batch:
        parts = source.batch(step, train.batch, train.seed, rows)
        return [pin(part) for part in parts] if gpu else parts

    def draw(step: int) -> Draws:
        draws = draws_of(task, train, step, shape(step), z=own)
        return draws.pin() if gpu else draws

    last = train.steps
    with loop.Prefetch(read, last=last, depth=loop.BATCHES) as batches, loop.Prefetch(draw, last=last) as draws:
        yield lambda step: [to_device(part, here) for part in batches(step)], draws


def shapes(source: Source | teacher.Coupled, train: Train, square: tuple[int, ...]) -> Callable[[int], tuple[int, ...]]:
    """The shape of a step's samples, by its number."""
    if isinstance(source, Bucketed):
        return lambda step: source.shape(step, train.batch, train.seed)
    return lambda step: square


def open_data(data: Data) -> Source:
    """The data, as all ranks see them. Raises UserError on all of them where one cannot open them, or sees fewer."""
    source = agreement.own(data.open)
    if len(set(sizes := agreement.agreed(lambda: source.size))) > 1:
        there = ", ".join(f"{size:,}" for size in sizes if size is not None)
        raise UserError(f"the ranks see different data, by rank {there} rows: give all of them the same files")
    return source


def outlook(run: Run, folder: Path, size: int | None, step: int, here: torch.device, units: float) -> str:
    """What is trained on what, and the forward units of a step, in a line."""
    net, what = outline(run), "images" if len(run.pixels) == 3 else "points"
    many = f"{size:,} {what}" if size is not None else f"{what} drawn anew"
    names = f": {some(run.conditions.words)}" if run.conditions.names and not run.conditions.captions else ""
    kind = "with {:,} captions" if run.conditions.captions else "in {} classes"
    classes = f" {kind.format(run.data.classes)}{names}" if run.data.classes else ""
    weights = sum(p.numel() for p in net.parameters()) + saved(net)
    learns = sum(p.numel() for p in net.parameters() if p.requires_grad)
    part = f", {learns:,} of them trained" if learns < weights else ""
    less = by_dual(net, run.objective, run.path, run.data.shape, ref=run.train.ref)
    hint = f"; objective.slope.kind=dual takes {less:.2f} F, is exact and may run in bf16" if less else ""
    return (
        f"training {folder} on {where(run.train.share, here)}: "
        f"data {run.data.kind} ({many}{classes}), "
        f"net {run.net.kind} ({weights:,} parameters{part}), "
        f"{units:.2f} F a step (1 F: one forward pass{hint}), "
        f"steps {step:,} to {run.train.steps:,} of {run.train.batch:,} {what}"
    )


def by_dual(
    net: nn.Module, objective: Objective, path: FlowPath, shape: Sequence[int], *, ref: cost.Theta
) -> float | None:
    """What a step would cost with the slope that rides, in F; None where it is no difference that is taken."""
    if not isinstance(objective.needs.slope, CentralSlope):
        return None
    try:
        return cost.forward_units(net, objective.model_copy(update={"slope": DualSlope()}), path, shape, ref=ref)
    except UserError:  # a net of which an operation has no rule
        return None


def where(share: int, here: torch.device) -> str:
    """The device, and how the weights lie on several ranks."""
    name = f"{here}{f' ({torch.cuda.get_device_name(here)})' if here.type == 'cuda' else ''}"
    if (ranks := dist.world()) == 1:
        return name
    parts = share_of(share, ranks)
    lie = "each with all weights" if parts == 1 else f"the weights in parts over {'all' if parts == ranks else parts}"
    return f"{ranks} ranks of {name}, {lie}"
