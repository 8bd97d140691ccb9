"""The likelihood of samples under a flow, by integration from data to noise.

Along dx_t/dt = v the log volume grows by div v (Chen et al. 2018), so

    log p(x_0) = log N(x_1; 0, I) + integral of div v(x_t, t) from 0 to 1.

Here div v = sum of J_ii with J = dv/dx. J e is the derivative of v along e at constant t, computed by one dual pass.
For directions e such that the sum of e e^T is the identity,

    sum over e of e_i (J e)_i = J_ii.

The coordinate axes are such directions; random signs are in expectation (Hutchinson 1990; FFJORD, Grathwohl et al.
2019).

The caller chooses directions, `axes` or random `signs`. `log_likelihood` integrates from data to noise with the step
function that `climb_of` returns for a solver. Euler and Heun integrate x_t and the log volume, with the `divergence` at
each pass. Hop jumps, if the objective learns the growth of the log volume in a jump from t up to s: one pass per jump
(F2D2, Ai et al. 2025). Objectives that learn this growth use `diagonal`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from math import log, pi, prod

import torch

from dumo.autodiff import rule as rule  # its import registers the rules of torch's operations for Duals
from dumo.autodiff.dual import accept_duals, pair, primal
from dumo.autodiff.fallback import without_slope_advice
from dumo.flow.linearize import tangent_or_zeros
from dumo.flow.path import FlowPath
from dumo.flow.solver import Euler, Heun, Hop, Solver, num_steps, require_reading, times_per_row, uniform_times
from dumo.runtime import random, signals
from dumo.types import Climb, Cond, PerSample, Readings, Sample, Time, UserError, lift

# (x, t, c) -> v
Velocity = Callable[[Sample, Time, Cond], Sample]
# (x, t, c) -> v and div v
Rate = Callable[[Sample, Time, Cond], tuple[Sample, PerSample]]


@torch.no_grad()
def log_likelihood(
    readings: Readings, path: FlowPath, solver: Solver, x: Sample, c: Cond, nfe: int, along: Sequence[Sample]
) -> PerSample:
    """Return log p(x | c) of samples x (b, ...) in nats, (b,), with nfe readings.

    along: directions for div v (`axes` or `signs`).

    Raises UserError if the solver does not support the readings or nfe.
    """
    climb = climb_of(solver, readings, along)
    d = x[0].numel()
    y = x / path.sd
    # The growth of the log volume since t = 0.
    log_growth = x.new_zeros(len(x))
    rising_times = uniform_times(num_steps(solver, nfe))[::-1]
    for t, s in pairwise(times_per_row(rising_times, x)):
        signals.check()
        y, step_growth = climb(y, t, s, c)
        log_growth = log_growth + step_growth
    squared_radius = (y / path.initial_std).square().flatten(1).sum(1)
    return log_growth - (squared_radius + d * log(2 * pi)) / 2 - d * log(path.sd * path.initial_std)


def climb_of(solver: Solver, readings: Readings, along: Sequence[Sample] = ()) -> Climb:
    """Return the step function of a solver towards the noise: (x_t, t, s, c) -> x_s and the growth of the log volume.

    along: as in `log_likelihood`; hop needs none.

    Raises UserError if the solver has no such step, or if the objective does not learn what it needs.
    """
    if isinstance(solver, Hop):
        if readings.climb is None:
            raise UserError(
                "solver 'hop' needs the growth of the log volume in a jump, which this objective does not learn: use "
                "heun or euler, or train objective f2d2"
            )
        return readings.climb
    if not isinstance(solver, Euler | Heun):
        raise UserError(f"solver '{solver.kind}' cannot integrate from data to noise: use heun, euler or hop")
    velocity = require_reading(solver, readings)

    def rate(x: Sample, t: Time, c: Cond) -> tuple[Sample, PerSample]:
        return divergence(velocity, x, t, c, along)

    if isinstance(solver, Euler):
        return partial(_euler_step, rate)
    return partial(_heun_step, rate)


def axes(x: Sample) -> list[Sample]:
    """Return the directions for an exact divergence: each coordinate axis of samples like x, shaped as x."""
    unit = torch.eye(prod(x.shape[1:]), dtype=x.dtype, device=x.device)
    return [e.view(1, *x.shape[1:]).expand_as(x) for e in unit]


def signs(*key: int | str, numbers: Sequence[int], shape: Sequence[int], probes: int) -> list[Sample]:
    """Return random directions: `probes` draws of signs (n, *shape), scaled by 1 / sqrt(probes).

    A sample's signs depend only on the key and its number; `numbers` has n entries.
    """
    return [random.keyed_signs(*key, probe, rows=numbers, shape=shape) / probes**0.5 for probe in range(probes)]


def divergence(velocity: Velocity, x: Sample, t: Time, c: Cond, along: Sequence[Sample]) -> tuple[Sample, PerSample]:
    """Return v (b, ...), and div v (b,) by a dual pass for each direction of `along`."""
    passes = [diagonal(velocity, x, t, c, e) for e in along]
    v, _ = passes[0]
    traces = [entries.flatten(1).sum(1) for _, entries in passes]
    return v, torch.stack(traces).sum(0)


@torch.no_grad()
def diagonal(velocity: Velocity, x: Sample, t: Time, c: Cond, e: Sample) -> tuple[Sample, Sample]:
    """Return v, and e_i (J e)_i, both (b, ...), by one dual pass without gradients.

    For random signs e (b, ...), the latter is an estimate of the diagonal of J = dv/dx.
    """
    accept_duals()
    with without_slope_advice():
        v = velocity(pair(x, e), t, c)
    return primal(v), e * tangent_or_zeros(v)


def _euler_step(rate: Rate, x: Sample, t: Time, s: Time, c: Cond) -> tuple[Sample, PerSample]:
    """Return x at s, and the growth of the log volume from t to s, with the rates at t."""
    v, div = rate(x, t, c)
    return x + lift(s - t, x) * v, (s - t) * div


def _heun_step(rate: Rate, x: Sample, t: Time, s: Time, c: Cond) -> tuple[Sample, PerSample]:
    """Return x at s, and the growth of the log volume from t to s, with the mean of the rates at t and s."""
    v, div = rate(x, t, c)
    v_s, div_s = rate(x + lift(s - t, x) * v, s, c)
    return x + lift(s - t, x) * (v + v_s) / 2, (s - t) * (div + div_s) / 2
