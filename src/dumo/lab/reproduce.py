"""`dumo reproduce`: train and evaluate all cells of a plan, and write its table, pictures and results.json.

`reproduce` is the entry point. A `View` holds the functions that compute and show the results of a plan. The paper's
figures and tables have views of their own, with columns and pictures from `dumo.lab.paper` and `dumo.lab.fig4b`.
"""

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import fsum
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from dumo.config.code import names_code
from dumo.io import file, picture
from dumo.io.read import write_json
from dumo.lab import arm_picture, cell, fig4b, paper
from dumo.lab.cell import Result, Row
from dumo.lab.experiment import Cell, Plan, is_file_name, read_plan, require_fair, require_runnable
from dumo.lab.result_table import markdown, ranked_table, with_failed_seeds
from dumo.run.speed import seconds_between
from dumo.runtime import shell_path
from dumo.runtime.device import choose_device, software_versions
from dumo.runtime.formatting import SECONDS_PER_HOUR
from dumo.runtime.progress import Bar, no_bar
from dumo.types import UserError


class RunCells(Protocol):
    """A function that trains and evaluates cells in a folder, `jobs` at a time."""

    def __call__(
        self, cells: Sequence[Cell], folder: Path, *, jobs: int, device: str, bar: Bar
    ) -> tuple[list[Result], dict[str, str]]:
        """Return the results in the order of the cells, and error messages by name of failed cell."""
        ...


def _ranked_table(plan: Plan, results: list[Result]) -> list[Row]:
    """Return the default table, which ranks the arms at each NFE."""
    return ranked_table(results)


def _ranking_chart(plan: Plan, table: list[Row]) -> dict[str, Image.Image]:
    """Return the default chart, which has the plan's name."""
    return {plan.name: arm_picture.ranking_chart(plan, table)}


def _no_charts(plan: Plan, table: list[Row]) -> dict[str, Image.Image]:
    """Return no charts."""
    return {}


def _draw_samples(plan: Plan, results: list[Result], folder: Path) -> list[Path]:
    """Write a picture of samples of all arms if the plan sets `samples` and they are images; return its path."""
    if not plan.samples or not all(result.trained.makes_images for result in results):
        return []
    path = folder / f"{plan.name}-samples.png"
    picture.write_picture(path, arm_picture.sample_sheets(results))
    return [path]


@dataclass(frozen=True)
class View:
    """The functions that compute and show the results of a plan, in the order in which they are called."""

    run_cells: RunCells = cell.finish_all
    make_table: Callable[[Plan, list[Result]], list[Row]] = _ranked_table
    # Returns charts of the table by file name.
    make_charts: Callable[[Plan, list[Row]], dict[str, Image.Image]] = _ranking_chart
    # Writes pictures that need the trained networks to the folder and returns their paths.
    draw_pictures: Callable[[Plan, list[Result], Path], list[Path]] = _draw_samples


# The views of the paper's figures and tables, by the name of the plan.
VIEWS = {
    "fig3": View(make_table=paper.fig3_table, make_charts=_no_charts, draw_pictures=paper.fig3_draw),
    "fig4a": View(make_charts=paper.fig4a_charts),
    "fig4b": View(run_cells=fig4b.time_cells, make_table=fig4b.table, make_charts=fig4b.charts),
    "fig4c": View(make_table=paper.fig4c_table, make_charts=paper.fig4c_charts),
    "fig5": View(make_table=paper.fig5_table, make_charts=_no_charts, draw_pictures=paper.fig5_draw),
    "zoo": View(make_table=paper.zoo_table),
}


def reproduce(
    name: str, scale: str, folder: Path | None, *, jobs: int = 1, device: str = "auto", bar: Bar = no_bar
) -> dict[str, Any]:
    """Run a plan, `jobs` cells at a time; write results.json, table.md and pictures; return results.json's content.

    name: a bundled plan, or a YAML file.
    folder: None means runs/reproduce/NAME-SCALE.
    device: the value of `--device`.

    Raises UserError if the name or scale is unknown, if the arms of a file have unequal cost, or if all cells failed.
    """
    # Read the plan.
    plan = read_plan(name)
    plan.require_scale(scale)
    cells = list(plan.cells(scale))
    require_runnable(cells)
    view = VIEWS.get(plan.name, View())
    if is_file_name(name):
        require_fair(cells, plan.get_scale(scale).cost)
        view = View()

    # Train and evaluate the cells.
    out = folder or Path("runs/reproduce") / f"{plan.name}-{scale}"
    results, failures = view.run_cells(cells, out / "cells", jobs=jobs, device=device, bar=bar)
    messages = [f"{cell_name}: {message}" for cell_name, message in failures.items()]
    if not results:
        raise UserError("\n".join(["every cell failed", *messages]))

    # Write the numbers before the pictures, so that they are not lost if a picture fails.
    table = view.make_table(plan, results)
    if failures:
        table = with_failed_seeds(table, plan.columns, cells, failures)
    report: dict[str, Any] = {
        "name": name,
        "scale": scale,
        "title": plan.title,
        "origin": _origin(_command(name, scale, folder, jobs, device, cells), device, results),
        "table": table,
        "failed": failures,
        "cells": [{"cell": result.cell.name, "commit": result.commit, **result.report} for result in results],
    }
    table_file = out / "table.md"
    results_file = out / "results.json"
    file.write(table_file, "\n".join([markdown(plan.title, table), *messages]).encode())
    write_json(results_file, report | {"files": [str(table_file), str(results_file)]})

    # Draw the pictures and list them in results.json.
    charts = write_charts(plan, view, table, out)
    pictures = view.draw_pictures(plan, results, out)
    report["files"] = [str(path) for path in (*charts, *pictures, table_file, results_file)]
    write_json(results_file, report)
    return report


def write_charts(plan: Plan, view: View, table: list[Row], folder: Path) -> list[Path]:
    """Write a view's charts of a plan's table to a folder; return their paths."""
    paths: list[Path] = []
    for name, image in view.make_charts(plan, table).items():
        path = folder / f"{name}.png"
        picture.write_picture(path, image)
        paths.append(path)
    return paths


def _command(name: str, scale: str, folder: Path | None, jobs: int, device: str, cells: Sequence[Cell]) -> str:
    """Return the command that reproduces the results, without default options except --scale."""
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
    """Return command, date (UTC), hardware and versions of the results.

    `commit` lists all commits that trained cells. `training_hours` is the sum over all cells, without evaluation and
    steps whose time was not recorded.
    """
    commits = [result.commit for result in results if result.commit]
    seconds = [seconds_between(result.folder, 0, result.report.get("step", 0)) or 0.0 for result in results]
    return {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "device": choose_device(device).type,
        "versions": software_versions(),
        "commit": ", ".join(dict.fromkeys(commits)) or cell.commit(),
        "training_hours": round(fsum(seconds) / SECONDS_PER_HOUR, 2),
    }
