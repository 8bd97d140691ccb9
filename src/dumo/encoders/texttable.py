"""A table of encoded captions in a folder (`dumo.io.table`): how it is made, and how its rows are read.

Row k is of caption k of captions.jsonl, which has a string of JSON per line. The last row is of the empty text, which
stands for no caption. A shard has these columns, with the tokens of all its rows one after the other:

    tokens     embeddings (m, d); ids (m,) where the encoder is trained with the net
    lengths    the number of tokens of each row
    mask       which tokens are no padding (m,); only of a pipeline that reads padding, too. Without it, none is stored
    pooled     an embedding (p,) of each whole text, where the encoder makes one
    source     the latent (c, h, w) of the image that a caption edits, zeros for none; only where captions edit images

The entrances:

- `encode` makes a table, shard by shard. A shard is encoded in the same batches from its own first row, so it does not
  depend on the others, and several ranks may share the work. `SourceImages` says how it reads images to edit.
- `open_table` opens a finished table as `EncodedTexts`; its methods read rows, and `require` compares it with what a
  run asks for.
- `read_index` reads the index alone, `TextTableIndex`, also of a table that is not finished.
- `to_columns` and `to_stored_types` are for `dumo.nets.live`, which makes the same rows without a table.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float, Shaped
from pydantic import Field
from torch import Tensor

from dumo.encoders.caption import split_caption
from dumo.encoders.prompt import PromptReader, PromptReaderSpec
from dumo.encoders.text import Embeddings, EncoderModel, TextEncoder
from dumo.encoders.tokens import ByteTokenizer, LoadedTokenizer
from dumo.io import digest, table
from dumo.io.audit import Audit
from dumo.io.read import read_text
from dumo.io.table import FILE, MAX_MAPPED, REMAKE, Column, MakeResult, TableIndex, Tick
from dumo.runtime import signals
from dumo.types import UserError

CAPTIONS = "captions.jsonl"
EncoderSpec = Annotated[TextEncoder | PromptReaderSpec | ByteTokenizer, Field(discriminator="kind")]
LoadedEncoder = EncoderModel | PromptReader | LoadedTokenizer  # what opening an `EncoderSpec` gives
# tokens or ids; the mask, False on padding; pooled embeddings, or None
PaddedRows = tuple[Shaped[Tensor, "b l *d"], Bool[Tensor, "b l"], Float[Tensor, "b p"] | None]
Shard = dict[str, Tensor]  # columns by name


class TextTableIndex(TableIndex):
    """What index.json says of a table of texts."""

    encoder: EncoderSpec
    model: str  # the encoder's architecture by its config.json, or the class of a pipeline; of token ids: tokens
    sha256: str  # of the encoder's weights; of a pipeline, of its tokenizers, too; of token ids, of the vocabulary
    # The hash of a `TextEncoder`'s tokenizer. None: `sha256` has it, or the table was made before this was noted.
    tokenizer: str | None = Field(default=None, exclude_if=lambda tokenizer: tokenizer is None)
    digest: str  # of the captions in their order
    # the hash of the autoencoder that made the column `source`
    codec: str | None = Field(default=None, exclude_if=lambda codec: codec is None)

    @classmethod
    def for_captions(
        cls,
        captions: Sequence[str],
        spec: EncoderSpec,
        encoder: LoadedEncoder,
        shard_rows: int,
        sources: "SourceImages | None",
    ) -> "TextTableIndex":
        """Make the index of a table of these captions, before any shard is made.

        `encoder` is `spec`, opened. Sizes are those of the encoded empty text.
        """
        empty_text = _encode_texts(encoder, [""])
        dtype = "int32" if isinstance(spec, ByteTokenizer) else spec.dtype
        columns = {
            "tokens": Column(dtype=dtype, shape=tuple(empty_text.tokens.shape[2:]), lengths="lengths"),
            "lengths": Column(dtype="int64"),
        }
        if isinstance(spec, PromptReaderSpec) and spec.padded:
            columns["mask"] = Column(dtype="bool", lengths="lengths")
        if empty_text.pooled is not None:
            columns["pooled"] = Column(dtype=dtype, shape=(empty_text.pooled.shape[1],))
        if sources:
            columns["source"] = Column(dtype=dtype, shape=sources.shape)
        return cls(
            columns=columns,
            rows=len(captions) + 1,
            shard_rows=shard_rows,
            encoder=spec,
            model="tokens" if isinstance(spec, ByteTokenizer) else spec.model_type(),
            sha256=encoder.sha256,
            tokenizer=_tokenizer_hash(encoder),
            digest=digest.short(*captions),
            codec=sources.sha256 if sources else None,
        )

    @property
    def num_captions(self) -> int:
        """The number of captions, without the empty one."""
        return self.rows - 1

    @property
    def width(self) -> int:
        """The channels of a token's embedding; 0 if tokens are ids."""
        return sum(self.columns["tokens"].shape)

    @property
    def pooled_width(self) -> int:
        """The channels of the embedding of a whole text; 0 if there is none."""
        return sum(self.columns["pooled"].shape) if "pooled" in self.columns else 0

    @property
    def source_shape(self) -> tuple[int, ...]:
        """The shape (c, h, w) of the latent of an image that captions edit; () if they edit none."""
        return self.columns["source"].shape if "source" in self.columns else ()

    @property
    def dtype(self) -> torch.dtype:
        """The type of stored tokens."""
        return self.columns["tokens"].torch_dtype

    def summary(self) -> str:
        """Describe in words what the finished table holds."""
        words = f"{self.num_captions:,} captions and the empty one by {self.model}, "
        if not isinstance(self.encoder, PromptReaderSpec):
            words += f"up to {self.encoder.length} "
        words += f"tokens of {self.width} numbers" if self.width else "numbers of tokens"
        if self.pooled_width:
            words += f", and {self.pooled_width} of the whole text"
        return words

    def binding(self) -> dict[str, Any]:
        """The fields by which two tables are compared: all but the encoder's folder, which may move.

        `sha256` says what the folder holds.
        """
        fields = super().binding()
        del fields["encoder"]
        return _encoder_fields(self.encoder) | fields

    @property
    def identity(self) -> str:
        """A short digest of the encoder's weights and tokenizer, of how it is used, and of the captions."""
        entries = self.binding()
        return digest.short(*(f"{key} {entries[key]}" for key in sorted(entries) if key != "shard_rows"))

    def without_tokenizer(self) -> "TextTableIndex":
        """The index as it was written before the hash of the tokenizer was noted."""
        return self.model_copy(update={"tokenizer": None})

    def require_encoder(self, encoder: LoadedEncoder, source: str) -> None:
        """Raise UserError where the encoder in the folder `source` has other weights, or another tokenizer."""
        if encoder.sha256 != self.sha256:
            raise UserError(
                f"net.texts: the encoder in {source} has the hash {encoder.sha256}, and the captions were encoded by "
                f"{self.sha256}: name the folder of that encoder"
            )
        tokenizer_hash = _tokenizer_hash(encoder)
        if self.tokenizer not in (None, tokenizer_hash):
            raise UserError(
                f"net.texts: the tokenizer of {source} has the hash {tokenizer_hash}, and the captions were encoded by "
                f"{self.tokenizer}: put its files back, or name the folder of that encoder"
            )


@dataclass(frozen=True)
class SourceImages:
    """The images that captions edit, as latents of the data's autoencoder."""

    shape: tuple[int, ...]  # of a latent: channels, height, width
    sha256: str  # of the autoencoder's weights
    read_latents: Callable[[Sequence[str]], Float[Tensor, "b c h w"]]  # of images, by their SHA-256

    def latents_of(self, captions: Sequence[str]) -> Float[Tensor, "b c h w"]:
        """Return the latent of the image that each caption edits; zeros for a caption that edits none."""
        latents = torch.zeros(len(captions), *self.shape)
        rows: list[int] = []  # of captions that edit an image
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
class EncodedTexts:
    """A finished table, open to read. Shards are mapped into memory when a row of theirs is read."""

    folder: Path
    index: TextTableIndex

    def __len__(self) -> int:
        """The number of rows; the last means no caption."""
        return self.index.rows

    def __deepcopy__(self, memo: dict[int, Any]) -> "EncodedTexts":
        """Return itself, because it never changes."""
        return self

    def require(self, encoder: EncoderSpec, num_captions: int, identity: str | None = None) -> None:
        """Raise UserError for another number of captions, or a table by another encoder.

        `identity` is the index's that a run noted when it began, and says which captions they are, too. None: the run
        begins, and `dumo.run.resolve` compares the captions with those of the data.
        """
        index = self.index
        if index.num_captions != num_captions:
            raise UserError(
                f"net.texts.root: {self.folder} holds {index.num_captions:,} captions, and the data have "
                f"{num_captions:,}: encode these into another folder, by dumo encode RECIPE and net.texts.root=DIR"
            )
        differences = table.differences_text(_encoder_fields(index.encoder), _encoder_fields(encoder), "asked")
        if differences:
            raise UserError(
                f"net.texts.root: {self.folder} was encoded otherwise:\n  {differences}\nEncode into another "
                "folder, or ask for what is there"
            )
        # a run that began before tokenizers were noted knows its table by the rest
        if identity not in (None, index.identity, index.without_tokenizer().identity):
            raise UserError(
                f"net.texts.root: {self.folder} is another table than that of this run (identity {index.identity}, and "
                f"{identity} in net.texts): put it back, or encode the same captions by the same encoder"
            )

    def read_rows(self, rows: Sequence[int] | None = None) -> PaddedRows:
        """Read rows, padded with zeros to `longest` tokens: tokens (b, l, d) or ids (b, l), mask (b, l), pooled (b, p).

        Embeddings have the type in which they are stored, ids are int64. `rows` None: all, after each shard is compared
        with its checksum. Raises UserError for a damaged shard.
        """
        index = self.index
        if rows is None:
            table.require_intact(self.folder, index, deep=True)
            rows = range(len(self))
        b = len(rows)
        tokens = torch.zeros(b, self.longest, *index.columns["tokens"].shape, dtype=index.dtype)
        mask = torch.zeros(b, self.longest, dtype=torch.bool)
        pooled = None
        if index.pooled_width:
            pooled = torch.empty(b, index.pooled_width, dtype=index.dtype)
        for i, row in enumerate(rows):
            shard, token_ends, row_in_shard = self._find_row(row)
            length = int(shard["lengths"][row_in_shard])
            end = token_ends[row_in_shard]
            tokens[i, :length] = shard["tokens"][end - length : end]
            mask[i, :length] = shard["mask"][end - length : end] if "mask" in shard else True
            if pooled is not None:
                pooled[i] = shard["pooled"][row_in_shard]
        if not index.width:  # ids, which are stored in fewer bits
            tokens = tokens.long()
        return tokens, mask, pooled

    def read_sources(self, rows: Sequence[int] | None = None) -> Float[Tensor, "b c h w"] | None:
        """Read the latents of the images that rows edit, in their stored type; None if captions edit no images.

        `rows` None: all.
        """
        index = self.index
        if not index.source_shape:
            return None
        if rows is None:
            rows = range(len(self))
        latents = torch.empty(len(rows), *index.source_shape, dtype=index.dtype)
        for i, row in enumerate(rows):
            shard, _, row_in_shard = self._find_row(row)
            latents[i] = shard["source"][row_in_shard]
        return latents

    @cached_property
    def longest(self) -> int:
        """The number of tokens of a padded row: the encoder's `length`; of a pipeline, that of its longest row."""
        if not isinstance(self.index.encoder, PromptReaderSpec):
            return self.index.encoder.length
        return max(self.lengths)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """The number of stored tokens of each row: without padding, but of a pipeline that reads padding with it."""
        lengths: list[int] = []
        read_shard = self._shard_reader
        for number in range(self.index.num_shards):
            shard, _ = read_shard(number)
            lengths += shard["lengths"].tolist()
        return tuple(lengths)

    @cached_property
    def captions(self) -> tuple[str, ...]:
        """The captions in their order. Raises UserError where they are not those that were encoded."""
        return _read_captions(self.folder, self.index.digest)

    @cached_property
    def audit(self) -> Audit:
        """Compares the shards with their checksums while rows are read, pass by pass."""
        return Audit(self.folder, self.index.shards)

    @cached_property
    def _table(self) -> table.ShardTable:
        return table.ShardTable(self.folder, self.index)

    def _find_row(self, row: int) -> tuple[Shard, list[int], int]:
        """Return the shard that has a row, where each of its rows ends in `tokens`, and the row's number in it."""
        read_shard = self._shard_reader
        shard_number, row_in_shard = self._table.locate(row)
        shard, token_ends = read_shard(shard_number)
        return shard, token_ends, row_in_shard

    @cached_property
    def _shard_reader(self) -> Callable[[int], tuple[Shard, list[int]]]:
        """A function that maps a shard into memory by its number, and says where each of its rows ends in `tokens`.

        Each table keeps its last MAX_MAPPED shards.
        """

        @lru_cache(MAX_MAPPED)
        def read_shard(number: int) -> tuple[Shard, list[int]]:
            shard = self._table.tensors(number)
            return shard, shard["lengths"].cumsum(0).tolist()

        return read_shard


def open_table(folder: Path) -> EncodedTexts:
    """Open the table of a folder.

    Raises UserError where there is none, it is unfinished, or a shard has changed.
    """
    missing = UserError(
        f"{folder} holds no texts (it has no {FILE}): make it with dumo encode RECIPE, and the same overrides"
    )
    return EncodedTexts(folder, table.read_finished_index(folder, TextTableIndex, missing))


def read_index(folder: Path) -> TextTableIndex | None:
    """Read the index of a folder, also of an unfinished table; None where there is none.

    Raises UserError if it is damaged.
    """
    return table.read_index(folder, TextTableIndex)


def encode(
    captions: Sequence[str],
    spec: EncoderSpec,
    out: Path,
    *,
    shard_rows: int = 1024,
    batch: int = 32,
    sources: SourceImages | None = None,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    tick: Tick = lambda done, note: None,
) -> MakeResult:
    """Make the shards of this rank that are missing or damaged, of a table of captions in the folder `out`.

    Texts are encoded `batch` at a time; another batch may change the last bits. Warns once where texts are cut. Raises
    UserError where there are no captions, an embedding is too large for the dtype, and as opening the encoder does;
    Stopped after a signal; and as `dumo.io.table.make_shards`.
    """
    if not captions:
        raise UserError("there are no captions to encode: give data.captions, and images that have some")
    encoder = spec.open() if isinstance(spec, ByteTokenizer) else spec.open(device)
    index = TextTableIndex.for_captions(captions, spec, encoder, shard_rows, sources)
    existing_index = read_index(out)
    if existing_index is not None and existing_index.tokenizer is None:
        index = index.without_tokenizer()  # else a table that was begun before it was noted would not be resumed
    texts = [*captions, ""]
    has_masks = "mask" in index.columns
    dtypes = {name: column.torch_dtype for name, column in index.columns.items()}
    num_encoded = 0
    num_cut = 0

    def encode_shard(number: int, report: Callable[[int], None]) -> Shard:
        """Return the columns of a shard. `report` is called with the number of rows that are done."""
        nonlocal num_encoded, num_cut
        rows = index.span(number)
        batches: list[Shard] = []
        for first in rows[::batch]:
            signals.check()
            batch_texts = texts[first : min(first + batch, rows.stop)]
            embeddings = _encode_texts(encoder, batch_texts)
            num_encoded += len(batch_texts) - batch_texts.count("")
            num_cut += len(embeddings.cut_texts)
            columns = to_columns(embeddings, keeps_padding=has_masks)
            if sources:
                columns["source"] = sources.latents_of(batch_texts)
            batches.append(columns)
            report(first + len(batch_texts) - rows.start)
        return to_stored_types(table.concatenate(batches), dtypes)

    lines = "".join(f"{json.dumps(text, ensure_ascii=False)}\n" for text in captions)
    make_result = table.make_shards(
        out, index, encode_shard, rank=rank, world=world, extra_files={CAPTIONS: lines.encode()}, tick=tick
    )
    _warn_of_cuts(spec, num_cut, num_encoded)
    return make_result


def _warn_of_cuts(spec: EncoderSpec, num_cut: int, num_captions: int) -> None:
    """Warn of captions that are cut, if there are any, with the field that says where."""
    if not num_cut:
        return
    match spec:
        case TextEncoder():
            fix = "raise net.texts.encoder.length"
        case ByteTokenizer():
            fix = "raise net.texts.tokenizer.length"
        case PromptReaderSpec():
            fix = "write shorter ones"
    warnings.warn(f"{num_cut:,} of {num_captions:,} captions are cut {cut_place(spec)}: {fix}", stacklevel=3)


def cut_place(spec: EncoderSpec) -> str:
    """Where an encoder cuts texts, in words. The tokenizers of a pipeline may each cut elsewhere."""
    if isinstance(spec, PromptReaderSpec):
        return "where the pipeline cuts texts"
    return f"at {spec.length} tokens"


def to_columns(rows: Embeddings, *, keeps_padding: bool) -> Shard:
    """The columns of a shard with some rows. Padding is left out, or kept with the column `mask` if `keeps_padding`."""
    is_stored = torch.ones_like(rows.mask) if keeps_padding else rows.mask  # (b, l)
    columns = {"lengths": is_stored.sum(1), "tokens": rows.tokens[is_stored]}
    if keeps_padding:
        columns["mask"] = rows.mask[is_stored]
    if rows.pooled is not None:
        columns["pooled"] = rows.pooled
    return columns


def to_stored_types(columns: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> Shard:
    """Convert columns to the types in which they are stored. Raises UserError where a value is not finite there."""
    stored = {name: column.to(dtypes[name]) for name, column in columns.items()}
    for column in stored.values():
        if not column.isfinite().all():
            dtype = str(dtypes["tokens"]).removeprefix("torch.")
            raise UserError(f"the encoder gives no numbers, or too large ones for {dtype}: set its dtype=bfloat16")
    return stored


def _encoder_fields(encoder: EncoderSpec) -> dict[str, Any]:
    """The fields of an encoder by which tables are compared: all but its folder, which may move."""
    fields = encoder.model_dump(mode="json", exclude={"source"})
    return {f"encoder.{name}": value for name, value in fields.items()}


def _tokenizer_hash(encoder: LoadedEncoder) -> str | None:
    """The hash of an encoder's tokenizer; None where the hash of the encoder is of its tokenizer, too."""
    return encoder.tokenizer.sha256 if isinstance(encoder, EncoderModel) else None


def _encode_texts(encoder: LoadedEncoder, captions: Sequence[str]) -> Embeddings:
    """Encode the texts of captions, padded to the longest. A tokenizer gives ids in place of embeddings."""
    texts = [split_caption(caption)[0] for caption in captions]
    if not isinstance(encoder, LoadedTokenizer):
        return encoder(texts)
    ids, mask = encoder(texts, fills_length=False)
    return Embeddings(ids, mask, None, encoder.cut_texts(texts))


def _read_captions(folder: Path, expected_digest: str) -> tuple[str, ...]:
    """Read the captions of a folder. Raises UserError where they are missing, damaged, or of another digest."""
    file = folder / CAPTIONS
    lines = read_text(file).split("\n")
    try:
        texts = tuple(str(json.loads(line)) for line in lines if line)
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}): {REMAKE}") from error
    if digest.short(*texts) != expected_digest:
        raise UserError(f"{file} holds other captions than {FILE} says: {REMAKE}")
    return texts
