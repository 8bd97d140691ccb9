"""Terminal velocity matching: its loss by hand, its gradient through the derivative, its passes, its corners."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from contract.case import step
from dumo.objectives import TVM
from dumo.types import Heads, Noised
from theory.exact import APART, PRODUCT, D, Exact, Flow, column, gaussian, gradient, record
from theory.formula import agree


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
        return (
            poly + a[6] * (r * r) + a[7] * (r_x * x) + a[8] * (beta * x) + a[9] * (beta * r) + column(self.label[c]),
        )

    def rate(self, x: Tensor, r: Tensor, beta: Tensor | float) -> Tensor:
        """du/dr on paper, which the weights can still be asked about."""
        a = self.a
        return a[5] * x + 2 * a[6] * column(r) + a[7] * x**2 + a[9] * torch.as_tensor(beta, dtype=D).view(-1, 1)


def rows(objective: TVM, flow: Flow | None = None) -> Noised:
    """A record with slopes as they fall, labels dropped here and there, and the corners of time."""
    b = record(objective, flow or gaussian(), 64)
    b = replace(b, teacher=None, v_t=b.z - b.x)
    assert 0 < b.kept.sum() < 64 or not objective.drop
    return b


@pytest.mark.parametrize("scale", [1.0, 1.75])
@pytest.mark.parametrize("online", [True, False])
def test_by_hand(scale: float, online: bool) -> None:
    """With theta^- the net itself, and another."""
    objective = TVM(scale=scale, drop=0.3)
    net, b = Curved(), rows(objective)
    other = net if online else Curved(seed=5)
    w = torch.where(b.kept, scale, 1.0).to(D)
    told = {"beta": 1 / w} if scale != 1 else {}
    gap, s = column(b.t - b.r), b.drawn["s"]

    (u,) = net(b.x_t, b.c, t=b.t, r=b.r, **told)
    df_dr = u - gap * net.rate(b.x_t, b.r, 1 / w if scale != 1 else 0.0)
    landed = (b.x_t - gap * u).detach()
    terminal = ((df_dr - other(landed, b.c, t=b.r, r=b.r, **told)[0].detach()) ** 2).sum(1) / 2
    terminal = torch.where(b.t == b.r, 0, terminal / w**2)
    assert (terminal == 0).sum() == 3  # the corners, and no more

    x_s = column(s) * b.z + column(1 - s) * b.x
    (v,) = net(x_s, b.c, t=s, r=s, **told)
    (v_null,) = other(x_s, b.null, t=s, r=s, **({"beta": 1 + 0 * w} if scale != 1 else {}))
    v_star = column(w) * (b.z - b.x) + column(1 - w) * v_null.detach()
    flow = ((v - v_star) ** 2).sum(1) / 2 / w**2

    agree(objective, net, b, terminal + flow, {"terminal": terminal, "flow": flow}, ref=other)
    assert all(p.grad is None for p in other.parameters())


def test_a_rate_held_still_would_be_another_gradient() -> None:
    """The derivative is trained, not a target: without its gradient a6, of r alone, would learn otherwise."""
    objective = TVM(scale=1.0)
    net, b = Curved(), rows(objective)
    (found,) = torch.autograd.grad(step(objective, net, b).parts["terminal"].mean(), [net.a])
    gap = column(b.t - b.r)
    (u,) = net(b.x_t, b.c, t=b.t, r=b.r)
    e = u - gap * net.rate(b.x_t, b.r, 0.0).detach() - net(b.x_t - gap * u, b.c, t=b.r, r=b.r)[0].detach()
    (still,) = torch.autograd.grad((e**2).sum(1).mean() / 2, [net.a])
    assert (found[6] - still[6]).abs() > 0.1


ON = [gaussian(), APART, PRODUCT]


@pytest.mark.slow
@pytest.mark.parametrize("flow", ON, ids=lambda f: type(f).__name__)
def test_rests_at_the_flow(flow: Flow) -> None:
    """Unguided, where means are not zero and components several; guided, see tests/theory/test_fixed_point.py."""
    objective = TVM(scale=1.0, drop=0.2)
    net, b = Exact(flow, objective.needs), record(objective, flow)
    assert gradient(objective, net, b).abs().max() < 1e-10
    net.probe.data[0] = torch.tensor([0.1, -0.1], dtype=D)
    assert gradient(objective, net, b).abs().min() > 1e-3


def test_without_guidance_the_net_is_told_of_none() -> None:
    assert TVM(scale=1.0).needs.knobs == {}
    assert TVM(scale=1.6).needs.knobs == {"beta": 0.625}
    assert TVM().needs.inputs == ("t", "r")
    with pytest.raises(ValidationError):
        TVM(scale=0.5)
