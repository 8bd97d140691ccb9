"""Do pulls make one-pass samples better? Our best recipe alone, and with each pull from a part of the training on.

A pull costs passes, so what has one takes fewer steps: all arms have the same count of operations. Digits are judged as
in `dumo.reproduce.ours.best`; `drift` is trained on the numbers of samples, so what compares these is no judge of it.
"""

import json
from functools import partial
from typing import Any

from dumo.reproduce import arm
from dumo.reproduce.arm import Arm
from dumo.reproduce.ours.best import ON_DIGITS, ON_LATENTS
from dumo.reproduce.ours.setting import GUIDED, LEANING, OURS, OURS_ON_LATENTS, Sets, U, V, parts

AFTER = (0.25, 0.5, 0.75)  # of the training
PULLS: dict[str, Sets] = {
    "match": (),
    "critic": ('train.optimizer.heads=[{"name": "d", "betas": [0, 0.9]}]',),  # AFM's
    "drift": (),
}
JUDGED = ("evaluate.nfe=[1,2,4]", "evaluate.contrast=[]")


def pulled(kind: str, after: float) -> Sets:
    """A pull of this kind, of its own constants, from a share of the training on."""
    pull: dict[str, Any] = {"kind": kind, "after": after}
    return (f"objective.pulls={json.dumps([pull])}", *PULLS[kind])


def arms(recipe: str, common: Sets, scale: str) -> list[Arm]:
    """Without a pull, and with each from each share on."""
    found = {"none": ()} | {f"{kind}, from {after:.0%}": pulled(kind, after) for kind in PULLS for after in AFTER}
    return [
        Arm(f"{recipe}-{i}", recipe, (*common, *JUDGED, *sets), {"pull": name})
        for i, (name, sets) in enumerate(found.items())
    ]


def plan(title: str, stem: str, recipe: str, common: Sets, small: Sets) -> arm.Plan:
    """Arms on a recipe, of as many operations as it has by itself: within an hour on two cores."""
    make = partial(arms, recipe, common)
    why = "the paper has no pulls"
    return arm.comparison(title, stem, make, seeds=3, small=small, cost=arm.work, unpublished=why)


DIGITS = plan("Pulls on digits, at equal counted cost (ours)", "pulls", OURS, ON_DIGITS.common, arm.SMALL)
LATENTS = plan(
    "Pulls on CIFAR-10 latents, at equal counted cost (ours)",
    "pulls-latents",
    OURS_ON_LATENTS,
    (*parts(V, U), LEANING, *GUIDED, *ON_LATENTS.common),  # that recipe by its parts, to the bit
    ON_LATENTS.small,
)
