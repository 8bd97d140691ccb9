"""Existing images, from a folder, .npz, table or archive, for evaluation.

`open_images` opens a folder or file as an `ImageSet`, whose `batches` give this rank's share of the images.
`have_same_classes` compares the classes of two sets; `require_path` refuses a path where nothing is.

Images are read as the field's evaluators read them (pytorch-fid, torch-fidelity and clean-fid: `Image.convert("RGB")`):
grey becomes three equal channels, and of 16-bit colours pillow gives the high byte. Three things differ: images are
turned as their EXIF tag says; 16-bit grey is rounded to 8 bits, as protocols round samples, where the evaluators clip
it, almost all to white; and transparency lies over white. No image is resized or cropped, because the way it is done
moves a FID (Parmar et al. 2022, arXiv 2104.11222): all must have one size.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dumo.config.source import RUN_FILE
from dumo.data import pixel
from dumo.data.album import Album
from dumo.data.image import open_store
from dumo.data.store import Labels, Store
from dumo.evaluation.npz import NpzImages
from dumo.evaluation.reference import PIECE
from dumo.runtime import dist, shell_path, signals
from dumo.runtime.limits import GIGABYTE
from dumo.runtime.random import stream
from dumo.types import UserError

Batch = tuple[Tensor, Tensor]  # sample indices (n,), and images (n, channels, height, width) in [-1, 1]

_MEMORY_BYTES = 2 * GIGABYTE  # of pixels that are kept decoded, as of a run's data
_SKIP_ADVICE = (
    ", or leave such images out with data.on_bad=skip"  # of a run's data, and wrong here: no image may be left out
)


@dataclass(frozen=True)
class SameSize(pixel.ToRectangle):
    """Bytes of an image file to RGB, if it has the size of the first image, `width` x `height`."""

    first_name: str  # of the first image, for messages

    def __call__(self, data: bytes) -> Tensor:
        """The pixels, 0 ... 255. Raises Unreadable where the bytes are no whole image, or one of another size."""
        image = pixel.to_rgb(pixel.load_upright(data))
        if image.size != (self.width, self.height):
            size = f"{image.width} x {image.height} pixels"
            first_size = f"{self.width} x {self.height}"
            raise pixel.Unreadable(
                f"is {size}, and {self.first_name} is {first_size}: images are judged at one size, none is resized"
            )
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@dataclass(frozen=True)
class ImageSet:
    """The images of a folder or file."""

    source: Album | NpzImages  # reads them by row
    shape: tuple[int, ...]  # of one: 3, height, width
    labels: Labels | None  # None where they have no classes
    name: Callable[[int], str]  # of the image in a row, for messages
    option: str  # of the command line, that names these images, for messages
    label_problem: str = ""  # why their classes cannot be read; "": they can, or there are none

    def batches(self, total: int, channels: int) -> Iterator[Batch]:
        """This rank's share of `total` images, at most all: sample indices (n,), and images in [-1, 1].

        The images are (n, channels, height, width). An image's sample index is its place among the `total`. Batches
        hold the same images however many ranks there are. Raises UserError for an image in colour where `channels` is
        1, and for one that is unreadable or of another size.
        """
        not_selected = -1
        sample_index_by_row = torch.full((len(self.source),), not_selected)
        sample_index_by_row[self.chosen_rows(total)] = torch.arange(total)

        # ranks take blocks of PIECE rows in turn, so that no batch depends on how many ranks there are
        first_rows: Sequence[int] = range(dist.rank() * PIECE, len(sample_index_by_row), dist.world() * PIECE)
        if not first_rows:
            # a rank without a block yields one empty batch, because the other ranks wait for its part
            first_rows = [len(sample_index_by_row)]
        for first in first_rows:
            signals.check()
            sample_indices = sample_index_by_row[first : first + PIECE]
            is_selected = sample_indices != not_selected
            with _errors_by_option(self.option):
                x, _ = self.source.rows(slice(first, first + PIECE))
            x = x[is_selected]
            if channels == 1:
                self._require_grey(x, first + is_selected.nonzero()[:, 0])
            yield sample_indices[is_selected], x[:, :channels]

    def _require_grey(self, x: Tensor, rows: Tensor) -> None:
        """Raise UserError where an image has unequal channels. x is (n, 3, height, width); rows (n,) are its rows."""
        is_coloured = (x != x[:, :1]).flatten(1).any(1)
        if is_coloured.any():
            first_coloured = int(rows[is_coloured][0])
            raise UserError(f"{self.name(first_coloured)} is in colour, and this protocol judges grey images")

    def chosen_rows(self, total: int) -> Tensor:
        """The rows (total,) that are judged, in order: all, or a random choice, since files often lie by class."""
        order = torch.randperm(len(self.source), generator=stream("images"))
        return order[:total].sort().values


def have_same_classes(a: Labels | None, b: Labels | None) -> bool:
    """Whether two sets have as many classes, with equal names where both have names. False where one has no classes."""
    if a is None or b is None or a.count != b.count:
        return False
    if not a.names or not b.names:
        return True
    return a.names == b.names


def open_images(place: Path, option: str) -> ImageSet:
    """The images of a folder, .npz, table or archive, which the command line's `option` names.

    Classes are left out where they cannot be read (`ImageSet.label_problem`). An .npz does not say how many there are:
    they are counted up to the largest number in it. Raises UserError where there are no images, or the first is
    unreadable.
    """
    require_path(place, option)
    if (place / RUN_FILE).is_file():
        raise UserError(f"{place} is a run's folder: use `dumo evaluate {shell_path(place)}`")
    if place.suffix == ".npz":
        source = NpzImages(place)
        labels = None
        if source.c is not None:
            labels = Labels(source.c, int(source.c.max()) + 1)
        _, height, width, _ = source.shape
        return ImageSet(
            source=source,
            shape=(3, height, width),
            labels=labels,
            name=lambda row: f"image {row} of {place}",
            option=option,
        )
    with _errors_by_option(option):
        store, label_problem = _open_store(place)
        try:
            width, height = pixel.load_upright(store.read(0)).size
        except (OSError, ValueError) as error:
            raise UserError(f"{store.path(0)} {error}: mend or remove it") from error
        to_pixels = SameSize(height=height, width=width, crop="none", first_name=store.path(0))
        source = Album(store, to_pixels, flip=False, skip=False, memory=_MEMORY_BYTES)
    return ImageSet(
        source=source,
        shape=to_pixels.shape,
        labels=store.labels,
        name=store.path,
        option=option,
        label_problem=label_problem,
    )


def require_path(place: Path, option: str) -> None:
    """Raise UserError where `place`, which the command line's `option` names, does not exist."""
    if not place.exists():
        raise UserError(f"there is no folder or file {place}: say with {option} where the images are")


def _open_store(place: Path) -> tuple[Store, str]:
    """The images of a folder or table, with their classes, and ""; where these cannot be read without, and why."""
    try:
        return open_store(place), ""
    except UserError as error:
        problem, _, _ = str(error).partition(": ")  # the rest says what to set in a run
        return open_store(place, label=None), problem


@contextmanager
def _errors_by_option(option: str) -> Generator[None]:
    """Raise the errors of a run's data again, naming the command line's `option` in place of fields of data."""
    try:
        yield
    except UserError as error:
        text = str(error)
        text = text.replace(_SKIP_ADVICE, "")
        text = text.replace("choose one with data.split", f"name one of them with {option}")
        text = text.replace("data.root", option)
        raise UserError(text) from error
