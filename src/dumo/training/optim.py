"""Optimizers and learning rate schedules, as values.

An optimizer spec holds the peak learning rate. A schedule is a pure function of (step, steps) to a factor in [0, 1],
so the rate of a step never depends on how the run got there, and a resumed run needs no scheduler state.
"""

import math
from collections.abc import Iterable
from typing import Annotated, ClassVar, Generic, Literal, TypeVar

import torch
from pydantic import Field
from torch import nn

from dumo.bound import FACTOR, STEPS
from dumo.types import CHANGES, Spec

Kind = TypeVar("Kind", bound=str)
LearningRate = Annotated[float, Field(gt=0, le=FACTOR, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, le=FACTOR, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Adaptive(Spec, Generic[Kind]):
    """A step per parameter, of two moments of its gradient. The defaults are the paper's (Sec. 4.1); eps is torch's."""

    of: ClassVar[type[torch.optim.Adam | torch.optim.RAdam]]
    fuses: ClassVar[bool] = True  # whether torch has it in one kernel
    kind: Kind
    lr: LearningRate = Field(default=1e-4, json_schema_extra=CHANGES)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: Decay = 0.0
    eps: LearningRate = 1e-8

    def __call__(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of these parameters: on a GPU in one kernel, which rounds in another order than a CPU's."""
        params = list(params)
        fused = {"fused": True} if self.fuses and all(p.is_cuda for p in params) else {}
        return self.of(params, self.lr, self.betas, self.eps, self.weight_decay, **fused)


class AdamW(Adaptive[Literal["adamw"]]):
    """Adam with decoupled weight decay (arXiv 1711.05101)."""

    of = torch.optim.AdamW
    kind: Literal["adamw"] = "adamw"


class Adam(Adaptive[Literal["adam"]]):
    """Adam (arXiv 1412.6980); weight decay is added to the gradient."""

    of = torch.optim.Adam
    kind: Literal["adam"] = "adam"


class RAdam(Adaptive[Literal["radam"]]):
    """Adam with a rectified first phase (arXiv 1908.03265); weight decay as in `Adam`."""

    of = torch.optim.RAdam
    fuses = False
    kind: Literal["radam"] = "radam"


Optimizer = Annotated[AdamW | Adam | RAdam, Field(discriminator="kind")]


class Constant(Spec):
    """Full rate after the warm-up. Without one it is the paper's schedule (App. C.1)."""

    kind: Literal["constant"] = "constant"
    warmup: int = Field(default=0, ge=0, le=STEPS)  # steps

    def __call__(self, step: int, steps: int) -> float:
        """The factor of the update that follows `step` done ones; `steps` does not matter."""
        return climb(step, self.warmup)


class Cosine(Spec):
    """Half a cosine from full rate at the end of the warm-up down to `floor` (arXiv 1608.03983, without restarts)."""

    kind: Literal["cosine"] = "cosine"
    warmup: int = Field(default=0, ge=0, le=STEPS)  # steps
    floor: float = Field(default=0.0, ge=0, le=1)  # the factor at the end

    def __call__(self, step: int, steps: int) -> float:
        """The factor of the update that follows `step` done ones, of `steps` in all."""
        done = (step - self.warmup) / max(1, steps - self.warmup)
        fall = (1 + math.cos(math.pi * min(max(done, 0.0), 1.0))) / 2
        return climb(step, self.warmup) * (self.floor + (1 - self.floor) * fall)


Schedule = Annotated[Constant | Cosine, Field(discriminator="kind")]


def climb(step: int, warmup: int) -> float:
    """Linear warm-up: 1/warmup at the first update, 1 from the last one of the warm-up on."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0
