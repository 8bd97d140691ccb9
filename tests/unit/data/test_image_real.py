"""The loader on real data, as they come from the hub."""

import os

import pytest
import torch

from dumo.data import Images

pytestmark = pytest.mark.data


def test_cifar10_is_whole() -> None:
    """Not decoded here: 50,000 rows, 5,000 of each class, ten names."""
    images = Images(root="$DUMO_DATA/cifar10", side=32, crop="none", split="train", memory=0.0).found()
    assert images.classes == 10
    source = images.open()
    assert source.size == 50_000
    x, c = source.rows(slice(0, 40))
    assert (x.shape, c[0].item()) == ((40, 3, 32, 32), 1)
    assert (x.min(), x.max()) == (-1, 1)
    every = source.store.labels
    assert every is not None
    assert every.c.bincount().tolist() == [5_000] * 10
    assert Images(root="$DUMO_DATA/cifar10", side=32, split="test", memory=0.0, classes=10).open().size == 10_000


def test_imagenet_sample_is_in_order_and_cropped_already() -> None:
    """One image per class, of 256 x 256: ADM's crop to that size leaves every pixel as it is."""
    root = f"{os.environ['DUMO_DATA']}/imagenet-sample"
    cropped, plain = (Images(root=root, side=256, crop=crop, memory=0.0).found().open() for crop in ("adm", "none"))
    assert cropped.size == 1000
    rows = slice(0, 1000, 250)
    x, c = cropped.rows(rows)
    assert c.tolist() == [0, 250, 500, 750]
    assert torch.equal(x, plain.rows(rows)[0])
    every = cropped.store.labels
    assert every is not None
    assert torch.equal(every.c, torch.arange(1000))
