"""Terminal velocity matching: its loss by hand, its gradient through the derivative, guidance, its passes, corners."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dumo.flow.times import Pair
from dumo.objectives import TVM
from dumo.testing.exact import APART, D, ExactFlow, ExactNet, column, exact_batch, gaussian, gradient
from dumo.testing.properties import loss_of
from dumo.types import Heads, NoisyBatch
from theory.exact import PRODUCT
from theory.formula import agree, passes


class Curved(nn.Module):
    """u = a0 + a1 x + a2 t x + a3 x^2 + a4 t^2 + a5 r x + a6 r^2 + a7 r x^2 + a8 beta x + a9 beta r + label."""

    def __init__(self, seed: int = 2) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.a = nn.Parameter(torch.randn(10, generator=g, dtype=D))
        self.label = nn.Parameter(torch.randn(4, generator=g, dtype=D))

    def forward(self, x: Tensor, c: Tensor, /, *, t: Tensor, r: Tensor, beta: Tensor | None = None) -> Heads:
        t, r, beta = t[:, None], r[:, None], (0 * t if beta is None else beta)[..., None].view(-1, 1)
        a, r_x = self.a, r * x
        poly = a[0] + a[1] * x + a[2] * (t * x) + a[3] * (x * x) + a[4] * (t * t) + a[5] * r_x
        ends = a[6] * (r * r) + a[7] * (r_x * x) + a[8] * (beta * x) + a[9] * (beta * r)
        return (poly + ends + column(self.label[c]),)

    def end_derivative(self, x: Tensor, r: Tensor, beta: Tensor | float) -> Tensor:
        """du/dr by hand, as a function of the weights."""
        a = self.a
        return a[5] * x + 2 * a[6] * column(r) + a[7] * x**2 + a[9] * torch.as_tensor(beta, dtype=D).view(-1, 1)


def batch(objective: TVM) -> NoisyBatch:
    """A batch with the velocity of each row's data and noise, some labels dropped, and the corners of time."""
    b = exact_batch(objective, gaussian(), 64)
    b = replace(b, teacher=None, v_t=b.z - b.x)
    assert 0 < b.kept.sum() < 64 or not objective.drop
    return b


@pytest.mark.parametrize("scale", [1.0, 1.75])
@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize("law", ["gap", "pair"])
def test_by_hand(scale: float, online: bool, law: str) -> None:
    """With theta^- the net itself, and another; pairs have rows whose place says that they have r = t."""
    objective = TVM(scale=scale, drop=0.3) if law == "gap" else TVM(scale=scale, drop=0.3, times=Pair())
    net, b = Curved(), batch(objective)
    ref = net if online else Curved(seed=5)
    w = torch.where(b.kept, scale, 1.0).to(D)
    knobs = {"beta": 1 / w} if scale != 1 else {}
    gap, s = column(b.t - b.r), b.drawn["s"]

    (u,) = net(b.x_t, b.c, t=b.t, r=b.r, **knobs)
    df_dr = u - gap * net.end_derivative(b.x_t, b.r, 1 / w if scale != 1 else 0.0)
    landed = (b.x_t - gap * u).detach()
    terminal = (df_dr - ref(landed, b.c, t=b.r, r=b.r, **knobs)[0].detach()).square().mean(1)
    terminal = torch.where(b.t == b.r, 0, terminal / w**2)
    assert (terminal == 0).sum() == (3 if law == "gap" else (b.t == b.r).sum())

    x_s = column(s) * b.z + column(1 - s) * b.x
    (v,) = net(x_s, b.c, t=s, r=s, **knobs)
    (v_null,) = ref(x_s, b.null, t=s, r=s, **({"beta": 1 + 0 * w} if scale != 1 else {}))
    v_star = column(w) * (b.z - b.x) + column(1 - w) * v_null.detach()
    flow = (v - v_star).square().mean(1) / w**2

    agree(objective, net, b, terminal + flow, {"terminal": terminal, "flow": flow}, ref=ref)
    assert all(p.grad is None for p in ref.parameters()) or online


def test_the_derivative_is_trained() -> None:
    """It is no target: without its gradient the weight of r^2 would get another one."""
    objective = TVM(scale=1.0)
    net, b = Curved(), batch(objective)
    (found,) = torch.autograd.grad(loss_of(objective, net, b).parts["terminal"].mean(), [net.a])
    gap = column(b.t - b.r)
    (u,) = net(b.x_t, b.c, t=b.t, r=b.r)
    (v_r,) = net(b.x_t - gap * u, b.c, t=b.r, r=b.r)
    error = u - gap * net.end_derivative(b.x_t, b.r, 0.0).detach() - v_r.detach()
    (detached,) = torch.autograd.grad(error.square().mean(), [net.a])
    assert (found[6] - detached[6]).abs() > 0.1


FLOWS = [gaussian(), APART, PRODUCT]


@pytest.mark.slow
@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: type(flow).__name__)
def test_rests_at_the_flow(flow: ExactFlow) -> None:
    """Without guidance, also if means are not zero and there are components; guided: tests/theory/test_fixed_point."""
    objective = TVM(scale=1.0, drop=0.2)
    net, b = ExactNet(flow, objective.needs), exact_batch(objective, flow)
    assert gradient(objective, net, b).abs().max() < 1e-10
    net.probe.data[0] = torch.tensor([0.1, -0.1], dtype=D)
    assert gradient(objective, net, b).abs().min() > 1e-3


def test_passes() -> None:
    """With gradients the jump and the velocity; without, the velocity at the end and, guided, that of no label."""
    for scale, still in ((1.0, 1), (2.0, 2)):
        objective = TVM(scale=scale, drop=0.0)
        assert passes(objective, batch(objective)) == (2, still)


def test_beta_is_an_input_with_guidance_only() -> None:
    assert TVM(scale=1.0).needs.knobs == {}
    assert TVM(scale=1.6).needs.knobs == {"beta": 0.625}
    assert TVM().needs.inputs == ("t", "r")
