"""Rows of text that a pipeline's encoders make while the net is used: what a table would hold that is too large.

A row has the bits of a table's, so whatever surrounds the caller must not reach the encoders. Autocast and derivatives
are of a thread: a thread of its own encodes, text by text. Attention's kernels and the rounding of products are of the
process: they are as `dumo encode` has them while the caller waits. For that it does wait: rows that were made behind a
step's back would have other bits where a slope or an examination takes another kernel. On one GPU both take turns.

`OnlineTexts` looks up the texts of a condition c; `Encoders` makes their rows, and keeps those that it made last.
"""

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from dumo.encoders.prompt import Prompts
from dumo.encoders.texttable import in_stored_types, unpadded
from dumo.flow.precision import product_precision
from dumo.nets.rows import Source, TextRows, Texts, TextSizes
from dumo.types import Cond, UserError

KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
Row = dict[str, Tensor]  # tokens (l, d); pooled (p,) and mask (l,), as in a table


class Encoders:
    """The text encoders of a pipeline, and the `most` rows that they made last."""

    def __init__(self, by: Prompts, most: int) -> None:
        """Opens the encoders. Raises UserError as `Prompts.open`."""
        self.read = by.open()
        self.most = most
        self.thread = ThreadPoolExecutor(1, "texts", torch.set_num_threads, (torch.get_num_threads(),))
        self.rows = OrderedDict[str, Row]()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Encoders":
        """Itself: a net and its averages share them."""
        return self

    def __call__(self, texts: Sequence[str], device: torch.device) -> list[Row]:
        """The rows of texts, on the CPU, made on this device where they are not there. Raises UserError as `row`."""
        return self.thread.submit(self._rows_of, texts, device).result()

    def _rows_of(self, texts: Sequence[str], device: torch.device) -> list[Row]:
        """As a call, in the thread."""
        self.read.to(device)
        rows: list[Row] = []
        with sdpa_kernel(KERNELS), product_precision("fp32", device):
            for text in texts:
                if text not in self.rows:
                    self.rows[text] = self.row(text)
                self.rows.move_to_end(text)
                rows.append(self.rows[text])
        while len(self.rows) > self.most:
            self.rows.popitem(last=False)
        return rows

    def row(self, text: str) -> Row:
        """One row. Raises UserError where an encoder fails, or its numbers are not finite."""
        spec = self.read.spec
        row = unpadded(self.read([text]), masks=spec.padded)
        del row["lengths"]
        if "pooled" in row:
            row["pooled"] = row["pooled"][0]
        types = {name: torch.bool if name == "mask" else getattr(torch, spec.dtype) for name in row}
        return in_stored_types(row, types)


OPEN = WeakValueDictionary[str, Encoders]()  # by what they are: nets of one process share them


class OnlineTexts(Texts):
    """Rows of captions, then of no caption, then of prompts, from encoders; padded to the longest of a pass."""

    like: Tensor  # its device and type are those of the rows

    def __init__(self, by: Prompts, sha256: str, sizes: TextSizes, count: int, *, most: int) -> None:
        """`captions` are set by who knows the data. Raises UserError as `Prompts.open`."""
        super().__init__()
        self.register_buffer("like", torch.empty(0), persistent=False)
        key = f"{by.model_dump_json()} {sha256} {most}"
        self.encoders = OPEN.get(key) or OPEN.setdefault(key, Encoders(by, most))
        self.count = count
        self.captions: tuple[str, ...] = ()
        self.added: list[str] = []  # prompts
        self.length = sizes.length
        self.width = sizes.width
        self.pooled_width = sizes.pooled
        self.masked = sizes.masked
        self.several = self.masked

    def text(self, k: int) -> str:
        """Text number k. Raises UserError for a caption that is not on this machine."""
        if k >= self.count:
            return ["", *self.added][k - self.count]
        if len(self.captions) != self.count:
            raise UserError(
                "net.texts: the data's captions are not on this machine, and their rows lie in no table: set data.root"
            )
        return self.captions[k]

    def rows(self, c: Cond) -> list[Row]:
        """The rows of c (b,), on the CPU. Waits for the device of c. Raises UserError as `Encoders.row`."""
        return self.encoders([self.text(k) for k in c.tolist()], self.like.device)

    def forward(self, c: Cond) -> TextRows:
        """The rows of c (b,), in float32. Raises as `rows`."""
        rows = self.rows(c)
        tokens = pad_sequence([row["tokens"] for row in rows], batch_first=True).to(self.like)
        mask = None
        if self.masked:
            masks = [row.get("mask", torch.ones(len(row["tokens"]), dtype=torch.bool)) for row in rows]
            mask = pad_sequence(masks, batch_first=True).to(self.like.device)
        pooled = None
        if self.pooled_width:
            pooled = torch.stack([row["pooled"] for row in rows]).to(self.like)
        return tokens, mask, pooled

    def lengths(self, c: Cond) -> tuple[int, ...] | None:
        """As `Texts.lengths`."""
        return tuple(len(row["tokens"]) for row in self.rows(c)) if self.masked else None

    def append(self, texts: Sequence[str], source: Source | None = None) -> int:
        """Raises UserError as `Encoders.row`."""
        self.encoders(texts, self.like.device)
        self.added += texts
        return self.count + 1 + len(self.added) - len(texts)

    def keep(self, first: int, rows: Sequence[int]) -> None:
        """As `Texts.keep`."""
        texts = [self.text(k) for k in rows]
        self.added = [*self.added[: first - self.count - 1], *texts]
