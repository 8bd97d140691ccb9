"""Flow matching: its loss against its formula, written out by hand, and its defaults."""

import pytest

from dumo.flow.guide import Guide
from dumo.objectives import FlowMatching
from theory.formula import GUIDES, Polynomial, agree, guided, rows


@pytest.mark.parametrize("guide", GUIDES)
def test_formula(guide: Guide) -> None:
    objective = FlowMatching(guide=guide, drop=0.3)
    net, b = Polynomial(1), rows(objective)
    (v,), (v_null,) = net(b.x_t, b.c, t=b.t), net(b.x_t, b.null, t=b.t)
    loss = ((v - guided(b, guide, v, v_null)) ** 2).sum(1) / 2
    agree(objective, net, b, loss, {"v": loss})
