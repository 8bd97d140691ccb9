"""A table of texts (`dumo.io.table`): how captions are encoded into one, and how it is read.

    tokens     embeddings (m, d) of a shard's rows one after the other, without padding; ids (m,) where the encoder is
               trained with the net
    lengths    the number of tokens in each row
    mask       of a pipeline that reads padding, too: which tokens are no padding
    pooled     an embedding (p,) of each text, where there is one
    source     the latent (c, h, w) of the image that a text edits, where it edits one; zeros for no caption

Row k is of caption k of captions.jsonl, a string of JSON per line, and the last row of the empty text, which stands for
no caption. A shard is encoded in the same batches from its own first row.
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
from dumo.encoders.text import Embeddings, Encoder, EncoderModel
from dumo.encoders.tokens import Cutter, Tokenizer
from dumo.io import digest, table
from dumo.io.audit import Audit
from dumo.io.read import read_text
from dumo.io.table import FILE, MAPPED, REMAKE, Column, Done, Index, Tick
from dumo.runtime import signals
from dumo.types import UserError

CAPTIONS = "captions.jsonl"
LARGEST = 2**34  # bytes of captions.jsonl; ours
Reader = Annotated[Encoder | Prompts | Tokenizer, Field(discriminator="kind")]
Rows = tuple[Shaped[Tensor, "b l *d"], Bool[Tensor, "b l"], Float[Tensor, "b p"] | None]


class TextTableIndex(Index):
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
        read: EncoderModel | PromptReader | Cutter,
        shard_rows: int,
        sources: "Sources | None" = None,
    ) -> "TextTableIndex":
        """The contents before any shard is made."""
        one = embeddings(read, [""])
        dtype = "int32" if isinstance(encoder, Tokenizer) else encoder.dtype
        columns = {
            "tokens": Column(dtype=dtype, shape=tuple(one.tokens.shape[2:]), lengths="lengths"),
            "lengths": Column(dtype="int64"),
        }
        if isinstance(encoder, Prompts) and encoder.padded:
            columns["mask"] = Column(dtype="bool", lengths="lengths")
        if one.pooled is not None:
            columns["pooled"] = Column(dtype=dtype, shape=(one.pooled.shape[1],))
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
        width = f"tokens of {self.width} numbers" if self.width else "numbers of tokens"
        pooled = f", and {self.pooled} of the whole text" if self.pooled else ""
        texts = f"{self.captions:,} captions and the empty one by {self.model}"
        most = "" if isinstance(self.encoder, Prompts) else f"up to {self.encoder.length} "
        return f"{texts}, {most}{width}{pooled}"

    def binding(self) -> dict[str, Any]:
        """All but the encoder's folder, for its hash is there."""
        tree = super().binding()
        encoder = {f"encoder.{key}": value for key, value in tree.pop("encoder").items() if key != "source"}
        return encoder | tree

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
        found = torch.zeros(len(hashes), *self.shape)
        if there := [i for i, sha256 in enumerate(hashes) if sha256]:
            found[there] = self.read([hashes[i] for i in there]).to(found)
        return found


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
        at = range(len(self)) if rows is None else rows
        contents, longest = self.contents, self.longest
        tokens = torch.zeros(len(at), longest, *contents.columns["tokens"].shape, dtype=contents.dtype)
        pooled = torch.empty(len(at), contents.pooled, dtype=contents.dtype) if contents.pooled else None
        mask = torch.zeros(len(at), longest, dtype=torch.bool)
        for i, row in enumerate(at):
            number = bisect_right(self._table.ends, row)
            inside = row - self._table.ends[number]  # counted from the end
            shard, ends = self._shard(number)
            n = int(shard["lengths"][inside])
            entries = slice(ends[inside] - n, ends[inside])
            tokens[i, :n], mask[i, :n] = shard["tokens"][entries], shard["mask"][entries] if "mask" in shard else True
            if pooled is not None:
                pooled[i] = shard["pooled"][inside]
        tokens = tokens if contents.width else tokens.long()
        return tokens, mask, pooled

    def sources(self, rows: Sequence[int] | None = None) -> Float[Tensor, "b c h w"] | None:
        """The latents of the images that captions edit, in their stored type; None: they edit none."""
        if not self.contents.source:
            return None
        at, ends = range(len(self)) if rows is None else rows, self._table.ends
        found = torch.empty(len(at), *self.contents.source, dtype=self.contents.dtype)
        for i, row in enumerate(at):
            number = bisect_right(ends, row)
            found[i] = self._shard(number)[0]["source"][row - ends[number]]
        return found

    @cached_property
    def longest(self) -> int:
        """The tokens of a row, with padding: the most that an encoder gives, or the most that a pipeline gave."""
        if not isinstance(self.contents.encoder, Prompts):
            return self.contents.encoder.length
        return max(self.lengths)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """The tokens of each row, without padding."""
        return tuple(n for i in range(self.contents.count) for n in self._shard(i)[0]["lengths"].tolist())

    @cached_property
    def captions(self) -> tuple[str, ...]:
        """The texts in their order. Raises UserError where they are not those that were encoded."""
        return read_captions(self.folder, self.contents.digest)

    @cached_property
    def audit(self) -> Audit:
        """Compares the shards with their checksums; for who looks up rows pass by pass."""
        return Audit(self.folder, self.contents.shards)

    @cached_property
    def _table(self) -> table.Table:
        return table.Table(self.folder, self.contents)

    @cached_property
    def _shard(self) -> Callable[[int], tuple[dict[str, Tensor], list[int]]]:
        """A function from a shard's number to its tensors, mapped into memory, and the end of each row in `tokens`."""

        @lru_cache(MAPPED)
        def shard_of(number: int) -> tuple[dict[str, Tensor], list[int]]:
            found = self._table.tensors(number)
            return found, found["lengths"].cumsum(0).tolist()

        return shard_of


def open_table(folder: Path) -> EncodedTexts:
    """Open a table to read it. Raises UserError where there is none, it is unfinished, or a shard is not as it was."""
    missing = f"holds no texts (it has no {FILE}): make it, dumo encode RECIPE"
    return EncodedTexts(folder, table.read_whole(folder, TextTableIndex, missing))


def require(table: EncodedTexts, encoder: Reader, captions: int, identity: str | None = None) -> None:
    """Raise UserError where a table has another number of captions, encoder, or identity (None: any)."""
    has = table.contents
    there, now = (one.binding() for one in (has, has.model_copy(update={"encoder": encoder})))
    lines = [f"{key}: {there.get(key)} there, {now[key]} asked" for key in now if now[key] != there.get(key)]
    if has.captions != captions:
        wrong = (
            f"holds {has.captions:,} captions, and the data have {captions:,}: make one of these data in another "
            "folder, dumo encode RECIPE --set net.texts.root=DIR"
        )
    elif lines:
        listed = "\n  ".join(lines)
        wrong = f"was encoded otherwise:\n  {listed}\nEncode into another folder, or ask for what is there"
    elif identity not in (None, has.identity):
        wrong = (
            f"is another table than that of this run (identity {has.identity}, and {identity} in net.texts): put it "
            "back, or encode the same captions by the same encoder"
        )
    else:
        return
    raise UserError(f"net.texts.root: {table.folder} {wrong}")


def read_contents(folder: Path) -> TextTableIndex | None:
    """The contents of index.json, or None where there is none. Raises UserError if it is damaged."""
    return table.read(folder, TextTableIndex)


def read_captions(folder: Path, wanted: str) -> tuple[str, ...]:
    """The captions of a folder. Raises UserError where they are missing, damaged, or not those of the digest."""
    file = folder / CAPTIONS
    lines = read_text(file, REMAKE, LARGEST).split("\n")
    try:
        texts = tuple(str(json.loads(line)) for line in lines if line)
        wrong = "" if digest.short(*texts) == wanted else f"holds other captions than {FILE} says"
    except ValueError as error:
        texts, wrong = (), f"is damaged ({error})"
    if wrong:
        raise UserError(f"{file} {wrong}: {REMAKE}")
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
) -> Done:
    """Make this rank's shards that are missing or damaged. Another batch may change the last bits.

    Warns where texts are cut. Raises UserError where there are no captions, an embedding is too large for the dtype,
    and as opening the encoder does; Stopped after a signal; and as `dumo.io.table.make`.
    """
    if not captions:
        raise UserError("there are no captions to encode: give data.captions, and images that have some")
    read = encoder.open() if isinstance(encoder, Tokenizer) else encoder.open(device)
    contents = TextTableIndex.of(captions, encoder, read, shard_rows, sources)
    texts = [*captions, ""]

    def shard(number: int, behind: Callable[[int], None]) -> dict[str, Tensor]:
        rows, parts = contents.span(number), list[dict[str, Tensor]]()
        for i in rows[::batch]:
            signals.check()
            some = texts[i : min(i + batch, rows.stop)]
            parts.append(unpadded(embeddings(read, some), masks="mask" in contents.columns))
            parts[-1] |= {"source": sources.of(some)} if sources else {}
            behind(i + len(some) - rows.start)
        types = {name: column.torch_dtype for name, column in contents.columns.items()}
        return in_stored_types({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, types)

    lines = "".join(f"{json.dumps(text, ensure_ascii=False)}\n" for text in captions)
    return table.make(out, contents, shard, rank=rank, world=world, others={CAPTIONS: lines.encode()}, tick=tick)


def embeddings(read: EncoderModel | PromptReader | Cutter, texts: Sequence[str]) -> Embeddings:
    """The embeddings of texts, padded; ids where there is no encoder."""
    texts = [parted(text)[0] for text in texts]
    if not isinstance(read, Cutter):
        return read(texts)
    ids, mask = read(texts, whole=False)
    return Embeddings(ids, mask, None)


def unpadded(found: Embeddings, *, masks: bool) -> dict[str, Tensor]:
    """The columns of these rows; with `masks`, padding is kept, and the masks."""
    kept = torch.ones_like(found.mask) if masks else found.mask
    parts = {"lengths": kept.sum(1), "tokens": found.tokens[kept]}
    parts |= {"mask": found.mask[kept]} if masks else {}
    return parts if found.pooled is None else {**parts, "pooled": found.pooled}


def in_stored_types(tensors: Mapping[str, Tensor], types: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Columns in the stored types. Raises UserError where they are not finite there."""
    kept = {name: x.to(types[name]) for name, x in tensors.items()}
    if not all(bool(x.isfinite().all()) for x in kept.values()):
        kind = str(types["tokens"]).removeprefix("torch.")
        raise UserError(f"the encoder gives no numbers, or too large ones for {kind}: set its dtype=bfloat16")
    return kept
