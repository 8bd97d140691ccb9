"""Lagrangian self-distillation: its port's loss in the port's clock, guidance, its rest at the flow, its passes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dumo.autodiff.dual import Dual
from dumo.config.load import load
from dumo.flow.guide import Guide
from dumo.flow.noisy_batch import draw
from dumo.flow.path import Linear
from dumo.flow.times import Below, Pair
from dumo.nets import DiT
from dumo.objectives import LSD
from dumo.objectives.lsd import BETA
from dumo.testing.exact import APART, D, ExactFlow, ExactNet, column, exact_batch, gaussian, gradient
from dumo.testing.network import randomise
from dumo.testing.properties import loss_of
from dumo.types import Heads, NoisyBatch
from theory.exact import PRODUCT
from theory.formula import GUIDES, agree, guided, passes, rows

SPREAD = Pair(velocity_ratio=0.25)  # three quarters of the rows have r < t
FORMS = [LSD(times=SPREAD, drop=0.3), LSD(times=SPREAD, drop=0.3, two_heads=True)]


def form(objective: LSD) -> str:
    return "two_heads" if objective.two_heads else "one_net"


each = pytest.mark.parametrize("objective", FORMS, ids=form)


class Wavy(nn.Module):
    """Head i is a_0 + a_1 x + a_2 sin(t x) + a_3 sin(2 r + x) + a_4 r^2 x + label; of two heads the first sees no r."""

    def __init__(self, heads: int, seed: int = 2) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.a = nn.Parameter(torch.randn(heads, 5, generator=g, dtype=D))
        self.label = nn.Parameter(torch.randn(heads, 4, generator=g, dtype=D))

    def forward(self, x: Tensor, c: Tensor, /, *, t: Tensor, r: Tensor) -> Heads:
        heads: list[Tensor] = []
        for i in range(len(self.a)):
            a = self.a[i]
            r_of_head = 0 * t if i < len(self.a) - 1 else r
            t_row, r_row = t[:, None], r_of_head[:, None]
            wave = a[2] * (t_row * x).sin() + a[3] * (2 * r_row + x).sin()
            heads.append(a[0] + a[1] * x + wave + a[4] * (r_row * r_row * x) + column(self.label[i][c]))
        return tuple(heads)


def port_residuals(net: nn.Module, ref: nn.Module, b: NoisyBatch) -> tuple[Tensor, Tensor]:
    """What lucidrains' `LsdFlow` and the authors' `lsd_term` square off the diagonal and on it, by their words.

    Their clock runs from noise at 0 to data at 1, and a jump goes up from s to t: X_st(x) = x + (t - s) v_st(x).
    """
    s, t = 1 - b.t, 1 - b.r

    def velocity(net: nn.Module, x: Tensor, s: Tensor, t: Tensor, head: int) -> Tensor:
        return -net(x, b.c, t=1 - s, r=1 - t)[head]

    def flow_map(t: Tensor) -> Tensor:
        return b.x_t + column(t - s) * velocity(net, b.x_t, s, t, -1)

    x_hat, dxt = torch.func.jvp(flow_map, (t,), (torch.ones_like(t),))  # pyright: ignore[reportAssignmentType]
    teacher = velocity(ref, x_hat.detach(), t, t, 0).detach()
    return dxt - teacher, velocity(net, b.x_t, s, s, -1) - (b.x - b.z)


@each
@pytest.mark.parametrize("online", [True, False])
def test_agrees_with_the_port(objective: LSD, online: bool) -> None:
    """With theta^- the net itself, and another."""
    net, b = Wavy(1 + objective.two_heads), rows(objective)
    ref = net if online else Wavy(1 + objective.two_heads, seed=5)
    off_diagonal, diagonal = port_residuals(net, ref, b)
    has_step = b.r < b.t
    assert 0 < has_step.sum() < len(b.t)
    u_loss = torch.where(has_step, off_diagonal.square().mean(1), diagonal.square().mean(1))
    loss, parts = u_loss, {"u": u_loss}
    if objective.two_heads:
        v_loss = (net(b.x_t, b.c, t=b.t, r=b.r)[0] - (b.z - b.x)).square().mean(1)
        loss, parts = BETA * v_loss + (1 - BETA) * u_loss, {"v": v_loss, "u": u_loss}
    agree(objective, net, b, loss, parts, ref=ref)
    assert all(p.grad is None for p in ref.parameters())


@each
@pytest.mark.parametrize("guide", GUIDES)
def test_guidance_is_of_the_velocity(objective: LSD, guide: Guide) -> None:
    """At r = t, and of the head v; where r < t, the net's own velocity is guided already."""
    objective = objective.model_copy(update={"guide": guide})
    net, b = Wavy(1 + objective.two_heads), rows(objective)
    off_diagonal, _ = port_residuals(net, net, b)
    v_c, v_null = (net(b.x_t, c, t=b.t, r=b.t)[0] for c in (b.c, b.null))
    v_star = guided(b, guide, v_c, v_null)
    diagonal = net(b.x_t, b.c, t=b.t, r=b.t)[-1] - v_star
    u_loss = torch.where(b.r < b.t, off_diagonal.square().mean(1), diagonal.square().mean(1))
    loss, parts = u_loss, {"u": u_loss}
    if objective.two_heads:
        v_loss = (v_c - v_star).square().mean(1)
        loss, parts = BETA * v_loss + (1 - BETA) * u_loss, {"v": v_loss, "u": u_loss}
    agree(objective, net, b, loss, parts)


FLOWS = [gaussian(), APART, PRODUCT]


@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: type(flow).__name__)
def test_two_heads_rest_at_the_flow(flow: ExactFlow) -> None:
    """One net does, too: see tests/theory/test_fixed_point.py."""
    objective = LSD(times=SPREAD, drop=0.2, two_heads=True)
    net, b = ExactNet(flow, objective.needs), exact_batch(objective, flow)
    assert gradient(objective, net, b).abs().max() < 1e-12
    net.probe.data[:] = torch.tensor([0.1, -0.1], dtype=D)
    assert gradient(objective, net, b).abs().min() > 1e-3


@each
def test_readings(objective: LSD) -> None:
    """The velocity is the first head at r = t, jumps are of the last."""
    net, b = Wavy(1 + objective.two_heads), rows(objective)
    readings = objective.readings(net)
    assert readings.velocity is not None
    assert readings.flow_map is not None
    assert torch.equal(readings.velocity(b.x_t, b.t, b.c), net(b.x_t, b.c, t=b.t, r=b.t)[0])
    jump = b.x_t - column(b.t - b.r) * net(b.x_t, b.c, t=b.t, r=b.r)[-1]
    assert torch.equal(readings.flow_map(b.x_t, b.t, b.r, b.c), jump)


def test_only_the_rows_that_jump_are_derived() -> None:
    """One net: a pass of those rows, one of the others, and the velocity where jumps end. Two heads: one and one."""
    objective = LSD()
    b = rows(objective)
    still = replace(b, moving=(False,) * len(b.t))
    assert passes(objective, replace(b, moving=objective.times.moving(len(b.t)))) == (2, 1)
    assert passes(objective, still) == (1, 0)
    assert passes(LSD(times=Below(), two_heads=True), b) == (1, 1)


@pytest.mark.parametrize("two_heads", [True, False])
def test_two_heads_have_no_derivative_in_the_trunk(two_heads: bool) -> None:
    """No block gets a dual number, so attention stays fused."""
    objective = LSD(times=Below(), two_heads=two_heads)
    net = randomise(DiT(width=16, depth=2, attention=2, patch=2).build(objective.needs, (1, 4, 4), 3))
    has_dual: list[bool] = []
    for block in net.get_submodule("blocks").children():
        block.register_forward_pre_hook(lambda _, inputs: has_dual.append(any(isinstance(a, Dual) for a in inputs)))
    x, c = torch.ones(2, 1, 4, 4), torch.zeros(2, dtype=torch.long)
    loss_of(objective, net, draw(objective, Linear(), x, c, 3, seed=0, step=0))
    assert any(has_dual) is not two_heads


def test_defaults_and_recipes() -> None:
    """The paper's, and ours; in neither does the trunk of two heads get r."""
    assert LSD().needs.inputs == ("t", "r")
    assert LSD(two_heads=True).needs.inputs == ("t",)
    assert LSD(two_heads=True).needs.own == {"u": ("r",)}
    one_net, two_heads = (load(name).objective for name in ("digits-lsd", "digits-lsd-two-heads"))
    assert isinstance(one_net, LSD)
    assert isinstance(two_heads, LSD)
    assert two_heads.two_heads is not one_net.two_heads
    assert two_heads.two_heads
