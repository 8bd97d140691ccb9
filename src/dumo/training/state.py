"""All that training changes: what a checkpoint holds, and a resumed run needs.

`begin` makes the `State` before the first step; `dumo.run.trainer` changes it; `dumo.training.checkpoint` saves and
restores it.

The trend of the error is part of it. A loss may be weighted by its own size, and is then constant or of any sign; its
parts are mean squares. Their sum over a batch is the error e of a step, and the level a running geometric mean of it,

    log level_n = d log level_{n-1} + (1 - d) log e_n,        d = 0.95, ours: about twenty steps.

A single batch that is a thousand times worse multiplies the level by only 1.4. A run that learns ends below where it
began, so a level far above the lowest means that it diverged, though every number is finite.
"""

from dataclasses import dataclass, field
from math import exp, isfinite, log

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from dumo.io.deferred import Loaders, load_parameters
from dumo.training import frozen, layout
from dumo.training.duration import Duration
from dumo.training.eightbit import AdamW8bitOptimizer
from dumo.training.ema import AverageKey, MovingAverage
from dumo.training.settings import Train
from dumo.types import UserError

# Our choice, not from the paper.
DECAY = 0.95  # d
FAR = 10.0  # times the lowest level: guidance, growing targets and noise move it less
_LEAST_ERROR = 1e-12  # smaller errors count as this one, because their logarithms would say nothing


class Diverged(RuntimeError):  # noqa: N818, a state of the run
    """Values are not finite: of too many steps in a row, or in a checkpoint."""


class Trend(BaseModel):
    """The level of the error, and its lowest; None before the first step."""

    model_config = ConfigDict(frozen=True)

    level: float | None = None
    lowest: float | None = None

    def after(self, error: float) -> "Trend":
        """The trend after one more step, of this error >= 0; unchanged if the error is not finite."""
        if not isfinite(error):  # a part that is only logged may be so
            return self
        error = max(error, _LEAST_ERROR)
        level = error if self.level is None else exp(DECAY * log(self.level) + (1 - DECAY) * log(error))
        lowest = level if self.lowest is None else min(level, self.lowest)
        return Trend(level=level, lowest=lowest)

    @property
    def is_good(self) -> bool:
        """Whether the level is within FAR of the lowest."""
        return self.level is None or self.lowest is None or self.level <= FAR * self.lowest


@dataclass
class State:
    """The state of a training after a step. It holds no generator state: every draw is keyed by (seed, step)."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    duration: Duration  # how long it trains, and how far it is by the clock
    averages: dict[AverageKey, MovingAverage] = field(default_factory=dict[AverageKey, MovingAverage])
    step: int = 0  # steps done, skipped ones included
    images: int = 0  # images seen, repeats counted
    skips: int = 0  # skipped steps in a row, up to now
    trend: Trend = field(default_factory=Trend)  # of the error, over steps that were applied
    frozen: str | None = None  # the digest of the frozen weights (`dumo.training.frozen`); None: there are none

    @property
    def is_over(self) -> bool:
        """Whether no step is left."""
        return self.duration.is_over(self.step)

    @property
    def progress(self) -> float:
        """How much of the training is over, in [0, 1]."""
        return self.duration.progress(self.step)

    @property
    def sampled_net(self) -> nn.Module:
        """The net that is sampled and evaluated: the first average, or the net itself without one."""
        return next((average.module for average in self.averages.values()), self.net)


def begin(
    net: nn.Module,
    spec: Train,
    device: torch.device | None = None,
    loaders: Loaders | None = None,
    *,
    restored: bool = False,
) -> State:
    """The state before the first step, on `device`; over several ranks it is sharded as the spec says.

    `loaders` reads the weights that are on the meta device; each rank keeps its part. `restored`: trained weights are
    read from a checkpoint later, so they are not read here. Raises UserError if all weights of the net are frozen.
    """
    if not any(p.requires_grad for p in net.parameters()):
        raise UserError("all weights of this net are frozen, so there is nothing to train: let it train some")
    device = device or next(net.parameters()).device
    mesh = layout.mesh_of(spec.share, device)
    loaders = loaders or {}
    if mesh is None:
        load_parameters(net, loaders, device).to(device)
        loaders = {}
    frozen_digest = frozen.digest(net, loaders)
    # Over ranks an average has no values before it is sharded, when it takes this rank's part of the net.
    copied = layout.meta_copy(net) if mesh else net
    averages = {ema.key: MovingAverage(ema, copied) for ema in spec.ema}
    layout.shard(
        net,
        mesh,
        [average.module for average in averages.values()],
        loaders,
        reshard=spec.reshard,
        restored=restored,
        in_bfloat16=spec.weights == "bfloat16",
    )
    optimizer = spec.optimizer(net)
    if isinstance(optimizer, AdamW8bitOptimizer):
        optimizer.seed = spec.seed
    return State(net, optimizer, Duration.of(spec), averages, frozen=frozen_digest)
