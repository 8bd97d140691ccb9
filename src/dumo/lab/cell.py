"""The cells of a plan trained and measured, each as a run in a folder named after a hash of what trains it.

A finished cell is not run again, a stopped one resumes, one with another recipe starts anew. A cell may begin from
another cell of its plan, or be taught by one: then its spec has the other's name in place of a folder.

`finish_all` makes all cells of a plan, if all can be judged, in rounds. In each round it

1. takes the cells whose sources are done (`sources`), and puts folders in place of names (`with_folders`);
2. makes the caches and tables of tokens that several cells read;
3. finishes each cell (`finish`), side by side with several jobs. One that diverges leaves the others alone.

At the end it refuses cells that were not measured alike, and raises `CellsDiverged` where some have diverged.
`dumo.lab.table` makes tables of the results.
"""

import glob
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from dumo.config.place import EVALUATION_FILE
from dumo.config.source import RUN_FILE, read_file
from dumo.data import Data, Latents
from dumo.encoders.pipeline import Pipeline
from dumo.error import NotFiniteError
from dumo.lab import worker
from dumo.lab.origin import Origin, origin_of
from dumo.lab.plan import Cell
from dumo.nets.dualized import Dualized
from dumo.nets.pretrained import Pretrained
from dumo.nets.rows import Codes
from dumo.report import compare
from dumo.report.evaluate import current_report, evaluate
from dumo.report.sheet import Sheets
from dumo.run import encode
from dumo.run.judge import missing_to_judge
from dumo.run.resolve import resolve
from dumo.run.train import train
from dumo.run.weights import RunFolder, open_run
from dumo.runtime.heartbeat import Lost
from dumo.runtime.progress import Bar, no_bar
from dumo.training.state import Diverged
from dumo.types import Objective, UserError

Row = dict[str, Any]  # of a table or a report, by column
_NOT_OF_TRAINING = {"about", "sample", "evaluate"}  # parts of a run that may change once it is trained
_HASH_BYTES = 4  # of what trains a cell, in the name of its folder: ours


@dataclass(frozen=True)
class Result:
    """A cell, trained and measured."""

    cell: Cell
    trained: RunFolder
    report: dict[str, Any]
    origin: Origin | None = None  # None: of a user's plan, or of a cell that trains nothing


class CellsDiverged(Diverged):
    """Some cells of a plan have diverged, and the others are finished."""

    def __init__(self, messages: dict[str, str], results: list[Result]) -> None:
        """`messages` say what happened, by the cell's name; `results` are those of the other cells."""
        lines = [f"{name}: {message}" for name, message in messages.items()]
        super().__init__("\n".join([*lines, "The others are finished."]))
        self.messages = messages
        self.results = results


def finish_all(cells: Sequence[Cell], folder: Path, *, jobs: int, device: str, bar: Bar) -> list[Result]:
    """Train and measure all cells, `jobs` at a time, each in a process of its own with its share of the cores.

    Small nets train fastest on one core each, so several cells run side by side. Raises UserError as `finish` does;
    before any training, where a cell has no evaluation yet and cannot be evaluated; and for cells of one protocol and
    fold that were not evaluated alike. Raises CellsDiverged once the others are finished.
    """
    for cell in cells:
        if not _is_judged(cell, folder):
            _require_judgeable(cell)
    results_by_name: dict[str, Result] = {}
    diverged: dict[str, str] = {}  # messages by name
    names = {cell.name for cell in cells}
    waiting = list(cells)
    while True:
        # the cells whose sources are done
        next_cells = [cell for cell in waiting if sources(cell, names) <= results_by_name.keys()]
        if not next_cells:
            break
        waiting = [cell for cell in waiting if cell not in next_cells]
        cells_in_place = [with_folders(cell, results_by_name, folder.parent) for cell in next_cells]
        _make_shared_files(cells_in_place, device=device, bar=bar)
        ready = [replace(cell, spec=resolve(cell.spec)) for cell in cells_in_place]

        # train and measure; here `finish` only reads what other processes have finished
        if jobs > 1:
            diverged |= _finish_apart(ready, folder, jobs=jobs, device=device, bar=bar)
        for cell in ready:
            if cell.name in diverged:
                continue
            try:
                results_by_name[cell.name] = finish(cell, folder, device=device, bar=bar)
            except (Diverged, NotFiniteError) as error:
                diverged[cell.name] = str(error)
    assert diverged or not waiting, [cell.name for cell in waiting]
    for cell in waiting:
        diverged[cell.name] = "it needs a cell that has diverged"

    results = [results_by_name[cell.name] for cell in cells if cell.name in results_by_name]
    _require_measured_alike(results)
    if diverged:
        raise CellsDiverged(diverged, results)
    return results


def _is_judged(cell: Cell, cells_folder: Path) -> bool:
    """Whether a run of a cell was judged, with any recipe: its own is known only once its sources are done."""
    any_hash = "?" * 2 * _HASH_BYTES
    return any(cells_folder.glob(f"{glob.escape(cell.name)}-{any_hash}/{EVALUATION_FILE}"))


def _require_judgeable(cell: Cell) -> None:
    """Raise UserError where something is missing that a cell's protocol needs. Images are not opened for it."""
    missing = missing_to_judge(cell.spec, num_images=None)
    if missing:
        protocol = cell.spec.evaluate.protocol
        raise UserError(f"{cell.name} cannot be judged: protocol {protocol.kind} needs {missing}")


def _make_shared_files(cells: Sequence[Cell], *, device: str, bar: Bar) -> None:
    """Make the caches and tables of tokens that are not made yet, and that several cells may read."""
    for data in dict.fromkeys(cell.spec.data for cell in cells):
        if isinstance(data, Latents):
            encode.ensure_cache(data, device=device, bar=bar)
    for cell in cells:
        encode.make_tokens(cell.spec)


def _require_measured_alike(results: Sequence[Result]) -> None:
    """Raise UserError where results that stand in one table were measured in different ways."""
    cards_by_key: dict[tuple[str, str | None, int], dict[str, Any]] = {}
    for result in results:
        cards_by_key.setdefault(_comparison_key(result), {})[result.cell.name] = result.report["card"]
    for cards in cards_by_key.values():
        compare.require_comparable(cards)


def _comparison_key(result: Result) -> tuple[str, str | None, int]:
    """What cells that are compared have in common: protocol, and the split and fold of the data of the reference."""
    spec = result.cell.spec
    return spec.evaluate.protocol.kind, spec.evaluate.split, getattr(spec.data, "fold", 0)


def _finish_apart(cells: Sequence[Cell], folder: Path, *, jobs: int, device: str, bar: Bar) -> dict[str, str]:
    """Finish cells in processes of their own. Returns messages of those that diverged, by name.

    Device `auto` spreads them over all GPUs.
    Where a process is killed, the other cells are finished all the same; then `Lost` is raised, with the names of those
    that were lost.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    num_gpus = torch.cuda.device_count() if device == "auto" else 0
    lost: list[str] = []
    diverged: dict[str, str] = {}
    with bar(f"{len(cells)} cells, {jobs} at a time", len(cells)) as tick:
        work = partial(finish, cells_folder=folder, device=device, bar=no_bar)
        finished = worker.run_side_by_side(work, cells, jobs=jobs, threads=threads, num_gpus=num_gpus)
        for num_done, (cell, error) in enumerate(finished, 1):
            if isinstance(error, Lost):
                lost.append(f"{cell.name}: {error}")
            elif error:
                diverged[cell.name] = str(error)
            tick(num_done, cell.name)
    if lost:
        raise Lost(
            f"{'; '.join(lost)}; the others are finished. Start the same command again, with fewer --jobs where memory "
            "is short"
        )
    return diverged


def finish(cell: Cell, cells_folder: Path, *, device: str, bar: Bar) -> Result:
    """Train and measure a cell, in its folder below `cells_folder`. What is done there already is not done again.

    Raises Diverged, NotFiniteError where its samples are not finite, and UserError where the run in the folder was
    continued with other settings, or trained by another objective (`origin_of`).
    """
    training_spec = cell.spec.model_dump_json(exclude=_NOT_OF_TRAINING)
    training_hash = blake2b(f"{training_spec}{cell.code or ''}".encode(), digest_size=_HASH_BYTES).hexdigest()
    folder = cells_folder / f"{cell.name}-{training_hash}"
    _require_unchanged(folder)
    # the name of a user's cell has a hash of the objective's code; that may not fit the small net of fingerprints
    origin = origin_of(cell, folder) if cell.code is None else None
    try:
        train(cell.spec, folder, device=device, bar=bar, sheets=Sheets)
    except Diverged as error:
        # without the hint to lower the rate, which would make another cell
        raise Diverged(str(error.__cause__ or error)) from error
    trained = open_run(folder, device=device)
    report = current_report(trained) or evaluate(trained, bar=bar)
    return Result(cell, trained, report, origin)


def _require_unchanged(folder: Path) -> None:
    """Raise UserError where the run in a cell's folder was continued with other settings than the cell's."""
    if not (folder / RUN_FILE).is_file():
        return
    for change in read_file(folder / RUN_FILE).changed:
        if change.field.split(".")[0] not in _NOT_OF_TRAINING:
            raise UserError(
                f"{folder} was continued with another {change.field}, so it is no longer a run of this plan: move it "
                "away, and it is trained anew"
            )


def sources(cell: Cell, names: Collection[str]) -> set[str]:
    """The names among `names` of the cells that a cell begins from or is taught by."""
    start = getattr(cell.spec.start, "source", None)
    teacher = getattr(cell.spec.teacher, "source", None)
    return {*names} & {cell.weights, start, teacher}


def with_folders(cell: Cell, results_by_name: Mapping[str, Result], parent: Path) -> Cell:
    """The cell with folders in place of the names of cells that have results.

    A model that a cell begins from by `Cell.weights` is saved in a folder below `parent`.
    """
    parts: dict[str, Any] = {}
    for name in ("start", "teacher"):
        part = getattr(cell.spec, name)
        source = results_by_name.get(getattr(part, "source", ""))
        if source is not None:
            parts[name] = part.model_copy(update={"source": str(source.trained.folder)})
    if cell.weights:
        folder = _save_model(results_by_name[cell.weights], parent, cell.cut)
        parts["pipeline"] = Pipeline(source=str(folder))
    return replace(cell, spec=cell.spec.model_copy(update=parts))


def _save_model(result: Result, parent: Path, cut: float | None) -> Path:
    """Save the model of a cell for diffusers, with v's head, once; return its folder, below `parent`.

    `cut` is the limit, in rad, of a low-pass that is fitted to the model's time embedder; None: there is none.
    """
    name = result.trained.folder.name  # has a hash of what trained it
    if cut is not None:
        name += f"-{cut:g}"
    folder = parent / name
    if (folder / "config.json").exists():
        return folder
    net = result.trained.net
    if cut is not None:
        run = result.trained.run
        net = _low_pass(run.objective, run.data, _save_model(result, parent, None), cut)
    assert isinstance(net, Dualized)
    net.single_head_model("v").save_pretrained(folder)
    return folder


def _low_pass(objective: Objective, data: Data, folder: Path, limit: float) -> Dualized:
    """The model of a folder, its time embedder cut at `limit` rad and fitted again (`dumo.nets.lowpass`)."""
    spec = Pretrained(texts=Codes(), lowpass=limit).within(Pipeline(source=str(folder)))
    net = spec.build(objective.needs, data.shape, data.classes)
    net.refit()
    return net
