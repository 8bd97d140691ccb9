"""Guidance while sampling, of nets that know the unguided flow: of velocities exact, of jumps near."""

import pytest
import torch

from dumo.flow.guide import CFG, Guide, Interval
from dumo.flow.path import Linear
from dumo.flow.solver import Euler, Heun, Solver
from dumo.objectives import DuMo, FlowMatching, Objective
from dumo.testing.exact import D, ExactNet, column, exact_batch, gaussian, table
from dumo.types import Readings
from theory.exact import plane

ALL, LATE = Interval(), Interval(low=0.2, high=0.75)


def readings(objective: Objective, guidance: CFG, null: int = 3) -> Readings:
    """Of the Gaussians that no guidance has touched."""
    return guidance(objective.readings(ExactNet(gaussian(), objective.needs)), null)


@pytest.mark.parametrize("interval", [ALL, LATE])
@pytest.mark.parametrize("scale", [0.5, 1.5, 4.0])
def test_a_guided_velocity_is_that_of_the_guided_flow(scale: float, interval: Interval) -> None:
    """The net trained on plain targets and guided when sampled; the flow that guidance in training settles at."""
    objective, flow = FlowMatching(drop=0.3), gaussian(Guide(omega=scale, interval=interval))
    b, velocity = exact_batch(objective, flow), readings(objective, CFG(scale=scale, interval=interval)).velocity
    found = velocity(b.x_t, b.t, b.c)
    assert (found - flow.guided(b.x_t, b.c, b.t)).abs().max() < 1e-12
    assert (found - flow.velocity(b.x_t, b.c, b.t)).abs().max() > 0.1
    null = ~b.kept
    assert (found - flow.velocity(b.x_t, b.c, b.t))[null].abs().max() < 1e-12  # no label, nothing to guide by


def test_a_guided_velocity_of_mixtures() -> None:
    objective, flow, guided = FlowMatching(drop=0.3), plane(), plane(Guide(zeta=0.6))
    b = exact_batch(objective, flow, 64)
    velocity = CFG(scale=2.5)(objective.readings(ExactNet(flow, objective.needs)), flow.classes).velocity
    assert (velocity(b.x_t, b.t, b.c) - guided.guided(b.x_t, b.c, b.t)).abs().max() < 1e-12


@pytest.mark.parametrize(("solver", "order"), [(Euler(), 1), (Heun(), 2)])
def test_solvers_follow_the_guided_flow(solver: Solver, order: int) -> None:
    z, c = torch.randn(12, 2, generator=torch.Generator().manual_seed(0), dtype=D), torch.arange(12) % 4
    exact = gaussian(Guide(omega=2)).carry(z, c, one := torch.ones(12, dtype=D), 0 * one)
    guided = readings(FlowMatching(), CFG(scale=2))
    off = [(solver(guided, Linear(), z, c, nfe, lambda k: z) - exact).abs().max() for nfe in (64, 128)]
    assert off[1] < 0.02
    assert abs(torch.log2(off[0] / off[1]).item() - order) < 0.3


def test_a_guided_jump_is_near_that_of_the_guided_flow() -> None:
    """One scales by w S_c + (1 - w) S_0, the other by S_c^w S_0^(1 - w): apart by the square of how far these are."""
    z, c = table([1.0, -0.5], [1.0, -0.5], [1.0, -0.5]), torch.arange(3)
    one, std = torch.ones(3, dtype=D), gaussian().std
    for scale in (1.5, 2.0):
        endpoint = readings(DuMo(), CFG(scale=scale)).endpoint
        found = endpoint(z, one, c)
        assert (found - column(scale * std[c] + (1 - scale) * std[-1]) * z).abs().max() < 1e-12
        exact = gaussian(Guide(omega=scale)).carry(z, c, one, 0 * one)
        apart = scale * (scale - 1) / 2 * (std[c] / std[-1] - 1).square()  # the second order in how far they are
        off = ((exact - found) / z)[:, 0] / std[-1]
        assert ((off - apart).abs() < 0.5 * apart).all()
