"""Open a run for training: lock its folder, resolve and check it, and load all that training needs into a `Job`.

`open_job` is the entrance; `train_more_hint` is a line for a run that has ended. Every rank goes through the steps:

1. meet the other ranks, lock the folder (rank 0), read what it holds into an `Index`, and compare what the ranks are
   asked for
2. resolve the run: write out what files and machine say of it; check that it fits the machine and its ranks
3. check it against the folder
4. choose the checkpoint to resume from, the last one that is whole
5. encode missing latents of images and missing captions; open the data, and examine the derivative against float64
6. begin the state: as drawn, of the checkpoint, or of `start`
7. compare data and run with what the folder holds

Before `run.train` takes the job, rank 0 writes no more than the folder, its lock, those latents and texts, and a mark
in the note of what was obeyed (`Request.was_obeyed`); and it removes what a training that was killed left half-written.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from dumo.config import trust
from dumo.config.fit import check_ranks
from dumo.config.spec import Run
from dumo.data import Data, Latents
from dumo.io.source import DataSource
from dumo.nets.text import EmbeddedTexts
from dumo.run import examination
from dumo.run.data import compare_data
from dumo.run.folder import (
    guard_run_folder,
    locked_run_folder,
    remove_half_written,
    require_resumable,
)
from dumo.run.history import History
from dumo.run.index import Index
from dumo.run.net import outline, require_room_to_train
from dumo.run.request import Request, require_same_request
from dumo.run.resolve import resolve, with_absolute_paths, with_hashes
from dumo.run.speed import Meter
from dumo.run.weights import begin_or_resume
from dumo.runtime import dist, shell_path, stopwatch
from dumo.runtime.device import choose_device, known_peak_tflops
from dumo.runtime.progress import Bar, ignore_line, no_bar
from dumo.runtime.text import minutes_text
from dumo.runtime.threads import threads_for
from dumo.training import agreement
from dumo.training.duration import Duration
from dumo.training.layout import share_of
from dumo.training.manifest import Checkpoint, Checkpoints
from dumo.training.spec import Train
from dumo.training.state import State
from dumo.training.step import Record
from dumo.types import UserError

if TYPE_CHECKING:
    from dumo.run.best import BestFolder
    from dumo.run.teacher import LoadedTeacher
    from dumo.run.validation import Validation

Tell = Callable[[str], None]  # shows the user a line


class Sheets(Protocol):
    """Draws sheets of samples as a run trains. Every rank has them, and calls them alike."""

    def draw_missing(self, state: State) -> None:
        """Draw what is due at the present step and missing in the folder; called once, before the first step."""
        ...

    def draw(self, state: State, record: Record) -> None:
        """Draw what is due after this step."""
        ...


MakeSheets = Callable[[Run, Path, Tell], Sheets]  # called with the run, its folder and `tell`


@dataclass
class Job:
    """A run opened for training, with all parts that training needs."""

    run: Run  # resolved
    index: Index  # its folder, and what that held when it was opened
    device: torch.device
    tell: Tell  # silent except on rank 0
    data: DataSource
    state: State  # in which training begins
    resumed_from: Checkpoint | None  # None: a fresh start
    request: Request | None  # what was asked for; None: it was obeyed before
    history: History | None  # what has changed since the folder was written; None except on rank 0
    teacher: "LoadedTeacher | None"
    best_folder: "BestFolder | None"  # None: the run is not judged as it trains
    validation: "Validation | None"  # None: the run is not judged, or no step is left at which it would be
    sheets: Sheets | None  # None: no sheets are drawn
    meter: Meter
    threads: int | None  # of torch on a CPU; None on a GPU
    net_outline: nn.Module  # the net on the meta device, without values
    began: float  # seconds, by `stopwatch.wall_clock`: from when its time counts, if it ends by the clock


@contextmanager
def open_job(
    folder: Path,
    run: Run | None = None,
    *,
    changes: Sequence[str] = (),
    device: str = "auto",
    tell: Tell | None = None,
    step: int | None = None,
    accept: bool = False,
    sheets: MakeSheets | None = None,
    began: float | None = None,
    bar: Bar = no_bar,
) -> Generator[Job, None, None]:
    """Open a run in its folder for training. Under torchrun every rank must enter it.

    While inside, the folder is locked, and writes are refused if it was moved away.

    - `run`: what to train; None: the run of the folder, with `changes` (`a.b=c`)
    - `step`: resume from the checkpoint of this step, not from the last one; a restart that has done so takes that
    - `tell`: called with lines for the user, on rank 0
    - `accept`: resume though data or fields have changed, and note what has
    - `sheets`: draws the sheets of `train.sheets` (`dumo.run.sheet.Sheets`); None: nobody does
    - `began`: from when its time counts, by `stopwatch.wall_clock`, if it ends by the clock; None: from now on
    - `bar`: shows how far images are encoded

    Raises UserError if the run does not fit the machine or its ranks, another process trains in the folder or it holds
    another run, ranks are asked for different ones, data or fields have changed, or the derivative fails its
    examination.
    """
    time_began = stopwatch.wall_clock() if began is None else began
    with ExitStack() as stack:
        # 1. meet, lock and read
        stack.enter_context(dist.join())
        tell_on_main = ignore_line if tell is None or not dist.is_main() else tell
        agreement.on_main_rank(lambda: stack.enter_context(locked_run_folder(folder)))
        request = Request(folder, step, tuple(changes), accept=accept)
        was_obeyed = request.was_obeyed()
        if was_obeyed:
            tell_on_main(request.obeyed_line())
        from_step = None if was_obeyed else step
        index = Index.read(folder)
        requested_run = _run_of_folder(index, changes) if run is None else run
        require_same_request(request, requested_run)

        # 2. resolve, and check that it fits the machine
        run_before = index.recorded_run.run if index.recorded_run else None
        resolved_run = resolve(with_absolute_paths(requested_run, run_before, tell_on_main))
        torch_device = choose_device(device)
        complete_run, net_outline = _fit_and_complete(resolved_run, run_before, torch_device, sheets)

        # 3. check it against the folder
        def check_folder() -> None:
            require_resumable(complete_run, index, from_step, accept=accept)
            remove_half_written(folder)
            stack.enter_context(guard_run_folder(folder))

        agreement.on_main_rank(check_folder)

        # 4. choose the checkpoint
        chosen = _choose_checkpoint(index.checkpoints, from_step)
        run_to_train = complete_run
        train_before = index.recorded_run.run.train if index.recorded_run else None
        # Refuse now what `train` would refuse for its length: nothing expensive was done yet.
        Duration.resolve(run_to_train.train, train_before, chosen.manifest if chosen else None)

        # 5. encode missing latents and captions, open the data, and examine the derivative
        time_began += _encode_what_is_missing(run_to_train, device, bar, tell_on_main)
        data = open_data(run_to_train.data)
        examination.examine(run_to_train, torch_device).require()
        meter = Meter(run_to_train.train, folder, torch_device, _step_flops(run_to_train, net_outline, torch_device))
        drawn_sheets = sheets(run_to_train, folder, tell_on_main) if sheets else None

        # 6. begin the state, and open what reads it
        state, checkpoint = begin_or_resume(
            run_to_train, index.checkpoints, torch_device, chosen, or_before=from_step is None
        )
        # From here on the net computes, with the number of threads that its checkpoint was trained with.
        recorded_threads = checkpoint.manifest.threads if checkpoint else None
        threads = stack.enter_context(threads_for(state.net, torch_device, recorded_threads))
        state.duration = Duration.resolve(run_to_train.train, train_before, checkpoint.manifest if checkpoint else None)
        best_folder, validation = _open_validation(run_to_train, index, state, tell_on_main, meter)
        teacher = _load_teacher(run_to_train, state, torch_device)

        # 7. compare with what the folder holds
        changed_data = compare_data(run_to_train.data, data, folder, checkpoint, accept=accept)

        def compare_history() -> History | None:
            if not dist.is_main():
                return None
            return History.of(run_to_train, index, data, state.step, checkpoint, accept=accept, change=changed_data)

        history = agreement.on_each_rank(compare_history)
        yield Job(
            run=run_to_train,
            index=index,
            device=torch_device,
            tell=tell_on_main,
            data=data,
            state=state,
            resumed_from=checkpoint,
            request=None if was_obeyed else request,
            history=history,
            teacher=teacher,
            best_folder=best_folder,
            validation=validation,
            sheets=drawn_sheets,
            meter=meter,
            threads=threads,
            net_outline=net_outline,
            began=time_began,
        )


def train_more_hint(folder: Path, train: Train) -> str:
    """A line that says that a run has ended, and what to type to train it for longer."""
    command = f"dumo train {shell_path(folder)}"
    if train.minutes is not None:
        trained = minutes_text(train.minutes)
        return f"{folder} has trained its {trained}. For more:  {command} --set train.minutes={2 * train.minutes:.4g}"
    return f"{folder} has trained its {train.steps:,} steps. For more:  {command} --set train.steps={2 * train.steps}"


def _run_of_folder(index: Index, changes: Sequence[str]) -> Run:
    """The folder's run with `changes`."""
    trust.accept(changes)
    return index.run(changes)


def _fit_and_complete(
    run: Run, run_before: Run | None, device: torch.device, sheets: MakeSheets | None
) -> tuple[Run, nn.Module]:
    """Check that a resolved run fits, and add its hashes.

    `run_before` is the run of the folder. Returns the run with the outline of its net. Every rank must call it. Raises
    UserError where the run does not fit.
    """
    net_outline = outline(run)
    _require_fit(run, net_outline, device, sheets)
    return with_hashes(run, run_before), net_outline


def _require_fit(run: Run, net_outline: nn.Module, device: torch.device, sheets: MakeSheets | None) -> None:
    """Raise UserError where the device has no room for a run, its ranks cannot share it, or no sheets can be drawn."""
    if run.train.sheets and sheets is None:
        raise UserError(
            f"train.sheets={run.train.sheets}, and nothing draws them: call dumo.train, or hand "
            "sheets=dumo.run.sheet.Sheets, or set train.sheets=[]"
        )
    _, ranks = dist.torchrun_rank_and_world()
    rows_per_rank = ceil(run.train.batch / ranks)
    share = share_of(run.train.share, ranks)
    require_room_to_train(run, device, net_outline, rows=rows_per_rank, share=share)
    check_ranks(run.train, run.objective, ranks)


def _choose_checkpoint(checkpoints: Checkpoints, step: int | None) -> Checkpoint | None:
    """The checkpoint of this step, by default the last one that is whole; None: there is no checkpoint.

    Every rank must call it. Raises UserError, on all ranks, where one sees other checkpoints than rank 0; and where the
    one of this step, or every one, is damaged.
    """
    _require_same_checkpoints(checkpoints)
    if step is None:
        return checkpoints.latest(together=True)
    return checkpoints.of_step(step)


def _require_same_checkpoints(checkpoints: Checkpoints) -> None:
    """Raise UserError, on all ranks, where one sees other checkpoints than rank 0. Every rank must call it."""
    steps_by_rank = agreement.gather_results(lambda: [*checkpoints.by_step()])
    steps_texts = [", ".join(map(str, steps)) or "none" for steps in steps_by_rank]
    for rank, steps_text in enumerate(steps_texts):
        if steps_text != steps_texts[0]:
            raise UserError(
                f"{checkpoints.folder}: rank 0 sees checkpoints of steps {steps_texts[0]}, and rank {rank} of steps "
                f"{steps_text}: train in a folder on a file system that all ranks share"
            )


def _encode_what_is_missing(run: Run, device: str, bar: Bar, tell: Tell) -> float:
    """Encode latents and captions that are missing. Returns the seconds that it took.

    Every rank must call it. The seconds do not count as training if the run ends by the clock.
    """
    if not (isinstance(run.data, Latents) or isinstance(run.net.texts, EmbeddedTexts)):
        return 0.0
    from dumo.run.encode import encode_what_is_missing

    began = stopwatch.wall_clock()
    encode_what_is_missing(run, device=device, bar=bar, tell=tell)
    return stopwatch.wall_clock() - began


def open_data(data: Data) -> DataSource:
    """The data, opened on every rank.

    Raises UserError on all ranks where one cannot open them, or where ranks see different numbers of rows.
    """
    source = agreement.on_each_rank(data.open)
    sizes = agreement.gather_results(lambda: source.size)
    if len(set(sizes)) > 1:
        sizes_text = ", ".join(f"{size:,}" for size in sizes if size is not None)
        raise UserError(f"the ranks see different data, by rank {sizes_text} rows: give all of them the same files")
    return source


def _step_flops(run: Run, net_outline: nn.Module, device: torch.device) -> float | None:
    """The operations of a step, for one image; None for a device whose peak is not known."""
    if not known_peak_tflops(device):
        return None
    from dumo.run import cost

    return cost.step_cost(net_outline, run.objective, run.path, run.data.shape, ref=run.train.ref).flops


def _open_validation(
    run: Run, index: Index, state: State, tell: Tell, meter: Meter
) -> "tuple[BestFolder | None, Validation | None]":
    """The folder of the best weights, and what judges the run as it trains, as `Validation.open`.

    Both are None of a run that is not judged as it trains.
    """
    if not run.evaluate.every:
        return None, None
    from dumo.run.best import BestFolder
    from dumo.run.validation import Validation

    identities: set[str] = set()  # of the run in the folder, whose best weights may be there
    if index.recorded_run:
        identities = index.recorded_run.identities()
    best_folder = BestFolder(run, index.folder, identities)
    validation = Validation.open(run, state, best_folder, log_line=tell, exclude_seconds=meter.leave_out)
    return best_folder, validation


def _load_teacher(run: Run, state: State, device: torch.device) -> "LoadedTeacher | None":
    """The run's teacher, if it has one. Raises UserError, on all ranks, where it cannot be opened."""
    spec = run.teacher
    if spec is None:
        return None
    from dumo.run.teacher import open_teacher

    return agreement.on_each_rank(lambda: open_teacher(spec, run, state, device))
