"""SplitMeanFlow: its formula by hand, the identity wherever a jump is split, its limit, and its passes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dumo.objectives import SplitMeanFlow
from dumo.testing.exact import APART, ExactFlow, ExactNet, column, exact_batch, gaussian
from dumo.testing.network import CountedNet
from dumo.testing.properties import loss_of
from dumo.types import Heads, NoisyBatch
from theory.exact import drawn, falls
from theory.formula import Polynomial, agree, rows


def target_by_hand(ref: Polynomial, b: NoisyBatch) -> Tensor:
    """u* of every row: the displacement over both parts divided by t - r if r < t, else v_t."""
    lam = b.drawn["lam"].to(b.t)
    s = b.t - lam * (b.t - b.r)
    (first,) = ref(b.x_t, b.c, t=b.t, r=s)
    x_s = b.x_t - column(b.t - s) * first
    (second,) = ref(x_s, b.c, t=s, r=b.r)
    x_r = x_s - column(s - b.r) * second
    mean = (b.x_t - x_r) / column((b.t - b.r).clamp(min=1e-9))
    return torch.where(column(b.r < b.t), mean, b.v_t).detach()


@pytest.mark.parametrize("known", [True, False], ids=["places", "no places"])
def test_loss_and_gradient_are_those_of_the_formula(known: bool) -> None:
    objective = SplitMeanFlow(drop=0.3)
    net, ref = Polynomial(1), Polynomial(1)
    ref.a.data = ref.a.data.roll(1) / 2
    b = drawn(objective, 24) if known else rows(objective)
    assert (b.moving is not None) == known
    (u,) = net(b.x_t, b.c, t=b.t, r=b.r)
    loss = (u - target_by_hand(ref, b)).square().mean(1)
    agree(objective, net, b, loss, {"u": loss}, ref=ref, close=1e-10)


@pytest.mark.parametrize("low", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("flow", [gaussian(), APART], ids=["centred", "apart"])
def test_each_row_is_at_rest_at_the_flow_wherever_it_is_split(flow: ExactFlow, low: float) -> None:
    """The identity holds for each row, not only in the mean."""
    objective = SplitMeanFlow()
    b = exact_batch(objective, flow, 64)
    b = replace(b, drawn={"lam": low + 1e-3 * b.drawn["lam"]})
    assert loss_of(objective, ExactNet(flow, objective.needs), b).loss.max() < 1e-20


def test_its_limit_is_the_identity_of_meanflow() -> None:
    """u* - u = lam (v - u - (t - r) du/dt) + O(lam^2), if u is the velocity at r = t: the paper's theorem."""

    class WithVelocity(Polynomial):
        """u = v(x, t) + (t - r) w(x, t, r), for polynomials v and w."""

        def forward(self, x: Tensor, c: Tensor, /, *, t: Tensor, r: Tensor | None = None) -> Heads:
            assert r is not None
            v, _ = super().forward(x, c, t=t)
            _, w = super().forward(x, c, t=t, r=r)
            return (v + column(t - r) * w,)

    objective, net = SplitMeanFlow(drop=0.0), WithVelocity(2)
    b = rows(objective)
    b = b[(b.t - b.r > 0.1).nonzero()[:, 0]]
    (u,), (v,) = net(b.x_t, b.c, t=b.t, r=b.r), net(b.x_t, b.c, t=b.t, r=b.t)
    one, nothing = torch.ones_like(b.t), torch.zeros_like(b.t)
    _, du_dt = torch.func.jvp(lambda x, t, r: net(x, b.c, t=t, r=r)[0], (b.x_t, b.t, b.r), (v, one, nothing))
    residual = v - u - column(b.t - b.r) * du_dt
    left: list[Tensor] = []
    for lam in (0.02, 0.01, 0.005):
        u_star = target_by_hand(net, replace(b, drawn={"lam": lam * one}))
        left.append(((u_star - u) / lam - residual).norm())
    assert falls(left, 1)


class CountedRows(CountedNet):
    """Counts rows, too."""

    rows = 0

    def forward(self, x: Tensor, c: Tensor, /, **inputs: Tensor) -> Heads:
        """A pass of the network."""
        self.rows += len(x)
        return super().forward(x, c, **inputs)


def test_passes_are_of_the_rows_that_need_them() -> None:
    """One of all 24 rows with gradients; two without, of the quarter that jumps."""
    objective = SplitMeanFlow(drop=0.0)
    loss_of(objective, net := CountedRows(Polynomial(1)), drawn(objective, 24))
    assert (net.graded, net.still, net.rows) == (1, 2, 36)
