"""Formulas that several losses share, away from the exact flow; and the net by which every formula is tested."""

import pytest
import torch

from dumo.flow.guide import Guide, Interval
from dumo.flow.slope import JvpSlope
from dumo.flow.times import Pair
from dumo.objectives import DuMo, FlowMatching, MeanFlow
from dumo.types import Frozen, Objective
from theory.exact import table
from theory.formula import Polynomial, gradients, rows


@pytest.mark.parametrize(
    "objective",
    [FlowMatching(), DuMo(beta=1.0, slope=JvpSlope()), MeanFlow(power=0.0, times=Pair(velocity_ratio=1.0))],
    ids=lambda o: o.kind,
)
def test_an_average_halves_the_gradient_of_v(objective: Objective) -> None:
    """Where the net's own pass is V(c), v_hat - (v_t + v_hat) / 2: half the gradient, a quarter of the loss.

    On rows of no label, and on others outside the interval. MeanFlow's u at r = t is such a v.
    """
    assert isinstance(objective, DuMo | FlowMatching | MeanFlow)
    late = Interval(low=1.0)  # no row of this record
    for drop, interval in ((1.0, Interval()), (0.0, late)):
        average = Guide(zeta=0.5, interval=interval, elsewhere="average")
        halved = objective.model_copy(update={"guide": average, "drop": drop})
        whole = objective.model_copy(update={"guide": Guide(), "drop": drop})
        net, b = Polynomial(len(objective.needs.heads)), rows(halved)[5:]  # the first are at the corners of time
        less, more = halved.loss(net, Frozen(net), b).loss, whole.loss(net, Frozen(net), b).loss
        assert torch.allclose(less, more / 4, rtol=1e-12, atol=0)
        for mine, plain in zip(gradients(less, net), gradients(more, net), strict=True):
            assert torch.allclose(mine, plain / 2, rtol=1e-11, atol=1e-14)


def test_polynomial_slopes_are_right() -> None:
    """By central differences, so that the hand has been checked too."""
    net, b = Polynomial(1), rows(MeanFlow())
    h, w = 1e-5, table([0.3, -0.7])
    ahead, behind = (net(b.x_t + s * w, b.c, t=b.t + s, r=b.r)[0] for s in (h, -h))
    assert ((ahead - behind) / (2 * h) - net.slope(0, b.x_t, b.t, b.r, w)).abs().max() < 1e-8
