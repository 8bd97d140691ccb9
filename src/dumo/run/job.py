"""Open a run to train it: once, in one place, into plain objects.

`open_job` goes through these steps, on every rank:

1. lock the folder (rank 0), and read what it holds into an `Index`
2. resolve the run: what disk and machine say of it, and where things lie
3. check that it fits this machine, its ranks and the folder
4. open the data, and examine the derivative against float64
5. begin the state: as drawn, of the last checkpoint, or of `start`
6. compare data and run with what the folder holds

A `Job` is what came of it. Nothing but the lock is written before `run.train` takes it.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from dumo.config import trust
from dumo.config.check import check_pieces
from dumo.config.spec import Run
from dumo.data import Data
from dumo.io.content import Hashes, hashes_of
from dumo.io.source import DataSource
from dumo.run import content, cost, encode, examination, teacher
from dumo.run.cost import StepCost
from dumo.run.folder import (
    guard_run_folder,
    locked_run_folder,
    remove_half_written,
    require_resumable,
)
from dumo.run.index import Index
from dumo.run.journal import History
from dumo.run.net import outline, require_room
from dumo.run.resolve import resolve, resolve_again, with_absolute_paths, with_hashes
from dumo.run.speed import Meter
from dumo.run.validation import Validation
from dumo.run.weights import begin
from dumo.runtime import dist, threads
from dumo.runtime.progress import quiet
from dumo.training import agreement
from dumo.training.layout import share_of
from dumo.training.manifest import Checkpoint
from dumo.training.state import State
from dumo.training.step import Record
from dumo.types import UserError


class Sheets(Protocol):
    """Draws sheets of samples where `train.sheets` says so. Every rank has them, and calls them alike."""

    def open(self, state: State) -> None:
        """Before the next step: what is due of this one and not there."""
        ...

    def draw(self, state: State, record: Record) -> None:
        """After a step: what is due."""
        ...


SheetsOf = Callable[[Run, Path, Callable[[str], object]], Sheets]  # of a run in its folder, and who hears of a failure


@dataclass
class Job:
    """A run opened to be trained, and all that was found when it was."""

    run: Run  # resolved
    index: Index  # what the folder held
    device: torch.device
    tell: Callable[[str], None]
    data: DataSource
    hashes: Hashes | None  # of the files of the data
    state: State  # in which training begins
    last: Checkpoint | None  # that it resumes from
    rewound: bool  # resumes from a checkpoint that was asked for: later ones go
    history: History | None  # what has changed since; of rank 0
    teacher: teacher.LoadedTeacher | None
    validation: Validation
    sheets: Sheets | None
    meter: Meter
    step_cost: StepCost  # of an image

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.index.folder


@contextmanager
def open_job(
    folder: Path,
    run: Run | None = None,
    *,
    changes: Sequence[str] = (),
    device: str = "auto",
    tell: Callable[[str], None] | None = None,
    step: int | None = None,
    accept: bool = False,
    verify: bool = False,
    sheets: SheetsOf | None = None,
) -> Generator[Job, None, None]:
    """Open a run in its folder to train it, or to resume it from the last checkpoint, or that of `step`.

    Without `run` it is the folder's own, with these `changes` (`a.b=c`). Under torchrun the ranks share the work; every
    rank must enter it. While inside, the folder is locked, and writes are refused if it was moved away. `tell` is
    called with lines for the user, on rank 0. `verify`: all images are hashed first. `sheets`
    (`dumo.report.sheet.Sheets`) draws those of `train.sheets`.

    Raises UserError if the run does not fit the machine or the ranks, the folder holds another run or another process
    trains there, its data or fields have changed (and no `accept` says that they may), or if the slope fails its
    examination.
    """
    rank, _ = dist.torchrun_rank_and_world()
    if rank != 0 or tell is None:
        tell = quiet
    lock = locked_run_folder(folder) if rank == 0 else nullcontext()
    with lock:
        # the run, as the folder and the machine have it
        index = Index.read(folder)
        if run is None:
            trust.accept(changes)
            run = index.run(changes)
        run, target = resolved_for_training(run, index, device, sheets)
        if rank == 0:
            require_resumable(run, index, step, accept=accept)
            remove_half_written(folder)
        guard = guard_run_folder(folder) if rank == 0 else nullcontext()
        with guard, dist.join():
            run = resolve_again(run)  # on the other ranks, with what rank 0 has made
            yield assemble(run, index, target, tell, step=step, accept=accept, verify=verify, sheets=sheets)


def resolved_for_training(run: Run, index: Index, device: str, sheets: SheetsOf | None) -> tuple[Run, torch.device]:
    """The run with what disk and machine say of it, and the device; the texts' tokens are made by rank 0.

    Raises UserError where it does not fit the machine or the ranks.
    """
    rank, ranks = dist.torchrun_rank_and_world()
    before = index.written.run if index.written else None
    run = resolve(with_absolute_paths(run, before))
    if run.train.sheets and sheets is None:
        raise UserError(
            f"train.sheets={run.train.sheets}, and nothing draws them: call dumo.train, or hand "
            "sheets=dumo.report.sheet.Sheets, or set train.sheets=[]"
        )
    target = dist.device(device)
    rows_per_rank = -(-run.train.batch // ranks)
    require_room(run, target, run.train.copies, rows_per_rank, share_of(run.train.share, ranks))
    check_pieces(run.train, run.objective, ranks)
    if rank == 0:
        encode.make_tokens(run)
    return with_hashes(resolve_again(run), before), target


def assemble(
    run: Run,
    index: Index,
    device: torch.device,
    tell: Callable[[str], None],
    *,
    step: int | None,
    accept: bool,
    verify: bool,
    sheets: SheetsOf | None,
) -> Job:
    """Open all parts of a resolved run, and compare them with what its folder holds. Every rank must call it."""
    data = open_data(run.data)
    with threads.fewer_when_busy(device, quiet):
        examination.examine(run, device).require()

    # open meter, sheets, validation and teacher, and begin the state
    step_cost = cost.step_cost(outline(run), run.objective, run.path, run.data.shape, ref=run.train.ref)
    meter = Meter(run.train, index.folder, device, step_cost.flops)
    drawer = sheets(run, index.folder, tell) if sheets else None
    state, last = begin(run, index.checkpoints, device, step)
    identities = index.written.identities() if index.written and run.evaluate.every else set[str]()
    validation = Validation(run, index.folder, state, tell, meter.leave_out, identities)
    opened_teacher = agreement.on_each_rank(
        lambda: teacher.open_teacher(run.teacher, run, state, device) if run.teacher else None
    )

    # compare with what the folder holds
    change = content.verify_data(data, index.folder, last, accept=accept, verify=verify)

    def history_of() -> History | None:
        if not dist.is_main():
            return None
        return History.of(run, index, data, state.step, last, accept=accept, change=change)

    return Job(
        run=run,
        index=index,
        device=device,
        tell=tell,
        data=data,
        hashes=hashes_of(data),
        state=state,
        last=last,
        rewound=step is not None,
        history=agreement.on_each_rank(history_of),
        teacher=opened_teacher,
        validation=validation,
        sheets=drawer,
        meter=meter,
        step_cost=step_cost,
    )


def open_data(data: Data) -> DataSource:
    """The data, as all ranks see them. Raises UserError on all of them where one cannot open them, or sees fewer."""
    source = agreement.on_each_rank(data.open)
    sizes = agreement.gather_results(lambda: source.size)
    if len(set(sizes)) > 1:
        there = ", ".join(f"{size:,}" for size in sizes if size is not None)
        raise UserError(f"the ranks see different data, by rank {there} rows: give all of them the same files")
    return source
