"""The reference files of ADM's evaluation (Dhariwal & Nichol 2021), read as they are published.

Such an .npz holds mean and covariance of the features of a whole training set, `mu`, `sigma` for the FID and `mu_s`,
`sigma_s` for the sFID, and some of its images, `arr_0`, for precision and recall. How many images the moments are of it
does not say; the protocol does. Arrays of Python objects would be pickles and are refused. The images, up to 8 GB, are
read in batches.
"""

import lzma
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import cast

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from dumo.features.inception import SPATIAL_WIDTH, WIDTH
from dumo.io.text import brief
from dumo.metrics.moments import Moments
from dumo.types import UserError

Header = tuple[tuple[int, ...], bool, np.dtype]  # shape, whether columns come first, type

HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
BROKEN = (  # what a bad file raises
    *(OSError, ValueError, EOFError, LookupError, RuntimeError, MemoryError, SyntaxError, TypeError, struct.error),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, tokenize.TokenError),  # RuntimeError: it has a password
)


@dataclass(frozen=True)
class AdmReference:
    """A reference file: the moments are in memory, the images on disk."""

    path: Path
    pool: Moments  # of the FID's features
    spatial: Moments  # of the sFID's
    shape: tuple[int, int, int, int]  # of the images: count, height, width, 3

    def images(self, batch: int = 64) -> Iterator[UInt8[Tensor, "n 3 h w"]]:
        """The images in their order, colours 0 .. 255, channels first. Raises `UserError` where the file ends early."""
        count, *rest = self.shape
        with _member(self.path, "arr_0") as file:
            _header(self.path, file)
            for first in range(0, count, batch):
                rows = min(batch, count - first)
                try:
                    data = bytearray(file.read(rows * prod(rest)))
                    pixels = torch.frombuffer(data, dtype=torch.uint8).view(rows, *rest).permute(0, 3, 1, 2)
                except BROKEN as error:
                    raise UserError(
                        f"{self.path} is damaged at image {first} ({brief(error)}): fetch it again"
                    ) from error
                yield pixels


def read_adm(path: Path | str, *, count: int) -> AdmReference:
    """Read and check a reference whose moments are of `count` images. Raises `UserError` for any other file."""
    path = Path(path)

    def moments(suffix: str, width: int) -> Moments:
        mean, covariance = _numbers(path, f"mu{suffix}", width), _numbers(path, f"sigma{suffix}", width, width)
        return Moments(count, mean, covariance * (count - 1))

    pool, spatial = moments("", WIDTH), moments("_s", SPATIAL_WIDTH)
    with _member(path, "arr_0") as file:
        shape, columns, kind = _header(path, file)
    if kind != np.uint8 or columns or len(shape) != 4 or shape[3] != 3:
        raise UserError(f"{path}: arr_0 is {kind} of shape {shape}, not images, uint8 (n, height, width, 3)")
    return AdmReference(path, pool, spatial, (shape[0], shape[1], shape[2], shape[3]))


def _numbers(path: Path, key: str, *shape: int) -> Tensor:
    """An array of finite floats of this shape, symmetric if it is a matrix, in float64."""
    with _member(path, key) as file:
        found, columns, kind = _header(path, file)
        if found != shape or kind.kind != "f":  # before it is read, for a header can claim any size
            raise UserError(f"{path}: {key} is {kind} of shape {found}, not finite floats of shape {shape}")
        try:
            data, rest = file.read(prod(shape) * kind.itemsize), file.read(1)
            array = np.frombuffer(data, kind).reshape(shape, order="F" if columns else "C")
        except BROKEN as error:
            raise UserError(f"{path}: {key} cannot be read ({brief(error)}): fetch the file again") from error
    if rest or not np.isfinite(array).all():
        more = " and more" if rest else ""
        raise UserError(f"{path}: {key} is {kind} of shape {found}{more}, not finite floats of shape {shape}")
    if len(shape) == 2 and not np.allclose(array, array.T, rtol=1e-4, atol=1e-6):
        raise UserError(f"{path}: {key} is no covariance, it is not symmetric: fetch the file again")
    return torch.from_numpy(array.astype(np.float64))


def _member(path: Path, key: str) -> zipfile.ZipExtFile:
    """One array of the file, open for reading."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path} is no file: it is no reference of ADM's evaluation, an .npz")
    try:
        with zipfile.ZipFile(path) as file:
            keys = [name.removesuffix(".npy") for name in file.namelist()]
            if key in keys:
                return cast(zipfile.ZipExtFile, file.open(f"{key}.npy"))
    except BROKEN as error:
        raise UserError(f"{path} is no reference of ADM's evaluation, an .npz ({brief(error)})") from error
    raise UserError(f"{path} has no {key}, only {', '.join(keys) or 'nothing'}: it is no reference of ADM's evaluation")


def _header(path: Path, file: zipfile.ZipExtFile) -> Header:
    """What array comes next."""
    try:
        return HEADERS[np.lib.format.read_magic(file)](file)
    except BROKEN as error:
        raise UserError(
            f"{path}: {file.name.removesuffix('.npy')} cannot be read ({brief(error)}): fetch the file again"
        ) from error
