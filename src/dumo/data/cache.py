"""A cache of latents: a folder of images that were encoded once, before training.

`dumo.data.encoding` makes a cache, `open_cache` opens it after comparing it with the run's settings, and
`require_same_images` compares it with the images on this machine. `read_index`, `measure_crops` and `read_captions`
read its index, the cropped shares, and the captions.

A cache is a table (`dumo.io.table`) with the columns

    x          the output of `LoadedCodec.encode`: the moments if the codec has Gaussians, or one draw of them
    flipped    x of the mirrored images, if the data are flipped: mirrored latents do not decode to mirrored images
    labels     classes, or the images' numbers in captions.jsonl
    image      the number of each row's image in the source
    state      its size in bytes and the modification time of its file in ns
    sha256     16 bytes of the hash of its bytes; image, state and sha256 are the records of `dumo.data.ledger`

With buckets, there are for each bucket "x 192x320" and "flipped 192x320", with the rows of its images only, and
"in 192x320", which is 1 for these rows. "cropped" is the share of each image that was cropped.

names.zlib has the images' names. captions.jsonl has a JSON list of captions per line, in the order of the images. So
training, and encoding the captions, do not need the images.
"""

import json
import zlib
from collections.abc import Iterator, Mapping
from itertools import pairwise
from operator import not_
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dumo.data.bucket import Crops
from dumo.data.ledger import RECORD, Ledger, Recorded
from dumo.data.pixel import Size
from dumo.encoders import Codec
from dumo.encoders.caption_ids import Captions
from dumo.io import table
from dumo.io.read import is_text_list, parse_json, text_lines
from dumo.io.table import ELSEWHERE, ShardTable, TableIndex
from dumo.io.tensor_files import load
from dumo.runtime.limits import CLASSES, PIXELS, ROWS
from dumo.types import Spec, UserError

LATENT_COLUMNS = ("x", "flipped")
HASH_COLUMN = "sha256"
# The files of captions and of image names (`Ledger.names_bytes`, compressed).
CAPTIONS = "captions.jsonl"
NAMES = "names.zlib"
_CAPTIONS_FIX = "remove it, and dumo encode writes it from the images"
_SAME_IMAGES_FIX = f"restore them, start a new run on these with another --out, or {ELSEWHERE}"
# Fields of a codec with the location of its weights.
_WEIGHTS_FIELDS = ("weights", "sha256")


class CachePlan(Spec):
    """The settings with which a data set is encoded, independent of the codec."""

    # A description of the data set.
    source: str = ""
    # The digest of the images' names and classes (`Ledger.names_digest`).
    fingerprint: str = ""
    # The side of images in pixels.
    resolution: int = Field(gt=0, le=PIXELS)
    # The sizes of buckets around that side. () means squares.
    sizes: tuple[Size, ...] = Field(default=(), exclude_if=not_)
    # The method by which images are cropped.
    crop: str = ""
    # Labels are in [0, classes). With 0 classes, all labels are 0.
    classes: int = Field(default=0, ge=0, le=CLASSES)
    # The names of the classes.
    names: tuple[str, ...] = ()
    # Whether labels are the images' numbers in captions.jsonl.
    captioned: bool = Field(default=False, exclude_if=not_)
    # Encode only this many first images. 0 means all.
    first_images: int = Field(default=0, ge=0, le=ROWS, exclude_if=not_)
    # Whether to encode mirrored images, too.
    flips: bool = True
    # For codecs with Gaussians. Other codecs have one latent per image.
    store: Literal["moments", "samples"] = "moments"
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    shard_rows: int = Field(default=1024, gt=0, le=ROWS)
    # The seed of `store: samples`.
    seed: int = 0

    def column_suffix(self, size: Size) -> str:
        """Return the suffix of the columns of the bucket with this size; "" without buckets."""
        return f" {size[0]}x{size[1]}" if self.sizes else ""

    def membership_column(self, size: Size) -> str:
        """Return the name of the column that marks rows in the bucket with this size."""
        return f"in{self.column_suffix(size)}"


class CacheIndex(CachePlan, TableIndex):
    """The contents of a cache's index.json."""

    noun: ClassVar[str] = "cache"
    # The codec's settings (`CodecSpec.facts`), and the location of its weights at that time.
    codec: dict[str, Any]
    # The SHA-256 of the codec's weights.
    weights: str

    def summary(self) -> str:
        """Describe the rows and latents of a finished cache."""
        rows = sum(shard.rows for shard in self.shards)
        unread = f" ({self.rows - rows} could not be read)" if rows < self.rows else ""
        shape = f"latents of {len(self.sizes)} buckets" if self.sizes else self.columns["x"].shape
        text = f"{rows:,} images{unread} as {shape} in {self.dtype}"
        if self.captioned:
            return text
        return f"{text}, {self.classes:,} classes" if self.classes else f"{text}, no classes"

    def binding(self) -> dict[str, Any]:
        """Return the fields that define what was encoded, and how.

        The codec's fields are included as `codec.NAME`, with the hash of the weights instead of their location.
        """
        fields = super().binding()
        codec = _without_weights_fields(fields.pop("codec"))
        return fields | {f"codec.{name}": value for name, value in codec.items()}

    def compared_inputs(self) -> dict[str, Any]:
        """Return the fields that must be equal in two indices of the same cache.

        The description of the source is left out, since names and hashes identify the images.
        """
        fields = self.binding()
        del fields["source"]
        return fields


def split_column(name: str) -> tuple[str, str]:
    """Split the name of a column into name and bucket, "x 192x320" into "x" and "192x320"; "" means no bucket."""
    stem, _, bucket = name.partition(" ")
    return stem, bucket


def read_index(folder: Path) -> CacheIndex | None:
    """Read the index of a cache; None if there is none. Raises UserError if it is damaged."""
    return table.read_index(folder, CacheIndex)


def is_finished(folder: Path) -> bool:
    """Whether a cache exists and its index.json lists the shards. Raises UserError if the index is damaged."""
    index = read_index(folder)
    return index is not None and bool(index.shards)


def open_cache(
    folder: Path,
    codec: Codec,
    plan_fields: Mapping[str, object] | None = None,
    *,
    max_bytes: float = 0.0,
) -> ShardTable:
    """Open a cache for training with a codec.

    plan_fields: required values of fields of the `CachePlan`. None as a value allows any.
    max_bytes: a cache of at most this size is read into memory instead of being mapped.

    Raises UserError if there is no cache, if it is unfinished or differs from the required fields, or if a shard is
    missing or has another size.
    """
    missing = UserError(
        f"{folder} is not a cache (it has no {table.FILE}): create it with dumo encode RECIPE and the same overrides"
    )
    index = table.read_finished_index(folder, CacheIndex, missing)
    differences = [*_plan_differences(index, plan_fields or {}), *_codec_differences(index, codec)]
    if differences:
        listed = "\n  ".join(differences)
        raise UserError(f"{folder} does not match the run:\n  {listed}\nEncode the data again, or change these fields")
    return ShardTable(folder, index, max_bytes)


def has_cache(folder: Path, index: CacheIndex) -> bool:
    """Whether a folder has the cache of this index, regardless of its images."""
    cached = read_index(folder)
    if cached is None:
        return False
    with_these_images = cached.model_copy(update={"fingerprint": index.fingerprint, "rows": index.rows})
    return with_these_images.compared_inputs() == index.compared_inputs()


def read_names(folder: Path) -> bytes:
    """Read the names of a cache's images, in the format of `Ledger.names_bytes`; b"" if they are missing."""
    file = folder / NAMES
    return zlib.decompress(file.read_bytes()) if file.is_file() else b""


def expect_same_images(folder: Path, ledger: Ledger) -> None:
    """Set the expected images of a ledger to a cache's images, if the folder has a cache of files.

    Raises UserError, with the names of images, if names or classes differ.
    """
    index = read_index(folder)
    if index is None or HASH_COLUMN not in index.columns:
        return
    written = table.written_shards(folder, index)
    if written and index.fingerprint != ledger.names_digest():
        names = read_names(folder) or ledger.names_bytes
        change = ledger.difference(Recorded(names, ledger.classes_digest, ledger.records))
        raise _other_images_error(folder, change or "with different names or classes")
    records = np.zeros(len(ledger), RECORD)
    for shard in written.values():
        # Callers refuse or remake damaged shards.
        if shard.fault(folder, deep=False):
            continue
        columns = load(folder / shard.file)
        images = columns["image"].numpy()
        records["size"][images] = columns["state"][:, 0].numpy()
        records["time"][images] = columns["state"][:, 1].numpy()
        records["sha256"][images] = columns[HASH_COLUMN].numpy()
    ledger.expect(records, f"is not the image that was encoded in {folder}: {_SAME_IMAGES_FIX}")


def require_same_images(folder: Path, ledger: Ledger, *, hash_all: bool = False) -> None:
    """Raise UserError, with the name of an image, if a cache was made from different images.

    Images whose size or modification time changed are hashed; with `hash_all`, all images are.
    """
    expect_same_images(folder, ledger)
    ledger.hash(range(len(ledger)) if hash_all else ledger.suspects())
    changed = ledger.changed()
    if len(changed):
        raise _other_images_error(folder, f"{ledger.changed_text(changed)} changed")


def _other_images_error(folder: Path, change: str) -> UserError:
    """Return the error for a cache of different images."""
    return UserError(f"{folder} was made from different images, {change}: {_SAME_IMAGES_FIX}")


def measure_crops(cache: ShardTable, index: CacheIndex) -> Crops:
    """Summarize the cropping of a cache's images by its buckets, from the columns of all shards."""
    buckets_by_shard: list[Tensor] = []
    cropped_by_shard: list[Tensor] = []
    for number in range(len(index.shards)):
        columns = cache.tensors(number)
        memberships = [columns[index.membership_column(size)] for size in index.sizes]
        buckets_by_shard.append(torch.stack(memberships).long().argmax(0))
        cropped_by_shard.append(columns["cropped"])
    return Crops.of(index.sizes, torch.cat(buckets_by_shard), torch.cat(cropped_by_shard))


def dump_captions(captions: Captions) -> bytes:
    """Format captions for captions.jsonl."""
    texts = captions.texts
    ids = captions.ids.tolist()
    lines: list[str] = []
    for first, end in pairwise([0, *captions.ends.tolist()]):
        # The number len(texts) means no caption.
        image_texts = [texts[k] for k in ids[first:end] if k < len(texts)]
        lines.append(f"{json.dumps(image_texts, ensure_ascii=False)}\n")
    return "".join(lines).encode()


def read_captions(file: Path) -> Captions:
    """Read the captions of all images from a captions.jsonl. Raises UserError if the file is missing or damaged."""
    if not file.is_file():
        raise UserError(f"{file} with the images' captions is missing: run the same dumo encode again")
    return Captions.from_images(_read_texts(file))


def require_captions(file: Path, captions: Captions) -> None:
    """Raise UserError if a captions.jsonl exists with different captions."""
    if file.exists() and file.read_bytes() != dump_captions(captions):
        raise UserError(
            f"{file} differs from the images' current captions: {_CAPTIONS_FIX}; runs with the old captions need it"
        )


def _read_texts(file: Path) -> Iterator[list[str]]:
    """Yield the texts in each line of a captions.jsonl. Raises UserError if a line is damaged."""
    for number, line in enumerate(text_lines(file), 1):
        where = f"{file} line {number}"
        texts = parse_json(line, where)
        if not is_text_list(texts):
            raise UserError(f"{where} must be a list of texts: {_CAPTIONS_FIX}")
        yield texts


def _plan_differences(index: CacheIndex, plan_fields: Mapping[str, object]) -> Iterator[str]:
    """Yield a line for each field of the plan with a different value in the cache. None as a value allows any."""
    for name, value in plan_fields.items():
        cached = getattr(index, name)
        # A cache with mirrored images can be used without them.
        is_unused_flip = name == "flips" and not value
        if value is not None and value != cached and not is_unused_flip:
            yield f"{name}: {cached} in the cache, {value} in the run"


def _codec_differences(index: CacheIndex, codec: Codec) -> Iterator[str]:
    """Yield a line for each setting of the codec that differs from the cache.

    Weights are compared by SHA-256, which is known in an existing run or if the file is on this machine, or else by
    name.
    """
    cached_facts = _without_weights_fields(index.codec)
    codec_facts = _without_weights_fields(codec.facts())
    for name in sorted(cached_facts.keys() | codec_facts.keys()):
        cached = cached_facts.get(name)
        value = codec_facts.get(name)
        if cached != value:
            yield f"codec.{name}: {cached} in the cache, {value} in the run"
    if cached_facts != codec_facts:
        return
    sha256 = codec.sha256 or codec.digest()
    cached_name = index.codec["weights"]
    has_same_weights = sha256 == index.weights
    if sha256 is None:
        has_same_weights = codec.weights == cached_name
    if not has_same_weights:
        yield f"codec.weights: {cached_name} in the cache, {codec.weights} in the run, which differ"


def _without_weights_fields(codec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a codec without the location of its weights."""
    return {name: value for name, value in codec.items() if name not in _WEIGHTS_FIELDS}
