"""Losses of a user's own: one that returns no number for each row, or draws, and one that is right."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from dumo.objectives import FlowMatching
from dumo.types import Frozen, Net, NoisyBatch, Terms


def terms(loss: Tensor) -> Terms:
    """Terms of any shape: the tests' own check of shapes would refuse them before dumo does."""
    made = object.__new__(Terms)
    for name, value in {"loss": loss, "parts": {}, "notes": {}}.items():
        object.__setattr__(made, name, value)
    return made


RETURNS: dict[str, Callable[[Terms], object]] = {
    "mean": lambda plain: terms(plain.loss.mean()),
    "column": lambda plain: terms(plain.loss[:, None]),
    "random": lambda plain: terms(plain.loss * torch.rand(8)),
}


class Returning(FlowMatching):
    """A loss that returns something else, or draws."""

    kind: Literal["unit.run.returning:Returning"] = "unit.run.returning:Returning"  # pyright: ignore
    what: str = "mean"

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Any:  # noqa: ANN401, that is the point
        return RETURNS[self.what](super().loss(net, ref, b))


class Named(FlowMatching):
    """Flow matching under a name of the user's."""

    kind: Literal["unit.run.returning:Named"] = "unit.run.returning:Named"  # pyright: ignore
