"""What beats the paper's DuMo? Ideas of ours, each by itself, at equal counted cost: on digits, and CIFAR-10 latents.

An idea is a name and what it changes in a recipe: to try another, add a line. Guidance on a part of the rows has a plan
of its own, `guidance`, for its nets must be judged otherwise.
"""

import json
from collections.abc import Sequence
from functools import partial

from dumo.reproduce import arm
from dumo.reproduce.arm import SMALL, Arm
from dumo.reproduce.ours import fair
from dumo.reproduce.ours.fair import LAWS, LOW, UNIFORM

AVERAGES = 'train.ema=[{"decay": 0.999, "ramp": true}, {"decay": 0.99, "ramp": true}]'
TWO = (  # DuMo by its parts, which have more to choose
    "objective.kind=several",
    'objective.parts=[{"kind": "velocity"}, {"kind": "endpoint", "weight": 0.3}]',
    'objective.times={"kind": "uniform"}',
    "objective.drop=0",
    "objective.guide.zeta=0",
    "objective.slope.kind=dual",
)
AVERAGE = (  # u is MeanFlow's head, told r, which is 0 on a quarter of the rows and t on the others
    'objective.parts=[{"kind": "velocity"}, {"kind": "average", "weight": 0.3}]',
    'sample.solver={"kind": "restart", "m": 0.5}',
)


def quarter(law: str) -> str:
    """A law of which three rows of four have no jump, and the others one to the data."""
    return f"objective.times={json.dumps(fair.times(law, 'to data', 'a quarter'))}"


TIMES, QUARTER = "MeanFlow's times, logit-normal(-0.4, 1)", "jumps on a quarter of the rows"
BOTH, ALONG = "MeanFlow's times, jumps on a quarter", "du/dt along the net's own v"
IDEAS: dict[str, tuple[str, ...]] = {
    "base": (),
    "the paper's times, Beta(2.4, 2.4)": ('objective.times={"kind": "beta", "a": 2.4, "b": 2.4}',),
    TIMES: (f"objective.times={json.dumps(LAWS[LOW])}",),
    QUARTER: (*TWO, *AVERAGE, quarter(UNIFORM)),
    BOTH: (*TWO, *AVERAGE, quarter(LOW)),
    **{
        f"{share:.0%} of the rows at t = 1": (
            f'objective.times={{"kind": "atom", "of": {{"kind": "uniform"}}, "share": {share}}}',
        )
        for share in (0.15, 0.25)
    },
    "θ⁻ an average, 0.99": (AVERAGES, "train.ref=0.99"),
    "exact slope in bf16": ("train.precision=bf16",),
    "EDM's preconditioning": ("net.precondition=edm",),
    ALONG: (*TWO, "objective.along=velocity"),
    "u grows from v, 10 % of training": (*TWO, "objective.ramp=0.1"),
}


FOLLOWED = ("base", TIMES, QUARTER, BOTH, ALONG)  # of those, on latents too: what was no worse on digits


def arms(recipe: str, ideas: Sequence[str], scale: str) -> Sequence[Arm]:
    """The recipe as it is, and with each of these ideas."""
    judged = ("evaluate.nfe=[1,2]", "evaluate.contrast=[]")
    return [
        Arm(f"{recipe}-{number}", recipe, (*IDEAS[name], *judged), {"idea": name}) for number, name in enumerate(ideas)
    ]


def plan(
    title: str, stem: str, recipe: str, ideas: Sequence[str], small: Sequence[str], *, seeds: int, steps: int
) -> arm.Plan:
    """Ideas on a recipe, whose `steps` are few enough for half an hour on two cores."""
    why, make = "these are ideas of ours, and the paper's net takes days", partial(arms, recipe, ideas)
    return arm.comparison(title, stem, make, seeds=seeds, small=small, steps=steps, unpublished=why)


DIGITS = plan(
    "Ideas of ours on digits, at equal counted cost", "ours", "digits", tuple(IDEAS), SMALL, seeds=3, steps=2000
)
LATENTS = plan(
    "Ideas of ours on CIFAR-10 latents, at equal counted cost",
    "ours-latents",
    "cifar10-latents",
    FOLLOWED,
    arm.LATENTS,
    seeds=2,
    steps=600,
)
