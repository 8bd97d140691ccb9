"""Moving averages of the weights: exponential (`Ema`) or power function (`PowerEma`), updated by `MovingAverage`.

With decay d, the average after update n is a_n = d a_{n-1} + (1 - d) w_n. The untrained weights a_0 keep the weight
d^n: for d = 0.9999 that is 37 % after 10,000 updates. With the ramp d_n = min(d, (1 + n) / (10 + n)) it is

    prod_{k <= n} (1 + k) / (10 + k) = 10! / ((n + 2) ... (n + 10)),

which is below 1e-6 after 19 updates, and the mean age of the averaged weights is n / 10 updates until n reaches
(10 d - 1) / (1 - d). The ramp is TensorFlow's (`tf.train.ExponentialMovingAverage`).

A power function average (EDM2: Karras et al. 2024, Sec. 3.1) covers a fixed fraction of the run, whatever its length.
After update n the weights w_k, k <= n, have as weight the integral from k - 1 to k of the profile

    p(tau) = (gamma + 1) tau^gamma / n^(gamma + 1),   0 <= tau <= n,

and a_0 has weight 0. This is the recursion with d_n = (1 - 1/n)^(gamma + 1).

In a run n is the step. Skipped steps count without an update, so the weights then deviate slightly from these formulas;
if the first step is skipped, a_0 has a positive weight.
"""

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Discriminator, Field, Tag
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dumo.flow.precision import HALVES, to_float32
from dumo.training.frozen import copy_net
from dumo.types import Spec

# Identifies an average of a run: its decay, or "std-" and its std.
AverageKey = float | str
# The std of the uniform average, gamma = 0.
WIDEST = 12**-0.5


class Ema(Spec):
    """An exponential average. The paper takes a decay of 0.9999 (App. C.1) and has no ramp; the ramp is ours."""

    kind: Literal["exponential"] = Field(default="exponential", exclude_if=lambda kind: kind == "exponential")
    # 1 keeps the initial weights, as theta^- of a second stage.
    decay: float = Field(gt=0, le=1)
    ramp: bool = True

    def __call__(self, n: int) -> float:
        """The decay of update n, the first of which is n = 1."""
        if self.ramp and self.decay < 1:
            return min(self.decay, (1 + n) / (10 + n))
        return self.decay

    @property
    def key(self) -> AverageKey:
        """The key of this average: its decay."""
        return self.decay


class PowerEma(Spec):
    """An average by a power: `std` is the standard deviation of p in units of n. EDM2 has 0.05 and 0.1 (Sec. 3.2)."""

    kind: Literal["power"] = "power"
    std: float = Field(gt=0, lt=WIDEST)

    def __call__(self, n: int) -> float:
        """The decay of update n, the first of which is n = 1."""
        return (1 - 1 / n) ** (exponent(self.std) + 1)

    @property
    def key(self) -> AverageKey:
        """The key of this average: "std-" and its std."""
        return f"std-{self.std}"


def _kind_of(average: object) -> str:
    """Return the kind of an average, by default exponential."""
    kind: object = average.get("kind") if isinstance(average, Mapping) else getattr(average, "kind", None)
    return str(kind or "exponential")


Average = Annotated[Annotated[Ema, Tag("exponential")] | Annotated[PowerEma, Tag("power")], Discriminator(_kind_of)]


@cache
def exponent(std: float) -> float:
    """Solve std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) for gamma > 0 (EDM2, Alg. 2), for std in (0, WIDEST)."""
    roots = np.roots([1, 7, 16 - std**-2, 12 - std**-2])
    return float(max(root.real for root in roots))


class MovingAverage:
    """A copy of a net with averaged parameters and the same buffers, without gradients, in evaluation mode.

    It shares frozen weights with the net (`dumo.training.frozen`), so it needs memory only for trained weights.
    """

    def __init__(self, spec: Average, net: nn.Module) -> None:
        """Start with a copy of the net."""
        self.spec = spec
        self.module = copy_net(net).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, net: nn.Module, n: int) -> None:
        """Update the average in place after step n, counted from 1 with skipped steps. Buffers are copied."""
        # Skip frozen weights, which are shared with the net.
        averages: list[Tensor] = []
        weights: list[Tensor] = []
        for average, weight in zip(self.module.parameters(), net.parameters(), strict=True):
            if average is not weight:
                averages.append(average)
                weights.append(weight)
        move = get_ema_multi_avg_fn(self.spec(n))
        if any(weight.dtype in HALVES for weight in weights):
            # Update one tensor at a time, to limit the memory of float32 copies.
            for average, weight in zip(averages, weights, strict=True):
                move([average], [to_float32(weight)], n)
        else:
            move(averages, weights, n)
        for average, buffer in zip(self.module.buffers(), net.buffers(), strict=True):
            if average is not buffer:
                average.copy_(buffer)
