"""The classes or captions that a net is conditioned on: their names, their numbers, and those of samples."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from dumo.config.error import nearest
from dumo.data import Data, ShownData, has_images, is_images, is_latents
from dumo.data.caption import CaptionFiles, Captioning, Templates
from dumo.encoders.caption import parted
from dumo.flow import generate
from dumo.io.read import brief
from dumo.types import UserError


def shown(data: Data) -> ShownData:
    """The images or points that are shown: of latents, the images that were encoded."""
    return data.images if is_latents(data) else data


def squares(data: Data) -> Data:
    """The data without buckets: of latents the images, for a cache of buckets has not all of them as squares."""
    images = shown(data)
    if is_images(images) and images.buckets:
        return images.model_copy(update={"buckets": None})
    return data


@dataclass(frozen=True)
class Conditions:
    """Those of a data set. Condition `count` means none."""

    data: Data

    @property
    def count(self) -> int:
        """How many conditions there are: classes, or captions."""
        return self.data.classes

    @property
    def known(self) -> bool:
        """False if classes are still to be counted."""
        return bool(self.count) or shown(self.data).names is not None

    @property
    def captions(self) -> Captioning | None:
        """The captions that replace classes, if any."""
        return self.data.captions

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes, or the captions; () if they have none."""
        data = self.data
        if data.captions is None:
            return shown(data).names or ()
        try:
            return data.caption_texts()
        except UserError:  # images and captions may not be on this machine
            return ()

    @property
    def words(self) -> tuple[str, ...]:
        """The names as one reads them: captions without the hashes of what they edit."""
        return tuple(parted(name)[0] for name in self.names)

    def name(self, c: int) -> str:
        """The name of a class: its folder's, or the caption, else its number."""
        if self.captions and c == self.count:
            return "no caption"
        names = self.names
        return parted(names[c])[0] if c < len(names) else str(c)

    def index(self, text: str) -> int:
        """The number of a class, given its name or number. Raises UserError if there is none."""
        names = self.names
        label = text.strip()
        if label in names:
            return names.index(label)
        word = brief(label)
        if word.isdecimal() and int(word) < self.count:
            return int(word)
        if not self.count:
            raise UserError(f"there is no label '{word}': this run has no classes, so give no labels")
        hint = ""
        if names and not self.captions and not word.isdecimal():
            hint = f" {nearest(word, [*names])};"
        fix = "; give another caption as a prompt" if self.captions else ""
        raise UserError(f"there is no label '{word}':{hint} labels run from 0 to {self.count - 1}{fix}")

    def of(self, labels: Int64[Tensor, " n"], *, held: bool = False) -> Int64[Tensor, " n"]:
        """The condition of samples of these classes: the class, or a caption of it, its templates in turn.

        `held`: of the templates that are held out. Captions that were written for each image have no classes: of these,
        one of every k-th image, or of all in turn. Raises UserError if nothing is held out, or captions are missing.
        """
        match self.captions:
            case Templates() as captions:
                return captions.numbers(labels, self.data.labels, held=held)
            case CaptionFiles() if has_images(self.data):
                captions = self.data.all_captions()
                num_images = len(captions.ends)
                n = len(labels)
                images = torch.arange(n) * max(num_images, n) // n % num_images
                return captions.drawn(images, "conditions", batch=n)
            case _:
                return labels

    def in_turn(self, count: int, only: Sequence[int] | None = None) -> Int64[Tensor, " n"]:
        """The conditions of `count` samples: `only` these in turn; None: all classes in turn, or captions of them.

        Raises UserError for one out of range, or no samples.
        """
        if only:
            return generate.labels_in_turn(count, self.count, only)
        return self.of(generate.labels_in_turn(count, self.data.labels))
