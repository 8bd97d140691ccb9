"""The likelihood of samples: the flow of a net carries them to noise, whose density is known.

Along dx_t/dt = v the log of volume grows by div v (Chen et al. 2018), so

    log p(x_0) = log N(x_1; 0, I) + integral of div v(x_t, t) from 0 to 1.

Here div v = sum of J_ii with J = dv/dx. J e is the derivative of v along e with t at rest: one dual pass. For
directions e whose e e^T add up to the identity,

    sum over e of e_i (J e)_i = J_ii.

The axes of the space are such directions; random signs are, in the mean (Hutchinson 1990; FFJORD, Grathwohl et al.
2019).

The order of events: the caller chooses directions, `axes` or random `signs`. `log_likelihood` goes up the grid of times
from data to noise by steps that `climb_of` makes for a solver. Euler and Heun follow x_t and the integral together, by
a `divergence` at each pass. Hop jumps, where the net was taught how much the log of volume grows in a jump from t up to
s: one pass a jump (F2D2, Ai et al. 2025). `diagonal` is also for objectives that learn this growth.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from math import log, pi, prod

import torch

from dumo.autodiff import rule as rule  # its import registers the rules of torch's operations for Duals
from dumo.autodiff.dual import pair, primal, teach_others
from dumo.autodiff.general import whatever_the_slope
from dumo.flow.linearize import tangent_or_zeros
from dumo.flow.path import FlowPath
from dumo.flow.solver import Euler, Heun, Hop, Solver, num_steps, require_reading, times_per_row, uniform_times
from dumo.runtime import random, signals
from dumo.types import Climb, Cond, PerSample, Readings, Sample, Time, UserError, lift

Velocity = Callable[[Sample, Time, Cond], Sample]  # (x, t, c) -> v
Rate = Callable[[Sample, Time, Cond], tuple[Sample, PerSample]]  # (x, t, c) -> v and div v


@torch.no_grad()
def log_likelihood(
    readings: Readings, path: FlowPath, solver: Solver, x: Sample, c: Cond, nfe: int, along: Sequence[Sample]
) -> PerSample:
    """log p(x | c) of samples x (b, ...) in nats, (b,), by nfe readings of a net.

    `along`: the directions of div v, which must add up to the identity (`axes` or `signs`). Raises UserError if the
    solver cannot serve the reading or nfe.
    """
    climb = climb_of(solver, readings, along)
    d = x[0].numel()
    y = x / path.sd
    log_growth = x.new_zeros(len(x))  # of volume, since t = 0
    rising_times = uniform_times(num_steps(solver, nfe))[::-1]
    for t, s in pairwise(times_per_row(rising_times, x)):
        signals.check()
        y, step_growth = climb(y, t, s, c)
        log_growth = log_growth + step_growth
    squared_radius = (y / path.initial_std).square().flatten(1).sum(1)
    return log_growth - (squared_radius + d * log(2 * pi)) / 2 - d * log(path.sd * path.initial_std)


def climb_of(solver: Solver, readings: Readings, along: Sequence[Sample] = ()) -> Climb:
    """A function that makes one step of a solver towards the noise: (x_t, t, s, c) -> x_s, growth of the log of volume.

    `along`: as in `log_likelihood`; hop needs none. Raises UserError for a solver that makes no such step, and where
    the objective does not teach what it needs.
    """
    if isinstance(solver, Hop):
        if readings.climb is None:
            raise UserError(
                "solver 'hop' takes likelihood from jumps that know how much volume they grow, which this objective "
                "does not teach: use heun or euler, or train objective f2d2"
            )
        return readings.climb
    if not isinstance(solver, Euler | Heun):
        raise UserError(f"solver '{solver.kind}' has no way from data to noise: use heun, euler or hop")
    velocity = require_reading(solver, readings)

    def rate(x: Sample, t: Time, c: Cond) -> tuple[Sample, PerSample]:
        return divergence(velocity, x, t, c, along)

    if isinstance(solver, Euler):
        return partial(_euler_step, rate)
    return partial(_heun_step, rate)


def axes(x: Sample) -> list[Sample]:
    """The directions that give the divergence exactly: each axis of the space of samples like x, shaped as x."""
    unit = torch.eye(prod(x.shape[1:]), dtype=x.dtype, device=x.device)
    return [e.view(1, *x.shape[1:]).expand_as(x) for e in unit]


def signs(*key: int | str, numbers: Sequence[int], shape: Sequence[int], probes: int) -> list[Sample]:
    """Random directions: `probes` draws of signs (n, *shape), scaled so that they add up to the identity in the mean.

    A sample's signs are a function of the key and its number alone, of which `numbers` has n.
    """
    return [random.keyed_signs(*key, probe, rows=numbers, shape=shape) / probes**0.5 for probe in range(probes)]


def divergence(velocity: Velocity, x: Sample, t: Time, c: Cond, along: Sequence[Sample]) -> tuple[Sample, PerSample]:
    """v (b, ...), and div v (b,) by a dual pass for each direction of `along`, which must add up to the identity."""
    passes = [diagonal(velocity, x, t, c, e) for e in along]
    v, _ = passes[0]
    traces = [entries.flatten(1).sum(1) for _, entries in passes]
    return v, torch.stack(traces).sum(0)


@torch.no_grad()
def diagonal(velocity: Velocity, x: Sample, t: Time, c: Cond, e: Sample) -> tuple[Sample, Sample]:
    """v, and e_i (J e)_i, both (b, ...), by one dual pass without gradients.

    For random signs e (b, ...) the second estimates the diagonal of J = dv/dx.
    """
    teach_others()
    with whatever_the_slope():
        v = velocity(pair(x, e), t, c)
    return primal(v), e * tangent_or_zeros(v)


def _euler_step(rate: Rate, x: Sample, t: Time, s: Time, c: Cond) -> tuple[Sample, PerSample]:
    """x at s, and the growth of the log of volume from t to s, by the rates at t."""
    v, div = rate(x, t, c)
    return x + lift(s - t, x) * v, (s - t) * div


def _heun_step(rate: Rate, x: Sample, t: Time, s: Time, c: Cond) -> tuple[Sample, PerSample]:
    """x at s, and the growth of the log of volume from t to s, by the mean of the rates at t and s."""
    v, div = rate(x, t, c)
    v_s, div_s = rate(x + lift(s - t, x) * v, s, c)
    return x + lift(s - t, x) * (v + v_s) / 2, (s - t) * (div + div_s) / 2
