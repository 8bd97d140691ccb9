"""A network that sees little, and does so in no time."""

from typing import NamedTuple

import torch
from torch import Tensor

from dumo.flow.draw import stream

WIDTH, NARROW, CLASSES = 6, 4, 5


class Glance(NamedTuple):
    """What Inception's pass gives that a tally reads."""

    pool: Tensor
    spatial: Tensor
    logits: Tensor


def eye(images: Tensor) -> Glance:
    """Fixed random functions of the first 2 x 2 pixels: of whole numbers, so that no batch rounds them otherwise."""
    assert images.dtype == torch.uint8
    x = images[:, :, :2, :2].flatten(1).float()
    weights = torch.randint(-9, 10, (x.shape[1], WIDTH + NARROW + CLASSES), generator=stream("eye")).float()
    return Glance(*(x @ weights / 1024).split([WIDTH, NARROW, CLASSES], 1))


def images(n: int, key: str = "images") -> Tensor:
    """Colours at random, 4 x 4 pixels."""
    return torch.randint(256, (n, 3, 4, 4), generator=stream(key), dtype=torch.uint8)
