"""A look at the images of a folder, or in memory: how many there are, how large, and how long they take to decode.

`look_at` is the entrance. It reads the headers of some images and decodes a few, all evenly spread.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from dumo.data.album import MAX_THREADS, unreadable_text
from dumo.data.pixel import ToSquare, short_side
from dumo.data.store import EncodedImages
from dumo.runtime.progress import Bar
from dumo.runtime.stopwatch import Stopwatch
from dumo.types import UserError

_MAX_HEADERS = 256  # images whose header is read: ours
_MAX_DECODED = 8  # images that are decoded, to time it and to try the autoencoder: ours


@dataclass(frozen=True)
class ImagesFound:
    """What is known of the images, from some of them."""

    count: int  # of all images
    headers: int  # images whose header was read
    bad: int  # of these, images that cannot be read
    side: float  # pixels of the shorter side, the median
    image_seconds: float = 0.0  # to decode an image on one core
    decodable: Sequence[bytes] = ()  # the files of a few images that could be decoded

    @property
    def readable(self) -> int:
        """About how many of all images can be read; exact where every header was read."""
        if not self.headers:
            return self.count
        return max(1, round(self.count * (self.headers - self.bad) / self.headers))

    @property
    def load_seconds(self) -> float:
        """Seconds for an image, where as many are decoded at once as in training."""
        return self.image_seconds / MAX_THREADS

    @property
    def decode_seconds(self) -> float:
        """Seconds until all of them are decoded."""
        return self.readable * self.load_seconds


def look_at(store: EncodedImages, to_pixels: ToSquare, bar: Bar) -> ImagesFound:
    """Look at some images of a store, each decoded by `to_pixels`. Raises UserError where none of them can be read."""
    indices = sorted({round(i * (len(store) - 1) / (_MAX_HEADERS - 1)) for i in range(_MAX_HEADERS)})
    watch = Stopwatch(torch.device("cpu"))
    sides: list[int] = []
    seconds_by_image: list[float] = []
    decodable: list[bytes] = []
    bad = 0
    first_bad = ""
    with bar("looking at images", len(indices)) as tick:
        for num_looked_at, i in enumerate(indices, start=1):
            try:
                data = store.read(i)
                sides.append(short_side(data))
                if len(decodable) * len(indices) < _MAX_DECODED * num_looked_at:  # is due by now
                    seconds_by_image.append(watch.seconds(partial(to_pixels, data)))
                    decodable.append(data)
            except (OSError, ValueError) as error:
                bad += 1
                first_bad = first_bad or unreadable_text(store.path(i), error)
            tick(num_looked_at, "")
    if not decodable:
        raise UserError(f"none of the {bad} images that were looked at can be read; the first: {first_bad}")
    return ImagesFound(
        count=len(store),
        headers=len(indices),
        bad=bad,
        side=median(sides),
        image_seconds=median(seconds_by_image),
        decodable=decodable,
    )
