"""Samples as files. Each is written beside its place and moved there whole, so that no half a file is ever found.

An OSError (a full disk, a forbidden folder) passes through; the file that stood there before still stands.
"""

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from dumo.io.picture import PixelRows


@contextmanager
def replacing(path: Path) -> Generator[BinaryIO, None, None]:
    """Yield a file to write that takes the place of `path` when all went well, and is removed when not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with half.open("wb") as file:
            yield file
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)


def write_picture(path: Path, picture: Image.Image) -> None:
    """One picture as PNG."""
    with replacing(path) as file:
        picture.save(file, format="png")


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
    with replacing(path) as file:
        np.savez(file, x, c.astype(np.int64))
