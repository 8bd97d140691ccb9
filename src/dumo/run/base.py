"""A teacher that takes no memory: the net in training with its adapters off, which is the model that it began as.

It answers between the passes of a step, within its loss even. So it only switches, and switches back: no weight is
changed, no gradient recorded, and every part of the net is in its own mode again.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from dumo.config.spec import Run
from dumo.flow.precision import Precision, autocast
from dumo.flow.reading import bind
from dumo.sampling.generate import evaluating
from dumo.types import Cond, Heads, Reads, Sample, Time


@dataclass(frozen=True)
class Base:
    """The passes of a net as it was before its training, in a precision. The net offers `base()`."""

    net: nn.Module
    precision: Precision

    @torch.no_grad()
    def __call__(self, x: Sample, c: Cond, /, **inputs: Time) -> Heads:
        """As `Net`, without gradients and dropout."""
        off = cast(Callable[[], AbstractContextManager[None]], self.net.base)
        with evaluating(self.net), off(), autocast(self.precision, x.device):
            return self.net(x, c, **inputs)


def reads_of(run: Run, net: nn.Module) -> Reads:
    """What the base of a net can tell: its velocity, which is every head of it, at r = t where it takes r."""
    base = bind(Base(net, run.train.precision), **run.objective.needs.knobs)
    names = run.objective.needs.inputs
    return Reads(velocity=lambda x, t, c: base(x, c, **dict.fromkeys(names, t))[0])
