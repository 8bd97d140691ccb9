"""Images that lie somewhere, to be judged as they are: files of a folder, an .npz, a table, an archive.

They are read as the field's evaluators read them (pytorch-fid, torch-fidelity and clean-fid: `Image.convert("RGB")`):
grey becomes three equal channels, and of 16-bit colours pillow gives the high byte. Two things differ: 16-bit grey is
rounded to 8 bits, as protocols round samples, where theirs clips it, almost all to white; and transparency lies over
white. No image is resized or cropped, for the way it is done moves a FID (Parmar et al. 2022, arXiv 2104.11222): all
must have one size.

`open_images` opens a folder or file as an `ImageSet`. Its `batches` give this rank's share of the images.
`have_same_classes` compares the classes of two sets, `require_path` refuses a path where nothing is.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dumo.config.source import FILE
from dumo.data.album import Album
from dumo.data.image import GIGABYTE, open_store
from dumo.data.pixel import ToRectangle, Unreadable, flat, upright
from dumo.data.store import Labels, Store
from dumo.evaluation.npz import NpzImages
from dumo.evaluation.reference import PIECE
from dumo.runtime import dist, signals
from dumo.runtime.random import stream
from dumo.types import UserError

Batch = tuple[Tensor, Tensor]  # numbers (n,), and images (n, channels, height, width) in [-1, 1]

MEMORY = 2 * GIGABYTE  # of pixels that are kept decoded, as of a run's data
SKIPPING = ", or leave such images out with data.on_bad=skip"  # advice that is no use here: none may be left out


@dataclass(frozen=True)
class SameSize(ToRectangle):
    """RGB at the size of the first image, `width` x `height`."""

    first: str

    def __call__(self, data: bytes) -> Tensor:
        """The pixels, 0 ... 255. Raises Unreadable where the bytes are no whole image, or one of another size."""
        image = flat(upright(data))
        if image.size != (self.width, self.height):
            size = f"{image.width} x {image.height} pixels"
            first_size = f"{self.width} x {self.height}"
            raise Unreadable(
                f"is {size}, and {self.first} is {first_size}: images are judged at one size, none is resized"
            )
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@dataclass(frozen=True)
class ImageSet:
    """The images of a folder or file."""

    source: Album | NpzImages  # reads them by row
    shape: tuple[int, ...]  # of one: 3, height, width
    labels: Labels | None  # None where they have no classes
    name: Callable[[int], str]  # of the image in a row, for messages

    def batches(self, total: int, channels: int) -> Iterator[Batch]:
        """This rank's share of `total` images: numbers (n,) and images (n, channels, height, width) in [-1, 1].

        Batches hold the same images however many ranks there are. A rank that gets no images yields an empty batch.
        Raises UserError for an image in colour where `channels` is 1.
        """
        not_chosen = -1
        number_of_row = torch.full((len(self.source),), not_chosen)
        number_of_row[self.chosen_rows(total)] = torch.arange(total)
        first_rows = range(dist.rank() * PIECE, len(number_of_row), dist.world() * PIECE) or [len(number_of_row)]
        for first in first_rows:
            signals.check()
            numbers = number_of_row[first : first + PIECE]
            is_chosen = numbers != not_chosen
            with _errors_by_option("--images"):
                x, _ = self.source.rows(slice(first, first + PIECE))
            x = x[is_chosen]
            if channels == 1 and (x != x[:, :1]).any():
                is_coloured = (x != x[:, :1]).flatten(1).any(1)
                row = first + int(is_chosen.nonzero()[is_coloured][0])
                raise UserError(f"{self.name(row)} is in colour, and this protocol judges grey images")
            yield numbers[is_chosen], x[:, :channels]

    def chosen_rows(self, total: int) -> Tensor:
        """The rows (total,) that are judged, in order: all, or a random choice, since files often lie by class."""
        order = torch.randperm(len(self.source), generator=stream("images"))
        return order[:total].sort().values


def have_same_classes(one: Labels | None, other: Labels | None) -> bool:
    """Whether both have as many classes, and by the same names where both name them. False where either has none."""
    if one is None or other is None:
        return False
    return one.count == other.count and (one.names == other.names or () in (one.names, other.names))


def open_images(place: Path, option: str) -> ImageSet:
    """The images of an .npz, a folder or a table. Raises UserError where there are none, or the first is unreadable."""
    require_path(place, option)
    if (place / FILE).is_file():
        raise UserError(f"{place} is a run's folder: dumo evaluate {place} judges it, {option} images that are made")
    if place.suffix == ".npz":
        source = NpzImages(place)
        labels = None if source.c is None else Labels(source.c, int(source.c.max()) + 1)
        return ImageSet(source, (3, *source.shape[1:3]), labels, lambda i: f"image {i} of {place}")
    with _errors_by_option(option):
        store = _open_store(place)
        try:
            width, height = upright(store.read(0)).size
        except (OSError, ValueError) as error:
            raise UserError(f"{store.path(0)} {error}: mend or remove it") from error
        to_pixels = SameSize(height, width, "none", store.path(0))
        source = Album(store, to_pixels, flip=False, skip=False, memory=MEMORY)
    return ImageSet(source, to_pixels.shape, store.labels, store.path)


def require_path(place: Path, option: str) -> None:
    """Raise UserError where `place`, which the command line's `option` names, does not exist."""
    if not place.exists():
        raise UserError(f"there is no folder or file {place}: say with {option} where the images are")


def _open_store(place: Path) -> Store:
    """The images of a folder or table, with their classes; without them where the classes cannot be read."""
    try:
        return open_store(place)
    except UserError:
        return open_store(place, label=None)


@contextmanager
def _errors_by_option(option: str) -> Generator[None]:
    """Raise the errors of a run's data again, naming the command line's `option` in place of fields of data."""
    try:
        yield
    except UserError as error:
        text = str(error).replace(SKIPPING, "").replace("choose one with data.split", f"name one of them with {option}")
        raise UserError(text.replace("data.root", option)) from error
