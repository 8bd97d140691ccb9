"""A table of texts: its format, and how it is read.

    texts.yaml                     the encoder, hash of its weights, number and digest of the captions, widths, shards
    captions.jsonl                 the captions in their order, a string of JSON per line
    shard-00000.safetensors        tokens, lengths, and pooled where there is

Row k is of caption k, and the last row of the empty text, which stands for no caption. `tokens` (m, d) are those of a
shard's rows one after the other, without padding; `lengths` (rows,) is their number in each row; `pooled` is (rows, p).
For an encoder that is trained with the net, tokens are ids (m,). Shards are mapped, so a table may exceed the memory.
"""

import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Shaped
from pydantic import Field
from torch import Tensor

from dumo.encoders.text import Encoder
from dumo.encoders.tokens import Tokenizer
from dumo.io import digest, series
from dumo.io.read import read_text
from dumo.io.table import REMAKE, Shard
from dumo.io.weights import load
from dumo.runtime.bound import CHANNELS, ROWS
from dumo.types import Spec, UserError

FILE, CAPTIONS = "texts.yaml", "captions.jsonl"
MAPPED = 2**14  # shards mapped at a time; Linux allows 65,530 maps. Ours
LARGEST = 2**34  # bytes of captions.jsonl; ours
Reader = Annotated[Encoder | Tokenizer, Field(discriminator="kind")]
Rows = tuple[Shaped[Tensor, "b l *d"], Bool[Tensor, "b l"], Float[Tensor, "b p"] | None]


class Contents(Spec):
    """The contents of texts.yaml."""

    word: ClassVar[str] = "table"
    format: Literal[1] = 1
    encoder: Reader
    model: str  # its name in the encoder's config.json; of token ids: tokens
    sha256: str  # of the encoder's weights; of token ids, of the vocabulary
    width: int = Field(ge=0, le=CHANNELS)  # of a token's embedding; 0: tokens are ids
    pooled: int = Field(default=0, ge=0, le=CHANNELS)  # of a text's embedding; 0: there is none
    captions: int = Field(ge=0)
    digest: str  # of the captions in their order
    shard_rows: int = Field(default=1024, gt=0, le=ROWS)
    shards: tuple[Shard, ...] = ()  # none until all are written

    @property
    def rows(self) -> int:
        """A row for each caption, and one for none."""
        return self.captions + 1

    @property
    def count(self) -> int:
        """The number of shards, once all are written."""
        return -(-self.rows // self.shard_rows)

    def span(self, number: int) -> range:
        """The rows in a shard."""
        return series.span(number, self.shard_rows, self.rows)

    def binding(self) -> dict[str, object]:
        """The entries that must be equal to go on with a table; the encoder by its hash, not by its folder."""
        tree = self.model_dump(exclude={"shards": True, "encoder": {"source"}})
        encoder: dict[str, object] = tree.pop("encoder")
        return {f"encoder.{key}": value for key, value in encoder.items()} | tree

    @property
    def identity(self) -> str:
        """A short digest of the encoder's weights, the way it is read, and the captions."""
        entries = self.binding()
        return digest.short(*(f"{key} {entries[key]}" for key in sorted(entries) if key != "shard_rows"))

    def shapes(self, rows: int, tokens: int) -> dict[str, tuple[int, ...]]:
        """The shapes of a shard's tensors, for its numbers of rows and of tokens."""
        pooled = {"pooled": (rows, self.pooled)} if self.pooled else {}
        return {"tokens": (tokens, self.width) if self.width else (tokens,), "lengths": (rows,), **pooled}

    @property
    def dtype(self) -> torch.dtype:
        """The type of stored tokens."""
        return getattr(torch, self.encoder.dtype) if isinstance(self.encoder, Encoder) else torch.int32


@dataclass(frozen=True)
class Table:
    """Encoded texts, opened to read."""

    folder: Path
    contents: Contents

    def __len__(self) -> int:
        """The number of rows; the last is for no caption."""
        return self.contents.rows

    def __deepcopy__(self, memo: dict[int, Any]) -> "Table":
        """Itself: it never changes."""
        return self

    def padded(self, rows: Sequence[int] | None = None, length: int | None = None) -> Rows:
        """Tokens (b, l, d), or ids (b, l), zero after the last; mask; pooled or None; in their stored types.

        `rows` None: all. `length` is l, by default that of the encoder. Raises UserError for a damaged shard.
        """
        at = range(len(self)) if rows is None else rows
        contents, longest = self.contents, length or self.contents.encoder.length
        shape = (len(at), longest, *contents.shapes(0, 0)["tokens"][1:])
        tokens, lengths = torch.zeros(shape, dtype=contents.dtype), torch.empty(len(at), dtype=torch.long)
        pooled = torch.empty(len(at), contents.pooled, dtype=contents.dtype) if contents.pooled else None
        for i, row in enumerate(at):
            number = bisect_right(self._ends, row)
            inside = row - (self._ends[number - 1] if number else 0)
            shard, ends = self._shard(number)
            n = int(shard["lengths"][inside])
            tokens[i, :n], lengths[i] = shard["tokens"][ends[inside] - n : ends[inside]], n
            if pooled is not None:
                pooled[i] = shard["pooled"][inside]
        tokens = tokens if contents.width else tokens.long()
        return tokens, torch.arange(longest) < lengths[:, None], pooled

    @cached_property
    def captions(self) -> tuple[str, ...]:
        """The texts in their order. Raises UserError where they are not those that were encoded."""
        return read_captions(self.folder, self.contents.digest)

    @cached_property
    def _ends(self) -> list[int]:
        """The number of the row after each shard."""
        return list(accumulate(shard.rows for shard in self.contents.shards))

    @cached_property
    def _shard(self) -> Callable[[int], tuple[dict[str, Tensor], list[int]]]:
        """A function from a shard's number to its tensors, mapped into memory, and the end of each row in `tokens`."""

        @lru_cache(MAPPED)
        def shard_of(number: int) -> tuple[dict[str, Tensor], list[int]]:
            shard, contents = self.contents.shards[number], self.contents
            found = load(self.folder / shard.file)
            ends = found["lengths"].cumsum(0).tolist() if "lengths" in found else []
            wanted = contents.shapes(shard.rows, ends[-1] if ends else 0)
            if {name: tuple(x.shape) for name, x in found.items()} != wanted or found["tokens"].dtype != contents.dtype:
                raise UserError(f"{self.folder}: {shard.file} holds other tensors than {FILE} says: {REMAKE}")
            return found, ends

        return shard_of


def open_table(folder: Path) -> Table:
    """Open a table to read it. Raises UserError where there is none, it is unfinished, or a shard is not as it was."""
    contents = read_contents(folder)
    if contents is None:
        raise UserError(f"{folder} holds no texts (it has no {FILE}): make it, dumo encode RECIPE")
    if not contents.shards:
        raise UserError(f"{folder} is unfinished: start the same dumo encode again, and it goes on where it stopped")
    series.require(folder, contents.shards)
    return Table(folder, contents)


def require(table: Table, encoder: Reader, captions: int, identity: str | None = None) -> None:
    """Raise UserError where a table has another number of captions, encoder, or identity (None: any)."""
    has, where = table.contents, f"net.texts.root: {table.folder}"
    if has.captions != captions:
        raise UserError(
            f"{where} holds {has.captions:,} captions, and the data have {captions:,}: make one of these data in "
            "another folder, dumo encode RECIPE --set net.texts.root=DIR"
        )
    there, now = (one.binding() for one in (has, has.model_copy(update={"encoder": encoder})))
    if lines := [f"{key}: {there.get(key)} there, {now[key]} asked" for key in now if now[key] != there.get(key)]:
        listed = "\n  ".join(lines)
        raise UserError(
            f"{where} was encoded otherwise:\n  {listed}\nEncode into another folder, or ask for what is there"
        )
    if identity not in (None, has.identity):
        raise UserError(
            f"{where} is another table than that of this run (identity {has.identity}, and {identity} in net.texts): "
            "put it back, or encode the same captions by the same encoder"
        )


def read_contents(folder: Path) -> Contents | None:
    """The contents of texts.yaml, or None where there is none. Raises UserError if it is damaged."""
    return series.read(folder / FILE, Contents)


def read_captions(folder: Path, wanted: str) -> tuple[str, ...]:
    """The captions of a folder. Raises UserError where they are missing, damaged, or not those of the digest."""
    file = folder / CAPTIONS
    if not file.is_file():
        raise UserError(f"{file} is not there: {REMAKE}")
    try:
        found: list[object] = [json.loads(line) for line in read_text(file, REMAKE, LARGEST).split("\n") if line]
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}): {REMAKE}") from error
    texts = tuple(str(text) for text in found)
    if digest.short(*texts) != wanted:
        raise UserError(f"{file} holds other captions than {FILE} says: {REMAKE}")
    return texts
