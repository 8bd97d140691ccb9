"""How likely samples are to a net: the density that its flow carries up to noise, where it is known.

Along dx_t/dt = v the log of volume grows by div v (Chen et al. 2018), so

    log p(x_0) = log N(x_1; 0, I) + integral of div v(x_t, t) from 0 to 1.

Here div v = sum of J_ii with J = dv/dx. J e is the derivative of v along e with t at rest: one dual pass. Of directions
whose e e^T add up to the identity,

    sum over e of e_i (J e)_i = J_ii,

exactly so for the axes of the space, and in the mean for random signs (Hutchinson 1990; FFJORD, Grathwohl et al. 2019).

Euler and Heun follow x_t and the integral together, a divergence a pass. Hop jumps, where the net was taught how much
volume grows in a jump from t up to s, as well as where it ends: a pass a jump (F2D2, Ai et al. 2025).

`log_likelihood` goes up the grid by steps that `climb_of` takes from a solver. Its caller chooses the directions:
`axes` or random `signs`. `divergence` and `diagonal` are for objectives that learn the volume.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from math import log, pi, prod

import torch

from dumo.autodiff import rule as rule  # without which a Dual can do nothing
from dumo.autodiff.dual import pair, primal
from dumo.flow.linearize import tangent_or_zeros
from dumo.flow.path import Path
from dumo.flow.solver import Euler, Heun, Hop, Solver, num_steps, taught_reading, times_per_row, uniform_times
from dumo.runtime import random, signals
from dumo.types import Climb, Cond, PerSample, Reads, Sample, Time, UserError, lift

Velocity = Callable[[Sample, Time, Cond], Sample]  # (x, t, c) -> v
Rate = Callable[[Sample, Time, Cond], tuple[Sample, PerSample]]  # (x, t, c) -> v and div v


@torch.no_grad()
def log_likelihood(
    reads: Reads, path: Path, solver: Solver, x: Sample, c: Cond, nfe: int, along: Sequence[Sample]
) -> PerSample:
    """log p(x | c) in nats, by nfe readings of a net from data to noise; div v along these directions.

    They must add up to the identity (`axes` or `signs`). Raises UserError where reading or nfe is out of reach.
    """
    climb = climb_of(solver, reads, along)
    d = x[0].numel()
    y = x / path.sd
    grown = x.new_zeros(len(x))  # the log of volume, since t = 0
    rising_times = uniform_times(num_steps(solver, nfe))[::-1]
    for t, s in pairwise(times_per_row(rising_times, x)):
        signals.check()
        y, more = climb(y, t, s, c)
        grown = grown + more
    squared_radius = (y / path.spread).square().flatten(1).sum(1)
    return grown - (squared_radius + d * log(2 * pi)) / 2 - d * log(path.sd * path.spread)


def climb_of(solver: Solver, reads: Reads, along: Sequence[Sample] = ()) -> Climb:
    """One step of a solver towards the noise. Raises UserError for one that makes none, or what was never taught."""
    if isinstance(solver, Hop):
        if reads.climb is None:
            raise UserError(
                "solver 'hop' takes likelihood from jumps that know how much volume they grow, which this objective "
                "does not teach: use heun or euler, or train objective f2d2"
            )
        return reads.climb
    if not isinstance(solver, Euler | Heun):
        raise UserError(f"solver '{solver.kind}' has no way from data to noise: use heun, euler or hop")
    velocity = taught_reading(solver, reads)

    def rate(x: Sample, t: Time, c: Cond) -> tuple[Sample, PerSample]:
        return divergence(velocity, x, t, c, along)

    return partial(_euler_step if isinstance(solver, Euler) else _heun_step, rate)


def axes(x: Sample) -> list[Sample]:
    """Of samples like x the directions that give the divergence exactly: as many as a sample has numbers."""
    unit = torch.eye(prod(x.shape[1:]), dtype=x.dtype, device=x.device)
    return [e.view(1, *x.shape[1:]).expand_as(x) for e in unit]


def signs(*key: int | str, numbers: Sequence[int], shape: Sequence[int], probes: int) -> list[Sample]:
    """Directions for the samples of these numbers, each of its own number alone: `probes` draws of random signs."""
    return [random.signs(*key, probe, rows=numbers, shape=shape) / probes**0.5 for probe in range(probes)]


def divergence(velocity: Velocity, x: Sample, t: Time, c: Cond, along: Sequence[Sample]) -> tuple[Sample, PerSample]:
    """v, and div v (b,) by a dual pass for each direction of `along`, which must add up to the identity."""
    passes = [diagonal(velocity, x, t, c, e) for e in along]
    v, _ = passes[0]
    traces = [entries.flatten(1).sum(1) for _, entries in passes]
    return v, torch.stack(traces).sum(0)


@torch.no_grad()
def diagonal(velocity: Velocity, x: Sample, t: Time, c: Cond, e: Sample) -> tuple[Sample, Sample]:
    """v, and e_i (J e)_i: of random signs e an estimate of the diagonal of J, without gradients; one dual pass."""
    v = velocity(pair(x, e), t, c)
    return primal(v), e * tangent_or_zeros(v)


def _euler_step(rate: Rate, x: Sample, t: Time, s: Time, c: Cond) -> tuple[Sample, PerSample]:
    """x at s, and how much the log of volume grows from t to s: by the rates at t."""
    v, div = rate(x, t, c)
    return x + lift(s - t, x) * v, (s - t) * div


def _heun_step(rate: Rate, x: Sample, t: Time, s: Time, c: Cond) -> tuple[Sample, PerSample]:
    """x at s, and how much the log of volume grows from t to s: by the mean of the rates at t and s."""
    v, div = rate(x, t, c)
    v_s, div_s = rate(x + lift(s - t, x) * v, s, c)
    return x + lift(s - t, x) * (v + v_s) / 2, (s - t) * (div + div_s) / 2
