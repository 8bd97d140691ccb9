"""The average is the recursion of its definition, ramp included; one by a power has the width that it says."""

from math import prod

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from dumo.training.ema import Ema, MovingAverage, PowerEma, exponent
from unit.training.toy import Small


def test_decay_by_hand() -> None:
    ramp, flat = Ema(decay=0.9), Ema(decay=0.9, ramp=False)
    assert [ramp(n) for n in (1, 2, 8, 79, 80, 81, 1000)] == pytest.approx(
        [2 / 11, 3 / 12, 0.5, 80 / 89, 0.9, 0.9, 0.9]
    )
    assert [flat(n) for n in (1, 2, 1000)] == [0.9, 0.9, 0.9]
    for bad in (0, 1.5, -0.1, float("nan")):
        with pytest.raises(ValidationError, match="decay"):
            Ema(decay=bad)


def shares(spec: PowerEma, updates: int) -> list[float]:
    """How much the start, then the weights of each update, count."""
    out = np.ones(1)
    for n in range(1, updates + 1):
        out = np.append(spec(n) * out, 1 - spec(n))
    return out.tolist()


@pytest.mark.parametrize("std", [0.05, 0.1, 0.28])
def test_a_power_has_its_width_however_long_it_runs(std: float) -> None:
    for n in (100, 200):
        start, *found = shares(PowerEma(std=std), n)
        tau = np.arange(n + 1) / n
        assert found == pytest.approx(np.diff(tau ** (exponent(std) + 1)), abs=1e-12)  # the integrals of its profile
        assert start == 0
        share, at = np.array(found), tau[1:]
        assert np.sqrt(share @ at**2 - (share @ at) ** 2) == pytest.approx(std, rel=0.01)


def test_exponents_are_those_of_the_paper() -> None:
    """EDM2, Sec. 3.1."""
    assert (exponent(0.05), exponent(0.1)) == pytest.approx((16.97, 6.94), abs=0.005)


def start_left(spec: Ema, updates: int) -> float:
    """How much a start of 1 still weighs when every update sees 0."""
    net = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    net.weight.data.fill_(1)
    average = MovingAverage(spec, net)
    net.weight.data.fill_(0)
    for n in range(1, updates + 1):
        average.update(net, n)
    return next(average.module.parameters()).item()


def test_start_is_forgotten_as_derived() -> None:
    assert start_left(Ema(decay=0.9999), 17) == pytest.approx(prod(range(1, 11)) / prod(range(19, 28)), rel=1e-12)
    assert start_left(Ema(decay=0.9999), 19) < 1e-6 < start_left(Ema(decay=0.9999), 18)
    assert start_left(Ema(decay=0.99, ramp=False), 100) == pytest.approx(0.99**100, rel=1e-12)
    assert start_left(Ema(decay=1), 30) == start_left(Ema(decay=1, ramp=False), 30) == 1  # what training begins with


def test_a_copy_without_gradients() -> None:
    net = Small()
    average = MovingAverage(Ema(decay=0.5, ramp=False), net)
    before = net.last.weight.detach().clone()
    net.last.weight.data += 1
    net.passes += 7
    assert torch.equal(average.module.get_parameter("last.weight"), before)

    average.update(net, 1)
    assert torch.allclose(average.module.get_parameter("last.weight"), before + 0.5, rtol=0, atol=1e-15)
    assert average.module.get_buffer("passes") == 7
    assert not any(p.requires_grad for p in average.module.parameters())
    assert all(p.requires_grad for p in net.parameters())
    assert not average.module.training
    assert net.training


def test_the_average_of_bfloat16_weights_is_in_float32() -> None:
    net = nn.Linear(4, 4)
    average = MovingAverage(Ema(decay=0.5, ramp=False), net)
    start = net.weight.detach().clone()
    net.bfloat16().weight.data += 1
    average.update(net, 1)
    expected = start.lerp(net.weight.detach().float(), 0.5)
    torch.testing.assert_close(average.module.get_parameter("weight"), expected)


def test_a_parameter_that_is_put_in_the_place_of_another_is_averaged() -> None:
    """As sharding does it, and loading."""
    net = Small()
    average = MovingAverage(Ema(decay=0.5, ramp=False), net)
    average.update(net, 1)
    before = average.module.get_parameter("last.weight").detach().clone()
    net.last.weight = nn.Parameter(before + 1)
    average.module.get_submodule("last").register_parameter("weight", nn.Parameter(before + 3, requires_grad=False))
    average.update(net, 2)
    assert torch.equal(average.module.get_parameter("last.weight"), before + 2)


def test_a_parameter_in_two_places_is_averaged_once_and_any_net_may_be_followed() -> None:
    net, other = Small(), Small(seed=1)
    for one in (net, other):
        one.register_module("twin", twin := nn.Linear(8, 2))
        twin.weight = one.last.weight
    average = MovingAverage(Ema(decay=0.5, ramp=False), net)
    average.update(net, 1)
    average.update(other, 2)
    for name in ("first.bias", "last.weight"):
        start, end = net.get_parameter(name), other.get_parameter(name)
        assert torch.equal(average.module.get_parameter(name), start.lerp(end, 0.5))
