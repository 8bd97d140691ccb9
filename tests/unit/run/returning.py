"""Losses of a user's own: one that returns no number for each row, or draws, and one that is right."""

from collections.abc import Callable
from typing import Any, Literal

import torch

from dumo.objectives import FlowMatching
from dumo.types import Frozen, Net, Noised, Terms


def terms(loss: object, parts: object = None, notes: object = None) -> Terms:
    """Terms that nobody has looked at: the tests' own check of shapes would refuse them before dumo does."""
    made = object.__new__(Terms)
    for name, value in {"loss": loss, "parts": {} if parts is None else parts, "notes": notes or {}}.items():
        object.__setattr__(made, name, value)
    return made


RETURNS: dict[str, tuple[Callable[[Terms], object], str]] = {
    "scalar": (lambda plain: plain.loss.mean(), r"returned a tensor of shape \(\): return dumo\.types\.Terms\(loss,"),
    "dict": (lambda plain: {"loss": plain.loss}, r"returned a dict: .*one number per row, shape \(8,\)"),
    "mean": (lambda plain: terms(plain.loss.mean()), r"'loss' has shape \(\): give one number per row, shape \(8,\)"),
    "column": (lambda plain: terms(plain.loss[:, None]), r"'loss' has shape \(8, 1\): .*dumo\.types\.mean_square"),
    "part": (lambda plain: terms(plain.loss, {"v": plain.loss.sum()}), r"'v' has shape \(\): give one number per row"),
    "number": (lambda plain: terms(plain.loss, {"v": 0.5}), r"'v' is a float: give one number per row"),
    "list": (lambda plain: terms(plain.loss, [plain.loss]), r"Terms whose parts are a list: give a dict"),
    "detached": (lambda plain: terms(plain.loss.detach()), r"has no gradient: the pass that learns is net\(\.\.\.\)"),
    "random": (
        lambda plain: terms(plain.loss * torch.rand(8)),
        r"two losses of the same rows differ.*Needs\.laws.*b\.drawn",
    ),
}


class Returning(FlowMatching):
    """A loss that returns something else, or draws."""

    kind: Literal["unit.run.returning:Returning"] = "unit.run.returning:Returning"  # pyright: ignore
    what: str = "scalar"

    def loss(self, net: Net, ref: Frozen, b: Noised) -> Any:  # noqa: ANN401, that is the point
        return RETURNS[self.what][0](super().loss(net, ref, b))


class Named(FlowMatching):
    """Flow matching under a name of the user's."""

    kind: Literal["unit.run.returning:Named"] = "unit.run.returning:Named"  # pyright: ignore
