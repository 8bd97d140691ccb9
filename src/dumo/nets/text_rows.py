"""Rows of text by number: what a net that reads text looks up for a condition c.

The rows of a data set with n captions have these numbers: 0 to n - 1 are the captions, n is the empty text, which means
no caption, and the prompts of sampling follow.

`Texts` is what a net calls: `forward` in every pass, and for some models `sources` and `lengths`. A sampler calls
`append` to add prompts, and notes the number of each in `prompts`, the last used at the end. `forget` drops the oldest
of these. There are two kinds of texts: `Rows` are embeddings of a frozen encoder (`dumo.nets.text_spec`), and
`TokenTexts` are token ids, with an encoder that is trained with the net (`dumo.nets.learned`).

A net is built without its rows, because its spec knows the number of captions and not the captions; `TextsSpec.load`
fills them in. `Rows` come from a store: `CachedStore`, of captions in a cache (`dumo.encoders.textcache`), or
`RandomStore`, to test or time a net. `make_codes` makes random rows for classes, without any text.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, Protocol, Self

import torch
from jaxtyping import Bool, Float, Int64
from pydantic import PrivateAttr
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from dumo.encoders.textcache import StoredRow, TextTable, used_tables
from dumo.encoders.textreader import TextReader
from dumo.flow.precision import to_float32
from dumo.io import table
from dumo.io.audit import Audit
from dumo.runtime.random import keyed_normal, stream
from dumo.types import Cond, Spec, UserError

Tokens = Float[Tensor, "b l d"]
# tokens; a mask, True where there is a token (None: everywhere); the pooled embedding (None: the model takes none)
TextRows = tuple[Tokens, Bool[Tensor, "b l"] | None, Float[Tensor, "b p"] | None]
SourceLatents = Float[Tensor, "b c h w"]  # latents of images that texts edit

_NO_ENCODER = "this net was trained on rows whose encoder is not known, so it reads no prompts: give labels"
_NUM_RANDOM_ROWS = 16


class TextSizes(NamedTuple):
    """The sizes of rows of text."""

    length: int  # the most tokens of a row
    width: int  # channels of a token
    pooled_width: int  # channels of the pooled embedding; 0: there is none
    has_mask: bool  # whether rows have a mask, because some may be padded
    dtype: torch.dtype


class TextsSpec(Spec):
    """What net.texts says in run.yaml: a spec that builds `Texts`."""

    _has_random_rows: bool = PrivateAttr(default=False)

    def with_random_rows(self) -> Self:
        """Return the spec of texts that need no captions and no encoder, to test or time a net."""
        spec = self.model_copy()
        spec._has_random_rows = True
        return spec

    @abstractmethod
    def load(self, texts: "Texts", captions: Sequence[str]) -> None:
        """Hand the module that this spec built the captions of the data; () if they are not on this machine."""


class Texts(nn.Module, ABC):
    """Rows of text by number: one for each class or caption, then one for none, then those of prompts (`append`)."""

    width: int  # channels of a token
    pooled_width: int  # channels of the pooled embedding; 0: there is none
    has_mask: bool = True  # whether rows have a mask; False: every token is there
    lengths_differ: bool = False  # whether rows differ in their number of tokens, without padding

    def __init__(self) -> None:
        """Begin without prompts."""
        super().__init__()
        # The number of each prompt's row. The caller of `append` adds prompts, and moves one that is used again to the
        # end. `forget` renumbers those that stay.
        self.prompts: dict[str, int] = {}

    @abstractmethod
    def forward(self, c: Cond) -> TextRows:
        """Return tokens (b, l, d), mask (b, l) or None, and pooled embeddings (b, p) or None, of rows c (b,)."""

    def sources(self, c: Cond) -> SourceLatents | None:
        """Return the latents (b, c, h, w) of the images that rows c (b,) edit; None if texts edit none."""
        return None

    def lengths(self, c: Cond) -> tuple[int, ...] | None:
        """Return the number of tokens of each row of c (b,), without padding; None if there is no mask."""
        return None

    @abstractmethod
    def append(self, texts: Sequence[str], source: SourceLatents | None = None) -> int:
        """Add a row for each text, with the image that it edits, behind all others; return the first one's number.

        It leaves `prompts` as they are, which the caller keeps. Raises UserError if no encoder is known, or it is
        another than that of the rows.
        """

    @abstractmethod
    def keep(self, first: int, rows: Sequence[int]) -> None:
        """Keep all rows before number `first`, and behind them only the rows of the numbers `rows`, in this order."""

    def forget(self, max_prompts: int) -> None:
        """Drop the rows of all prompts but the last `max_prompts` of `prompts`, and renumber those that stay."""
        if len(self.prompts) <= max_prompts:
            return
        first = min(self.prompts.values())
        last_prompts = [*self.prompts][len(self.prompts) - max_prompts :]
        self.keep(first, [self.prompts[text] for text in last_prompts])
        self.prompts = {text: first + i for i, text in enumerate(last_prompts)}


class RowStore(Protocol):
    """Encoded texts on the host."""

    length: int | None  # tokens that rows are padded to; None: those of the longest in a pass
    lengths_differ: bool  # whether rows differ in their number of tokens

    def row(self, number: int, device: torch.device) -> StoredRow:
        """Return the row of a caption, or of the empty text, on the CPU. It may be encoded on `device`."""
        ...

    def encode(self, texts: Sequence[str], device: torch.device) -> list[StoredRow]:
        """Encode prompts on `device`, and return their rows on the CPU."""
        ...


class CachedStore:
    """Captions and the empty text in a cache. Those that it lacks, and prompts, are encoded on demand."""

    def __init__(
        self,
        tables: Sequence[TextTable],
        places: Int64[Tensor, "n 2"],
        captions: Sequence[str],
        count: int,
        reader: TextReader,
        length: int | None = None,
    ) -> None:
        """Hold open tables, and where in them the `captions` and the empty text are (`textcache.find_rows`).

        count: the number of captions of the data. `captions` is empty if they are not on this machine.
        length: tokens that rows are padded to; None: those of the longest row, if all rows are in the cache.
        """
        self.tables = tables
        self.places = places
        self.captions = captions
        self.count = count
        self.reader = reader
        self.is_whole = len(captions) == count and bool((places[:, 0] >= 0).all())
        lengths = {tables[i].lengths[row] for i, row in places.tolist()} if self.is_whole else set[int]()
        self.length = max(lengths) if lengths and length is None else length
        self.lengths_differ = len(lengths) != 1
        self.used_tables = used_tables(tables, places)
        self.audits: list[Audit] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "CachedStore":
        """Return itself, because it never changes: a net and its averages share it."""
        return self

    def verify(self) -> None:
        """Compare all shards with their checksums. Raises UserError if one has changed."""
        for text_table in self.used_tables:
            table.require_intact(text_table.folder, text_table.index, deep=True)

    def begin_audit(self) -> None:
        """Compare the shards with their checksums while rows are read. Raises UserError as `dumo.io.audit.Audit`."""
        self.audits = [Audit(text_table.folder, text_table.index.shards) for text_table in self.used_tables]

    def row(self, number: int, device: torch.device) -> StoredRow:
        """Return the row of a caption, or of the empty text.

        Raises UserError for a caption that is not known here, and if a shard was found that has changed.
        """
        for audit in self.audits:
            audit.require()
        is_caption = number < self.count
        if is_caption and not self.captions:
            raise UserError(
                "net.texts: the data's captions are not on this machine: set data.root, or sample by prompts"
            )
        place = number if is_caption else len(self.captions)
        table_number, row = self.places[place].tolist()
        if table_number >= 0:
            return self.tables[table_number].row(row)
        return self.reader([self.captions[number] if is_caption else ""], device)[0]

    def encode(self, texts: Sequence[str], device: torch.device) -> list[StoredRow]:
        """Encode prompts. Raises UserError as the reader does."""
        return self.reader(texts, device)


class RandomStore:
    """Random rows of the largest sizes: row i has 1 + i tokens, modulo the length and modulo _NUM_RANDOM_ROWS."""

    lengths_differ = True

    def __init__(self, sizes: TextSizes, source_shape: tuple[int, ...] = ()) -> None:
        """`source_shape` is the shape of the latents of images that texts edit; (): they edit none."""
        self.length: int | None = sizes.length
        self._draw = lru_cache(_NUM_RANDOM_ROWS)(lambda number: _draw_row(sizes, source_shape, number))

    def __deepcopy__(self, memo: dict[int, Any]) -> "RandomStore":
        """Return itself, because it never changes."""
        return self

    def row(self, number: int, device: torch.device) -> StoredRow:
        """Return a row, the same for the same number."""
        return self._draw(number % _NUM_RANDOM_ROWS)

    def encode(self, texts: Sequence[str], device: torch.device) -> list[StoredRow]:
        """Raise UserError, because there is no encoder."""
        raise UserError(_NO_ENCODER)


def _draw_row(sizes: TextSizes, source_shape: tuple[int, ...], number: int) -> StoredRow:
    """Draw a row from N(0, 1) by its number. Without a mask it has all tokens."""
    generator = stream("texts", number)
    length = number % sizes.length + 1 if sizes.has_mask else sizes.length
    row = {"tokens": torch.randn(length, sizes.width, generator=generator, device="cpu")}
    if sizes.pooled_width:
        row["pooled"] = torch.randn(sizes.pooled_width, generator=generator, device="cpu")
    if source_shape:
        row["source"] = torch.randn(source_shape, generator=generator, device="cpu")
    return row


class Rows(Texts):
    """Embeddings of texts: tensors on the net's device, or rows of a store on the host, joined pass by pass.

    Tensors are buffers that no checkpoint holds. They may be stored in half precision. They are used until there are
    prompts; then all rows of a pass come from the store.
    """

    like: Tensor  # an empty buffer, which moves with the net: rows of the store get its device and dtype
    tokens: Tensor | None  # (n, l, d)
    mask: Tensor | None  # (n, l), bool; None: every token is there
    pooled: Tensor | None  # (n, p)
    source: Tensor | None  # (n, c, h, w)

    def __init__(self, sizes: TextSizes, count: int, source_shape: tuple[int, ...] = ()) -> None:
        """Make texts of these sizes for `count` captions or classes, without rows (`hold`, `hold_tensors`).

        source_shape: of the latents of images that texts edit; (): they edit none.
        """
        super().__init__()
        self.width = sizes.width
        self.pooled_width = sizes.pooled_width
        self.has_mask = sizes.has_mask
        self.count = count
        self.source_shape = source_shape
        self.store: RowStore | None = None
        self.prompt_rows: list[StoredRow] = []
        self.register_buffer("like", torch.empty(0), persistent=False)
        for name in ("tokens", "mask", "pooled", "source"):
            self.register_buffer(name, None, persistent=False)

    def hold(self, store: RowStore, *, on_device: bool) -> None:
        """Take the rows of a store; `on_device`: copy all of them to the device now."""
        self.store = store
        self.lengths_differ = store.lengths_differ and self.has_mask
        if on_device:
            rows = [store.row(number, self.like.device) for number in range(self.count + 1)]
            tokens, mask, pooled = self._join(rows)
            source = self._join_sources(rows)
            device = self.like.device
            self.hold_tensors(
                tokens.to(device),
                None if mask is None else mask.to(device),
                None if pooled is None else pooled.to(device),
                None if source is None else source.to(device),
            )

    def hold_tensors(
        self, tokens: Tensor, mask: Tensor | None, pooled: Tensor | None, source: Tensor | None = None
    ) -> None:
        """Take the rows of all captions or classes, and of none at the end, on the device.

        tokens: (n, l, d). mask: (n, l). pooled: (n, p). source: (n, c, h, w).
        """
        self.tokens = tokens
        self.mask = mask
        self.pooled = pooled
        self.source = source

    def forward(self, c: Cond) -> TextRows:
        """Return the rows of c (b,): those on the device in float32, those of the store in the type of the net."""
        if self.tokens is not None and not self.prompt_rows:
            mask = self.mask
            pooled = self.pooled
            return (
                to_float32(self.tokens[c]),
                None if mask is None else mask[c],
                None if pooled is None else to_float32(pooled[c]),
            )
        tokens, mask, pooled = self._join(self._rows_of(c))
        return (
            tokens.to(self.like),
            None if mask is None else mask.to(self.like.device),
            None if pooled is None else pooled.to(self.like),
        )

    def sources(self, c: Cond) -> SourceLatents | None:
        """Return the latents (b, c, h, w) of the images that rows c (b,) edit; None if texts edit none."""
        if self.source is not None and not self.prompt_rows:
            return to_float32(self.source[c])
        if not self.source_shape:
            return None
        source = self._join_sources(self._rows_of(c))
        return None if source is None else source.to(self.like)

    def lengths(self, c: Cond) -> tuple[int, ...] | None:
        """Return the number of tokens of each row of c (b,); None if there is no mask, and on the meta device."""
        if not self.has_mask or self.like.is_meta:
            return None
        rows = self._rows_of(c)
        return tuple(int(row["mask"].sum()) if "mask" in row else len(row["tokens"]) for row in rows)

    def append(self, texts: Sequence[str], source: SourceLatents | None = None) -> int:
        """Encode prompts, and return the number of the first.

        `source` (b, c, h, w): an image for each prompt, if rows edit images. Raises UserError if there is no encoder,
        it cannot be opened, or `source` is missing or superfluous.
        """
        if self.store is None:
            raise UserError(_NO_ENCODER)
        if self.source_shape and source is None:
            raise UserError("these rows edit images, and the prompts have none: give an image for each prompt")
        if not self.source_shape and source is not None:
            raise UserError("these rows edit no images, and the prompts have some: leave the images out")
        rows = self.store.encode(texts, self.like.device)
        if source is not None:
            rows = [row | {"source": latent} for row, latent in zip(rows, source.to(rows[0]["tokens"]), strict=True)]
        first = self.count + 1 + len(self.prompt_rows)
        self.prompt_rows += rows
        self.lengths_differ = self.has_mask
        return first

    def keep(self, first: int, rows: Sequence[int]) -> None:
        """Keep all rows before number `first`, and behind them only the rows of the numbers `rows`, in this order."""
        kept = [self.prompt_rows[number - self.count - 1] for number in rows]
        self.prompt_rows = [*self.prompt_rows[: first - self.count - 1], *kept]

    def _rows_of(self, c: Cond) -> list[StoredRow]:
        """The rows of c (b,), on the host. Waits for the device of c. Raises UserError as the store does."""
        assert self.store is not None, "rows are held before they are read"
        rows: list[StoredRow] = []
        for number in c.tolist():
            if number > self.count:
                rows.append(self.prompt_rows[number - self.count - 1])
            else:
                rows.append(self.store.row(number, self.like.device))
        return rows

    def _join(self, rows: Sequence[StoredRow]) -> TextRows:
        """Join rows, padded with zeros to the length of the store, or to the longest prompt."""
        assert self.store is not None
        length = self.store.length or 0
        if length:
            length = max(length, *(len(row["tokens"]) for row in self.prompt_rows), 0)
        tokens = pad_tokens(pad_sequence([row["tokens"] for row in rows], batch_first=True), length)
        mask = None
        if self.has_mask:
            masks = [row.get("mask", _all_true(len(row["tokens"]))) for row in rows]
            mask = pad_tokens(pad_sequence(masks, batch_first=True), length)
        pooled = torch.stack([row["pooled"] for row in rows]) if self.pooled_width else None
        return tokens, mask, pooled

    def _join_sources(self, rows: Sequence[StoredRow]) -> SourceLatents | None:
        """Join the latents of the images that rows edit; None if they edit none."""
        return torch.stack([row["source"] for row in rows]) if self.source_shape else None


def _all_true(length: int) -> Tensor:
    """A mask (length,) without padding, on the host."""
    return torch.ones(length, dtype=torch.bool, device="cpu")


class Codes(Spec):
    """A random code for each class, without any text: what is tuned then reads classes, and no prompt."""

    kind: Literal["codes"] = "codes"


def make_codes(classes: int, width: int, pooled_width: int) -> Rows:
    """Make a row of one token (width,) for each class and one for no class, from N(0, 1), the same in every run.

    With `pooled_width` > 0 each has a pooled embedding (pooled_width,), too.
    """
    codes = Rows(TextSizes(1, width, pooled_width, has_mask=False, dtype=torch.float32), classes)
    tokens = _draw_codes("tokens", classes + 1, width)[:, None]
    codes.hold_tensors(tokens, None, _draw_codes("pooled", classes + 1, pooled_width) if pooled_width else None)
    return codes


def _draw_codes(name: str, rows: int, width: int) -> Tensor:
    """Draw (rows, width) from N(0, 1), by the name; on the meta device without values."""
    if torch.get_default_device().type == "meta":
        return torch.empty(rows, width)
    return keyed_normal("codes", name, rows=range(rows), shape=(width,))


def pad_tokens(x: Tensor, length: int) -> Tensor:
    """Pad tokens (b, l, d) or a mask (b, l) with zeros to at least `length` tokens."""
    padding = [0, max(0, length - x.shape[1])]  # before and behind, on the axis of tokens
    if x.ndim == 3:
        padding = [0, 0, *padding]  # `F.pad` takes the last axis first
    return F.pad(x, padding)
