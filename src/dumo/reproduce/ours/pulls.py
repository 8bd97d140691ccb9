"""Do pulls make one-pass samples better? Our best recipe alone, and with each pull from a part of the training on.

A pull costs passes, so what has one takes fewer steps: all arms have the same count of operations. Digits are judged as
in `dumo.reproduce.ours.best`; `drift` is trained on the numbers of samples, so what compares these is no judge of it.

Drift asks which of a group's rows of one condition are near, and a batch has few. So it may also come last, alone with
the largest batches: a recipe for most of its operations, then the rest in batches of 256, with it and without.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from dumo.config.load import load
from dumo.reproduce import arm, start
from dumo.reproduce.arm import Arm
from dumo.reproduce.ours.best import ON_DIGITS, ON_LATENTS
from dumo.reproduce.ours.setting import GUIDED, LEANING, OURS, OURS_ON_LATENTS, Sets, U, V, parts
from dumo.reproduce.plan import Cell, Plan, trained_as, units
from dumo.reproduce.start import begins

AFTER = (0.25, 0.5, 0.75)  # of the training
PULLS: dict[str, Sets] = {
    "match": (),
    "critic": ('train.optimizer.heads=[{"name": "d", "betas": [0, 0.9]}]',),  # AFM's
    "drift": (),
}
FIRST = 0.7  # of the operations, before what comes last; ours
ROWS = 256  # of a batch, and of a group, then
LAST = (f"train.batch={ROWS}", "train.optimizer.lr=0.004", "train.schedule.warmup=10")  # a third of the rate
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


def in_turn(recipe: str, common: Sets, small: Sets, seeds: Sequence[int]) -> Iterator[Cell]:
    """A recipe for most of its operations, then, in large batches, the others without a pull and with drift."""
    sets = (*common, *JUDGED, *small)
    whole = load(recipe, sets)
    steps = arm.SMOKE if small else whole.train.steps

    def cell(stem: str, seed: int, title: str, share: float, *more: str) -> Cell:
        spec = load(recipe, [*sets, *more])
        count = max(1, round(share * steps * arm.work(whole) / arm.work(spec)))
        labels = {"pull": title, "steps": count, "F_per_step": round(units(spec), 2)}
        return Cell(f"{recipe}-{stem}-{seed}", trained_as(spec, steps=count, seed=seed), labels)

    for seed in seeds:
        yield (first := cell("first", seed, begun := f"none, for {FIRST:.0%}", FIRST))
        last = (*LAST, begins(first.name, {}))
        drift = json.dumps([{"kind": "drift", "after": 0, "size": ROWS}])
        yield cell("last", seed, f"{begun}, then in {ROWS} rows", 1 - FIRST, *last)
        yield cell("drift", seed, f"{begun}, then drift in {ROWS} rows", 1 - FIRST, *last, f"objective.pulls={drift}")


def plan(title: str, stem: str, recipe: str, common: Sets, small: Sets) -> Plan:
    """Arms on a recipe, of as many operations as it has by itself: within an hour on two cores."""
    make = partial(arms, recipe, common)
    why = "the paper has no pulls"
    alone = arm.comparison(title, stem, make, seeds=3, small=small, cost=arm.work, unpublished=why)

    def cells(scale: str) -> Iterator[Cell]:
        yield from alone.cells(scale)
        smoke = scale == "smoke"
        yield from in_turn(recipe, common, small if smoke else (), range(1 if smoke else 3))

    return replace(alone, cells=cells, finish=start.finish)


DIGITS = plan("Pulls on digits, at equal counted cost (ours)", "pulls", OURS, ON_DIGITS.common, arm.SMALL)
LATENTS = plan(
    "Pulls on CIFAR-10 latents, at equal counted cost (ours)",
    "pulls-latents",
    OURS_ON_LATENTS,
    (*parts(V, U), LEANING, *GUIDED, *ON_LATENTS.common),  # that recipe by its parts, to the bit
    ON_LATENTS.small,
)
