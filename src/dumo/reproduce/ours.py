"""What beats the paper's DuMo? Ideas of ours, each by itself, at equal counted cost: on digits, and CIFAR-10 latents.

An idea is a name and what it changes in a recipe: to try another, add a line. Guidance on a part of the rows has a plan
of its own, `guidance`, for its nets must be judged otherwise.
"""

from collections.abc import Sequence
from functools import partial

from dumo.reproduce import grid
from dumo.reproduce.grid import SMALL, Arm

AVERAGES = 'train.ema=[{"decay": 0.999, "ramp": true}, {"decay": 0.99, "ramp": true}]'
TWO = (  # DuMo by its parts, which have more to choose
    "objective.kind=several",
    'objective.parts=[{"kind": "velocity"}, {"kind": "endpoint", "weight": 0.3}]',
    'objective.times={"kind": "uniform"}',
    "objective.drop=0",
    "objective.guide.zeta=0",
    "objective.slope.kind=dual",
)
IDEAS: dict[str, tuple[str, ...]] = {
    "base": (),
    "the paper's times, Beta(2.4, 2.4)": ('objective.times={"kind": "beta", "a": 2.4, "b": 2.4}',),
    **{
        f"{share:.0%} of the rows at t = 1": (
            f'objective.times={{"kind": "atom", "of": {{"kind": "uniform"}}, "share": {share}}}',
        )
        for share in (0.05, 0.15, 0.25)
    },
    "θ⁻ an average, 0.99": (AVERAGES, "train.ref=0.99"),
    "θ⁻ an average, 0.999": ("train.ref=0.999",),
    "exact slope in bf16": ("train.precision=bf16",),
    "EDM's preconditioning": ("net.precondition=edm",),
    "du/dt along the net's own v": (*TWO, "objective.along=velocity"),
    "u grows from v, 10 % of training": (*TWO, "objective.ramp=0.1"),
    "u grows from v, 50 % of training": (*TWO, "objective.ramp=0.5"),
}


def arms(recipe: str, scale: str) -> Sequence[Arm]:
    """The recipe as it is, and with every idea."""
    judged = ("evaluate.nfe=[1,2]", "evaluate.contrast=[]")
    return [
        Arm(f"{recipe}-{number}", recipe, (*sets, *judged), {"idea": name})
        for number, (name, sets) in enumerate(IDEAS.items())
    ]


def plan(title: str, stem: str, recipe: str, small: Sequence[str], seeds: int, steps: int) -> grid.Plan:
    """The ideas on a recipe, whose `steps` are few enough for half an hour on two cores."""
    why = "these are ideas of ours, and the paper's net takes days"
    return grid.comparison(title, stem, partial(arms, recipe), seeds=seeds, small=small, steps=steps, unpublished=why)


DIGITS = plan("Ideas of ours on digits, at equal counted cost", "ours", "digits", SMALL, 3, 2000)
LATENTS = plan(
    "Ideas of ours on CIFAR-10 latents, at equal counted cost", "ours-latents", "cifar10-latents", grid.LATENTS, 2, 600
)
