"""Files of weights: safetensors only, whole, and the ones that were meant."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from dumo.io.pickled import PICKLES, conversion, refusal
from dumo.types import UserError


def checked(file: Path, sha256: str | None, hint: str) -> str:
    """The SHA-256 of a whole safetensors file, in hexadecimal.

    Raises UserError for no file (with the hint where to get it), a pickle, a damaged file, or another hash than asked.
    """
    if file.suffix.lower() in PICKLES:
        line = conversion(file.name, file.with_suffix(".safetensors").name)
        raise UserError(f"{refusal(file, line)}\n{hint}")
    if not file.is_file():
        raise UserError(f"{file}: there is no such file. {hint}")
    try:
        with safe_open(file, "pt"):  # reads the header, and compares it with the file's size
            pass
    except SafetensorError as error:
        raise UserError(f"{file} is damaged or is not safetensors ({error}): take another copy. {hint}") from error
    found = digest(file)
    if sha256 not in (None, found):
        raise UserError(
            f"{file} has SHA-256 {found}, and codec.sha256 asks for {sha256}: "
            "take the file that was meant, or set codec.sha256 to this one's (null: any)"
        )
    return found


def digest(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def load(file: Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checked file. Raises UserError, naming the first whose name or shape is not the wanted one."""
    found = load_file(file)
    for name in sorted(found.keys() | wanted.keys()):
        has, needs = (tuple(side[name].shape) if name in side else "absent" for side in (found, wanted))
        if has != needs:
            raise UserError(f"{file}: {name} is {has} in the file, {needs} in the codec: these are other weights")
    return found
