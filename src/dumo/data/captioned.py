"""A data set whose condition is a caption: one of those of the image's row, drawn at each visit."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, runtime_checkable

from jaxtyping import Int64
from torch import Tensor

from dumo.data.source import Source
from dumo.io import digest
from dumo.texts.caption import Captions

KEPT = 8  # data sets whose captions are kept: ours


@runtime_checkable
class Tells(Protocol):
    """The spec of data that have captions: frozen, so that what it says can be kept."""

    def told(self) -> Captions:
        """The captions, by image or by class."""
        ...

    def __hash__(self) -> int: ...


@lru_cache(KEPT)
def kept(data: Tells) -> Captions:
    """The captions that data tell of, found once."""
    return data.told()


@dataclass(frozen=True)
class Captioned:
    """A source whose classes are rows of `captions`: numbers of images, or classes that have captions of their own."""

    of: Source
    captions: Captions

    @property
    def size(self) -> int | None:
        """The number of samples."""
        return self.of.size

    def batch(self, step: int, batch: int, seed: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Its samples, each with one of its captions, keyed by the step and the place in the batch."""
        x, row = self.of.batch(step, batch, seed, rows)
        return x, self.captions.drawn(row, seed, step, batch=batch, rows=rows)

    def numbers(self, step: int, batch: int, seed: int, rows: slice = slice(None)) -> Int64[Tensor, " b"] | None:
        """As its own."""
        return self.of.numbers(step, batch, seed, rows)

    def reference(self, n: int, seed: int, i: int = 0) -> tuple[Tensor, Tensor]:
        """Its own, each with its first caption."""
        x, row = self.of.reference(n, seed, i)
        return x, self.captions.first(row)

    def fingerprint(self) -> str | None:
        """Of the samples, the texts, and which are whose."""
        captions = self.captions
        told = (captions.digest(), digest.of_tensor(captions.ids), digest.of_tensor(captions.ends))
        return (own := self.of.fingerprint()) and digest.short(own, *told)
