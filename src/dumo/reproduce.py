"""Figures and tables made again, by name. Each is a plan: cells to train and judge, and how to set them out.

A cell is a run in a folder named after a hash of what trains it: one that is finished is not run again, one that was
stopped goes on, one whose recipe has changed starts anew.
"""

import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from dumo import dist, run
from dumo.config.error import nearest
from dumo.config.load import load
from dumo.config.spec import Run
from dumo.metrics.protocol import Reference
from dumo.run import Trained, Watch, unwatched
from dumo.sample import archive, generate, picture
from dumo.sample.solver import Heun
from dumo.train import cost
from dumo.types import UserError

SCALES = ("smoke", "laptop")


@dataclass(frozen=True)
class Cell:
    """One run of a plan: what it is called, its spec, and what it stands for in the table."""

    name: str
    spec: Run
    labels: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Finished:
    """A cell, trained and judged."""

    cell: Cell
    trained: Trained
    report: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What a figure or table needs, and how it is set out."""

    title: str
    cells: Callable[[str], Iterator[Cell]]  # by scale
    table: Callable[[list[Finished]], list[dict[str, Any]]]
    draw: Callable[[list[Finished], Path], list[Path]] = lambda done, folder: []  # most plans have pictures


def reproduce(
    name: str, scale: str, folder: Path | None = None, *, device: str = "auto", watch: Watch = unwatched
) -> dict[str, Any]:
    """Run a plan, and write results.json, table.md and its pictures. Raises UserError for an unknown name or scale."""
    if name not in PLANS:
        raise UserError(f"there is no figure or table '{name}'; {nearest(name, sorted(PLANS))}")
    if scale not in SCALES:
        raise UserError(f"there is no scale '{scale}'; {nearest(scale, list(SCALES))}")
    plan, folder = PLANS[name], folder or Path("runs/reproduce") / f"{name}-{scale}"
    done = [finish(cell, folder / "cells", device=device, watch=watch) for cell in plan.cells(scale)]

    table = plan.table(done)
    files = [*plan.draw(done, folder), folder / "table.md", folder / "results.json"]
    results = {
        "name": name,
        "scale": scale,
        "title": plan.title,
        "origin": origin(f"dumo reproduce {name} --scale {scale}"),
        "table": table,
        "cells": [{"cell": one.cell.name, **one.report} for one in done],
        "files": [str(file) for file in files],
    }
    with archive.replacing(folder / "table.md") as out:
        out.write(markdown(plan.title, table).encode())
    with archive.replacing(folder / "results.json") as out:
        out.write((json.dumps(results, indent=2) + "\n").encode())
    return results


def finish(cell: Cell, cells: Path, *, device: str, watch: Watch) -> Finished:
    """Train and judge a cell, or take what is there of it."""
    trained_by = cell.spec.model_dump_json(exclude={"about", "sample", "evaluate"})
    folder = cells / f"{cell.name}-{blake2b(trained_by.encode(), digest_size=4).hexdigest()}"
    run.train(cell.spec, folder, device=device, watch=watch)
    trained = run.open_run(str(folder), device=device)
    judged, asked = folder / "evaluation.json", cell.spec.evaluate
    if judged.exists():
        report = json.loads(judged.read_text(encoding="utf-8"))
        wanted = (trained.step, trained.weights, asked.protocol.name, asked.seed, cell.spec.sample.solver.model_dump())
        made = tuple(report[key] for key in ("step", "weights", "protocol", "seed", "solver"))
        if made == wanted and [row["nfe"] for row in report["results"]] == list(asked.nfe):
            return Finished(cell, trained, report)
    return Finished(cell, trained, run.evaluate(trained, watch=watch))


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


def markdown(title: str, table: Sequence[dict[str, Any]]) -> str:
    """The table as Markdown."""
    head = list(table[0])
    rows = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in table]
    lines = [head, ["---"] * len(head), *rows]
    return f"# {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


# Figure 3: what the velocity ratio does to MeanFlow, with DuMo beside it, on moons, in one pass.

RATIOS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def fig3_cells(scale: str) -> Iterator[Cell]:
    """MeanFlow at six velocity ratios, and DuMo, which needs none; equal data, net and steps."""
    sets = {
        "smoke": ["train.steps=40", "train.batch=128", "net.width=64", "evaluate.protocol.samples=500"],
        "laptop": ["train.steps=2000", "train.batch=512"],
    }[scale]
    for ratio in RATIOS:
        spec = load("moons-meanflow", [*sets, f"objective.times.velocity_ratio={ratio}", "evaluate.nfe=[1]"])
        yield Cell(f"meanflow-{ratio}", spec, {"objective": "MeanFlow", "velocity_ratio": ratio})
    spec = load("moons", [*sets, "evaluate.nfe=[1]"])
    yield Cell("dumo", spec, {"objective": "DuMo", "velocity_ratio": None})


def fig3_table(done: list[Finished]) -> list[dict[str, Any]]:
    """A row per cell: MMD^2 of one-step samples, with the sd of its null."""
    return [
        {
            **one.cell.labels,
            "steps": one.report["step"],
            "mmd2": one.report["results"][0]["mmd2"],
            "null_sd": one.report["baselines"]["null"]["sd"],
        }
        for one in done
    ]


def fig3_draw(done: list[Finished], folder: Path) -> list[Path]:
    """One row of panels in the paper's layout: grey truth, red one-step samples."""
    panels: dict[str, torch.Tensor] = {}
    for one in done:
        ratio, mmd2 = one.cell.labels["velocity_ratio"], one.report["results"][0]["mmd2"]
        title = "DuMo" if ratio is None else f"MeanFlow, ratio {ratio}"
        c = generate.labels(2000, 0)
        panels[f"{title}\nMMD² = {mmd2:.2g}"] = run.sample(one.trained, nfe=1, c=c).x
    truth, _ = done[0].trained.run.data.open().reference(4000, 0)
    path = folder / "fig3.png"
    archive.write_picture(path, picture.scatter(truth, panels))
    return [path]


# The zoo: every objective on digits, at equal counted cost.

ZOO = {"DuMo": "digits", "MeanFlow": "digits-meanflow", "Flow matching": "digits-flow-matching"}


def zoo_cells(scale: str) -> Iterator[Cell]:
    """Every objective on one net and one time budget: as many steps as cost what DuMo's recipe costs."""
    seeds = {"smoke": (0,), "laptop": (0, 1, 2)}[scale]
    small = ["train.batch=32", "net.width=32", "net.depth=1", "evaluate.protocol.samples=500"]
    sets = small if scale == "smoke" else []
    first = load("digits", sets)
    budget = units(first) * (20 if scale == "smoke" else first.train.steps)
    for title, recipe in ZOO.items():
        each = units(load(recipe, sets))
        for seed in seeds:
            steps = round(budget / each)
            asked = [*sets, f"train.steps={steps}", f"train.seed={seed}", "evaluate.nfe=[1,2,4,50]"]
            labels = {"objective": title, "cost": {"steps": steps, "F_per_step": round(each, 2)}}
            yield Cell(f"{recipe}-{seed}", load(recipe, asked), labels)


def units(spec: Run) -> float:
    """Counted forward units of a step."""
    return cost.forward_units(spec.outline(), spec.objective, spec.path, spec.data.shape)


def zoo_table(done: list[Finished]) -> list[dict[str, Any]]:
    """A row per objective, reading and number of passes: means over seeds, and the sd of the Fréchet distance."""
    rows: list[dict[str, Any]] = []
    for title in ZOO:
        mine = [one for one in done if one.cell.labels["objective"] == title]
        for part in ("results", "contrast"):
            by_passes = zip(*(one.report[part] for one in mine), strict=True)
            rows += [{"objective": title, **over_seeds(same), **mine[0].cell.labels["cost"]} for same in by_passes]
    return rows


def over_seeds(same: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of equal rows of several seeds."""
    fds = [row["fd"] for row in same]
    means = {key: fmean(row[key] for row in same) for key in ("fd_grey", "kid", "precision", "recall", "accuracy")}
    return {
        "nfe": same[0]["nfe"],
        "solver": same[0]["solver"],
        "fd": fmean(fds),
        "fd_sd": deviation(fds),
        **means,
        "seeds": len(fds),
    }


def deviation(values: Sequence[float]) -> float | None:
    """The standard deviation over seeds; None of one."""
    return stdev(values) if len(values) > 1 else None


def zoo_draw(done: list[Finished], folder: Path) -> list[Path]:
    """One sheet of one-step samples per objective, first seed."""
    files: list[Path] = []
    for title, recipe in ZOO.items():
        one = next(one for one in done if one.cell.labels["objective"] == title)
        made = run.sample(one.trained, nfe=1, c=generate.labels(80, one.trained.run.data.classes))
        files.append(folder / f"{recipe}-nfe1.png")
        archive.write_picture(files[-1], picture.sheet(picture.to_uint8(made.x), one.trained.run.data.classes))
    return files


# Random guidance (ours): the passes of guidance on every row, against a fraction of the rows, at equal counted cost.

GUIDED = ("digits-guided", "moons-guided")
FRACTIONS = (1.0, 0.25)
LONG = 3  # budgets that the yardstick is trained for


def guidance_cells(scale: str) -> Iterator[Cell]:
    """Per recipe a yardstick, trained longer and fully guided, and every fraction with several seeds."""
    seeds = {"smoke": (0,), "laptop": (0, 1, 2)}[scale]
    for recipe in GUIDED:
        sets = ["evaluate.nfe=[1,2,4]"]
        if recipe == "moons-guided":
            sets += ["train.steps=2000", "train.batch=512"]
        if scale == "smoke":
            sets += ["train.steps=40", "train.batch=64", "net.width=32", "evaluate.protocol.samples=500"]
        full = load(recipe, sets)
        long = [*sets, f"train.steps={LONG * full.train.steps}", "train.seed=100"]
        yield Cell(f"{recipe}-yardstick", load(recipe, long), {"recipe": recipe, "fraction": None})
        for fraction in FRACTIONS:
            some = [*sets, f"objective.guide.fraction={fraction}"]
            each = units(load(recipe, some))
            steps = round(full.train.steps * units(full) / each)
            labels = {"recipe": recipe, "fraction": fraction, "steps": steps, "F_per_step": round(each, 2)}
            for seed in seeds:
                spec = load(recipe, [*some, f"train.steps={steps}", f"train.seed={seed}"])
                yield Cell(f"{recipe}-{fraction:g}-{seed}", spec, labels)


def guidance_table(done: list[Finished]) -> list[dict[str, Any]]:
    """A row per recipe, fraction and number of passes: distances to the guided yardstick, mean and sd over seeds.

    Not to the data: guidance leads away from them, and a net that is guided too little would look better.
    """
    rows: list[dict[str, Any]] = []
    for recipe in GUIDED:
        mine = [one for one in done if one.cell.labels["recipe"] == recipe]
        yardstick, *others = mine
        protocol = yardstick.cell.spec.evaluate.protocol
        c = protocol.labels(yardstick.cell.spec.data.classes)
        truth = Reference(run.sample(yardstick.trained, nfe=50, c=c, seed=1, solver=Heun()).x, c)
        for fraction in FRACTIONS:
            same = [one for one in others if one.cell.labels["fraction"] == fraction]
            for nfe in same[0].cell.spec.evaluate.nfe:
                scores = [protocol.score(run.sample(one.trained, nfe=nfe, c=c).x, c, truth) for one in same]
                rows.append({**same[0].cell.labels, "nfe": nfe, **spread(scores), "seeds": len(scores)})
    return rows


def spread(scores: Sequence[dict[str, float]]) -> dict[str, Any]:
    """The first distance of these scores, fd or mmd2, over seeds: its name, mean and sd."""
    name = next(iter(scores[0]))
    values = [score[name] for score in scores]
    return {"distance": name, "mean": fmean(values), "sd": deviation(values)}


PLANS = {
    "guidance": Plan(
        "Random guidance at equal counted cost, distance to a fully guided net trained longer (ours)",
        guidance_cells,
        guidance_table,
    ),
    "fig3": Plan("Velocity ratio on moons, one pass (Fig. 3)", fig3_cells, fig3_table, fig3_draw),
    "zoo": Plan("Every objective on digits at equal counted cost", zoo_cells, zoo_table, zoo_draw),
}
