"""Rows of text that are looked up in a table on the disk, pass by pass, because they take more memory than they may.

`MappedRows` is a `Texts`. The specs of `dumo.nets.table` make it where a table is larger than `net.texts.memory`. In
every pass it

1. waits for the device of the condition c, and reads the rows of the table that c names, padded to the longest of all;
2. puts the rows of prompts in their place, which lie in memory, as `Rows` of their own, numbered behind the table's;
3. sends all to the net's device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dumo.encoders.texttable import EncodedTexts
from dumo.nets.rows import ReaderOpener, Rows, SourceLatents, TextRows, Texts, TextSizes, pad_tokens
from dumo.types import Cond


class MappedRows(Texts):
    """The rows of a table on the disk, then those of prompts, in memory.

    Construction and each pass raise UserError for a shard that has changed (`dumo.io.audit`).
    """

    like: Tensor  # an empty buffer: rows get its device and dtype, which follow the net's

    def __init__(self, table: EncodedTexts, sizes: TextSizes, open_reader: ReaderOpener) -> None:
        """Take an open table; no row is read yet. `open_reader` opens the reader of prompts on a device."""
        super().__init__()
        self.register_buffer("like", torch.empty(0), persistent=False)
        self.table = table
        self.open_reader = open_reader
        self.width = sizes.width
        self.length = table.longest
        self.pooled_width = sizes.pooled
        self.masked = sizes.masked
        self.table.audit.require()
        self.prompt_rows: Rows | None = None
        self._update_lengths()

    def forward(self, c: Cond) -> TextRows:
        """Return the rows of c (b,), in the dtype of the net, padded to the longest row of all."""
        self.table.audit.require()
        numbers: list[int] = c.tolist()
        tokens, mask, pooled = self.table.read_rows(self._table_rows(numbers))
        batch_rows = self._batch_rows_of_prompts(numbers)
        if self.prompt_rows is not None and batch_rows:
            prompt_tokens, prompt_mask, prompt_pooled = self.prompt_rows(self._prompt_numbers(numbers, batch_rows))
            tokens = pad_tokens(tokens, prompt_tokens.shape[1])
            tokens[batch_rows] = prompt_tokens.to(tokens)
            if prompt_mask is not None:
                mask = pad_tokens(mask, prompt_mask.shape[1])
                mask[batch_rows] = prompt_mask.to(mask)
            if pooled is not None and prompt_pooled is not None:
                pooled[batch_rows] = prompt_pooled.to(pooled)
        return (
            tokens.to(self.like),
            mask.to(self.like.device) if self.masked else None,
            None if pooled is None else pooled.to(self.like),
        )

    def sources(self, c: Cond) -> SourceLatents | None:
        """Return the latents (b, c, h, w) of the images that rows c (b,) edit; None where texts edit none."""
        numbers: list[int] = c.tolist()
        sources = self.table.read_sources(self._table_rows(numbers))
        if sources is None:
            return None
        batch_rows = self._batch_rows_of_prompts(numbers)
        if self.prompt_rows is not None and batch_rows:
            prompt_sources = self.prompt_rows.sources(self._prompt_numbers(numbers, batch_rows))
            assert prompt_sources is not None
            sources[batch_rows] = prompt_sources.to(sources)
        return sources.to(self.like)

    def lengths(self, c: Cond) -> tuple[int, ...] | None:
        """Return the number of tokens of each row of c (b,), without padding; None where there is no mask."""
        if not self.masked:
            return None
        return tuple(self._lengths[number] for number in c.tolist())

    def append(self, texts: Sequence[str], source: SourceLatents | None = None) -> int:
        """Encode prompts into memory, and return the number of the first.

        Raises UserError where the encoder cannot be opened, or `source` is missing or superfluous.
        """
        if self.prompt_rows is None:
            tokens, mask, pooled = self.table.read_rows([])
            read = self.open_reader(self.like.device)
            self.prompt_rows = Rows(
                tokens,
                mask if self.masked else None,
                pooled,
                reader=lambda _: read,
                source=self.table.read_sources([]),
            )
        first = len(self.table) + self.prompt_rows.append(texts, source)
        self._update_lengths()
        return first

    def keep(self, first: int, rows: Sequence[int]) -> None:
        """Keep all rows before number `first`, and behind them the prompts of the numbers `rows`, in this order."""
        if self.prompt_rows is not None:
            num_table_rows = len(self.table)
            self.prompt_rows.keep(first - num_table_rows, [row - num_table_rows for row in rows])
            self._update_lengths()

    def _table_rows(self, numbers: Sequence[int]) -> list[int]:
        """Return the rows of the table that the numbers name; in place of a prompt, the row of no caption."""
        last = len(self.table) - 1
        return [min(number, last) for number in numbers]

    def _batch_rows_of_prompts(self, numbers: Sequence[int]) -> list[int]:
        """Return the rows of a batch whose numbers are of prompts."""
        return [i for i, number in enumerate(numbers) if number >= len(self.table)]

    def _prompt_numbers(self, numbers: Sequence[int], batch_rows: Sequence[int]) -> Tensor:
        """Return the numbers in `prompt_rows`, (prompts,), that these rows of a batch name."""
        return torch.tensor([numbers[i] - len(self.table) for i in batch_rows])

    def _update_lengths(self) -> None:
        """Count tokens anew, after prompts came or went."""
        if self.prompt_rows is not None:
            self.length = self.prompt_rows.length
        if self.masked:
            prompt_lengths: tuple[int, ...] = ()
            if self.prompt_rows is not None:
                prompt_lengths = self.prompt_rows.lengths(torch.arange(len(self.prompt_rows.tokens))) or ()
            self._lengths = (*self.table.lengths, *prompt_lengths)
            self.lengths_differ = len(set(self._lengths)) > 1
