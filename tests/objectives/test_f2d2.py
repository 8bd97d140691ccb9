"""F2D2: the formula by hand, its passes, and what its times must be. `tests/theory/test_likelihood.py` reads it."""

import pytest
import torch

from dumo.flow.slope import DualSlope, JvpSlope, Slope
from dumo.objectives import F2D2
from dumo.testing.exact import column
from dumo.testing.properties import loss_of
from theory.formula import Told, agree, half, rows


@pytest.mark.parametrize("slope", [JvpSlope(), DualSlope()], ids=lambda s: s.kind)
def test_by_hand(slope: Slope) -> None:
    objective = F2D2(drop=0.3, slope=slope)
    net, b = Told(3, 1, 2), rows(objective)
    assert (b.r < b.t).any()
    assert (b.r > b.t).any()
    v, u, g = net(b.x_t, b.c, t=b.t, r=b.r)
    du, dg = (net.slope(i, b.x_t, b.t, b.r, b.v_t) for i in (1, 2))
    _, one, by_t, by_x, *_ = net.a[0].detach()
    diagonal = one + by_t * column(b.t) + 2 * by_x * b.x_t  # of dv/dx, whatever the signs
    e = {"v": v - b.v_t, "u": u - b.v_t + column(b.t - b.r) * du, "g": g - diagonal + column(b.t - b.r) * dg}
    parts = {name: (error**2).sum(1) / 2 for name, error in e.items()}
    loss = 0.55 * parts["v"] + 0.35 * parts["u"] + 0.1 * parts["g"]
    agree(objective, net, b, loss, parts, clipped_share_u=half(e["u"]), clipped_share_g=half(e["g"]))


def test_the_divergence_is_that_of_the_velocity_at_the_times_of_the_jump() -> None:
    """Of a network that shows r to all heads."""
    objective = F2D2(drop=0.3, slope=DualSlope())
    net, b = Told(3, 0, 1, 2), rows(objective)
    g = net(b.x_t, b.c, t=b.t, r=b.r)[2]
    x = b.x_t.clone().requires_grad_()
    (v_of_x,) = torch.autograd.grad(net(x, b.c, t=b.t, r=b.r)[0].sum(), x)
    error = g - v_of_x + column(b.t - b.r) * net.slope(2, b.x_t, b.t, b.r, b.v_t)
    assert torch.allclose(loss_of(objective, net, b).parts["g"], (error**2).sum(1) / 2)


def test_jumps_must_go_up_too() -> None:
    with pytest.raises(ValueError, match="both_ways=true"):
        F2D2.model_validate({"times": {"kind": "jumps"}})
