"""Rows of text that stay in a table on the disk, and are read pass by pass, because they exceed the memory allowed.

`MappedRows` is a `Texts`. The specs of `dumo.nets.table` make it where a table is larger than `net.texts.memory`. A
condition c (b,) holds an *id* for each row of the batch:

- an id below len(table) names a row of the table; the last of these is the row of no caption;
- an id from len(table) on names a prompt, which lies in memory: row id - len(table) of `prompt_rows`.

Each pass takes these steps:

1. It waits for the device of c, and reads the rows of the table, padded to the longest of all. A prompt has none there,
   and gets the row of no caption for the time being.
2. It writes the prompts over these rows.
3. It sends all rows to the net's device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dumo.encoders.texttable import EncodedTexts
from dumo.nets.rows import Rows, SourceLatents, TextReader, TextRows, Texts, TextSizes, pad_tokens
from dumo.types import Cond


class _BatchPrompts(NamedTuple):
    """The prompts of a batch."""

    positions: list[int]  # the batch rows that name a prompt
    rows: Rows  # of all prompts
    row_numbers: Tensor  # which of `rows` each position names


class MappedRows(Texts):
    """The rows of a table on the disk, then those of prompts, in memory.

    Construction and each pass raise UserError for a shard that has changed (`dumo.io.audit`).
    """

    like: Tensor  # an empty buffer, which moves with the net: rows get its device and dtype

    def __init__(self, table: EncodedTexts, sizes: TextSizes, reader: TextReader) -> None:
        """Take an open table; no row is read yet. `reader` makes rows of prompts."""
        super().__init__()
        self.register_buffer("like", torch.empty(0), persistent=False)
        self.table = table
        self.reader = reader
        self.width = sizes.width
        self.length = table.longest
        self.pooled_width = sizes.pooled_width
        self.has_mask = sizes.has_mask
        self.table.audit.require()
        self.prompt_rows: Rows | None = None  # made by the first `append`
        self._update_lengths()

    def forward(self, c: Cond) -> TextRows:
        """Return the rows of c (b,), in the dtype of the net, padded to the longest row of all."""
        self.table.audit.require()
        ids: list[int] = c.tolist()
        tokens, mask, pooled = self.table.read_rows(self._table_rows(ids))
        prompts = self._prompts_in(ids)
        if prompts is not None:
            positions = prompts.positions
            prompt_tokens, prompt_mask, prompt_pooled = prompts.rows(prompts.row_numbers)
            tokens = pad_tokens(tokens, prompt_tokens.shape[1])  # a prompt may be longer than all captions
            tokens[positions] = prompt_tokens.to(tokens)
            if prompt_mask is not None:
                mask = pad_tokens(mask, prompt_mask.shape[1])
                mask[positions] = prompt_mask.to(mask)
            if pooled is not None and prompt_pooled is not None:
                pooled[positions] = prompt_pooled.to(pooled)
        return (
            tokens.to(self.like),
            mask.to(self.like.device) if self.has_mask else None,
            None if pooled is None else pooled.to(self.like),
        )

    def sources(self, c: Cond) -> SourceLatents | None:
        """Return the latents (b, c, h, w) of the images that rows c (b,) edit; None where texts edit none."""
        ids: list[int] = c.tolist()
        sources = self.table.read_sources(self._table_rows(ids))
        if sources is None:
            return None
        prompts = self._prompts_in(ids)
        if prompts is not None:
            prompt_sources = prompts.rows.sources(prompts.row_numbers)
            assert prompt_sources is not None  # prompts edit images where the table's rows do
            sources[prompts.positions] = prompt_sources.to(sources)
        return sources.to(self.like)

    def lengths(self, c: Cond) -> tuple[int, ...] | None:
        """Return the number of tokens of each row of c (b,), without padding; None where there is no mask."""
        if not self.has_mask:
            return None
        return tuple(self._lengths[text_id] for text_id in c.tolist())

    def append(self, texts: Sequence[str], source: SourceLatents | None = None) -> int:
        """Encode prompts into memory, and return the id of the first.

        Raises UserError where the encoder cannot be opened, or `source` is missing or superfluous.
        """
        if self.prompt_rows is None:
            tokens, mask, pooled = self.table.read_rows([])  # none, of the right shapes
            self.prompt_rows = Rows(
                tokens,
                mask if self.has_mask else None,
                pooled,
                reader=lambda texts, _: self.reader(texts, self.like.device),  # these rows are on the host
                source=self.table.read_sources([]),
            )
        first = len(self.table) + self.prompt_rows.append(texts, source)
        self._update_lengths()
        return first

    def keep(self, first: int, rows: Sequence[int]) -> None:
        """Keep all rows before id `first`, and behind them the prompts of the ids `rows`, in this order."""
        if self.prompt_rows is not None:
            num_table_rows = len(self.table)
            self.prompt_rows.keep(first - num_table_rows, [row - num_table_rows for row in rows])
            self._update_lengths()

    def _table_rows(self, ids: Sequence[int]) -> list[int]:
        """Return the rows of the table that ids name; in place of a prompt, the row of no caption."""
        last = len(self.table) - 1
        return [min(text_id, last) for text_id in ids]

    def _prompts_in(self, ids: Sequence[int]) -> _BatchPrompts | None:
        """Return the prompts that the ids of a batch name; None where they name none."""
        num_table_rows = len(self.table)
        positions = [i for i, text_id in enumerate(ids) if text_id >= num_table_rows]
        if self.prompt_rows is None or not positions:
            return None
        row_numbers = torch.tensor([ids[i] - num_table_rows for i in positions])
        return _BatchPrompts(positions, self.prompt_rows, row_numbers)

    def _update_lengths(self) -> None:
        """Count tokens anew, after prompts came or went."""
        if self.prompt_rows is not None:
            self.length = self.prompt_rows.length  # at least the table's, to which they are padded from the first
        if self.has_mask:
            prompt_lengths: tuple[int, ...] = ()
            if self.prompt_rows is not None:
                prompt_lengths = self.prompt_rows.lengths(torch.arange(len(self.prompt_rows.tokens))) or ()
            self._lengths = (*self.table.lengths, *prompt_lengths)
            self.lengths_differ = len(set(self._lengths)) > 1
