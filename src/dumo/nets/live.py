"""Rows of text that a pipeline's encoders make while the net is used: what a table would hold that is too large.

`dumo.nets.table` makes an `OnlineTexts` where a table would be too large. It looks up the texts of a condition c, and a
`TextEncoders`, which all nets of the process share, makes their rows and keeps those that it used last.

A row has the bits of a table's, so whatever surrounds the caller must not reach the encoders:

- Autocast and derivatives belong to a thread. So a thread of its own encodes, text by text.
- Attention's kernels and the rounding of products belong to the process. So the caller waits, and meanwhile they are as
  `dumo encode` has them. Rows made behind a step's back would have other bits, where a slope or an examination takes
  another kernel. On one GPU both would take turns anyhow.
"""

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from dumo.encoders.prompt import PromptReaderSpec
from dumo.encoders.texttable import cut_place, to_columns, to_stored_types
from dumo.flow.precision import product_precision
from dumo.io.read import brief
from dumo.nets.rows import SourceLatents, TextRows, Texts, TextSizes
from dumo.types import Cond, UserError

# all kernels of attention, as torch chooses from where nothing restricts it
ATTENTION_KERNELS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
]
StoredRow = dict[str, Tensor]  # tokens (l, d); pooled (p,) and mask (l,) where a table would have them


class TextEncoders:
    """The text encoders of a pipeline, with a cache of the `max_rows` rows that were used most recently."""

    def __init__(self, spec: PromptReaderSpec, max_rows: int) -> None:
        """Open the encoders. Raises UserError as `PromptReaderSpec.open`."""
        self.reader = spec.open()
        self.max_rows = max_rows
        self.thread = ThreadPoolExecutor(1, "texts", torch.set_num_threads, (torch.get_num_threads(),))
        self.rows = OrderedDict[str, StoredRow]()  # by text, the most recently used at the end
        self.has_warned = False  # that a text is cut

    def __deepcopy__(self, memo: dict[int, Any]) -> "TextEncoders":
        """Return itself: a net and its averages share the encoders."""
        return self

    def __call__(self, texts: Sequence[str], device: torch.device) -> list[StoredRow]:
        """Return the rows of texts, on the CPU. Those that are not kept are made on `device`, in the thread.

        Raises UserError where an encoder fails, or its values are not finite.
        """
        return self.thread.submit(self._rows_of, texts, device).result()

    def _rows_of(self, texts: Sequence[str], device: torch.device) -> list[StoredRow]:
        """Return the rows of texts. Runs in the thread, and raises as `__call__`."""
        self.reader.to(device)
        rows: list[StoredRow] = []
        with sdpa_kernel(ATTENTION_KERNELS), product_precision("fp32", device):
            for text in texts:
                if text not in self.rows:
                    self.rows[text] = self._encode(text)
                self.rows.move_to_end(text)
                rows.append(self.rows[text])
        while len(self.rows) > self.max_rows:
            self.rows.popitem(last=False)
        return rows

    def _encode(self, text: str) -> StoredRow:
        """Make one row, and warn once where a text is cut.

        Raises UserError where an encoder fails, or its values are not finite.
        """
        spec = self.reader.spec
        embeddings = self.reader([text])
        if embeddings.cut_texts and not self.has_warned:
            self.has_warned = True
            warnings.warn(f"'{brief(text, 60)}': cut {cut_place(spec)}; others may be, too", stacklevel=2)
        row = to_columns(embeddings, keeps_padding=spec.padded)
        del row["lengths"]
        if "pooled" in row:
            row["pooled"] = row["pooled"][0]
        types = {name: torch.bool if name == "mask" else getattr(torch, spec.dtype) for name in row}
        return to_stored_types(row, types)


# by spec, hash of the weights and number of rows: nets of one process share encoders
_OPEN_ENCODERS = WeakValueDictionary[str, TextEncoders]()


def _shared_encoders(spec: PromptReaderSpec, sha256: str, max_rows: int) -> TextEncoders:
    """The encoders of this spec, opened at first use. Raises UserError as `PromptReaderSpec.open`."""
    key = f"{spec.model_dump_json()} {sha256} {max_rows}"
    encoders = _OPEN_ENCODERS.get(key)
    if encoders is None:
        encoders = TextEncoders(spec, max_rows)
        _OPEN_ENCODERS[key] = encoders
    return encoders


class OnlineTexts(Texts):
    """Rows of captions, then of no caption, then of prompts, from encoders; padded to the longest of a pass.

    The owner of the data sets `captions`, in their order, before the first pass.
    """

    like: Tensor  # an empty buffer, which moves with the net: rows get its device and dtype

    def __init__(self, spec: PromptReaderSpec, sha256: str, sizes: TextSizes, count: int, *, max_rows: int) -> None:
        """Open the encoders, for `count` captions. Raises UserError as `PromptReaderSpec.open`.

        `sha256` is the hash of the encoders' weights; `max_rows`, how many rows they keep.
        """
        super().__init__()
        self.register_buffer("like", torch.empty(0), persistent=False)
        self.encoders = _shared_encoders(spec, sha256, max_rows)
        self.count = count
        self.captions: tuple[str, ...] = ()
        self.prompt_texts: list[str] = []  # in the order of their numbers
        self.length = sizes.length
        self.width = sizes.width
        self.pooled_width = sizes.pooled_width
        self.has_mask = sizes.has_mask
        self.lengths_differ = self.has_mask

    def forward(self, c: Cond) -> TextRows:
        """Return the rows of c (b,), in the type of the net. Raises UserError as `TextEncoders`."""
        rows = self._rows_of(c)
        tokens = pad_sequence([row["tokens"] for row in rows], batch_first=True).to(self.like)
        mask = None
        if self.has_mask:
            masks = [row.get("mask", torch.ones(len(row["tokens"]), dtype=torch.bool)) for row in rows]
            mask = pad_sequence(masks, batch_first=True).to(self.like.device)
        pooled = None
        if self.pooled_width:
            pooled = torch.stack([row["pooled"] for row in rows]).to(self.like)
        return tokens, mask, pooled

    def lengths(self, c: Cond) -> tuple[int, ...] | None:
        """Return the number of tokens of each row of c (b,); None where there is no mask."""
        return tuple(len(row["tokens"]) for row in self._rows_of(c)) if self.has_mask else None

    def append(self, texts: Sequence[str], source: SourceLatents | None = None) -> int:
        """Encode prompts, and return the number of the first. Raises UserError where an encoder fails."""
        self.encoders(texts, self.like.device)
        first = self.count + 1 + len(self.prompt_texts)
        self.prompt_texts += texts
        return first

    def keep(self, first: int, rows: Sequence[int]) -> None:
        """Keep all texts before number `first`, and behind them only those of the numbers `rows`, in this order."""
        texts = [self._text_of(number) for number in rows]
        num_kept = first - self.count - 1
        self.prompt_texts = [*self.prompt_texts[:num_kept], *texts]

    def _rows_of(self, c: Cond) -> list[StoredRow]:
        """Return the rows of c (b,), on the CPU. Waits for the device of c."""
        texts = [self._text_of(number) for number in c.tolist()]
        return self.encoders(texts, self.like.device)

    def _text_of(self, number: int) -> str:
        """Return the text of a row by its number. Raises UserError for a caption that is not on this machine."""
        if number > self.count:
            return self.prompt_texts[number - self.count - 1]
        if number == self.count:
            return ""  # means no caption
        if len(self.captions) != self.count:
            raise UserError(
                "net.texts: the data's captions are not on this machine, and their rows lie in no table: set data.root"
            )
        return self.captions[number]
