"""Samples as files, each written whole or not at all (`dumo.io.file.whole`, which tells what it raises)."""

from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from dumo.io.file import whole
from dumo.io.picture import PixelRows


def write_picture(path: Path, picture: Image.Image) -> None:
    """One picture as PNG."""
    with whole(path) as half:
        picture.save(half, format="png")


def write_singles(folder: Path, pixels: PixelRows, first: int = 0) -> None:
    """An image a file: 000000.png and so on, counted from `first`."""
    for i, image in enumerate(pixels.numpy(), start=first):
        write_picture(folder / f"{i:06d}.png", Image.fromarray(image))


def write_adm(path: Path, pixels: PixelRows, c: Int[Tensor, " n"]) -> None:
    """ADM's layout, which its evaluation reads: arr_0 uint8 (n, h, w, 3), arr_1 int64 labels (n,)."""
    _write_arrays(path, pixels.numpy(), c.numpy())


def write_points(path: Path, points: Float[Tensor, "n 2"], c: Int[Tensor, " n"]) -> None:
    """Points in the same layout: arr_0 float (n, 2), arr_1 int64 labels (n,)."""
    _write_arrays(path, points.numpy(), c.numpy())


def _write_arrays(path: Path, x: np.ndarray, c: np.ndarray) -> None:
    with whole(path) as half, half.open("wb") as file:  # savez would add an ending to a path
        np.savez(file, x, c.astype(np.int64))
