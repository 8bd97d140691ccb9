"""The training state, which checkpoints save and resumed runs restore.

`begin` creates the `State` before the first step; `dumo.run.trainer` updates it; `dumo.training.checkpoint` saves and
restores it.

The state includes a trend of the error. A loss may be weighted by its own size, and is then constant or of any sign,
but its parts are mean squares. Their sum over a batch is the error e of a step, and the level is its running geometric
mean,

    log level_n = d log level_{n-1} + (1 - d) log e_n,        d = 0.95 (our choice): about twenty steps.

A single batch with a thousand times the error multiplies the level by only 1.4. The level of a successful run
decreases, so a level far above its minimum means divergence, even if every number is finite.
"""

from dataclasses import dataclass, field
from functools import cached_property
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
# Ratio to the lowest level above which a run has diverged. Guidance, growing targets and noise cause smaller ratios.
FAR = 10.0
# Smaller errors are clamped, because their logarithms would dominate the mean.
_LEAST_ERROR = 1e-12


class Diverged(RuntimeError):  # noqa: N818, a state of the run
    """Raised for non-finite values in too many consecutive steps or in a checkpoint."""


class Trend(BaseModel):
    """The level of the error and its minimum; None before the first step."""

    model_config = ConfigDict(frozen=True)

    level: float | None = None
    lowest: float | None = None

    def after(self, error: float) -> "Trend":
        """Return the trend after a step with this error >= 0. A non-finite error is ignored."""
        # A part that is only logged may be non-finite.
        if not isfinite(error):
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
    """The training state after a step. It needs no generator state, because random numbers depend on (seed, step)."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    duration: Duration
    averages: dict[AverageKey, MovingAverage] = field(default_factory=dict[AverageKey, MovingAverage])
    # Steps done, including skipped steps.
    step: int = 0
    # Images seen, including repeats.
    images: int = 0
    # Consecutive skipped steps up to now.
    skips: int = 0
    # Trend of the error over applied steps.
    trend: Trend = field(default_factory=Trend)
    # Digest of the frozen weights (`dumo.training.frozen`); None if there are none.
    frozen: str | None = None

    @cached_property
    def trained_parameters(self) -> list[nn.Parameter]:
        """The trained weights. They are found once, because a walk over a large net takes milliseconds."""
        return [p for p in self.net.parameters() if p.requires_grad]

    @property
    def is_over(self) -> bool:
        """Whether no step is left."""
        return self.duration.is_over(self.step)

    @property
    def progress(self) -> float:
        """The completed fraction of the training, in [0, 1]."""
        return self.duration.progress(self.step)

    @property
    def sampled_net(self) -> nn.Module:
        """The net used for sampling and evaluation: the first average, or the net itself if there are no averages."""
        return next((average.module for average in self.averages.values()), self.net)


def begin(
    net: nn.Module,
    spec: Train,
    device: torch.device | None = None,
    loaders: Loaders | None = None,
    *,
    restored: bool = False,
) -> State:
    """Create the state before the first step on `device`, sharded over ranks according to the spec.

    `loaders` read the weights on the meta device; each rank keeps its shard. With `restored`, trained weights are not
    read here, because a checkpoint will be loaded. Raise UserError if all weights of the net are frozen.
    """
    if not any(p.requires_grad for p in net.parameters()):
        raise UserError("all weights of this network are frozen: set requires_grad=True on the weights to train")
    device = device or next(net.parameters()).device
    mesh = layout.mesh_of(spec.share, device)
    loaders = loaders or {}
    if mesh is None:
        load_parameters(net, loaders, device).to(device)
        loaders = {}
    frozen_digest = frozen.digest(net, loaders)
    # On several ranks an average is on the meta device until it is sharded, and then copies this rank's shard.
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
