"""FreeFlow: the published formula in its own clock, its rest at the teacher's flow, what it reads, its one pass."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from dumo.config.load import load
from dumo.objectives import FreeFlow, freeflow
from dumo.testing.exact import APART, D, ExactFlow, ExactNet, column, exact_batch, gaussian, gradient, growth
from dumo.testing.properties import loss_of
from dumo.types import Heads, UserError
from theory.exact import PRODUCT, drawn
from theory.formula import Polynomial, agree, gradients, passes

OBJECTIVE = FreeFlow(drop=0.3)


def test_agrees_with_the_paper() -> None:
    """By its words: delta runs from noise at 0 to data at 1, and velocities go towards the data, u = -v and F = -u.

    Eq. 7 to 11 in the accounts of it, with the weights of its ablation; means over four groups of eight rows.
    """
    net, b = Polynomial(2), drawn(OBJECTIVE, 32, APART, teacher=True)
    delta, r = 1 - b.drawn["r"].to(D), b.drawn["w.t"].to(D)
    noise = b.drawn["w.z"].to(D)

    def teacher(x: Tensor, t: Tensor) -> Tensor:
        return -APART.velocity(x, b.c, t)

    def average(delta: Tensor) -> Tensor:
        return -net(b.z, b.c, t=torch.ones_like(delta), r=1 - delta)[0]

    # prediction
    f_delta, df_ddelta = torch.func.jvp(average, (delta,), (torch.ones_like(delta),))  # pyright: ignore[reportAssignmentType]
    place = (b.z + column(delta) * f_delta).detach()
    target = teacher(place, 1 - delta) - column(delta) * df_ddelta.detach()
    gap_g = (f_delta - target).detach()
    square = gap_g.square().mean(1)
    weighted = gap_g / column(square + 1e-3)

    # correction
    f_one = average(torch.ones_like(delta))
    clean = (b.z + f_one).detach()
    noised = column(1 - r) * clean + column(r) * noise
    noising = -net(noised, b.c, t=r, r=r)[1]
    fit = (noising + (noise - clean)).square().mean(1)
    gap_n = noising.detach() - teacher(noised, r)
    lengths = [gap.square().mean(1).sqrt().view(4, 8).mean(1) for gap in (weighted, gap_n)]
    balance = (lengths[0] / (lengths[1] + 1e-3)).repeat_interleave(8)

    pull = 2 * (0.75 * (f_delta * weighted).mean(1) + 0.25 * balance * (f_one * gap_n).mean(1))
    value = 0.75 * square / (square + 1e-3) + 0.25 * balance * gap_n.square().mean(1) + freeflow.HEAD_WEIGHT * fit
    agree(
        OBJECTIVE,
        net,
        b,
        value,
        {"u": square, "w": fit},
        moved_as=pull + freeflow.HEAD_WEIGHT * fit,
        pull_w=gap_n.square().mean(1),
    )


@pytest.mark.parametrize("flow", [gaussian(), APART, PRODUCT], ids=["gaussian", "apart", "mixture"])
def test_it_rests_at_the_flow(flow: ExactFlow) -> None:
    """Row by row for u; for w on average only, which is the next test's. Off the flow it moves."""
    net, b = ExactNet(flow, OBJECTIVE.needs), exact_batch(OBJECTIVE, flow, 64)
    assert gradient(OBJECTIVE, net, b)[0].abs().max() < 1e-10
    net.probe.data[0] = torch.tensor([0.1, -0.1], dtype=D)
    assert gradient(OBJECTIVE, net, b)[0].abs().min() > 1e-3


def test_the_head_of_samples_rests_at_the_flow() -> None:
    """The mean over noise, exactly: the gradient is of second order in both noises, of which +-1 have the moments."""
    every = torch.tensor(list(product((1, -1), repeat=3)), dtype=D)
    z, z_again, _ = (column(a).repeat(1, 2) for a in every.T)
    b = drawn(OBJECTIVE, 8, teacher=True)
    net = ExactNet(gaussian(), OBJECTIVE.needs)
    for t in (0.0, 0.3, 1.0):
        laws = {**b.drawn, "w.z": z_again, "w.t": torch.full_like(b.t, t)}
        at = replace(b, z=z, c=0 * b.c, drawn=laws)
        (left,) = torch.autograd.grad(loss_of(OBJECTIVE, net, at).parts["w"].mean(), net.probe)
        assert left.abs().max() < 1e-12
        same_noise = replace(at, drawn={**laws, "w.z": z})
        (left,) = torch.autograd.grad(loss_of(OBJECTIVE, net, same_noise).parts["w"].mean(), net.probe)
        assert left.abs().max() > 1e-3


class Wide(nn.Module):
    """Samples are z times `width`, and w knows their velocity."""

    def __init__(self, width: float) -> None:
        super().__init__()
        self.width = nn.Parameter(torch.tensor(width, dtype=D))

    def forward(self, x: Tensor, c: Tensor, /, *, t: Tensor, r: Tensor) -> Heads:
        return (x - self.width * x + 0 * column(r) * x, column(growth(self.width.detach(), t)) * x)


@pytest.mark.parametrize(("width", "sign"), [(0.9, 1), (0.6, 0), (0.4, -1)])
def test_samples_of_another_width_are_corrected(width: float, sign: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the correction alone; the teacher's data have the deviation 0.6."""
    monkeypatch.setattr(freeflow, "CORRECTION_WEIGHT", 1.0)
    net, b = Wide(width), drawn(OBJECTIVE, 256, teacher=True)
    b = replace(b, c=torch.ones_like(b.c))
    (grad,) = gradients(loss_of(OBJECTIVE, net, b).loss, net)
    if sign:
        assert sign * grad > 0.01
    else:
        assert abs(grad) < 1e-12


def test_of_the_data_nothing_is_read() -> None:
    net, b = Polynomial(2), drawn(OBJECTIVE, 16, teacher=True)
    other = replace(b, x=b.x + 1, x_t=b.x_t - 2, v_t=0 * b.v_t)
    assert torch.allclose(loss_of(OBJECTIVE, net, b).loss, loss_of(OBJECTIVE, net, other).loss, rtol=1e-12)


def test_passes() -> None:
    assert passes(OBJECTIVE, drawn(OBJECTIVE, 16, teacher=True)) == (3, 0)


def test_the_jump_is_to_the_data() -> None:
    net, b = Polynomial(2), drawn(OBJECTIVE, 16)
    readings = OBJECTIVE.readings(net)
    assert readings.endpoint is not None
    one = torch.ones_like(b.t)
    assert torch.equal(readings.endpoint(b.z, one, b.c), b.z - net(b.z, b.c, t=one, r=0 * one)[0])


def test_it_is_for_one_pass() -> None:
    assert load("digits-freeflow").sample.nfe == (1,)
    with pytest.raises(UserError, match=r"below t = 1, where it was not trained"):
        load("digits-freeflow", ["sample.nfe=[2]"])


def test_it_asks_for_a_teacher() -> None:
    with pytest.raises(UserError, match=r"objective 'freeflow' learns from a teacher's velocity"):
        load("digits-freeflow", ["teacher=null"])
