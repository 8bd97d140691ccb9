"""All that training changes: what a checkpoint holds, and a resumed run needs."""

from dataclasses import dataclass, field

import torch
from torch import nn

from dumo.training import frozen, layout
from dumo.training.ema import Key, MovingAverage
from dumo.training.spec import Train
from dumo.training.trend import Trend
from dumo.types import UserError


class Diverged(RuntimeError):  # noqa: N818, a state of the run
    """What is trained is no longer a number: too many steps in a row, or what was to be saved."""


@dataclass
class State:
    """A run between two steps. No generator state: every draw is keyed by (seed, step)."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    averages: dict[Key, MovingAverage] = field(default_factory=dict[Key, MovingAverage])
    step: int = 0  # steps done, skipped ones included
    images: int = 0  # images seen, repeats counted
    skips: int = 0  # the last steps in a row that were skipped
    trend: Trend = field(default_factory=Trend)  # of the error, over the steps that were not
    frozen: str | None = None  # the digest of what is not trained (`dumo.training.frozen`); None: all is

    @property
    def shown(self) -> nn.Module:
        """The net that is sampled and evaluated: the first average, or the net itself where there is none."""
        return next((average.module for average in self.averages.values()), self.net)


def begin(net: nn.Module, spec: Train, device: torch.device | None = None) -> State:
    """The state before the first step; on several ranks spread over them, as the spec says, each on its `device`.

    Raises UserError where all weights of the net are frozen.
    """
    if not any(p.requires_grad for p in net.parameters()):
        raise UserError("all weights of this net are frozen, so there is nothing to train: let it train some")
    fixed = frozen.digest(net)
    averages = {ema.key: MovingAverage(ema, net) for ema in spec.ema}
    mesh = layout.mesh_of(spec.share, device or next(net.parameters()).device)
    layout.lay(net, mesh, [average.module for average in averages.values()], reshard=spec.reshard)
    return State(net, spec.optimizer(net), averages, frozen=fixed)
