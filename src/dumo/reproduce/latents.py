"""CIFAR-10 in the latents of a small autoencoder: every objective at equal counted cost, on a CPU within half an hour.

The features of the distances are those of the shipped classifier, so none of these numbers is an FID.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dumo.reproduce import zoo
from dumo.reproduce.plan import Cell, Finished, Plan

RECIPES = {
    "DuMo": "cifar10-latents",
    "MeanFlow": "cifar10-latents-meanflow",
    "Flow matching": "cifar10-latents-flow-matching",
}
SMOKE = [  # a thousand other images, that are encoded in seconds
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
]


def cells(scale: str) -> Iterator[Cell]:
    """Every objective on one net, each with as many steps as cost what DuMo's recipe costs."""
    return zoo.siblings(RECIPES, SMOKE if scale == "smoke" else [], scale, passes=(1, 2))


def table(done: list[Finished]) -> list[dict[str, Any]]:
    """A row per objective and number of passes: means over seeds, and the sd of both distances."""
    return zoo.rows(RECIPES, done)


def draw(done: list[Finished], folder: Path) -> list[Path]:
    """One sheet of one-step samples per objective, first seed."""
    return zoo.sheets(RECIPES, done, folder)


PLAN = Plan("Every objective on CIFAR-10 latents at equal counted cost", cells, table, draw)
