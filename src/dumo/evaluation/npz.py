"""Read arrays of .npz files without pickle, and sets of images in ADM's layout without loading them whole.

`NpzImages` reads images of files up to 10 GB in blocks. `read_array` reads a whole array.

ADM's layout, used for published samples (Dhariwal & Nichol 2021):

    arr_0   images, uint8 (n, height, width, 3)
    arr_1   class numbers (n,), optional

An .npz is a zip archive of arrays. A compressed array can only be read forwards, so `NpzImages` keeps its file open
after the last image read: reading images in order reads each byte once, and going back reopens the file. Arrays of
Python objects are refused, since they contain pickles.
"""

import lzma
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from threading import Lock
from typing import NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from dumo.io.picture import from_uint8
from dumo.io.read import brief
from dumo.runtime import limits
from dumo.types import UserError

IMAGES = "arr_0"
LABELS = "arr_1"
# Skipped images are read in blocks of this size.
SKIP_BYTES = 2**24
# Readers by the version of the .npy format.
HEADER_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
# Exceptions of Python and numpy for damaged files; RuntimeError is raised for encrypted ones.
READ_ERRORS = (
    OSError,
    ValueError,
    EOFError,
    LookupError,
    RuntimeError,
    MemoryError,
    SyntaxError,
    TypeError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    tokenize.TokenError,
)


class _Header(NamedTuple):
    """The header of an array."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype


class NpzImages:
    """The images of an .npz in ADM's layout, as a finite data set (`dumo.io.data_source.Finite`).

    `shape` is (n, height, width, 3). `c` (n,) are the classes; None if the file has none or `with_classes` is false.
    Raises UserError if the file has another layout.
    """

    def __init__(self, path: Path, *, with_classes: bool = True) -> None:
        self.path = path
        # Protects the open file.
        self.lock = Lock()
        self.file: zipfile.ZipExtFile | None = None
        # The number of the image at the position of the open file.
        self.next_image = 0
        with _open_array(path, IMAGES) as file:
            self.shape = _read_images_shape(path, file)
        with zipfile.ZipFile(path) as archive:
            num_bytes = archive.getinfo(f"{IMAGES}.npy").file_size
        # The header can claim any number of images.
        if num_bytes < prod(self.shape):
            raise UserError(
                f"{path}: {IMAGES} has {num_bytes:,} bytes, too few for shape {self.shape}: download it again"
            )
        has_classes = with_classes and LABELS in _array_names(path)
        self.c = self._read_classes() if has_classes else None

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> int:
        """The number of images."""
        return len(self)

    def reference(self, n: int, seed: int, i: int = 0) -> tuple[Tensor, Tensor]:
        """Return all images in [-1, 1] and their classes (n,), ignoring the arguments."""
        return self.rows(slice(None))

    def rows(self, rows: slice | Int64[Tensor, " n"]) -> tuple[Tensor, Tensor]:
        """Return images in [-1, 1] and their classes, which are 0 if the file has none.

        `rows` is a slice or increasing numbers. All images from the first to the last row are read at once. Raises
        UserError if the file is damaged.
        """
        numbers = torch.arange(len(self))[rows]
        c = torch.zeros(len(self), dtype=torch.long) if self.c is None else self.c
        if len(numbers) == 0:
            return from_uint8(self.pixels(0, 0)), c[numbers]
        first = int(numbers[0])
        pixels = self.pixels(first, int(numbers[-1]) + 1)
        # Avoid a copy if all images were requested.
        if len(numbers) < len(pixels):
            pixels = pixels[numbers - first]
        return from_uint8(pixels), c[numbers]

    def pixels(self, first: int, stop: int) -> Tensor:
        """Return the images `first` to `stop` - 1, uint8 (n, 3, height, width).

        Raises UserError if the file is truncated or damaged.
        """
        if stop <= first:
            return torch.empty(0, 3, *self.shape[1:3], dtype=torch.uint8)
        with self.lock, _explain_faults(f"{self.path} is damaged at image {first}"):
            try:
                data = self._read_bytes(first, stop)
                images = torch.frombuffer(data, dtype=torch.uint8).view(stop - first, *self.shape[1:])
            except BaseException:
                # The position in the file is unknown.
                self.close()
                raise
            if stop == len(self):
                self.close()
        return images.permute(0, 3, 1, 2)

    def close(self) -> None:
        """Close the file, which is kept open between reads. The next read reopens it."""
        if self.file is not None:
            self.file.close()
        self.file = None

    def __del__(self) -> None:
        self.close()

    def _read_bytes(self, first: int, stop: int) -> bytearray:
        """Read the bytes of the images `first` to `stop` - 1, and keep the file open."""
        image_bytes = prod(self.shape[1:])
        file = self.file
        if file is None or first < self.next_image:
            file = self._open_before_first_image()
        for bytes_left in range((first - self.next_image) * image_bytes, 0, -SKIP_BYTES):
            file.read(min(bytes_left, SKIP_BYTES))
        data = bytearray(file.read((stop - first) * image_bytes))
        self.next_image = stop
        return data

    def _open_before_first_image(self) -> zipfile.ZipExtFile:
        """Open the file after the header of its images. Raises UserError if it no longer contains images."""
        self.close()
        file = _open_array(self.path, IMAGES)
        _read_images_shape(self.path, file)
        self.file = file
        self.next_image = 0
        return file

    def _read_classes(self) -> Tensor:
        """Read the class numbers (n,). Raises UserError if one is negative or larger than in any data set."""
        c = read_array(self.path, LABELS, "iu", (len(self),), "class numbers")
        if c.min() < 0 or c.max() >= limits.CLASSES:
            wrong = c.min() if c.min() < 0 else c.max()
            raise UserError(f"{self.path}: {LABELS} has the class {wrong}: number classes from 0, or remove the array")
        return torch.from_numpy(c.astype(np.int64))


def read_array(path: Path, name: str, kinds: str, shape: tuple[int, ...], expected: str) -> np.ndarray:
    """Read the array `name` of a file.

    kinds: allowed `numpy.dtype.kind` letters, such as "f" or "iu".
    expected: a description of the expected values, for messages.

    Raises UserError if the array is damaged, not finite, or has another shape or kind.
    """
    with _open_array(path, name) as file:
        header = _read_header(path, file)
        stored = f"{path}: {name} is {header.dtype} of shape {header.shape}"
        # Check before reading, since the header can claim any size.
        if header.shape != shape or header.dtype.kind not in kinds:
            raise UserError(f"{stored}, not {expected} of shape {shape}")
        with _explain_faults(f"{path}: {name} cannot be read"):
            data = file.read(prod(shape) * header.dtype.itemsize)
            bytes_after = file.read(1)
            order = "F" if header.fortran_order else "C"
            values = np.frombuffer(data, header.dtype).reshape(shape, order=order)
    if bytes_after:
        raise UserError(f"{stored} and more, not {expected} of shape {shape}")
    if not np.isfinite(values).all():
        raise UserError(f"{stored}, not {expected} of shape {shape}")
    return values


def _array_names(path: Path) -> list[str]:
    """Return the names of a file's arrays. Raises UserError if it is not an .npz."""
    with _explain_faults(f"{path} is not an .npz file"):
        # Opening a pipe would wait forever.
        if path.exists() and not path.is_file():
            raise OSError("not a file")
        with zipfile.ZipFile(path) as file:
            names = [name.removesuffix(".npy") for name in file.namelist()]
    if len(set(names)) < len(names):
        raise UserError(f"{path} has an array twice ({', '.join(names)}): write it again")
    return names


def _open_array(path: Path, name: str) -> zipfile.ZipExtFile:
    """Open the array `name` of a file at its header. Raises UserError if there is no such array."""
    names = _array_names(path)
    if name not in names:
        raise UserError(f"{path} has no {name}, only {', '.join(names) or 'nothing'}: it is not in ADM's layout")
    with _explain_faults(f"{path} is not an .npz file"), zipfile.ZipFile(path) as file:
        return cast(zipfile.ZipExtFile, file.open(f"{name}.npy"))


def _read_images_shape(path: Path, file: zipfile.ZipExtFile) -> tuple[int, int, int, int]:
    """Read the shape (n, height, width, 3) from the header of an open array. Raises UserError for other arrays."""
    header = _read_header(path, file)
    shape = header.shape
    are_images = len(shape) == 4 and shape[3] == 3 and min(shape) > 0
    if header.dtype != np.uint8 or header.fortran_order or not are_images:
        raise UserError(f"{path}: {IMAGES} is {header.dtype} of shape {shape}, not images, uint8 (n, height, width, 3)")
    count, height, width, colours = shape
    return count, height, width, colours


def _read_header(path: Path, file: zipfile.ZipExtFile) -> _Header:
    """Read the header of an open array. Raises UserError if it is damaged."""
    with _explain_faults(f"{path}: {file.name.removesuffix('.npy')} cannot be read"):
        read = HEADER_READERS[np.lib.format.read_magic(file)]
        return _Header(*read(file))


@contextmanager
def _explain_faults(fault: str) -> Generator[None, None, None]:
    """Convert READ_ERRORS to a UserError that starts with `fault`."""
    try:
        yield
    except READ_ERRORS as error:
        raise UserError(f"{fault} ({brief(error)}): download it again") from error
