"""Learning rate schedules, as values of a run: the field `train.schedule`.

A schedule (`Constant`, `Cosine`, `WSD`) is a pure function of (step, steps) to a factor in [0, 1] of every rate, so a
resumed run needs no scheduler state. A run that ends by the clock (`dumo.training.duration`) calls it with a share of
the steps.
"""

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from dumo.runtime.limits import STEPS
from dumo.types import Spec


class Constant(Spec):
    """Full rate after the warm-up. Without one it is the paper's schedule (App. C.1)."""

    kind: Literal["constant"] = "constant"
    warmup: int = Field(default=0, ge=0, le=STEPS)  # steps

    def __call__(self, step: float, steps: int) -> float:
        """The factor of the update that follows `step` done ones; `steps` does not matter."""
        return _warmup_factor(step, self.warmup)


class Cosine(Spec):
    """Half a cosine from full rate at the end of the warm-up down to none (arXiv 1608.03983, without restarts)."""

    kind: Literal["cosine"] = "cosine"
    warmup: int = Field(default=0, ge=0, le=STEPS)  # steps

    def __call__(self, step: float, steps: int) -> float:
        """The factor of the update that follows `step` done ones, of `steps` in all."""
        progress = (step - self.warmup) / max(1, steps - self.warmup)
        progress = min(max(progress, 0.0), 1.0)
        return _warmup_factor(step, self.warmup) * (1 + math.cos(math.pi * progress)) / 2


class WSD(Spec):
    """Warm-up, stable, decay (MiniCPM, Hu et al. 2024): full rate up to the last fifth of the steps, then down.

    A run of more steps is the same up to where this one decays: to continue it, resume from a checkpoint before, with
    more steps. Share and shape of the decay are Hägele et al.'s (2024, Sec. 4): a fifth, as 1 - sqrt.
    """

    DECAY: ClassVar[float] = 0.2  # share of the steps
    kind: Literal["wsd"] = "wsd"
    warmup: int = Field(default=0, ge=0, le=STEPS)  # steps

    def __call__(self, step: float, steps: int) -> float:
        """The factor of the update that follows `step` done ones, of `steps` in all."""
        start = max(self.warmup, (1 - self.DECAY) * steps)
        progress = (step - start) / max(1, steps - start)  # of the decay
        progress = min(max(progress, 0.0), 1.0)
        return _warmup_factor(step, self.warmup) * (1 - math.sqrt(progress))


LearningRateSchedule = Annotated[Constant | Cosine | WSD, Field(discriminator="kind")]


def _warmup_factor(step: float, warmup: int) -> float:
    """Linear warm-up: 1/warmup at the first update, 1 from the end of the warm-up on."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0
