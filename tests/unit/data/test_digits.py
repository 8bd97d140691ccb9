"""The digits are what they say, and their batches are made of them."""

import pytest
import torch

from dumo.data import Digits
from dumo.io.source import Source, Split, Table


def test_shape_range_and_levels() -> None:
    x, c = Digits().open().reference(0, 0)
    assert x.shape == (1797, *Digits.shape)
    assert (x.dtype, c.dtype) == (torch.float32, torch.int64)
    assert torch.equal(x.unique(), torch.arange(17) / 8 - 1)
    assert c.unique().tolist() == list(range(Digits().classes))
    assert c.bincount().min() > 170


def test_images_are_upright_and_in_place() -> None:
    """The first is a zero with a hole in it; ink is in the middle, and never flipped."""
    x, c = Digits().open().reference(0, 0)
    assert c[:10].tolist() == list(range(10))
    mean = x[c == 0].mean(0)[0]
    assert mean[3:5, 3:5].max() < mean[3:5, [2, 5]].min()
    sevens = x[c == 7].mean(0)[0]
    assert sevens[0].mean() > sevens[-1].mean()  # the bar of a 7 is on top


def test_batches_are_rows_of_the_set() -> None:
    source = Digits().open()
    assert isinstance(source, Table)
    assert source.size == 1797
    x, c = source.batch(13, 200, 0)  # crosses from the first epoch into the second
    for i in (0, 100, 199):
        match = (source.x == x[i]).flatten(1).all(1)
        assert c[i] in source.c[match]


def test_fourteen_batches_of_128_and_a_piece_are_one_epoch() -> None:
    source = Digits().open()
    x = torch.cat([source.batch(step, 128, 5)[0] for step in range(15)])[:1797]
    everything, _ = source.reference(0, 0)
    assert torch.allclose(x.sum(0), everything.sum(0), rtol=1e-4, atol=1e-3)


def test_reference_is_everything_whatever_is_asked() -> None:
    source: Source = Digits().open()
    for n, seed in ((10, 0), (5000, 3)):
        assert torch.equal(source.reference(n, seed)[0], source.reference(0, 0)[0])


def test_images_held_out_are_in_no_batch() -> None:
    """They are 360 of all, of each class a fifth to a row, the same in every run; no others are missing."""
    whole, split = Digits().open(), Digits(held=360).originals()
    assert isinstance(split, Split)
    assert (split.size, len(split.held.x), len(split.whole.x)) == (1437, 360, 1797)
    x, _ = whole.reference(0, 0)
    assert torch.equal(split.whole.x, x)
    both = torch.cat([split.x, split.held.x]).flatten(1)
    order = [rows.flatten(1).double() @ torch.logspace(0, 3, 64, dtype=torch.float64) for rows in (both, x)]
    assert torch.equal(order[0].sort().values, order[1].sort().values)
    share = split.held.c.bincount() - split.whole.c.bincount() * 360 / 1797
    assert share.abs().max() < 1
    seen = torch.cat([split.batch(step, 479, 0)[0] for step in range(3)])
    assert torch.equal(seen.sum(0), split.x.sum(0))
    assert torch.equal(split.held.x, Digits(held=360).originals().held.x)


def test_too_few_held_out_are_refused() -> None:
    with pytest.raises(ValueError, match=r"held = 64 images .* 100"):
        Digits(held=64)
    assert Digits(held=0).model_dump() == {"kind": "digits"}
