"""TensorFlow 1's resize, by its definition."""

import pytest
import torch
from torch import Tensor

from dumo.encoders.inception import resize_tf1
from dumo.runtime.random import stream


def images(h: int, w: int) -> Tensor:
    return torch.randint(256, (1, 3, h, w), generator=stream("resize", h, w)).float()


@pytest.mark.parametrize(("h", "w", "size"), [(4, 4, 7), (5, 3, 8), (9, 16, 5), (32, 32, 32), (1, 1, 3)])
def test_is_the_definition(h: int, w: int, size: int) -> None:
    """out[i, j] = x at (i h / size, j w / size), between the four pixels around, the last row and column repeated."""
    x = images(h, w).double()
    out = resize_tf1(x.float(), size)
    for i in range(size):
        for j in range(size):
            y, z = i * h / size, j * w / size
            a, b = int(y), int(z)
            rows = (1 - (y - a), a), (y - a, min(a + 1, h - 1))
            columns = (1 - (z - b), b), (z - b, min(b + 1, w - 1))
            wanted = sum(p * q * x[:, :, r, c] for p, r in rows for q, c in columns)
            torch.testing.assert_close(out[:, :, i, j].double(), wanted, rtol=1e-5, atol=1e-3)


def test_a_fitting_image_is_left_alone() -> None:
    x = images(17, 17)
    assert torch.equal(resize_tf1(x, 17), x)


def test_is_not_torchs_own() -> None:
    """Half a pixel off, and no antialiasing: by twice the size every other pixel is one of the input."""
    x = images(6, 6)
    assert torch.equal(resize_tf1(x, 12)[:, :, ::2, ::2], x)
    assert torch.equal(resize_tf1(x, 3), x[:, :, ::2, ::2])
