"""Augmentation: each transformation does what it says, the numbers say what was done, and the draws can be repeated."""

from math import pi
from pathlib import Path

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from dumo.data.augment import SHIFT_SD, SIZE_SD, STRETCH_SD, SYM6, Edm, Name, draw_transformations, lookup_matrix, warp
from dumo.runtime.random import stream
from dumo.types import Sample
from unit.data.animals import as_folder, spec

SIDE = 16
GEOMETRY: tuple[Name, ...] = ("scale", "rotate", "aniso", "translate")


def images(n: int, side: int = SIDE) -> Sample:
    return 2 * torch.rand(n, 3, side, side, generator=stream("augment", "x"), dtype=torch.float64) - 1


def waves(u: Tensor) -> Tensor:
    """A smooth picture (n, 1, h, w) at places (n, h, w, 2), right and down from the middle, in pixels."""
    right, down = u.unbind(-1)
    return (0.5 * (0.3 * right + 0.1 * down).sin() + 0.4 * (0.2 * down - 0.15 * right).cos())[:, None]


def places(side: int = SIDE) -> Float[Tensor, "h w 2"]:
    line = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    down, right = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([right, down], -1)


def made(shares: dict[Name, float], x: Sample, key: int) -> tuple[Sample, Float[Tensor, "b n"]]:
    """The images transformed, and the numbers that say how."""
    change = draw_transformations(shares, len(x), stream(key))
    return Edm()(x, change), change.augment_labels


def still(n: int) -> tuple[Tensor, Tensor]:
    """No change, n times: the matrix and the shift."""
    return torch.eye(2, dtype=torch.float64).expand(n, 2, 2), torch.zeros(n, 2, dtype=torch.float64)


def test_the_filter_is_orthogonal_to_its_even_shifts() -> None:
    h = torch.tensor(SYM6, dtype=torch.float64)
    dots = [float(h[2 * j :] @ h[: len(h) - 2 * j]) for j in range(len(h) // 2)]
    assert dots == pytest.approx([1, 0, 0, 0, 0, 0], abs=1e-11)
    assert h.sum() == pytest.approx(2**0.5)


def test_no_change_changes_nothing_and_far_beyond_the_edges_it_is_grey() -> None:
    x, ones, (a, _) = images(3), torch.ones(1, 1, SIDE, SIDE).double(), still(1)
    assert torch.allclose(warp(x, *still(3)), x, atol=1e-10)
    assert torch.allclose(warp(ones, a, torch.tensor([[0.6, 0.0]])), ones, atol=1e-6)
    assert not warp(ones, a, torch.tensor([[4.0, 0.0]])).any()


@pytest.mark.parametrize(("right", "down"), [(3, 0), (0, -2), (-5, 4)])
def test_whole_pixels_move_as_they_are_and_what_enters_is_the_reflection(right: int, down: int) -> None:
    x, (a, shift) = images(2), still(2)
    moved = warp(x, a, shift + torch.tensor([right, down], dtype=torch.float64) / SIDE)
    mirrored = torch.nn.functional.pad(x, (8, 8, 8, 8), mode="reflect")
    expected = mirrored[:, :, 8 - down : 8 - down + SIDE, 8 - right : 8 - right + SIDE]
    assert torch.allclose(moved, expected, atol=1e-9)


@pytest.mark.parametrize("case", range(4))
def test_a_smooth_image_is_looked_up_where_the_formula_says(case: int) -> None:
    """Scale, turn, stretch, and all with a shift, away from the edges, where reflections come in."""
    one, zero = torch.ones(1).double(), torch.zeros(1).double()
    size, angle, k, axis = (
        (1.25 * one, zero, one, zero),
        (one, 0.7 * one, one, zero),
        (one, zero, 1.2 * one, 0.5 * one),
        (1.3 * one, -2.1 * one, 0.85 * one, 1.0 * one),
    )[case]
    shift = torch.tensor([[0.03, -0.05]] if case == 3 else [[0.0, 0.0]]).double()
    a = lookup_matrix(size, angle, k, axis)
    at = places()
    found = warp(waves(at[None]), a, shift)
    exact = waves((at[None] - SIDE * shift[:, None, None]) @ a.mT[:, None])
    inside = slice(4, -4)
    error = (found - exact)[..., inside, inside].abs().max()
    assert error < 0.02  # the filter is not quite symmetric: a turn moves the image by up to a tenth of a pixel
    assert (exact - waves(at[None]))[..., inside, inside].abs().max() > 0.1


def test_the_parts_of_the_matrix() -> None:
    """Twice the size looks up at half the distance; a quarter turn takes right to down; k is along its axis."""
    one, zero = torch.ones(1), torch.zeros(1)
    right = torch.tensor([1.0, 0.0])
    assert (lookup_matrix(2 * one, zero, one, zero)[0] @ right).tolist() == pytest.approx([0.5, 0])
    assert (lookup_matrix(one, pi / 2 * one, one, zero)[0] @ right).tolist() == pytest.approx([0, 1], abs=1e-6)
    assert (lookup_matrix(one, zero, 2 * one, zero)[0] @ right).tolist() == pytest.approx([0.5, 0])
    oblique = lookup_matrix(one, zero, 2 * one, pi / 6 * one)[0]
    values, vectors = torch.linalg.eigh(oblique)
    assert values.tolist() == pytest.approx([0.5, 2])
    axis = vectors[:, 0] / vectors[:, 0][0]
    assert axis.tolist() == pytest.approx([1, -(3**-0.5)], abs=1e-6)


@pytest.mark.parametrize("name", ["xflip", "yflip"])
def test_flips(name: Name) -> None:
    x = images(40)
    y, c = made({name: 0.5}, x, 1)
    turned = c[:, 0] == 1
    assert c.shape == (40, 1)
    assert 8 <= turned.sum() <= 32
    assert torch.equal(y[turned], x[turned].flip(-1 if name == "xflip" else -2))
    assert torch.equal(y[~turned], x[~turned])
    assert not c[~turned].any()


@pytest.mark.parametrize("name", GEOMETRY)
def test_the_numbers_say_what_was_done(name: Name) -> None:
    """From the numbers alone the image is made again."""
    x = images(12)
    y, c = made({name: 1.0}, x, 2)
    one, zero, c = torch.ones(12).double(), torch.zeros(12).double(), c.double()
    a, shift = still(12)
    match name:
        case "scale":
            a = lookup_matrix((SIZE_SD * c[:, 0]).exp2(), zero, one, zero)
        case "rotate":
            a = lookup_matrix(one, torch.atan2(c[:, 1], c[:, 0] + 1), one, zero)
        case "aniso":  # of (w cos r, w sin r) the sign of w is open: one of two
            w, r = c.norm(dim=1), torch.atan2(c[:, 1], c[:, 0])
            either = [warp(x, lookup_matrix(one, zero, (STRETCH_SD * sign * w).exp2(), r), shift) for sign in (1, -1)]
            assert torch.stack([(y - z).abs().amax((1, 2, 3)) for z in either]).amin(0).max() < 1e-4
            return
        case _:
            shift = SHIFT_SD * c
    assert torch.allclose(warp(x, a, shift), y, atol=1e-4)
    assert (y - x).abs().amax((1, 2, 3)).min() > 0.01


def test_numbers_are_zero_where_and_only_where_an_image_is_as_it_was() -> None:
    x = images(300)
    y, c = made(Edm().probabilities, x, 3)
    same = (x == y).flatten(1).all(1)
    assert torch.equal(same, ~c.any(1))
    assert c.shape == (300, Edm().augment_dim) == (300, 9)
    assert 60 < same.sum() < 130  # 0.5 * 0.94 * 0.88 ** 4 of them: 84


def test_shares() -> None:
    """Half mirrored, p / 2 upside down, p of each other; angles all around, scales in the right spread."""
    n, p = 20_000, 0.12
    c = Edm().draw(n, stream(4)).augment_labels
    rates = (c != 0).double().mean(0).tolist()
    assert rates[:3] == pytest.approx([0.5, p / 2, p], abs=0.01)
    assert rates[4:] == pytest.approx([p, p, p / 2, p, p], abs=0.01)  # half the stretches are along the side: r = 0
    size, _, turn, *_ = c[:, 2:].T
    assert size[size != 0].std() == pytest.approx(1, abs=0.05)
    assert c[:, 7][c[:, 7] != 0].std() == pytest.approx(1, abs=0.05)
    assert turn[turn != 0].square().mean() == pytest.approx(0.5, abs=0.03)


def test_what_is_turned_off_changes_no_other_draw() -> None:
    every, some = Edm(), Edm(yflip=False, rotate=False)
    c, d = every.draw(300, stream(6)).augment_labels, some.draw(300, stream(6)).augment_labels
    assert some.augment_dim == 6
    assert torch.equal(c[:, [0, 2, 5, 6, 7, 8]], d)


@pytest.mark.parametrize("memory", [2.0, 0.0])
def test_batches_are_functions_of_their_step(tmp_path: Path, memory: float) -> None:
    """And what is compared with is as it was."""
    as_folder(tmp_path)
    changed, plain = (spec(tmp_path, memory=memory, labelled=False, augment=way) for way in (Edm(), None))
    one, two, still = changed.open(), changed.open(), plain.open()
    steps = {step: one.batch(step, 6, 0) for step in range(4)}
    for step in (3, 1):  # out of order, as after a stop
        assert all(torch.equal(a, b) for a, b in zip(two.batch(step, 6, 0), steps[step], strict=True))
    x, c = steps[2]
    assert c.shape == (6, 9)
    assert not torch.equal(c, steps[1][1])
    untold = ~c.any(1)
    before, classes = still.batch(2, 6, 0)
    assert torch.equal(x[untold], before[untold])
    assert not torch.equal(x, before)
    assert classes.shape == (6,)
    for found, other in ((one.reference(5, 0), still.reference(5, 0)), (one.rows(slice(4)), still.rows(slice(4)))):
        assert all(torch.equal(a, b) for a, b in zip(found, other, strict=True))
