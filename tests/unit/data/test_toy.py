"""Moons: where they lie, how they are scaled, and that no two draws are the same. Digits: what they are."""

from math import pi, sqrt

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from dumo.data import Digits, Moons, toy
from dumo.io.data_source import Endless, HeldOutSplit, TensorData

UNIT = torch.tensor([3 / 4, 9 / 16 - 1 / pi], dtype=torch.float64)  # variances of the moons before they are scaled


def unscaled(x: Tensor) -> Tensor:
    """Points of arcs of radius 1."""
    return x.double() * UNIT.sqrt() + torch.tensor([0.5, 0.25])


def drawn(n: int = 60_000) -> Tensor:
    return Moons().open().reference(n, 0)[0].double()


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.3])
def test_centred_with_unit_spread(noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise adds its own variance, in the units of each axis."""
    monkeypatch.setattr(toy, "MOONS_NOISE", noise)
    x = drawn()
    assert x.mean(0).abs().max() < 5 / sqrt(len(x)) * 1.5
    assert (x.var(0) - 1 - noise**2 / UNIT).abs().max() < 0.02


@pytest.mark.slow
def test_moons_are_two_half_circles_of_uniform_angles(monkeypatch: pytest.MonkeyPatch) -> None:
    """They hook into each other; 0 is the upper one, 1 the lower, as often; and labels move no point."""
    monkeypatch.setattr(toy, "MOONS_NOISE", 0.0)
    plain, labelled, n = Moons(), Moons(labelled=True), 30_000
    assert (plain.classes, labelled.classes) == (0, 2)
    one, two = plain.open(), labelled.open()
    for (x, none), (same, c) in (
        (one.batch(4, n, 0), two.batch(4, n, 0)),
        (one.reference(n, 0, 1), two.reference(n, 0, 1)),
    ):
        assert torch.equal(x, same)
        assert not none.any()
        assert none.dtype == c.dtype == torch.long
        assert abs(c.double().mean() - 0.5) < 0.012
        right, up = (unscaled(x) - torch.tensor([[0.0, 0.0], [1.0, 0.5]], dtype=torch.float64)[c]).unbind(1)
        assert (right**2 + up**2 - 1).abs().max() < 1e-4
        up = up * (1 - 2 * c)
        assert up.min() > -1e-4
        share = torch.atan2(up, right).clamp(0, pi).histc(8, 0, pi) / n
        assert (share - 1 / 8).abs().max() < 0.01


def test_batches_are_fresh_and_keyed() -> None:
    source, state = Moons().open(), torch.get_rng_state()
    assert isinstance(source, Endless)
    assert source.size is None
    x, c = source.batch(4, 50, 0)
    assert (x.shape, x.dtype) == ((50, *Moons.shape), torch.float32)
    assert not c.any()
    assert torch.equal(x, source.batch(4, 50, 0)[0])
    for other in (source.batch(5, 50, 0), source.batch(4, 50, 1), source.reference(50, 0)):
        assert not torch.isclose(x, other[0]).all(1).any()
    assert not torch.isclose(source.reference(50, 0)[0], source.reference(50, 0, 1)[0]).all(1).any()
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.slow
def test_steps_are_independent() -> None:
    """No lattice, no memory: neighbouring steps are uncorrelated, and so are the rows of one."""
    source, n = Moons().open(), 1500
    first = torch.stack([source.batch(step, 2, 0)[0].flatten() for step in range(n)])
    lagged = torch.corrcoef(torch.cat([first[:-1], first[1:]], 1).T)
    inside, across = lagged[:4, :4] - torch.eye(4), lagged[:4, 4:]
    assert across.abs().max() < 5 / sqrt(n)
    assert inside[:2, 2:].abs().max() < 5 / sqrt(n)


def test_digits_are_upright_of_seventeen_levels() -> None:
    """They are what scikit-learn gives. The first is a zero with a hole in it; ink is in the middle, never flipped."""
    source = Digits().open()
    x, c = source.reference(10, 3)  # all, however few
    assert x.shape == (1797, *Digits.shape)
    assert (x.dtype, c.dtype) == (torch.float32, torch.int64)
    assert torch.equal(x.unique(), torch.arange(17) / 8 - 1)
    levels, classes = load_digits(return_X_y=True)
    assert ((x + 1) * 8).flatten(1).tolist() == levels.tolist()
    assert c.tolist() == classes.tolist()
    assert c[:10].tolist() == c.unique().tolist() == list(range(Digits().classes))
    assert c.bincount().min() > 170
    mean = x[c == 0].mean(0)[0]
    assert mean[3:5, 3:5].max() < mean[3:5, [2, 5]].min()
    sevens = x[c == 7].mean(0)[0]
    assert sevens[0].mean() > sevens[-1].mean()  # the bar of a 7 is on top
    assert isinstance(source, TensorData)
    y, d = source.batch(13, 200, 0)  # crosses from the first epoch into the second
    for i in (0, 100, 199):
        assert d[i] in c[(x == y[i]).flatten(1).all(1)]


def test_images_held_out_are_in_no_batch() -> None:
    """They are 360 of all, of each class a fifth to a row, the same in every run; no others are missing."""
    whole, split = Digits().open(), Digits(held=360).originals()
    assert isinstance(split, HeldOutSplit)
    assert (split.size, len(split.held_out.x), len(split.full.x)) == (1437, 360, 1797)
    x, _ = whole.reference(0, 0)
    assert torch.equal(split.full.x, x)
    both = torch.cat([split.x, split.held_out.x]).flatten(1)
    order = [rows.flatten(1).double() @ torch.logspace(0, 3, 64, dtype=torch.float64) for rows in (both, x)]
    assert torch.equal(order[0].sort().values, order[1].sort().values)
    share = split.held_out.c.bincount() - split.full.c.bincount() * 360 / 1797
    assert share.abs().max() < 1
    seen = torch.cat([split.batch(step, 479, 0)[0] for step in range(3)])
    assert torch.equal(seen.sum(0), split.x.sum(0))
    assert torch.equal(split.held_out.x, Digits(held=360).originals().held_out.x)
    numbers = split.numbers(2, 479, 0)  # in all the data, as the message on a skipped step has them
    assert torch.equal(split.full.x[numbers], split.batch(2, 479, 0)[0])
    assert Digits(held=0).model_dump() == {"kind": "digits"}
