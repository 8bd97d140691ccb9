"""A table whose rows have several entries, or none: `take` counts the entries before a row."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dumo.io import table
from dumo.io.table import Column, ShardTable, TableIndex
from dumo.types import UserError

LENGTHS = [300, 1, 0, 70_000, 1]  # one byte of an int64 does not hold them


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_entries_before_a_row_are_counted_in_the_type_of_the_lengths(tmp_path: Path, dtype: str) -> None:
    lengths = torch.tensor(LENGTHS, dtype=getattr(torch, dtype))

    def make_shard(number: int, report: Callable[[int], None]) -> dict[str, Tensor]:
        return {"lengths": lengths, "x": torch.arange(sum(LENGTHS), dtype=torch.float32)}

    columns = {"lengths": Column(dtype=dtype), "x": Column(dtype="float32", lengths="lengths")}
    index = TableIndex(columns=columns, rows=len(LENGTHS), shard_rows=len(LENGTHS))
    assert table.make_shards(tmp_path, index, make_shard).missing == 0
    finished = ShardTable(tmp_path, table.read_finished_index(tmp_path, TableIndex, UserError("is no table")))
    assert finished.take(torch.tensor([4, 1]), "x").tolist() == [70_301, 300]


class _IndexOfEncoder(TableIndex):
    """An index, one of whose inputs is left out where it has no value, as those of captions do."""

    without: tuple[str, ...] = ()

    def binding(self) -> dict[str, Any]:
        fields = super().binding()
        if not self.without:
            del fields["without"]
        return fields


@pytest.mark.parametrize(("first", "second"), [((), ("t5",)), (("t5",), ())])
def test_a_table_of_an_input_that_the_other_has_not_is_refused(
    tmp_path: Path, first: tuple[str, ...], second: tuple[str, ...]
) -> None:
    def make(without: tuple[str, ...]) -> None:
        index = _IndexOfEncoder(columns={"x": Column(dtype="uint8")}, rows=1, without=without)
        table.make_shards(tmp_path, index, lambda *_: {"x": torch.zeros(1, dtype=torch.uint8)})

    make(first)
    with pytest.raises(UserError, match="without"):
        make(second)
