"""Arrays of an .npz, read one by one without pickle, as little of each as is needed; images in ADM's layout.

ADM's layout (Dhariwal & Nichol 2021), in which published samples come: `arr_0`, uint8 (n, height, width, 3), and, where
they have classes, `arr_1`, their numbers (n,). Arrays of Python objects would be pickles and are refused. Images, up to
10 GB, are read in stretches: quickly in their order, for a compressed file has no way back. `NpzImages` is such a set,
`array` reads one array whole.
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
from typing import cast

import numpy as np
import torch
from torch import Tensor

from dumo.io.picture import from_uint8
from dumo.io.read import brief
from dumo.types import UserError

Header = tuple[tuple[int, ...], bool, np.dtype]  # shape, whether it is in Fortran's order, dtype

IMAGES = "arr_0"
LABELS = "arr_1"
SKIP_BYTES = 2**24  # read at a time where they are skipped
HEADER_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
READ_ERRORS = (  # what a bad file raises
    OSError,
    ValueError,
    EOFError,
    LookupError,
    RuntimeError,  # it has a password
    MemoryError,
    SyntaxError,
    TypeError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    tokenize.TokenError,
)


class NpzImages:
    """Images of an .npz in ADM's layout, in their order: a finite set, to be gone through.

    `c` is their classes (n,), None where the file has none, or `with_classes` is false. Raises UserError for another
    file.
    """

    def __init__(self, path: Path, *, with_classes: bool = True) -> None:
        self.path = path
        self.lock = Lock()
        self.file: zipfile.ZipExtFile | None = None
        self.next_image = 0  # that the open file reads
        count, height, width, colours = self._open()
        self.close()
        self.shape: tuple[int, int, int, int] = (count, height, width, colours)
        has_classes = with_classes and LABELS in keys(path)
        self.c = self._classes() if has_classes else None

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self)

    def reference(self, n: int, seed: int, i: int = 0) -> tuple[Tensor, Tensor]:
        """All of them; n, seed and i do not matter."""
        return self.rows(slice(None))

    def rows(self, rows: slice) -> tuple[Tensor, Tensor]:
        """A stretch of them in [-1, 1], with their classes, all 0 where there are none. Raises UserError for damage."""
        places = range(len(self))[rows]
        c = torch.zeros(len(self), dtype=torch.long) if self.c is None else self.c
        pixels = self.pixels(places.start, places.stop)[:: places.step]
        return from_uint8(pixels), c[rows]

    def pixels(self, first: int, stop: int) -> Tensor:
        """Images `first` to `stop`, uint8 (n, 3, h, w). Raises UserError where the file ends early, or is damaged."""
        image_bytes = prod(self.shape[1:])
        if stop <= first:
            return torch.empty(0, 3, *self.shape[1:3], dtype=torch.uint8)
        with self.lock, _explain_faults(f"{self.path} is damaged at image {first}"):
            if self.file is None or first < self.next_image:
                self._open()
            assert self.file is not None, "it is open now"
            for bytes_left in range((first - self.next_image) * image_bytes, 0, -SKIP_BYTES):
                self.file.read(min(bytes_left, SKIP_BYTES))
            data = bytearray(self.file.read((stop - first) * image_bytes))
            self.next_image = stop
            if stop == len(self):
                self.close()
            return torch.frombuffer(data, dtype=torch.uint8).view(-1, *self.shape[1:]).permute(0, 3, 1, 2)

    def close(self) -> None:
        """Close the file, which is open between two stretches; the next one opens it again."""
        if self.file is not None:
            self.file.close()
        self.file = None

    def __del__(self) -> None:
        self.close()

    def _open(self) -> tuple[int, ...]:
        """Open the file before its first image; the shape of all."""
        self.close()
        self.file = _open_array(self.path, IMAGES)
        self.next_image = 0
        shape, fortran_order, dtype = _read_header(self.path, self.file)
        if dtype != np.uint8 or fortran_order or len(shape) != 4 or shape[3] != 3 or 0 in shape:
            raise UserError(
                f"{self.path}: {IMAGES} is {dtype} of shape {shape}, not images, uint8 (n, height, width, 3)"
            )
        return shape

    def _classes(self) -> Tensor:
        c = array(self.path, LABELS, "iu", (len(self),), "class numbers")
        if c.min() < 0:
            raise UserError(f"{self.path}: {LABELS} has the class {c.min()}: number classes from 0, or leave it out")
        return torch.from_numpy(c.astype(np.int64))


def keys(path: Path) -> list[str]:
    """The names of its arrays. Raises UserError where it is no .npz."""
    with _explain_faults(f"{path} is no .npz"):
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise OSError("no file")
        with zipfile.ZipFile(path) as file:
            return [name.removesuffix(".npy") for name in file.namelist()]


def array(path: Path, key: str, kinds: str, shape: tuple[int, ...], what: str) -> np.ndarray:
    """An array of this shape whose type is of numpy's `kinds`, finite; `what` it should be, for a message."""
    with _open_array(path, key) as file:
        file_shape, fortran_order, dtype = _read_header(path, file)
        problem = f"{path}: {key} is {dtype} of shape {file_shape}"
        if file_shape != shape or dtype.kind not in kinds:  # before it is read, for a header can claim any size
            raise UserError(f"{problem}, not {what} of shape {shape}")
        with _explain_faults(f"{path}: {key} cannot be read"):
            data = file.read(prod(shape) * dtype.itemsize)
            rest = file.read(1)
            values = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran_order else "C")
    if rest:
        raise UserError(f"{problem} and more, not {what} of shape {shape}")
    if not np.isfinite(values).all():
        raise UserError(f"{problem}, not {what} of shape {shape}")
    return values


def _open_array(path: Path, key: str) -> zipfile.ZipExtFile:
    """One array of the file, open for reading."""
    names = keys(path)
    if key not in names:
        raise UserError(f"{path} has no {key}, only {', '.join(names) or 'nothing'}: it is not in ADM's layout")
    with _explain_faults(f"{path} is no .npz"), zipfile.ZipFile(path) as file:
        return cast(zipfile.ZipExtFile, file.open(f"{key}.npy"))


def _read_header(path: Path, file: zipfile.ZipExtFile) -> Header:
    """What array comes next."""
    with _explain_faults(f"{path}: {file.name.removesuffix('.npy')} cannot be read"):
        return HEADER_READERS[np.lib.format.read_magic(file)](file)


@contextmanager
def _explain_faults(fault: str) -> Generator[None, None, None]:
    """Raise UserError, as this fault, for all that reading a bad file raises."""
    try:
        yield
    except READ_ERRORS as error:
        raise UserError(f"{fault} ({brief(error)}): fetch it again") from error
