"""Readings: what a trained net can tell a solver, as its objective reads it (`dumo.types.Readings`).

The order of events:

1. Before there is a net, `available_readings` says which readings an objective will teach.
2. Of a trained net, `readings_of` fixes the knobs (`bind_knobs`) and lets the objective read it.
3. A solver calls the readings, or `teacher_velocity` makes a teacher of them.

Objectives build their readings of `jump_to_data`, `velocity_and_jump` and `mean_velocity`. `head_of` names the heads
behind a reading.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import nan
from typing import Literal

import torch
from torch import nn

from dumo.autodiff.dual import primal
from dumo.types import Cond, Heads, Net, Objective, Readings, Sample, TeacherVelocity, Time, TimeLaw, UserError, lift


def available_readings(objective: Objective) -> Readings:
    """The readings that an objective will teach. They are of no net: which of them are None is what counts."""
    return _with_hops(objective, objective.readings(nn.Identity()))


def readings_of(objective: Objective, net: Net, knobs: Mapping[str, float] | None = None) -> Readings:
    """The readings of a net that an objective has trained. `knobs`: values by name instead of the objective's own."""
    knobs = {**objective.needs.knobs, **(knobs or {})}
    return _with_hops(objective, objective.readings(bind_knobs(net, **knobs) if knobs else net))


def _with_hops(objective: Objective, readings: Readings) -> Readings:
    """The readings with a rule for jumps (`hops`), where the objective has none and its times end at the data alone."""
    if readings.flow_map and readings.hops is None and not objective.times.between:
        return replace(readings, hops=lambda t, s: s == 0)
    return readings


def bind_knobs(net: Net, **knobs: float) -> Net:
    """The net with these knobs fixed: each pass gets every knob's value, once per row (b,)."""

    def bound_net(x: Sample, c: Cond, /, **inputs: Time) -> Heads:
        x_value = primal(x)
        knob_rows = {name: x_value.new_full((len(x),), value) for name, value in knobs.items()}
        return net(x, c, **inputs, **knob_rows)

    return bound_net


def teacher_velocity(readings: Readings) -> TeacherVelocity:
    """The velocity that a pupil learns at (x_t, t, c), where the data's own is v. Raises UserError without one."""
    read = readings.velocity
    if read is None:
        raise UserError("this teacher has no velocity to learn from: its objective learns jumps alone")

    def velocity(x: Sample, t: Time, c: Cond, v: Sample) -> Sample:
        with torch.no_grad():
            return v + (read(x, t, c).to(v) - v)  # this rounding is that of earlier versions, so their runs resume

    return velocity


def jump_to_data(net: Net, head: int = 0) -> Callable[[Sample, Time, Cond], Sample]:
    """Read the mean velocity down to the data u(x_t, t) = (x_t - x_0) / t: x_0 = x_t - t u (paper, Eq. 6)."""
    return lambda x, t, c: x - lift(t, x) * net(x, c, t=t)[head]


def velocity_and_jump(net: Net) -> Readings:
    """Read the first two heads, v and the mean velocity u down to the data: each by a pass, or both by one."""

    def both(x: Sample, t: Time, c: Cond) -> tuple[Sample, Sample]:
        v, u = net(x, c, t=t)[:2]
        return v, x - lift(t, x) * u

    return Readings(velocity=lambda x, t, c: net(x, c, t=t)[0], endpoint=jump_to_data(net, head=1), both=both)


def mean_velocity(net: Net, head: int = 0, times: TimeLaw | None = None, velocity_head: int | None = None) -> Readings:
    """Read the mean velocity u(x_t, t, r): x_r = x_t - (t - r) u, and v = u at r = t (MeanFlow, Eq. 12).

    times: those that u was trained at, which may never teach the velocity; None: it is taught.
    velocity_head: the head that is the velocity; None: u at r = t is.
    """

    def flow_map(x: Sample, t: Time, s: Time, c: Cond) -> Sample:
        return x - lift(t - s, x) * net(x, c, t=t, r=s)[head]

    def velocity(x: Sample, t: Time, c: Cond) -> Sample:
        return net(x, c, t=t, r=t)[head if velocity_head is None else velocity_head]

    return Readings(
        velocity=velocity if times is None or times.teaches_velocity else None,
        endpoint=lambda x, t, c: flow_map(x, t, 0 * t, c),
        flow_map=flow_map,
    )


def head_of(objective: Objective, name: Literal["velocity", "endpoint", "flow_map", "both"]) -> str:
    """The name of the head that a reading reads, or names joined by " and "; the reading must be taught.

    An objective does not say which. So nets are read of which one head returns NaN: if the reading is NaN, it reads
    that head.
    """
    heads = objective.needs.heads
    x = torch.zeros(1, 1)
    t = torch.ones(1)
    c = torch.zeros(1, dtype=torch.long)
    times = (t, 0 * t) if name == "flow_map" else (t,)

    def net_with_nan(nan_head: int) -> Net:
        values = [nan if i == nan_head else 0.0 for i in range(len(heads))]
        return lambda x, c, /, **_: tuple(torch.full_like(x, value) for value in values)

    names: list[str] = []
    for k, head in enumerate(heads):
        answer = getattr(readings_of(objective, net_with_nan(k)), name)(x, *times, c)
        answers = answer if isinstance(answer, tuple) else (answer,)
        if any(y.isnan().any() for y in answers):
            names.append(head)
    return " and ".join(names)
