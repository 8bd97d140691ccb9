"""DuMo-Any: the formula by hand, DuMo within it, its metric, passes and readings."""

import pytest
import torch

from contract.case import nets
from dumo.config.load import load
from dumo.flow.guide import Guide
from dumo.flow.slope import JvpSlope
from dumo.flow.times import Jumps
from dumo.objectives import DuMo, DuMoAny
from dumo.testing.exact import D, column
from dumo.testing.network import randomise
from dumo.testing.properties import loss_of
from theory.exact import drawn
from theory.formula import GUIDES, Told, agree, guided, half, rows


@pytest.mark.parametrize("guide", GUIDES[:3])
@pytest.mark.parametrize(("power", "beta"), [(0.0, 0.7), (1.0, 0.7), (0.5, 0.4)])
def test_by_hand(guide: Guide, power: float, beta: float) -> None:
    objective = DuMoAny(guide=guide, power=power, beta=beta, drop=0.3, slope=JvpSlope())
    net, b = Told(2, 1), rows(objective)
    v, u = net(b.x_t, b.c, t=b.t, r=b.r)
    v_star = guided(b, guide, v, net(b.x_t, b.null, t=b.t)[0])
    e = u - v_star + column(b.t - b.r) * net.slope(1, b.x_t, b.t, b.r, v_star)
    square = (e**2).sum(1)
    measured = square / (square + 0.01).detach() ** power if power else square / 2
    v_loss = ((v - v_star) ** 2).sum(1) / 2
    loss = beta * v_loss + (1 - beta) * measured
    agree(objective, net, b, loss, {"v": v_loss, "u": square / 2}, clipped_share=half(e))


def test_only_the_rows_that_jump_are_derived() -> None:
    """By their place: where none does there is no further pass."""
    objective = DuMoAny(slope=JvpSlope(), guide=Guide(), times=Jumps(velocity_ratio=0.75))
    b, sizes = drawn(objective), list[int]()
    model = randomise(nets()[0].build(objective.needs, (2,), 3)).double()
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    loss_of(objective, model, b)
    assert sizes == [64, 16]


def test_reading() -> None:
    net = Told(2, 1)
    x, c = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=D), torch.arange(5) % 4
    t, s = torch.full((5,), 0.8, dtype=D), torch.full((5,), 0.3, dtype=D)
    readings = DuMoAny().readings(net)
    assert torch.equal(readings.velocity(x, t, c), net(x, c, t=t)[0])
    assert torch.allclose(readings.endpoint(x, t, c), x - 0.8 * net(x, c, t=t, r=0 * t)[1])
    assert torch.allclose(readings.flow_map(x, t, s, c), x - 0.5 * net(x, c, t=t, r=s)[1])


def test_defaults() -> None:
    """All but times are DuMo's; the recipe takes MeanFlow's metric."""
    o, dumo = DuMoAny(), DuMo()
    assert (o.drop, o.beta, o.guide, o.slope, o.power) == (dumo.drop, dumo.beta, dumo.guide, dumo.slope, 0)
    assert (o.needs.inputs, o.needs.heads, o.needs.own) == (("t",), ("v", "u"), {"u": ("r",)})
    best = load("dumo-best").objective
    assert isinstance(best, DuMoAny)
    assert (best.beta, best.power) == (0.7, 1.0)
