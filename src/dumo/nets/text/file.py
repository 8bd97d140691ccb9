"""Rows of text from one file that somebody wrote, or codes in their place, which no encoder made."""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dumo.io import weights
from dumo.io.path import user_path
from dumo.nets.text.rows import Rows
from dumo.random import keyed
from dumo.types import Spec, UserError

HINT = "It has tokens (n, l, d), and may have mask (n, l) and pooled (n, p); its last row is for no condition."


class TextFile(Spec):
    """A safetensors file: tokens (n, l, d), mask (n, l), pooled (n, p); a row for each class, the last for none."""

    kind: Literal["file"] = "file"
    source: str

    def build(self, classes: int) -> Rows:
        """The rows, on the default device. Raises UserError where the file does not have them, one to a class."""
        file = user_path(self.source, "net.texts.source")
        found = weights.read(file, HINT, convert=False)[0]
        if "tokens" not in found:
            raise UserError(f"net.texts: {file} has no tokens. {HINT}")
        check(file, found)
        if (n := len(found["tokens"])) - 1 != classes:
            raise UserError(
                f"net.texts: {file} has {n} rows, {n - 1} and that of no condition, and the data have {classes} "
                "classes: give a row to each class"
            )
        where = torch.get_default_device()
        mask, pooled = found.get("mask"), found.get("pooled")
        told = None if mask is None else mask.bool().to(where)
        return Rows(found["tokens"].float().to(where), told, None if pooled is None else pooled.float().to(where))


def check(file: Path, found: dict[str, Tensor]) -> None:
    """Raise UserError where the parts of a file are not of as many rows and tokens, or a row has none."""
    tokens, shapes = found["tokens"], {name: tuple(found[name].shape) for name in ("mask", "pooled") if name in found}
    n, most = tokens.shape[:2] if tokens.ndim == 3 else (0, 0)
    wrong = [name for name, has in shapes.items() if has != ((n, most) if name == "mask" else (n, has[-1]))]
    if tokens.ndim != 3 or wrong:
        shapes["tokens"] = tuple(tokens.shape)
        name = wrong[0] if wrong else "tokens"
        raise UserError(f"net.texts: {file} has {name} {shapes[name]} beside tokens {shapes['tokens']}. {HINT}")
    if "mask" in found and not bool((there := found["mask"].bool().any(1)).all()):
        row = int(there.logical_not().nonzero()[0])
        raise UserError(f"net.texts: {file} has no token in row {row}: an empty text has one, that of its end. {HINT}")


def codes(classes: int, width: int, pooled: int) -> Rows:
    """A token for each class, and one for none, of N(0, 1): the same in every run."""
    tokens = drawn("tokens", classes + 1, width)[:, None]
    return Rows(tokens, None, drawn("pooled", classes + 1, pooled) if pooled else None)


def drawn(name: str, rows: int, width: int) -> Tensor:
    """N(0, 1), (rows, width); on the meta device without numbers."""
    if torch.get_default_device().type == "meta":
        return torch.empty(rows, width)
    return keyed("codes", name, rows=range(rows), shape=(width,))
