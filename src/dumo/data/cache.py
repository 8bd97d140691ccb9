"""A folder of latents: images that a codec has encoded once, so that training need not.

`dumo.data.encoding` makes a cache, `open_cache` opens it for a codec and for what a run asks of it, and
`require_same_images` compares it with the images that are here. `read_index` reads its index, `measure_crops` what its
buckets cut off, and `read_captions` the captions of its images.

A cache is a table (`dumo.io.table`) of the columns

    x          what `LoadedCodec.encode` gives: the moments where the codec has Gaussians, or one draw of them
    flipped    x of the mirrored images, if the data are flipped: a mirrored latent decodes to no mirrored image
    labels     classes, or the images' numbers in captions.jsonl
    image      the number of each row's image in the source, and
    state      its size in bytes and the time of its file in ns, and
    sha256     16 bytes of the hash of its bytes: the records of `dumo.data.ledger`, so that changed images are refused

Of images in buckets there are, for each bucket, "x 192x320" and "flipped 192x320", with the rows of its images alone,
and "in 192x320", which is 1 for these rows; "cropped" is the share of each image that was cut off.

names.zlib has the images' names. captions.jsonl has a line for each image, in the images' order: a JSON list of its
captions. So training, and encoding the captions, need no images.
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
CAPTIONS = "captions.jsonl"  # a file in a cache
NAMES = "names.zlib"  # a file in a cache: the names of its images, as `Ledger.names_bytes`, compressed
_CAPTIONS_FIX = "remove it, and dumo encode writes it from the images"  # the end of messages
_SAME_IMAGES_FIX = f"put them back as they were, begin a new run on these with another --out, or {ELSEWHERE}"
_WEIGHTS_FIELDS = ("weights", "sha256")  # fields of a codec that say where its weights are, not what it does


class CachePlan(Spec):
    """How a data set is to be encoded, by whatever codec."""

    source: str = ""  # what the data set is, in words
    fingerprint: str = ""  # of the images' names and classes (`Ledger.names_digest`)
    resolution: int = Field(gt=0, le=PIXELS)  # pixels along a side
    sizes: tuple[Size, ...] = Field(default=(), exclude_if=not_)  # of the buckets around that side; (): all are squares
    crop: str = ""  # how the images came to be square, in words
    classes: int = Field(default=0, ge=0, le=CLASSES)  # labels are in [0, classes); 0: there are none, and all are 0
    names: tuple[str, ...] = ()  # of the classes
    captioned: bool = Field(default=False, exclude_if=not_)  # labels are the images' numbers in captions.jsonl
    first_images: int = Field(default=0, ge=0, le=ROWS, exclude_if=not_)  # that many of the source, and no more; 0: all
    flips: bool = True  # mirrored images, too
    store: Literal["moments", "samples"] = "moments"  # of a codec with Gaussians; others have one latent per image
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    shard_rows: int = Field(default=1024, gt=0, le=ROWS)  # images to a shard
    seed: int = 0  # of the samples

    def column_suffix(self, size: Size) -> str:
        """The end of the names of columns of images of this size; "" without buckets."""
        return f" {size[0]}x{size[1]}" if self.sizes else ""

    def membership_column(self, size: Size) -> str:
        """The name of the column that says which rows are in the bucket of this size."""
        return f"in{self.column_suffix(size)}"


class CacheIndex(CachePlan, TableIndex):
    """The contents of a cache's index.json."""

    noun: ClassVar[str] = "cache"
    codec: dict[str, Any]  # what it does (`CodecSpec.facts`), and where its weights were
    weights: str  # SHA-256 of the codec's weights

    def summary(self) -> str:
        """The rows and latents of a finished cache, in words."""
        rows = sum(shard.rows for shard in self.shards)
        unread = f" ({self.rows - rows} could not be read)" if rows < self.rows else ""
        shape = f"latents of {len(self.sizes)} buckets" if self.sizes else self.columns["x"].shape
        text = f"{rows:,} images{unread} as {shape} in {self.dtype}"
        if self.captioned:
            return text
        return f"{text}, {self.classes:,} classes" if self.classes else f"{text}, no classes"

    def binding(self) -> dict[str, Any]:
        """The fields that say what was encoded, and how.

        The codec's fields are among them, each as `codec.name`, without the place of its weights: their hash is.
        """
        fields = super().binding()
        codec = _without_places(fields.pop("codec"))
        return fields | {f"codec.{name}": value for name, value in codec.items()}

    def compared_inputs(self) -> dict[str, Any]:
        """The fields that must be equal in two indices of one cache: all but the words for the images' place.

        Their names and hashes say which images they are, wherever they lie.
        """
        fields = self.binding()
        del fields["source"]
        return fields


def split_column(name: str) -> tuple[str, str]:
    """The name of a column without the bucket, and the bucket's: "x" and "192x320" of "x 192x320"; "" for none."""
    stem, _, bucket = name.partition(" ")
    return stem, bucket


def read_index(folder: Path) -> CacheIndex | None:
    """The index of a cache, or None where there is none. Raises UserError if it is damaged."""
    return table.read_index(folder, CacheIndex)


def is_finished(folder: Path) -> bool:
    """Whether a cache is there, and its index.json lists its shards. Raises UserError if the index is damaged."""
    index = read_index(folder)
    return index is not None and bool(index.shards)


def open_cache(
    folder: Path,
    codec: Codec,
    plan_fields: Mapping[str, object] | None = None,
    *,
    max_bytes: float = 0.0,
) -> ShardTable:
    """Open a cache to read it as the data of a codec.

    `plan_fields` are fields of the `CachePlan` and the values that they must have; None as a value: any will do. A
    cache of at most `max_bytes` is read into memory, not mapped. Raises UserError if there is no cache, it
    is unfinished, a shard is missing or of another size, or it differs from what is asked.
    """
    missing = UserError(
        f"{folder} is no cache (it has no {table.FILE}): make it with dumo encode RECIPE, and the same overrides"
    )
    index = table.read_finished_index(folder, CacheIndex, missing)
    differences = [*_plan_differences(index, plan_fields or {}), *_codec_differences(index, codec)]
    if differences:
        listed = "\n  ".join(differences)
        raise UserError(f"{folder} does not fit:\n  {listed}\nEncode the data for this, or ask for what is there")
    return ShardTable(folder, index, max_bytes)


def has_cache(folder: Path, index: CacheIndex) -> bool:
    """Whether a folder has the cache of this index, whatever the images that it was made of."""
    cached = read_index(folder)
    if cached is None:
        return False
    with_these_images = cached.model_copy(update={"fingerprint": index.fingerprint, "rows": index.rows})
    return with_these_images.compared_inputs() == index.compared_inputs()


def read_names(folder: Path) -> bytes:
    """The names of a cache's images, as `Ledger.names_bytes`; b"" if the cache does not say."""
    file = folder / NAMES
    return zlib.decompress(file.read_bytes()) if file.is_file() else b""


def expect_same_images(folder: Path, ledger: Ledger) -> None:
    """Let a ledger expect the images that a cache was made of. A folder without a cache, or of no files, passes.

    Raises UserError, with names, for other names or classes.
    """
    index = read_index(folder)
    if index is None or HASH_COLUMN not in index.columns:
        return
    written = table.written_shards(folder, index)
    if written and index.fingerprint != ledger.names_digest():
        names = read_names(folder) or ledger.names_bytes
        change = ledger.difference(Recorded(names, ledger.classes_digest, ledger.records))
        raise _other_images_error(folder, change or "they have other names or classes")
    records = np.zeros(len(ledger), RECORD)
    for shard in written.values():
        if shard.fault(folder, deep=False):
            continue  # it is refused, or made again, by others
        columns = load(folder / shard.file)
        images = columns["image"].numpy()
        records["size"][images] = columns["state"][:, 0].numpy()
        records["time"][images] = columns["state"][:, 1].numpy()
        records["sha256"][images] = columns[HASH_COLUMN].numpy()
    ledger.expect(records, f"is not the image that {folder} was made of: {_SAME_IMAGES_FIX}")


def require_same_images(folder: Path, ledger: Ledger, *, hash_all: bool = False) -> None:
    """Raise UserError, with a name, if a cache was made of other images than are here.

    Images of another size or time are read and hashed now, with `hash_all` all images.
    """
    expect_same_images(folder, ledger)
    ledger.hash(range(len(ledger)) if hash_all else ledger.suspects())
    changed = ledger.changed()
    if len(changed):
        raise _other_images_error(folder, f"{ledger.changed_text(changed)} changed")


def _other_images_error(folder: Path, change: str) -> UserError:
    """The error that a cache was made of other images."""
    return UserError(f"{folder} was made of other images than are here, {change}: {_SAME_IMAGES_FIX}")


def measure_crops(cache: ShardTable, index: CacheIndex) -> Crops:
    """What the buckets of a cache have cut off its images. Reads these columns of all shards."""
    buckets_by_shard: list[Tensor] = []
    cropped_by_shard: list[Tensor] = []
    for number in range(len(index.shards)):
        columns = cache.tensors(number)
        # by bucket, 1 for the rows that are in it
        memberships = [columns[index.membership_column(size)] for size in index.sizes]
        buckets_by_shard.append(torch.stack(memberships).long().argmax(0))
        cropped_by_shard.append(columns["cropped"])
    return Crops.of(index.sizes, torch.cat(buckets_by_shard), torch.cat(cropped_by_shard))


def dump_captions(captions: Captions) -> bytes:
    """The content of captions.jsonl, which `read_captions` reads."""
    texts = captions.texts
    ids = captions.ids.tolist()
    lines: list[str] = []
    for first, end in pairwise([0, *captions.ends.tolist()]):
        image_texts = [texts[k] for k in ids[first:end] if k < len(texts)]  # len(texts) is no caption
        lines.append(f"{json.dumps(image_texts, ensure_ascii=False)}\n")
    return "".join(lines).encode()


def read_captions(file: Path) -> Captions:
    """The captions in a captions.jsonl, by image. Raises UserError where there is no such file, or it is damaged."""
    if not file.is_file():
        raise UserError(f"{file} is not there, which has the images' captions: start the same dumo encode again")
    return Captions.from_images(_read_texts(file))


def require_captions(file: Path, captions: Captions) -> None:
    """Raise UserError where a captions.jsonl exists that holds other captions."""
    if file.exists() and file.read_bytes() != dump_captions(captions):
        raise UserError(
            f"{file} holds other captions than the images have now: {_CAPTIONS_FIX}; runs of the old ones need it"
        )


def _read_texts(file: Path) -> Iterator[list[str]]:
    """The texts in each line of a captions.jsonl. Raises UserError for a damaged line."""
    for number, line in enumerate(text_lines(file), 1):
        where = f"{file} line {number}"
        texts = parse_json(line, where)
        if not is_text_list(texts):
            raise UserError(f"{where} is no list of texts: {_CAPTIONS_FIX}")
        yield texts


def _plan_differences(index: CacheIndex, plan_fields: Mapping[str, object]) -> Iterator[str]:
    """Yield a line per field of the plan that has another value in the cache; None as a value: any will do."""
    for name, value in plan_fields.items():
        cached = getattr(index, name)
        serves_one_flip = name == "flips" and not value  # both flips may be there, and one is read
        if value is not None and value != cached and not serves_one_flip:
            yield f"{name}: {cached} in the cache, {value} asked"


def _codec_differences(index: CacheIndex, codec: Codec) -> Iterator[str]:
    """Yield a line per way in which a codec would have given other latents than those in the cache.

    Weights are equal if their SHA-256 are, that of a run that has begun or of a file that is here. If neither is known,
    they are equal if their names are.
    """
    cached_facts = _without_places(index.codec)
    asked_facts = _without_places(codec.facts())
    for name in sorted(cached_facts.keys() | asked_facts.keys()):
        cached = cached_facts.get(name)
        asked = asked_facts.get(name)
        if cached != asked:
            yield f"codec.{name}: {cached} in the cache, {asked} asked"
    if cached_facts != asked_facts:
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
    return {name: value for name, value in codec.items() if name not in _WEIGHTS_FIELDS}
