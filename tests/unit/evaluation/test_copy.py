"""The nearest images by hand, and what counts as a copy."""

import pytest
import torch
from torch import Tensor

from dumo.evaluation import neighbours
from dumo.evaluation.copy import nearest_images, thumbnails
from dumo.runtime.random import stream


def rows(*values: tuple[float, float]) -> Tensor:
    """Images of one row of two pixels."""
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 2)


def test_two_nearest_mirrored_or_not() -> None:
    real, fake = rows((0, 3), (10, 10), (0, 7)), rows((3, 0), (0, 6))
    found = nearest_images(real, fake)
    assert found.distances.tolist() == [[0, 4], [1, 3]]
    assert (found.indices.tolist(), found.is_mirrored.tolist()) == ([0, 2], [True, False])
    assert found.is_copy.tolist() == [True, False]  # 1 is a third of 3, and no less
    as_they_are = nearest_images(real, fake, mirror=False)
    assert as_they_are.distances[0].tolist() == pytest.approx([18**0.5, 58**0.5])
    assert not as_they_are.is_mirrored.any()
    among = nearest_images(real, real, left_out=torch.arange(3))
    assert among.distances[0].tolist() == [4.0, pytest.approx(149**0.5)]
    some = nearest_images(real, real[[2, 0]], left_out=torch.tensor([2, 0]))
    assert torch.equal(some.distances, among.distances[[2, 0]])
    assert some.indices.tolist() == [0, 2]


def test_blocks_leave_out_the_right_images() -> None:
    many = torch.rand(neighbours.BLOCK + 3, 1, 2, 2, generator=stream("many"))
    assert nearest_images(many, many, left_out=torch.arange(len(many))).distances.min() > 0
    found = nearest_images(many, many)
    assert found.distances[:, 0].max() == 0
    assert torch.equal(found.indices, torch.arange(len(many)))
    assert found.is_copy.all()


def test_of_one_image_nothing_is_a_copy() -> None:
    """There is no other one that it would be far from."""
    real = rows((0, 3))
    found = nearest_images(real, rows((0, 3), (0, 4)))
    assert found.distances[:, 0].tolist() == [0, 1]
    assert found.distances[:, 1].isnan().all()
    assert not found.is_copy.any()
    two = rows((0, 3), (1, 1))
    assert nearest_images(two, two, left_out=torch.arange(2)).distances[:, 1].isnan().all()


def test_thumbnails_are_means_and_small_images_stay() -> None:
    x = torch.rand(2, 3, 32, 48, generator=stream("thumbs"))
    torch.testing.assert_close(thumbnails(x)[0, 0, 0, 0], x[0, 0, :2, :3].mean())
    assert thumbnails(x).shape == (2, 3, 16, 16)
    small = torch.rand(2, 1, 8, 8, generator=stream("small"))
    assert torch.equal(thumbnails(small), small)
