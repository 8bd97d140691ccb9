"""The cells of a plan trained and measured, each as a run in a folder named after a hash of what trains it; and tables.

A finished cell is not run again, a stopped one resumes, one with another recipe starts anew. A cell may begin from
another cell of its plan, or be taught by one: then its spec has the other's name in place of a folder.

`finish_all` makes all cells of a plan, in rounds. A round takes the cells whose sources are done, puts folders in place
of names, makes caches and tables of tokens, and finishes each cell (`finish`), side by side with several jobs.

A table has a row per arm and number of passes, with means and deviations over seeds: `average_by_arm` makes it of
results, `from_cells` of stored ones. `main_score` is the score that a table leads with, `markdown` writes the table.
"""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from dumo.data import Data, Latents
from dumo.encoders.pipeline import Pipeline
from dumo.evaluation.metric import headline
from dumo.lab import job
from dumo.lab.plan import Cell
from dumo.nets.dualized import Dualized
from dumo.nets.pretrained import Pretrained
from dumo.nets.rows import Codes
from dumo.report import compare
from dumo.report.evaluate import current_report, evaluate
from dumo.report.sheet import Sheets
from dumo.run import encode
from dumo.run.resolve import resolve
from dumo.run.train import train
from dumo.run.weights import RunFolder, open_run
from dumo.runtime.heartbeat import Lost
from dumo.runtime.progress import Bar, no_bar
from dumo.types import Objective, UserError

Row = dict[str, Any]  # of a table, by column


@dataclass(frozen=True)
class Result:
    """A cell, trained and measured."""

    cell: Cell
    trained: RunFolder
    report: dict[str, Any]


def finish_all(cells: Sequence[Cell], folder: Path, *, jobs: int, device: str, bar: Bar) -> list[Result]:
    """Train and measure all cells, `jobs` at a time, each in a process of its own with its share of the cores.

    A small net is quicker on one core, and two of them on two, than one on two. Raises UserError as `finish` does, and
    for cells of one protocol and fold that were not measured alike.
    """
    done: dict[str, Result] = {}
    names = {cell.name for cell in cells}
    while len(done) < len(names):
        # the cells whose sources are done
        ready: list[Cell] = []
        for cell in cells:
            if cell.name not in done and sources(cell, names) <= done.keys():
                ready.append(with_folders(cell, done, folder.parent))
        assert ready, [name for name in names if name not in done]

        # what several of them read, once
        for data in dict.fromkeys(cell.spec.data for cell in ready):
            if isinstance(data, Latents):
                encode.ensure_cache(data, device=device, bar=bar)
        for cell in ready:
            encode.make_tokens(cell.spec)
        ready = [replace(cell, spec=resolve(cell.spec)) for cell in ready]

        # train and measure; what other processes have finished is only read here
        if jobs > 1:
            _finish_apart(ready, folder, jobs=jobs, device=device, bar=bar)
        for cell in ready:
            done[cell.name] = finish(cell, folder, device=device, bar=bar)

    # cells of one table must be measured alike
    results = [done[cell.name] for cell in cells]
    cards: dict[tuple[str, str | None, int], dict[str, Any]] = {}
    for result in results:
        cards.setdefault(_protocol_of(result), {})[result.cell.name] = result.report["card"]
    for comparable in cards.values():
        compare.require_comparable(comparable)
    return results


def _protocol_of(result: Result) -> tuple[str, str | None, int]:
    """The protocol of a cell, and the split and fold of the data that are its reference."""
    spec = result.cell.spec
    return spec.evaluate.protocol.kind, spec.evaluate.split, getattr(spec.data, "fold", 0)


def _finish_apart(cells: Sequence[Cell], folder: Path, *, jobs: int, device: str, bar: Bar) -> None:
    """Finish cells in processes of their own.

    Where a process is killed, the other cells are finished all the same; then `Lost` is raised, with the names of those
    that were lost.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    lost: list[str] = []
    with bar(f"{len(cells)} cells, {jobs} at a time", len(cells)) as tick:
        work = partial(finish, cells=folder, device=device, bar=no_bar)
        finished = job.run_side_by_side(work, cells, jobs=jobs, threads=threads)
        for num_done, (cell, error) in enumerate(finished, 1):
            if error:
                lost.append(f"{cell.name}: {error}")
            tick(num_done, cell.name)
    if lost:
        raise Lost(
            f"{'; '.join(lost)}; the others are finished. Start the same command again, with fewer --jobs where memory "
            "is short"
        )


def finish(cell: Cell, cells: Path, *, device: str, bar: Bar) -> Result:
    """Train and measure a cell, in its folder below `cells`; what is in that folder is not done again."""
    training = cell.spec.model_dump_json(exclude={"about", "sample", "evaluate"})
    training_hash = blake2b(training.encode(), digest_size=4).hexdigest()
    folder = cells / f"{cell.name}-{training_hash}"
    train(cell.spec, folder, device=device, bar=bar, sheets=Sheets)
    trained = open_run(folder, device=device)
    report = current_report(trained) or evaluate(trained, bar=bar)
    return Result(cell, trained, report)


def sources(cell: Cell, names: Collection[str]) -> set[str]:
    """The names among `names` of the cells that a cell begins from or is taught by."""
    start = getattr(cell.spec.start, "source", None)
    teacher = getattr(cell.spec.teacher, "source", None)
    return {*names} & {cell.weights, start, teacher}


def with_folders(cell: Cell, done: Mapping[str, Result], parent: Path) -> Cell:
    """The cell with folders in place of the names of cells that are `done`.

    A model that a cell begins from by `Cell.weights` is saved in a folder below `parent`. Raises UserError where
    `Cell.weights` is no cell and no folder.
    """
    parts: dict[str, Any] = {}
    for name in ("start", "teacher"):
        part = getattr(cell.spec, name)
        source = done.get(getattr(part, "source", ""))
        if source is not None:
            parts[name] = part.model_copy(update={"source": str(source.trained.folder)})
    if cell.weights:
        source = done.get(cell.weights)
        folder = _save_model(source, parent, cell.cut) if source else _existing_folder(cell.weights)
        parts["pipeline"] = Pipeline(source=str(folder))
    return replace(cell, spec=cell.spec.model_copy(update=parts))


def _existing_folder(folder: str) -> Path:
    """A folder of diffusers that no cell makes. Raises UserError where it is missing."""
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"{folder} is missing, which this plan begins from: its YAML says how to make it")
    return path


def _save_model(result: Result, parent: Path, cut: float | None) -> Path:
    """Save the model of a cell for diffusers, with v's head, once; return its folder, below `parent`.

    `cut` is the limit, in rad, of a low-pass that is fitted to the model's time embedder; None: there is none.
    """
    folder = parent / (result.cell.name if cut is None else f"{result.cell.name}-{cut:g}")
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


def group_by_arm(results: Sequence[Result]) -> list[list[Result]]:
    """The results of each arm, which differ in their seed alone."""
    arms: dict[str, list[Result]] = {}
    for result in results:
        arm, _, _ = result.cell.name.rpartition("-")
        arms.setdefault(arm, []).append(result)
    return list(arms.values())


def average_by_arm(results: Sequence[Result], more: Callable[[Result], Row] = lambda result: {}) -> list[Row]:
    """A row for each arm and number of passes: the arm's columns, and means over its seeds (`_average_rows`).

    `more` makes further columns, of the arm's first seed.
    """
    table: list[Row] = []
    for seeds in group_by_arm(results):
        columns = seeds[0].cell.labels | more(seeds[0])
        rows_of_seeds = [rows_by_passes(result.report) for result in seeds]
        for rows in zip(*rows_of_seeds, strict=True):  # those of one number of passes
            table.append(columns | _average_rows(rows))
    return table


def rows_by_passes(report: Row) -> list[Row]:
    """The rows of a report, one for each number of passes; by Euler's method where the run's solver has none."""
    known = {row["nfe"] for row in report["results"]}
    return [*report["results"], *(row for row in report["contrast"] if row["nfe"] not in known)]


def _average_rows(rows: Sequence[Row]) -> Row:
    """The means over the rows of several seeds, which have one number of passes and one solver.

    The main score comes first, then `fd` where that is another, both with their standard deviations; `error` is the
    standard error of the main score's mean. Other scores follow, None where a seed has none, and the number of seeds.
    """
    names = [key for key in rows[0] if key not in ("nfe", "solver") and not key.endswith("_sd")]
    main = leading_score(names)
    with_deviation = [name for name in dict.fromkeys((main, "fd")) if name in names]
    averages: Row = {"nfe": rows[0]["nfe"], "solver": rows[0]["solver"]}
    for name in with_deviation:
        values = [row[name] for row in rows]
        averages[name] = fmean(values)
        averages[f"{name}_sd"] = stdev(values) if len(values) > 1 else None
    if all(f"{main}_sd" in row for row in rows):
        averages["error"] = error_of_mean([(row[main], row[f"{main}_sd"]) for row in rows])
    for name in names:
        if name not in with_deviation:
            values = [row[name] for row in rows]
            averages[name] = None if None in values else fmean(values)
    averages["seeds"] = len(rows)
    return averages


def error_of_mean(points: Sequence[tuple[float, float]]) -> float:
    """The standard error of the mean of `points`, each a value and its own standard error.

    It is taken from the scatter of the values or from their errors, whichever gives more: few seeds tell little of
    their scatter.
    """
    scatter = stdev(value for value, _ in points) if len(points) > 1 else 0.0
    return max(fmean(error**2 for _, error in points) ** 0.5, scatter) / len(points) ** 0.5


def from_cells(stored: Row) -> list[Row]:
    """The table of results.json, its averages made again of the stored cells: older tables lack some deviations.

    Two columns are added: `by_seed`, the row of each cell by its seed, and `protocol`, what judged them.
    """
    cells_by_arm: dict[str, dict[str, Row]] = {}
    for cell in stored["cells"]:
        arm, _, seed = cell["cell"].rpartition("-")
        cells_by_arm.setdefault(arm, {})[seed] = cell
    rows: list[Row] = []
    for cells in cells_by_arm.values():
        protocol = next(iter(cells.values()))["protocol"]
        rows_of_seeds = [rows_by_passes(cell) for cell in cells.values()]
        for rows_of_passes in zip(*rows_of_seeds, strict=True):
            by_seed = dict(zip(cells, rows_of_passes, strict=True))
            rows.append({**_average_rows(rows_of_passes), "by_seed": by_seed, "protocol": protocol})
    return [stored_row | row for stored_row, row in zip(stored["table"], rows, strict=True)]


def main_score(row: Row) -> str:
    """The main score of an averaged row, also of one from before `mmd` was measured."""
    return leading_score([key for key in row if f"{key}_sd" in row or key == "fd_grey"])


def leading_score(scores: Sequence[str]) -> str:
    """The main score: `mmd`, or `fd_grey` of digits from before it was measured, or the protocol's own."""
    for name in ("mmd", "fd_grey"):
        if name in scores:
            return name
    return headline(scores)


def markdown(title: str, table: Sequence[Row]) -> str:
    """The table as Markdown."""
    head = list(table[0])
    lines = [head, ["---"] * len(head)]
    for row in table:
        lines.append([_cell_text(value) for value in row.values()])
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"# {title}\n\n{body}\n"


def _cell_text(value: object) -> str:
    """A value as a table shows it: a float by four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
