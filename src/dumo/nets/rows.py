"""Rows of text by number: what a net that reads text looks up for a condition c.

The rows come from a table that `dumo encode` makes (`dumo.nets.table`), from a pipeline's encoders (`dumo.nets.live`),
from an encoder that is trained with the net (`dumo.nets.text`), or they are random codes for classes (`make_codes`).

`Texts` is what a net calls: `forward` in every pass, and for some models `sources` and `lengths`. A sampler calls
`append` to add prompts behind the rows of the training, and notes the number of each in `prompts`, the last used at the
end. `forget` drops the oldest of these. `Rows` are texts in memory. The modules above use `pad_tokens`, too. A new kind
of texts extends `Texts`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from dumo.flow.precision import to_float32
from dumo.runtime.random import keyed_normal
from dumo.types import Cond, Spec, UserError

Tokens = Float[Tensor, "b l d"]
# tokens; a mask, True where there is a token (None: everywhere); the pooled embedding (None: the model takes none)
TextRows = tuple[Tokens, Bool[Tensor, "b l"] | None, Float[Tensor, "b p"] | None]
SourceLatents = Float[Tensor, "b c h w"]  # latents of images that texts edit
TextReader = Callable[[Sequence[str], torch.device], TextRows]  # makes rows of texts on a device

_NO_ENCODER = "this net was trained on rows whose encoder is not known, so it reads no prompts: give labels"


class TextSizes(NamedTuple):
    """The sizes of rows of text."""

    length: int  # the most tokens of a row
    width: int  # channels of a token
    pooled_width: int  # channels of the pooled embedding; 0: there is none
    has_mask: bool  # whether rows have a mask, because some may be padded
    dtype: torch.dtype


class Texts(nn.Module, ABC):
    """Rows of text by number: one for each class or caption, then one for none, then those of prompts (`append`)."""

    width: int  # channels of a token
    pooled_width: int  # channels of the pooled embedding; 0: there is none
    length: int  # tokens of a row, with padding
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
        """Return the latents (b, c, h, w) of the images that rows c (b,) edit; None where texts edit none."""
        return None

    def lengths(self, c: Cond) -> tuple[int, ...] | None:
        """Return the number of tokens of each row of c (b,), without padding; None where there is no mask."""
        return None

    def append(self, texts: Sequence[str], source: SourceLatents | None = None) -> int:
        """Add a row for each text, with the image that it edits, behind all others; return the first one's number.

        It leaves `prompts` as they are, which the caller keeps.

        Raises UserError where no encoder is known, or it is another than that of the rows.
        """
        raise UserError(_NO_ENCODER)

    def forget(self, max_prompts: int) -> None:
        """Drop the rows of all prompts but the last `max_prompts` of `prompts`, and renumber those that stay."""
        if len(self.prompts) <= max_prompts:
            return
        first = min(self.prompts.values())
        last_prompts = [*self.prompts][len(self.prompts) - max_prompts :]
        self.keep(first, [self.prompts[text] for text in last_prompts])
        self.prompts = {text: first + i for i, text in enumerate(last_prompts)}

    def keep(self, first: int, rows: Sequence[int]) -> None:
        """Keep all rows before number `first`, and behind them only the rows of the numbers `rows`, in this order."""
        for name, x in list(self.named_buffers(recurse=False)):  # a copy, for the loop sets buffers
            setattr(self, name, torch.cat([x[:first], x[[*rows]]]))


class Rows(Texts):
    """Rows in memory, as buffers that no checkpoint holds. They may be stored in half precision."""

    tokens: Tensor  # (n, l, d)
    mask: Tensor | None  # (n, l), bool; None: every token is there
    pooled: Tensor | None  # (n, p)
    source: Tensor | None  # (n, c, h, w)

    def __init__(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        pooled: Tensor | None,
        reader: TextReader | None = None,
        source: Tensor | None = None,
    ) -> None:
        """Hold a row for each class or caption, and the last for none.

        tokens: (n, l, d).
        mask: (n, l), True where there is a token; None: everywhere.
        pooled: (n, p); None: the model takes none.
        reader: makes rows of prompts; None: prompts cannot be read.
        source: (n, c, h, w), the latents of images that texts edit; None: they edit none.
        """
        super().__init__()
        self.register_buffer("tokens", tokens, persistent=False)
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("pooled", pooled, persistent=False)
        self.register_buffer("source", source, persistent=False)
        self.width = tokens.shape[2]
        self.length = tokens.shape[1]
        self.has_mask = mask is not None
        self.pooled_width = 0 if pooled is None else pooled.shape[1]
        self.reader = reader
        self._length_without_prompts = self.length
        self._count_tokens()

    def forward(self, c: Cond) -> TextRows:
        """Return the rows of c (b,), in float32 where they are stored in half precision."""
        mask = self.mask
        pooled = self.pooled
        return (
            to_float32(self.tokens[c]),
            None if mask is None else mask[c],
            None if pooled is None else to_float32(pooled[c]),
        )

    def sources(self, c: Cond) -> SourceLatents | None:
        """Return the latents (b, c, h, w) of the images that rows c (b,) edit, in float32; None: they edit none."""
        return None if self.source is None else to_float32(self.source[c])

    def lengths(self, c: Cond) -> tuple[int, ...] | None:
        """Return the number of tokens of each row of c (b,); None where there is no mask, or on the meta device."""
        if self._token_counts is None:
            return None
        return tuple(self._token_counts[i] for i in c.tolist())

    def append(self, texts: Sequence[str], source: SourceLatents | None = None) -> int:
        """Read texts, add their rows behind all others, and return the first one's number.

        `source` (b, c, h, w): an image for each text, where rows edit images. Raises UserError where there is no
        reader, its encoder cannot be opened, or `source` is missing or superfluous.
        """
        if self.reader is None:
            raise UserError(_NO_ENCODER)
        if self.source is not None and source is None:
            raise UserError("these rows edit images, and the prompts have none: give an image for each prompt")
        if self.source is None and source is not None:
            raise UserError("these rows edit no images, and the prompts have some: leave the images out")
        tokens, mask, pooled = self.reader(texts, self.tokens.device)
        if mask is None:
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool)

        first = len(self.tokens)
        self.length = max(self.length, tokens.shape[1])  # a prompt may be longer than all captions
        self.tokens = self._join_padded(self.tokens, tokens)
        if self.mask is not None:  # else the model reads padding as tokens, and a mask of the prompts is left out
            self.mask = self._join_padded(self.mask, mask)
        if self.pooled is not None:
            assert pooled is not None  # the reader is that of the rows
            self.pooled = torch.cat([self.pooled, pooled.to(self.pooled)])
        if self.source is not None and source is not None:
            self.source = torch.cat([self.source, source.to(self.source)])
        self._count_tokens()
        return first

    def keep(self, first: int, rows: Sequence[int]) -> None:
        """Keep all rows before number `first`, and behind them only the rows of the numbers `rows`.

        Padding that only the others needed is dropped.
        """
        super().keep(first, rows)
        self._drop_padding()
        self._count_tokens()

    def _join_padded(self, old: Tensor, new: Tensor) -> Tensor:
        """Return tokens or masks, the new rows behind the old ones, all padded to `self.length`."""
        return torch.cat([pad_tokens(old, self.length), pad_tokens(new.to(old), self.length)])

    def _drop_padding(self) -> None:
        """Shorten all rows to the longest, but not below the length without prompts.

        A column of tokens is padding where it is zero, and the mask False, in all rows.
        """
        is_token = self.tokens[:, self._length_without_prompts :].any(-1)
        if self.mask is not None:
            is_token |= self.mask[:, self._length_without_prompts :]
        token_columns = is_token.any(0).nonzero()
        self.length = self._length_without_prompts
        if len(token_columns):
            self.length += int(token_columns.max()) + 1
        self.tokens = self.tokens[:, : self.length].contiguous()
        if self.mask is not None:
            self.mask = self.mask[:, : self.length].contiguous()

    def _count_tokens(self) -> None:
        """Count the tokens of each row, after rows came or went."""
        mask = self.mask
        self._token_counts: tuple[int, ...] | None = None
        if mask is not None and not mask.is_meta:
            self._token_counts = tuple(mask.sum(1).tolist())
        self.lengths_differ = len(set(self._token_counts or ())) > 1


class Codes(Spec):
    """A random code for each class, without any text: what is tuned then reads classes, and no prompt."""

    kind: Literal["codes"] = "codes"


def make_codes(classes: int, width: int, pooled_width: int) -> Rows:
    """Make a row of one token (width,) for each class and one for no class, from N(0, 1), the same in every run.

    With `pooled_width` > 0 each has a pooled embedding (pooled_width,), too.
    """
    tokens = _draw_codes("tokens", classes + 1, width)[:, None]
    pooled_codes = _draw_codes("pooled", classes + 1, pooled_width) if pooled_width else None
    return Rows(tokens, None, pooled_codes)


def _draw_codes(name: str, rows: int, width: int) -> Tensor:
    """Draw (rows, width) from N(0, 1), by the name; on the meta device without values."""
    if torch.get_default_device().type == "meta":
        return torch.empty(rows, width)
    return keyed_normal("codes", name, rows=range(rows), shape=(width,))


def pad_tokens(x: Tensor, length: int) -> Tensor:
    """Pad tokens (b, l, d) or a mask (b, l) with zeros to l = `length`."""
    padding = [0, length - x.shape[1]]  # before and behind, on the axis of tokens
    if x.ndim == 3:
        padding = [0, 0, *padding]  # `F.pad` takes the last axis first
    return F.pad(x, padding)
