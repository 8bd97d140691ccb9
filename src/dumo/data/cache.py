"""A data set that a codec has encoded: a table (`dumo.io.table`), what it is of, and how it is made.

    x          what `Opened.encode` gives: the moments where the codec has Gaussians, or one draw of them
    flipped    the same of the mirrored images, if the data are flipped: a mirrored latent decodes to no mirrored image
    labels     classes, or the images' numbers in captions.jsonl, which then says what is written of each
    image      which of the images each row is of, by number, and
    sha256     the hash of that image's file, so that a cache is refused where its images are others now

Of images in buckets there are, for each bucket, "x 192x320" and "flipped 192x320", with the entries of its images
alone, and "in 192x320", which says what rows these are; "cropped" is the share of each image that was cut off.

A shard is encoded in the same batches from its own first row, and its draws have a stream of their own.

`encode` makes a cache, `open_cache` opens one for a codec and what a run asks for, and `require_origin` compares it
with the images that are here.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from operator import not_
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dumo.data.album import HASH, Album
from dumo.data.bucket import Assorted, Crops
from dumo.data.pixel import Size
from dumo.data.written import LINES, dump_lines, require_lines
from dumo.encoders import Codec
from dumo.encoders.caption import Captions
from dumo.encoders.codec import Opened
from dumo.io import table
from dumo.io.content import Hashes, hashes_of, moved, unpacked
from dumo.io.picture import from_uint8
from dumo.io.seen import BYTES
from dumo.io.source import Finite
from dumo.io.table import ELSEWHERE, Column, Done, ShardTable, TableIndex, Tick
from dumo.io.weights import load
from dumo.runtime import signals
from dumo.runtime.bound import CLASSES, PIXELS, ROWS
from dumo.types import Spec, UserError

LATENTS = ("x", "flipped")  # columns
NAMES = "names.zlib"  # of a cache: what its images are called
WHERE_WEIGHTS_LIE = ("weights", "sha256")  # fields of a codec that say nothing of what it does


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

    def ending(self, size: Size) -> str:
        """Of the names of columns of images of this size."""
        return f" {size[0]}x{size[1]}" if self.sizes else ""


class CacheIndex(CachePlan, TableIndex):
    """What index.json says of a cache."""

    word: ClassVar[str] = "cache"
    codec: dict[str, Any]  # what it does (`Scaled.facts`), and where its weights lay
    weights: str  # SHA-256 of the codec's

    def summary(self) -> str:
        """What a whole cache holds, in words."""
        rows = sum(shard.rows for shard in self.shards)
        unread = f" ({self.rows - rows} could not be read)" if rows < self.rows else ""
        shape = f"latents of {len(self.sizes)} buckets" if self.sizes else self.columns["x"].shape
        return f"{rows:,} images{unread} as {shape} in {self.dtype}"

    def binding(self) -> dict[str, Any]:
        """All but where the codec's weights lie, for their hash is there."""
        fields = super().binding()
        codec = without_places(fields.pop("codec"))
        return fields | {f"codec.{name}": value for name, value in codec.items()}


def without_places(codec: Mapping[str, Any]) -> dict[str, Any]:
    """What a codec does, wherever its weights lie."""
    return {name: value for name, value in codec.items() if name not in WHERE_WEIGHTS_LIE}


def read_contents(folder: Path) -> CacheIndex | None:
    """What index.json says, or None where there is none. Raises UserError if it is damaged."""
    return table.read(folder, CacheIndex)


def open_cache(folder: Path, codec: Codec, memory: float = 0.0, **wanted: object) -> ShardTable:
    """Open a cache to read it as the data of a codec and of `wanted` fields of the plan; None: whatever is there.

    A cache of both flips serves those who want one. One of at most `memory` bytes is read, not mapped. Raises UserError
    where there is no cache, it is unfinished, a shard is missing or of another size, or it is of something else.
    """
    contents = table.read_whole(folder, CacheIndex, f"is no cache (it has no {table.FILE}): make it with dumo encode")
    wanted["flips"] = wanted.get("flips") or None
    lines: list[str] = []
    for name, value in wanted.items():
        cached = getattr(contents, name)
        if value is not None and value != cached:
            lines.append(f"{name}: {cached} in the cache, {value} asked")
    lines += differences(contents, codec)
    if lines:
        listed = "\n  ".join(lines)
        raise UserError(f"{folder} does not fit:\n  {listed}\nEncode the data for this, or ask for what is there")
    return ShardTable(folder, contents, memory)


def crops(table: ShardTable) -> Crops:
    """What the buckets left of the images of a cache."""
    contents = table.index
    assert isinstance(contents, CacheIndex)
    bucket_parts: list[Tensor] = []
    cropped_parts: list[Tensor] = []
    for number in range(len(contents.shards)):
        columns = table.tensors(number)
        memberships = [columns[f"in{contents.ending(size)}"] for size in contents.sizes]  # 1 where a row is in a bucket
        bucket_parts.append(torch.stack(memberships).long().argmax(0))
        cropped_parts.append(columns["cropped"])
    return Crops.of(contents.sizes, torch.cat(bucket_parts), torch.cat(cropped_parts))


def differences(contents: CacheIndex, codec: Codec) -> Iterator[str]:
    """A line per way in which a codec would have given another latent.

    Weights are the same if they have the same SHA-256, of a run that has begun or of a file that is here; else the same
    name.
    """
    cached = without_places(contents.codec)
    requested = without_places(codec.facts())
    for name in sorted(cached.keys() | requested.keys()):
        if cached.get(name) != requested.get(name):
            yield f"codec.{name}: {cached.get(name)} in the cache, {requested.get(name)} asked"
    if cached != requested:
        return
    sha256 = codec.sha256 or codec.digest()
    same_name = codec.weights == contents.codec["weights"]
    if sha256 != contents.weights and not (sha256 is None and same_name):
        yield f"codec.weights: {contents.codec['weights']} in the cache, {codec.weights} asked, which are not the same"


def encode(
    source: Finite | Assorted,
    codec: Opened,
    plan: CachePlan,
    out: Path,
    *,
    captions: Captions | None = None,
    batch: int = 32,
    rank: int = 0,
    world: int = 1,
    tick: Tick = lambda done, note: None,
) -> Done:
    """Make those of this rank's shards that are not there, or damaged. Another batch may move the last bits.

    `captions` of images that are labelled by their numbers are kept next to them. Raises UserError where `out` holds
    another cache, other captions or something else, an image or a label is not as planned, a latent is too large for
    the dtype, or the disk is full, OSError where nothing can be written, Stopped after a signal; finished shards are
    kept.
    """
    contents = contents_of(source, codec, plan)
    hashes = hashes_of(source)
    if hashes:
        finished = finished_shards(out, contents, rank, world)
        hashes.hash(chain.from_iterable(map(contents.span, finished)))
        require_origin(out, hashes, contents, copies=sys.maxsize)
    if captions:
        require_lines(out / LINES, captions)

    def encode_shard(number: int, report: Callable[[int], None]) -> dict[str, Tensor]:
        return pack(encode_images(source, codec, contents, number, batch, report), codec, contents, number)

    def images_hash(number: int) -> str:
        return hashes.digest(contents.span(number)) if hashes else ""

    other_files: dict[str, bytes] = {}
    if captions:
        other_files[LINES] = dump_lines(captions)
    if hashes:
        other_files[NAMES] = hashes.packed.numpy().tobytes()
    done = table.make(
        out, contents, encode_shard, rank=rank, world=world, of=images_hash, others=other_files, tick=tick
    )
    if hashes:
        hashes.save()
        require_origin(out, hashes, contents, copies=0)  # another rank may have seen other images meanwhile
    return done


def finished_shards(out: Path, contents: CacheIndex, rank: int, world: int) -> list[int]:
    """Which of a rank's shards exist in a folder that holds this cache."""
    cached = table.read(out, CacheIndex)
    if cached is None or cached.binding() != contents.binding():
        return []
    return [number for number in table.written_shards(out, cached) if number % world == rank]


def read_names(folder: Path) -> bytes:
    """What a cache's images are called, as `Hashes.names`; empty where it does not say."""
    file = folder / NAMES
    return unpacked(file.read_bytes()) if file.is_file() else b""


def require_origin(
    folder: Path, hashes: Hashes, like: CacheIndex | None = None, *, copies: int, later: bool = False
) -> None:
    """Raise UserError, with a name, where a cache is of other images than those that are here.

    Those that changed since they were hashed are hashed now; copies of files, too, where they have at most `copies`
    bytes. `later`: the others are compared when they are read. `like`: nothing is said of a folder that holds another
    cache anyhow.
    """
    cached = table.read(folder, CacheIndex)
    if cached is None:
        return
    if like:  # names and number of images aside
        same_images = cached.model_copy(update={"fingerprint": like.fingerprint, "rows": like.rows})
        if same_images.binding() != like.binding():
            return
    fix = f"put the images back as they were, or {ELSEWHERE}"
    if HASH not in cached.columns:
        raise UserError(f"{folder} does not say what is in its images, as caches of an older dumo: {ELSEWHERE}")
    shards = table.written_shards(folder, cached)
    if cached.fingerprint != hashes.title():
        if shards:
            names = read_names(folder)
            change = "of other names or classes" if names in (b"", hashes.names) else moved(names, hashes.names)
            raise UserError(f"{folder} is of other images than are here, {change}: {fix}")
        return

    # compare with the hashes of images in shards that were made of others, or may have been
    expected = np.zeros_like(hashes.known)
    for number, shard in shards.items():
        span = cached.span(number)
        doubtful = hashes.doubtful(span)
        differs = shard.of != hashes.digest(span) and (doubtful or later)
        if differs and shard.fault(folder, deep=doubtful) is None:  # what is damaged is refused elsewhere
            columns = load(folder / shard.file)
            expected[columns["image"].numpy()] = columns[HASH].numpy()
    hashes.expect(expected, f"is not the image that {folder} was made of: {fix}")
    hashes.hash(hashes.suspect())
    suspect_copies = hashes.suspect(copies=True)
    if len(suspect_copies) and hashes.size(suspect_copies) <= copies:
        hashes.hash(suspect_copies)
    others = hashes.others()
    if len(others):
        first = int(others[0])
        more = f", and {len(others) - 1:,} more are others" if len(others) > 1 else ""
        raise UserError(
            f"{folder}: {shards[first // cached.shard_rows].file} was made of another {hashes.path(first)} than is "
            f"here{more}: {fix}"
        )


def contents_of(source: Finite | Assorted, codec: Opened, plan: CachePlan) -> CacheIndex:
    """What index.json says before any shard is made. Raises UserError if there is nothing to encode."""
    if not len(source):
        where = f" in {plan.source}" if plan.source else ""
        raise UserError(f"there are no images to encode{where}")
    has_deviations = codec.codec.gaussian and plan.store == "moments"
    columns: dict[str, Column] = {}
    for size in plan.sizes or [(plan.resolution, plan.resolution)]:
        channels, *sides = codec.codec.shape(*size)
        shape = (2 * channels if has_deviations else channels, *sides)
        ending = plan.ending(size)  # "" without buckets
        membership = f"in{ending}" if ending else ""
        for name in LATENTS if plan.flips else LATENTS[:1]:
            columns[f"{name}{ending}"] = Column(dtype=plan.dtype, shape=shape, lengths=membership)
        if membership:
            columns[membership] = Column(dtype="uint8")
    columns["labels"] = Column(dtype="int64")
    if plan.sizes:
        columns["cropped"] = Column(dtype="float32")
    if hashes_of(source):
        columns["image"] = Column(dtype="int64")
        columns[HASH] = Column(dtype="uint8", shape=(BYTES,))
    return CacheIndex(
        **dict(plan),
        codec=codec.codec.facts() | {"weights": codec.codec.weights},
        weights=codec.sha256,
        rows=len(source),
        columns=columns,
    )


def encode_images(
    source: Finite | Assorted,
    codec: Opened,
    contents: CacheIndex,
    number: int,
    batch: int,
    report: Callable[[int], None],
) -> list[dict[str, Tensor]]:
    """A shard's columns, batch by batch; `report` is called with how many images are done. Raises as `encode`."""
    span = contents.span(number)
    parts: list[dict[str, Tensor]] = []
    for first in span[::batch]:
        signals.check()
        batch_rows = range(first, min(first + batch, span.stop))
        for size, images_of_size, rows in by_size(source, batch_rows, contents):
            images, labels = images_of_size.rows(slice(rows.start, rows.stop))
            if not len(images):
                continue
            images = check_images(images, labels, contents, first, size)
            ending = contents.ending(size)
            columns = {"labels": labels.long(), f"x{ending}": codec.encode(images).cpu()}
            if isinstance(images_of_size, Album):
                columns |= images_of_size.origins(rows)
            if contents.flips:
                columns[f"flipped{ending}"] = codec.encode(images.flip(3)).cpu()
            if isinstance(source, Assorted):
                columns["cropped"] = source.cropped[columns["image"]]
            parts.append(columns)
        report(batch_rows.stop - span.start)
    return parts


def by_size(source: Finite | Assorted, rows: range, contents: CacheIndex) -> Iterator[tuple[Size, Finite, range]]:
    """Some rows of the source, by size: the images of that size, and which of their rows are meant."""
    if not isinstance(source, Assorted):
        yield (contents.resolution, contents.resolution), source, rows
        return
    source.look(rows)
    for k, album in source.albums(rows).items():
        yield source.sizes[k], album, range(len(album))


def pack(parts: list[dict[str, Tensor]], codec: Opened, contents: CacheIndex, number: int) -> dict[str, Tensor]:
    """A shard's tensors, as they are stored. Raises UserError if there are none, or not in the stored dtype."""
    span = contents.span(number)
    where = f"images {span.start} to {span.stop - 1}"
    if not parts:
        raise UserError(f"{where}: not one could be read")
    dtype: torch.dtype = getattr(torch, contents.dtype)
    others: dict[str, Tensor] = {}
    latents: dict[str, Tensor] = {}
    for name, column in joined(parts, contents).items():
        if name.partition(" ")[0] not in LATENTS:
            others[name] = column
            continue
        latent = column
        if contents.store == "samples":
            latent = codec.codec.sample(column, contents.seed, "posterior", number, name, rows=range(len(column)))
        latents[name] = latent.to(dtype)
        if not latents[name].isfinite().all():
            raise UserError(f"{where}: the codec gives no numbers, or too large ones for {contents.dtype}: try float32")
    return others | latents


def joined(parts: list[dict[str, Tensor]], contents: CacheIndex) -> dict[str, Tensor]:
    """The parts of a shard by column, images in buckets in their order in the source whatever bucket they are in."""
    if not contents.sizes:
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    order = torch.cat([part["image"] for part in parts]).argsort()
    columns: dict[str, Tensor] = {}
    for name, column in contents.columns.items():
        stem, _, bucket = name.partition(" ")
        if stem in LATENTS:  # those of one bucket are in order
            in_bucket = [part[name] for part in parts if name in part]
            columns[name] = torch.cat(in_bucket or [torch.zeros(0, *column.shape)])
        elif bucket:  # whether each row is in it
            memberships = [torch.full((len(part["image"]),), f"x {bucket}" in part) for part in parts]
            columns[name] = torch.cat(memberships)[order].to(column.torch_dtype)
        else:
            columns[name] = torch.cat([part[name] for part in parts])[order].to(column.torch_dtype)
    return columns


def check_images(images: Tensor, labels: Tensor, contents: CacheIndex, first: int, size: Size) -> Tensor:
    """The images as floats in [-1, 1]. Raises UserError if they or their labels are not as planned."""
    where = f"images {first} to {first + len(images) - 1}"
    if images.shape[1:] != (3, *size):
        raise UserError(f"{where} are {tuple(images.shape[1:])}, planned is {(3, *size)}")
    num_labels = contents.rows if contents.captioned else max(contents.classes, 1)
    strange_labels = labels[(labels < 0) | (labels >= num_labels)]
    if len(strange_labels):
        raise UserError(
            f"{where}: there is a label {int(strange_labels[0])}, and {contents.classes} classes are planned"
        )
    if images.dtype == torch.uint8:
        return from_uint8(images)
    largest = float(images.abs().max())
    if largest > 1 + 1e-4:
        raise UserError(f"{where} reach {largest:.4g}: give uint8, or floats in [-1, 1]")
    return images.float()
