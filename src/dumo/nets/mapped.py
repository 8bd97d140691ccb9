"""Rows of text that are looked up in a table on the disk, pass by pass, because they take more memory than they may.

`MappedRows` is a `Texts`. The specs of `dumo.nets.table` make it where a table is larger than `net.texts.memory`. Rows
are read, padded and sent to the net's device at every pass, so a pass waits for the device of its condition. Prompts
lie in memory, as `Rows` of their own, numbered behind those of the table.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dumo.encoders.texttable import EncodedTexts
from dumo.nets.rows import ReaderOpener, Rows, SourceLatents, TextRows, Texts, TextSizes, pad_tokens
from dumo.types import Cond


class MappedRows(Texts):
    """The rows of a table on the disk, then those of prompts, in memory.

    Making one, and each pass, raise UserError for a shard that has changed (`dumo.io.audit`).
    """

    like: Tensor  # an empty buffer: rows get its device and dtype, which follow the net's

    def __init__(self, table: EncodedTexts, sizes: TextSizes, open_reader: ReaderOpener) -> None:
        """Read no rows yet. `sizes` are those of a row; `open_reader` opens the reader of prompts on a device."""
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
        """Return the rows of c (b,), in the type of the net, padded to the longest row of all."""
        self.table.audit.require()
        numbers: list[int] = c.tolist()
        tokens, mask, pooled = self.table.padded(self._table_rows(numbers))
        places = self._places_of_prompts(numbers)
        if self.prompt_rows is not None and places:
            prompt_tokens, prompt_mask, prompt_pooled = self.prompt_rows(self._prompt_numbers(numbers, places))
            tokens = pad_tokens(tokens, prompt_tokens.shape[1])
            tokens[places] = prompt_tokens.to(tokens)
            if prompt_mask is not None:
                mask = pad_tokens(mask, prompt_mask.shape[1])
                mask[places] = prompt_mask.to(mask)
            if pooled is not None and prompt_pooled is not None:
                pooled[places] = prompt_pooled.to(pooled)
        return (
            tokens.to(self.like),
            mask.to(self.like.device) if self.masked else None,
            None if pooled is None else pooled.to(self.like),
        )

    def sources(self, c: Cond) -> SourceLatents | None:
        """Return the latents (b, c, h, w) of the images that rows c (b,) edit; None where texts edit none."""
        numbers: list[int] = c.tolist()
        sources = self.table.sources(self._table_rows(numbers))
        if sources is None:
            return None
        places = self._places_of_prompts(numbers)
        if self.prompt_rows is not None and places:
            prompt_sources = self.prompt_rows.sources(self._prompt_numbers(numbers, places))
            assert prompt_sources is not None
            sources[places] = prompt_sources.to(sources)
        return sources.to(self.like)

    def lengths(self, c: Cond) -> tuple[int, ...] | None:
        """Return the number of tokens of each row of c (b,), without padding; None where there is no mask."""
        if not self.masked:
            return None
        return tuple(self._lengths[number] for number in c.tolist())

    def append(self, texts: Sequence[str], source: SourceLatents | None = None) -> int:
        """Read prompts into memory, and return the number of the first. Raises UserError as `Rows.append`."""
        if self.prompt_rows is None:
            tokens, mask, pooled = self.table.padded([])
            read = self.open_reader(self.like.device)
            self.prompt_rows = Rows(
                tokens,
                mask if self.masked else None,
                pooled,
                reader=lambda _: read,
                source=self.table.sources([]),
            )
        first = len(self.table) + self.prompt_rows.append(texts, source)
        self._update_lengths()
        return first

    def keep(self, first: int, rows: Sequence[int]) -> None:
        """Keep all rows before number `first`, and behind them only the prompts `rows`, in this order."""
        if self.prompt_rows is not None:
            table_rows = len(self.table)
            self.prompt_rows.keep(first - table_rows, [row - table_rows for row in rows])
            self._update_lengths()

    def _table_rows(self, numbers: Sequence[int]) -> list[int]:
        """The rows of the table of these numbers; in place of a prompt, the row of no caption."""
        last = len(self.table) - 1
        return [min(number, last) for number in numbers]

    def _places_of_prompts(self, numbers: Sequence[int]) -> list[int]:
        """The places in a batch of the numbers that are of prompts."""
        return [i for i, number in enumerate(numbers) if number >= len(self.table)]

    def _prompt_numbers(self, numbers: Sequence[int], places: Sequence[int]) -> Tensor:
        """The rows of `prompt_rows`, (prompts,), of the numbers at these places of a batch."""
        return torch.tensor([numbers[i] - len(self.table) for i in places])

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
