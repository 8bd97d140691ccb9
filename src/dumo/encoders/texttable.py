"""A table of texts (`dumo.io.table`): how captions are encoded into one, and how it is read.

    tokens     embeddings (m, d) of a shard's rows one after the other, without padding; ids (m,) where the encoder is
               trained with the net
    lengths    the number of tokens in each row
    mask       of a pipeline that reads padding, too: which tokens are no padding
    pooled     an embedding (p,) of each text, where there is one
    source     the latent (c, h, w) of the image that a text edits, where it edits one; zeros for no caption

Row k is of caption k of captions.jsonl, a string of JSON per line, and the last row of the empty text, which stands for
no caption. A shard is encoded in the same batches from its own first row.

`encode` makes a table, `open_table` opens one, and `require` compares it with what a run asks for.
"""

import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float, Shaped
from pydantic import Field
from torch import Tensor

from dumo.encoders.caption import parted
from dumo.encoders.prompt import PromptReader, Prompts
from dumo.encoders.text import Embeddings, EncoderModel, TextEncoder
from dumo.encoders.tokens import LoadedTokenizer, Tokenizer
from dumo.io import digest, table
from dumo.io.audit import Audit
from dumo.io.read import read_text
from dumo.io.table import FILE, MAX_MAPPED, REMAKE, Column, MakeResult, TableIndex, Tick
from dumo.runtime import signals
from dumo.types import UserError

CAPTIONS = "captions.jsonl"
MAX_CAPTIONS_BYTES = 2**34  # of captions.jsonl; ours
Reader = Annotated[TextEncoder | Prompts | Tokenizer, Field(discriminator="kind")]
Rows = tuple[Shaped[Tensor, "b l *d"], Bool[Tensor, "b l"], Float[Tensor, "b p"] | None]


class TextTableIndex(TableIndex):
    """What index.json says of a table of texts."""

    encoder: Reader
    model: str  # its name in the encoder's config.json; of token ids: tokens
    sha256: str  # of the encoder's weights; of token ids, of the vocabulary
    digest: str  # of the captions in their order
    codec: str | None = Field(default=None, exclude_if=lambda codec: codec is None)  # of the weights of `source`

    @classmethod
    def of(
        cls,
        captions: Sequence[str],
        encoder: Reader,
        read: EncoderModel | PromptReader | LoadedTokenizer,
        shard_rows: int,
        sources: "Sources | None" = None,
    ) -> "TextTableIndex":
        """The contents before any shard is made."""
        empty_text = embeddings(read, [""])
        dtype = "int32" if isinstance(encoder, Tokenizer) else encoder.dtype
        columns = {
            "tokens": Column(dtype=dtype, shape=tuple(empty_text.tokens.shape[2:]), lengths="lengths"),
            "lengths": Column(dtype="int64"),
        }
        if isinstance(encoder, Prompts) and encoder.padded:
            columns["mask"] = Column(dtype="bool", lengths="lengths")
        if empty_text.pooled is not None:
            columns["pooled"] = Column(dtype=dtype, shape=(empty_text.pooled.shape[1],))
        if sources:
            columns["source"] = Column(dtype=dtype, shape=sources.shape)
        return cls(
            columns=columns,
            rows=len(captions) + 1,
            shard_rows=shard_rows,
            encoder=encoder,
            model="tokens" if isinstance(encoder, Tokenizer) else encoder.model_type(),
            sha256=read.sha256,
            digest=digest.short(*captions),
            codec=sources.sha256 if sources else None,
        )

    @property
    def captions(self) -> int:
        """How many there are."""
        return self.rows - 1

    @property
    def width(self) -> int:
        """The numbers of a token's embedding; 0: tokens are ids."""
        return sum(self.columns["tokens"].shape)

    @property
    def pooled(self) -> int:
        """The numbers of a text's embedding; 0: there is none."""
        return sum(self.columns["pooled"].shape) if "pooled" in self.columns else 0

    @property
    def source(self) -> tuple[int, ...]:
        """The shape of the latent of an image that is edited; (): none is."""
        return self.columns["source"].shape if "source" in self.columns else ()

    @property
    def dtype(self) -> torch.dtype:
        """The type of stored tokens."""
        return self.columns["tokens"].torch_dtype

    def summary(self) -> str:
        """What a whole table holds, in words."""
        words = f"{self.captions:,} captions and the empty one by {self.model}, "
        if not isinstance(self.encoder, Prompts):
            words += f"up to {self.encoder.length} "
        words += f"tokens of {self.width} numbers" if self.width else "numbers of tokens"
        if self.pooled:
            words += f", and {self.pooled} of the whole text"
        return words

    def binding(self) -> dict[str, Any]:
        """All but the encoder's folder, for its hash is there."""
        fields = super().binding()
        encoder: dict[str, Any] = fields.pop("encoder")
        encoder_fields = {f"encoder.{name}": value for name, value in encoder.items() if name != "source"}
        return encoder_fields | fields

    @property
    def identity(self) -> str:
        """A short digest of the encoder's weights, the way it is read, and the captions."""
        entries = self.binding()
        return digest.short(*(f"{key} {entries[key]}" for key in sorted(entries) if key != "shard_rows"))


@dataclass(frozen=True)
class Sources:
    """The images that captions edit, as latents."""

    shape: tuple[int, ...]  # channels, height, width
    sha256: str  # of the codec's weights
    read: Callable[[Sequence[str]], Float[Tensor, "b c h w"]]  # of images by their hashes

    def of(self, captions: Sequence[str]) -> Float[Tensor, "b c h w"]:
        """Those of captions; zeros where one edits none."""
        hashes = [parted(caption)[1] for caption in captions]
        latents = torch.zeros(len(captions), *self.shape)
        editing = [i for i, sha256 in enumerate(hashes) if sha256]
        if editing:
            latents[editing] = self.read([hashes[i] for i in editing]).to(latents)
        return latents


@dataclass(frozen=True)
class EncodedTexts:
    """Encoded texts."""

    folder: Path
    contents: TextTableIndex

    def __len__(self) -> int:
        """The number of rows; the last is for no caption."""
        return self.contents.rows

    def __deepcopy__(self, memo: dict[int, Any]) -> "EncodedTexts":
        """Itself: it never changes."""
        return self

    def padded(self, rows: Sequence[int] | None = None) -> Rows:
        """Tokens (b, l, d), or ids (b, l), zero after the last; mask; pooled or None; in their stored types.

        `rows` None: all, and shards are compared with their checksums. l is the length of the encoder. Raises UserError
        for a damaged shard.
        """
        if rows is None:
            table.require(self.folder, self.contents, deep=True)
        numbers = range(len(self)) if rows is None else rows
        contents = self.contents
        b = len(numbers)
        tokens = torch.zeros(b, self.longest, *contents.columns["tokens"].shape, dtype=contents.dtype)
        mask = torch.zeros(b, self.longest, dtype=torch.bool)
        pooled = torch.empty(b, contents.pooled, dtype=contents.dtype) if contents.pooled else None
        for i, number in enumerate(numbers):
            shard, token_ends, row = self._find_row(number)
            length = int(shard["lengths"][row])
            entries = slice(token_ends[row] - length, token_ends[row])
            tokens[i, :length] = shard["tokens"][entries]
            mask[i, :length] = shard["mask"][entries] if "mask" in shard else True
            if pooled is not None:
                pooled[i] = shard["pooled"][row]
        if not contents.width:  # ids
            tokens = tokens.long()
        return tokens, mask, pooled

    def sources(self, rows: Sequence[int] | None = None) -> Float[Tensor, "b c h w"] | None:
        """The latents of the images that captions edit, in their stored type; None: they edit none."""
        if not self.contents.source:
            return None
        numbers = range(len(self)) if rows is None else rows
        latents = torch.empty(len(numbers), *self.contents.source, dtype=self.contents.dtype)
        for i, number in enumerate(numbers):
            shard, _, row = self._find_row(number)
            latents[i] = shard["source"][row]
        return latents

    @cached_property
    def longest(self) -> int:
        """The tokens of a row, with padding: the most that an encoder gives, or the most that a pipeline gave."""
        if not isinstance(self.contents.encoder, Prompts):
            return self.contents.encoder.length
        return max(self.lengths)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """The tokens of each row, without padding."""
        lengths: list[int] = []
        for number in range(self.contents.count):
            shard, _ = self._read_shard(number)
            lengths += shard["lengths"].tolist()
        return tuple(lengths)

    @cached_property
    def captions(self) -> tuple[str, ...]:
        """The texts in their order. Raises UserError where they are not those that were encoded."""
        return read_captions(self.folder, self.contents.digest)

    @cached_property
    def audit(self) -> Audit:
        """Compares the shards with their checksums; for who looks up rows pass by pass."""
        return Audit(self.folder, self.contents.shards)

    @cached_property
    def _table(self) -> table.ShardTable:
        return table.ShardTable(self.folder, self.contents)

    def _find_row(self, number: int) -> tuple[dict[str, Tensor], list[int], int]:
        """The shard that has a row, the end of each of its rows in `tokens`, and the row, counted from the end."""
        ends = self._table.ends
        shard_number = bisect_right(ends, number)
        shard, token_ends = self._read_shard(shard_number)
        return shard, token_ends, number - ends[shard_number]

    @cached_property
    def _read_shard(self) -> Callable[[int], tuple[dict[str, Tensor], list[int]]]:
        """A function from a shard's number to its tensors, mapped into memory, and the end of each row in `tokens`."""

        @lru_cache(MAX_MAPPED)
        def read_shard(number: int) -> tuple[dict[str, Tensor], list[int]]:
            shard = self._table.tensors(number)
            return shard, shard["lengths"].cumsum(0).tolist()

        return read_shard


def open_table(folder: Path) -> EncodedTexts:
    """Open a table to read it. Raises UserError where there is none, it is unfinished, or a shard is not as it was."""
    missing = f"holds no texts (it has no {FILE}): make it, dumo encode RECIPE"
    return EncodedTexts(folder, table.read_finished(folder, TextTableIndex, missing))


def require(table: EncodedTexts, encoder: Reader, captions: int, identity: str | None = None) -> None:
    """Raise UserError where a table has another number of captions, encoder, or identity (None: any)."""
    contents = table.contents
    if contents.captions != captions:
        raise UserError(
            f"net.texts.root: {table.folder} holds {contents.captions:,} captions, and the data have {captions:,}: "
            "make one of these data in another folder, dumo encode RECIPE --set net.texts.root=DIR"
        )
    stored = contents.binding()
    requested = contents.model_copy(update={"encoder": encoder}).binding()
    lines = [
        f"{field}: {stored.get(field)} there, {requested.get(field)} asked"
        for field in stored | requested  # a field without its default is in one of them alone
        if requested.get(field) != stored.get(field)
    ]
    if lines:
        listed = "\n  ".join(lines)
        raise UserError(
            f"net.texts.root: {table.folder} was encoded otherwise:\n  {listed}\nEncode into another folder, or ask "
            "for what is there"
        )
    if identity not in (None, contents.identity):
        raise UserError(
            f"net.texts.root: {table.folder} is another table than that of this run (identity {contents.identity}, and "
            f"{identity} in net.texts): put it back, or encode the same captions by the same encoder"
        )


def read_contents(folder: Path) -> TextTableIndex | None:
    """The contents of index.json, or None where there is none. Raises UserError if it is damaged."""
    return table.read(folder, TextTableIndex)


def read_captions(folder: Path, expected_digest: str) -> tuple[str, ...]:
    """The captions of a folder. Raises UserError where they are missing, damaged, or not those of the digest."""
    file = folder / CAPTIONS
    lines = read_text(file, REMAKE, MAX_CAPTIONS_BYTES).split("\n")
    try:
        texts = tuple(str(json.loads(line)) for line in lines if line)
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}): {REMAKE}") from error
    if digest.short(*texts) != expected_digest:
        raise UserError(f"{file} holds other captions than {FILE} says: {REMAKE}")
    return texts


def encode(
    captions: Sequence[str],
    encoder: Reader,
    out: Path,
    *,
    shard_rows: int = 1024,
    batch: int = 32,
    sources: Sources | None = None,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    tick: Tick = lambda done, note: None,
) -> MakeResult:
    """Make this rank's shards that are missing or damaged. Another batch may change the last bits.

    Warns where texts are cut. Raises UserError where there are no captions, an embedding is too large for the dtype,
    and as opening the encoder does; Stopped after a signal; and as `dumo.io.table.make`.
    """
    if not captions:
        raise UserError("there are no captions to encode: give data.captions, and images that have some")
    read = encoder.open() if isinstance(encoder, Tokenizer) else encoder.open(device)
    contents = TextTableIndex.of(captions, encoder, read, shard_rows, sources)
    texts = [*captions, ""]

    has_masks = "mask" in contents.columns
    types = {name: column.torch_dtype for name, column in contents.columns.items()}

    def encode_shard(number: int, report: Callable[[int], None]) -> dict[str, Tensor]:
        """The columns of a shard; `report` is called with the number of rows that are done."""
        rows = contents.span(number)
        batches: list[dict[str, Tensor]] = []
        for first in rows[::batch]:
            signals.check()
            batch_texts = texts[first : min(first + batch, rows.stop)]
            columns = unpadded(embeddings(read, batch_texts), masks=has_masks)
            if sources:
                columns["source"] = sources.of(batch_texts)
            batches.append(columns)
            report(first + len(batch_texts) - rows.start)
        whole = {name: torch.cat([columns[name] for columns in batches]) for name in batches[0]}
        return in_stored_types(whole, types)

    lines = "".join(f"{json.dumps(text, ensure_ascii=False)}\n" for text in captions)
    return table.make(
        out, contents, encode_shard, rank=rank, world=world, extra_files={CAPTIONS: lines.encode()}, tick=tick
    )


def embeddings(read: EncoderModel | PromptReader | LoadedTokenizer, texts: Sequence[str]) -> Embeddings:
    """The embeddings of texts, padded; ids where there is no encoder."""
    texts = [parted(text)[0] for text in texts]
    if not isinstance(read, LoadedTokenizer):
        return read(texts)
    ids, mask = read(texts, fills_length=False)
    return Embeddings(ids, mask, None)


def unpadded(rows: Embeddings, *, masks: bool) -> dict[str, Tensor]:
    """The columns of these rows; with `masks`, padding is kept, and the masks."""
    kept = torch.ones_like(rows.mask) if masks else rows.mask
    columns = {"lengths": kept.sum(1), "tokens": rows.tokens[kept]}
    if masks:
        columns["mask"] = rows.mask[kept]
    if rows.pooled is not None:
        columns["pooled"] = rows.pooled
    return columns


def in_stored_types(tensors: Mapping[str, Tensor], types: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Columns in the stored types. Raises UserError where they are not finite there."""
    stored = {name: tensor.to(types[name]) for name, tensor in tensors.items()}
    for tensor in stored.values():
        if not tensor.isfinite().all():
            dtype = str(types["tokens"]).removeprefix("torch.")
            raise UserError(f"the encoder gives no numbers, or too large ones for {dtype}: set its dtype=bfloat16")
    return stored
