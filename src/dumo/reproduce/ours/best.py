"""What is best at 1, 2, 4 and 50 passes, at equal counted cost? From the paper's recipe to ours, and its rivals.

ALONE    what dumo offers beside the paper, each by itself on the paper's recipe, on digits.
TUNED    on the net and optimizer of `dumo-best`, as many settings of each objective, for else nets would be compared.
DIGITS   the best setting of each, and the steps from the paper's recipe to `dumo-best`, at several budgets.
LATENTS  the same on CIFAR-10 latents.
PIXELS   and with those settings on pixels at 16 x 16, where nothing was chosen.

The first two are of seed 0, by which is chosen; the others are of other seeds. Nets differ, so cost is counted
operations (`arm.work`). Of the digits some are held out of training. At 50 passes the velocity is followed, by Euler's
steps.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from math import exp, log
from typing import Any

from PIL import Image

from dumo.reproduce import arm, chart
from dumo.reproduce.arm import Arm
from dumo.reproduce.ours.setting import (
    CHOSEN,
    FOR_LATENTS,
    INDEPENDENT,
    LADDER,
    LATENT_LADDER,
    OPTIONS,
    OURS,
    OURS_ON_LATENTS,
    SETTINGS,
    Sets,
)
from dumo.reproduce.plan import Cell, Finished, Plan

SMALL = ("train.batch=32", "net.width=32", "net.depth=3", "evaluate.protocol.samples=500")  # for smoke
JUDGED = ("evaluate.nfe=[1,2,4]", "evaluate.contrast=[50]")
FOLLOWED = ("evaluate.nfe=[1,2,4,50]", "evaluate.contrast=[]")  # where Euler's steps are all there is
LABELLED = (  # for smoke, where guidance takes classes: the test images, encoded in a minute
    "data.root=runs/latents/smoke-cifar10-test",
    "data.images.split=test",
    "net.width=32",
    "net.depth=1",
    "train.batch=32",
    "evaluate.protocol.samples=1000",
)
PAPER = "the paper's recipe"


@dataclass(frozen=True)
class Course:
    """On which data, from which recipe to which, beside whom; how many steps of the first a budget of 1 is."""

    paper: str
    ours: str
    ladder: Mapping[str, Sets]  # settings by which one becomes the other
    rivals: Mapping[str, tuple[str, Sets]]  # whose objective, and how it is set
    common: Sets
    small: Sets  # for smoke
    steps: int
    seeds: int
    budgets: tuple[float, ...] = (1 / 3, 1.0, 3.0)

    def on_ours(self, name: str, recipe: str, sets: Sets, labels: dict[str, Any]) -> Arm:
        """An objective as it is set, on our net."""
        objective = arm.taught(recipe, self.ours) if recipe != self.ours else ()
        judged = FOLLOWED if recipe.endswith("flow-matching") else JUDGED
        return Arm(name, self.ours, (*self.common, *objective, *sets, *judged), labels)

    def arms(self) -> list[Arm]:
        """From the paper's recipe to ours, and our rivals."""
        sets, found = (*self.common, *JUDGED), list[Arm]()
        for i, (name, more) in enumerate({PAPER: (), **self.ladder}.items()):
            sets = (*sets, *more)
            found.append(Arm(f"step-{i}", self.paper, sets, {"arm": f"+ {name}" if i else name}))
        found[-1] = replace(found[-1], labels={"arm": self.ours})
        for title, (recipe, more) in self.rivals.items():
            found.append(self.on_ours(recipe, recipe, more, {"arm": title}))
        return found

    def cells(self, scale: str) -> Iterator[Cell]:
        """All at a budget of 1; the paper's recipe, ours and our rivals at others, too, but for smoke."""
        for budget in (1.0,) if scale == "smoke" else self.budgets:
            arms = [one for one in self.arms() if budget == 1 or not one.labels["arm"].startswith("+")]
            sized = [
                replace(one, name=f"{one.name}-x{budget:.2g}", labels=one.labels | {"budget": budget}) for one in arms
            ]
            count = round(budget * self.steps)
            yield from arm.equal_cost(sized, scale, self.seeds, first=1, small=self.small, steps=count, cost=arm.work)


ON_DIGITS = Course(
    paper="digits",
    ours=OURS,
    ladder=LADDER,
    rivals={
        title: (SETTINGS[title][0], (*INDEPENDENT, *SETTINGS[title][1][name]))
        for title, name in CHOSEN.items()
        if title != "DuMo"
    },
    common=arm.HELD,
    small=SMALL,
    steps=2000,
    seeds=3,
)
ON_LATENTS = Course(
    paper="cifar10-latents",
    ours=OURS_ON_LATENTS,
    ladder=LATENT_LADDER,
    rivals={title: (SETTINGS[title][0], sets) for title, sets in FOR_LATENTS.items()},
    common=("evaluate.protocol.samples=1250",),  # decoding takes longer than training
    small=LABELLED,
    steps=400,
    seeds=2,
)
ON_PIXELS = replace(
    ON_LATENTS,
    common=(
        'data={"kind": "images", "root": "$DUMO_DATA/cifar10", "side": 16, "split": "train"}',
        "net.patch=2",
        "train.batch=32",
        'evaluate.protocol={"kind": "photos", "samples": 1000}',
    ),
    small=(*SMALL[1:3], "evaluate.protocol.samples=100"),
    steps=600,
    seeds=1,
    budgets=(1.0,),
)


def alone(scale: str) -> list[Arm]:
    """The paper's recipe, with each option by itself."""
    return [
        Arm(f"option-{i}", ON_DIGITS.paper, (*common(scale), *sets, *JUDGED), {"option": name})
        for i, (name, sets) in enumerate(OPTIONS.items())
    ]


def tuned(scale: str) -> list[Arm]:
    """The paper's recipe, and every setting of every objective on our net."""
    found = [Arm("paper", ON_DIGITS.paper, (*common(scale), *JUDGED), {"setting": PAPER})]
    for title, (recipe, settings) in SETTINGS.items():
        for i, (name, sets) in enumerate(settings.items()):
            sets = (*common(scale), *INDEPENDENT, *sets)
            found.append(ON_DIGITS.on_ours(f"{recipe}-{i}", recipe, sets, {"setting": f"{title}: {name}"}))
    return found


def common(scale: str) -> Sets:
    """What all arms begin with; what a net is made small by must not undo an option."""
    return (*arm.HELD, *(SMALL if scale == "smoke" else ()))


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


def charts(course: Course, stem: str, table: list[dict[str, Any]]) -> dict[str, Image.Image]:
    """Distance against budget in one pass and in two, and where the paper's recipe stands at a budget of 1."""
    names = {row["arm"] for row in table if not row["arm"].startswith("+")}
    names = [course.ours, *sorted(names - {course.ours, PAPER}), PAPER]
    return {
        f"{stem}-nfe{nfe}": chart.curves(
            f"What a budget buys, {nfe} pass{'es' * (nfe > 1)}",
            f"counted operations, over those of {course.steps:,} steps of the paper's recipe",
            arm.axis(arm.measure(table[0])),
            {name: curve(table, name, nfe) for name in names},
            level=(level(table, nfe), f"{PAPER} at 1"),
        )
        for nfe in (1, 2)
    }


UNPUBLISHED = "these are settings of ours, and the paper's net takes days"
chosen_by = partial(arm.comparison, seeds=1, small=(), steps=ON_DIGITS.steps, cost=arm.work, unpublished=UNPUBLISHED)
ALONE = chosen_by("Options, each by itself on the paper's recipe (ours)", "best-options", alone)
TUNED = chosen_by("Objectives on one net, each in as many settings (ours)", "best-tuning", tuned)


def plan(title: str, stem: str, course: Course) -> Plan:
    """A course as a plan, with its curves."""
    return Plan(title, course.cells, table, charts=partial(charts, course, stem), unpublished=UNPUBLISHED)


DIGITS = plan("The best on digits at 1, 2, 4 and 50 passes, at equal counted cost (ours)", "best", ON_DIGITS)
LATENTS = plan(
    "The best on CIFAR-10 latents at 1, 2, 4 and 50 passes, at equal counted cost (ours)", "best-latents", ON_LATENTS
)
PIXELS = plan(
    "The best of latents on CIFAR-10 at 16 x 16 in pixels, at equal counted cost (ours)", "best-pixels", ON_PIXELS
)
