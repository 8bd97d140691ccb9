"""The cost of a step, counted on no data, is what one counts by hand."""

import itertools
import math

import pytest
import torch
from torch import nn

from contract.case import SMALL, objectives
from contract.case import name as name_of
from dumo.flow.guide import Guide
from dumo.flow.path import Linear
from dumo.flow.slope import Central, Jvp
from dumo.nets import MLP, DiT
from dumo.objectives import DuMo, FlowMatching, MeanFlow
from dumo.train.cost import forward_flops, forward_units
from dumo.types import Needs, Objective

PLAIN = Guide()
WIDTH, DEPTH = 8, 3
SCALAR = 256  # features of a time


def perceptron(needs: Needs, shape: tuple[int, ...] = (2,), classes: int = 0) -> nn.Module:
    """A small one."""
    return MLP(width=WIDTH, depth=DEPTH).build(needs, shape, classes)


def multiply_adds(objective: Objective, dim: int = 2) -> tuple[int, int]:
    """Of one row through `perceptron`, by hand; and those of layers whose input needs no gradient."""
    first = dim * WIDTH + len(objective.needs.inputs) * SCALAR * WIDTH
    later = len(objective.needs.inputs) * WIDTH**2 + DEPTH * WIDTH**2 + len(objective.needs.heads) * WIDTH * dim
    return first + later, first


@pytest.mark.parametrize("objective", list(objectives()), ids=name_of)
def test_a_pass_is_counted_as_by_hand(objective: Objective) -> None:
    net = perceptron(objective.needs)
    assert forward_flops(net, objective, (2,)) == 2 * multiply_adds(objective)[0]


def test_a_pass_of_a_transformer_is_counted_as_by_hand() -> None:
    width, depth, patch, side, channels, classes = 16, 2, 2, 8, 3, 10
    net = DiT(width=width, depth=depth, patch=patch, attention=2).build(DuMo.needs, (channels, side, side), classes)
    tokens, out = (side // patch) ** 2, channels * patch**2
    embed = tokens * out * width + SCALAR * width + width**2
    linear = tokens * (3 + 1 + 4 + 4) * width**2 + 6 * width**2
    attention = 2 * tokens**2 * width
    head = 2 * width**2 + tokens * width * out
    expected = embed + depth * (linear + attention) + 2 * head
    assert forward_flops(net, DuMo(), (channels, side, side)) == 2 * expected


@pytest.mark.parametrize(
    ("objective", "more"),
    [
        (FlowMatching(guide=PLAIN), 0),
        (FlowMatching(guide=Guide(zeta=0.5)), 1),  # a pass without condition
        (FlowMatching(guide=Guide(omega=2, zeta=0.5)), 1),
        (FlowMatching(guide=Guide(omega=0.5, zeta=0.5)), 0),  # the null pass weighs nothing
        (DuMo(guide=PLAIN, slope=Central()), 2),  # the two ends of the difference
        (DuMo(guide=Guide(zeta=0.5), slope=Central()), 3),
        (MeanFlow(guide=PLAIN, slope=Central()), 2),
        (MeanFlow(guide=Guide(zeta=0.5), slope=Central()), 4),  # V(c) is at r = t, so it is a pass of its own
    ],
)
def test_a_step_is_a_pass_its_backward_and_the_passes_of_the_targets(objective: Objective, more: int) -> None:
    once, first = multiply_adds(objective)
    step = once + 2 * once - first + more * once  # backward: to the weights, and to inputs that need it
    assert forward_units(perceptron(objective.needs), objective, Linear(), (2,)) == pytest.approx(
        step / once, rel=1e-12
    )


def test_exact_slopes_cost_more_than_none_and_scale_alike() -> None:
    for objective in (DuMo(guide=PLAIN, slope=Jvp()), MeanFlow(guide=PLAIN, slope=Jvp())):
        once, first = multiply_adds(objective)
        units = forward_units(perceptron(objective.needs), objective, Linear(), (2,))
        assert 3 - first / once + 1 <= units <= 3 - first / once + 3


@pytest.mark.parametrize("objective", list(objectives()), ids=name_of)
def test_counting_changes_nothing_and_needs_no_numbers(objective: Objective) -> None:
    build = DiT(**SMALL).build
    net = build(objective.needs, (1, 4, 4), 3)
    for p in net.parameters():
        p.data.fill_(math.nan)  # no number matters
    net.train()
    rng = torch.random.get_rng_state()
    counted = [forward_units(net, objective, Linear(), (1, 4, 4)) for _ in range(2)]
    assert counted[0] == counted[1]
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert net.training
    assert all(p.grad is None and p.device.type == "cpu" and p.requires_grad for p in net.parameters())
    with torch.device("meta"):
        ghost = build(objective.needs, (1, 4, 4), 3)
    assert forward_units(ghost, objective, Linear(), (1, 4, 4)) == counted[0]
    assert forward_flops(ghost, objective, (1, 4, 4)) == forward_flops(net, objective, (1, 4, 4))


def test_units_hardly_depend_on_size_and_flops_do() -> None:
    sizes = [(32, 2), (64, 2), (64, 4)]
    nets = [DiT(width=w, depth=d, patch=2, attention=2).build(DuMo.needs, (1, 8, 8), 10) for w, d in sizes]
    units = [forward_units(net, DuMo(guide=PLAIN), Linear(), (1, 8, 8)) for net in nets]
    assert all(4.8 < unit <= 5 for unit in units)
    flops = [forward_flops(net, DuMo(), (1, 8, 8)) for net in nets]
    assert all(b > 1.5 * a for a, b in itertools.pairwise(flops))
