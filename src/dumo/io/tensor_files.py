"""Read and write weights of published models and checkpoints, in a safetensors file or a folder of such files.

In a checkpoint, each file contains the shards of one rank. Its header has their offsets in the full tensors, in the
format of torch's `HuggingFaceStorageReader`.

- Reading: `load` returns tensors, memory-mapped if they are in a single file, and `read` also metadata; `header`
  returns names, shapes and dtypes, and `read_metadata` only metadata. They use `open_safetensors`.
- Loading into a net: `compare` rejects the weights of another net, then `fill` copies them into tensors. For a DTensor,
  each rank reads its own shard.
- Writing: `write_part` writes the shards of a rank, and `unshared` prepares tensors for safetensors. `write_weights`
  writes weights outside of a checkpoint with facts about them, which `facts_of` returns; `load_checked` verifies their
  checksum.
- `sha256` returns the checksum of a file or folder, and `title` its name.

Pickles are not supported, because unpickling can run arbitrary code.
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

# The only metadata key of weights outside of a checkpoint: facts about them, as JSON.
ABOUT = "dumo"
# The key of the checksum among these facts.
SUM = "sum"
# The offsets of a rank's shard in each full tensor, by name.
Offsets = dict[str, Sequence[int]]

# Suffixes of pickled weights.
PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")
NO_PICKLE = "pickle files are not supported because they can run code: save these weights as safetensors"


@contextmanager
def open_safetensors(file: Path, hint: str = "") -> Generator[safe_open, None, None]:
    """Open a safetensors file, and compare its header with the file's size.

    Raises UserError, whose message ends in `hint`, for a pickle or a damaged file, and FileNotFoundError.
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
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, not a dict
        return tensors, opened.metadata() or {}


def load(place: Path) -> dict[str, Tensor]:
    """Return the tensors of a file or a folder of files by name, memory-mapped if there is a single file.

    Raises UserError if a file is damaged.
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

    torch's reader accepts any set of files. Raises UserError if a shard of a tensor is missing or duplicated.
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
    """Copy the tensors of a file or folder into the tensors of `into` by name, or into this rank's shard of a DTensor.

    Names and shapes must agree: call `compare` before. Other dtypes are converted. Ranks read independently. Raises
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
                # Reading without torch.distributed is intended.
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
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
    # Write only one entry: the order of several entries is not fixed, so the bytes would differ.
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
    """Return the checksum of weights and the facts about them."""
    others = {name: value for name, value in facts.items() if name != SUM}
    return digest.short(json.dumps(others, sort_keys=True), digest.of_tensors(tensors))


def load_checked(place: Path) -> dict[str, Tensor]:
    """Load tensors like `load`. Raises UserError if the checksum in their metadata does not match."""
    tensors = load(place)
    facts = facts_of(place)
    # Files of a checkpoint have digests in its state.json instead, and files of other programs have no checksum.
    if SUM in facts and facts[SUM] != _sum_of(tensors, facts):
        raise UserError(f"{place} was modified, since its checksum differs: download it again, or use other weights")
    return tensors


def facts_of(place: Path) -> dict[str, Any]:
    """Return the facts in a file of `write_weights`: its step, and its run if recorded. Return {} for other files."""
    facts = json.loads(read_metadata(place).get(ABOUT, "{}"))
    assert isinstance(facts, dict), "`write_weights` writes a mapping"
    return facts


def title(place: Path) -> str:
    """Return the name of a file without its suffix, or of a folder: ema-0.999."""
    return place.name.removesuffix(".safetensors")


def read_metadata(place: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file without reading tensors; {} for a folder. Raises UserError."""
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

    file_tensors: the tensors of `file`, by name.
    net_tensors: the tensors of the net, by name.
    owner: the name of the net in the message.
    way_out: the fix at the end of the message.
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
