"""Rows of text by number: what a net that reads text looks up for a condition c.

They come from a table that `dumo encode` makes (`dumo.nets.table`), from a pipeline's encoders (`dumo.nets.live`), from
an encoder that is trained with the net (`dumo.nets.text`), or they are codes that stand for classes (`codes`).

`Texts` is what a net calls: `forward`, and for some models `sources` and `lengths`. A sampler calls `append` to add
prompts, and `forget` to drop old ones. `Rows` are texts in memory.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from dumo.runtime.random import keyed
from dumo.types import Cond, Spec, UserError

Tokens = Float[Tensor, "b l d"]
TextRows = tuple[Tokens, Bool[Tensor, "b l"] | None, Float[Tensor, "b p"] | None]  # tokens; which there are; pooled
Source = Float[Tensor, "b c h w"]  # latents of images that are edited
Reader = Callable[[Sequence[str]], TextRows]  # makes rows of texts
Opener = Callable[[torch.device], Reader]


class TextSizes(NamedTuple):
    """The sizes of rows of text."""

    length: int  # tokens of a row at most
    width: int  # numbers of a token
    pooled: int  # numbers of the pooled embedding; 0: there is none
    masked: bool  # whether rows may be padded
    dtype: torch.dtype


class Texts(nn.Module, ABC):
    """Rows of text by number: one per class or caption, then one for none, then those of prompts (`append`)."""

    width: int  # numbers of a token
    pooled_width: int  # numbers of the pooled embedding; 0: there is none
    length: int  # tokens of a row, with padding
    masked: bool = True  # whether rows may be padded; False: every token is there
    several: bool = False  # whether rows may differ in their number of tokens, without padding

    def __init__(self) -> None:
        """Without prompts."""
        super().__init__()
        self.prompts: dict[str, int] = {}  # the numbers of prompts; the caller of `append` keeps them

    @abstractmethod
    def forward(self, c: Cond) -> TextRows:
        """The rows of c (b,): tokens, mask (None: every token is there), pooled."""

    def sources(self, c: Cond) -> Source | None:
        """The images that c (b,) edit, as latents; None: they edit none."""
        return None

    def lengths(self, c: Cond) -> tuple[int, ...] | None:
        """The tokens of the rows of c (b,), without padding; None: not masked, or on no device."""
        return None

    def append(self, texts: Sequence[str], source: Source | None = None) -> int:
        """Add a row per text, and per image that it edits, behind all others; return the number of the first.

        Raises UserError where no encoder is known, or it is another than that of the rows.
        """
        raise UserError("this net was trained on rows whose encoder is not known, so it reads no prompts: give labels")

    def forget(self, most: int) -> None:
        """Keep the last `most` prompts. The rows of others are dropped, and those left have new numbers."""
        if len(self.prompts) <= most:
            return
        first = min(self.prompts.values())
        last_prompts = [*self.prompts][len(self.prompts) - most :]
        self.keep(first, [self.prompts[text] for text in last_prompts])
        self.prompts = {text: first + i for i, text in enumerate(last_prompts)}

    def keep(self, first: int, rows: Sequence[int]) -> None:
        """Keep all rows before number `first`, and behind them only `rows`, in this order."""
        for name, x in [*self.named_buffers(recurse=False)]:
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
        reader: Opener | None = None,
        source: Tensor | None = None,
    ) -> None:
        """One row per class, and the last for none. `reader` opens, on a device, the reader of prompts."""
        super().__init__()
        for name, rows in (("tokens", tokens), ("mask", mask), ("pooled", pooled), ("source", source)):
            self.register_buffer(name, rows, persistent=False)
        self.width = tokens.shape[2]
        self.length = tokens.shape[1]
        self.masked = mask is not None
        self.pooled_width = 0 if pooled is None else pooled.shape[1]
        self.reader = reader
        self._update_lengths()

    def forward(self, c: Cond) -> TextRows:
        """The rows of c (b,), in float32 where they are stored in half precision."""
        mask = self.mask
        pooled = self.pooled
        return (
            full(self.tokens[c]),
            None if mask is None else mask[c],
            None if pooled is None else full(pooled[c]),
        )

    def sources(self, c: Cond) -> Source | None:
        """As `Texts.sources`, in float32."""
        return None if self.source is None else full(self.source[c])

    def lengths(self, c: Cond) -> tuple[int, ...] | None:
        """As `Texts.lengths`."""
        if self._lengths is None:
            return None
        return tuple(self._lengths[i] for i in c.tolist())

    def append(self, texts: Sequence[str], source: Source | None = None) -> int:
        """Raises as `Texts.append`, and as the encoder does when it is opened."""
        if self.reader is None:
            return super().append(texts)
        first = len(self.tokens)
        read = self.reader(self.tokens.device)
        new_tokens, new_mask, new_pooled = read(texts)
        if self.source is not None and source is not None:
            self.source = torch.cat([self.source, source.to(self.source)])
        self.length = max(self.length, new_tokens.shape[1])  # a prompt may be longer than all captions
        self.tokens = self._longer(self.tokens, new_tokens)
        if self.mask is not None and new_mask is not None:
            self.mask = self._longer(self.mask, new_mask)
        if self.pooled is not None and new_pooled is not None:
            self.pooled = torch.cat([self.pooled, new_pooled.to(self.pooled)])
        self._update_lengths()
        return first

    def _longer(self, old: Tensor, new: Tensor) -> Tensor:
        """Tokens or masks with new rows behind the old ones, padded to the length of all."""
        return torch.cat([widened(old, self.length), widened(new.to(old), self.length)])

    def keep(self, first: int, rows: Sequence[int]) -> None:
        """As `Texts.keep`."""
        super().keep(first, rows)
        self._update_lengths()

    def _update_lengths(self) -> None:
        """After rows came or went."""
        mask = self.mask
        self._lengths: tuple[int, ...] | None = None
        if mask is not None and not mask.is_meta:
            self._lengths = tuple(mask.sum(1).tolist())
        self.several = len(set(self._lengths or ())) > 1


class Codes(Spec):
    """A random code for each class, without any text: what is tuned then reads classes, and no prompt."""

    kind: Literal["codes"] = "codes"


def codes(classes: int, width: int, pooled: int) -> Rows:
    """Make a token (width,) for each class and one for none, from N(0, 1), which are the same in every run.

    With `pooled` > 0 each has a pooled embedding (pooled,), too.
    """
    tokens = _draw_codes("tokens", classes + 1, width)[:, None]
    pooled_codes = _draw_codes("pooled", classes + 1, pooled) if pooled else None
    return Rows(tokens, None, pooled_codes)


def _draw_codes(name: str, rows: int, width: int) -> Tensor:
    """Draw (rows, width) from N(0, 1), by the name; on the meta device without values."""
    if torch.get_default_device().type == "meta":
        return torch.empty(rows, width)
    return keyed("codes", name, rows=range(rows), shape=(width,))


def widened(x: Tensor, length: int) -> Tensor:
    """Pad tokens (b, l, d) or a mask (b, l) with zeros to l = `length`."""
    return F.pad(x, (*[0] * (2 * x.ndim - 4), 0, length - x.shape[1]))


def full(x: Tensor) -> Tensor:
    """Return x in float32 where it is in half precision, else as it is."""
    return x.float() if x.element_size() == 2 else x
