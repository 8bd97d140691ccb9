"""What most plans are: arms, each with several seeds, as long as costs the same; and a table of means over seeds.

Equal cost is equal counted forward units: steps times what a step costs (`dumo show`). So an objective that needs more
passes a step gets fewer steps. At the paper's size arms are compared as the paper does, by equal steps, once.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image

from dumo.config.load import load
from dumo.config.spec import Run
from dumo.io import archive, picture
from dumo.preflight import show
from dumo.protocols.evaluator import headline
from dumo.report import figure
from dumo.report.score import figures
from dumo.report.word import MERITS, word
from dumo.reproduce import chart
from dumo.reproduce.plan import Cell, Finished, Plan, deviation, flops, trained_as, units
from dumo.run.sample import conditions, sample

SMALL = ("train.batch=32", "net.width=32", "net.depth=1", "evaluate.protocol.samples=500")  # for smoke, on digits
SMOKE = 20  # steps
HELD = ("data.held=360",)  # of the digits, which no training sees; ours
LATENTS = (  # for smoke: a thousand other images, that are encoded in seconds
    "data.root=runs/latents/smoke-taef2",
    "data.images.root=$DUMO_DATA/imagenet-sample",
    "data.images.crop=adm",
    "data.images.split=null",
    "data.images.labelled=false",
    "data.images.classes=0",
    "data.images.flip=false",
    "net.width=32",
    "net.depth=1",
    "train.batch=32",
    "evaluate.protocol.samples=1000",
)


@dataclass(frozen=True)
class Arm:
    """One thing compared with others: the name of its cells, a recipe, changes to it, and its columns in the table."""

    name: str
    recipe: str
    sets: tuple[str, ...] = ()
    labels: dict[str, Any] = field(default_factory=dict[str, Any])  # the first is its name in a picture

    def load(self, more: Sequence[str] = ()) -> Run:
        """Its run. Raises UserError as `load` does."""
        return load(self.recipe, [*self.sets, *more])


def comparison(
    title: str,
    stem: str,
    arms: Callable[[str], Sequence[Arm]],
    *,
    seeds: int,
    first: int = 0,
    small: Sequence[str] = SMALL,
    steps: int | None = None,
    cost: Callable[[Run], float] | None = None,
    table: Callable[[list[Finished]], list[dict[str, Any]]] | None = None,
    samples: bool = False,
    unpublished: str = "",
) -> Plan:
    """A plan of arms by scale: a row per arm and number of passes, and a picture of them, STEM.png.

    `cost` is what a step costs, of which all arms have as much; None: its forward units. With `samples` there is also
    a picture of what every arm makes in one pass, STEM-samples.png.
    """

    def cells(scale: str) -> Iterator[Cell]:
        if scale == "paper":
            return equal_steps(arms(scale), scale)
        return equal_cost(arms(scale), scale, seeds, first=first, small=small, steps=steps, cost=cost)

    def draw(done: list[Finished], folder: Path) -> list[Path]:
        path = folder / f"{stem}-samples.png"
        if samples:
            archive.write_picture(path, side_by_side(done))
        return [path] if samples else []

    return Plan(
        title,
        cells,
        table or (lambda done: list(averaged(done))),
        draw,
        charts=lambda table: {stem: ranking(title, table)},
        unpublished=unpublished,
    )


def equal_cost(
    arms: Sequence[Arm],
    scale: str,
    seeds: int,
    *,
    first: int = 0,
    small: Sequence[str] = SMALL,
    steps: int | None = None,
    cost: Callable[[Run], float] | None = None,
) -> Iterator[Cell]:
    """Every arm with every seed from `first` on, each with as many steps as cost what those of the first arm do.

    These are `steps`, or its recipe's; for smoke a few, of a net made small, with one seed. What a step costs is
    counted in passes of its own net, or, where nets differ, in their operations (`work`).
    """
    sets, budget = small if scale == "smoke" else (), 0.0
    for arm in arms:
        spec = arm.load(sets)
        each = (cost or units)(spec)
        budget = budget or each * (SMOKE if scale == "smoke" else steps or spec.train.steps)
        count = round(budget / each)
        labels = {**arm.labels, "steps": count, "F_per_step": round(units(spec), 2)}
        for seed in range(first, first + (1 if scale == "smoke" else seeds)):
            yield Cell(f"{arm.name}-{seed}", trained_as(spec, steps=count, seed=seed), labels)


def work(spec: Run) -> float:
    """Counted operations of a step."""
    return spec.train.batch * units(spec) * flops(spec)


def equal_steps(
    arms: Sequence[Arm], scale: str, *, small: Sequence[str] = SMALL, steps: int | None = None
) -> Iterator[Cell]:
    """Every arm once, all of them with `steps` steps, or each with its recipe's; for smoke a few, of a small net."""
    count = SMOKE if scale == "smoke" else steps
    sets = [*(small if scale == "smoke" else ()), *([f"train.steps={count}"] if count else [])]
    for arm in arms:
        spec = arm.load(sets)
        yield Cell(f"{arm.name}-{spec.train.seed}", spec, {**arm.labels, "steps": spec.train.steps})


@cache
def taught(recipe: str, host: str, *, kept: tuple[str, ...] = ("drop", "guide")) -> tuple[str, ...]:
    """What makes the recipe `host` train as `recipe` does: its objective, path, preconditioning, theta^- and solver.

    The fields `kept` of the objective, if both have them, stay the host's, and so do its data, net and training.
    """
    here, there = (load(name).model_dump(mode="json") for name in (host, recipe))
    objective = there["objective"]
    objective |= {name: here["objective"][name] for name in kept if name in objective and name in here["objective"]}
    parts = {
        "objective": objective,
        "path": there["path"],
        "net.precondition": there["net"]["precondition"],
        "train.ref": there["train"]["ref"],
        "sample.solver": there["sample"]["solver"],
    }
    return tuple(f"{name}={json.dumps(value)}" for name, value in parts.items())


def seeds_of(done: Sequence[Finished]) -> list[list[Finished]]:
    """The cells by arm: those of one arm differ in their seed alone."""
    found: dict[str, list[Finished]] = {}
    for one in done:
        found.setdefault(json.dumps(one.cell.labels), []).append(one)
    return list(found.values())


def averaged(
    done: Sequence[Finished], more: Callable[[Run], dict[str, Any]] = lambda spec: {}
) -> Iterator[dict[str, Any]]:
    """A row per arm and number of passes: its columns, `more` of its spec, means over seeds, the sd of what leads."""
    for same in seeds_of(done):
        columns = same[0].cell.labels | more(same[0].cell.spec)
        for rows in zip(*(judged(one.report) for one in same), strict=True):
            yield columns | over_seeds(rows)


def judged(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a report by number of passes; Euler's where there is no other."""
    known = {row["nfe"] for row in report["results"]}
    return [*report["results"], *(row for row in report["contrast"] if row["nfe"] not in known)]


def over_seeds(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of equal rows of several seeds: what counts first, then `fd` where that is another, each with sd."""
    names = [key for key in rows[0] if key not in ("nfe", "solver") and not key.endswith("_sd")]
    lead = headline(names)
    spreads = [name for name in dict.fromkeys((lead, "fd")) if name in names]
    found: dict[str, Any] = {"nfe": rows[0]["nfe"], "solver": rows[0]["solver"]}
    for name in spreads:
        values = [row[name] for row in rows]
        found |= {name: fmean(values), f"{name}_sd": deviation(values)}
    return {**found, **{n: fmean(row[n] for row in rows) for n in names if n not in spreads}, "seeds": len(rows)}


def respread(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The table of stored results, the spread of what counts today taken from their cells, by whose order it is."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for cell in results["cells"]:
        arms.setdefault(cell["cell"].rpartition("-")[0], []).append(cell)
    rows = [over_seeds(same) for of in arms.values() for same in zip(*map(judged, of), strict=True)]
    return [row | again for row, again in zip(results["table"], rows, strict=True)]


def measure(row: dict[str, Any]) -> str:
    """The score of an averaged row that counts: what a file holds, or the first whose deviation is beside it."""
    return headline([key for key in row if f"{key}_sd" in row or key == "fd_grey"])


def axis(score: str) -> str:
    """What stands below an axis of this score."""
    of = word(MERITS, score)
    return f"{of.title} ({of.better}), mean ± deviation over seeds"


def ranking(title: str, rows: Sequence[dict[str, Any]]) -> Image.Image:
    """The score that counts, a line per arm, the best in the fewest passes on top, a mark per number of passes."""
    score = measure(rows[0])
    marks = {n: f"{n} pass{'es' * (n > 1)}" for n in sorted({row["nfe"] for row in rows})}
    points: dict[str, dict[str, tuple[float, float | None]]] = {}
    for row in sorted(rows, key=lambda row: (row["nfe"], row[score])):
        points.setdefault(str(next(iter(row.values()))), {})[marks[row["nfe"]]] = row[score], row.get(f"{score}_sd")
    return chart.dots(title, axis(score), points)


def side_by_side(done: Sequence[Finished]) -> Image.Image:
    """Samples of one pass, two of a class, of every arm's first seed, below its name and score: the best first."""
    blocks: dict[str, tuple[float, Image.Image]] = {}
    for one, *_ in seeds_of(done):
        run, told = one.opened.run, one.report["results"][0]
        each, score = max(run.data.labels, 10), figures(told)[0]
        c = conditions(run, each)
        made = sample(one.opened, nfe=1, c=c.repeat(2))
        sheet = picture.sheet(picture.to_rows(made.x), each)
        names = [run.class_name(k) for k in c.tolist()[: run.data.labels]]
        blocks[f"{next(iter(one.cell.labels.values()))}, {told[score]:.3g}"] = told[score], figure.headed(sheet, names)
    best = {name: sheet for name, (_, sheet) in sorted(blocks.items(), key=lambda of: of[1][0])}
    return figure.gathered(best, note=samples_note(figures(done[0].report["results"][0])[0]))


def samples_note(score: str) -> str:
    """What stands below samples side by side."""
    of = word(MERITS, score)
    return f"One pass of each (its fewest), seed 0. The number: {of.title}; {of.better}."


def far(spec: Run) -> dict[str, float]:
    """P(t - r > 0.9), the share of rows where one-step sampling is taught, as a column."""
    return {"far": round(show.far(spec), 6)}
