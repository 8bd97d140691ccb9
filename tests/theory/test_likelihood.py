"""Log-likelihoods of flows whose density is known: by velocity and divergence, and by jumps told of their volume."""

from math import log, log2, pi

import pytest
import torch
from torch import Tensor

from dumo.flow.likelihood import axes, diagonal, divergence, log_likelihood
from dumo.flow.path import FlowPath, Linear, Trig
from dumo.flow.solver import Euler, Heun, Hop, Restart, Solver
from dumo.objectives import F2D2
from dumo.runtime.random import stream
from dumo.testing.exact import APART, D, ExactNet, Gaussian, OnTrig, opaque
from dumo.types import Readings, UserError
from theory.exact import PRODUCT, Mixture, Product, plane
from tiers import tiered

FLOW = plane()


def density(flow: Mixture, x: Tensor, c: Tensor) -> Tensor:
    """log p(x | c) of the mixture itself."""
    off = (x[:, None] - flow.mean) / flow.std
    parts = -(off**2 / 2 + flow.std.log() + log(2 * pi) / 2).sum(-1) + flow.weight[c].log()
    return parts.logsumexp(1)


def readings(flow: Mixture | OnTrig) -> Readings:
    return Readings(velocity=lambda x, t, c: opaque(lambda x, t: flow.velocity(x, c, t), x, t))


def data(n: int = 12) -> tuple[Tensor, Tensor]:
    c = torch.arange(n) % FLOW.classes
    return FLOW.data(c, stream("data")), c


def off(solver: Solver, passes: int, path: FlowPath, sd: float = 1.0) -> float:
    """The largest error of log p, in nats, of data in units of 1 / sd."""
    flow = OnTrig(FLOW) if path.kind == "trig" else FLOW
    x, c = data()
    found = log_likelihood(readings(flow), path, solver, sd * x, c, passes, axes(x))
    return (found - density(FLOW, x, c) + 2 * log(sd)).abs().max().item()


PATHS: list[tuple[FlowPath, float]] = [(Linear(), 1), (Trig(), 1), (Linear(sd=2.0), 2)]


@pytest.mark.parametrize(("path", "sd"), tiered(PATHS, ci=PATHS[:1], id=lambda case: f"{case[0].kind}-{case[1]}"))
def test_the_flow_knows_the_density_of_its_data(path: FlowPath, sd: float) -> None:
    """In units of the data, whatever the net's are."""
    assert off(Heun(), 96, path, sd) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "order"), [(Euler(), 1), (Heun(), 2)])
def test_the_error_falls_with_the_order_of_the_solver(solver: Solver, order: int) -> None:
    assert log2(off(solver, 16, Linear()) / off(solver, 32, Linear())) == pytest.approx(order, abs=0.6)


def test_axes_are_exact_and_signs_are_in_the_mean() -> None:
    x, c = data(3)
    t, velocity = torch.tensor([0.0, 0.4, 1.0], dtype=D), readings(FLOW).velocity
    full = torch.func.jacfwd(lambda x: FLOW.velocity(x, c, t))(x)
    exact = torch.stack([full[i, :, i].diagonal() for i in range(3)])
    v, div = divergence(velocity, x, t, c, axes(x))
    assert torch.allclose(v, FLOW.velocity(x, c, t), rtol=1e-13)
    assert torch.allclose(div, exact.sum(1), rtol=1e-12)
    signs = [torch.tensor([[a, b]], dtype=D).expand_as(x) for a in (-1, 1) for b in (-1, 1)]
    each = torch.stack([diagonal(velocity, x, t, c, e)[1] for e in signs])
    assert torch.allclose(each.mean(0), exact, rtol=1e-12)
    assert each.std(0).max() > 0.05  # each alone is not


def climber(flow: Gaussian | Product) -> Readings:
    """What a net says that knows the flow, and how volume grows on it."""
    objective = F2D2()
    return objective.readings(ExactNet(flow, objective.needs))


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("flow", [APART, PRODUCT], ids=["gaussian", "product"])
def test_jumps_that_know_their_volume_know_the_density(flow: Gaussian | Product, passes: int) -> None:
    """In one pass as well as in three."""
    c = torch.arange(12) % flow.classes
    x = flow.data(c, stream("data"))
    if isinstance(flow, Product):
        true = flow.density(x, c, torch.zeros(12, dtype=D)).log().sum(1)
    else:
        m, s = flow.mean[c][:, None], flow.std[c][:, None]
        true = -(((x - m) / s) ** 2 / 2 + s.log() + log(2 * pi) / 2).sum(1)
    found = log_likelihood(climber(flow), Linear(), Hop(), x, c, passes, [])
    assert (found - true).abs().max() < 1e-8


def test_a_solver_that_does_not_climb_is_refused() -> None:
    x, c = data(2)
    for solver, says in (
        (Restart(), "'restart' cannot integrate from data to noise: use heun"),
        (Hop(), "objective f2d2"),
    ):
        with pytest.raises(UserError, match=says):
            log_likelihood(readings(FLOW), Linear(), solver, x, c, 1, axes(x))
    with pytest.raises(UserError, match="nfe = 3"):
        log_likelihood(readings(FLOW), Linear(), Heun(), x, c, 3, axes(x))
