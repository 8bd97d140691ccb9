"""CIFAR-10 in the latents of a small autoencoder: three objectives at equal counted cost, on a CPU within half an hour.

The features of the distances are those of the shipped classifier, so none of these numbers is an FID.
"""

from collections.abc import Sequence

from dumo.reproduce import arm
from dumo.reproduce.arm import Arm

RECIPES = {
    "DuMo": "cifar10-latents",
    "MeanFlow": "cifar10-latents-meanflow",
    "Flow matching": "cifar10-latents-flow-matching",
}


def arms(scale: str) -> Sequence[Arm]:
    """By title."""
    return [Arm(recipe, recipe, ("evaluate.nfe=[1,2]",), {"objective": title}) for title, recipe in RECIPES.items()]


PLAN = arm.comparison(
    "Every objective on CIFAR-10 latents at equal counted cost",
    "latents",
    arms,
    seeds=3,
    small=arm.LATENTS,
    samples=True,
    unpublished="the paper trains on CIFAR-10 in pixels, which is tab2",
)
