"""Conditions that a user gives as tensors, such as texts: a table with a row for each sample (`ConditionTable`).

`dumo.flow.condition.table_of` makes one of a batch's conditions. An objective then gets numbers of rows as c, some of
them dropped by `drop_rows`; in a pass the network gets what `take` finds under these numbers (`dumo.flow.passes`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dumo.types import Cond


@dataclass(frozen=True)
class ConditionTable:
    """Conditions that are no class numbers, a row for each sample.

    An objective gets row numbers as c (b,). Row i of n rows with its condition dropped has the number i - n, below 0.
    """

    rows: Mapping[str, Tensor]  # (n, ...), by the name of the network's argument
    null: Mapping[str, Tensor]  # what stands for no condition, one row (...) or (1, ...), by name
    is_unnamed: bool = False  # whether it was given as one tensor, without a name

    def drop_rows(self, c: Cond) -> Cond:
        """The numbers of rows c (b,) with their conditions dropped: i - n instead of i, from -n to -1."""
        num_rows = len(next(iter(self.rows.values())))
        return torch.where(c < 0, c, c - num_rows)

    def take(self, c: Cond) -> dict[str, Tensor]:
        """The conditions (b, ...) of the rows numbered c (b,), by name. A dropped row has the null.

        An argument without a null keeps the row's own value.
        """
        conditions: dict[str, Tensor] = {}
        is_dropped = c < 0
        for name, rows in self.rows.items():
            values = rows[c]  # also of a dropped row, because tensors count negative numbers from the end
            null = self.null.get(name)
            if null is not None:
                values = torch.where(is_dropped.view(-1, *(1,) * (rows.ndim - 1)), null.to(rows), values)
            conditions[name] = values
        return conditions

    def to_float64(self) -> "ConditionTable":
        """A copy whose floats are float64."""
        return replace(self, rows=_in_float64(self.rows), null=_in_float64(self.null))


def _in_float64(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, those of floats in float64."""
    return {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
