"""Figures and tables made again, by name."""

from pathlib import Path
from typing import Any

from dumo import recipes
from dumo.config.error import nearest
from dumo.io import archive, file
from dumo.io.json import write_json
from dumo.progress import Bar, no_bar
from dumo.reproduce.arm import respread
from dumo.reproduce.ours import best, fair, guidance, ideas, latents, lowpass, pretrained, pulls, stages, words
from dumo.reproduce.paper import fig3, fig4a, fig4b, fig4c, fig5, sec43, tab2, zoo
from dumo.reproduce.plan import SCALES, Plan, markdown, origin
from dumo.types import UserError

PLANS = {
    "best": best.DIGITS,
    "best-latents": best.LATENTS,
    "best-options": best.ALONE,
    "best-pixels": best.PIXELS,
    "best-tuning": best.TUNED,
    "fair": fair.PLAN,
    "fig3": fig3.PLAN,
    "fig4a": fig4a.PLAN,
    "fig4b": fig4b.PLAN,
    "fig4c": fig4c.PLAN,
    "fig5": fig5.PLAN,
    "guidance": guidance.PLAN,
    "latents": latents.PLAN,
    "ours": ideas.DIGITS,
    "ours-latents": ideas.LATENTS,
    "lowpass": lowpass.PLAN,
    "pretrained": pretrained.PLAN,
    "pulls": pulls.DIGITS,
    "pulls-latents": pulls.LATENTS,
    "sec43": sec43.PLAN,
    "stages": stages.PLAN,
    "tab2": tab2.PLAN,
    "words": words.PLAN,
    "zoo": zoo.PLAN,
}


def reproduce(
    name: str,
    scale: str,
    folder: Path | None = None,
    *,
    jobs: int = 1,
    device: str = "auto",
    bar: Bar = no_bar,
) -> dict[str, Any]:
    """Run a plan, and write results.json, table.md and its pictures; `jobs` cells at a time.

    Raises UserError for an unknown name, or a scale that it has not.
    """
    if name not in PLANS:
        raise UserError(f"there is no figure or table '{name}'; {nearest(name, sorted(PLANS))}")
    if scale not in SCALES:
        raise UserError(f"there is no scale '{scale}'; {nearest(scale, list(SCALES))}")
    plan, folder = PLANS[name], folder or Path("runs/reproduce") / f"{name}-{scale}"
    plan.check(name, scale)
    file.check_writable(folder)
    done = plan.finish(list(plan.cells(scale)), folder / "cells", jobs=jobs, device=device, bar=bar)

    table = plan.table(done)
    files = [*_charts(plan, table, folder), *plan.draw(done, folder), folder / "table.md", folder / "results.json"]
    results = {
        "name": name,
        "scale": scale,
        "title": plan.title,
        "origin": origin(f"dumo reproduce {name} --scale {scale}" + (f" --jobs {jobs}" if jobs > 1 else "")),
        "table": table,
        "cells": [{"cell": one.cell.name, **one.report} for one in done],
        "files": [str(file) for file in files],
    }
    file.write(folder / "table.md", markdown(plan.title, table).encode())
    write_json(folder / "results.json", results)
    return results


def redraw(name: str, folder: Path) -> list[Path]:
    """The charts of the results that come with dumo, without training anything. Raises UserError where none do."""
    found = recipes.results(name)
    if not found or name not in PLANS:
        raise UserError(f"no results of '{name}' come with dumo: dumo reproduce {name} makes them")
    return _charts(PLANS[name], respread(found), folder)


def _charts(plan: Plan, table: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write the charts of a table; return their paths."""
    drawn = {folder / f"{name}.png": image for name, image in plan.charts(table).items()}
    for path, image in drawn.items():
        archive.write_picture(path, image)
    return [*drawn]
