"""The captions of a data set: each distinct text has a number, as a class has.

A condition c is then the number of a caption; the number after the last means no caption.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from dumo.io import digest
from dumo.runtime.random import stream


@dataclass(frozen=True)
class Captions:
    """Distinct texts, and the numbers of each image's. Caption k is `texts[k]`; number `len(texts)` is no caption.

    An image has at least one number: that of no caption where it has none, or only blank ones.
    """

    texts: tuple[str, ...]  # distinct, none blank
    ids: Int64[Tensor, " m"]  # numbers of captions, image by image
    ends: Int64[Tensor, " n"]  # the end of image i's numbers in `ids`

    @classmethod
    def of(cls, images: Iterable[Sequence[str]]) -> "Captions":
        """Number the captions of each image, in order of first appearance, stripped of surrounding blanks."""
        numbers: dict[str, int] = {}
        listed: list[int] = []
        ends: list[int] = []
        for captions in images:
            stripped = [text.strip() for text in captions] or [""]
            listed += [numbers.setdefault(text, len(numbers)) if text else -1 for text in stripped]
            ends.append(len(listed))
        ids = torch.tensor(listed, dtype=torch.long)
        return cls(tuple(numbers), ids.where(ids >= 0, len(numbers)), torch.tensor(ends, dtype=torch.long))

    def __len__(self) -> int:
        """The number of texts."""
        return len(self.texts)

    @property
    def counts(self) -> Int64[Tensor, " n"]:
        """The number of captions of each image, at least 1."""
        return self.ends.diff(prepend=self.ends.new_zeros(1))

    def first(self, images: Int64[Tensor, " b"]) -> Int64[Tensor, " b"]:
        """The first caption of each of these images."""
        return self.ids[self.ends[images] - self.counts[images]]

    def drawn(
        self, images: Int64[Tensor, " b"], *key: int | str, batch: int, rows: slice = slice(None)
    ) -> Int64[Tensor, " b"]:
        """One of the captions of each image, all equally likely, by random numbers of the key.

        The images are at the places `rows` of a batch of `batch` rows, so each rank draws for its own alone.
        """
        u = torch.rand(batch, dtype=torch.float64, generator=stream(*key, "caption"))[rows]
        counts = self.counts[images]
        return self.ids[self.ends[images] - counts + (u * counts).long()]

    def digest(self) -> str:
        """A short digest of the texts in their order: captions of the same digest have the same numbers."""
        return digest.short(*self.texts)
