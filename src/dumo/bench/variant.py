"""What a step is measured with: the yardstick, a difference that is not refused, and a slope that is overheard."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from dumo.flow.slope import Along, Central, Jvp
from dumo.types import Frozen, Heads, Net, Noised, Objective, Terms, mean_square, still


@dataclass(frozen=True)
class Plain:
    """The plain flow-matching loss on every head of another objective's net: three forward units."""

    of: Objective

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401, needs, times and drop are the other's
        """As the other objective."""
        return getattr(self.of, name)

    def __iter__(self) -> Iterator[tuple[str, object]]:
        """As the other objective."""
        return iter(self.of)

    def loss(self, net: Net, ref: Frozen, b: Noised) -> Terms:
        """Every head is the velocity; knobs rest at zero."""
        needs, times = self.of.needs, {"t": b.t, "r": b.r}
        inputs = {name: times.get(name, torch.zeros_like(b.t)) for name in (*needs.inputs, *needs.knobs)}
        heads = net(b.x_t, b.c, **inputs)[: len(needs.heads)]
        return Terms(sum((mean_square(head - b.v_t) for head in heads), torch.zeros_like(b.t)))


class Unchecked(Central):
    """The difference that refuses nothing: what training refuses is measured here all the same."""

    def check(self, precision: str, time_scale: float = 1.0) -> None:
        """Nothing is refused."""


class Overheard:
    """A slope that notes what it was asked for, and what it answered."""

    def __init__(self, slope: Any) -> None:  # noqa: ANN401, any slope
        """Nothing was asked yet."""
        self.slope, self.way = slope, None
        self.asked: dict[str, Any] = {}
        self.slopes: Heads = ()

    def __call__(self, net: Net, ref: Frozen, x: Any, c: Any, **rest: Any) -> tuple[Heads, Along]:  # noqa: ANN401
        """As the slope does."""
        heads, along = self.slope(net, ref, x, c, **rest)
        if hasattr(self.slope, "way"):
            self.way = self.slope.way(net, ref, known=rest.get("toward") is not None).name

        def noted(w: Any) -> Heads:  # noqa: ANN401, a Sample
            self.asked, self.slopes = {"x": x, "c": c, "w": w, **rest}, along(w)
            return self.slopes

        return heads, noted


def judge(net: nn.Module, ref: Frozen, objective: Objective, b: Noised) -> tuple[str | None, float]:
    """The way that the objective's slope takes, and the relative error of du/dt as it enters the loss.

    The truth is `torch.func.jvp` of a float64 copy of theta^-, at the point and along the direction that the loss asked
    for, over all rows that may move.
    """
    heard, u = Overheard(dict(objective)["slope"]), objective.needs.heads.index("u")
    cast(Any, objective).model_copy(update={"slope": heard}).loss(net, ref, b)
    exact, asked = copy.deepcopy(ref.module).double(), {name: _double(a) for name, a in heard.asked.items()}
    with torch.no_grad(), torch.autocast(b.x.device.type, enabled=False):
        x, c, w = (asked.pop(name) for name in ("x", "c", "w"))
        _, along = Jvp()(exact, still(exact), x, c, **asked)
        true = along(w)[u]
    return heard.way, ((heard.slopes[u].double() - true).norm() / true.norm()).item()


def _double(a: Any) -> Any:  # noqa: ANN401, an argument of a slope
    return a.double() if isinstance(a, Tensor) and a.is_floating_point() else a
