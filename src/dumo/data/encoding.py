"""Encode images with a codec into a cache (`dumo.data.cache`), shard by shard.

`encode` is the entry point. On each rank it

1. compares the folder with the images and captions on this machine;
2. makes the rank's shards that are missing or damaged (`_ShardEncoder`): reads images batch by batch, encodes them, and
   joins the batches into the columns of a shard, with the records of the images (`dumo.data.ledger`);
3. writes captions and the images' names next to the shards.

Each shard starts a new batch and has its own random stream, so the result does not depend on the rank.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dumo.data.cache import (
    CAPTIONS,
    HASH_COLUMN,
    LATENT_COLUMNS,
    NAMES,
    CacheIndex,
    CachePlan,
    dump_captions,
    has_cache,
    require_captions,
    require_same_images,
    split_column,
)
from dumo.data.images import BucketedImages, RowsInBuckets, Source, first_unreadable
from dumo.data.ledger import HASH_BYTES, ledger_of
from dumo.data.pixel import Size
from dumo.encoders.caption_ids import Captions
from dumo.encoders.codec import LoadedCodec
from dumo.io import digest, table
from dumo.io.data_source import Finite
from dumo.io.picture import from_uint8
from dumo.io.table import Column, MakeResult, Tick
from dumo.runtime import signals
from dumo.types import UserError


def encode(
    source: Finite | BucketedImages,
    codec: LoadedCodec,
    plan: CachePlan,
    out: Path,
    *,
    captions: Captions | None = None,
    batch: int = 32,
    rank: int = 0,
    world: int = 1,
    tick: Tick = lambda done, note: None,
) -> MakeResult:
    """Make the shards of rank `rank` of `world` that are missing or damaged in the folder `out`.

    captions: written to the cache. The label of image i must then be i.
    batch: the number of images encoded at once, which may change the last bits of latents.
    tick: called with the number of images encoded so far, and a message.

    Raises UserError if `out` has another cache, other captions or other files, if an image or a label contradicts the
    plan, or if a latent is too large for the dtype; OSError if `out` cannot be written; Stopped after a signal.
    Finished shards are kept.
    """
    index = _plan_index(source, codec, plan)
    ledger = ledger_of(source)

    # Compare the folder with the images and captions on this machine.
    if ledger and has_cache(out, index):
        require_same_images(out, ledger)
    if captions:
        require_captions(out / CAPTIONS, captions)

    # Make the shards, and the files next to them.
    other_files: dict[str, bytes] = {}
    if captions:
        other_files[CAPTIONS] = dump_captions(captions)
    if ledger:
        other_files[NAMES] = zlib.compress(ledger.names_bytes, 1)

    def source_digest(shard: int) -> str:
        if ledger is None:
            return ""
        records = ledger.records[index.span(shard)]
        return digest.of_bytes(records["size"].tobytes(), records["time"].tobytes())

    result = table.make_shards(
        out,
        index,
        _ShardEncoder(source, codec, index, batch).encode,
        rank=rank,
        world=world,
        source_digest=source_digest,
        extra_files=other_files,
        tick=tick,
    )
    if isinstance(source, Source):
        source.warn_of_unreadable("left out")

    # Compare again, since images may have changed while another rank read them.
    if ledger and has_cache(out, index):
        require_same_images(out, ledger)
    return result


def _plan_index(source: Finite | BucketedImages, codec: LoadedCodec, plan: CachePlan) -> CacheIndex:
    """Return the index of the complete cache with its columns, codec and rows, without shards.

    Raises UserError if there are no images.
    """
    if not len(source):
        where = f" in {plan.source}" if plan.source else ""
        raise UserError(f"there are no images to encode{where}")
    return CacheIndex(
        **dict(plan),
        codec=codec.codec.facts() | {"weights": codec.codec.weights},
        weights=codec.sha256,
        rows=len(source),
        columns=_plan_columns(source, codec, plan),
    )


def _plan_columns(source: Finite | BucketedImages, codec: LoadedCodec, plan: CachePlan) -> dict[str, Column]:
    """Return the columns of a cache by name: latents of each bucket, labels, and the records of the images."""
    # Moments are the mean and the standard deviation of each number.
    stores_moments = codec.codec.is_gaussian and plan.store == "moments"
    columns: dict[str, Column] = {}
    for size in plan.sizes or [(plan.resolution, plan.resolution)]:
        channels, *sides = codec.codec.shape(*size)
        shape = (2 * channels if stores_moments else channels, *sides)
        suffix = plan.column_suffix(size)
        membership = plan.membership_column(size) if suffix else ""
        for name in LATENT_COLUMNS if plan.flips else LATENT_COLUMNS[:1]:
            columns[f"{name}{suffix}"] = Column(dtype=plan.dtype, shape=shape, lengths=membership)
        if membership:
            columns[membership] = Column(dtype="uint8")
    columns["labels"] = Column(dtype="int64")
    if plan.sizes:
        columns["cropped"] = Column(dtype="float32")
    if ledger_of(source):
        columns["image"] = Column(dtype="int64")
        columns["state"] = Column(dtype="int64", shape=(2,))
        columns[HASH_COLUMN] = Column(dtype="uint8", shape=(HASH_BYTES,))
    return columns


@dataclass(frozen=True)
class _ShardEncoder:
    """Encodes the columns of a shard."""

    source: Finite | BucketedImages
    codec: LoadedCodec
    index: CacheIndex
    batch_size: int

    def encode(self, shard: int, report: Callable[[int], None]) -> dict[str, Tensor]:
        """Return the tensors of a shard in the dtypes of its columns, without rows if none of its images can be read.

        `report` is called with the number of images encoded so far. Raises UserError if an image or a label contradicts
        the plan, if no image of the whole source can be read, or if latents are not finite after the codec or the cast;
        Stopped after a signal.
        """
        columns_by_batch = self._encode_batches(shard, report)
        span = self.index.span(shard)
        where = f"images {span.start} to {span.stop - 1}"
        if not columns_by_batch:
            self._require_any_readable()
            columns = self.index.columns
            return {name: torch.zeros(0, *column.shape, dtype=column.torch_dtype) for name, column in columns.items()}
        dtype: torch.dtype = getattr(torch, self.index.dtype)
        other_columns: dict[str, Tensor] = {}
        latents: dict[str, Tensor] = {}
        for name, column in _join_batches(columns_by_batch, self.index).items():
            stem, _ = split_column(name)
            if stem not in LATENT_COLUMNS:
                other_columns[name] = column
                continue
            latent = column
            if self.index.store == "samples":
                key = (self.index.seed, "posterior", shard, name)
                latent = self.codec.codec.sample(column, *key, rows=range(len(column)))
            latents[name] = latent.to(dtype)
            if not latents[name].isfinite().all():
                raise UserError(f"{where}: the codec's latents are not finite in {self.index.dtype}: try float32")
        return other_columns | latents

    def _encode_batches(self, shard: int, report: Callable[[int], None]) -> list[dict[str, Tensor]]:
        """Encode the columns of each batch of images with one size, in the order of the shard's images."""
        span = self.index.span(shard)
        columns_by_batch: list[dict[str, Tensor]] = []
        for batch_rows in self._split_into_batches(span):
            bucketed = self._find_buckets(batch_rows)
            for size, images_of_size, rows in self._split_by_size(batch_rows, bucketed):
                columns = self._encode_batch(images_of_size, rows, batch_rows.start, size)
                if columns is None:
                    continue
                if bucketed:
                    columns["cropped"] = bucketed.cropped[columns["image"] - batch_rows.start]
                columns_by_batch.append(columns)
            report(batch_rows.stop - span.start)
        return columns_by_batch

    def _require_any_readable(self) -> None:
        """Read images until one can be read. Raises UserError, with the reason, if there is none."""
        unreadable: dict[int, str] = {}
        for batch_rows in self._split_into_batches(range(len(self.source))):
            for _, images_of_size, rows in self._split_by_size(batch_rows, self._find_buckets(batch_rows)):
                images, _ = images_of_size.rows(slice(rows.start, rows.stop))
                if len(images):
                    return
                if isinstance(images_of_size, Source) and not unreadable:
                    unreadable = images_of_size.unreadable
        if isinstance(self.source, BucketedImages):
            unreadable = unreadable | self.source.unreadable
        where = f" in {self.index.source}" if self.index.source else ""
        raise UserError(
            f"none of the {len(self.source)} images{where} can be read: repair or replace them"
            f"{first_unreadable(unreadable)}"
        )

    def _split_into_batches(self, rows: range) -> Iterator[range]:
        """Yield rows of the source in batches. Raises Stopped after a signal."""
        for batch_start in rows[:: self.batch_size]:
            signals.check()
            yield range(batch_start, min(batch_start + self.batch_size, rows.stop))

    def _find_buckets(self, rows: range) -> RowsInBuckets | None:
        """Return the buckets of rows of the source; None if the source has no buckets."""
        return self.source.find(rows) if isinstance(self.source, BucketedImages) else None

    def _split_by_size(self, rows: range, bucketed: RowsInBuckets | None) -> Iterator[tuple[Size, Finite, range]]:
        """Split rows of the source by size; yield the size, a source of images with that size, and its rows.

        `bucketed` are the buckets of these rows, or None if the source has no buckets.
        """
        if not isinstance(self.source, BucketedImages):
            yield (self.index.resolution, self.index.resolution), self.source, rows
            return
        assert bucketed, "each row has a bucket"
        for size, source in self.source.sources_by_size(bucketed).items():
            yield size, source, range(len(source))

    def _encode_batch(self, source: Finite, rows: range, batch_start: int, size: Size) -> dict[str, Tensor] | None:
        """Encode rows of a source of images with one size; return their columns, or None if no image can be read.

        `batch_start` is the number of the batch's first image in the whole source, for messages.
        """
        images, labels = source.rows(slice(rows.start, rows.stop))
        if not len(images):
            return None
        images = _checked_floats(images, labels, self.index, batch_start, size)
        suffix = self.index.column_suffix(size)
        columns = {"labels": labels.long(), f"x{suffix}": self.codec.encode(images).cpu()}
        ledger = ledger_of(source)
        if isinstance(source, Source) and ledger:
            numbers = source.readable_numbers(rows)
            records = ledger.records[numbers]
            columns["image"] = torch.tensor(numbers)
            columns["state"] = torch.tensor([*zip(records["size"].tolist(), records["time"].tolist(), strict=True)])
            columns[HASH_COLUMN] = torch.from_numpy(records["sha256"].copy())
        if self.index.flips:
            columns[f"flipped{suffix}"] = self.codec.encode(images.flip(-1)).cpu()
        return columns


def _join_batches(columns_by_batch: list[dict[str, Tensor]], index: CacheIndex) -> dict[str, Tensor]:
    """Join the columns of batches to those of a shard. With buckets, rows are sorted by image number.

    Latents have a column for each bucket, whose rows are already sorted.
    """
    if not index.sizes:
        return table.concatenate(columns_by_batch)
    order = torch.cat([columns["image"] for columns in columns_by_batch]).argsort()
    joined: dict[str, Tensor] = {}
    for name, column in index.columns.items():
        stem, bucket = split_column(name)
        if stem in LATENT_COLUMNS:
            latents = [columns[name] for columns in columns_by_batch if name in columns]
            joined[name] = torch.cat(latents or [torch.zeros(0, *column.shape)])
            continue
        if bucket:
            # Mark the rows that are in the bucket.
            batches = [torch.full((len(columns["image"]),), f"x {bucket}" in columns) for columns in columns_by_batch]
        else:
            batches = [columns[name] for columns in columns_by_batch]
        joined[name] = torch.cat(batches)[order].to(column.torch_dtype)
    return joined


def _checked_floats(images: Tensor, labels: Tensor, index: CacheIndex, batch_start: int, size: Size) -> Tensor:
    """Convert images to floats in [-1, 1]. Raises UserError if they or their labels contradict the plan."""
    span = f"images {batch_start} to {batch_start + len(images) - 1}"
    if images.shape[1:] != (3, *size):
        raise UserError(f"{span} have shape {tuple(images.shape[1:])}, expected {(3, *size)}")
    num_labels = index.rows if index.captioned else max(index.classes, 1)
    invalid_labels = labels[(labels < 0) | (labels >= num_labels)]
    if len(invalid_labels):
        raise UserError(f"{span} have the label {int(invalid_labels[0])}, but there are {index.classes} classes")
    if images.dtype == torch.uint8:
        return from_uint8(images)
    largest = float(images.abs().max())
    if largest > 1 + 1e-4:
        raise UserError(f"{span} have values up to {largest:.4g}: give uint8, or floats in [-1, 1]")
    return images.float()
