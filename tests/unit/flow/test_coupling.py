"""Noise goes with data at the least cost, within a class and a group, and is the same noise."""

from itertools import permutations

import pytest
import torch
from torch import Tensor

from dumo.flow.draw import Coupling, drawn, noised
from dumo.flow.path import Linear
from dumo.objectives import DuMo
from dumo.runtime.random import stream

X = torch.randn(24, 2, 3, generator=stream("x"), dtype=torch.float64)
Z = torch.randn(24, 2, 3, generator=stream("z"), dtype=torch.float64)
C = torch.randint(3, (24,), generator=stream("c"))


def cost(x: Tensor, z: Tensor) -> float:
    return (x - z).square().sum().item()


@pytest.mark.parametrize("group", [2, 6, 12])
def test_no_other_order_is_cheaper(group: int) -> None:
    """Of the rows of a class in a group, which keep their noises between them."""
    z = Coupling(group=group)(X, Z, C)
    for first in range(0, 24, group):
        rows = torch.arange(first, first + group)
        for k in range(3):
            some = rows[C[rows] == k]
            best = min((cost(X[some], Z[some[list(order)]]) for order in permutations(range(len(some)))), default=0)
            assert cost(X[some], z[some]) == pytest.approx(best, rel=1e-12)
            assert torch.equal(z[some].flatten(1).sort(0).values, Z[some].flatten(1).sort(0).values)


def test_texts_are_classes_as_well() -> None:
    told = torch.nn.functional.one_hot(C, 3).float()
    assert torch.equal(Coupling(group=12)(X, Z, told), Coupling(group=12)(X, Z, C))


def test_pieces_of_whole_groups_are_the_batch() -> None:
    """So two ranks are one; and the data, its labels and its times are as without."""

    def record(rows: slice, coupling: Coupling | None = Coupling(group=6)) -> list[Tensor]:  # noqa: B008, frozen
        draws = drawn(DuMo(drop=0.5), (2, 3), seed=0, step=0, batch=24, rows=rows)
        b = noised(draws, Linear(sd=0.5), X[rows].float(), C[rows], 3, coupling=coupling)
        return [b.z, b.x_t, b.v_t, b.x, b.c, b.t]

    whole, halves = record(slice(None)), [record(slice(0, 6)), record(slice(6, 24))]
    for one, *parts in zip(whole, *halves, strict=True):
        assert torch.equal(torch.cat(parts), one)
    z, _, v, x, c, t = whole
    assert torch.equal(v, z - x)
    plain = record(slice(None), None)
    assert all(torch.equal(one, other) for one, other in zip((x, c, t), plain[3:], strict=True))
    assert cost(x, z) < cost(x, plain[0])


def test_what_is_not_finite_is_left_to_the_step() -> None:
    x = torch.where(torch.arange(24)[:, None, None] == 7, torch.nan, X)
    z = Coupling(group=24)(x, Z, C)
    same = C.eq(C[7])
    assert torch.equal(z[same], Z[same])
    assert not torch.equal(z[~same], Z[~same])
