"""The average is the recursion of its definition, ramp included."""

from math import prod

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from dumo.training.ema import Ema, MovingAverage
from unit.training.toy import Small


def test_decay_by_hand() -> None:
    ramp, flat = Ema(decay=0.9), Ema(decay=0.9, ramp=False)
    assert [ramp(n) for n in (1, 2, 8, 79, 80, 81, 1000)] == pytest.approx(
        [2 / 11, 3 / 12, 0.5, 80 / 89, 0.9, 0.9, 0.9]
    )
    assert [flat(n) for n in (1, 2, 1000)] == [0.9, 0.9, 0.9]


@pytest.mark.parametrize("bad", [0, 1, 1.5, -0.1, float("nan")])
def test_decay_in_range(bad: float) -> None:
    with pytest.raises(ValidationError, match="decay"):
        Ema(decay=bad)


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
