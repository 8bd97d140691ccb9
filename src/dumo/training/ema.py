"""Moving averages of the weights.

With decay d, the average after update n is a_n = d a_{n-1} + (1 - d) w_n. The untrained start a_0 still weighs d^n:
for d = 0.9999 that is 37 % after 10,000 updates. With the ramp d_n = min(d, (1 + n) / (10 + n)) the start weighs

    prod_{k <= n} (1 + k) / (10 + k) = 10! / ((n + 2) ... (n + 10)),

which is below 1e-6 after 19 updates, and the weights that are averaged are n / 10 updates old in the mean, until n
reaches (10 d - 1) / (1 - d). The ramp is TensorFlow's (`tf.train.ExponentialMovingAverage`).

An average by a power (EDM2: Karras et al. 2024, Sec. 3.1) looks back over a fixed share of the run, at any length.
After update n the weights w_k, k <= n, count as the integral from k - 1 to k of its profile

    p(tau) = (gamma + 1) tau^gamma / n^(gamma + 1),   0 <= tau <= n,

and the start not at all: that is the recursion with d_n = (1 - 1/n)^(gamma + 1). Snapshots of such averages give
others after training (`dumo.run.average`).
"""

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Discriminator, Field, Tag
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dumo.flow.precision import HALVES, single
from dumo.training.frozen import copied
from dumo.types import Spec

Key = float | str  # of one of a run's averages: its decay, or the name of its width
WIDEST = 12**-0.5  # the width of the plain mean, gamma = 0


class Ema(Spec):
    """An exponential average. The paper takes a decay of 0.9999 (App. C.1) and has no ramp; the ramp is ours."""

    kind: Literal["exponential"] = Field(default="exponential", exclude_if=lambda kind: kind == "exponential")
    decay: float = Field(gt=0, le=1)  # 1: stays at the first weights, theta^- of a second stage
    ramp: bool = True

    def __call__(self, n: int) -> float:
        """The decay of update n, the first of which is n = 1."""
        return min(self.decay, (1 + n) / (10 + n)) if self.ramp and self.decay < 1 else self.decay

    @property
    def key(self) -> Key:
        """Its decay."""
        return self.decay


class PowerEma(Spec):
    """An average by a power: `std` is the standard deviation of p in units of n. EDM2 has 0.05 and 0.1 (Sec. 3.2)."""

    kind: Literal["power"] = "power"
    std: float = Field(gt=0, lt=WIDEST)

    def __call__(self, n: int) -> float:
        """The decay of update n, the first of which is n = 1."""
        return (1 - 1 / n) ** (exponent(self.std) + 1)

    @property
    def key(self) -> Key:
        """The name of its width."""
        return f"std-{self.std}"


def kind_of(average: object) -> str:
    """The kind of an average: exponential by default."""
    kind: object = average.get("kind") if isinstance(average, Mapping) else getattr(average, "kind", None)
    return str(kind or "exponential")


Average = Annotated[Annotated[Ema, Tag("exponential")] | Annotated[PowerEma, Tag("power")], Discriminator(kind_of)]


@cache
def exponent(std: float) -> float:
    """The gamma of a width: std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (EDM2, Alg. 2), in (0, inf).

    `std` lies in (0, WIDEST).
    """
    roots = np.roots([1, 7, 16 - std**-2, 12 - std**-2])
    return float(max(root.real for root in roots))


Kind = Literal["_parameters", "_buffers"]
Place = tuple[dict[str, Any], str]  # a module's table of tensors, and a name in it


class MovingAverage:
    """A copy of a net with averaged parameters and the same buffers, without gradients, in evaluation mode.

    It shares frozen weights with the net (`dumo.training.frozen`): where 1 % is trained it takes 1 % of the memory.
    """

    def __init__(self, spec: Average, net: nn.Module) -> None:
        """Copy the net."""
        self.spec = spec
        self.module = copied(net).requires_grad_(False).eval()
        self._known: tuple[nn.Module, list[list[Place]]] | None = None

    @torch.no_grad()
    def update(self, net: nn.Module, n: int) -> None:
        """Move towards the net, in place; n counts updates from 1. Buffers are copied, not averaged."""
        own, given, own_buffers, given_buffers = ([table[name] for table, name in p] for p in self._places(net))
        move = get_ema_multi_avg_fn(self.spec(n))
        if any(x.dtype in HALVES for x in given):  # of another type: one by one, so that few are in float32
            for mine, its in zip(own, given, strict=True):
                move([mine], [single(its)], n)
        else:
            move(own, given, n)
        for mine, new in zip(own_buffers, given_buffers, strict=True):
            mine.copy_(new)

    def _places(self, net: nn.Module) -> list[list[Place]]:
        """The places of parameters and buffers in both nets, looked up once: that takes longer than a small update.

        Places and not tensors, since sharding replaces those.
        """
        if self._known is None or self._known[0] is not net:
            self._known = net, [*unshared(self.module, net, "_parameters"), *unshared(self.module, net, "_buffers")]
        return self._known[1]


def unshared(copy: nn.Module, net: nn.Module, kind: Kind) -> list[list[Place]]:
    """The places, in a copy and in the net, of the tensors that the two do not share."""
    pairs = zip(places(copy, kind), places(net, kind), strict=True)
    own = [pair for pair in pairs if len({id(table[name]) for table, name in pair}) == 2]
    return [[mine for mine, _ in own], [its for _, its in own]]


def places(net: nn.Module, kind: Kind) -> list[Place]:
    """The places of a net's parameters or buffers, in order; a tensor in two places counts once."""
    found: dict[int, Place] = {}
    for module in net.modules():
        table: dict[str, Any] = getattr(module, kind)
        for name, tensor in table.items():
            if tensor is not None:
                found.setdefault(id(tensor), (table, name))
    return list(found.values())
