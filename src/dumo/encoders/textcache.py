"""Cache encoded texts on disk, by encoder and text.

    ROOT/gemma2-0123456789abcdef/                     an encoder and its settings (`identity_of`)
    ROOT/gemma2-0123456789abcdef/fedcba9876543210/    a table of texts (`dumo.io.table`), by the hash of these texts
        texts.jsonl                                   the texts, one JSON string per line

`fill_cache` encodes the texts that no table has into a new table. After an interruption the same texts are missing, so
the same table is completed. A changed caption is a new text, and a changed encoder has a new folder. So no row is ever
stale, and data sets and runs share one root.

`open_tables` opens the finished tables, and `find_rows` finds texts in them. A shard has these columns, where the
tokens of all rows are concatenated:

    tokens     embeddings (m, d)
    lengths    the number of tokens of each row
    mask       True on tokens, False on padding (m,); only if the model attends to padding
    pooled     a pooled embedding (p,) of each text, if the encoder has one
    source     the latent (c, h, w) of the image that a caption edits, or zeros; only if captions edit images
"""

import json
import warnings
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from dumo.encoders.caption_ids import split_caption
from dumo.encoders.encode_prompt import PromptReader, PromptReaderSpec
from dumo.encoders.transformers_text import Embeddings, EncoderModel, TextEncoder
from dumo.io import digest, table
from dumo.io.read import read_text
from dumo.io.table import FILE, MAX_MAPPED, Column, MakeResult, ShardTable, TableIndex, Tick
from dumo.runtime import signals
from dumo.runtime.progress import Bar, no_bar
from dumo.types import UserError

TEXTS = "texts.jsonl"
SHARD_ROWS = 256
BATCH_SIZE = 32
EncoderSpec = Annotated[TextEncoder | PromptReaderSpec, Field(discriminator="kind")]
LoadedEncoder = EncoderModel | PromptReader
# One encoded text: tokens (l, d), and a mask (l,), pooled (p,) and source (c, h, w) if the cache has these columns.
StoredRow = dict[str, Tensor]


class TextIndex(TableIndex):
    """The content of index.json for a table of encoded texts."""

    noun: ClassVar[str] = "table of texts"
    remake_hint: ClassVar[str] = "train the run again or start dumo encode, which re-encode damaged files"
    encoder: dict[str, Any]  # the encoder's fields without its folder
    identity: str  # the encoder's, from `identity_of`
    digest: str  # of the texts, in order

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of stored tokens."""
        return self.columns["tokens"].torch_dtype


@dataclass(frozen=True)
class SourceImages:
    """The images that captions edit, as latents."""

    shape: tuple[int, ...]  # (channels, height, width) of a latent
    identity: str  # of the autoencoder's weights and the resizing
    read_latents: Callable[[Sequence[str]], Float[Tensor, "b c h w"]]  # takes the SHA-256 of images

    def latents_of(self, captions: Sequence[str]) -> Float[Tensor, "b c h w"]:
        """Return the latent of the image that each caption edits, or zeros if it does not edit an image."""
        latents = torch.zeros(len(captions), *self.shape)
        rows: list[int] = []  # the captions that edit an image
        hashes: list[str] = []
        for row, caption in enumerate(captions):
            _, sha256 = split_caption(caption)
            if sha256:
                rows.append(row)
                hashes.append(sha256)
        if rows:
            latents[rows] = self.read_latents(hashes).to(latents)
        return latents


@dataclass(frozen=True)
class TextTable:
    """A finished table of texts. A shard is memory-mapped when one of its rows is read."""

    folder: Path
    index: TextIndex

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """The texts in the order of the rows. Raises UserError if they do not match the digest in the index."""
        file = self.folder / TEXTS
        fix = f"remove {self.folder}; its texts are then encoded again"
        try:
            texts = tuple(str(json.loads(line)) for line in read_text(file).split("\n") if line)
        except ValueError as error:
            raise UserError(f"{file} is damaged ({error}): {fix}") from error
        if digest.short(*texts) != self.index.digest:
            raise UserError(f"the texts in {file} differ from {FILE}: {fix}")
        return texts

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """The number of stored tokens of each row."""
        lengths: list[int] = []
        for number in range(self.index.num_shards):
            shard, _ = self._read_shard(number)
            lengths += shard["lengths"].tolist()
        return tuple(lengths)

    def row(self, row: int) -> StoredRow:
        """Return a row, in its stored dtypes."""
        number = bisect_right(self._shards.first_rows, row) - 1
        row_in_shard = row - self._shards.first_rows[number]
        shard, token_ends = self._read_shard(number)
        tokens = slice(token_ends[row_in_shard] - int(shard["lengths"][row_in_shard]), token_ends[row_in_shard])
        stored: StoredRow = {}
        for name, column in shard.items():
            if name != "lengths":
                stored[name] = column[tokens] if name in ("tokens", "mask") else column[row_in_shard]
        return stored

    def is_damaged(self, *, rank: int = 0, world: int = 1, deep: bool = False) -> bool:
        """Whether a shard of this rank is missing or has the wrong size or, if `deep`, the wrong checksum."""
        return any(shard.fault(self.folder, deep=deep) for shard in self.index.shards[rank::world])

    @cached_property
    def _shards(self) -> ShardTable:
        return ShardTable(self.folder, self.index)

    @cached_property
    def _read_shard(self) -> Callable[[int], tuple[Mapping[str, Tensor], list[int]]]:
        """A function that maps a shard's number to its columns and the end of each row in `tokens`."""

        @lru_cache(MAX_MAPPED)
        def read_shard(number: int) -> tuple[Mapping[str, Tensor], list[int]]:
            shard = self._shards.tensors(number)
            return shard, shard["lengths"].cumsum(0).tolist()

        return read_shard


def identity_of(encoder: EncoderSpec, sources: str = "") -> str:
    """Return the name of an encoder's folder in a cache: its architecture and a hash of everything its rows depend on.

    The hash covers its weights, its tokenizer, its fields but the path, and `sources`, the identity of the images that
    captions edit. Reads the files of the encoder. Raises UserError if they are missing.
    """
    fields = json.dumps(_encoder_fields(encoder), sort_keys=True)
    name = f"{encoder.model_type()}-{digest.short(encoder.files_hash(), fields)}"
    return f"{name}-{digest.short(sources)}" if sources else name


def find_identity(root: Path, encoder: EncoderSpec) -> str | None:
    """Return the only folder of a cache that was filled by an encoder with these fields, whatever its weights.

    This is for a machine that has the cache but not the encoder. Returns None if there is no or more than one match.
    """
    fields = _encoder_fields(encoder)
    found = {index.identity for folder in root.glob("*") for index in _read_indices(folder) if index.encoder == fields}
    return found.pop() if len(found) == 1 else None


def open_tables(folder: Path) -> list[TextTable]:
    """Open the finished tables of an encoder's folder, in the order of their names.

    Raises UserError if an index.json is damaged.
    """
    return [TextTable(folder / index.digest, index) for index in _read_indices(folder) if index.shards]


def find_rows(tables: Sequence[TextTable], texts: Sequence[str]) -> Int64[Tensor, "n 2"]:
    """Return the table number and row number of each of the distinct texts, or (-1, -1) if it is missing."""
    number_of_text = {text: number for number, text in enumerate(texts)}
    places = torch.full((len(texts), 2), -1, device="cpu")
    for table_number, text_table in enumerate(tables):
        rows_by_text: dict[int, int] = {}
        for row, text in enumerate(text_table.texts):
            if text in number_of_text:
                rows_by_text[number_of_text[text]] = row
        numbers = torch.tensor([*rows_by_text], dtype=torch.long, device="cpu")
        rows = torch.tensor([*rows_by_text.values()], dtype=torch.long, device="cpu")
        is_new = places[numbers, 0] < 0
        places[numbers[is_new], 0] = table_number
        places[numbers[is_new], 1] = rows[is_new]
    return places


def used_tables(tables: Sequence[TextTable], places: Int64[Tensor, "n 2"]) -> list[TextTable]:
    """Return the tables that are referenced by the result of `find_rows`."""
    return [tables[number] for number in places[:, 0].unique().tolist() if number >= 0]


def is_filled(folder: Path, texts: Sequence[str], *, deep: bool) -> bool:
    """Whether an encoder's folder has all of the distinct texts and no damaged shard (see `fill_cache`)."""
    tables = open_tables(folder)
    places = find_rows(tables, texts)
    if (places < 0).any():
        return False
    return not any(text_table.is_damaged(deep=deep) for text_table in used_tables(tables, places))


def fill_cache(
    folder: Path,
    texts: Sequence[str],
    spec: EncoderSpec,
    *,
    sources: SourceImages | None = None,
    deep: bool = False,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    bar: Bar = no_bar,
) -> MakeResult:
    """Encode the distinct texts that an encoder's folder lacks, and re-encode its damaged shards.

    Each rank encodes its own shards, and ranks need not run at the same time. The encoder is loaded only if there is
    something to encode, and freed at the end. A shard is damaged if it is missing or has the wrong size or, if `deep`,
    the wrong checksum. Warns of truncated texts. Raises UserError as opening the encoder does and for an embedding that
    overflows its dtype, Stopped after a signal, and as `dumo.io.table.make_shards`.
    """
    tables = open_tables(folder)
    places = find_rows(tables, texts)
    work: list[Sequence[str]] = []  # the texts of each table to make
    for text_table in used_tables(tables, places):
        if text_table.is_damaged(rank=rank, world=world, deep=deep):
            work.append(text_table.texts)
    missing: list[int] = (places[:, 0] < 0).nonzero().flatten().tolist()
    if missing:
        work.append([texts[number] for number in missing])
    if not work:
        return MakeResult(0, (), 0)

    encoder = spec.open(device)
    results: list[MakeResult] = []
    cut_texts: list[str] = []
    rows_by_table = [table.rows_of_rank(len(table_texts), SHARD_ROWS, rank, world) for table_texts in work]
    with bar("encoding captions", sum(rows_by_table)) as tick:
        for i, table_texts in enumerate(work):
            maker = _TableMaker(table_texts, spec, encoder, sources, cut_texts)
            index = maker.plan(folder.name)
            result = table.make_shards(
                folder / index.digest,
                index,
                partial(maker.make_shard, index),
                rank=rank,
                world=world,
                extra_files={TEXTS: maker.dump_texts()},
                tick=partial(_tick_behind, tick, sum(rows_by_table[:i])),
            )
            results.append(result)
    if cut_texts:
        fix = "write shorter ones" if isinstance(spec, PromptReaderSpec) else "raise net.texts.encoder.length"
        warnings.warn(f"{len(cut_texts):,} captions are cut {cut_place(spec)}: {fix}", stacklevel=2)
    return MakeResult(
        made=sum(result.made for result in results),
        damaged=tuple(line for result in results for line in result.damaged),
        missing=sum(result.missing for result in results),
    )


@dataclass(frozen=True)
class _TableMaker:
    """Encodes the texts of one table, shard by shard."""

    texts: Sequence[str]
    spec: EncoderSpec
    encoder: LoadedEncoder
    sources: SourceImages | None
    cut_texts: list[str]  # collects truncated texts

    def plan(self, identity: str) -> TextIndex:
        """Return the index before any shard is made, with column sizes from encoding the empty text."""
        spec = self.spec
        empty_text = self.encoder([""])
        columns = {
            "tokens": Column(dtype=spec.dtype, shape=tuple(empty_text.tokens.shape[2:]), lengths="lengths"),
            "lengths": Column(dtype="int64"),
        }
        if isinstance(spec, PromptReaderSpec) and spec.padded:
            columns["mask"] = Column(dtype="bool", lengths="lengths")
        if empty_text.pooled is not None:
            columns["pooled"] = Column(dtype=spec.dtype, shape=(empty_text.pooled.shape[1],))
        if self.sources:
            columns["source"] = Column(dtype=spec.dtype, shape=self.sources.shape)
        return TextIndex(
            columns=columns,
            rows=len(self.texts),
            shard_rows=SHARD_ROWS,
            encoder=_encoder_fields(spec),
            identity=identity,
            digest=digest.short(*self.texts),
        )

    def make_shard(self, index: TextIndex, number: int, report: Callable[[int], None]) -> Mapping[str, Tensor]:
        """Return the columns of a shard. Calls `report` with the number of finished rows.

        Batches do not cross shards, so the result does not depend on the rank.
        """
        span = index.span(number)
        batches: list[dict[str, Tensor]] = []
        for first in span[::BATCH_SIZE]:
            signals.check()
            batch = self.texts[first : min(first + BATCH_SIZE, span.stop)]
            embeddings = encode_captions(self.encoder, batch)
            self.cut_texts.extend(embeddings.cut_texts)
            columns = to_columns(embeddings, keeps_padding="mask" in index.columns)
            if self.sources:
                columns["source"] = self.sources.latents_of(batch)
            batches.append(columns)
            report(first + len(batch) - span.start)
        dtypes = {name: column.torch_dtype for name, column in index.columns.items()}
        return to_stored_types(table.concatenate(batches), dtypes)

    def dump_texts(self) -> bytes:
        """Return the content of texts.jsonl."""
        return "".join(f"{json.dumps(text, ensure_ascii=False)}\n" for text in self.texts).encode()


def _tick_behind(tick: Tick, rows_before: int, done: int, note: str) -> None:
    """Report the finished rows of a table, added to the rows of the tables before it."""
    tick(rows_before + done, note)


def encode_captions(encoder: LoadedEncoder, captions: Sequence[str]) -> Embeddings:
    """Encode the texts of captions, padded to the longest text."""
    return encoder([split_caption(caption)[0] for caption in captions])


def to_columns(rows: Embeddings, *, keeps_padding: bool) -> dict[str, Tensor]:
    """Convert rows to columns of a shard. Drops padding unless `keeps_padding`, which adds the column `mask`."""
    is_stored = torch.ones_like(rows.mask) if keeps_padding else rows.mask  # (b, l)
    columns = {"lengths": is_stored.sum(1), "tokens": rows.tokens[is_stored]}
    if keeps_padding:
        columns["mask"] = rows.mask[is_stored]
    if rows.pooled is not None:
        columns["pooled"] = rows.pooled
    return columns


def to_stored_types(columns: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Convert columns to their stored dtypes. Raises UserError if a converted value is not finite."""
    stored = {name: column.to(dtypes[name]) for name, column in columns.items()}
    for column in stored.values():
        if not column.isfinite().all():
            dtype = str(dtypes["tokens"]).removeprefix("torch.")
            raise UserError(f"the encoder's output is not finite in {dtype}: set its dtype=bfloat16")
    return stored


def cut_place(spec: EncoderSpec) -> str:
    """Describe where an encoder truncates texts, for messages. A pipeline's tokenizers may have different limits."""
    if isinstance(spec, PromptReaderSpec):
        return "where the pipeline cuts texts"
    return f"at {spec.length} tokens"


def _encoder_fields(encoder: EncoderSpec) -> dict[str, Any]:
    """Return the fields of an encoder that its rows depend on: all but its folder, which may move."""
    return encoder.model_dump(mode="json", exclude={"source"})


def _read_indices(folder: Path) -> list[TextIndex]:
    """Read the indices of all tables in an encoder's folder. Raises UserError if one is damaged."""
    indices: list[TextIndex] = []
    for file in sorted(folder.glob(f"*/{FILE}")):
        index = table.read_index(file.parent, TextIndex)
        if index is not None:
            indices.append(index)
    return indices
