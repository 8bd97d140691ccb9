"""What a training step is measured against: the plain flow-matching step, and the true derivative."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dumo.flow.slope import CentralSlope, JvpSlope
from dumo.types import (
    Frozen,
    Needs,
    Net,
    Noised,
    Objective,
    Reads,
    Spec,
    Terms,
    Time,
    TimeLaw,
    frozen,
    mean_square,
)


class Plain(Spec):
    """The plain flow-matching loss on every head of another objective's net: three forward units."""

    of: Any  # an objective

    @property
    def needs(self) -> Needs:
        """The net of the other objective."""
        its: Needs = self.of.needs
        return Needs(its.inputs, its.heads, its.gauges, its.knobs, its.own, formulas=its.formulas)

    @property
    def times(self) -> TimeLaw:
        """As the other objective."""
        return self.of.times

    @property
    def drop(self) -> float:
        """As the other objective."""
        return self.of.drop

    def __iter__(self) -> Iterator[tuple[str, object]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The fields of the other objective, so that the same numbers are drawn."""
        return iter(self.of)

    def loss(self, net: Net, ref: Frozen, b: Noised) -> Terms:
        """Every head is the velocity; knobs rest at zero."""
        heads = net(b.x_t, b.c, **inputs_of(self.of, b))[: len(self.of.needs.heads)]
        return Terms(sum((mean_square(head - b.v_t) for head in heads), torch.zeros_like(b.t)))

    def read(self, net: Net) -> Reads:
        """As the other objective."""
        return self.of.read(net)


class Unchecked(CentralSlope):
    """The central difference that refuses nothing: what training refuses is measured here all the same."""

    def check(self, precision: str, time_scale: float = 1.0) -> None:
        """Accept all."""


def inputs_of(objective: Objective, b: Noised) -> dict[str, Time]:
    """What a net of this objective takes by name: the times of the rows, and knobs at zero."""
    times = {"t": b.t, "r": b.r}
    return {name: times.get(name, torch.zeros_like(b.t)) for name in objective.needs.names}


def slope_error(net: nn.Module, ref: Frozen, objective: Objective, b: Noised) -> float | None:
    """The relative error of du/dt at the rows of a batch along v_t; None for an objective without a slope.

    The truth is `torch.func.jvp` of a float64 copy of theta^-. Of the two uses of a slope, with the direction known
    before the pass and after it, the worse counts.
    """
    slope, heads = objective.needs.slope, objective.needs.heads
    if slope is None:
        return None
    u, inputs = heads.index("u" if "u" in heads else heads[-1]), inputs_of(objective, b)
    exact = frozen(copy.deepcopy(ref.module).double())
    with torch.no_grad(), torch.autocast(b.x.device.type, enabled=False):
        times = {name: value.double() for name, value in inputs.items()}
        _, along = JvpSlope()(exact, exact, b.x_t.double(), b.c, **times)  # pyright: ignore[reportArgumentType]
        true = along(b.v_t.double())[u]
    errors: list[float] = []
    for toward in (b.v_t, None):
        _, along = slope(net, ref, b.x_t, b.c, toward=toward, **inputs)
        errors.append(((along(b.v_t)[u].double() - true).norm() / true.norm()).item())
    return max(errors)
