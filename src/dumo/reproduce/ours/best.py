"""What is best at 1, 2, 4 and 50 passes, at equal counted cost? From the paper's recipe to `dumo-best`, and its rivals.

ALONE  what dumo offers beside the paper, each by itself on the paper's recipe.
TUNED  on the net and optimizer of `dumo-best`, as many settings of each objective, for else nets would be compared.
PLAN   the best setting of each, and the steps from the paper's recipe to `dumo-best`, at several budgets.

The first two are of seed 0, by which is chosen; the last is of others. Nets differ, so cost is counted operations
(`arm.work`). Of the digits some are held out of training. At 50 passes the velocity is followed, by Euler's steps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from math import exp, log
from typing import Any

from PIL import Image

from dumo.reproduce import arm, chart
from dumo.reproduce.arm import Arm
from dumo.reproduce.ours.setting import LADDER, OPTIONS, OURS, SETTINGS, Sets
from dumo.reproduce.plan import Cell, Finished, Plan

BASE = "digits"
STEPS = 2000  # of the paper's recipe, at a budget of 1
BUDGETS, SEEDS = (1 / 3, 1.0, 3.0), 3
HELD = ("data.held=360",)
SMALL = ("train.batch=32", "net.width=32", "net.depth=3", "evaluate.protocol.samples=500")  # for smoke
JUDGED = ("evaluate.nfe=[1,2,4]", "evaluate.contrast=[50]")
FOLLOWED = ("evaluate.nfe=[1,2,4,50]", "evaluate.contrast=[]")  # where Euler's steps are all there is
CHOSEN = {OURS: "as it is", "MeanFlow": "as it is", "α-Flow": "as it is", "Flow matching": "as it is"}  # on seed 0


def common(scale: str) -> Sets:
    """What all arms have."""
    return (*HELD, *(SMALL if scale == "smoke" else ()))


def alone(scale: str) -> list[Arm]:
    """The paper's recipe, with each option by itself."""
    return [
        Arm(f"option-{i}", BASE, (*common(scale), *sets, *JUDGED), {"option": name})
        for i, (name, sets) in enumerate(OPTIONS.items())
    ]


@cache
def taught_on_ours(recipe: str) -> Sets:
    """What makes our recipe train as this one does; read once, for all of its settings."""
    return arm.taught(recipe, OURS)


def setting(title: str, name: str, scale: str) -> Arm:
    """An objective as it was set, on our net."""
    recipe, settings = SETTINGS[title]
    taught = taught_on_ours(recipe) if recipe != OURS else ()
    judged = FOLLOWED if title == "Flow matching" else JUDGED
    place = list(settings).index(name)
    return Arm(f"{recipe}-{place}", OURS, (*common(scale), *taught, *settings[name], *judged))


def tuned(scale: str) -> list[Arm]:
    """The paper's recipe, and every setting of every objective on our net."""
    base = Arm("paper", BASE, (*common(scale), *JUDGED), {"setting": "the paper's recipe"})
    found = [(title, name) for title, (_, settings) in SETTINGS.items() for name in settings]
    return [base, *(replace(setting(*one, scale), labels={"setting": ": ".join(one)}) for one in found)]


def steps(scale: str) -> list[Arm]:
    """From the paper's recipe to ours, and our rivals."""
    sets, found = (*common(scale), *JUDGED), list[Arm]()
    for i, (name, more) in enumerate({"the paper's recipe": (), **LADDER}.items()):
        sets = (*sets, *more)
        found.append(Arm(f"step-{i}", BASE, sets, {"arm": f"+ {name}" if i else name}))
    found[-1] = replace(found[-1], labels={"arm": OURS})
    return [
        *found,
        *(replace(setting(*one, scale), labels={"arm": one[0]}) for one in CHOSEN.items() if one[0] != OURS),
    ]


def cells(scale: str) -> Iterator[Cell]:
    """All at a budget of 1; the paper's recipe, ours and our rivals at others, too, but for smoke."""
    for budget in (1.0,) if scale == "smoke" else BUDGETS:
        arms = [one for one in steps(scale) if budget == 1 or not one.labels["arm"].startswith("+")]
        sized = [replace(one, name=f"{one.name}-x{budget:.2g}", labels=one.labels | {"budget": budget}) for one in arms]
        count = round(budget * STEPS)
        yield from arm.equal_cost(sized, scale, SEEDS, first=1, small=(), steps=count, cost=arm.work)


def table(done: list[Finished]) -> list[dict[str, Any]]:
    """A row per arm, budget and number of passes.

    `even_at` is the budget at which an arm is as near in one pass as the first is at a budget of 1: read off between
    its own budgets, straight where both axes are logarithms; None beyond them.
    """
    rows = list(arm.averaged(done))
    return [row | {"even_at": even(curve(rows, row["arm"]), level(rows)) if row["nfe"] == 1 else None} for row in rows]


def curve(rows: Sequence[dict[str, Any]], name: str, nfe: int = 1) -> list[tuple[float, float, float | None]]:
    """Budget, distance and its deviation of one arm."""
    score = arm.measure(rows[0])
    own = [row for row in rows if (row["arm"], row["nfe"]) == (name, nfe)]
    return sorted((row["budget"], row[score], row[f"{score}_sd"]) for row in own)


def level(rows: Sequence[dict[str, Any]], nfe: int = 1) -> float:
    """The distance of the first arm at a budget of 1."""
    return next(y for budget, y, _ in curve(rows, rows[0]["arm"], nfe) if budget == 1)


def even(points: Sequence[tuple[float, float, float | None]], to: float) -> float | None:
    """Where a curve comes down to this distance."""
    for (a, high, _), (b, low, _) in pairwise(points):
        if low <= to <= high and low < high:
            return exp(log(a) + log(b / a) * log(high / to) / log(high / low))
    return None


def charts(table: list[dict[str, Any]]) -> dict[str, Image.Image]:
    """Distance against budget in one pass and in two, and where the paper's recipe stands at a budget of 1."""
    names = [name for name in dict.fromkeys(row["arm"] for row in table) if not name.startswith("+")]
    return {
        f"best-nfe{nfe}": chart.curves(
            f"What a budget buys, {nfe} pass{'es' * (nfe > 1)}",
            "counted operations, over those of 2,000 steps of the paper's recipe",
            arm.axis(arm.measure(table[0])),
            {name: curve(table, name, nfe) for name in names},
            level=(level(table, nfe), "the paper's recipe at 1"),
        )
        for nfe in (1, 2)
    }


UNPUBLISHED = "these are settings of ours, and the paper's net takes days"
chosen_by = partial(arm.comparison, seeds=1, small=(), steps=STEPS, cost=arm.work, unpublished=UNPUBLISHED)
ALONE = chosen_by("Options, each by itself on the paper's recipe (ours)", "best-options", alone)
TUNED = chosen_by("Objectives on one net, each in as many settings (ours)", "best-tuning", tuned)
PLAN = Plan(
    "The best on digits at 1, 2, 4 and 50 passes, at equal counted cost (ours)",
    cells,
    table,
    charts=charts,
    unpublished=UNPUBLISHED,
)
