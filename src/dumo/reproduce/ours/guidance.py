"""Random guidance (ours): the passes of guidance on every row, or on a fraction of the rows, at equal counted cost."""

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

from torch import Tensor

from dumo.config.load import load
from dumo.data.source import Table
from dumo.reproduce.plan import Cell, Finished, Plan, deviation, units
from dumo.run.folder import RunFolder
from dumo.run.sample import sample, sample_batches
from dumo.sampling.solver import Heun

GUIDED = ("digits-guided", "moons-guided")
FRACTIONS = (1.0, 0.25)
LONG = 3  # budgets that the yardstick is trained for


def cells(scale: str) -> Iterator[Cell]:
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


def table(done: list[Finished]) -> list[dict[str, Any]]:
    """A row per recipe, fraction and number of passes: distances to the guided yardstick, mean and sd over seeds.

    Not to the data: guidance leads away from them, and a net that is guided too little would look better.
    """
    rows: list[dict[str, Any]] = []
    for recipe in GUIDED:
        mine = [one for one in done if one.cell.labels["recipe"] == recipe]
        yardstick, *others = mine
        protocol, classes = yardstick.cell.spec.evaluate.protocol, yardstick.cell.spec.data.classes
        c = protocol.labels(classes)
        real = Table(sample(yardstick.opened, nfe=50, c=c, seed=1, solver=Heun()).x, c)
        evaluator = protocol.evaluator(lambda real=real: real, classes=classes)
        for fraction in FRACTIONS:
            same = [one for one in others if one.cell.labels["fraction"] == fraction]
            for nfe in same[0].cell.spec.evaluate.nfe:
                scores = [evaluator.score(batches(one.opened, nfe, c)) for one in same]
                rows.append({**same[0].cell.labels, "nfe": nfe, **spread(scores), "seeds": len(scores)})
    return rows


def batches(opened: RunFolder, nfe: int, c: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Samples with their numbers."""
    return ((part.index, part.x) for part in sample_batches(opened, nfe=nfe, c=c))


def spread(scores: Sequence[dict[str, float]]) -> dict[str, Any]:
    """The first distance of these scores, fd or mmd2, over seeds: its name, mean and sd."""
    name = next(iter(scores[0]))
    values = [score[name] for score in scores]
    return {"distance": name, "mean": fmean(values), "sd": deviation(values)}


PLAN = Plan(
    "Random guidance at equal counted cost, distance to a fully guided net trained longer (ours)",
    cells,
    table,
    unpublished="random guidance is not the paper's",
)
