"""Read and write weights in a safetensors file or a folder of files, of a published model or of a checkpoint.

In a part of a checkpoint a file has what one rank held of each tensor. Its header says where that begins, as torch's
`HuggingFaceStorageReader` reads it.

- Reading: `load` gives tensors, those of a single file mapped into memory, `read` metadata, too; `header` gives names,
  shapes and dtypes, and `read_metadata` no tensors at all. `open_safetensors` is below them.
- Loading into a net: `compare` refuses the weights of another net, then `fill` copies them into tensors, each rank its
  part of a DTensor.
- Writing: `write_part` writes what a rank holds; `unshared` prepares tensors for safetensors. `write_weights` writes
  weights outside of a checkpoint, with facts about them that `facts_of` reads, and `load_checked` compares their
  checksum.
- `sha256` is the checksum of either, `title` its name.

Pickles are not read, because unpickling can run arbitrary code.
"""

import errno
import json
import os
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dumo.io import digest
from dumo.io import file as files
from dumo.io.read import brief
from dumo.types import UserError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

ABOUT = "dumo"  # key of the one metadata entry of weights outside of a checkpoint: facts about them, as JSON
SUM = "sum"  # key of the checksum among these facts
# The offsets of a rank's shard in each full tensor, by name.
Offsets = dict[str, Sequence[int]]

PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")  # suffixes of pickled weights
NO_PICKLE = "pickle files are not supported because they can run code: save these weights as safetensors"


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
    """Return the tensors of a safetensors file by name, mapped into memory, and its metadata. Raises UserError."""
    with open_safetensors(file, hint) as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, no dict
        return tensors, opened.metadata() or {}


def load(place: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, or of a folder of files, by name; those of a single file are mapped into memory.

    Raises UserError if it is damaged.
    """
    file = place if place.is_file() else _single_file(place)
    if file:
        return read(file)[0]
    tensors = {name: torch.empty(x.shape, dtype=x.dtype) for name, x in header(place).items()}
    fill(place, tensors)
    return tensors


def header(place: Path) -> dict[str, Tensor]:
    """Return tensors with the names, shapes and dtypes in a file or folder, without values. Raises UserError."""
    file = place if place.is_file() else _single_file(place)
    if file:
        return read(file)[0]
    return {name: torch.empty(x.size, dtype=x.properties.dtype, device="meta") for name, x in _headers(place).items()}


def _single_file(folder: Path) -> Path | None:
    """Return the only file of a folder, which can be read without the slow import of torch.distributed, or None."""
    found = list(folder.glob("*.safetensors"))
    return found[0] if len(found) == 1 else None


def _headers(folder: Path) -> "Mapping[str, TensorStorageMetadata]":
    """Return the tensor metadata of the files in a folder.

    torch's reader takes the files that exist, so a tensor that lacks a part, or has one twice, is refused here.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    try:
        headers = cast(
            "Mapping[str, TensorStorageMetadata]",
            HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata,
        )
    # Torch's reader raises these for a damaged header.
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{folder} has a damaged file ({brief(repr(error))}): download it again") from error
    for name, x in headers.items():
        num_values = sum(prod(chunk.sizes) for chunk in x.chunks)
        if num_values != prod(x.size) or len({chunk.offsets for chunk in x.chunks}) < len(x.chunks):
            raise UserError(f"{folder} has a shard of {name} missing or duplicated: download all its files again")
    return headers


@torch.no_grad()
def fill(place: Path, into: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a file or folder into those of `into`, by name: whole, or of a DTensor this rank's part.

    Names and shapes must agree: call `compare` before. Other dtypes are converted. Each rank reads for itself. Raises
    UserError if the file or folder is damaged.
    """
    is_sharded = any(hasattr(x, "to_local") for x in into.values())
    file = place if place.is_file() else _single_file(place)
    if file and not is_sharded:
        tensors = read(file)[0]
        for name, x in into.items():
            x.copy_(tensors[name])
    elif into:
        from torch.distributed.checkpoint import state_dict_loader
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it is meant
                reader = HuggingFaceStorageReader(str(place))
                state_dict_loader.load(dict(into), storage_reader=reader, no_dist=True)
        # CheckpointException is a BaseException.
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from None


def write_part(file: Path, tensors: Mapping[str, Tensor], offsets: Offsets) -> None:
    """Write a rank's shards with their offsets in the full tensors, and flush the file to disk.

    The tensors must be contiguous, each in memory of its own. Raises OSError if the disk is full.
    """
    sharding = json.dumps({name: {"saved_offsets": [*offsets[name]]} for name in sorted(tensors)})
    # Only one entry, because the order of several is not fixed, and the bytes would differ.
    metadata = {"DCP_SHARDING_INFO": sharding}
    try:
        safetensors.torch.save_file(dict(tensors), file, metadata)
    except SafetensorError as error:
        if not files.is_disk_full(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file)) from error
    files.flush(file)


def unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors that do not share memory, as safetensors requires (tied weights are cloned)."""
    separate: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        contiguous = tensor.detach().contiguous()
        storage = contiguous.untyped_storage().data_ptr()
        separate[name] = contiguous.clone() if storage in storages else contiguous
        storages.add(storage)
    return separate


def write_weights(file: Path, tensors: Mapping[str, Tensor], **facts: object) -> None:
    """Write weights outside of a checkpoint, with facts about them and a checksum of both in the metadata."""
    facts = facts | {SUM: _sum_of(tensors, facts)}
    safetensors.torch.save_file(dict(tensors), file, metadata={ABOUT: json.dumps(facts, sort_keys=True)})


def _sum_of(tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> str:
    """Return the checksum of weights and of the facts about them."""
    others = {name: value for name, value in facts.items() if name != SUM}
    return digest.short(json.dumps(others, sort_keys=True), digest.of_tensors(tensors))


def load_checked(place: Path) -> dict[str, Tensor]:
    """Load tensors as `load`. Raises UserError if the checksum in their metadata does not match."""
    tensors = load(place)
    facts = facts_of(place)
    # state.json has the digests of a checkpoint's files, and other programs write none.
    if SUM in facts and facts[SUM] != _sum_of(tensors, facts):
        raise UserError(f"{place} has changed, since its checksum differs: download it again, or use other weights")
    return tensors


def facts_of(place: Path) -> dict[str, Any]:
    """Return the facts in a file of weights that `write_weights` wrote: its step, and maybe its run; else {}."""
    facts = json.loads(read_metadata(place).get(ABOUT, "{}"))
    assert isinstance(facts, dict), "`write_weights` wrote them"
    return facts


def title(place: Path) -> str:
    """Return the name of a file without its suffix, or of a folder: ema-0.999."""
    return place.name.removesuffix(".safetensors")


def read_metadata(place: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file, its tensors left unread; {} for a folder. Raises UserError."""
    if place.is_dir():
        return {}
    with open_safetensors(place) as opened:
        return opened.metadata() or {}


def sha256(place: Path) -> str:
    """Return the SHA-256 of a file, or of the files of a folder (`combine_digests`)."""
    if place.is_dir():
        return combine_digests({file.name: digest.of_file(file) for file in place.glob("*.safetensors")})
    return digest.of_file(place)


def combine_digests(digests: Mapping[str, str]) -> str:
    """Combine the SHA-256 of files: the hash of a single file, or the hash of all hashes, sorted by file name."""
    if len(digests) == 1:
        return next(iter(digests.values()))
    return digest.of_bytes(*(digests[name].encode() for name in sorted(digests)))


def whole_digest(file: Path, hint: str) -> str:
    """Return the SHA-256 of a whole safetensors file, in hexadecimal. Raises UserError if it is damaged."""
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
    """Raise UserError, naming the first mismatch, unless names, shapes and, if `dtypes`, dtypes agree.

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
    """Describe a tensor's shape and, if `dtypes`, its dtype; None means absent."""
    if tensor is None:
        return "absent"
    shape = str(tuple(tensor.shape))
    if not dtypes:
        return shape
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{shape} {dtype}"
