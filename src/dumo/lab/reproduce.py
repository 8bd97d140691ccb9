"""`dumo reproduce`: train and measure all cells of a plan, and write its table, pictures and results.json.

`reproduce` is the entrance. In this order it

1. reads the plan, and its `View`, which says how results are shown (`VIEWS`; the default is `View()`);
2. has the cells of the plan trained and measured (`dumo.lab.cell`), or takes those that are finished;
3. makes the table, charts of the table (`write_charts`, which tests also call on stored tables), and pictures that need
   the trained nets;
4. writes table.md and results.json, which says by which command, when, and on what machine and device it was made.

A new plan needs a line in `VIEWS` only where the default view does not fit.
"""

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dumo.config.error import require_known
from dumo.io import file, picture
from dumo.io.read import write_json
from dumo.lab import arm, cell, ours, paper
from dumo.lab.cell import Result, Row, average_by_arm, markdown
from dumo.lab.plan import SCALES, Plan, read
from dumo.runtime import dist, shell_path
from dumo.runtime.progress import Bar, no_bar


def _average_table(plan: Plan, results: list[Result]) -> list[Row]:
    """A row for each arm and number of passes: means over seeds."""
    return average_by_arm(results)


def _ranking_chart(plan: Plan, table: list[Row]) -> dict[str, Image.Image]:
    """The arms, the best on top, by the name of the chart's file."""
    return {plan.name: arm.ranking(plan.title, table)}


def _draw_samples(plan: Plan, results: list[Result], folder: Path) -> list[Path]:
    """Write a picture of what all arms make; return its path. Nothing for a plan without `samples`."""
    if not plan.samples:
        return []
    path = folder / f"{plan.name}-samples.png"
    picture.write_picture(path, arm.samples(results))
    return [path]


def _no_charts(plan: Plan, table: list[Row]) -> dict[str, Image.Image]:
    """No chart."""
    return {}


@dataclass(frozen=True)
class View:
    """How the results of a plan are made and shown."""

    table: Callable[[Plan, list[Result]], list[Row]] = _average_table
    charts: Callable[[Plan, list[Row]], dict[str, Image.Image]] = _ranking_chart  # of the table, by the file's name
    draw: Callable[[Plan, list[Result], Path], list[Path]] = _draw_samples  # writes pictures that need the nets
    finish: Callable[..., list[Result]] = cell.finish_all  # trains and measures the cells


VIEWS = {  # by the name of the plan
    "best": View(ours.best_table, ours.best_charts),
    "best-latents": View(ours.best_table, ours.best_charts),
    "best-pixels": View(ours.best_table, _no_charts),
    "fair": View(ours.fair_table, ours.fair_charts),
    "fig3": View(paper.fig3_table, _no_charts, paper.fig3_draw),
    "fig4a": View(charts=paper.fig4a_charts),
    "fig4b": View(paper.fig4b_table, paper.fig4b_charts, finish=paper.fig4b_finish),
    "fig4c": View(paper.fig4c_table, paper.fig4c_charts),
    "fig5": View(paper.fig5_table, _no_charts, paper.fig5_draw),
    "flow-first": View(charts=_no_charts),
    "pretrained": View(charts=_no_charts, draw=ours.pretrained_draw),
    "scaling": View(ours.scaling_table, partial(ours.best_charts, passes=(1, 2, 4, 50))),
    "two-times": View(charts=_no_charts),
    "unet": View(charts=_no_charts),
    "words": View(ours.words_table, _no_charts, ours.words_draw),
    "zoo": View(paper.zoo_table),
}


def reproduce(
    name: str, scale: str, folder: Path | None = None, *, jobs: int = 1, device: str = "auto", bar: Bar = no_bar
) -> dict[str, Any]:
    """Run a plan, `jobs` cells at a time; write results.json, table.md and its pictures; return results.json's content.

    `folder` is by default runs/reproduce/NAME-SCALE. Raises UserError for an unknown name, or a scale that the plan
    does not have.
    """
    command = _command(name, scale, folder, jobs, device)
    plan = read(name)
    view = VIEWS.get(name, View())
    require_known("scale", scale, SCALES)
    plan.at(scale)  # raises UserError where the plan has no such scale
    if folder is None:
        folder = Path("runs/reproduce") / f"{name}-{scale}"
    file.check_writable(folder)
    results = view.finish(list(plan.cells(scale)), folder / "cells", jobs=jobs, device=device, bar=bar)

    table = view.table(plan, results)
    charts = write_charts(plan, view, table, folder)
    pictures = [*charts, *view.draw(plan, results, folder)]
    report = {
        "name": name,
        "scale": scale,
        "title": plan.title,
        "origin": _origin(command, device),
        "table": table,
        "cells": [{"cell": result.cell.name, **result.report} for result in results],
        "files": [str(path) for path in (*pictures, folder / "table.md", folder / "results.json")],
    }
    file.write(folder / "table.md", markdown(plan.title, table).encode())
    write_json(folder / "results.json", report)
    return report


def write_charts(plan: Plan, view: View, table: list[Row], folder: Path) -> list[Path]:
    """Write the charts of a table; return their paths."""
    paths: list[Path] = []
    for name, image in view.charts(plan, table).items():
        path = folder / f"{name}.png"
        picture.write_picture(path, image)
        paths.append(path)
    return paths


def _command(name: str, scale: str, folder: Path | None, jobs: int, device: str) -> str:
    """The command that makes these results again. Options are left out where they are the default."""
    command = f"dumo reproduce {name} --scale {scale}"
    if folder is not None:
        command += f" --out {shell_path(folder)}"
    if jobs > 1:
        command += f" --jobs {jobs}"
    if device != "auto":
        command += f" --device {device}"
    return command


def _origin(command: str, device: str) -> dict[str, Any]:
    """How, when and on what results were made; `device` as `--device` names it."""
    return {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "device": dist.device(device).type,
        "versions": dist.versions(),
    }
