"""Train a run: where data, net, objective and folder meet.

A run is a folder: run.yaml (complete), data.json, metrics.jsonl, speed.jsonl, checkpoints/, milestones/, sheets/,
best/, grids/, samples/, evaluation.json, report.html with its pictures in report/.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Protocol

import torch

from dumo.config.advice import advice
from dumo.config.check import check_pieces
from dumo.config.load import FILE, dump, load
from dumo.config.spec import Run
from dumo.config.word import method
from dumo.data import Data, Latents
from dumo.flow.draw import Draws
from dumo.flow.flow import Flow
from dumo.io.content import hashes_of
from dumo.io.source import Bucketed, Source
from dumo.nets.dualized import Dualized
from dumo.run import content, cost, deviation, encode, examination, teacher
from dumo.run.folder import held
from dumo.run.journal import History, Journal, way_back
from dumo.run.net import flow_in_training, outline, require_room
from dumo.run.outlook import outlook, unfit
from dumo.run.resolve import pinned, placed, resolve, resolve_again
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
from dumo.training.step import Batch, Record, draws_of, pieces, span, train_step
from dumo.types import UserError
from dumo.types.rows import pin, to_device


class Sheets(Protocol):
    """Draws sheets of samples where `train.sheets` says so. Every rank has them, and calls them alike."""

    def open(self, state: State) -> None:
        """Before the next step: what is due of this one and not there."""
        ...

    def draw(self, state: State, record: Record) -> None:
        """After a step: what is due."""
        ...


SheetsOf = Callable[[Run, Path, Callable[[str], object]], Sheets]  # of a run in its folder, and who hears of a failure


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
    sheets: SheetsOf | None = None,
    hooks: Sequence[loop.Every] = (),
) -> State:
    """Train, or go on where the folder's last checkpoint stands, or that of `step`. Returns the state at the end.

    Under torchrun the ranks share the work, each with a part of every batch; every rank must call it, and rank 0 alone
    writes and tells. `sheets` (`dumo.report.sheet.Sheets`) draws those of `train.sheets`. `hooks` are called after
    dumo's own, on every rank. `verify`: all images are hashed first. `tell` hears, before the first step, what is
    trained on what (`outlook`), and what is not as its sources have it, or not as it was; then of skipped steps.

    Raises UserError if the run does not fit the ranks, the folder holds another run or another process trains there,
    its data or fields have changed (and no `accept` says that they may), or if the slope fails its examination, before
    the first step or on the weights that would be saved first; Diverged if the loss is no longer a number; Stopped,
    once a checkpoint is saved, if a signal asked for it.
    """
    rank, ranks = dist.launched()
    before = load(folder) if (folder / FILE).is_file() else None
    run = resolve(placed(run, before))
    check_sheets(run, sheets)
    target = dist.device(device)
    rows_per_rank = -(-run.train.batch // ranks)
    require_room(run, target, run.train.copies, rows_per_rank, share_of(run.train.share, ranks))
    check_pieces(run.train, run.objective, ranks)
    if rank == 0:
        encode.make_tokens(run)
    run = pinned(resolve_again(run), before)  # with the tokens that rank 0 has made
    lock = held(run, folder, step, accept=accept) if rank == 0 else nullcontext()
    if rank != 0:  # rank 0 alone shows progress and tells
        bar = no_bar
        tell = None
    with lock, dist.join():
        run = resolve_again(run)  # on the other ranks, with what rank 0 has made
        return train_in_locked_folder(
            run,
            folder,
            target,
            bar,
            tell or quiet,
            step,
            accept=accept,
            verify=verify,
            sheets=sheets,
            hooks=hooks,
        )


def train_in_locked_folder(
    run: Run,
    folder: Path,
    device: torch.device,
    bar: Bar,
    tell: Callable[[str], None],
    step: int | None = None,
    *,
    accept: bool = False,
    verify: bool = False,
    sheets: SheetsOf | None = None,
    hooks: Sequence[loop.Every] = (),
) -> State:
    """Train in a folder that is locked. Returns and raises as `train`."""
    data = open_data(run.data)
    with threads.fewer_when_busy(device, quiet):
        examination.examine(run, device).require()

    @cache
    def step_cost() -> cost.StepCost:
        return cost.step_cost(outline(run), run.objective, run.path, run.data.shape, ref=run.train.ref)

    # open meter, sheets, validation and teacher, and begin the state
    meter = Meter(run.train, folder, device, lambda: step_cost().flops)
    drawer = sheets(run, folder, tell) if sheets else None
    state, last = begin(run, folder, device, step)
    validation = Validation(run, folder, state, tell, meter.leave_out)
    opened_teacher = agreement.own(
        lambda: teacher.open_teacher(run.teacher, run, state, device) if run.teacher else None
    )

    # compare with what the folder holds
    change = content.prove(data, folder, last, accept=accept, verify=verify)
    hashes = hashes_of(data)

    def history_of() -> History | None:
        if not dist.is_main():
            return None
        return History.of(run, folder, data, state.step, last, accept=accept, change=change)

    history = agreement.own(history_of)

    # say what is trained
    tell(outlook(run, folder, data.size, state.step, device, step_cost().units))
    if isinstance(data, Bucketed):
        tell(f"images are in {data.about}")
    tell(f"objective: {method(run.objective)}")
    images_per_rank = (run.train.steps - state.step) * run.train.batch / dist.world()
    for line in unfit(run.train, images_per_rank * step_cost().flops, device, state.step):
        tell(line)
    if isinstance(state.net, Dualized) and not last:
        for fit in state.net.fits:
            tell(str(fit))

    # note it in the folder, once all ranks have read what is there
    if opened_teacher:
        opened_teacher.check(folder)
    dist.barrier()
    for line in agreement.own(lambda: [*history.write(rewound=step is not None)] if history else []):
        tell(line)
    if history:
        for line in advice(run, deviation.noted(folder)):
            tell(line)

    # what the loop reads, and what it calls
    source = data
    if opened_teacher:
        points = run.objective.needs.teacher.points
        with threads.fewer_when_busy(device, tell):
            source = opened_teacher.begin(data, points, run.path, run.data, folder, device, bar)
    step_threads = step_threads_of(run, last, device, tell)
    text = dump(run, history.changed) if history else ""
    journal = Journal(run, folder, device, source, tell, hashes, text, validation, step_threads)
    journal.open(state)
    if drawer:
        drawer.open(state)
    prior = run.data.prior if isinstance(run.data, Latents) else None
    teacher_velocity = opened_teacher.velocity if opened_teacher else None

    def flow_for(state: State) -> Flow:
        return flow_in_training(run, state, teacher=teacher_velocity, prior=prior)

    flow = flow_for(state)
    try:
        with (
            step_threads,
            journal.saver,
            fed(run.train, shapes(source, run.train, run.data.shape), source, flow, device) as (batches, draws),
            bar(f"training {folder.name}", run.train.steps) as tick,
        ):
            tick(state.step, "the first step" + (", compiled first" if run.train.compile != "none" else ""))
            meter.begin(state.step)
            every = [
                loop.Every(1, lambda state, record: step_threads.end()),
                loop.Every(1, lambda state, record: tick(state.step, meter.note(record))),
                *journal.hooks,
                *([loop.Every(1, drawer.draw)] if drawer else []),
                *hooks,
                loop.Every(1, lambda state, record: step_threads.begin()),
            ]
            if state.step < run.train.steps:
                step_threads.choose(trial_step(run.train, state, flow_for, source))
            step_threads.begin()
            loop.train(state, flow, batches, run.train, every, journal.due, draws)
    except Diverged as error:
        last_good = state.step - state.skips
        way = agreement.main(lambda: way_back(run.train, folder, last_good))
        raise Diverged(f"{error} {way}") from error
    for line in agreement.main(lambda: [*validation.outcome()]):
        tell(line)
    return state


def check_sheets(run: Run, sheets: SheetsOf | None) -> None:
    """Raise UserError where `train.sheets` asks for sheets and nothing draws them."""
    if run.train.sheets and sheets is None:
        raise UserError(
            f"train.sheets={run.train.sheets}, and nothing draws them: call dumo.train, or hand "
            "sheets=dumo.report.sheet.Sheets, or set train.sheets=[]"
        )


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


def trial_step(
    train: Train, state: State, flow_for: Callable[[State], Flow], source: Source | teacher.Coupled
) -> Callable[[], object]:
    """What makes a step like the training's next one, on a copy of its state, which the first call makes."""

    @cache
    def copied() -> tuple[State, Flow]:
        trial = begin_state(frozen.copied(state.net), train)
        trial.step = state.step
        return trial, flow_for(trial)

    def try_step() -> None:
        trial, flow = copied()
        batch = source.batch(state.step, train.batch, train.seed, span(pieces(train, flow.objective)))
        train_step(trial, flow, batch, train)

    return try_step


@contextmanager
def fed(
    train: Train,
    shape: Callable[[int], tuple[int, ...]],
    source: Source | teacher.Coupled,
    flow: Flow,
    here: torch.device,
) -> Generator[tuple[Callable[[int], Batch], Callable[[int], Draws]], None, None]:
    """A step's batch on the device, and what it draws, by its number; both made ahead, for a GPU in pinned memory.

    `shape` is that of a step's samples.
    """
    rows, gpu = span(pieces(train, flow.objective)), here.type == "cuda"
    own = not isinstance(source, teacher.Coupled)  # a teacher's pairs bring their noise

    def read(step: int) -> Batch:
        parts = source.batch(step, train.batch, train.seed, rows)
        return [pin(part) for part in parts] if gpu else parts

    def draw(step: int) -> Draws:
        draws = draws_of(flow, train, step, shape(step), z=own)
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
