"""Rows of text by number: what a net that reads text looks up for a condition c.

They come from a table that `dumo encode` makes (`dumo.nets.table`), from an encoder that is trained with the net
(`dumo.nets.text`), from a file, or they are codes that stand for classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from dumo.io import digest, weights
from dumo.io.read import user_path
from dumo.runtime.random import keyed
from dumo.types import PINNED, PLACE, Cond, Spec, UserError

Tokens = Float[Tensor, "b l d"]
TextRows = tuple[Tokens, Bool[Tensor, "b l"] | None, Float[Tensor, "b p"] | None]  # tokens; which there are; pooled
Reader = Callable[[Sequence[str]], TextRows]  # makes rows of texts
Opener = Callable[[torch.device], Reader]
FIELD = "net.texts.source"
HINT = "It has tokens (n, l, d), and may have mask (n, l) and pooled (n, p); its last row is for no condition."


class Texts(nn.Module, ABC):
    """Rows of text by number: one per class or caption, then one for none, then those of prompts (`append`)."""

    width: int  # numbers of a token
    pooled_width: int  # numbers of the pooled embedding; 0: there is none
    length: int  # tokens of a row, with padding
    masked: bool = True  # whether rows may be padded; False: every token is there
    lengths: tuple[int, ...] | None = None  # tokens of each row without padding; None: not masked, or on no device

    def __init__(self) -> None:
        """Without prompts."""
        super().__init__()
        self.prompts: dict[str, int] = {}  # the numbers of prompts; the caller of `append` keeps them

    @abstractmethod
    def forward(self, c: Cond) -> TextRows:
        """The rows of c (b,): tokens, mask (None: every token is there), pooled."""

    def append(self, texts: Sequence[str]) -> int:
        """Add a row per text behind all others; return the number of the first. Older numbers stay.

        Raises UserError where no encoder is known, or it is another than that of the rows.
        """
        raise UserError("this net was trained on rows whose encoder is not known, so it reads no prompts: give labels")

    def forget(self, most: int) -> None:
        """Keep that many prompts, the last of `prompts`: the rows of others go, and what is left has new numbers."""
        if len(self.prompts) > most:
            first, kept = min(self.prompts.values()), [*self.prompts][len(self.prompts) - most :]
            self.keep(first, [self.prompts[text] for text in kept])
            self.prompts = {text: first + i for i, text in enumerate(kept)}

    def keep(self, first: int, rows: Sequence[int]) -> None:
        """Of the rows from the first on, keep these, in this order."""
        for name, x in [*self.named_buffers(recurse=False)]:
            setattr(self, name, torch.cat([x[:first], x[[*rows]]]))


class Rows(Texts):
    """Rows in memory, as buffers that no checkpoint holds. They may be stored in half precision."""

    tokens: Tensor  # (n, l, d)
    mask: Tensor | None  # (n, l), bool; None: every token is there
    pooled: Tensor | None  # (n, p)

    def __init__(
        self, tokens: Tensor, mask: Tensor | None, pooled: Tensor | None, reader: Opener | None = None
    ) -> None:
        """One row per class, and the last for none. `reader` opens, on a device, the reader of prompts."""
        super().__init__()
        for name, rows in (("tokens", tokens), ("mask", mask), ("pooled", pooled)):
            self.register_buffer(name, rows, persistent=False)
        self.width, self.length, self.masked = tokens.shape[2], tokens.shape[1], mask is not None
        self.pooled_width = 0 if pooled is None else pooled.shape[1]
        self.reader = reader
        self._count()

    def forward(self, c: Cond) -> TextRows:
        """The rows of c (b,), in float32 where they are stored in half precision."""
        mask, pooled = self.mask, self.pooled
        there = None if mask is None else mask[c]
        return full(self.tokens[c]), there, None if pooled is None else full(pooled[c])

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

    def keep(self, first: int, rows: Sequence[int]) -> None:
        """As `Texts.keep`."""
        super().keep(first, rows)
        self._count()

    def _count(self) -> None:
        mask = self.mask
        self.lengths = None if mask is None or mask.is_meta else tuple(mask.sum(1).tolist())


class TextFile(Spec):
    """A safetensors file: tokens (n, l, d), mask (n, l), pooled (n, p); a row for each class, the last for none.

    For models whose text takes several encoders, as SD3's and FLUX's does.
    """

    kind: Literal["file"] = "file"
    source: str = Field(json_schema_extra=PLACE)
    sha256: str | None = Field(default=None, exclude_if=lambda sha256: sha256 is None, json_schema_extra=PINNED)

    def found(self) -> "TextFile":
        """The same with the hash of the file that is there, if one is."""
        with suppress(UserError, OSError):
            return self.model_copy(update={"sha256": digest.of_file(user_path(self.source, FIELD))})
        return self

    def build(self, classes: int) -> Rows:
        """The rows, on the default device.

        Raises UserError where the file does not hold one per class and one more, or is not the one that a run began
        with.
        """
        file = user_path(self.source, FIELD)
        found = weights.read(file, HINT, convert=False)[0]
        if self.sha256 and self.sha256 != (sha256 := digest.of_file(file)):
            raise UserError(
                f"{FIELD}: {file} has SHA-256 {sha256}, and this run has {self.sha256}: put that file back, or say "
                f"where it is with --set {FIELD}=..."
            )
        require(file, found)
        if (n := len(found["tokens"])) - 1 != classes:
            raise UserError(
                f"net.texts: {file} has {n} rows, {n - 1} and that of no condition, and the data have {classes} "
                "classes: give a row to each class"
            )
        there = {name: x.to(torch.get_default_device()) for name, x in found.items()}
        mask, pooled = there.get("mask"), there.get("pooled")
        return Rows(
            there["tokens"].float(),
            None if mask is None else mask.bool(),
            None if pooled is None else pooled.float(),
        )


def require(file: Path, found: dict[str, Tensor]) -> None:
    """Raise UserError where the tensors of a file do not fit one another, or a row has no token."""
    shape = tuple(found["tokens"].shape) if "tokens" in found else None
    fits: dict[str, Callable[[Tensor], bool]] = {
        "tokens": lambda x: x.ndim == 3,
        "mask": lambda x: bool(shape) and x.shape == shape[:2],
        "pooled": lambda x: bool(shape) and x.ndim == 2 and len(x) == shape[0],
    }
    odd = next((name for name, fit in fits.items() if name in found and not fit(found[name])), None)
    if shape is None:
        wrong = "no tokens"
    elif odd:
        wrong = f"{odd} {tuple(found[odd].shape)} with tokens {shape}"
    elif "mask" in found and not bool((there := found["mask"].bool().any(1)).all()):
        row = int(there.logical_not().nonzero()[0])
        wrong = f"no token in row {row}: an empty text has one, that of its end"
    else:
        return
    raise UserError(f"net.texts: {file} has {wrong}. {HINT}")


def codes(classes: int, width: int, pooled: int) -> Rows:
    """A token for each class, and one for none, from N(0, 1): the same in every run."""
    tokens = drawn("tokens", classes + 1, width)[:, None]
    return Rows(tokens, None, drawn("pooled", classes + 1, pooled) if pooled else None)


def drawn(name: str, rows: int, width: int) -> Tensor:
    """N(0, 1), (rows, width); on the meta device without numbers."""
    if torch.get_default_device().type == "meta":
        return torch.empty(rows, width)
    return keyed("codes", name, rows=range(rows), shape=(width,))


def full(x: Tensor) -> Tensor:
    """x in float32, where it is in half precision."""
    return x.float() if x.element_size() == 2 else x
