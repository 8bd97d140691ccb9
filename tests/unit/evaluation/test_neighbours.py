"""Precision, recall and the nearest data: laws, and small cases by hand."""

import pytest
import torch
from torch import Tensor

from dumo.evaluation import neighbours
from dumo.evaluation.neighbours import nearest, nearest_other, precision_recall
from dumo.runtime.random import stream


def randn(n: int, *key: object, d: int = 8) -> Tensor:
    return torch.randn(n, d, generator=stream("neighbours", *map(str, key)))


def modes(n: int, *which: int) -> Tensor:
    """Points about some of four places far from each other."""
    place = torch.tensor(which)[torch.arange(n) % len(which)]
    return randn(n, *which) + 100.0 * torch.nn.functional.one_hot(place, 8)


def test_a_lost_mode_costs_recall_and_an_invented_one_precision() -> None:
    """Of four modes three: of the data three quarters are reached, and every fake is good; and the other way round."""
    real, fake = modes(800, 0, 1, 2, 3), modes(800, 0, 1, 2)
    kept = torch.arange(800) % 4 < 3
    precision, recall = precision_recall(real, fake)
    assert precision > 0.85
    assert recall == pytest.approx(0.75 * precision_recall(real[kept], fake)[1], abs=1e-9)
    assert precision_recall(fake, real) == (recall, precision)


def test_balls_by_hand() -> None:
    """On a line: the real radii for k = 1 are 1, 1, 2, 4 at 0, 1, 3, 7; the fake ones 1.5, 1, 1 at -1.5, 8, 9."""
    real, fake = torch.tensor([[0.0], [1.0], [3.0], [7.0]]), torch.tensor([[-1.5], [8.0], [9.0], [11.5]])
    precision, recall = precision_recall(real, fake, k=1)
    assert precision == 2 / 4  # 8 and 9 lie within 4 of 7; -1.5 and 11.5 in no ball
    assert recall == 4 / 4  # -1.5 reaches 9.5 on, 8 reaches 7


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
    far = 100 + randn(50, "a")  # a copy is found at distance zero
    distance, index = nearest(far, far[[7, 3, 49]])
    assert (distance.tolist(), index.tolist()) == ([0, 0, 0], [7, 3, 49])


def test_as_many_rows_as_neighbours_and_one_are_enough() -> None:
    assert precision_recall(randn(4, "a"), randn(4, "a"), k=3) == (1, 1)


def measured(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Precision and recall by the distances of all pairs, by differences in float64."""
    real, fake = real.double(), fake.double()

    def among(x: Tensor, centres: Tensor) -> float:
        radii = neighbours.pair_distances(centres, centres).kthvalue(k + 1, dim=1).values
        return (neighbours.pair_distances(x, centres) <= radii).any(1).double().mean().item()

    return among(fake, real), among(real, fake)


def on_the_edge(groups: int, d: int, by: float) -> tuple[Tensor, Tensor]:
    """Groups of points far apart, and a fake to each, by turns inside and outside its one ball by a part of the radius.

    A group is a point and four about it, at right angles; the fake is on the side where none is.
    """
    legs = torch.linalg.qr(randn(groups * d, "legs", d=4).view(groups, d, 4).double()).Q.mT
    middle = 50.0 * randn(groups, "middle", d=d).double()
    sign = 1 - 2 * (torch.arange(groups) % 2)[:, None].double()
    fake = middle - (1 - by * sign) * legs.sum(1) / 2
    return torch.cat([middle[:, None], middle[:, None] + legs], 1).flatten(0, 1), fake


def test_the_edge_of_a_ball_is_sharp() -> None:
    """By 1e-9 of a radius inside or outside: float32 could not say."""
    real, fake = on_the_edge(40, 64, by=1e-9)
    assert precision_recall(real, fake) == measured(real, fake)
    assert precision_recall(real, fake)[0] == 0.5


def test_a_radius_among_equals_is_the_right_one() -> None:
    """More points at nearly the same distance than are looked at first, the nearest anywhere among them."""
    n = 3 * neighbours.SPARE
    for i in range(4):
        around = torch.nn.functional.normalize(randn(n, "around", i, d=64).double(), dim=1)
        length = 1 + 1e-9 * torch.randperm(n, generator=stream("length", i))[:, None].double()
        x = torch.cat([torch.zeros(1, 64), length * around])
        radii = neighbours._radii(x, 3)
        assert radii[0] == pytest.approx(1 + 2e-9, abs=1e-10)
        assert torch.equal(radii, neighbours.pair_distances(x, x).kthvalue(4, dim=1).values)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("kind", ["normal", "features", "lattice", "copies"])
def test_answers_are_those_of_measuring_all(kind: str, scale: float) -> None:
    """To the last one, at any scale, far from the origin, and where most distances are equal."""
    real, fake = randn(150, kind, "real", d=32), randn(130, kind, "fake", d=32) + 0.1
    match kind:
        case "features":
            real, fake = (real + 30).relu(), (fake + 30).relu()
        case "lattice":
            real, fake = real[:, :4].round(), fake[:, :4].round()
        case "copies":
            real, fake = real[torch.arange(150) % 7], real[torch.arange(130) % 11]
    real, fake = scale * real, scale * fake
    assert precision_recall(real, fake) == measured(real, fake)
    every, (far, at) = neighbours.pair_distances(fake, real), nearest(real, fake)
    assert torch.equal(far, every.amin(1))
    assert torch.equal(far, every.gather(1, at[:, None])[:, 0])
    rows = torch.tensor([7, 149, 0])
    assert torch.equal(nearest_other(real, rows), neighbours._radii(real, 1)[rows])
