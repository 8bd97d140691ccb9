"""The divergence of a velocity, div v = sum of J_ii with J = dv/dx: how fast the flow makes volume grow.

J e is the derivative of v along e with t at rest: one dual pass. Of directions whose e e^T add up to the identity,

    sum over e of e_i (J e)_i = J_ii,

exactly so for the axes of the space, and in the mean for random signs (Hutchinson 1990; FFJORD, Grathwohl et al. 2019).
"""

from collections.abc import Callable, Sequence
from math import prod

import torch

from dumo.autodiff import rule as rule  # without which a Dual can do nothing
from dumo.autodiff.dual import pair, primal
from dumo.flow.slope import rate_of
from dumo.types import Cond, PerSample, Sample, Time

Velocity = Callable[[Sample, Time, Cond], Sample]


def axes(x: Sample) -> list[Sample]:
    """Of samples like x the directions that give the divergence exactly: as many as a sample has numbers."""
    unit = torch.eye(prod(x.shape[1:]), dtype=x.dtype, device=x.device)
    return [e.view(1, *x.shape[1:]).expand_as(x) for e in unit]


@torch.no_grad()
def diagonal(velocity: Velocity, x: Sample, t: Time, c: Cond, e: Sample) -> tuple[Sample, Sample]:
    """v, and e_i (J e)_i: of random signs e an estimate of the diagonal of J, without gradients; one dual pass."""
    v = velocity(pair(x, e), t, c)
    return primal(v), e * rate_of(v)


def divergence(velocity: Velocity, x: Sample, t: Time, c: Cond, along: Sequence[Sample]) -> tuple[Sample, PerSample]:
    """v, and div v by a dual pass for each direction of `along`; they are scaled to add up to the identity."""
    passes = [diagonal(velocity, x, t, c, e) for e in along]
    return passes[0][0], torch.stack([square.flatten(1).sum(1) for _, square in passes]).sum(0)
