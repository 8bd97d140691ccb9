"""Precision, recall and the nearest data: laws, and small cases by hand."""

import pytest
import torch
from torch import Tensor

from dumo.metrics import neighbours
from dumo.metrics.neighbours import nearest, nearest_two, precision_recall
from dumo.random import stream
from dumo.types import UserError


def randn(n: int, *key: object, d: int = 8) -> Tensor:
    return torch.randn(n, d, generator=stream("neighbours", *map(str, key)))


def modes(n: int, *which: int) -> Tensor:
    """Points about some of four places far from each other."""
    place = torch.tensor(which)[torch.arange(n) % len(which)]
    return randn(n, *which) + 100.0 * torch.nn.functional.one_hot(place, 8)


def test_one_law_scores_high_on_both() -> None:
    precision, recall = precision_recall(randn(1000, "a"), randn(1000, "b"))
    assert precision == pytest.approx(0.9, abs=0.05)
    assert recall == pytest.approx(0.9, abs=0.05)


def test_far_sets_have_nothing_in_common() -> None:
    assert precision_recall(randn(100, "a"), randn(100, "b") + 100) == (0, 0)


def test_a_set_covers_itself() -> None:
    x = randn(100, "a")
    assert precision_recall(x, x.flip(0)) == (1, 1)


def test_a_lost_mode_costs_recall_and_an_invented_one_precision() -> None:
    """Of four modes three: of the data three quarters are reached, and every fake is good; and the other way round."""
    real, fake = modes(800, 0, 1, 2, 3), modes(800, 0, 1, 2)
    kept = torch.arange(800) % 4 < 3
    precision, recall = precision_recall(real, fake)
    assert precision > 0.85
    assert recall == pytest.approx(0.75 * precision_recall(real[kept], fake)[1], abs=1e-9)
    assert precision_recall(fake, real) == (recall, precision)


def test_one_point_repeated_has_precision_and_no_recall() -> None:
    real = randn(200, "a")
    assert precision_recall(real, real[:1].repeat(200, 1)) == (1, 1 / 200)  # its balls have no size: it reaches itself


def test_balls_by_hand() -> None:
    """On a line: the real radii for k = 1 are 1, 1, 2, 4 at 0, 1, 3, 7; the fake ones 1.5, 1, 1 at -1.5, 8, 9."""
    real, fake = torch.tensor([[0.0], [1.0], [3.0], [7.0]]), torch.tensor([[-1.5], [8.0], [9.0], [11.5]])
    precision, recall = precision_recall(real, fake, k=1)
    assert precision == 2 / 4  # 8 and 9 lie within 4 of 7; -1.5 and 11.5 in no ball
    assert recall == 4 / 4  # -1.5 reaches 9.5 on, 8 reaches 7


def test_the_radius_is_to_the_kth_other_point() -> None:
    real = torch.arange(10.0)[:, None]
    for k in (1, 2, 3):
        radii = neighbours._radii(real.double(), k)
        assert radii[0] == k
        assert radii[5] == (k + 1) // 2


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = randn(100, "a"), randn(90, "b") + 0.5
    whole, near = precision_recall(real, fake), nearest(real, fake)
    monkeypatch.setattr(neighbours, "BLOCK", 7)
    assert precision_recall(real, fake) == whole
    assert all(map(torch.equal, nearest(real, fake), near))


def test_nearest_is_the_smallest_distance_over_all_axes() -> None:
    real, fake = randn(20, "a").view(20, 2, 2, 2), randn(15, "b").view(15, 2, 2, 2)
    every = (fake[:, None] - real[None]).double().square().sum((2, 3, 4)).sqrt()
    distance, index = nearest(real, fake)
    torch.testing.assert_close(distance, every.min(1).values, rtol=1e-6, atol=0)
    assert torch.equal(index, every.argmin(1))


def test_a_copy_is_found_at_distance_zero() -> None:
    real = 100 + randn(50, "a")
    distance, index = nearest(real, real[[7, 3, 49]])
    assert index.tolist() == [7, 3, 49]
    assert distance.tolist() == [0, 0, 0]


def test_too_few_rows_are_refused() -> None:
    assert precision_recall(randn(4, "a"), randn(4, "a"), k=3) == (1, 1)
    with pytest.raises(UserError, match="3 neighbours need more than 3 rows, here are 4 and 3"):
        precision_recall(randn(4, "a"), randn(3, "b"))


def test_two_nearest_mirrored_or_not() -> None:
    real = torch.tensor([[0.0, 3.0], [10.0, 10.0], [0.0, 7.0]]).view(3, 1, 1, 2)
    fake = torch.tensor([[3.0, 0.0], [0.0, 6.0]]).view(2, 1, 1, 2)
    assert torch.equal(nearest_two(real, fake), torch.tensor([[0.0, 4.0], [1.0, 3.0]], dtype=torch.float64))
    among = nearest_two(real, real, same=True)
    assert among[0].tolist() == [4.0, pytest.approx(149**0.5)]
    many = torch.rand(neighbours.BLOCK + 3, 1, 2, 2, generator=stream("many"))
    assert nearest_two(many, many, same=True).min() > 0
    assert nearest_two(many, many)[:, 0].max() == 0
