"""Train a run: `train` opens its folder and trains it; `train_job` trains what `run.job` has opened.

`train_job`, on every rank:

1. say what is trained on what
2. bring the folder to the step, once all ranks have read what is there (`RunFolder.begin_at`)
3. make a teacher's pairs, if it teaches by pairs
4. open the journal, and make up for a milestone or a sheet that is missing
5. train (`training.loop`), with batches and random numbers made ahead

`dumo.run.folder` says what the folder of a run holds.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from dumo.config.fit import advice
from dumo.config.spec import Run
from dumo.config.word import method
from dumo.data.ledger import ledger_of
from dumo.flow.module import Flow
from dumo.flow.noise import Draws
from dumo.io.source import Bucketed, DataSource
from dumo.nets.dualized import Dualized
from dumo.run.data import begin_ledger, recorded_facts, with_data_facts
from dumo.run.job import Job, MakeSheets, open_job, train_more_hint
from dumo.run.journal import Journal, resume_hint
from dumo.run.net import make_flow
from dumo.run.summary import empty_classes_line, training_summary
from dumo.run.teacher import TeacherPairs
from dumo.runtime import dist
from dumo.runtime.limits import STEPS
from dumo.runtime.progress import Bar, no_bar
from dumo.runtime.text import duration_text
from dumo.runtime.threads import cores
from dumo.training import agreement, log, loop
from dumo.training.duration import Clock
from dumo.training.prefetch import BATCHES_AHEAD, Prefetch
from dumo.training.record import Record
from dumo.training.spec import Train
from dumo.training.state import Diverged, State
from dumo.training.step import Batch, draws_of, passes_of_rank, span
from dumo.types.rows import pin, to_device


def train(
    run: Run,
    folder: Path,
    *,
    device: str = "auto",
    bar: Bar = no_bar,
    tell: Callable[[str], None] | None = None,
    sheets: MakeSheets | None = None,
    hooks: Sequence[loop.Every] = (),
) -> State:
    """Train a run in a folder, or resume it there. Returns the state at the end.

    Opens it by `dumo.run.job.open_job`, whose arguments have the same meaning, and trains it by `train_job`. Raises as
    both.
    """
    opened = open_job(
        folder,
        run,
        device=device,
        tell=tell,
        sheets=sheets,
        bar=bar,
    )
    with opened as job:
        return train_job(job, bar, hooks)


def train_job(
    job: Job,
    bar: Bar = no_bar,
    hooks: Sequence[loop.Every] = (),
    send_row: Callable[[log.Row], object] | None = None,
) -> State:
    """Train an opened run to the last of `train.steps`, or until its time is over. Returns the state at the end.

    Every rank must call it; rank 0 alone writes and shows progress. `hooks` are called after dumo's own, on every rank.
    `send_row` is called on rank 0 with each row of the log, and its speed.
    Raises Diverged if the loss is no longer a number; Stopped, once a checkpoint is saved, if a signal asked for it;
    UserError if the slope fails its examination on the weights that would be saved first, or the disk is full.
    """
    run = job.run
    state = job.state
    folder = job.folder.path
    main_bar = bar if dist.is_main() else no_bar

    # 1. say what is trained
    for line in _lines_before(job):
        job.tell(line)

    # 2. note it in the folder, once all ranks have read what is there
    if job.teacher:
        job.teacher.require_same(folder)
    dist.barrier()
    for line in agreement.on_main_rank(lambda: _begin_in_folder(job)):
        job.tell(line)

    # 3. make a teacher's pairs
    source = _training_source(job, main_bar)

    # 4. open the journal
    timing = state.duration.timing
    clock = Clock(timing, job.began) if timing else None
    journal = _journal_of(job, source, clock)
    if send_row:
        journal.send_row = lambda row: send_row(job.meter.add_speed(row))
    journal.open(state)
    if job.sheets:
        job.sheets.draw_missing(state)

    # what a step takes
    teacher_velocity = job.teacher.velocity if job.teacher else None
    flow = make_flow(run, state, teacher=teacher_velocity)

    # what is called after it
    run_hooks = list(journal.hooks)
    if job.sheets:
        run_hooks.append(loop.Every(1, job.sheets.draw))

    try:
        with (
            journal.folder.checkpoints,
            _prefetched(run, source, flow, job.device) as (batch_at, draws_at),
            _progress(job, main_bar) as show_progress,
        ):
            show_progress(_first_text(run.train, state))
            job.meter.begin(state.step)
            all_hooks = [
                loop.Every(1, lambda state, record: show_progress(_note_step(job, record))),
                *run_hooks,
                *hooks,
            ]

            # 5. train
            read_clock = clock.read if clock else None
            loop.train(state, flow, batch_at, run.train, all_hooks, journal.is_save_due, draws_at, read_clock)
    except Diverged as error:
        hint = _resume_hint_of(job)
        raise Diverged(f"{error} {hint}") from error  # without a name, which would hold the job by its traceback
    _tell_end(job, clock)
    return state


def _lines_before(job: Job) -> list[str]:
    """The lines that say what is trained on what. Every rank must call it."""
    run = job.run
    state = job.state
    lines = [
        training_summary(
            run,
            job.net_outline,
            job.folder.path,
            size=job.data.size,
            step=state.step,
            timing=state.duration.timing,
            device=job.device,
        )
    ]
    if isinstance(job.data, Bucketed):
        lines.append(f"images are in {job.data.about}")
    empty_classes = empty_classes_line(run.data, job.data)
    if empty_classes:
        lines.append(empty_classes)
    lines.append(f"objective: {method(run.objective)}")
    if job.threads is not None and job.threads < cores():
        lines.append(f"threads: {job.threads} of {cores()} cores; OMP_NUM_THREADS=N sets another number")
    if isinstance(state.net, Dualized) and not job.resumed_from:
        lines += map(str, state.net.lowpass_fits)
    if state.is_over:
        lines.append(train_more_hint(job.folder.path, run.train))
    return lines


def _begin_in_folder(job: Job) -> list[str]:
    """Bring the folder to the step, on rank 0, and record run and data. Returns lines that say what has changed."""
    # A run that begins measures its data: what run.yaml has of them may be of a start that was killed.
    recorded = job.folder.run if job.resumed_from else None
    run = with_data_facts(job.run, recorded, job.data)
    lines = [*job.folder.begin_at(run, job.resumed_from, job.state.step)]
    begin_ledger(job.folder.path, job.data, job.resumed_from)
    facts = recorded_facts(run)
    return [*lines, *advice(run, facts.sd if facts else None)]


def _training_source(job: Job, bar: Bar) -> DataSource | TeacherPairs:
    """What training reads: the data, or a teacher's pairs, which are made if they are missing."""
    if job.teacher is None:
        return job.data
    return job.teacher.training_source(job.data, job.run, job.folder.path, job.device, bar)


def _journal_of(job: Job, source: DataSource | TeacherPairs, clock: Clock | None) -> Journal:
    """The journal of a job. `clock` is its clock, if it ends by it."""
    return Journal(
        run=job.run,
        folder=job.folder,
        device=job.device,
        source=source,
        tell=job.tell,
        ledger=ledger_of(job.data),
        clock=clock,
        validation=job.validation,
        threads=job.threads,
    )


@contextmanager
def _prefetched(
    run: Run, source: DataSource | TeacherPairs, flow: Flow, device: torch.device
) -> Generator[tuple[Callable[[int], Batch], Callable[[int], Draws]], None, None]:
    """Yield two functions of a step's number, batch_at and draws_at: this rank's rows on the device, and its draws.

    Threads make both ahead of the step, for a GPU in pinned memory.
    """
    train = run.train
    rows = span(passes_of_rank(train, flow.objective))
    is_gpu = device.type == "cuda"
    last_step = train.steps if train.minutes is None else STEPS  # of a run that ends by the clock it is not known
    draws_noise = not isinstance(source, TeacherPairs)  # a teacher's pairs bring their noise

    def read_batch(step: int) -> Batch:
        parts = source.batch(step, train.batch, train.seed, rows)
        return [pin(part) for part in parts] if is_gpu else parts

    def draw(step: int) -> Draws:
        shape = run.data.shape
        if isinstance(source, Bucketed):
            shape = source.shape(step, train.batch, train.seed)
        draws = draws_of(flow, train, step, shape, z=draws_noise)
        return draws.pin() if is_gpu else draws

    with (
        Prefetch(read_batch, last=last_step, depth=BATCHES_AHEAD) as batches,
        Prefetch(draw, last=last_step) as draws_at,
    ):

        def batch_at(step: int) -> Batch:
            return [to_device(part, device) for part in batches(step)]

        yield batch_at, draws_at


@contextmanager
def _progress(job: Job, bar: Bar) -> Generator[Callable[[str], None], None, None]:
    """A bar that counts steps, or seconds of a run that ends by the clock. Yields what moves it.

    That is a function which moves the bar to where the run is, and shows a text on it.
    """
    state = job.state
    title = f"training {job.folder.path.name}"
    total = job.run.train.steps
    if state.duration.timing:
        title += " (seconds)"
        total = round(state.duration.timing.promised_seconds)
    with bar(title, total) as tick:

        def show_progress(text: str) -> None:
            timing = state.duration.timing
            units_done = round(timing.seconds) if timing else state.step
            tick(units_done, text)

        yield show_progress


def _first_text(train: Train, state: State) -> str:
    """What the bar says before the first step."""
    if state.is_over:
        return "no step is left"
    if train.compile != "none":
        return "the first step, compiled first"
    return "the first step"


def _note_step(job: Job, record: Record) -> str:
    """Measure a step, which may add a row to speed.jsonl. Returns what the bar says after it."""
    text = job.meter.note(record)
    return f"step {record.step:,}, {text}" if job.state.duration.timing else text


def _resume_hint_of(job: Job) -> str:
    """What to type where a job diverged. Every rank must call it."""
    last_good_step = job.state.step - job.state.skips
    return agreement.on_main_rank(lambda: resume_hint(job.run.train, job.folder, last_good_step))


def _tell_end(job: Job, clock: Clock | None) -> None:
    """Say whether time ran out before the first step, and which weights were best. Every rank must call it."""
    if clock and clock.late_seconds is not None:
        job.tell(
            f"it took {duration_text(clock.late_seconds)} to begin, and no time was left for steps: it made one. Give "
            "it more by train.minutes"
        )
    if job.run.evaluate.best:
        best = agreement.on_main_rank(lambda: job.folder.find_best(job.run))
        if best:
            job.tell(f"the best {best.metric} in training, {best.value:.4g}, is of step {best.step:,}: {best.file}")
