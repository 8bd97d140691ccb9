"""The moons: where they lie, how they are scaled, and that no two draws are the same."""

from math import pi, sqrt

import pytest
import torch
from torch import Tensor

from dumo.data import Moons, toy
from dumo.io.source import Endless


@pytest.fixture
def _sharp(monkeypatch: pytest.MonkeyPatch) -> None:
    """The moons without their noise."""
    monkeypatch.setattr(toy, "NOISE", 0.0)


def drawn(n: int = 200_000) -> Tensor:
    return Moons().open().reference(n, 0)[0].double()


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.3])
def test_centred_with_unit_spread(noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise adds its own variance, in the units of each axis."""
    monkeypatch.setattr(toy, "NOISE", noise)
    x = drawn()
    unit = torch.tensor([3 / 4, 9 / 16 - 1 / pi], dtype=torch.float64)
    assert x.mean(0).abs().max() < 5 / sqrt(len(x)) * 1.5
    assert (x.var(0) - 1 - noise**2 / unit).abs().max() < 0.02


@pytest.mark.usefixtures("_sharp")
def test_moons_are_two_half_circles_that_hook_into_each_other() -> None:
    x = drawn() * torch.tensor([3 / 4, 9 / 16 - 1 / pi]).double().sqrt() + torch.tensor([0.5, 0.25])
    upper = ((x**2).sum(1) - 1).abs() < 1e-4
    lower = (((x - torch.tensor([1.0, 0.5])) ** 2).sum(1) - 1).abs() < 1e-4
    assert (upper | lower).all()
    assert (x[upper & ~lower, 1] > -1e-4).all()
    assert (x[lower & ~upper, 1] < 0.5 + 1e-4).all()
    assert abs(lower.double().mean() - 0.5) < 0.01


@pytest.mark.usefixtures("_sharp")
def test_labels_tell_the_moons_apart() -> None:
    """And move no point: 0 is the upper moon, 1 the lower, as often."""
    plain, told = Moons(), Moons(labelled=True)
    assert (plain.classes, told.classes) == (0, 2)
    one, two = plain.open(), told.open()
    for (x, none), (same, c) in (
        (one.batch(4, 5000, 0), two.batch(4, 5000, 0)),
        (one.reference(5000, 0, 1), two.reference(5000, 0, 1)),
    ):
        assert torch.equal(x, same)
        assert not none.any()
        assert none.dtype == c.dtype == torch.long
        place = x.double() * torch.tensor([3 / 4, 9 / 16 - 1 / pi]).double().sqrt() + torch.tensor([0.5, 0.25])
        centre = torch.tensor([[0.0, 0.0], [1.0, 0.5]], dtype=torch.float64)[c]
        assert (((place - centre) ** 2).sum(1) - 1).abs().max() < 1e-4
        assert abs(c.double().mean() - 0.5) < 0.03


@pytest.mark.usefixtures("_sharp")
def test_angles_are_uniform() -> None:
    """Each eighth of an arc has an eighth of its points."""
    x = drawn() * torch.tensor([3 / 4, 9 / 16 - 1 / pi]).double().sqrt() + torch.tensor([0.5, 0.25])
    upper = x[((x**2).sum(1) - 1).abs() < 1e-4]
    share = torch.atan2(upper[:, 1], upper[:, 0]).clamp(0, pi).histc(8, 0, pi) / len(upper)
    assert (share - 1 / 8).abs().max() < 0.01


def test_batches_are_fresh_and_keyed() -> None:
    source = Moons().open()
    assert isinstance(source, Endless)
    assert source.size is None
    x, c = source.batch(4, 50, 0)
    assert x.shape == (50, *Moons.shape)
    assert x.dtype == torch.float32
    assert not c.any()
    assert torch.equal(x, source.batch(4, 50, 0)[0])
    for other in (source.batch(5, 50, 0), source.batch(4, 50, 1), source.reference(50, 0)):
        assert not torch.isclose(x, other[0]).all(1).any()


def test_references_are_numbered() -> None:
    source = Moons().open()
    one, again, two = (source.reference(50, 0, i)[0] for i in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.isclose(one, two).all(1).any()


def test_steps_are_independent() -> None:
    """No lattice, no memory: neighbouring steps are uncorrelated, and so are the rows of one."""
    source = Moons().open()
    first = torch.stack([source.batch(step, 2, 0)[0].flatten() for step in range(4000)])
    lagged = torch.corrcoef(torch.cat([first[:-1], first[1:]], 1).T)
    inside, across = lagged[:4, :4] - torch.eye(4), lagged[:4, 4:]
    assert across.abs().max() < 5 / sqrt(4000)
    assert inside[:2, 2:].abs().max() < 5 / sqrt(4000)


def test_the_global_generator_rests() -> None:
    state = torch.get_rng_state()
    Moons().open().batch(0, 10, 0)
    assert torch.equal(state, torch.get_rng_state())
