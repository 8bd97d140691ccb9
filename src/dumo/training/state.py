"""All that training changes: what a checkpoint holds, and a resumed run needs."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from dumo.training.ema import MovingAverage
from dumo.training.spec import Train
from dumo.types import Frozen, UserError, frozen


@dataclass
class State:
    """A run between two steps. No generator state: every draw is keyed by (seed, step)."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    averages: dict[float, MovingAverage] = field(default_factory=dict[float, MovingAverage])  # by decay
    step: int = 0  # updates done
    images: int = 0  # images seen, repeats counted

    @property
    def shown(self) -> nn.Module:
        """The net that is sampled and evaluated: the first average, or the net itself where there is none."""
        return next((average.module for average in self.averages.values()), self.net)

    def reference(self, choice: Literal["self"] | float) -> Frozen:
        """theta^-: the weights in training, or the average of a decay. Raises UserError if there is none of that."""
        if choice == "self":
            return frozen(self.net)
        if choice not in self.averages:
            raise UserError(f"ref: there is no average of decay {choice}; train has {list(self.averages) or 'none'}")
        return Frozen(self.averages[choice].module)


def begin(net: nn.Module, spec: Train) -> State:
    """The state before the first step."""
    averages = {ema.decay: MovingAverage(ema, net) for ema in spec.ema}
    return State(net, spec.optimizer(net.parameters()), averages)
