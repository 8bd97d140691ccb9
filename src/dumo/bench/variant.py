"""What a step is measured with beside the slopes themselves: the yardstick, and slopes with something taken away."""

import copy
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dumo.autodiff import attention
from dumo.flow.overhear import Overheard, exchanged
from dumo.flow.slope import Along, CentralSlope, DualSlope, JvpSlope
from dumo.types import Frozen, Heads, Needs, Net, Noised, Objective, Reads, Spec, Terms, TimeLaw, frozen, mean_square


class Plain(Spec):
    """The plain flow-matching loss on every head of another objective's net: three forward units."""

    of: Any  # an objective

    @property
    def needs(self) -> Needs:
        """The net of the other objective."""
        its: Needs = self.of.needs
        return Needs(its.inputs, its.heads, its.gauges, its.knobs, its.paths, its.own)

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
        needs, times = self.of.needs, {"t": b.t, "r": b.r}
        inputs = {name: times.get(name, torch.zeros_like(b.t)) for name in needs.names}
        heads = net(b.x_t, b.c, **inputs)[: len(needs.heads)]
        return Terms(sum((mean_square(head - b.v_t) for head in heads), torch.zeros_like(b.t)))

    def read(self, net: Net) -> Reads:
        """As the other objective."""
        return self.of.read(net)


class Unchecked(CentralSlope):
    """The difference that refuses nothing: what training refuses is measured here all the same."""

    def check(self, precision: str, time_scale: float = 1.0) -> None:
        """Nothing is refused."""


class Chunked(DualSlope):
    """Dual numbers whose attention goes by chunks, on a GPU that has a kernel for it."""

    def __call__(self, *args: Any, **rest: Any) -> tuple[Heads, Along]:  # noqa: ANN401, a slope's
        """As the dual slope."""
        with _without_kernel():
            heads, along = super().__call__(*args, **rest)
        return heads, _without_kernel()(along)


@contextmanager
def _without_kernel() -> Generator[None, None, None]:
    before, attention.TRITON = attention.TRITON, False
    try:
        yield
    finally:
        attention.TRITON = before


def slope_error(net: nn.Module, ref: Frozen, objective: Objective, b: Noised) -> float | None:
    """The relative error of du/dt as it enters the loss; None where the loss asks for none.

    The truth is `torch.func.jvp` of a float64 copy of theta^-, at the point and along the direction that the loss asked
    for, over all rows that may move.
    """
    slope, heads = objective.needs.slope, objective.needs.heads
    if slope is None:
        return None
    heard, u = Overheard(slope), heads.index("u" if "u" in heads else heads[-1])
    exchanged(objective, slope, heard).loss(net, ref, b)
    if not heard.asked:
        return None  # an objective may have a slope that it does not take
    exact, asked = copy.deepcopy(ref.module).double(), {name: _double(a) for name, a in heard.asked.items()}
    with torch.no_grad(), torch.autocast(b.x.device.type, enabled=False):
        x, c, w = (asked.pop(name) for name in ("x", "c", "along"))
        _, along = JvpSlope()(exact, frozen(exact), x, c, **asked)
        true = along(w)[u]
    return ((heard.slopes[u].double() - true).norm() / true.norm()).item()


def _double(a: Any) -> Any:  # noqa: ANN401, an argument of a slope
    return a.double() if isinstance(a, Tensor) and a.is_floating_point() else a
