"""DuMo: its loss against its formula, written out by hand, and its defaults against the paper."""

import pytest

from dumo.flow.guide import Guide
from dumo.flow.slope import JvpSlope
from dumo.objectives import DuMo
from dumo.testing.exact import column
from theory.formula import GUIDES, Polynomial, agree, guided, half, rows


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("beta", [0.7, 0.1])
def test_formula(guide: Guide, beta: float) -> None:
    objective = DuMo(guide=guide, slope=JvpSlope(), beta=beta, drop=0.3)
    net, b = Polynomial(2), rows(objective)
    v, u = net(b.x_t, b.c, t=b.t)
    v_star = guided(b, guide, v, net(b.x_t, b.null, t=b.t)[0])
    du_dt = net.slope(1, b.x_t, b.t, 0 * b.t, v_star)
    u_star = v_star - column(b.t) * du_dt
    v_loss, u_loss = ((v - v_star) ** 2).sum(1) / 2, ((u - u_star) ** 2).sum(1) / 2
    gap = ((v - (u + column(b.t) * du_dt)) ** 2).sum(1) / 2
    loss, parts = beta * v_loss + (1 - beta) * u_loss, {"v": v_loss, "u": u_loss}
    agree(objective, net, b, loss, parts, clipped_share=half(u - u_star), head_gap=gap)
