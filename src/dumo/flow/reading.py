"""Readings: the functions of a network that a solver calls, as its objective defines them (`dumo.types.Readings`).

`available_readings` returns the readings that an objective trains, without a network. `readings_of` binds the knobs
(`bind_knobs`) and returns the readings of a network. A solver calls them, or `teacher_velocity` converts them to a
teacher.

Objectives build their readings from `jump_to_data`, `velocity_and_jump` and `mean_velocity`. `head_of` returns the name
of the head that a reading uses.
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
    """Return the readings that an objective trains, without a network, to check which of them are None."""
    return _with_hops(objective, objective.readings(nn.Identity()))


def readings_of(objective: Objective, net: Net, knobs: Mapping[str, float] | None = None) -> Readings:
    """Return the readings of a network that an objective has trained. `knobs` override the objective's defaults."""
    knobs = {**objective.needs.knobs, **(knobs or {})}
    return _with_hops(objective, objective.readings(bind_knobs(net, **knobs) if knobs else net))


def _with_hops(objective: Objective, readings: Readings) -> Readings:
    """Restrict jumps (`hops`) to the data, if the objective sets no rule and its times contain no other jumps."""
    if readings.flow_map and readings.hops is None and not objective.times.between:
        return replace(readings, hops=lambda t, s: s == 0)
    return readings


def bind_knobs(net: Net, **knobs: float) -> Net:
    """Return the network with fixed knobs: each pass gets the value of every knob, (b,)."""

    def bound_net(x: Sample, c: Cond, /, **inputs: Time) -> Heads:
        x_value = primal(x)
        knob_rows = {name: x_value.new_full((len(x),), value) for name, value in knobs.items()}
        return net(x, c, **inputs, **knob_rows)

    return bound_net


def teacher_velocity(readings: Readings) -> TeacherVelocity:
    """Return a teacher's velocity, a function of (x_t, t, c, v_t). Raises UserError if the readings have none.

    It is differentiable with respect to x_t, if x_t requires a gradient.
    """
    read = readings.velocity
    if read is None:
        raise UserError("this teacher has no velocity, because its objective trains jumps only: use another teacher")

    def velocity(x: Sample, t: Time, c: Cond, v: Sample) -> Sample:
        with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
            # The recorded losses depend on the rounding of this form.
            return v + (read(x, t, c).to(v) - v)

    return velocity


def jump_to_data(net: Net, head: int = 0) -> Callable[[Sample, Time, Cond], Sample]:
    """Read the endpoint x_0 = x_t - t u from the mean velocity u(x_t, t) = (x_t - x_0) / t (paper, Eq. 6)."""
    return lambda x, t, c: x - lift(t, x) * net(x, c, t=t)[head]


def velocity_and_jump(net: Net) -> Readings:
    """Read the first two heads, the velocity v and the mean velocity u to the data, separately or in one pass."""

    def both(x: Sample, t: Time, c: Cond) -> tuple[Sample, Sample]:
        v, u = net(x, c, t=t)[:2]
        return v, x - lift(t, x) * u

    return Readings(velocity=lambda x, t, c: net(x, c, t=t)[0], endpoint=jump_to_data(net, head=1), both=both)


def mean_velocity(net: Net, head: int = 0, times: TimeLaw | None = None, velocity_head: int | None = None) -> Readings:
    """Read the mean velocity u(x_t, t, r): x_r = x_t - (t - r) u, and v = u at r = t (MeanFlow, Eq. 12).

    times: the times at which u was trained, which may exclude the velocity; None means that it is trained.
    velocity_head: the head of the velocity; None means u at r = t.
    """

    def flow_map(x: Sample, t: Time, s: Time, c: Cond) -> Sample:
        return x - lift(t - s, x) * net(x, c, t=t, r=s)[head]

    def velocity(x: Sample, t: Time, c: Cond) -> Sample:
        return net(x, c, t=t, r=t)[head if velocity_head is None else velocity_head]

    return Readings(
        velocity=velocity if times is None or times.trains_velocity else None,
        endpoint=lambda x, t, c: flow_map(x, t, 0 * t, c),
        flow_map=flow_map,
    )


def head_of(objective: Objective, name: Literal["velocity", "endpoint", "flow_map", "both"]) -> str:
    """Return the name of the head that a reading uses, or several joined by " and ". The reading must be trained.

    It calls the reading on networks in which one head returns NaN: if the result is NaN, the reading uses that head.
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
