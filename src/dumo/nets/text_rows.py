"""Rows of text by number, which a network with text conditions looks up for c.

For a data set with n captions, rows 0 to n - 1 are the captions, row n is the empty text, which means no caption, and
prompts for sampling follow.

A network calls `Texts.forward` in every pass, and for some models `sources` and `lengths`. In training, the rows of a
step's captions are read ahead (`Rows.read_step`), and sent to the device once (`using_step_texts`). A sampler calls
`append` to add prompts, and stores their row numbers in `prompts`, the most recent last; `forget` removes the oldest.
There are two subclasses: `Rows` are embeddings of a frozen encoder (`dumo.nets.text_spec`), and `TokenTexts` are token
ids with an encoder that is trained with the network (`dumo.nets.learned`).

A network is built without rows, because its spec contains only the number of captions; `TextsSpec.load` adds them.
`Rows` read from a store: `CachedStore` for captions in a cache (`dumo.encoders.textcache`), or `RandomStore`, to test
or time a network. `make_codes` creates random rows for classes, without text.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
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
from dumo.types.batch_rows import to_device

Tokens = Float[Tensor, "b l d"]
# Tokens, a mask (False for padding; None without padding), and the pooled embedding (None if the model has none).
TextRows = tuple[Tokens, Bool[Tensor, "b l"] | None, Float[Tensor, "b p"] | None]
# Latents of the source images of an editing model.
SourceLatents = Float[Tensor, "b c h w"]

_NO_ENCODER = "this network has no text encoder, so it does not support prompts: use labels"
_NUM_RANDOM_ROWS = 16


class TextSizes(NamedTuple):
    """The sizes of rows of text.

    length: the largest number of tokens.
    width: channels of a token.
    pooled_width: channels of the pooled embedding, or 0.
    has_mask: whether rows have a mask, because some may be padded.
    """

    length: int
    width: int
    pooled_width: int
    has_mask: bool
    dtype: torch.dtype


class TextsSpec(Spec):
    """The spec of `Texts`, the field net.texts of run.yaml."""

    _has_random_rows: bool = PrivateAttr(default=False)

    def with_random_rows(self) -> Self:
        """Return a spec with random rows instead of captions and an encoder, to test or time a network."""
        spec = self.model_copy()
        spec._has_random_rows = True
        return spec

    @abstractmethod
    def load(self, texts: "Texts", captions: Sequence[str]) -> None:
        """Load the captions of the data into the module of this spec; () if they are not on this machine."""


class Texts(nn.Module, ABC):
    """Rows of text by number: one per class or caption, one for none, and then prompts (`append`).

    width: channels of a token.
    pooled_width: channels of the pooled embedding, or 0.
    has_mask: whether rows have a mask, because some may be padded.
    lengths_differ: whether rows have different numbers of tokens.
    """

    width: int
    pooled_width: int
    has_mask: bool = True
    lengths_differ: bool = False

    def __init__(self) -> None:
        """Start without prompts."""
        super().__init__()
        # The row number of each prompt, the most recently used last. The caller of `append` updates it.
        self.prompts: dict[str, int] = {}

    @abstractmethod
    def forward(self, c: Cond) -> TextRows:
        """Return tokens (b, l, d), mask (b, l) or None, and pooled embeddings (b, p) or None, of rows c (b,)."""

    def sources(self, c: Cond) -> SourceLatents | None:
        """Return the latents (b, c, h, w) of the source images of rows c (b,), or None without source images."""
        return None

    def lengths(self, c: Cond) -> tuple[int, ...] | None:
        """Return the number of tokens of each row of c (b,), without padding, or None without a mask."""
        return None

    @abstractmethod
    def append(self, texts: Sequence[str], source: SourceLatents | None = None) -> int:
        """Append a row for each text, with its source image, and return the number of the first.

        It does not change `prompts`. Raises UserError if there is no encoder, or it differs from that of the rows.
        """

    @abstractmethod
    def keep(self, first: int, rows: Sequence[int]) -> None:
        """Keep all rows before `first`, followed by the rows numbered `rows`, in this order."""

    def forget(self, max_prompts: int) -> None:
        """Remove the rows of all prompts but the last `max_prompts` of `prompts`, and renumber these."""
        if len(self.prompts) <= max_prompts:
            return
        first = min(self.prompts.values())
        last_prompts = [*self.prompts][len(self.prompts) - max_prompts :]
        self.keep(first, [self.prompts[text] for text in last_prompts])
        self.prompts = {text: first + i for i, text in enumerate(last_prompts)}


class RowStore(Protocol):
    """Encoded texts in host memory.

    length: the number of tokens to pad rows to; None means that of the longest in a pass.
    lengths_differ: whether rows have different numbers of tokens.
    is_whole: whether all captions are encoded.
    """

    length: int | None
    lengths_differ: bool

    is_whole: bool

    def row(self, number: int, device: torch.device) -> StoredRow:
        """Return the row of a caption, or of the empty text, on the CPU, encoding it on `device` if necessary."""
        ...

    def encode(self, texts: Sequence[str], device: torch.device) -> list[StoredRow]:
        """Encode prompts on `device`, and return their rows on the CPU."""
        ...


class CachedStore:
    """Captions and the empty text in a cache. Missing captions, and prompts, are encoded on demand."""

    def __init__(
        self,
        tables: Sequence[TextTable],
        places: Int64[Tensor, "n 2"],
        captions: Sequence[str],
        count: int,
        reader: TextReader,
        length: int | None = None,
    ) -> None:
        """Create a store of open tables.

        places: the positions of the `captions` and the empty text in the tables (`textcache.find_rows`).
        captions: empty if the captions are not on this machine.
        count: the number of captions of the data.
        length: the number of tokens to pad rows to; None means that of the longest row, if all are in the cache.
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
        """Return itself, because it is immutable: a network and its averages share it."""
        return self

    def verify(self) -> None:
        """Compare all shards with their checksums. Raises UserError if one has changed."""
        for text_table in self.used_tables:
            table.require_intact(text_table.folder, text_table.index, deep=True)

    def begin_audit(self) -> None:
        """Start to compare the shards with their checksums in the background, as `dumo.io.audit.Audit`."""
        self.audits = [Audit(text_table.folder, text_table.index.shards) for text_table in self.used_tables]

    def row(self, number: int, device: torch.device) -> StoredRow:
        """Return the row of a caption, or of the empty text.

        Raises UserError for a caption that is not on this machine, and if the audit has found a changed shard.
        """
        for audit in self.audits:
            audit.require()
        is_caption = number < self.count
        if is_caption and not self.captions:
            raise UserError(
                "net.texts: the data's captions are not on this machine: set data.root, or sample with prompts"
            )
        place = number if is_caption else len(self.captions)
        table_number, row = self.places[place].tolist()
        if table_number >= 0:
            return self.tables[table_number].row(row)
        return self.reader([self.captions[number] if is_caption else ""], device)[0]

    def encode(self, texts: Sequence[str], device: torch.device) -> list[StoredRow]:
        """Encode prompts, with the errors of the reader."""
        return self.reader(texts, device)


class RandomStore:
    """Random rows of the largest sizes: row i has 1 + i tokens, modulo the length and modulo _NUM_RANDOM_ROWS."""

    lengths_differ = True
    is_whole = True

    def __init__(self, sizes: TextSizes, source_shape: tuple[int, ...] = ()) -> None:
        """Create a store. `source_shape` is the shape of the source images' latents, or () without source images."""
        self.length: int | None = sizes.length
        self._draw = lru_cache(_NUM_RANDOM_ROWS)(lambda number: _draw_row(sizes, source_shape, number))

    def __deepcopy__(self, memo: dict[int, Any]) -> "RandomStore":
        """Return itself, because it is immutable."""
        return self

    def row(self, number: int, device: torch.device) -> StoredRow:
        """Return a row, which depends on the number only."""
        return self._draw(number % _NUM_RANDOM_ROWS)

    def encode(self, texts: Sequence[str], device: torch.device) -> list[StoredRow]:
        """Raise UserError, because there is no encoder."""
        raise UserError(_NO_ENCODER)


def _draw_row(sizes: TextSizes, source_shape: tuple[int, ...], number: int) -> StoredRow:
    """Draw a row from N(0, 1), seeded by its number. Without a mask it has the full length."""
    generator = stream("texts", number)
    length = number % sizes.length + 1 if sizes.has_mask else sizes.length
    row = {"tokens": torch.randn(length, sizes.width, generator=generator, device="cpu")}
    if sizes.pooled_width:
        row["pooled"] = torch.randn(sizes.pooled_width, generator=generator, device="cpu")
    if source_shape:
        row["source"] = torch.randn(source_shape, generator=generator, device="cpu")
    return row


class StepTexts(NamedTuple):
    """The rows of the captions of a step and of the empty text, in their stored dtypes.

    numbers: the numbers of the rows, (n,), in ascending order.
    tokens, mask, pooled, source: as in `Rows`.
    """

    numbers: Int64[Tensor, " n"]
    tokens: Tensor
    mask: Tensor | None
    pooled: Tensor | None
    source: Tensor | None

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> "StepTexts":
        """Return a copy with every tensor changed."""
        mask, pooled, source = (None if x is None else change(x) for x in (self.mask, self.pooled, self.source))
        return StepTexts(change(self.numbers), change(self.tokens), mask, pooled, source)

    def places(self, c: Cond) -> Int64[Tensor, " b"]:
        """Return the places of the rows with the numbers c (b,), without a device synchronization."""
        return torch.searchsorted(self.numbers, c)


class Rows(Texts):
    """Embeddings of texts: tensors on the network's device, or rows of a store in host memory.

    Tensors are buffers that are not in checkpoints, possibly in half precision. They are used if there are no prompts;
    otherwise all rows of a pass come from the store.

    like: an empty buffer with the device and dtype for rows of the store.
    tokens: (n, l, d).
    mask: (n, l), bool; None without padding.
    pooled: (n, p).
    source: (n, c, h, w).
    """

    like: Tensor
    tokens: Tensor | None
    mask: Tensor | None
    pooled: Tensor | None
    source: Tensor | None

    def __init__(self, sizes: TextSizes, count: int, source_shape: tuple[int, ...] = ()) -> None:
        """Create texts of these sizes for `count` captions or classes, without rows (`hold`, `hold_tensors`).

        source_shape: the shape of the source images' latents, or () without source images.
        """
        super().__init__()
        self.width = sizes.width
        self.pooled_width = sizes.pooled_width
        self.has_mask = sizes.has_mask
        self.count = count
        self.source_shape = source_shape
        self.store: RowStore | None = None
        self.prompt_rows: list[StoredRow] = []
        # In a training step, the rows of its captions on the device, if they were read before.
        self.step_texts: StepTexts | None = None
        self.register_buffer("like", torch.empty(0), persistent=False)
        for name in ("tokens", "mask", "pooled", "source"):
            self.register_buffer(name, None, persistent=False)

    def hold(self, store: RowStore, *, on_device: bool) -> None:
        """Use the rows of a store. If `on_device`, copy all of them to the device now."""
        self.store = store
        self.lengths_differ = store.lengths_differ and self.has_mask
        if on_device:
            rows = [store.row(number, self.like.device) for number in range(self.count + 1)]
            tokens, mask, pooled = self._join(rows, self._padded_length)
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
        """Set the rows of all captions or classes, followed by the null row, as tensors on the device.

        tokens: (n, l, d).
        mask: (n, l).
        pooled: (n, p).
        source: (n, c, h, w).
        """
        self.tokens = tokens
        self.mask = mask
        self.pooled = pooled
        self.source = source

    def forward(self, c: Cond) -> TextRows:
        """Return the rows of c (b,): tensors in float32, rows of the store in the network's dtype."""
        if self.tokens is not None and not self.prompt_rows:
            mask = self.mask
            pooled = self.pooled
            return (
                to_float32(self.tokens[c]),
                None if mask is None else mask[c],
                None if pooled is None else to_float32(pooled[c]),
            )
        if self.step_texts is not None and not self.prompt_rows:
            _, tokens, mask, pooled, _ = self.step_texts
            k = self.step_texts.places(c)
            return (
                self._like(tokens[k]),
                None if mask is None else mask[k],
                None if pooled is None else self._like(pooled[k]),
            )
        tokens, mask, pooled = self._join(self._rows_of(c), self._padded_length)
        return (
            self._like(tokens),
            None if mask is None else to_device(mask, self.like.device),
            None if pooled is None else self._like(pooled),
        )

    def sources(self, c: Cond) -> SourceLatents | None:
        """Return the latents (b, c, h, w) of the source images of rows c (b,), or None without source images."""
        if self.source is not None and not self.prompt_rows:
            return to_float32(self.source[c])
        if not self.source_shape:
            return None
        if self.step_texts is not None and self.step_texts.source is not None and not self.prompt_rows:
            return self._like(self.step_texts.source[self.step_texts.places(c)])
        source = self._join_sources(self._rows_of(c))
        return None if source is None else self._like(source)

    def lengths(self, c: Cond) -> tuple[int, ...] | None:
        """Return the number of tokens of each row of c (b,), or None without a mask or if no rows are loaded."""
        if not self.has_mask or self.store is None:
            return None
        rows = self._rows_of(c)
        return tuple(int(row["mask"].sum()) if "mask" in row else len(row["tokens"]) for row in rows)

    def append(self, texts: Sequence[str], source: SourceLatents | None = None) -> int:
        """Encode prompts, and return the row number of the first.

        source: (b, c, h, w), an image for each prompt of an editing model.

        Raises UserError if there is no encoder, it cannot be opened, or `source` is missing or superfluous.
        """
        if self.store is None:
            raise UserError(_NO_ENCODER)
        if self.source_shape and source is None:
            raise UserError("this model edits images, but the prompts have no images: pass an image for each prompt")
        if not self.source_shape and source is not None:
            raise UserError("this model does not edit images, but the prompts have images: remove the images")
        rows = self.store.encode(texts, self.like.device)
        if source is not None:
            rows = [row | {"source": latent} for row, latent in zip(rows, source.to(rows[0]["tokens"]), strict=True)]
        first = self.count + 1 + len(self.prompt_rows)
        self.prompt_rows += rows
        self.lengths_differ = self.has_mask
        return first

    def keep(self, first: int, rows: Sequence[int]) -> None:
        """Keep all rows before `first`, followed by the rows numbered `rows`, in this order."""
        kept = [self.prompt_rows[number - self.count - 1] for number in rows]
        self.prompt_rows = [*self.prompt_rows[: first - self.count - 1], *kept]

    def read_step(self, c: Cond) -> StepTexts | None:
        """Read the rows of the captions c (b,) of a step and of the empty text, on the CPU, for `using_step_texts`.

        Return None if all rows are on the device, if some captions are not encoded, or if the length of a row depends
        on the pass. Any thread may call it.
        """
        store = self.store
        if self.tokens is not None or store is None or not store.is_whole or store.length is None:
            return None
        numbers = torch.cat([c, torch.tensor([self.count])]).unique()
        rows = [store.row(number, c.device) for number in numbers.tolist()]
        return StepTexts(numbers, *self._join(rows, store.length), self._join_sources(rows))

    def _like(self, x: Tensor) -> Tensor:
        """Convert rows of the store on the network's device, because half precision is half the bytes to send."""
        return to_device(x, self.like.device).to(self.like.dtype)

    def _rows_of(self, c: Cond) -> list[StoredRow]:
        """Return the rows of c (b,) in host memory. It synchronizes with the device of c."""
        assert self.store is not None, "`hold` sets the store"
        rows: list[StoredRow] = []
        for number in c.tolist():
            if number > self.count:
                rows.append(self.prompt_rows[number - self.count - 1])
            else:
                rows.append(self.store.row(number, self.like.device))
        return rows

    @property
    def _padded_length(self) -> int:
        """The length of the store, or of the longest prompt; 0 if rows are as long as the longest of a pass."""
        assert self.store is not None
        if not self.store.length:
            return 0
        return max(self.store.length, *(len(row["tokens"]) for row in self.prompt_rows), 0)

    def _join(self, rows: Sequence[StoredRow], length: int) -> TextRows:
        """Stack rows, padded with zeros to at least `length` tokens."""
        tokens = pad_tokens(pad_sequence([row["tokens"] for row in rows], batch_first=True), length)
        mask = None
        if self.has_mask:
            masks = [row.get("mask", _all_true(len(row["tokens"]))) for row in rows]
            mask = pad_tokens(pad_sequence(masks, batch_first=True), length)
        pooled = torch.stack([row["pooled"] for row in rows]) if self.pooled_width else None
        return tokens, mask, pooled

    def _join_sources(self, rows: Sequence[StoredRow]) -> SourceLatents | None:
        """Stack the latents of the rows' source images, or return None without source images."""
        return torch.stack([row["source"] for row in rows]) if self.source_shape else None


@contextmanager
def using_step_texts(modules: Sequence[Rows], texts: StepTexts | None) -> Generator[None, None, None]:
    """Within the context, passes look up captions in the rows of a step; None means in the store.

    modules: the texts of a network and its averages, which share a store.
    """
    if texts is not None:
        device = modules[0].like.device
        texts = texts.map_tensors(lambda x: to_device(x, device))
    for module in modules:
        module.step_texts = texts
    try:
        yield
    finally:
        for module in modules:
            module.step_texts = None


def _all_true(length: int) -> Tensor:
    """Return a mask (length,) without padding, on the CPU."""
    return torch.ones(length, dtype=torch.bool, device="cpu")


class Codes(Spec):
    """Random codes for classes instead of text: the fine-tuned model has class labels and no prompts."""

    kind: Literal["codes"] = "codes"


def make_codes(classes: int, width: int, pooled_width: int) -> Rows:
    """Draw a row of one token (width,) for each class and one for no class, from N(0, 1), equal in every run.

    With `pooled_width` > 0 rows also have a pooled embedding (pooled_width,).
    """
    codes = Rows(TextSizes(1, width, pooled_width, has_mask=False, dtype=torch.float32), classes)
    tokens = _draw_codes("tokens", classes + 1, width)[:, None]
    codes.hold_tensors(tokens, None, _draw_codes("pooled", classes + 1, pooled_width) if pooled_width else None)
    return codes


def _draw_codes(name: str, rows: int, width: int) -> Tensor:
    """Draw (rows, width) from N(0, 1), seeded by the name; without values on the meta device."""
    if torch.get_default_device().type == "meta":
        return torch.empty(rows, width)
    return keyed_normal("codes", name, rows=range(rows), shape=(width,))


def pad_tokens(x: Tensor, length: int) -> Tensor:
    """Pad tokens (b, l, d) or a mask (b, l) with zeros to at least `length` tokens."""
    # `F.pad` expects the last axis first.
    padding = [0, max(0, length - x.shape[1])]
    if x.ndim == 3:
        padding = [0, 0, *padding]
    return F.pad(x, padding)
