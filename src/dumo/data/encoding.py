"""Make a cache (`dumo.data.cache`): a codec encodes images, shard by shard.

`encode` is the entrance. On each rank it

1. compares what is in the folder with the images and captions that are here;
2. makes the rank's shards that are missing or damaged (`_ShardEncoder`): reads images batch by batch, encodes them, and
   joins the batches into the columns of a shard, with the records of the images (`dumo.data.ledger`);
3. writes captions and the images' names next to the shards.

Each shard is encoded in batches from its own first row, and its draws have a random stream of its own: so it does not
matter which rank makes it.
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
    """Make the shards of rank `rank` out of `world` that are missing in the folder `out`, or damaged there.

    `captions` are written to the cache; the label of image i must then be i. `batch` is the number of images that are
    encoded at once; another number may change latents in their last bits. `tick` is called with the number of images
    encoded so far, and a note on them.

    Raises UserError where `out` holds another cache, other captions or something else, where an image or a label is not
    as planned, or a latent is too large for the dtype; OSError where nothing can be written; Stopped after a signal.
    Finished shards are kept.
    """
    index = _plan_index(source, codec, plan)
    ledger = ledger_of(source)

    # Compare what is in the folder with what is here.
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

    # Another rank may have read other images meanwhile.
    if ledger and has_cache(out, index):
        require_same_images(out, ledger)
    return result


def _plan_index(source: Finite | BucketedImages, codec: LoadedCodec, plan: CachePlan) -> CacheIndex:
    """The index of the complete cache, with its columns, codec and rows. No shard is listed yet.

    Raises UserError if there is nothing to encode.
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
    """The columns of a cache, by name: latents of each bucket, labels, and what identifies the images."""
    stores_moments = codec.codec.is_gaussian and plan.store == "moments"  # a mean and a deviation of each number
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
    """Makes the columns of a shard by its number."""

    source: Finite | BucketedImages
    codec: LoadedCodec
    index: CacheIndex
    batch_size: int  # images that are encoded at once

    def encode(self, shard: int, report: Callable[[int], None]) -> dict[str, Tensor]:
        """The tensors of a shard, in the dtypes of its columns. `report` is called with the images encoded so far.

        They have no rows where no image of the shard can be read. Raises UserError where an image or a label is not as
        planned, no image of the whole source can be read, or a latent has values that are not finite, by the codec or
        by the cast; Stopped after a signal.
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
                raise UserError(
                    f"{where}: the codec gives no numbers, or too large ones for {self.index.dtype}: try float32"
                )
        return other_columns | latents

    def _encode_batches(self, shard: int, report: Callable[[int], None]) -> list[dict[str, Tensor]]:
        """The columns of each batch of images of one size, in the order of the shard's images."""
        span = self.index.span(shard)
        columns_by_batch: list[dict[str, Tensor]] = []
        for batch_rows in self._split_into_batches(span):
            bucketed = self._find_buckets(batch_rows)
            for size, images_of_size, rows in self._split_by_size(batch_rows, bucketed):
                columns = self._encode_batch(images_of_size, rows, batch_rows.start, size)
                if columns is None:  # none of these images can be read
                    continue
                if bucketed:
                    columns["cropped"] = bucketed.cropped[columns["image"] - batch_rows.start]
                columns_by_batch.append(columns)
            report(batch_rows.stop - span.start)
        return columns_by_batch

    def _require_any_readable(self) -> None:
        """Raise UserError, with the reason, where no image of the source can be read. Reads images until one can."""
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
            f"none of the {len(self.source)} images{where} can be read: mend them, or give other images"
            f"{first_unreadable(unreadable)}"
        )

    def _split_into_batches(self, rows: range) -> Iterator[range]:
        """Yield rows of the source in batches, each where no signal has come."""
        for batch_start in rows[:: self.batch_size]:
            signals.check()
            yield range(batch_start, min(batch_start + self.batch_size, rows.stop))

    def _find_buckets(self, rows: range) -> RowsInBuckets | None:
        """The buckets of rows of the source; None of a source without buckets."""
        return self.source.find(rows) if isinstance(self.source, BucketedImages) else None

    def _split_by_size(self, rows: range, bucketed: RowsInBuckets | None) -> Iterator[tuple[Size, Finite, range]]:
        """Split rows of the source by size. Yields the size, a source of images of that size, and its rows.

        `bucketed`: the buckets of these rows; None of a source without buckets.
        """
        if not isinstance(self.source, BucketedImages):
            yield (self.index.resolution, self.index.resolution), self.source, rows
            return
        assert bucketed, "a source with buckets has them of each row"
        for size, part in self.source.parts(bucketed).items():
            yield size, part, range(len(part))

    def _encode_batch(self, source: Finite, rows: range, batch_start: int, size: Size) -> dict[str, Tensor] | None:
        """The columns of some rows of a source of images of one size; None where none of them can be read.

        `batch_start` is the number of the batch's first image in all, for messages.
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
            columns[f"flipped{suffix}"] = self.codec.encode(images.flip(-1)).cpu()  # left-right
        return columns


def _join_batches(columns_by_batch: list[dict[str, Tensor]], index: CacheIndex) -> dict[str, Tensor]:
    """The columns of a shard, joined from its batches; with buckets, rows are in the order of the images in the source.

    Latents are in columns of their own for each bucket. Their rows are in that order already.
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
        if bucket:  # whether each row is in the bucket
            parts = [torch.full((len(columns["image"]),), f"x {bucket}" in columns) for columns in columns_by_batch]
        else:
            parts = [columns[name] for columns in columns_by_batch]
        joined[name] = torch.cat(parts)[order].to(column.torch_dtype)
    return joined


def _checked_floats(images: Tensor, labels: Tensor, index: CacheIndex, batch_start: int, size: Size) -> Tensor:
    """The images as floats in [-1, 1]. Raises UserError if they or their labels are not as planned."""
    span = f"images {batch_start} to {batch_start + len(images) - 1}"
    if images.shape[1:] != (3, *size):
        raise UserError(f"{span} are {tuple(images.shape[1:])}, planned is {(3, *size)}")
    num_labels = index.rows if index.captioned else max(index.classes, 1)
    strange_labels = labels[(labels < 0) | (labels >= num_labels)]
    if len(strange_labels):
        raise UserError(f"{span}: there is a label {int(strange_labels[0])}, and {index.classes} classes are planned")
    if images.dtype == torch.uint8:
        return from_uint8(images)
    largest = float(images.abs().max())
    if largest > 1 + 1e-4:
        raise UserError(f"{span} reach {largest:.4g}: give uint8, or floats in [-1, 1]")
    return images.float()
