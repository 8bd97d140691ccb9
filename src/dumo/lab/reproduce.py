"""`dumo reproduce`: train and measure all cells of a plan, and write its table, pictures and results.json.

`reproduce` is the entrance. In this order it

1. reads the plan, by its name or from a user's file (`dumo.lab.ownplan`), and its `View`: the functions that make and
   show its results (`VIEWS`; the default is `View()`, of a user's file `_OWN_VIEW`);
2. runs the cells of the plan: trains and measures them (`dumo.lab.cell`), or takes the results of finished ones. Where
   some diverge, it goes on with the others, unless the view needs all;
3. makes the table, and writes table.md and results.json, with their origin: the command, the date, the machine, the
   commit, and the fingerprints of objectives (`dumo.lab.origin`);
4. writes charts of the table alone (`write_charts`, which tests also call on stored tables), then pictures that need
   the trained nets, and names them in results.json.

A new plan needs a line in `VIEWS` only where the default view does not fit. The functions of special views are in
`dumo.lab.paper` and `dumo.lab.fig4b`, for the paper's figures and tables, and `dumo.lab.ours`, for plans of our own.
`dumo.lab.arm_picture` draws the default pictures, in which each line or block is an arm of the plan.
"""

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from math import fsum
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from dumo.config.code import names_code
from dumo.io import file, picture
from dumo.io.read import write_json
from dumo.lab import arm_picture, cell, fig4b, origin, ours, ownplan, paper
from dumo.lab.cell import Result, Row
from dumo.lab.plan import Cell, Plan, read_plan
from dumo.lab.table import average_by_arm, markdown, with_diverged_seeds
from dumo.run.speed import seconds_between
from dumo.runtime import shell_path
from dumo.runtime.device import choose_device, software_versions
from dumo.runtime.progress import Bar, no_bar
from dumo.runtime.text import SECONDS_PER_HOUR


class RunCells(Protocol):
    """A function that trains and measures cells, `jobs` at a time, and keeps what it makes in a folder."""

    def __call__(self, cells: Sequence[Cell], folder: Path, *, jobs: int, device: str, bar: Bar) -> list[Result]:
        """Return a result for each cell, in their order."""
        ...


def _average_table(plan: Plan, results: list[Result]) -> list[Row]:
    """A row for each arm and number of passes: means over seeds."""
    return average_by_arm(results)


def _ranking_chart(plan: Plan, table: list[Row]) -> dict[str, Image.Image]:
    """One chart, in which the best arm is on top, by its name: the plan's."""
    return {plan.name: arm_picture.ranking_chart(plan.title, table)}


def _no_charts(plan: Plan, table: list[Row]) -> dict[str, Image.Image]:
    """No chart."""
    return {}


def _draw_samples(plan: Plan, results: list[Result], folder: Path) -> list[Path]:
    """Write a picture of samples of all arms, and return its path; of points, or without `Plan.samples`, none."""
    makes_images = all(result.trained.sampler.is_image for result in results)
    if not plan.samples or not makes_images:
        return []
    path = folder / f"{plan.name}-samples.png"
    picture.write_picture(path, arm_picture.sample_sheets(results))
    return [path]


@dataclass(frozen=True)
class View:
    """The functions that make and show the results of a plan, in the order in which they are called."""

    run_cells: RunCells = cell.finish_all
    make_table: Callable[[Plan, list[Result]], list[Row]] = _average_table
    make_charts: Callable[[Plan, list[Row]], dict[str, Image.Image]] = _ranking_chart  # of the table, by file name
    # Writes pictures that need the trained nets into the folder; returns their paths.
    draw_pictures: Callable[[Plan, list[Result], Path], list[Path]] = _draw_samples
    # Whether rows or pictures compare with certain cells, so that nothing can be made where one has diverged.
    needs_all_cells: bool = False


VIEWS = {  # by the name of the plan
    "best": View(make_charts=ours.best_charts, needs_all_cells=True),
    "fair": View(make_table=ours.fair_table, make_charts=ours.fair_charts),
    "fig3": View(make_table=paper.fig3_table, make_charts=_no_charts, draw_pictures=paper.fig3_draw),
    "fig4a": View(make_charts=paper.fig4a_charts),
    "fig4b": View(run_cells=fig4b.time_cells, make_table=fig4b.table, make_charts=fig4b.charts),
    "fig4c": View(make_table=paper.fig4c_table, make_charts=paper.fig4c_charts),
    "fig5": View(make_table=paper.fig5_table, make_charts=_no_charts, draw_pictures=paper.fig5_draw),
    "flow-first": View(make_charts=_no_charts),
    "pretrained": View(make_charts=_no_charts, draw_pictures=ours.pretrained_draw, needs_all_cells=True),
    "scaling": View(
        make_table=ours.scaling_table,
        make_charts=partial(ours.best_charts, passes=(1, 2, 4, 50)),
        needs_all_cells=True,
    ),
    "words": View(make_table=ours.words_table, make_charts=_no_charts, draw_pictures=ours.words_draw),
    "zoo": View(make_table=paper.zoo_table, needs_all_cells=True),
}
_OWN_VIEW = View(make_table=ownplan.paired_table)  # of a user's file


def reproduce(
    name: str, scale: str, folder: Path | None, *, jobs: int = 1, device: str = "auto", bar: Bar = no_bar
) -> dict[str, Any]:
    """Run a plan, `jobs` cells at a time; write results.json, table.md and its pictures; return results.json's content.

    `name` is that of a plan, or a user's file. `folder` None is runs/reproduce/NAME-SCALE. `device` is as
    `--device` names it. Raises UserError for an unknown name, a scale that the plan does not have, and for a user's
    file whatever `ownplan.read_file` and `ownplan.require_fair` raise; CellsDiverged where no table can be made of what
    is left.
    """
    typed_folder = folder
    is_own = ownplan.is_file_name(name)
    plan = ownplan.read_file(name) if is_own else read_plan(name)
    view = _OWN_VIEW if is_own else VIEWS.get(name, View())
    plan.require_scale(scale)
    if folder is None:
        folder = Path("runs/reproduce") / f"{plan.name}-{scale}"
    file.check_writable(folder)
    cells = list(plan.cells(scale))
    if is_own:
        ownplan.require_fair(cells, plan.get_scale(scale).cost)
    diverged: dict[str, str] = {}  # what happened, by the name of the cell
    try:
        results = view.run_cells(cells, folder / "cells", jobs=jobs, device=device, bar=bar)
    except cell.CellsDiverged as error:
        if view.needs_all_cells or not error.results:
            raise
        results = error.results
        diverged = error.messages

    table = view.make_table(plan, results)
    if diverged:
        table = with_diverged_seeds(table, plan.columns, cells, diverged)
    command = _command(name, scale, typed_folder, jobs, device, cells)
    table_file = folder / "table.md"
    results_file = folder / "results.json"
    report = {
        "name": name,
        "scale": scale,
        "title": plan.title,
        "origin": _origin(command, device, results),
        "table": table,
        "diverged": diverged,
        "cells": [_cell_record(result) for result in results],
        "files": [str(table_file), str(results_file)],
    }
    # the numbers before the pictures: what took hours must not be lost where a picture fails
    messages = [f"\n{cell_name}: {message}\n" for cell_name, message in diverged.items()]
    file.write(table_file, (markdown(plan.title, table) + "".join(messages)).encode())
    write_json(results_file, report)

    charts = write_charts(plan, view, table, folder)
    pictures = view.draw_pictures(plan, results, folder)
    report["files"] = [str(path) for path in (*charts, *pictures, table_file, results_file)]
    write_json(results_file, report)
    return report


def _cell_record(result: Result) -> Row:
    """What results.json holds of a cell: its report, and the fingerprint of the objective that trained it."""
    record: Row = {"cell": result.cell.name}
    if result.origin:
        record["fingerprint"] = result.origin.fingerprint
    return record | result.report


def write_charts(plan: Plan, view: View, table: list[Row], folder: Path) -> list[Path]:
    """Write the charts that a view makes of a plan's table into a folder; return their paths."""
    paths: list[Path] = []
    for name, image in view.make_charts(plan, table).items():
        path = folder / f"{name}.png"
        picture.write_picture(path, image)
        paths.append(path)
    return paths


def _command(name: str, scale: str, folder: Path | None, jobs: int, device: str, cells: Sequence[Cell]) -> str:
    """The command that makes the results again. Options but --scale are left out where they are the default."""
    command = f"dumo reproduce {shell_path(name)} --scale {scale}"
    if folder is not None:
        command += f" --out {shell_path(folder)}"
    if jobs > 1:
        command += f" --jobs {jobs}"
    if device != "auto":
        command += f" --device {device}"
    if any(names_code(planned_cell.spec) for planned_cell in cells):
        command += " --trust-code"
    return command


def _origin(command: str, device: str, results: Sequence[Result]) -> dict[str, Any]:
    """How results were made, on what, and on which day (UTC) their table was; `device` as `--device` names it.

    `commit` has all commits by which cells were trained. `training_hours` are those of all cells, one after another,
    without judging them; steps without a recorded time count as zero.
    """
    commits = [result.origin.commit for result in results if result.origin and result.origin.commit]
    seconds = [seconds_between(result.trained.folder, 0, result.trained.step) or 0.0 for result in results]
    return {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "device": choose_device(device).type,
        "versions": software_versions(),
        "commit": ", ".join(dict.fromkeys(commits)) or origin.commit(),
        "training_hours": round(fsum(seconds) / SECONDS_PER_HOUR, 2),
    }
