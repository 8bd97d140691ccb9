"""Moving averages of the weights.

With decay d, the average after update n is a_n = d a_{n-1} + (1 - d) w_n. The untrained start a_0 still weighs d^n:
for d = 0.9999 that is 37 % after 10,000 updates. With the ramp d_n = min(d, (1 + n) / (10 + n)) the start weighs

    prod_{k <= n} (1 + k) / (10 + k) = 10! / ((n + 2) ... (n + 10)),

which is below 1e-6 after 19 updates, and the weights that are averaged are n / 10 updates old in the mean, until n
reaches (10 d - 1) / (1 - d). The ramp is TensorFlow's (`tf.train.ExponentialMovingAverage`).
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dumo.training.frozen import copied
from dumo.types import Spec


class Ema(Spec):
    """How fast the average forgets. The paper takes 0.9999 (App. C.1) and names no ramp; the ramp is ours."""

    decay: float = Field(gt=0, lt=1)
    ramp: bool = True

    def __call__(self, n: int) -> float:
        """The decay of update n, the first of which is n = 1."""
        return min(self.decay, (1 + n) / (10 + n)) if self.ramp else self.decay


Kind = Literal["_parameters", "_buffers"]
Place = tuple[dict[str, Any], str]  # where a module keeps a tensor: its table, and the name there


class MovingAverage:
    """A running copy of a net: same class, same buffers, averaged parameters, no gradients, in evaluation mode.

    What is not trained is the net's own (`dumo.training.frozen`), so of a net of which 1 % is trained it takes 1 %.
    """

    def __init__(self, spec: Ema, net: nn.Module) -> None:
        """Start from the net as it is."""
        self.spec = spec
        self.module = copied(net).requires_grad_(False).eval()
        self._known: tuple[nn.Module, list[list[Place]]] | None = None

    @torch.no_grad()
    def update(self, net: nn.Module, n: int) -> None:
        """Move towards the net, in place; n counts updates from 1. Buffers are copied, not averaged."""
        own, given, own_buffers, given_buffers = ([table[name] for table, name in p] for p in self._places(net))
        move = get_ema_multi_avg_fn(self.spec(n))  # all parameters at once
        move(own, given, n)
        for mine, new in zip(own_buffers, given_buffers, strict=True):
            mine.copy_(new)

    def _places(self, net: nn.Module) -> list[list[Place]]:
        """Where parameters and buffers lie, in this net and that: looked up once, for it takes longer than a small
        net's update. Not the tensors, in whose places sharding puts others.
        """
        if self._known is None or self._known[0] is not net:
            self._known = net, [*unshared(self.module, net, "_parameters"), *unshared(self.module, net, "_buffers")]
        return self._known[1]


def unshared(copy: nn.Module, net: nn.Module, kind: Kind) -> list[list[Place]]:
    """Where a copy keeps what it does not share with the net, and where the net does."""
    pairs = zip(places(copy, kind), places(net, kind), strict=True)
    own = [pair for pair in pairs if len({id(table[name]) for table, name in pair}) == 2]
    return [[mine for mine, _ in own], [its for _, its in own]]


def places(net: nn.Module, kind: Kind) -> list[Place]:
    """Where a net keeps its parameters or its buffers, in their order; one that is shared, once."""
    found: dict[int, Place] = {}
    for module in net.modules():
        table: dict[str, Any] = getattr(module, kind)
        for name, tensor in table.items():
            if tensor is not None:
                found.setdefault(id(tensor), (table, name))
    return list(found.values())
