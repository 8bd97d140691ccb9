"""What a step is measured with beside the slopes themselves: the yardstick, and slopes with something taken away."""

import copy
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from dumo.autodiff import attention
from dumo.flow.law import LAWS
from dumo.flow.slope import Along, CentralSlope, DualSlope, JvpSlope
from dumo.types import Frozen, Heads, Needs, Net, Noised, Objective, Reads, Terms, Time, frozen, mean_square


@dataclass(frozen=True)
class Plain:
    """The plain flow-matching loss on every head of another objective's net: three forward units."""

    of: Objective

    @property
    def needs(self) -> Needs:
        """As the other objective."""
        return self.of.needs

    @property
    def times(self) -> Callable[[int, torch.Generator], tuple[Time, Time]]:
        """As the other objective."""
        return self.of.times

    @property
    def drop(self) -> float:
        """As the other objective."""
        return self.of.drop

    def __iter__(self) -> Iterator[tuple[str, object]]:
        """The laws of the other objective, so that the same numbers are drawn."""
        return ((name, law) for name, law in self.of if isinstance(law, LAWS))

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


class Overheard:
    """A slope that notes what it was asked for, and what it answered."""

    def __init__(self, slope: Any) -> None:  # noqa: ANN401, any slope
        """Nothing was asked yet."""
        self.slope = slope
        self.asked: dict[str, Any] = {}
        self.slopes: Heads = ()

    def __call__(self, net: Net, ref: Frozen, x: Any, c: Any, **rest: Any) -> tuple[Heads, Along]:  # noqa: ANN401
        """As the slope does."""
        heads, along = self.slope(net, ref, x, c, **rest)

        def noted(w: Any) -> Heads:  # noqa: ANN401, a Sample
            self.asked, self.slopes = {"x": x, "c": c, "along": w, **rest}, along(w)
            return self.slopes

        return heads, noted


def slope_error(net: nn.Module, ref: Frozen, objective: Objective, b: Noised) -> float | None:
    """The relative error of du/dt as it enters the loss; None where the loss asks for none.

    The truth is `torch.func.jvp` of a float64 copy of theta^-, at the point and along the direction that the loss asked
    for, over all rows that may move.
    """
    heard, heads = Overheard(dict(objective)["slope"]), objective.needs.heads
    u = heads.index("u" if "u" in heads else heads[-1])
    cast(Any, objective).model_copy(update={"slope": heard}).loss(net, ref, b)
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
