"""Guidance of a fraction of the rows is right on average: shown by making every choice, not by drawing some.

Groups choose apart, and a gradient is a sum over rows. So the mean over the orders of the coins inside a group, all
groups taking the same order, is the mean over all choices.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, permutations

import pytest
import torch
from jaxtyping import Int
from pydantic import ValidationError
from torch import Tensor, nn

from contract.case import kind, name, nets, objectives, randomise, step
from dumo.flow.draw import draw
from dumo.flow.guide import Guide, Interval
from dumo.flow.path import Linear
from dumo.flow.slope import CentralSlope, DualSlope
from dumo.flow.times import Pair, Uniform
from dumo.nets import Net
from dumo.objectives import DuMo, FlowMatching, MeanFlow, Objective
from dumo.types import Noised, PerSample, Spec

N, CLASSES, SHAPE = 16, 3, (1, 4, 4)
KEPT = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]]).bool().flatten()
EARLY = Interval(low=0.1, high=0.9)
PAIRS = Pair(of=Uniform(), velocity_ratio=0.5)


class ByFraction(Guide):
    """Wrong: a row stands for its whole group, guided or not."""

    def pick(self, b: Noised) -> tuple[Int[Tensor, " k"], PerSample]:
        """As it should be, but for the weight."""
        place, weight = super().pick(b)
        return place, self.every * weight.sign()


class Once(Guide):
    """Wrong: a row stands for itself."""

    def pick(self, b: Noised) -> tuple[Int[Tensor, " k"], PerSample]:
        """As it should be, but for the weight."""
        place, weight = super().pick(b)
        return place, weight.sign()


class AnyRow(Guide):
    """Right, and noisier: the choice is among all rows, those that are not to be guided as well."""

    def pick(self, b: Noised) -> tuple[Int[Tensor, " k"], PerSample]:
        """One of every k, standing for k."""
        winner = b.coin.view(-1, self.every).argmax(1)
        return torch.arange(0, len(b.t), self.every) + winner, torch.full((len(winner),), self.every).to(b.t)


def served(objective: Objective) -> bool:
    """Whether it takes guidance that is right on average only."""
    if "guide" not in type(objective).model_fields:
        return False
    try:
        type(objective).model_validate({**dict(objective), "guide": Guide(zeta=0.5, fraction=0.5)})
    except ValidationError:
        return False
    return True


def cases(exact: bool = True) -> list[Objective]:
    """Every objective that is served, its loss plain l2, with pairs of times where it takes pairs."""
    found = [o for o in objectives(exact=exact, drop=0.3, power=0.0) if served(o)]
    return [o.model_copy(update={"times": PAIRS}) if isinstance(o.times, Pair) else o for o in found]


EACH = pytest.mark.parametrize("objective", cases(), ids=name)
EVERY = pytest.mark.parametrize("every", [2, 4])


def test_who_is_served() -> None:
    assert {"dumo", "flow_matching", "meanflow", "several"} <= {o.kind for o in cases()}


def record(objective: Objective) -> Noised:
    """Groups of four with four, three, one and no labels kept, and some times outside the interval."""
    g = torch.Generator().manual_seed(3)
    x, c = torch.randn(N, *SHAPE, generator=g, dtype=torch.float64), torch.arange(N) % CLASSES
    null = torch.full_like(c, CLASSES)
    b = draw(objective, Linear(), x, c, null, seed=1, step=2)
    return replace(b, kept=KEPT, c=torch.where(KEPT, c, null))


def choices(b: Noised, every: int) -> list[Noised]:
    """The record with the coins of every group in every order."""
    orders = [torch.tensor(order, dtype=b.t.dtype) / every for order in permutations(range(every))]
    return [replace(b, coin=order.repeat(N // every)) for order in orders]


def using(objective: Objective, guide: Guide) -> Objective:
    """The objective with another guide."""
    assert isinstance(objective, Spec)
    return objective.model_copy(update={"guide": guide})


def built(objective: Objective, net: Net) -> nn.Module:
    """A net of random weights in float64."""
    return randomise(net.build(objective.needs, SHAPE, CLASSES)).double()


def gradient(objective: Objective, model: nn.Module, b: Noised) -> Tensor:
    """Of the mean loss, in one row."""
    found = torch.autograd.grad(step(objective, model, b).loss.mean(), list(model.parameters()))
    return torch.cat([g.flatten() for g in found])


def bias(objective: Objective, model: nn.Module, guide: Callable[..., Guide], every: int, **fields: object) -> float:
    """How far the mean gradient over all choices is from that of full guidance, relatively; and they do differ."""
    b = record(objective)
    full = gradient(using(objective, Guide(**fields)), model, b)  # pyright: ignore[reportArgumentType]
    part = using(objective, guide(fraction=1 / every, **fields))
    each = torch.stack([gradient(part, model, choice) for choice in choices(b, every)])
    assert (each - full).norm(dim=1).min() > 1e-6 * full.norm()
    return ((each.mean(0) - full).norm() / full.norm()).item()


@EACH
@EVERY
@pytest.mark.parametrize(
    "guide",
    [
        {"zeta": 0.5, "interval": EARLY},
        {"omega": 0.3, "zeta": 0.6},
        {"zeta": 0.5, "interval": EARLY, "elsewhere": "average"},
    ],
    ids=["dumo", "mean", "ucgm"],
)
def test_the_mean_gradient_is_that_of_full_guidance(objective: Objective, every: int, guide: dict[str, object]) -> None:
    assert bias(objective, built(objective, nets()[0]), Guide, every, **guide) < 1e-12


@pytest.mark.parametrize("objective", [DuMo(drop=0.3, slope=DualSlope()), FlowMatching(drop=0.3)], ids=name)
@pytest.mark.parametrize("net", nets()[1:], ids=kind)
def test_whatever_the_net_is(objective: Objective, net: Net) -> None:
    """A gradient is affine in the target whatever the net: two objectives on each of the others show it."""
    assert bias(objective, built(objective, net), Guide, 2, zeta=0.5, interval=EARLY) < 1e-12


@EACH
@EVERY
@pytest.mark.parametrize("wrong", [ByFraction, Once])
def test_another_weight_is_biased(objective: Objective, every: int, wrong: type[Guide]) -> None:
    assert bias(objective, built(objective, nets()[0]), wrong, every, zeta=0.5, interval=EARLY) > 1e-3


@EVERY
def test_a_choice_among_all_rows_is_as_right_and_noisier(every: int) -> None:
    """Of one group, M of k rows to be guided, the spread is M sum |g|^2 - |sum g|^2, and k sum |g|^2 - |sum g|^2."""
    objective = FlowMatching()
    model, b = built(objective, nets()[0]), record(objective)
    assert bias(objective, model, AnyRow, every, zeta=0.5, interval=EARLY) < 1e-12

    def spread(guide: type[Guide], group: slice) -> float:
        part = using(objective, guide(zeta=0.5, interval=EARLY, fraction=1 / every))
        each = torch.stack([gradient(part, model, choice[group]) for choice in choices(b, every)])
        return (each - each.mean(0)).square().sum(1).mean().item()

    guided = Guide(interval=EARLY).rows(b)
    for first in range(0, N, every):
        group = slice(first, first + every)
        mine, other, m = spread(Guide, group), spread(AnyRow, group), guided[group].sum()
        if m == 0:
            assert max(mine, other) < 1e-20
        elif m == 1:
            assert mine < 1e-20 < other
        elif m == every:
            assert mine == pytest.approx(other, rel=1e-9)
        else:
            assert mine < 0.99 * other


@EVERY
def test_a_target_is_right_on_average_with_the_least_spread(every: int) -> None:
    """A row that is one of M to be guided is off by (M - 1) |v*_full - v_t|^2, in the mean of squares."""
    b, part = record(DuMo()), Guide(zeta=0.5, interval=EARLY, fraction=1 / every)
    null = torch.randn(b.x.shape, generator=torch.Generator().manual_seed(4), dtype=b.x.dtype)
    v_c = null + b.x  # by row, and known of any row by its data

    def velocity(some: Noised, c: Tensor) -> Tensor:
        rows = (some.x.flatten(1)[:, None] == b.x.flatten(1)).all(2).int().argmax(1)
        return (null if c is some.null else v_c)[rows]

    full = Guide(zeta=0.5, interval=EARLY)(b, None, velocity)
    each = torch.stack([part(choice, None, velocity) for choice in choices(b, every)])
    assert (each.mean(0) - full).abs().max() < 1e-13
    guided = part.rows(b)
    neighbours = guided.view(-1, every).sum(1).repeat_interleave(every) * guided
    assert {0, every} < set(neighbours.tolist())
    spread = (each - full).square().flatten(2).sum(2).mean(0)
    expected = (neighbours - 1).clamp(min=0) * (full - b.v_t).square().flatten(1).sum(1)
    assert (spread - expected).abs().max() < 1e-11


@pytest.mark.parametrize("objective", [o for o in cases(exact=False) if isinstance(o.needs.slope, CentralSlope)])
def test_a_difference_is_right_to_the_square_of_its_step(objective: Objective) -> None:
    assert isinstance(objective, Spec)
    steps = [objective.model_copy(update={"slope": CentralSlope(h=h)}) for h in (0.02, 0.01, 0.005)]
    model = built(objective, nets()[0])
    left = torch.tensor([bias(o, model, Guide, 4, zeta=0.5, interval=EARLY) for o in steps])
    assert left[-1] < 1e-4
    assert left[-1] > 1e-12
    for coarse, fine in pairwise(left):
        assert abs((coarse / fine).log2() - 2) < 0.1


def test_adaptive_weights_are_biased_and_so_refused() -> None:
    """Their gradient is not affine in the target: the mean over choices is another, and no setting of f mends it."""
    plain = next(o for o in cases() if isinstance(o, MeanFlow))
    adaptive = plain.model_copy(update={"power": 1.0})
    assert bias(adaptive, built(adaptive, nets()[0]), Guide, 4, zeta=0.5, interval=EARLY) > 1e-2
    with pytest.raises(ValueError, match=r"guide.fraction = 0.25 .* power=0, or guide.fraction=1"):
        MeanFlow(power=1.0, guide=Guide(zeta=0.5, fraction=0.25))
    assert MeanFlow(power=0.0, guide=Guide(zeta=0.5, fraction=0.25)).guide.random
    assert not MeanFlow(power=1.0, guide=Guide(fraction=0.25)).guide.random  # without guidance nothing is random


class Tally(nn.Module):
    """A net that notes of each pass its rows, how many of them had no label, and whether it carries gradients."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.passes = net, list[tuple[int, int, bool]]()

    def forward(self, x: Tensor, c: Tensor, /, **inputs: Tensor) -> tuple[Tensor, ...]:
        self.passes.append((len(c), int((c == CLASSES).sum()), torch.is_grad_enabled()))
        return self.net(x, c, **inputs)


@EACH
@EVERY
def test_guidance_passes_are_made_on_the_fraction(objective: Objective, every: int) -> None:
    """And on as many rows whatever the record says: with labels or without, early or late."""
    b, o = record(objective), using(objective, Guide(zeta=0.5, interval=EARLY, fraction=1 / every))
    none, late = torch.zeros_like(KEPT), torch.ones_like(b.t)
    sizes = set[tuple[int, ...]]()
    for other in (b, replace(b, c=b.null, kept=none), replace(b, c=0 * b.c, kept=~none), replace(b, t=late)):
        model = Tally(built(o, nets()[0]))
        step(o, model, other)
        sizes.add(tuple(rows for rows, _, _ in model.passes))
        assert sum(rows for rows, _, graded in model.passes if graded) == N
        if other.kept.all():
            assert [rows for rows, nulls, _ in model.passes if nulls] == [N // every]
            still = [rows for rows, nulls, graded in model.passes if not graded and not nulls]
            if isinstance(objective, MeanFlow):  # V(c) too, for the pass with gradients is at r
                assert still.pop(0) == N // every
    assert len(sizes) == 1


@EACH
@EVERY
def test_shares_of_ranks_are_the_whole_batch(objective: Objective, every: int) -> None:
    """Groups are of the global batch, and no rank cuts one: losses and gradients of two ranks are those of one."""
    o = using(objective, Guide(zeta=0.5, interval=EARLY, fraction=1 / every))
    model, g = built(o, nets()[0]), torch.Generator().manual_seed(3)
    x, c = torch.randn(N, *SHAPE, generator=g, dtype=torch.float64), torch.arange(N) % CLASSES
    null = torch.full_like(c, CLASSES)

    def share(rows: slice) -> Noised:
        return draw(o, Linear(), x[rows], c[rows], null[rows], seed=0, step=0, batch=N, first=rows.start)

    whole = share(slice(0, N))
    ranks = [share(slice(0, 8)), share(slice(8, N))]
    pieces = [whole[i : i + every] for i in range(0, N, every)]
    for parts in (ranks, pieces):
        losses = torch.cat([step(o, model, part).loss for part in parts])
        torch.testing.assert_close(losses, step(o, model, whole).loss, rtol=1e-11, atol=0)
        mean = torch.stack([gradient(o, model, part) for part in parts]).mean(0)
        torch.testing.assert_close(mean, gradient(o, model, whole), rtol=1e-10, atol=1e-13)
