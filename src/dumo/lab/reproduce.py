"""`dumo reproduce`: a plan made, and its table, pictures and results.json written.

`reproduce` reads the plan, has its cells trained and measured (`dumo.lab.cell`), and shows the results by the plan's
`View`: a table, charts of the table, and pictures that take the nets. A plan that is not in `VIEWS` has the usual view.
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
from dumo.runtime import dist
from dumo.runtime.progress import Bar, no_bar


def _ranking_chart(plan: Plan, table: list[Row]) -> dict[str, Image.Image]:
    """The arms, the best on top."""
    return {plan.name: arm.ranking(plan.title, table)}


def _sample_pictures(plan: Plan, results: list[Result], folder: Path) -> list[Path]:
    """A picture of what all arms make, for a plan with `samples`."""
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
    """How the results of a plan are shown."""

    table: Callable[[Plan, list[Result]], list[Row]] = lambda plan, results: average_by_arm(results)
    charts: Callable[[Plan, list[Row]], dict[str, Image.Image]] = _ranking_chart
    draw: Callable[[Plan, list[Result], Path], list[Path]] = _sample_pictures  # pictures that take the nets
    finish: Callable[..., list[Result]] = cell.finish_all


VIEWS = {
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
    """Run a plan, `jobs` cells at a time, and write results.json, table.md and its pictures.

    Raises UserError for an unknown name, or a scale that it does not have.
    """
    plan = read(name)
    view = VIEWS.get(name, View())
    require_known("scale", scale, SCALES)
    plan.at(scale)
    folder = folder or Path("runs/reproduce") / f"{name}-{scale}"
    file.check_writable(folder)
    results = view.finish(list(plan.cells(scale)), folder / "cells", jobs=jobs, device=device, bar=bar)

    table = view.table(plan, results)
    pictures = [*write_charts(plan, view, table, folder), *view.draw(plan, results, folder)]
    command = f"dumo reproduce {name} --scale {scale}"
    if jobs > 1:
        command += f" --jobs {jobs}"
    report = {
        "name": name,
        "scale": scale,
        "title": plan.title,
        "origin": origin(command),
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


def origin(command: str) -> dict[str, Any]:
    """Where and when results were made."""
    return {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "versions": dist.versions(),
    }
