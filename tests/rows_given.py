"""Rows of text that a test gives, instead of those of a cache."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dumo.encoders.textcache import StoredRow
from dumo.nets.learned import LearnedTexts, TokenTexts
from dumo.nets.text_rows import Rows, TextSizes

Read = Callable[[Sequence[str]], list[StoredRow]]


class GivenStore:
    """A store of tensors with a row for each caption, and the last for none."""

    def __init__(self, columns: dict[str, Tensor], read: Read | None = None) -> None:
        """`read` encodes prompts."""
        self.columns, self.read = columns, read
        self.length: int | None = columns["tokens"].shape[1]
        self.lengths_differ = "mask" in columns and len({*columns["mask"].sum(1).tolist()}) > 1

    is_whole = True

    def row(self, number: int, device: torch.device) -> StoredRow:
        """A row, with its padding."""
        return {name: column[number] for name, column in self.columns.items()}

    def encode(self, texts: Sequence[str], device: torch.device) -> list[StoredRow]:
        """Encode prompts."""
        assert self.read is not None
        return self.read(texts)


def given_rows(
    tokens: Tensor,
    mask: Tensor | None = None,
    pooled: Tensor | None = None,
    source: Tensor | None = None,
    *,
    read: Read | None = None,
    on_device: bool = True,
) -> Rows:
    """Rows of these tensors: (n, l, d), (n, l), (n, p), (n, c, h, w)."""
    n, length, width = tokens.shape
    pooled_width = 0 if pooled is None else pooled.shape[1]
    sizes = TextSizes(length, width, pooled_width, has_mask=mask is not None, dtype=tokens.dtype)
    rows = Rows(sizes, n - 1, () if source is None else tuple(source.shape[1:]))
    columns = {"tokens": tokens, "mask": mask, "pooled": pooled, "source": source}
    rows.hold(GivenStore({name: x for name, x in columns.items() if x is not None}, read), on_device=False)
    if on_device:
        rows.hold_tensors(tokens, mask, pooled, source)
    return rows


def load_captions(net: nn.Module, captions: Sequence[str]) -> None:
    """Tokenize captions for a net whose text encoder is trained with it; other nets stay as they are."""
    for module in net.modules():
        if isinstance(module, TokenTexts):
            spec = LearnedTexts(tokenizer=module.tokenizer)
            spec.load(module, captions)
