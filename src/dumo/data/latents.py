"""What a codec made of images: a cache, which `dumo encode` fills and training reads.

A run has the images, the codec and the cache, so that one file says how to make the cache, whether the cache that is
there is the one meant, how samples are decoded, and what they are compared with.

1. `Latents` is the spec. When a run is opened, `Latents.with_facts` counts its classes or captions.
2. `dumo encode` encodes `Latents.rows` into the cache (`dumo.data.encoding`).
3. `Latents.open` opens the cache as a `LatentSource`, from which training draws batches.

Before training begins, `Latents.compare_images` compares the images that are here with those that the cache was made
of. While it reads, `dumo.io.audit` looks whether the cache has changed; a batch raises what it finds.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dumo.data.bucket import Crops
from dumo.data.cache import (
    CAPTIONS,
    CacheIndex,
    measure_crops,
    open_cache,
    read_captions,
    read_index,
    read_names,
    require_same_images,
)
from dumo.data.caption import Captioned, CaptionFiles, Captioning, Templates, cached_captions, with_captions
from dumo.data.images import BucketedImages, Images, Source, errors_of_latents
from dumo.encoders import Codec
from dumo.encoders.caption_ids import Captions
from dumo.flow.noisy_batch import PRIOR
from dumo.io.audit import Audit
from dumo.io.data_source import Bucketed, mirrored_rows, rows_of
from dumo.io.read import user_path
from dumo.io.table import ShardTable
from dumo.runtime.limits import GIGABYTE, GIGABYTES
from dumo.runtime.random import random_row_mask, stream
from dumo.types import FREE, PLACE, Spec, UserError

_PRIOR_FOLDER = PRIOR  # the name of a folder of images that a teacher made, next to those of the subject
# In the name of an image, on disk or in an archive: `prior/1.png`, `a.tar member prior/1.png`.
_IN_PRIOR_FOLDER = re.compile(f"(^|/| member ){_PRIOR_FOLDER}/")


class Latents(Spec):
    """Images through a codec, from a cache of them."""

    kind: Literal["latents"] = "latents"
    root: str = Field(json_schema_extra=PLACE)  # the cache's folder; may begin with ~ and hold $NAMES
    images: Images  # what is encoded; `flip` mirrors them before the codec
    codec: Codec
    # GB of cache read at once, not mapped; ours.
    memory: float = Field(default=1.0, ge=0, le=GIGABYTES, json_schema_extra=FREE)
    # The share of every batch that is images of a folder _PRIOR_FOLDER, made by the teacher of other prompts, and
    # answered by it: what else it knows stays, as by DreamBooth's prior preservation (Ruiz et al. 2022). None: all are
    # alike.
    prior: float | None = Field(default=None, gt=0, lt=1, exclude_if=lambda prior: prior is None)

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height, width of a latent."""
        return self.codec.shape(self.images.side)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of latents that are trained on: one for each bucket, or one."""
        return tuple(self.codec.shape(*size) for size in self.images.sizes) or (self.shape,)

    @property
    def classes(self) -> int:
        """The number of the images' classes, or of their captions."""
        return self.images.classes

    @property
    def labels(self) -> int:
        """The number of classes of the images themselves; 0 with captions that were written of each image."""
        return self.images.labels

    @property
    def captions(self) -> Captioning | None:
        """The captions of the images."""
        return self.images.captions

    @property
    def folder(self) -> Path:
        """The cache's folder. Raises UserError for an environment variable that is not set."""
        return user_path(self.root, "data.root")

    @model_validator(mode="after")
    def _require_fit(self) -> "Latents":
        if self.images.augment:
            raise ValueError("latents are of images as they are: set data.images.augment=null")
        if self.prior and self.images.buckets:
            raise ValueError(
                "data.prior picks rows of every batch, of one size: set data.prior=null, or data.images.buckets=null"
            )
        if self.codec.kind != "pipeline":  # a pipeline's codec is known to the run alone, which looks at its shapes
            _ = self.shape  # raises for a side that the codec does not divide
            _ = self.shapes
        return self

    def with_facts(self) -> "Latents":
        """The spec with the classes or captions that its images have, or the cache, where the images are not here."""
        images = self.images.with_facts()
        if not images.is_counted:
            contents = self._cache_contents()
            if contents is not None:
                images = self._images_as_cached(contents)
        return self.model_copy(update={"images": images})

    def _cache_contents(self) -> CacheIndex | None:
        """The index of the cache; None where there is none, or it is damaged."""
        with suppress(UserError):  # a damaged cache is refused where it is opened
            return read_index(self.folder)
        return None

    def _images_as_cached(self, contents: CacheIndex) -> Images:
        """The spec of the images, with the numbers of classes and captions that the cache has."""
        captions = self.images.captions
        if captions is None:
            facts = {"classes": contents.classes, "names": contents.names}
        elif isinstance(captions, Templates):
            facts = {"classes": captions.num_captions(contents.classes), "names": contents.names}
        else:
            cached = read_captions(self.folder / CAPTIONS)
            with_digest = captions.model_copy(update={"digest": cached.digest()})
            facts = {"classes": len(cached), "names": (), "captions": with_digest}
        return self.images.model_copy(update=facts)

    def originals(self) -> Source:
        """The images that are encoded, with their classes.

        Raises UserError as `Images.originals`, and where the cache is of other images, now or when one is read.
        """
        with errors_of_latents():
            source = self.images.originals()
        if self._cache_contents():
            require_same_images(self.folder, source.ledger)
        return source

    def compare_images(self, *, hash_all: bool = False) -> None:
        """Raise UserError, with a name, if the images that are here are not those of the cache.

        Images of another size or time are read and hashed, with `hash_all` all images. Images that are not here pass.
        """
        with errors_of_latents():
            ledger = self.images.ledger()
        if ledger is not None:
            require_same_images(self.folder, ledger, hash_all=hash_all)

    def rows(self) -> Source | BucketedImages:
        """The images to encode, none decoded, each with its row of captions. Raises UserError."""
        with errors_of_latents():
            return self.images.rows()

    def all_captions(self) -> Captions:
        """The captions by class, or by image as the cache has them. Raises UserError where they are not the run's."""
        if not isinstance(self.captions, CaptionFiles):
            return self.images.all_captions()
        file = self.folder / CAPTIONS
        if not file.is_file():
            return self.images.all_captions()
        cached = read_captions(file)
        self.captions.require(cached, str(file))
        return cached

    def caption_texts(self) -> tuple[str, ...]:
        """The text of each caption, by its number; () where there are none. Raises UserError where they changed."""
        return cached_captions(self).texts if self.captions else ()  # pyright: ignore[reportArgumentType], specs are frozen

    def open(self) -> "LatentSource | Bucketed | Captioned":
        """The cache as a source. Raises UserError as `cache` does, and for other captions."""
        cache = self.cache()
        source = LatentSource(cache, self.codec, flip=self.images.flip)
        if self.prior:
            source.take_prior_share(self.prior)
        if self.images.buckets:
            source = source.bucketed()
        if self.captions:
            return with_captions(source, self.all_captions())
        return source

    def crops(self) -> Crops | None:
        """How much of the images the buckets' sizes cut off, by the cache, else by the images; None without buckets.

        Raises UserError where neither can be opened.
        """
        if not self.images.buckets:
            return None
        index = read_index(self.folder)
        if index:
            return measure_crops(self.cache(), index)
        with errors_of_latents():
            return self.images.crops()

    def cache(self) -> ShardTable:
        """The rows of the cache. Raises UserError if there is none, or it is of other images or another codec."""
        images = self.images
        has_caption_files = isinstance(self.captions, CaptionFiles)
        plan_fields = {
            "resolution": images.side,
            "sizes": images.sizes,
            "crop": images.crop,
            "classes": 0 if has_caption_files else images.labels,
            "names": images.names or None,
            "captioned": has_caption_files,
            "first_images": images.count or 0,
            "flips": images.flip,
        }
        try:
            return open_cache(self.folder, self.codec, plan_fields, max_bytes=self.memory * GIGABYTE)
        except UserError as error:
            raise UserError(f"data.root: {error}") from error


@dataclass(frozen=True)
class PriorRows:
    """Which rows of a cache a teacher made, and how many of a batch they are."""

    share: float  # of a batch
    prior: Tensor  # rows of the cache that are a teacher's images
    other: Tensor  # all other rows


class LatentSource:
    """Latents as a source of batches. `Latents.open` makes it, takes a prior's share of it, and puts it into buckets.

    With a codec that gives Gaussians, each visit draws a latent anew, keyed by the step. Raises UserError for a shard
    that has changed, at once or from `batch` (`dumo.io.audit`).
    """

    def __init__(self, cache: ShardTable, codec: Codec, *, flip: bool) -> None:
        """Read all rows of a cache, half of them mirrored if `flip`."""
        self.cache = cache
        self.codec = codec
        self.flip = flip
        self.audit = Audit(cache.folder, cache.index.shards)
        self.suffix = ""  # at the end of columns' names; of a bucket, its size
        self.cache_rows = torch.arange(len(cache))  # rows of the cache that this source has
        self.prior: PriorRows | None = None  # None: all rows are alike

    def _bucket(self, suffix: str, membership: str) -> "LatentSource":
        """The source of the rows of one bucket, by the end of its columns' names and the column of its rows."""
        bucket = copy(self)
        bucket.suffix = suffix
        bucket.cache_rows = self._read_column(membership).nonzero().flatten()
        return bucket

    def _read_column(self, name: str) -> Tensor:
        """A column of the whole cache."""
        return torch.cat([self.cache.tensors(number)[name] for number in range(len(self.cache.index.shards))])

    def take_prior_share(self, share: float) -> None:
        """Take a share of every batch from the images of a folder _PRIOR_FOLDER, the rest from the others.

        Raises UserError where no image, or every image, is in such a folder.
        """
        packed_names = read_names(self.cache.folder)
        is_prior = torch.empty(0, dtype=torch.bool)
        if packed_names:
            names = packed_names.decode("utf-8", "surrogateescape").split("\0")
            images = self._read_column("image").tolist()
            is_in_folder = [bool(_IN_PRIOR_FOLDER.search(names[image])) for image in images]
            is_prior = torch.tensor(is_in_folder, dtype=torch.bool)
        if is_prior.all() or not is_prior.any():
            how_many = "none"
            if len(is_prior) and is_prior.all():
                how_many = "all"
            raise UserError(
                f"data.prior: of the images in {self.cache.folder}, {how_many} lie in a folder {_PRIOR_FOLDER}: put "
                "there what the teacher made of prior prompts, the others next to it, and encode them; or set "
                "data.prior=null teacher=null"
            )
        self.prior = PriorRows(share, self.cache_rows[is_prior], self.cache_rows[~is_prior])

    def bucketed(self) -> Bucketed:
        """The latents in their buckets, as a source whose batches are of one bucket each."""
        contents = self.cache.index
        assert isinstance(contents, CacheIndex)
        buckets: list[LatentSource] = []
        shapes: list[tuple[int, ...]] = []
        for size in contents.sizes:
            bucket = self._bucket(contents.column_suffix(size), contents.membership_column(size))
            if bucket.size:
                buckets.append(bucket)
                shapes.append(self.codec.shape(*size))
        return Bucketed(buckets, shapes, str(measure_crops(self.cache, contents)))

    @property
    def size(self) -> int:
        """The number of rows."""
        return len(self.cache_rows)

    def readable_labels(self) -> Tensor | None:
        """The classes of the images that could be read; None where those were all."""
        if len(self.cache) == self.cache.index.rows:
            return None
        return self._read_column("labels")

    def batch(self, step: int, batch_size: int, seed: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Some rows of a step's batch: latents (b, *shape) and classes (b,).

        Epoch follows epoch, each in its own order; half of the images are mirrored if `flip`. Raises UserError where
        the cache has changed.
        """
        self.audit.require()
        cache_rows = self.numbers(step, batch_size, seed, rows)
        is_mirrored = mirrored_rows(step, batch_size, seed, rows) if self.flip else None
        moments = self.cache.take(cache_rows, f"x{self.suffix}", f"flipped{self.suffix}", is_mirrored)
        x = self._draw(moments, seed, step, "posterior", rows=range(batch_size)[rows])
        return x, self.cache.take(cache_rows, "labels")

    def numbers(self, step: int, batch_size: int, seed: int, rows: slice = slice(None)) -> Tensor:
        """The rows of the cache, (b,), that are at the places `rows` of a step's batch."""
        if self.prior is None:
            return self.cache_rows[rows_of(step, batch_size, size=self.size, seed=seed, rows=rows)]
        is_prior = random_row_mask(seed, step, PRIOR, batch_size, self.prior.share)
        cache_rows = torch.empty(batch_size, dtype=torch.long)  # by place in the batch
        # prior images and others each go through their own rows, epoch after epoch, in an order of their own
        groups = ((self.prior.prior, is_prior), (self.prior.other, ~is_prior))
        for k, (group_rows, is_in_group) in enumerate(groups):
            group_seed = stream(seed, "prior", k).initial_seed()
            drawn_rows = rows_of(step, int(is_in_group.sum()), size=len(group_rows), seed=group_seed)
            cache_rows[is_in_group] = group_rows[drawn_rows]
        return cache_rows[rows]

    def fingerprint(self) -> str:
        """The cache's fingerprint."""
        return self.cache.fingerprint()

    def reference(self, n: int, seed: int, i: int = 0) -> tuple[Tensor, Tensor]:
        """The i-th choice of n latents, or all where there are fewer, with their classes; not mirrored."""
        chosen_rows = torch.randperm(self.size, generator=stream(seed, "reference", i))[:n]
        cache_rows = self.cache_rows[chosen_rows]
        moments = self.cache.take(cache_rows, f"x{self.suffix}")
        x = self._draw(moments, seed, "reference posterior", i, rows=range(len(moments)))
        return x, self.cache.take(cache_rows, "labels")

    def _draw(self, moments: Tensor, *key: int | str, rows: Sequence[int]) -> Tensor:
        """A latent for each row of moments, in float32, drawn by the key and the row's place in the batch (`rows`)."""
        return self.codec.sample(moments.float(), *key, rows=rows)
