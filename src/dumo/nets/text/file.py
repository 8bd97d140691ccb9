"""What stands for the condition c in a model that reads text: a row of a table, and the last row for none.

The rows are embeddings that a text encoder made once (`net.texts`), or codes, one token per class drawn from N(0, 1),
which no encoder made: a model can learn classes by them.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from dumo.io import weights
from dumo.io.path import user_path
from dumo.nets.family import Config, Family
from dumo.random import keyed
from dumo.types import Cond, UserError

HINT = "It has tokens (n, l, d), and may have mask (n, l) and pooled (n, p); its last row is for no condition."


class Texts(nn.Module):
    """A table of conditions. No checkpoint holds it."""

    tokens: Tensor  # (n, l, d)
    mask: Tensor | None  # (n, l), bool; None: every token is there
    pooled: Tensor | None  # (n, p)

    def __init__(self, tokens: Tensor, mask: Tensor | None, pooled: Tensor | None) -> None:
        """One row per class, and the last for none."""
        super().__init__()
        for name, rows in (("tokens", tokens), ("mask", mask), ("pooled", pooled)):
            self.register_buffer(name, rows, persistent=False)
        self.lengths = tuple(mask.sum(1).tolist()) if mask is not None and not mask.is_meta else None

    def forward(self, c: Cond) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The rows of c (b,): tokens, mask, pooled."""
        mask, pooled = self.mask, self.pooled
        return self.tokens[c], None if mask is None else mask[c], None if pooled is None else pooled[c]


def table(name: str | None, row: Family, config: Config, classes: int) -> Texts:
    """The rows of a file, or codes. Raises UserError where they are not what the model and the data take."""
    widths = config[row.text], config[row.pooled] if row.pooled else 0
    if name is not None:
        return read(user_path(name, "net.texts"), row, widths, classes)
    tokens, pooled = (codes(part, classes + 1, width) for part, width in zip(("tokens", "pooled"), widths, strict=True))
    return Texts(tokens[:, None], None, pooled if row.pooled else None)


def codes(name: str, rows: int, width: int) -> Tensor:
    """N(0, 1), (rows, width): the same in every run; on the meta device without numbers."""
    if torch.get_default_device().type == "meta":
        return torch.empty(rows, width)
    return keyed("codes", name, rows=range(rows), shape=(width,))


def read(file: Path, row: Family, widths: tuple[int, int], classes: int) -> Texts:
    """The rows of a file. Raises as `table`."""
    found = weights.read(file, HINT, convert=False)[0]
    if "tokens" not in found:
        raise UserError(f"net.texts: {file} has no tokens. {HINT}")
    tokens, mask, pooled = found["tokens"], found.get("mask"), found.get("pooled")
    n, length = tokens.shape[:2]
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...] | None]] = {
        "tokens": (tokens, (n, length, widths[0])),
        "mask": (mask, (n, length) if row.masked else None),
        "pooled": (pooled, (n, widths[1]) if row.pooled else None),
    }
    for name, (rows, shape) in wanted.items():
        if rows is not None and shape is None:
            raise UserError(f"net.texts: {file} has {name}, of which this model can be told nothing: leave it out")
        if (rows is None and name == "pooled" and shape) or (rows is not None and tuple(rows.shape) != shape):
            has = "none" if rows is None else f"{tuple(rows.shape)}"
            raise UserError(f"net.texts: {file} has {name} {has}, this model takes {shape}. {HINT}")
    if n - 1 != classes:
        raise UserError(
            f"net.texts: {file} has {n} rows, {n - 1} and that of no condition, and the data have {classes} classes: "
            "give a row to each class"
        )
    where = torch.get_default_device()
    told = None if mask is None else mask.bool().to(where)
    return Texts(tokens.float().to(where), told, None if pooled is None else pooled.float().to(where))
