"""The classes or captions that a net is conditioned on: names, numbers, and conditions of samples.

`Conditions` has them for a data set. A condition c is a number: of a class, or of a caption in the order of the data;
the number after the last one means no condition. `shown_data` and `squares` return the images of a data set.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from dumo.data import Data, Images, Latents, ShownData
from dumo.data.caption import Captioning
from dumo.encoders.caption_ids import split_caption
from dumo.types import UserError


def shown_data(data: Data) -> ShownData:
    """Return the data for display: images or points, and for latents the original images."""
    return data.images if isinstance(data, Latents) else data


def squares(data: Data) -> Data:
    """Return the data as squares of one size, without buckets.

    Latents in buckets become their images, because the cache does not hold each image as a square.
    """
    images = shown_data(data)
    if isinstance(images, Images) and images.buckets:
        return images.model_copy(update={"buckets": None})
    return data


def spread_evenly(count: int, total: int) -> Int64[Tensor, " count"]:
    """Return `count` evenly spaced numbers in 0 .. `total` - 1, or all of them cyclically if `count` is larger."""
    return torch.arange(count) * max(total, count) // count % total


@dataclass(frozen=True)
class Conditions:
    """The conditions of a data set, numbered from 0 to `count` - 1. Number `count` means no condition."""

    data: Data

    @property
    def count(self) -> int:
        """The number of conditions: of classes, or of captions."""
        return self.data.classes

    @property
    def are_known(self) -> bool:
        """Whether the number of conditions is known; False before classes are counted."""
        data = shown_data(self.data)
        return bool(self.count) or not isinstance(data, Images) or data.is_counted

    @property
    def captions(self) -> Captioning | None:
        """The captions that the net reads, or None if it reads classes."""
        return self.data.captions

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes, or the captions; () if there are none or their files are missing."""
        data = self.data
        if data.captions is None:
            images = shown_data(data)
            titles = images.titles if isinstance(images, Images) else ()
            return images.names or titles
        try:
            return data.caption_texts()
        except UserError:  # images and captions may not be on this machine
            return ()

    @property
    def words(self) -> tuple[str, ...]:
        """The names for display: captions without the hashes of edited images."""
        return tuple(split_caption(name)[0] for name in self.names)

    def name(self, c: int) -> str:
        """Return the class name or caption of condition c, or else its number."""
        if self.captions and c == self.count:
            return "no caption"
        names = self.names
        if c >= len(names):
            return str(c)
        return split_caption(names[c])[0]

    def index(self, text: str) -> int:
        """Return the number of the class or caption with this name, else this number.

        Raises UserError if there is none.
        """
        from dumo.config.label import label_index

        return label_index(text, self.names, self.count, are_captions=self.captions is not None)

    def of_labels(self, labels: Int64[Tensor, " n"], *, held_out: bool = False) -> Int64[Tensor, " n"]:
        """Return the conditions (n,) of samples of these classes.

        Without captions they are the classes themselves. With templates each is a caption of the class, by its
        templates in turn; `held_out` takes the templates that are held out. Captions that were written for each image
        have no classes: then they are those of n images spread evenly over the data, or of all images in turn where n
        is larger, whatever the labels are. Raises UserError if nothing is held out, or captions are missing.
        """
        captioning = self.captions
        if captioning is None:
            return labels
        if captioning.kind == "templates":
            return captioning.captions_in_turn(labels, self.data.labels, held_out=held_out)
        if not isinstance(self.data, Images | Latents):
            return labels
        captions = self.data.all_captions()
        num_images = len(captions.ends)
        n = len(labels)
        return captions.draw(spread_evenly(n, num_images), "conditions", batch=n)

    def in_turn(self, count: int, only: Sequence[int] | None = None) -> Int64[Tensor, " n"]:
        """Return the conditions (count,) of `count` samples, which cycle through `only`, or through all classes.

        Raises UserError for a condition out of range, or if `count` is 0.
        """
        from dumo.flow import sampling

        if only:
            return sampling.labels_in_turn(count, self.count, only)
        return self.of_labels(sampling.labels_in_turn(count, self.data.labels))
