"""The data and conditions of a training loop of one's own: what is a batch, and what an objective is given of it."""

from collections.abc import Mapping
from typing import cast

from torch import Tensor

from dumo.flow.passes import OwnCall, Signature, Table
from dumo.types import Sample, UserError

Condition = Tensor | Mapping[str, Tensor] | None  # class numbers (b,), numbers (b, ...), or tensors by name

LARGE = 100.0  # ours: data lie near [-1, 1], or have deviation 1


def is_table(c: Condition) -> bool:
    """Whether conditions are more than class numbers."""
    return isinstance(c, Mapping) or (isinstance(c, Tensor) and (c.is_floating_point() or c.ndim != 1))


def table_of(c: Condition, null: Tensor | Mapping[str, Tensor] | None, call: OwnCall | Signature | None) -> Table:
    """Conditions by the argument's name, and what stands for none of them."""
    if isinstance(c, Mapping):
        rows = dict(c)
    else:
        name = call.condition if isinstance(call, Signature) else None
        rows = {name or "c": cast(Tensor, c)}
    if isinstance(null, Tensor):
        null = dict.fromkeys(rows, null)
    return Table(rows, dict(null or {}))


def require_batch(
    x: Sample,
    c: Condition,
    classes: int,
    shape: tuple[int, ...] | None,
    call: OwnCall | Signature | None,
    *,
    deeply: bool = False,
) -> None:
    """Raise UserError for what is no batch of data and conditions; `deeply`: look at the numbers on a GPU, too."""
    if not x.is_floating_point():
        raise UserError(f"x is {x.dtype}: give floats near [-1, 1], of bytes x / 127.5 - 1")
    if x.ndim < 2 or (shape and x.ndim != len(shape) + 1):
        raise UserError(f"x has shape {tuple(x.shape)}: give rows{f' of shape {shape}' if shape else ''}, (b, ...)")
    if deeply and (most := float(x.abs().max())) > LARGE:
        raise UserError(f"x reaches {most:.3g}: data lie near [-1, 1], or have deviation 1: scale them")
    if c is None:
        if classes:
            raise UserError(f"classes = {classes}, and no labels: give flow(x, c), or leave out classes=")
        return
    rows = c if isinstance(c, Mapping) else {"c": c}
    for name, given in rows.items():
        if len(given) != len(x):
            raise UserError(f"condition '{name}' has {len(given)} rows, x has {len(x)}: give a row each")
        if isinstance(c, Mapping) and isinstance(call, Signature) and not call.takes(name):
            raise UserError(
                f"condition '{name}' is no argument of {call.net}.forward: rename it, or give dumo.Flow(call=...)"
            )
    if not is_table(c):
        labels = cast(Tensor, c)
        if not classes:
            raise UserError("labels without a number of classes: give dumo.Flow(net, classes=k) for labels 0 to k - 1")
        if deeply or labels.device.type == "cpu":
            wrong = labels[(labels < 0) | (labels > classes)]
            if len(wrong):
                raise UserError(f"label {int(wrong[0])} with classes = {classes}: labels are 0 to {classes - 1}")
    elif call is None:
        raise UserError("networks of dumo take class numbers as c: hand such conditions to a network of your own")
