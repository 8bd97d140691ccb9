"""The zoo: every objective on digits, at equal counted cost."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from dumo import run
from dumo.config.load import load
from dumo.reproduce.plan import Cell, Finished, Plan, deviation, units
from dumo.sample import archive, generate, picture

ZOO = {"DuMo": "digits", "MeanFlow": "digits-meanflow", "Flow matching": "digits-flow-matching"}


def cells(scale: str) -> Iterator[Cell]:
    """Every objective on one net, each with as many steps as cost what DuMo's recipe costs."""
    small = ["train.batch=32", "net.width=32", "net.depth=1", "evaluate.protocol.samples=500"]
    return siblings(ZOO, small if scale == "smoke" else [], scale, passes=(1, 2, 4, 50))


def siblings(recipes: Mapping[str, str], sets: Sequence[str], scale: str, *, passes: Sequence[int]) -> Iterator[Cell]:
    """Recipes by title, the first of which gives the budget: as many steps as cost the same, with every seed."""
    seeds = {"smoke": (0,), "laptop": (0, 1, 2)}[scale]
    first = load(next(iter(recipes.values())), sets)
    budget = units(first) * (20 if scale == "smoke" else first.train.steps)
    for title, recipe in recipes.items():
        each = units(load(recipe, sets))
        for seed in seeds:
            steps = round(budget / each)
            asked = [*sets, f"train.steps={steps}", f"train.seed={seed}", f"evaluate.nfe={list(passes)}"]
            labels = {"objective": title, "cost": {"steps": steps, "F_per_step": round(each, 2)}}
            yield Cell(f"{recipe}-{seed}", load(recipe, asked), labels)


def table(done: list[Finished]) -> list[dict[str, Any]]:
    """A row per objective, reading and number of passes."""
    return rows(ZOO, done)


def rows(recipes: Mapping[str, str], done: list[Finished]) -> list[dict[str, Any]]:
    """A row per objective, reading and number of passes: means over seeds, and the sd of the first distance."""
    found: list[dict[str, Any]] = []
    for title in recipes:
        mine = [one for one in done if one.cell.labels["objective"] == title]
        for part in ("results", "contrast"):
            by_passes = zip(*(one.report[part] for one in mine), strict=True)
            found += [{"objective": title, **over_seeds(same), **mine[0].cell.labels["cost"]} for same in by_passes]
    return found


def over_seeds(same: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of equal rows of several seeds."""
    fds = [row["fd"] for row in same]
    others = [key for key in same[0] if key not in ("nfe", "solver", "fd") and not key.endswith("_sd")]
    return {
        "nfe": same[0]["nfe"],
        "solver": same[0]["solver"],
        "fd": fmean(fds),
        "fd_sd": deviation(fds),
        **{key: fmean(row[key] for row in same) for key in others},
        "seeds": len(fds),
    }


def draw(done: list[Finished], folder: Path) -> list[Path]:
    """One sheet of one-step samples per objective, first seed."""
    return sheets(ZOO, done, folder)


def sheets(recipes: Mapping[str, str], done: list[Finished], folder: Path) -> list[Path]:
    """One sheet of one-step samples per objective, first seed."""
    files: list[Path] = []
    for title, recipe in recipes.items():
        one = next(one for one in done if one.cell.labels["objective"] == title)
        classes = one.trained.run.data.classes
        made = run.sample(one.trained, nfe=1, c=generate.labels(80, classes))
        files.append(folder / f"{recipe}-nfe1.png")
        archive.write_picture(files[-1], picture.sheet(picture.to_uint8(made.x), classes or 10))
    return files


PLAN = Plan("Every objective on digits at equal counted cost", cells, table, draw)
