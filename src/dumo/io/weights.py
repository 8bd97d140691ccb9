"""Weights in a safetensors file, or in a folder of shards that ranks wrote (`dumo.io.shards`).

- Reading: `load` gives tensors, those of one file mapped into memory, `read` metadata, too; `outline` gives names,
  shapes and dtypes, and `read_metadata` no tensors at all. `open_safetensors` is below them.
- Loading into a net: `compare` refuses the weights of another net, then `fill` copies them into tensors.
- Writing: `unshared` prepares tensors for safetensors.
- `sha256` is the checksum of either, `title` its name.

No pickle is read, because opening one can run any code.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dumo.io import digest
from dumo.io.read import brief
from dumo.runtime import dist
from dumo.types import UserError

PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")  # endings of pickled weights
NO_PICKLE = "dumo reads no pickle, which can run code: save these weights as safetensors"


@contextmanager
def open_safetensors(file: Path, hint: str = "") -> Generator[safe_open, None, None]:
    """Open a safetensors file; its header is read, and compared with the file's size.

    Raises UserError, which ends in `hint`, for a pickle or a damaged file, and FileNotFoundError.
    """
    if file.suffix.lower() in PICKLES:
        raise UserError(f"{file}: {NO_PICKLE}. {hint}")
    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except SafetensorError as error:
        raise UserError(f"{file} is damaged or is not safetensors: {brief(error)}. {hint}") from error


def read(file: Path, hint: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file by name, mapped into memory, and its metadata. Raises UserError."""
    with open_safetensors(file, hint) as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, no dict
        return tensors, opened.metadata() or {}


def load(place: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped into memory, or of a folder of shards, by name.

    Raises UserError where it is damaged.
    """
    if place.is_dir():
        from dumo.io import shards  # slow to import

        return shards.load(place)
    return read(place)[0]


def outline(place: Path) -> dict[str, Tensor]:
    """Tensors of the names, shapes and dtypes in a file or a folder of shards, values unread. Raises UserError."""
    if place.is_dir():
        from dumo.io import shards  # slow to import

        return shards.outline(place)
    return load(place)  # mapped


@torch.no_grad()
def fill(place: Path, into: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a file or folder into those of `into`, by name, each whole or a rank's part.

    Names and shapes must agree: call `compare` before. Raises UserError where the file or folder is damaged.
    """
    if not place.is_dir() and dist.world() == 1:
        for name, tensor in load(place).items():
            into[name].copy_(tensor)
        return
    from dumo.io import shards  # slow to import

    if place.is_dir():
        shards.fill(place, into)
    else:
        shards.copy_local_parts(load(place), into)


def unshared(tensors: Mapping[str, Tensor], local: Callable[[Tensor], Tensor] = torch.detach) -> dict[str, Tensor]:
    """Tensors as safetensors writes them: contiguous, and no two in one memory (tied weights are cloned).

    `local` returns the part of a tensor that this process has.
    """
    separate: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        contiguous = tensor.detach().contiguous()
        storage = local(contiguous).untyped_storage().data_ptr()
        separate[name] = contiguous.clone() if storage in storages else contiguous
        storages.add(storage)
    return separate


def title(place: Path) -> str:
    """The name of a file, without its ending, or of a folder of shards: ema-0.999."""
    return place.name.removesuffix(".safetensors")


def read_metadata(place: Path) -> dict[str, str]:
    """The metadata of a safetensors file, its tensors left unread; {} for a folder of shards. Raises UserError."""
    if place.is_dir():
        return {}
    with open_safetensors(place) as opened:
        return opened.metadata() or {}


def sha256(place: Path) -> str:
    """The SHA-256 of a file; for a folder of shards, that of the file that one process would have written."""
    if place.is_dir():
        from dumo.io import shards  # slow to import

        return digest.of_stream(shards.as_file(place))
    return digest.of_file(place)


def whole_digest(file: Path, hint: str) -> str:
    """The SHA-256 of a whole safetensors file, in hexadecimal. Raises UserError where it is damaged."""
    with open_safetensors(file, hint):
        return digest.of_file(file)


def compare(
    file: Path,
    file_tensors: Mapping[str, Tensor],
    net_tensors: Mapping[str, Tensor],
    owner: str,
    way_out: str,
    *,
    dtypes: bool = True,
) -> None:
    """Raise UserError, with the first tensor that differs, unless names, shapes and, if `dtypes`, dtypes agree.

    file_tensors: those of `file`, by name.
    net_tensors: those of the net, by name.
    owner: what the message calls the net.
    way_out: the fix that the message ends with.
    """
    mismatches: list[str] = []
    for name in sorted(file_tensors.keys() | net_tensors.keys()):
        in_file = _describe(file_tensors.get(name), dtypes)
        in_net = _describe(net_tensors.get(name), dtypes)
        if in_file != in_net:
            mismatches.append(f"{name} is {in_file} in the file, {in_net} in {owner}")
    if mismatches:
        count = f" ({len(mismatches)} such names)" if len(mismatches) > 1 else ""
        raise UserError(f"{file}: {mismatches[0]}{count}: {way_out}")


def _describe(tensor: Tensor | None, dtypes: bool) -> str:
    """A tensor's shape and, if `dtypes`, dtype in words; None: it is absent."""
    if tensor is None:
        return "absent"
    shape = str(tuple(tensor.shape))
    if not dtypes:
        return shape
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{shape} {dtype}"
