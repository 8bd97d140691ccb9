"""The net by which every formula is tested."""

from dumo.objectives import MeanFlow
from theory.exact import table
from theory.formula import Polynomial, rows


def test_polynomial_slopes_are_right() -> None:
    """By central differences, so that the hand has been checked too."""
    net, b = Polynomial(1), rows(MeanFlow())
    h, w = 1e-5, table([0.3, -0.7])
    ahead, behind = (net(b.x_t + s * w, b.c, t=b.t + s, r=b.r)[0] for s in (h, -h))
    assert ((ahead - behind) / (2 * h) - net.slope(0, b.x_t, b.t, b.r, w)).abs().max() < 1e-8
