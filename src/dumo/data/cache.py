"""A folder of latents: images that a codec has encoded once, so that training need not.

`open_cache` opens a folder for a codec and for what a run asks of it, `read_index` reads what it says of itself, and
`crops` what its buckets cut off. `dumo.data.encoding` makes it, `dumo.data.origin` compares it with the images that are
here. It is a table (`dumo.io.table`) of the columns

    x          what `Opened.encode` gives: the moments where the codec has Gaussians, or one draw of them
    flipped    the same of the mirrored images, if the data are flipped: a mirrored latent decodes to no mirrored image
    labels     classes, or the images' numbers in captions.jsonl, which then has each image's caption
    image      the number of each row's image in the source, and
    sha256     the hash of that image's file, so that a cache is refused where its images have changed

Of images in buckets there are, for each bucket, "x 192x320" and "flipped 192x320", with the rows of its images alone,
and "in 192x320", which is 1 for these rows; "cropped" is the share of each image that was cut off.
"""

from collections.abc import Iterator, Mapping
from operator import not_
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dumo.data.bucket import Crops
from dumo.data.pixel import Size
from dumo.encoders import Codec
from dumo.io import table
from dumo.io.table import ShardTable, TableIndex
from dumo.runtime.bound import CLASSES, PIXELS, ROWS
from dumo.types import Spec, UserError

LATENTS = ("x", "flipped")  # columns
WEIGHTS_FIELDS = ("weights", "sha256")  # fields of a codec that say where its weights are, not what it does


class CachePlan(Spec):
    """How a data set is to be encoded, by whatever codec."""

    source: str = ""  # what it is, in words
    fingerprint: str = ""  # of the images' names and classes; what is in them, each shard says
    resolution: int = Field(gt=0, le=PIXELS)  # pixels along a side
    sizes: tuple[Size, ...] = Field(default=(), exclude_if=not_)  # of the buckets around that side; (): all are squares
    crop: str = ""  # how the images came to be square, in words
    classes: int = Field(default=0, ge=0, le=CLASSES)  # labels are in [0, classes); 0: there are none, and all are 0
    names: tuple[str, ...] = ()  # of the classes
    captioned: bool = Field(default=False, exclude_if=not_)  # labels are the images' numbers in captions.jsonl
    flips: bool = True  # mirrored images, too
    store: Literal["moments", "samples"] = "moments"  # of a codec with Gaussians; others have one latent per image
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    shard_rows: int = Field(default=1024, gt=0, le=ROWS)  # images to a shard
    seed: int = 0  # of the samples

    def column_suffix(self, size: Size) -> str:
        """The end of the names of columns of images of this size; "" without buckets."""
        return f" {size[0]}x{size[1]}" if self.sizes else ""


class CacheIndex(CachePlan, TableIndex):
    """The contents of a cache's index.json."""

    word: ClassVar[str] = "cache"
    codec: dict[str, Any]  # what it does (`Scaled.facts`), and where its weights were
    weights: str  # SHA-256 of the codec's

    def summary(self) -> str:
        """The rows and latents of a whole cache, in words."""
        rows = sum(shard.rows for shard in self.shards)
        unread = f" ({self.rows - rows} could not be read)" if rows < self.rows else ""
        shape = f"latents of {len(self.sizes)} buckets" if self.sizes else self.columns["x"].shape
        return f"{rows:,} images{unread} as {shape} in {self.dtype}"

    def binding(self) -> dict[str, Any]:
        """The fields in which caches must agree to be one: all but where the codec's weights are, whose hash is one."""
        fields = super().binding()
        codec = _without_places(fields.pop("codec"))
        return fields | {f"codec.{name}": value for name, value in codec.items()}


def read_index(folder: Path) -> CacheIndex | None:
    """The index of a cache, or None where there is none. Raises UserError if it is damaged."""
    return table.read(folder, CacheIndex)


def open_cache(folder: Path, codec: Codec, max_bytes: float = 0.0, **asked: object) -> ShardTable:
    """Open a cache to read it as the data of a codec.

    `asked` are fields of the plan and the values that they must have; None: any. A cache of both flips serves those who
    ask for one. One of at most `max_bytes` is read into memory, not mapped. Raises UserError where there is no cache,
    it is unfinished, a shard is missing or of another size, or it differs from what is asked.
    """
    index = table.read_whole(folder, CacheIndex, f"is no cache (it has no {table.FILE}): make it with dumo encode")
    lines: list[str] = []
    for name, value in asked.items():
        cached = getattr(index, name)
        if value is None or value == cached:
            continue
        if name == "flips" and not value:  # both flips are there, and one is read
            continue
        lines.append(f"{name}: {cached} in the cache, {value} asked")
    lines += _codec_differences(index, codec)
    if lines:
        listed = "\n  ".join(lines)
        raise UserError(f"{folder} does not fit:\n  {listed}\nEncode the data for this, or ask for what is there")
    return ShardTable(folder, index, max_bytes)


def crops(cache: ShardTable, index: CacheIndex) -> Crops:
    """The bucket of each image of a cache with buckets, and the share of it that was cut off."""
    bucket_parts: list[Tensor] = []
    cropped_parts: list[Tensor] = []
    for number in range(len(index.shards)):
        columns = cache.tensors(number)
        memberships = [columns[f"in{index.column_suffix(size)}"] for size in index.sizes]  # 1 where a row is in it
        bucket_parts.append(torch.stack(memberships).long().argmax(0))
        cropped_parts.append(columns["cropped"])
    return Crops.of(index.sizes, torch.cat(bucket_parts), torch.cat(cropped_parts))


def _codec_differences(index: CacheIndex, codec: Codec) -> Iterator[str]:
    """A line per way in which a codec would have given another latent.

    Weights are the same if they have the same SHA-256, of a run that has begun or of a file that is here; else the same
    name.
    """
    cached = _without_places(index.codec)
    asked = _without_places(codec.facts())
    for name in sorted(cached.keys() | asked.keys()):
        if cached.get(name) != asked.get(name):
            yield f"codec.{name}: {cached.get(name)} in the cache, {asked.get(name)} asked"
    if cached != asked:
        return
    sha256 = codec.sha256 or codec.digest()
    cached_name = index.codec["weights"]
    has_same_weights = sha256 == index.weights
    if sha256 is None:  # no run has begun, and the file is not here
        has_same_weights = codec.weights == cached_name
    if not has_same_weights:
        yield f"codec.weights: {cached_name} in the cache, {codec.weights} asked, which are not the same"


def _without_places(codec: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a codec that say what it does, not where its weights are."""
    return {name: value for name, value in codec.items() if name not in WEIGHTS_FIELDS}
