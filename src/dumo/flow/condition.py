"""Data and conditions in a user's training loop: what is refused, and what an objective gets of them.

Conditions are of two kinds:

- class numbers (b,), which go to the objective as they are;
- anything else is a table (`is_table`), with a row for each sample. The objective gets the numbers of rows as c, and
  the network what `table_of` finds there.

`LoopFlow` calls `require_batch` for each batch that is trained on, and `require_data` and `require_conditions` where
the network is read or sampled. `map_tensors` and `num_rows` serve either kind.
"""

from collections.abc import Callable, Mapping
from math import isfinite
from typing import cast

import torch
from torch import Tensor

from dumo.flow.conditiontable import ConditionTable
from dumo.flow.signature import CONDITIONS, CustomCall, Signature
from dumo.types import UserError

Condition = Tensor | Mapping[str, Tensor] | None  # class numbers (b,), numbers (b, ...), or tensors by name
Null = Tensor | Mapping[str, Tensor] | None  # what stands for a dropped condition: one row, or one by name

# Beyond these, data were not scaled: they should lie near [-1, 1], or have deviation 1. Ours
_MAX_VALUE = 100.0
_MAX_RMS = 4.0  # root mean square


def is_table(c: Condition) -> bool:
    """Whether conditions are more than class numbers."""
    return isinstance(c, Mapping) or (isinstance(c, Tensor) and (c.is_floating_point() or c.ndim != 1))


def table_of(c: Condition, null: Null, call: CustomCall | Signature | None) -> ConditionTable:
    """Conditions that are no class numbers, by the name of the network's argument, with what stands for none.

    null: a null without a name stands for each of the conditions.
    call: names the argument of a condition without a name.
    """
    if isinstance(c, Mapping):
        rows = dict(c)
    else:
        name = call.condition if isinstance(call, Signature) else None
        rows = {name or "c": cast(Tensor, c)}
    if isinstance(null, Tensor):
        null = dict.fromkeys(rows, null)
    return ConditionTable(rows, dict(null or {}), is_unnamed=isinstance(c, Tensor))


def map_tensors(c: Condition, change: Callable[[Tensor], Tensor]) -> Condition:
    """The conditions with each tensor changed: a tensor, a dict or None, as c is."""
    if c is None:
        return None
    if isinstance(c, Tensor):
        return change(c)
    return {name: change(rows) for name, rows in c.items()}


def num_rows(c: Condition) -> int:
    """The number of rows of conditions, which are not None."""
    if isinstance(c, Mapping):
        return len(next(iter(c.values())))
    return len(cast(Tensor, c))


def require_batch(
    x: Tensor,
    c: Condition,
    classes: int,
    shape: tuple[int, ...] | None,
    call: CustomCall | Signature | None,
    *,
    null: Null = None,
    reads_values: bool = False,
) -> None:
    """Raise UserError unless x (b, ...) and c are a batch to train on.

    classes: the number of classes; 0: there are none.
    shape: of a row of x; None: not known yet.
    call: how the network is called; None: as dumo's own.
    null: what stands for a dropped condition.
    reads_values: whether to check the values of x and of labels on a GPU, which must be waited for.
    """
    require_data(x, shape)
    if reads_values:
        x = x.detach()
        largest = float(x.abs().max())
        if not isfinite(largest):
            raise UserError("x is not finite everywhere: look at the data")
        rms = float(x.float().square().mean().sqrt())
        if largest > _MAX_VALUE or rms > _MAX_RMS:
            raise UserError(
                f"x lies between {float(x.min()):.3g} and {float(x.max()):.3g}: data lie near [-1, 1], or have "
                "deviation 1: scale them"
            )
    require_conditions(c, len(x), classes, call, null, device=x.device, reads_values=reads_values, is_data=True)


def require_data(x: object, shape: tuple[int, ...] | None = None) -> None:
    """Raise UserError unless x is a tensor of floats (b, ...), with rows of `shape` where that is given."""
    if not isinstance(x, Tensor):
        raise UserError(f"x is a {type(x).__name__}: give a tensor of floats near [-1, 1], of shape (b, ...)")
    if not x.is_floating_point():
        raise UserError(f"x is {x.dtype}: give floats near [-1, 1], of bytes x / 127.5 - 1")
    if shape is not None and x.ndim != len(shape) + 1:
        raise UserError(f"x has shape {tuple(x.shape)}: give rows of shape {shape}, (b, ...), as before")
    if x.ndim < 2:
        raise UserError(f"x has shape {tuple(x.shape)}: give rows, (b, ...)")
    if not x.numel():
        raise UserError(f"x has shape {tuple(x.shape)}, and so no data: give at least one row")


def require_conditions(
    c: Condition,
    rows: int,
    classes: int,
    call: CustomCall | Signature | None,
    null: Null,
    *,
    device: torch.device | None = None,
    reads_values: bool = False,
    is_data: bool = False,
) -> None:
    """Raise UserError unless c has a condition for each of `rows` rows that these settings allow.

    classes, call, null: as in `require_batch`.
    device: of x; None: conditions are moved there.
    reads_values: whether to check labels on a GPU, which must be waited for; those on a CPU always are.
    is_data: whether the conditions are those of data, where no label may be the one that means none.
    """
    if c is None:
        if classes:
            raise UserError(f"classes = {classes}, and no labels: give c, or leave out classes=")
        if null is not None:
            raise UserError("null= stands for a condition, and there is none: give c, or leave out null=")
        return
    by_name = c if isinstance(c, Mapping) else {"c": c}
    for name, value in by_name.items():
        _require_rows(name, value, rows, device)
    if is_table(c):
        _require_table(c, classes, call, null)
    else:
        _require_labels(cast(Tensor, c), classes, null, reads_values=reads_values, is_data=is_data)


def _require_rows(name: str, value: object, rows: int, device: torch.device | None) -> None:
    """Raise UserError unless a condition is a tensor of this many rows, on this device (None: on any)."""
    if not isinstance(value, Tensor):
        raise UserError(f"condition '{name}' is a {type(value).__name__}: give a tensor with a row for each of x")
    if not value.ndim or len(value) != rows:
        raise UserError(f"condition '{name}' has shape {tuple(value.shape)}: give one row for each of {rows}")
    if device is not None and value.device != device:
        raise UserError(f"condition '{name}' is on {value.device}, and x on {device}: give both on the same device")


def _require_labels(labels: Tensor, classes: int, null: Null, *, reads_values: bool, is_data: bool) -> None:
    """Raise UserError for class numbers outside [0, classes], and where the settings are not for class numbers."""
    if not classes:
        raise UserError("labels without a number of classes: give dumo.Flow(net, classes=k) for labels 0 to k - 1")
    if null is not None:
        raise UserError(f"null= is for conditions that are no labels, of which {classes} means none: leave it out")
    if reads_values or labels.device.type == "cpu":
        out_of_range = labels[(labels < 0) | (labels > classes)]
        if len(out_of_range):
            raise UserError(f"label {int(out_of_range[0])} with classes = {classes}: labels are 0 to {classes - 1}")
        if is_data and (labels == classes).any():
            raise UserError(
                f"label {classes} with classes = {classes} stands for none, which flow drops by itself: labels are 0 "
                f"to {classes - 1}"
            )


def _require_table(c: Condition, classes: int, call: CustomCall | Signature | None, null: Null) -> None:
    """Raise UserError for a table of conditions where the network or the settings take none."""
    if call is None:
        raise UserError("networks of dumo take class numbers as c: hand such conditions to a network of your own")
    if classes:
        kind = f"{c.dtype} of shape {tuple(c.shape)}" if isinstance(c, Tensor) else "a dict"
        raise UserError(
            f"classes = {classes} is for labels, whole numbers of shape (b,), and c is {kind}: give {_as_labels(c)}, "
            "or leave out classes=, with null= for what stands for no condition"
        )
    if isinstance(call, Signature):
        _require_arguments(c, call)
    _require_null(c, null, call)


def _as_labels(c: Condition) -> str:
    """The expression that most likely makes class numbers of c, for messages."""
    if not isinstance(c, Tensor):
        return "a tensor of them"
    if c.ndim == 1:
        return "c.long()"
    if c.shape[1:].numel() == 1:
        return "c.squeeze(1)"
    return "c.argmax(1)"


def _require_arguments(c: Condition, call: Signature) -> None:
    """Raise UserError where the network's forward has no argument for a condition."""
    if isinstance(c, Mapping):
        for name in c:
            if not call.takes(name):
                raise UserError(
                    f"condition '{name}' is no argument of {call.net}.forward: rename it, or give dumo.Flow(call=...)"
                )
    elif call.condition is None:
        raise UserError(
            f"{call.net}.forward has no argument for a condition ({', '.join(CONDITIONS)}): give c as a dict by the "
            "argument's name, or dumo.Flow(call=lambda net, x, t, c: net(...))"
        )


def _require_null(c: Condition, null: object, call: CustomCall | Signature | None) -> None:
    """Raise UserError unless the null is a row of its condition, or a dict of rows by the conditions' names."""
    if null is None:
        return
    if not isinstance(null, Tensor | Mapping):
        raise UserError(f"null is a {type(null).__name__}: give a tensor, a row of the condition, or a dict of rows")
    table = table_of(c, cast(Null, null), call)
    for name, row in table.null.items():
        if name not in table.rows:
            raise UserError(f"null has a '{name}', and c has {', '.join(table.rows)}: give null by those names")
        _require_row(name, row, table.rows[name].shape[1:])


def _require_row(name: str, row: object, shape: tuple[int, ...]) -> None:
    """Raise UserError unless the null of a condition is a row of this shape."""
    if not isinstance(row, Tensor):
        raise UserError(f"null of condition '{name}' is a {type(row).__name__}: give a tensor, a row of it")
    if row.shape not in (shape, (1, *shape)):
        raise UserError(
            f"null of condition '{name}' has shape {tuple(row.shape)}: give a row of it, of shape {tuple(shape)}"
        )
