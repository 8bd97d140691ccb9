"""CMT: its formula by hand, its rest on exact trajectories, the teacher's trajectories, and the start that it gives."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
import torch

from dumo.config.load import load
from dumo.flow.noisy_batch import add_noise, draw, make_draws
from dumo.flow.path import Linear
from dumo.flow.reading import teacher_velocity
from dumo.flow.sampling import sample_trajectory
from dumo.flow.solver import Euler, Heun
from dumo.flow.times import Grid
from dumo.objectives import CMT
from dumo.run import teacher
from dumo.runtime.progress import no_bar
from dumo.testing.exact import APART, ExactFlow, ExactNet, column, gradient
from dumo.testing.properties import loss_of
from dumo.types import NoisyBatch, Readings, UserError
from theory.exact import PRODUCT
from theory.formula import Polynomial, agree
from unit.run.known import shift, tiny

FORMS = get_args(CMT.model_fields["of"].annotation)
each_form = pytest.mark.parametrize("of", FORMS)


def record(objective: CMT, flow: ExactFlow, n: int = 64) -> NoisyBatch:
    """Rows on trajectories of the exact flow, with its velocity there."""
    m, g = objective.times.steps, torch.Generator().manual_seed(1)
    c = torch.randint(0, flow.classes, (n,), generator=g)
    z = torch.randn(n, 2, generator=g, dtype=torch.float64)
    t, one = torch.arange(m + 1, dtype=z.dtype) / m, torch.ones_like(z[:, 0])
    trail = torch.stack([flow.carry(z, c, one, s * one) for s in t], 1)
    null = torch.full_like(c, flow.classes)
    b = draw(objective, Linear(), trail[:, 0], c, null, seed=0, step=0, z=z)
    b = replace(b, trail=trail)
    x_t = b.on(b.t)
    return replace(b, x_t=x_t, v_t=flow.velocity(x_t, c, b.t))


@each_form
def test_formula(of: str) -> None:
    objective = CMT.model_validate({"of": of})
    two, b = of == "dumo", record(objective, APART)
    net = Polynomial(1 + two)
    r = b.r if of == "meanflow" else 0 * b.t
    heads = net(b.x_t, b.c, t=b.t, r=r)
    places = torch.arange(len(r)), (r * 16).long()
    e = heads[-1] - (b.x_t - b.trail[places]) / column(b.t - r)
    u_loss = (e**2).sum(1) / 2
    if two:
        v_loss = ((heads[0] - b.v_t) ** 2).sum(1) / 2
        agree(objective, net, b, CMT.beta * v_loss + (1 - CMT.beta) * u_loss, {"v": v_loss, "u": u_loss})
    else:
        agree(objective, net, b, u_loss * (b.t**2 if of == "consistency" else 1), {"u": u_loss})


@each_form
@pytest.mark.parametrize("flow", [APART, PRODUCT], ids=["gaussian", "mixture"])
def test_the_flow_is_at_rest_on_its_own_trajectories(of: str, flow: ExactFlow) -> None:
    """Row by row; off it the gradient of every head is not zero."""
    objective = CMT.model_validate({"of": of})
    b, net = record(objective, flow), ExactNet(flow, objective.needs)
    assert loss_of(objective, net, b).loss.max() < 1e-20
    net.probe.data += 0.1
    assert gradient(objective, net, b).abs().min() > 1e-3


def test_times_are_ends_of_steps() -> None:
    t, r = Grid(steps=4)(4000, torch.Generator().manual_seed(0))
    count = torch.stack([torch.stack([((t == k / 4) & (r == j / 4)).sum() for j in range(4)]) for k in range(5)])
    wanted = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1 / 2] * 2 + [0, 0], [1 / 3] * 3 + [0], [1 / 4] * 4]) * 1000
    assert count.sum() == 4000
    assert ((count - wanted).abs() <= 4 * wanted.sqrt()).all()


def test_trails_are_the_solvers_own_steps() -> None:
    """Of Euler by hand; of Heun every second of eight; in units of the path's sd, the data in theirs."""
    z, c = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(3, dtype=torch.long)
    readings = Readings(velocity=lambda x, t, c: x * column(t))
    x, between = sample_trajectory(readings, Linear(sd=0.5), Euler(), z, c, nfe=4, points=4)
    steps = [z]
    for t in (1.0, 0.75, 0.5, 0.25):
        steps.append(steps[-1] * (1 - t / 4))
    assert torch.allclose(x, 0.5 * steps[4])
    assert torch.allclose(between, torch.stack(steps[3:0:-1], 1))
    fine, coarse = (sample_trajectory(readings, Linear(), Heun(), z, c, nfe=16, points=n)[1] for n in (8, 4))
    assert torch.equal(fine[:, 1::2], coarse)


CMT_ON_MOONS = (
    "objective={kind: cmt, times: {steps: 4}}",
    "teacher.kind=python",
    "teacher.source=unit.run.known:shift",
    "teacher.pairs.count=12",
    "path.sd=2",
)


def test_a_record_is_on_its_trail(tmp_path: Path) -> None:
    """As training makes it: x_t where the teacher's solver was at t, v_t the teacher's there; the folder keeps it."""
    run = tiny("moons", *CMT_ON_MOONS)
    readings = shift(run, torch.device("cpu"))
    index = teacher.PairsIndex.of(run.teacher.pairs, run.objective.needs.teacher.points, run.path, run.data, "")
    for _ in range(2):  # made, then read
        made = teacher.make_pairs(index, readings, tmp_path, torch.device("cpu"), no_bar)
        assert made.between.shape == (12, 3, 2)
    x, c, z, between = made.batch(0, 12, seed=0)
    trail = torch.cat([x[:, None] / 2, between, z[:, None]], 1)
    for low, high in pairwise(range(5)):
        v = readings.velocity(trail[:, high], torch.full((12,), high / 4), c)
        assert torch.allclose(trail[:, low], trail[:, high] - v / 4, rtol=0, atol=1e-5)
    draws = make_draws(run.objective, (2,), seed=0, step=0, batch=12, z=False)
    taught = teacher_velocity(readings)
    b = add_noise(draws, run.path, x, c, 2, z=z, between=between, teacher=taught)
    assert torch.equal(b.x_t, torch.stack([trail[i, k] for i, k in enumerate((4 * b.t).int().tolist())]))
    assert torch.allclose(b.v_t, readings.velocity(b.x_t, b.t, c))
    doubled = add_noise(draws, run.path, x, c, 2, z=z, between=between, teacher=lambda x, t, c, v: 2 * x)
    assert torch.equal(doubled.v_t, 2 * b.x_t)
    assert torch.equal(b[3:7].on(b.r[3:7]), b.on(b.r)[3:7])


def test_a_trajectory_keeps_its_label() -> None:
    """Without labels, u would be the mean over the trajectories of all of them, which is the flow of none."""
    load("moons", [*CMT_ON_MOONS, "objective.drop=0.1"])  # it has no labels
    load("digits-cmt")
    with pytest.raises(UserError, match=r"objective\.drop = 0\.1, .*'cmt'.* set objective\.drop=0$"):
        load("digits-cmt", ["objective.drop=0.1"])


def test_without_a_teachers_pairs_it_is_refused() -> None:
    with pytest.raises(UserError, match=r"learns from a teacher's trajectories.*teacher\.source.*count: 8192"):
        load("moons", ["objective.kind=cmt"])
