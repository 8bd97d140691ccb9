"""Defaults are the papers': a change of one is a change of method, and must be meant."""

import pytest

from dumo.flow.guide import Guide, Interval
from dumo.flow.slope import CentralSlope, JvpSlope
from dumo.flow.times import Beta, LogitNormal, Pair, Uniform
from dumo.objectives import DuMo, FlowMatching, MeanFlow


def test_dumo() -> None:
    """Tab. 3 and Alg. 1."""
    o = DuMo()
    assert (o.beta, o.drop) == (0.7, 0.1)
    assert o.times == Beta(a=2.4, b=2.4)
    assert o.guide == Guide(omega=1, zeta=0.55, interval=Interval(low=0, high=1))
    assert o.guide.scale == pytest.approx(2.2222, abs=1e-4)
    assert o.slope == CentralSlope(h=0.005)
    assert (o.needs.inputs, o.needs.heads) == (("t",), ("v", "u"))


def test_flow_matching() -> None:
    o = FlowMatching()
    assert o.times == Uniform(low=0, high=1)
    assert not o.guide.active
    assert (o.needs.inputs, o.needs.heads) == (("t",), ("v",))


def test_meanflow() -> None:
    """MeanFlow's Tab. 4, XL/2."""
    o = MeanFlow()
    assert o.times == Pair(of=LogitNormal(mean=-0.4, std=1), velocity_ratio=0.75)
    assert o.guide == Guide(omega=0.2, zeta=0.92, interval=Interval(low=0, high=0.75))
    assert o.guide.scale == pytest.approx(2.5)
    assert (o.power, o.floor, o.drop) == (1, 0.01, 0.1)
    assert o.slope == JvpSlope()
    assert (o.needs.inputs, o.needs.heads) == (("t", "r"), ("u",))
