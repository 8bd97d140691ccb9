"""Figures and tables made again, by name."""

import json
from pathlib import Path
from typing import Any

from dumo.config.error import nearest
from dumo.reproduce import fig3, guidance, latents, trajectory, zoo
from dumo.reproduce.plan import SCALES, alike, finish_all, markdown, origin
from dumo.sample import archive
from dumo.types import UserError
from dumo.watch import Watch, unwatched

PLANS = {
    "fig3": fig3.PLAN,
    "fig5": trajectory.PLAN,
    "guidance": guidance.PLAN,
    "latents": latents.PLAN,
    "zoo": zoo.PLAN,
}


def reproduce(
    name: str,
    scale: str,
    folder: Path | None = None,
    *,
    jobs: int = 1,
    device: str = "auto",
    watch: Watch = unwatched,
) -> dict[str, Any]:
    """Run a plan, and write results.json, table.md and its pictures; `jobs` cells at a time.

    Raises UserError for an unknown name or scale.
    """
    if name not in PLANS:
        raise UserError(f"there is no figure or table '{name}'; {nearest(name, sorted(PLANS))}")
    if scale not in SCALES:
        raise UserError(f"there is no scale '{scale}'; {nearest(scale, list(SCALES))}")
    plan, folder = PLANS[name], folder or Path("runs/reproduce") / f"{name}-{scale}"
    done = finish_all(list(plan.cells(scale)), folder / "cells", jobs=jobs, device=device, watch=watch)
    alike(done)

    table = plan.table(done)
    files = [*plan.draw(done, folder), folder / "table.md", folder / "results.json"]
    results = {
        "name": name,
        "scale": scale,
        "title": plan.title,
        "origin": origin(f"dumo reproduce {name} --scale {scale}" + (f" --jobs {jobs}" if jobs > 1 else "")),
        "table": table,
        "cells": [{"cell": one.cell.name, **one.report} for one in done],
        "files": [str(file) for file in files],
    }
    with archive.replacing(folder / "table.md") as out:
        out.write(markdown(plan.title, table).encode())
    with archive.replacing(folder / "results.json") as out:
        out.write((json.dumps(results, indent=2) + "\n").encode())
    return results
