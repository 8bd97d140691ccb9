"""What a codec made of images: a cache, which `dumo encode` fills and training reads.

The images that were encoded, the codec and the cache stand side by side in a run, so that one file says how to make the
cache, whether a cache at hand is the one meant, how samples are decoded, and what they are compared with.
"""

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dumo.bound import GIGABYTES
from dumo.codecs import Codec
from dumo.data.album import Album
from dumo.data.audit import Audit
from dumo.data.cache import Cache, Contents, open_cache, read_contents
from dumo.data.epoch import mirrored, rows_of
from dumo.data.image import GIGABYTE, Images, below
from dumo.io.path import user_path
from dumo.random import stream
from dumo.types import FREE, Spec, UserError


class Latents(Spec):
    """Images through a codec, from a cache of them."""

    kind: Literal["latents"] = "latents"
    root: str = Field(json_schema_extra=FREE)  # the cache's folder; may begin with ~ and hold $NAMES
    images: Images  # what is encoded; `flip` mirrors them before the codec
    codec: Codec
    per_channel: bool = False  # take shift and scale from the cache: mean 0 and deviation 1 in each channel
    # GB of cache read at once, not mapped; ours.
    memory: float = Field(default=1.0, ge=0, le=GIGABYTES, json_schema_extra=FREE)

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height, width of a latent."""
        return self.codec.shape(self.images.side)

    @property
    def classes(self) -> int:
        """Those of the images."""
        return self.images.classes

    @property
    def folder(self) -> Path:
        """Where the cache is. Raises UserError for a variable that is not set."""
        return user_path(self.root, "data.root")

    @model_validator(mode="after")
    def _fits(self) -> "Latents":
        if self.images.channels != 3:
            raise ValueError("codecs take images of 3 channels: set data.images.channels=3")
        if self.images.augment:
            raise ValueError("latents are of images as they are: set data.images.augment=null")
        _ = self.shape  # refuses a side that the codec does not divide
        if self.images.names is None and (there := self._there()):  # the cache knows, where the images are not here
            images = self.images.model_copy(update={"classes": there.classes, "names": there.names})
            object.__setattr__(self, "images", images)
        if not self.per_channel or isinstance(self.codec.scale, tuple):
            return self
        contents = open_cache(self.folder, codec=self.codec).contents  # looked up once: the run holds the numbers
        raw = contents.codec.normalised(contents.mean, contents.std)
        return self.model_copy(update={"codec": self.codec.model_copy(update={"shift": raw.shift, "scale": raw.scale})})

    def _there(self) -> Contents | None:
        """What the cache holds, if there is one."""
        try:
            return read_contents(self.folder)
        except UserError:
            return None

    def originals(self, memory: float | None = None) -> Album:
        """The images that are encoded, with `memory` GB of them decoded. Raises UserError as opening them does."""
        images = self.images if memory is None else self.images.model_copy(update={"memory": memory})
        with below("data.images"):
            return images.open()

    def open(self) -> "Encoded":
        """The cache. Raises UserError where there is none, or one of other images or of another codec."""
        images = self.images
        try:
            cache = open_cache(
                self.folder,
                codec=self.codec,
                resolution=images.side,
                crop=images.crop,
                classes=images.classes,
                names=images.names or None,
                flips=images.flip,
                memory=self.memory * GIGABYTE,
            )
        except UserError as error:
            raise UserError(f"data.root: {error}") from error
        return Encoded(cache, flip=images.flip)


class Encoded:
    """Latents as a source. Of a codec with Gaussians every visit draws anew, keyed by the step.

    Raises UserError for a shard that has changed, from the beginning or from `batch` (`dumo.data.audit`).
    """

    def __init__(self, cache: Cache, *, flip: bool) -> None:
        self.cache, self.flip = cache, flip
        self.audit = Audit(cache.folder, cache.contents.shards)

    @property
    def size(self) -> int:
        """The number of rows."""
        return len(self.cache)

    def batch(self, step: int, batch: int, seed: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Epoch after epoch, each in its own order, half of the images mirrored if `flip`."""
        self.audit.require()
        places = rows_of(step, batch, size=self.size, seed=seed, rows=rows)
        x, c = self.cache.rows(places, mirrored(step, batch, seed, rows) if self.flip else None)
        return self.cache.codec.sample(x, seed, step, "posterior", rows=range(batch)[rows]), c

    def numbers(self, step: int, batch: int, seed: int, rows: slice = slice(None)) -> Tensor:
        """Their numbers in the cache."""
        return rows_of(step, batch, size=self.size, seed=seed, rows=rows)

    def fingerprint(self) -> str:
        """Of the cache."""
        return self.cache.fingerprint()

    def reference(self, n: int, seed: int, i: int = 0) -> tuple[Tensor, Tensor]:
        """n of the rows, or all where there are fewer, the i-th choice; not mirrored."""
        x, c = self.cache.rows(torch.randperm(self.size, generator=stream(seed, "reference", i))[:n])
        return self.cache.codec.sample(x, seed, "reference posterior", i, rows=range(len(x))), c
