"""What a net is told in the place of c: the row of a table of texts, by its number."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from dumo.types import Cond, UserError

Tokens = Float[Tensor, "b l d"]
Told = tuple[Tokens, Bool[Tensor, "b l"] | None, Float[Tensor, "b p"] | None]  # tokens; which there are; pooled
Reader = Callable[[Sequence[str]], Told]  # what makes rows of texts
Opener = Callable[[torch.device], Reader]


class Texts(nn.Module, ABC):
    """Rows of text by number: one per class or caption, then one for none, then those of prompts (`append`)."""

    width: int  # numbers of a token
    pooled_width: int  # numbers of the pooled embedding; 0: there is none
    length: int  # tokens of a row, padding among them
    masked: bool = True  # whether rows may be padded; False: every token is there
    lengths: tuple[int, ...] | None = None  # tokens of each row without padding; None: not masked, or on no device

    def __init__(self) -> None:
        """Without prompts."""
        super().__init__()
        self.prompts: dict[str, int] = {}  # that were added, and their numbers: of whoever adds them

    @abstractmethod
    def forward(self, c: Cond) -> Told:
        """The rows of c (b,): tokens, mask (None: every token is there), pooled."""

    def append(self, texts: Sequence[str]) -> int:
        """Add a row per text behind all others; return the number of the first. Numbers so far stay.

        Raises UserError where no encoder is known, or it is another than that of the rows.
        """
        raise UserError("this net was trained on rows that no encoder is known of, so it reads no prompts: give labels")


class Rows(Texts):
    """Rows in memory, as buffers: no checkpoint holds them. They may be stored in half precision."""

    tokens: Tensor  # (n, l, d)
    mask: Tensor | None  # (n, l), bool; None: every token is there
    pooled: Tensor | None  # (n, p)

    def __init__(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        pooled: Tensor | None,
        reader: Opener | None = None,
    ) -> None:
        """One row per class, and the last for none. `reader` opens, on a device, what makes rows of prompts."""
        super().__init__()
        for name, rows in (("tokens", tokens), ("mask", mask), ("pooled", pooled)):
            self.register_buffer(name, rows, persistent=False)
        self.width, self.length, self.masked = tokens.shape[2], tokens.shape[1], mask is not None
        self.pooled_width = 0 if pooled is None else pooled.shape[1]
        self.reader = reader
        self._count()

    def forward(self, c: Cond) -> Told:
        """The rows of c (b,), in float32 where they are stored in half precision."""
        mask, pooled = self.mask, self.pooled
        told = None if mask is None else mask[c]
        return full(self.tokens[c]), told, None if pooled is None else full(pooled[c])

    def append(self, texts: Sequence[str]) -> int:
        """Raises as `Texts.append`, and as the encoder does when it is opened."""
        if self.reader is None:
            return super().append(texts)
        first, new = len(self.tokens), self.reader(self.tokens.device)(texts)
        for name, rows in zip(("tokens", "mask", "pooled"), new, strict=True):
            old: Tensor | None = getattr(self, name)
            if old is not None and rows is not None:
                rows = F.pad(rows, (0, 0, 0, self.length - rows.shape[1])) if name == "tokens" else rows
                rows = F.pad(rows, (0, self.length - rows.shape[1])) if name == "mask" else rows
                setattr(self, name, torch.cat([old, rows.to(old)]))
        self._count()
        return first

    def _count(self) -> None:
        mask = self.mask
        self.lengths = None if mask is None or mask.is_meta else tuple(mask.sum(1).tolist())


def full(x: Tensor) -> Tensor:
    """x in float32, where it is in half precision."""
    return x.float() if x.element_size() == 2 else x
