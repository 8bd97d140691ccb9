"""Open a run for training: lock its folder, resolve and check it, and load all that training needs into a `Job`.

`open_job` is the entrance; `train_more_hint` is a line for a run that has ended. Every rank goes through the steps. Up
to the first step of training rank 0 writes no more than the lock, missing latents and texts, and what a new run begins
from.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from pydantic import BaseModel
from pydantic_core import to_jsonable_python
from torch import nn

from dumo.config import trust
from dumo.config.change import yaml_text
from dumo.config.fit import check_ranks
from dumo.config.load import run_of
from dumo.config.place import RUN_FILE
from dumo.config.source import Origin
from dumo.config.spec import Run
from dumo.data import Data, Latents
from dumo.io.source import DataSource
from dumo.nets.text import EmbeddedTexts
from dumo.run import examination
from dumo.run.data import compare_data, require_same_fingerprint
from dumo.run.folder import RunFolder
from dumo.run.net import outline, require_room_to_train
from dumo.run.resolve import fetch_files, find_commits, resolve, with_absolute_paths, with_commits, with_hashes
from dumo.run.speed import Meter
from dumo.run.weights import begin_or_resume
from dumo.runtime import dist, shell_path, stopwatch
from dumo.runtime.device import choose_device, known_peak_tflops
from dumo.runtime.progress import Bar, ignore_line, no_bar
from dumo.runtime.text import minutes_text
from dumo.runtime.threads import threads_for
from dumo.training import agreement
from dumo.training.checkpoint import Checkpoint
from dumo.training.duration import Duration
from dumo.training.layout import share_of
from dumo.training.spec import Train
from dumo.training.state import State
from dumo.training.step import Record
from dumo.types import UserError, marks_of

if TYPE_CHECKING:
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
    folder: RunFolder
    device: torch.device
    tell: Tell  # silent except on rank 0
    data: DataSource
    state: State  # in which training begins
    resumed_from: Checkpoint | None  # None: a fresh start
    teacher: "LoadedTeacher | None"
    validation: "Validation | None"  # None: the run is not judged, or no step is left at which it would be
    sheets: Sheets | None  # None: no sheets are drawn
    meter: Meter
    threads: int | None  # of torch on a CPU; None on a GPU
    net_outline: nn.Module  # the net on the meta device, without values
    began: float  # seconds, by `stopwatch.wall_clock`: from when its time counts, if it ends by the clock


@contextmanager
def open_job(
    path: Path,
    run: Run | None = None,
    *,
    changes: Sequence[str] = (),
    origin: Origin | None = None,
    device: str = "auto",
    tell: Tell | None = None,
    sheets: MakeSheets | None = None,
    began: float | None = None,
    bar: Bar = no_bar,
) -> Generator[Job, None, None]:
    """Open a run in its folder for training. Under torchrun every rank must enter it.

    While inside, the folder is locked, and writes are refused if it was moved away.

    - `path`: the run's folder.
    - `run`: what to train; None: the run of the folder, with `changes` (`a.b=c`).
    - `origin`: the checkpoint of another run that a new run begins from.
    - `tell`: called with lines for the user, on rank 0.
    - `sheets`: draws the sheets of `train.sheets` (`dumo.run.sheet.Sheets`); None: nobody does.
    - `began`: from when its time counts, by `stopwatch.wall_clock`, if it ends by the clock; None: from now on.
    - `bar`: shows how far images are encoded.

    Raises UserError if the run does not fit the machine or its ranks, another process trains in the folder or it holds
    another run, the data have changed, or the derivative fails its examination.
    """
    time_began = stopwatch.wall_clock() if began is None else began
    # Ranks meet before the folder is locked, so that all of them hear if it was refused. It is locked before anything
    # in it is read.
    with dist.join(), RunFolder(path).lock() as folder:
        tell_on_main = ignore_line if tell is None or not dist.is_main() else tell
        requested_run = _run_of_folder(folder, changes) if run is None else run
        require_same_on_all_ranks(requested_run)

        # Download what the run names on the Hub: on rank 0, from whose cache the others read. It takes no time of a run
        # that ends by the clock.
        recorded_run = folder.run if folder.text and folder.text.hash else None
        began_fetching = stopwatch.wall_clock()
        commits = agreement.on_main_rank(lambda: find_commits(requested_run, recorded_run))
        pinned_run = with_commits(requested_run, commits)
        agreement.on_main_rank(lambda: fetch_files(pinned_run), is_long=True)
        time_began += stopwatch.wall_clock() - began_fetching

        # Resolve the run, and check that it fits the machine.
        resolved_run = resolve(with_absolute_paths(pinned_run))
        torch_device = choose_device(device)
        complete_run, net_outline = _fit_and_complete(resolved_run, recorded_run, torch_device, sheets)

        # Choose the checkpoint. A new run from another's copies it, after it has recorded where it began from.
        def copy_origin() -> None:
            folder.require_resumable()
            if origin:
                folder.begin_from(origin, complete_run)
            folder.copy_origin()

        agreement.on_main_rank(copy_origin, is_long=True)
        chosen = folder.newest_checkpoint()

        # Refuse another run, and a length that is over, before anything expensive is done.
        agreement.on_each_rank(lambda: folder.require_same_config(complete_run, chosen))
        recorded_train = recorded_run.train if recorded_run else None
        Duration.resolve(complete_run.train, recorded_train, chosen.facts if chosen else None)

        # Encode missing latents and captions, open the data, and examine the derivative.
        time_began += _encode_what_is_missing(complete_run, device, bar, tell_on_main)
        data = open_data(complete_run.data)
        examination.examine(complete_run, torch_device).require()
        step_flops = _step_flops(complete_run, net_outline, torch_device)
        meter = Meter(complete_run.train, path, torch_device, step_flops)
        drawn_sheets = sheets(complete_run, path, tell_on_main) if sheets else None

        # Load the checkpoint, or the one before if a value of it is not finite. How long the run trains is a function
        # of the one that was loaded.
        state, loaded = begin_or_resume(complete_run, folder.checkpoints, torch_device, chosen)
        state.duration = Duration.resolve(complete_run.train, recorded_train, loaded.facts if loaded else None)

        # From here on the net computes, with the number of threads that its checkpoint was trained with.
        recorded_threads = loaded.facts.threads if loaded else None
        with threads_for(state.net, torch_device, recorded_threads) as threads:
            validation = _open_validation(complete_run, folder, state, tell_on_main, meter)
            teacher = _load_teacher(complete_run, state, torch_device)

            # Compare the data with those of the checkpoint.
            compare_data(complete_run.data, data, path, loaded)
            if loaded and recorded_run:
                agreement.on_each_rank(lambda: require_same_fingerprint(recorded_run, data, path))
            yield Job(
                run=complete_run,
                folder=folder,
                device=torch_device,
                tell=tell_on_main,
                data=data,
                state=state,
                resumed_from=loaded,
                teacher=teacher,
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


def _run_of_folder(folder: RunFolder, changes: Sequence[str]) -> Run:
    """The folder's run with `changes`. Raises UserError if there is none."""
    trust.accept(changes)
    if folder.text is None:
        raise UserError(f"{folder.path} has no {RUN_FILE}")
    return run_of(folder.text, changes)


def require_same_on_all_ranks(run: Run) -> None:
    """Raise UserError, on all ranks, if one is asked for another run than rank 0. Every rank must call it.

    Paths may differ: what lies there is compared by its hash.
    """

    def requested_values() -> dict[str, object]:
        return dict(_values_of(run.model_copy(update={"resolved": {}})))

    main_values, *other_values = agreement.gather_results(requested_values)
    for rank, values in enumerate(other_values, start=1):
        for name in {**main_values, **values}:
            main_value = main_values.get(name)
            value = values.get(name)
            if value != main_value:
                raise UserError(
                    f"{name} is {yaml_text(value)} on rank {rank}, and {yaml_text(main_value)} on rank 0: type the "
                    "same command on every node"
                )


def _values_of(spec: BaseModel, prefix: str = "") -> Iterator[tuple[str, object]]:
    """The fields of a spec that are no paths, by dotted path, as JSON values. `prefix` stands before each path."""
    for name, field in type(spec).model_fields.items():
        value = getattr(spec, name)
        if marks_of(field).get("where"):
            continue
        if isinstance(value, BaseModel):
            yield from _values_of(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", to_jsonable_python(value)


def _fit_and_complete(
    run: Run, recorded_run: Run | None, device: torch.device, sheets: MakeSheets | None
) -> tuple[Run, nn.Module]:
    """Check that a resolved run fits, and add its hashes.

    `recorded_run` is the run of the folder. Returns the run with the outline of its net. Every rank must call it.
    Raises UserError where the run does not fit.
    """
    net_outline = outline(run)
    _require_fit(run, net_outline, device, sheets)
    return with_hashes(run, recorded_run), net_outline


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


def _open_validation(run: Run, folder: RunFolder, state: State, tell: Tell, meter: Meter) -> "Validation | None":
    """What judges the run as it trains, as `Validation.open`; None of a run that is not judged."""
    if not run.evaluate.every:
        return None
    from dumo.run.validation import Validation

    return Validation.open(run, state, folder, log_line=tell, exclude_seconds=meter.leave_out)


def _load_teacher(run: Run, state: State, device: torch.device) -> "LoadedTeacher | None":
    """The run's teacher, if it has one. Raises UserError, on all ranks, where it cannot be opened."""
    spec = run.teacher
    if spec is None:
        return None
    from dumo.run.teacher import open_teacher

    return agreement.on_each_rank(lambda: open_teacher(spec, run, state, device))
