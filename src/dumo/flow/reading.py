"""What a net of two times u(x_t, t, r) can tell a solver, and how its knobs are set."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import nan
from typing import Literal

import torch
from torch import nn

from dumo.autodiff.dual import primal
from dumo.types import Cond, Heads, Net, Objective, Reads, Sample, Taught, Time, UserError, lift


def bind(net: Net, **knobs: float) -> Net:
    """Fix the knobs of a net: what a sampler does before it reads."""

    def bound(x: Sample, c: Cond, /, **inputs: Time) -> Heads:
        like = primal(x)
        return net(x, c, **inputs, **{name: like.new_full((len(x),), value) for name, value in knobs.items()})

    return bound


def reading(objective: Objective, net: Net, knobs: Mapping[str, float] | None = None) -> Reads:
    """Read a net trained by an objective, with these of its knobs set and the others as the objective has them."""
    knobs = {**objective.needs.knobs, **(knobs or {})}
    return objective.read(bind(net, **knobs) if knobs else net)


def head_of(objective: Objective, name: Literal["velocity", "endpoint", "flow_map", "both"]) -> str:
    """The head, or heads, that a reading reads; the reading must be taught.

    An objective does not say which, so nets are read of which one head alone says NaN: it comes through from that head.
    """
    heads, one, c = objective.needs.heads, torch.ones(1), torch.zeros(1, dtype=torch.long)

    def says_nan(k: int) -> Net:
        return lambda x, c, /, **_: tuple(torch.full_like(x, nan if i == k else 0.0) for i in range(len(heads)))

    times = (one, 0 * one) if name == "flow_map" else (one,)
    answers = [getattr(reading(objective, says_nan(k)), name)(torch.zeros(1, 1), *times, c) for k in range(len(heads))]
    said = [answer if isinstance(answer, tuple) else (answer,) for answer in answers]
    return " and ".join(head for head, xs in zip(heads, said, strict=True) if any(x.isnan().any() for x in xs))


def jump_to_data(net: Net, head: int = 0) -> Callable[[Sample, Time, Cond], Sample]:
    """Read the mean velocity down to the data u(x_t, t) = (x_t - x_0) / t: x_0 = x_t - t u (paper, Eq. 6)."""
    return lambda x, t, c: x - lift(t, x) * net(x, c, t=t)[head]


def mean_velocity(net: Net, head: int = 0) -> Reads:
    """Read the mean velocity u(x_t, t, r): x_r = x_t - (t - r) u, and v = u at r = t (MeanFlow, Eq. 12)."""

    def flow_map(x: Sample, t: Time, s: Time, c: Cond) -> Sample:
        return x - lift(t - s, x) * net(x, c, t=t, r=s)[head]

    return Reads(
        velocity=lambda x, t, c: net(x, c, t=t, r=t)[head],
        endpoint=lambda x, t, c: flow_map(x, t, 0 * t, c),
        flow_map=flow_map,
    )


def teaching(reads: Reads) -> Taught:
    """The velocity that a pupil learns at (x_t, t, c), where the data's own is v. Raises UserError without one."""
    read = reads.velocity
    if read is None:
        raise UserError("this teacher has no velocity to learn from: its objective learns jumps alone")

    def velocity(x: Sample, t: Time, c: Cond, v: Sample) -> Sample:
        with torch.no_grad():
            return v + (read(x, t, c).to(v) - v)  # rounded so, runs go on to the bit as they began

    return velocity


def taught(objective: Objective) -> Reads:
    """The readings that an objective will teach, of no net yet."""
    found = objective.read(nn.Identity())
    if found.flow_map and found.hops is None and not objective.times.between:
        return replace(found, hops=lambda t, s: s == 0)
    return found
