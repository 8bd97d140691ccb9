"""The zoo: every objective on digits at equal counted cost; at the paper's size, the recipes of its Tab. 1.

Steps and seeds are those of `dumo.reproduce.ours.best` at a budget of 1, and some digits are held out, as there.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

from dumo import recipes
from dumo.config.load import load
from dumo.reproduce import arm
from dumo.reproduce.arm import Arm
from dumo.reproduce.plan import Finished

PASSES = (1, 2, 4)
STEPS = 2000  # of DuMo; ours, so that a cell takes a minute or two with one on each core
TITLES = {  # by what a recipe is called after "digits-"; others are called that
    "": "DuMo",
    "alpha-flow": "α-Flow",
    "cm": "CM",
    "ect": "ECT",
    "facm": "FACM",
    "flow-matching": "Flow matching",
    "fm-plus": "FM+",
    "ict": "iCT",
    "imf": "Improved MeanFlow",
    "imm": "IMM",
    "meanflow": "MeanFlow",
    "rcgm": "RCGM",
    "sct": "sCT",
    "shortcut": "Shortcut",
    "soflow": "SoFlow",
    "split-meanflow": "SplitMeanFlow",
    "three-heads": "DuMo + MeanFlow",
    "three-heads-shortcut": "DuMo + Shortcut",
    "tvm": "TVM",
    "twinflow": "TwinFlow",
    "ucgm": "UCGM",
}
LIKEWISE = {"pMF": ("Improved MeanFlow", ("net.precondition=data",))}  # what makes one of another
FAR = 3.0  # times DuMo's distance, beyond which a row says why
PUBLISHED = recipes.published("zoo")


@cache
def zoo() -> dict[str, str]:
    """The recipes of objectives on digits, by title, DuMo first: none with guidance, words, likelihood or a teacher."""
    others = ("digits-guided", "digits-words", "digits-likelihood")
    found = [name for name in recipes.names() if name.partition("-")[0] == "digits" and name not in others]
    alone = [name for name in found if (spec := load(name)).teacher is None and spec.start is None]
    return {TITLES.get(name := recipe[len("digits-") :], name): recipe for recipe in alone}


def judged(recipe: str) -> tuple[str, ...]:
    """At those of `PASSES` that its solver can make, with no other beside it."""
    each = load(recipe).sample.solver.passes
    return f"evaluate.nfe={[n for n in PASSES if n % each == 0]}", "evaluate.contrast=[]"


def arms(scale: str) -> Sequence[Arm]:
    """Every objective, with the paper's number beside it."""
    if scale == "paper":
        found = ((recipe, recipe, told["title"], told["fid"], ()) for recipe, told in PUBLISHED["tab1"].items())
    else:
        every = {title: (recipe, recipe, ()) for title, recipe in zoo().items()}
        every |= {
            title: (f"digits-{title.lower()}", every[of][1], sets)
            for title, (of, sets) in LIKEWISE.items()
            if of in every
        }
        found = (
            (name, recipe, title, PUBLISHED["xl2"].get(title), (*judged(recipe), *arm.HELD, *sets))
            for title, (name, recipe, sets) in every.items()
        )
    return [
        Arm(name, recipe, sets, {"objective": title, "paper_fid_imagenet_xl_1_pass": fid})
        for name, recipe, title, fid, sets in found
    ]


def table(done: list[Finished]) -> list[dict[str, Any]]:
    """As any comparison, with every distance over DuMo's in one pass; and where one pass is over 3 of these, why."""
    rows = list(arm.averaged(done))
    first = rows[0][score := arm.measure(rows[0])]
    found: list[dict[str, Any]] = []
    for row in rows:
        over = row[score] / first
        why = PUBLISHED["why"].get(row["objective"], "not known") if row["nfe"] == 1 and over > FAR else ""
        found.append(row | {"over_dumo_1_pass": over, "why": why})
    return found


PLAN = arm.comparison(
    "Every objective on digits at equal counted cost",
    "zoo",
    arms,
    seeds=3,
    first=1,
    steps=STEPS,
    table=table,
    samples=True,
)
