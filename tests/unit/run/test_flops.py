"""The cost of a step, counted on no data, is what one counts by hand."""

import math
from collections.abc import Callable
from dataclasses import replace
from math import lcm
from typing import Any, Literal

import pytest
import torch
from torch import nn

from contract.case import name as name_of
from contract.case import nets, one_each
from dumo.config.load import load
from dumo.flow import linearize as linearizations
from dumo.flow.guide import Guide, Interval
from dumo.flow.noisy_batch import draw, path_velocity
from dumo.flow.path import Linear
from dumo.flow.slope import Along, CentralSlope, DualSlope, JvpSlope, Slope
from dumo.flow.times import Jumps, Pair, Uniform
from dumo.nets import MLP, DiT, UNet
from dumo.objectives import DuMo, DuMoAny, FlowMatching, Match, MeanFlow
from dumo.run import flops as few
from dumo.run import memory
from dumo.run.flops import (
    count_by_depth,
    count_flops,
    exact_rows,
    forward_flops,
    forward_units,
    step_cost,
)
from dumo.types import Heads, Needs, NoisyBatch, Objective, frozen
from tiers import tiered
from unit.run.known import follow_bytes

PLAIN, GUIDED = Guide(), Guide(zeta=0.5)
SHAPE = (4, 32, 32)
WIDTH, DEPTH = 8, 3
SCALAR = 256  # features of a time


def perceptron(needs: Needs, shape: tuple[int, ...] = (2,), classes: int = 0) -> nn.Module:
    """A small one."""
    return MLP(width=WIDTH, depth=DEPTH).build(needs, shape, classes)


def ghost(objective: Objective, shape: tuple[int, ...] = (1, 8, 8), **sizes: Any) -> nn.Module:  # noqa: ANN401
    """A transformer of two heads, without numbers."""
    given: dict[str, Any] = {"attention": 2, "width": 64, **sizes}
    with torch.device("meta"):
        return DiT(**given).build(objective.needs, shape, 10)


def outline(checkpoint: bool = False) -> nn.Module:
    """256 tokens of width 384, six blocks."""
    return ghost(DuMo(), SHAPE, width=384, depth=6, patch=2, attention=6, checkpoint=checkpoint)


def multiply_adds(objective: Objective, dim: int = 2) -> tuple[int, int]:
    """Of one row through `perceptron`, by hand; and those of layers whose input needs no gradient.

    Each number that the trunk is told has an embedder, and again for the gauges, and t and r for a head of its own.
    """
    needs = objective.needs
    told = len(needs.inputs) + len(needs.knobs)
    numbers = told * (1 + bool(needs.gauges)) + sum(1 + len(own) for own in needs.own.values())
    first = dim * WIDTH + numbers * SCALAR * WIDTH
    later = numbers * WIDTH**2 + DEPTH * WIDTH**2 + len(needs.heads) * WIDTH * dim + len(needs.gauges) * WIDTH
    return first + later, first


@pytest.mark.parametrize("objective", one_each(), ids=name_of)
def test_a_pass_is_counted_as_by_hand(objective: Objective) -> None:
    net = perceptron(objective.needs)
    assert forward_flops(net, objective, (2,)) == 2 * multiply_adds(objective)[0]


def by_hand(
    width: int, depth: int, tokens: int, channels: int = 3, patch: int = 2, heads: int = 2
) -> tuple[int, int, int]:
    """Multiply-adds of one row through a transformer: of linear layers, of attention, of layers fed by no parameter."""
    out = channels * patch**2
    first = tokens * out * width + SCALAR * width
    linear = tokens * (3 + 1 + 4 + 4) * width**2 + 6 * width**2
    head = 2 * width**2 + tokens * width * out
    return first + width**2 + depth * linear + heads * head, depth * 2 * tokens**2 * width, first


def test_a_pass_of_a_transformer_is_counted_as_by_hand() -> None:
    net = DiT(width=16, depth=2, patch=2, attention=2).build(DuMo().needs, (3, 8, 8), 10)
    linear, attention, _ = by_hand(16, 2, tokens=16)
    assert forward_flops(net, DuMo(), (3, 8, 8)) == 2 * (linear + attention)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "more"),
    [
        (FlowMatching(guide=PLAIN), 0),
        (FlowMatching(drop=0, guide=GUIDED), 1),  # a pass without condition
        (FlowMatching(drop=0, guide=Guide(omega=2, zeta=0.5)), 1),
        (FlowMatching(drop=0, guide=Guide(omega=0.5, zeta=0.5)), 0),  # the null pass weighs nothing
        (DuMo(drop=0, guide=PLAIN, slope=CentralSlope()), 2),  # the two ends of the difference
        (DuMo(drop=0, guide=GUIDED, slope=CentralSlope()), 3),
        (DuMo(drop=0, guide=PLAIN, slope=DualSlope()), 1),  # the tangent
        (DuMo(drop=0, guide=GUIDED, slope=DualSlope()), 2),
        (MeanFlow(drop=0, guide=PLAIN, slope=CentralSlope()), 0.5),  # a quarter of the rows moves
        (MeanFlow(drop=0, guide=PLAIN, slope=DualSlope()), 0.25),
        (MeanFlow(drop=0, guide=PLAIN, slope=DualSlope(), times=Pair(velocity_ratio=0.6)), 0.4),
        (DuMoAny(drop=0, guide=PLAIN, slope=DualSlope(), times=Jumps()), 0.5),  # half of the rows jump
        (MeanFlow(drop=0, guide=GUIDED, slope=CentralSlope()), 1.75),  # V(c) is a pass of its own for rows that move
        (MeanFlow(drop=0, guide=GUIDED, slope=DualSlope()), 1.5),
    ],
)
def test_a_step_is_a_pass_its_backward_and_the_passes_of_the_targets(objective: Objective, more: float) -> None:
    once, first = multiply_adds(objective)
    step = once + 2 * once - first + more * once  # backward: to the weights, and to inputs that need it
    assert forward_units(perceptron(objective.needs), objective, Linear(), (2,)) == pytest.approx(
        step / once, rel=1e-12
    )


@pytest.mark.slow
def test_rows_that_are_not_guided_cost_no_pass() -> None:
    """Neither those without a label nor those outside the interval; a tenth and, with uniform times, a quarter."""

    def units(guide: Guide, **fields: object) -> float:
        objective = DuMo(guide=guide, slope=DualSlope(), times=Uniform(), **fields)
        return forward_units(perceptron(DuMo().needs), objective, Linear(), (2,))

    inside = Guide(zeta=0.5, interval=Interval(high=0.75))
    assert units(GUIDED, drop=0.1) - units(PLAIN) == pytest.approx(0.9, rel=1e-9)
    assert units(inside, drop=0.1) - units(PLAIN) == pytest.approx(0.9 * 0.75, rel=2e-3)


@pytest.mark.parametrize(("guide", "name"), [(PLAIN, "fused"), (GUIDED, "separate")])
def test_the_way_of_a_slope_of_some_rows_is_what_runs(guide: Guide, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the rows jump: a tape would be of all of them, so where v* is known after the pass there is none."""
    made: list[str] = []
    for way_name in ("deferred", "fused", "separate"):

        def linearize(*args: Any, way_name: str = way_name, **inputs: Any) -> tuple[Heads, Along]:  # noqa: ANN401
            made.append(way_name)
            return getattr(linearizations, f"linearize_{way_name}")(*args, **inputs)

        monkeypatch.setattr(f"dumo.flow.slope.linearize_{way_name}", linearize)
    objective = DuMoAny(drop=0, guide=guide, slope=DualSlope(), times=Jumps())
    found = step_cost(perceptron(objective.needs), objective, Linear(), (2,)).strategy
    assert found
    assert found.name == name
    assert made[-1] == name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("guide", "slope", "ref", "name"),
    [
        (GUIDED, DualSlope(), "self", "deferred"),
        (PLAIN, DualSlope(), "self", "fused"),
        (PLAIN, DualSlope(), 0.999, "separate"),
        (PLAIN, CentralSlope(), "self", None),
    ],
)
def test_the_way_of_a_slope(guide: Guide, slope: Slope, ref: float | Literal["self"], name: str | None) -> None:
    """With weights of its own for theta^- a dual pass is one pass more than a fused one."""
    objective = DuMo(guide=guide, slope=slope)
    given = perceptron(DuMo().needs), objective, Linear(), (2,)
    found = step_cost(*given, ref=ref).strategy
    assert (found and found.name) == name
    assert forward_units(*given, ref=ref) - forward_units(*given) == pytest.approx(float(ref != "self"), rel=1e-12)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("slope", "guide", "passes", "products", "figure"),
    [  # a tangent of attention is five products of matrices, attention two
        (CentralSlope(), GUIDED, 3, 0, 6.00),
        (JvpSlope(), GUIDED, 4, 0, 7.00),
        (DualSlope(), GUIDED, 2, 1.5, 5.15),
        (DualSlope(), PLAIN, 1, 1.5, 4.15),
    ],
)
def test_a_step_of_a_transformer_by_every_slope(
    slope: Slope, guide: Guide, passes: float, products: float, figure: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """256 tokens of width 384, six blocks, counted by two: the figures of docs/memory.md.

    A fused pass under checkpointing runs the blocks once more, in the backward pass: their tangents are known by then.
    """
    monkeypatch.setattr(few, "MAX_BLOCKS_RUN", 1)
    linear, attention, first = by_hand(384, 6, tokens=256, channels=4)
    once, objective = linear + attention, DuMo(drop=0, guide=guide, slope=slope)
    units = forward_units(outline(), objective, Linear(), SHAPE)
    assert units == pytest.approx(3 + passes + (products * attention - first) / once, rel=1e-12)
    assert units == pytest.approx(figure, abs=0.005)
    if figure == 4.15:
        assert forward_units(outline(checkpoint=True), objective, Linear(), SHAPE) == pytest.approx(5.15, abs=0.005)


@pytest.mark.nightly
def test_the_bytes_of_a_dual_step_stay_near_those_of_a_difference_and_grow_as_the_tokens() -> None:
    def peak(slope: Slope, guide: Guide, net: nn.Module, side: int = 32, rows: int = 4) -> int:
        shape = (SHAPE[0], side, side)
        return memory.step_bytes(net, DuMo(guide=guide, slope=slope), Linear(), shape, rows=rows).peak

    assert peak(DualSlope(), GUIDED, outline()) < 1.10 * peak(CentralSlope(), GUIDED, outline())  # a tape
    assert peak(DualSlope(), PLAIN, outline()) < 1.00 * peak(CentralSlope(), PLAIN, outline())  # fused
    many, some = (ghost(DuMo(), (SHAPE[0], side, side), depth=1, patch=2) for side in (128, 64))  # 4,096, 1,024 tokens
    assert peak(DualSlope(), GUIDED, many, 128, 1) < 4.05 * peak(DualSlope(), GUIDED, some, 64, 1)


@pytest.mark.slow
@pytest.mark.parametrize("objective", [DuMo(slope=DualSlope()), Match(slope=DualSlope())], ids=name_of)
def test_counting_changes_nothing_and_needs_no_numbers(objective: Objective) -> None:
    build = nets()[0].build
    net = build(objective.needs, (1, 4, 4), 3)
    for p in net.parameters():
        p.data.fill_(math.nan)  # no number matters
    net.train()
    rng = torch.random.get_rng_state()
    counted = forward_units(net, objective, Linear(), (1, 4, 4))
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert net.training
    assert all(p.grad is None and p.device.type == "cpu" and p.requires_grad for p in net.parameters())
    with torch.device("meta"):
        outline = build(objective.needs, (1, 4, 4), 3)
    assert forward_units(outline, objective, Linear(), (1, 4, 4)) == counted
    assert forward_flops(outline, objective, (1, 4, 4)) == forward_flops(net, objective, (1, 4, 4))


@pytest.mark.nightly
def test_rows_make_every_share_whole() -> None:
    assert exact_rows(FlowMatching()) == 2
    assert exact_rows(DuMo(guide=GUIDED)) == 2
    assert exact_rows(MeanFlow(times=Pair(velocity_ratio=0.6))) == 10
    assert exact_rows(load("digits-three-heads-shortcut").objective) == 8
    few, many = (forward_units(perceptron(MeanFlow().needs), MeanFlow(), Linear(), (2,), rows=rows) for rows in (4, 64))
    assert few == many


EACH = one_each(guide=GUIDED, drop=0.0)


@pytest.mark.parametrize("objective", tiered(EACH, ci=EACH[1:2], id=name_of))
def test_what_is_counted_on_nothing_is_what_a_step_on_numbers_does(objective: Objective) -> None:
    shape = (1, 16, 16)
    rows = lcm(4, objective.needs.group)
    one, net = (DiT(width=32, depth=n, patch=2, attention=2).build(objective.needs, shape, 10) for n in (1, 2))
    x, c = torch.zeros(rows, *shape), torch.zeros(rows, dtype=torch.long)
    b = draw(objective, Linear(), x, c, c, seed=0, step=0, teacher=path_velocity)

    def step(net: nn.Module, b: NoisyBatch) -> None:
        net.zero_grad()
        objective.loss(net, frozen(net), b).loss.sum().backward()

    step(net, b)  # tables that torch fills once
    net.zero_grad()
    every = [replace(b, progress=progress) for progress, _ in objective.needs.phases]
    real = max((follow_bytes(lambda at=at: step(net, at)) for at in every), key=lambda found: found.peak)
    counted = memory.step_bytes(net, objective, Linear(), shape, rows=rows)
    assert real.preexisting == counted.preexisting
    assert real.peak <= counted.peak
    assert real.peak == pytest.approx(counted.peak, abs=2 * x.nbytes)  # fake tensors of x's size live longer, up to two
    once, units = rows * forward_flops(one, objective, shape), 0.0  # of bytes a single block would be too small a part
    for at, (_, share) in zip(every, objective.needs.phases, strict=True):
        units += share * count_flops(lambda at=at: step(one, at)) / once
    assert units == pytest.approx(forward_units(one, objective, Linear(), shape, rows=rows), rel=1e-12)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("objective", "checkpoint"),
    [(DuMo(guide=GUIDED, slope=DualSlope()), True), (MeanFlow(guide=PLAIN, slope=DualSlope()), False)],
)
def test_the_first_blocks_tell_of_all(objective: Objective, checkpoint: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (1, 8, 8)
    net = ghost(objective, shape, width=32, depth=4, checkpoint=checkpoint)

    def counts() -> tuple[float, ...]:
        given = net, objective, Linear(), shape
        return forward_flops(net, objective, shape), forward_units(*given), memory.activation_bytes(*given, rows=4)

    whole = counts()
    monkeypatch.setattr(few, "MAX_BLOCKS_RUN", 3)
    assert counts() == whole


def test_blocks_that_differ_are_all_run_and_so_are_those_that_something_outweighs() -> None:
    def size(net: nn.Module) -> int:
        return max(100, 7 * len(net.blocks))  # pyright: ignore[reportArgumentType]

    net = ghost(DuMo(), depth=few.MAX_BLOCKS_RUN + 1)  # one block more than are all run
    net.blocks.extend([net.blocks[0]] * 20)  # pyright: ignore
    assert count_by_depth(net, size) == 100
    assert count_by_depth(net, size, check=True) == 7 * (few.MAX_BLOCKS_RUN + 21)
    assert count_by_depth(net, lambda net: 7 * len(net.blocks), check=True) == 7 * (few.MAX_BLOCKS_RUN + 21)  # pyright: ignore
    with torch.device("meta"):
        other = UNet(width=8, multipliers=(1, 2), depth=2).build(DuMo().needs, (1, 8, 8), 0)
    seen: list[nn.Module] = []
    assert count_by_depth(other, lambda net: len(seen) or not seen.append(net)) == 1
    assert seen == [other]


def test_two_stretches_are_told_by_their_first_blocks_unless_one_weighs_more_by_the_other() -> None:
    net, seen = ghost(DuMo(), depth=2 * few.MAX_BLOCKS_RUN), list[tuple[int, int]]()
    for block in net.blocks[few.MAX_BLOCKS_RUN :]:  # pyright: ignore
        block.is_routed = True

    def count(net: nn.Module, of: Callable[[int, int], int]) -> int:
        routed = sum(getattr(block, "is_routed", False) for block in net.blocks)  # pyright: ignore
        seen.append((len(net.blocks) - routed, routed))  # pyright: ignore
        return of(*seen[-1])

    assert (
        count_by_depth(net, lambda net: count(net, lambda a, b: 7 * a + 3 * b), check=True) == 10 * few.MAX_BLOCKS_RUN
    )
    assert seen == [(2, 2), (3, 2), (2, 3), (4, 4)]
    assert count_by_depth(net, lambda net: count(net, lambda a, b: a * b), check=True) == few.MAX_BLOCKS_RUN**2


def test_products_in_place_and_fused_ones_are_counted() -> None:
    a, b, c = torch.ones(2, 3, 4), torch.ones(2, 4, 5), torch.ones(2, 3, 5)
    assert count_flops(lambda: c.baddbmm_(a, b)) == 2 * 2 * 3 * 4 * 5
    assert count_flops(lambda: c[0].addmm_(a[0], b[0])) == 2 * 3 * 4 * 5
    q, k, v = (torch.ones(2, 3, n, d, requires_grad=True) for n, d in ((5, 4), (7, 4), (7, 4)))
    once = 2 * 2 * 3 * 5 * 7 * (4 + 4)
    assert count_flops(lambda: nn.functional.scaled_dot_product_attention(q, k, v)) == once
    assert count_flops(lambda: nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()) == 3 * once
