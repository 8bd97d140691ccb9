"""Folders of shards: tensors that ranks write together, each its part; any number of ranks reads them.

    net/shard-00001-model-00001-of-00001.safetensors  net/shard-00002-model-00001-of-00001.safetensors ...

`torch.distributed.checkpoint` reads them. Its own writer first makes one text of bytes of a shard: another copy of it,
while no other thread of Python runs. So `safetensors` writes them here, in the same format. A shard knows which part of
a tensor it holds, not how many others there are: before a folder of a checkpoint is read, look whether all its files
are there.

To write: `parts_to_write` shares out the tensors, `write` writes a rank's file. To read: `outline` has names and
shapes, `fill` copies into tensors, `load` and `tensor_readers` read whole ones, `as_file` has the bytes of one file.
"""

import itertools
import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dumo.io.file import flush
from dumo.io.read import brief
from dumo.runtime import dist
from dumo.runtime.dist import require_distributed_torch
from dumo.types import UserError

# what torch's reader raises for a damaged header
_READ_ERRORS = (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)
# Of the format: a shard's header has, under this key, where each part begins in its tensor.
_CUSTOM_METADATA_KEY = "DCP_SHARDING_INFO"
_SAVED_OFFSETS_KEY = "saved_offsets"
SHARDS = "weights in shards, as ranks write them"  # in an error: the files of torch before 2.10 differ


def parts_to_write(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The tensors of which this rank writes its part, each with the offset of that part in the whole tensor.

    A part that several ranks hold is written by one of them. They take turns from the largest tensor on, so that all
    write about as much. Every rank computes the same without asking others.
    """
    load = Counter[int]()  # by replica, how many values it writes
    offsets: dict[str, tuple[int, ...]] = {}
    for name, x in sorted(tensors.items(), key=lambda item: -item[1].numel()):
        replica, num_replicas = _replica(x)
        writer = min(range(num_replicas), key=lambda k: load[k])
        load[writer] += x.numel()
        if writer == replica and _local_part(x).numel():
            offsets[name] = local_offset(x)
    return offsets


def _replica(x: Tensor) -> tuple[int, int]:
    """The number of this rank among those that hold the same part of a tensor, and how many they are."""
    if not isinstance(x, DTensor):
        return dist.rank(), dist.world()
    replica = 0
    num_replicas = 1
    coordinates = x.device_mesh.get_coordinate() or ()
    for size, coordinate, placement in zip(x.device_mesh.shape, coordinates, x.placements, strict=True):
        if not placement.is_shard():
            replica = replica * size + coordinate
            num_replicas *= size
    return replica, num_replicas


def local_offset(x: Tensor) -> tuple[int, ...]:
    """Where this rank's part begins in the whole tensor, by dimension."""
    if not isinstance(x, DTensor):
        return (0,) * x.ndim
    return compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)[1]


def write(folder: Path, parts: Mapping[str, Tensor], offsets: Mapping[str, Sequence[int]]) -> None:
    """Write this rank's parts, contiguous and each in memory of its own, as its file, and flush it to the disk.

    `offsets` are those of `parts_to_write`. A rank without parts writes no file.
    """
    folder.mkdir(exist_ok=True)
    if not parts:
        return
    sharding = json.dumps({name: {_SAVED_OFFSETS_KEY: [*offsets[name]]} for name in parts})
    file = folder / file_pattern(dist.rank()).replace("*", "model-00001-of-00001")
    # one entry of metadata: two come in any order, and the bytes would differ
    safetensors.torch.save_file(dict(parts), file, metadata={_CUSTOM_METADATA_KEY: sharding})
    flush(file)


def file_pattern(rank: int) -> str:
    """The glob pattern of the files that a rank writes."""
    return f"shard-{rank + 1:05d}-*.safetensors"


def outline(folder: Path) -> dict[str, Tensor]:
    """The whole tensors that a folder holds, by name, on the device 'meta'.

    Raises UserError for a folder without shards, a damaged or missing shard, and an old torch.
    """
    tensors, _ = _headers(folder)
    return tensors


def _headers(folder: Path) -> tuple[dict[str, Tensor], Metadata]:
    """The tensors of `outline`, and the metadata in the headers of all shards. Raises UserError."""
    require_distributed_torch(SHARDS)
    try:
        metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    except _READ_ERRORS as error:
        raise UserError(f"{folder} has a damaged shard ({brief(repr(error))}): take another copy of it") from error
    if not metadata.state_dict_metadata:
        raise UserError(f"{folder} holds no shards: give a safetensors file, or a folder of them that ranks wrote")
    tensors: dict[str, Tensor] = {}
    for name, storage in metadata.state_dict_metadata.items():
        tensors[name] = _outline_of(folder, name, storage)
    return tensors, metadata


def _outline_of(folder: Path, name: str, storage: object) -> Tensor:
    """A tensor of the shape that its parts fill. Raises UserError where they do not."""
    assert isinstance(storage, TensorStorageMetadata), "safetensors holds nothing else"
    parts = sorted(storage.chunks, key=lambda part: part.offsets)
    is_outside = any(offset < 0 for part in parts for offset in part.offsets)
    is_complete = sum(math.prod(part.sizes) for part in parts) == math.prod(storage.size)
    if is_outside or not is_complete or any(_overlap(a, b) for a, b in itertools.pairwise(parts)):
        raise UserError(f"{folder} lacks a part of {name}, or has it twice: take another copy, with all its shards")
    return torch.empty(storage.size, dtype=storage.properties.dtype, device="meta")


def _overlap(a: ChunkStorageMetadata, b: ChunkStorageMetadata) -> bool:
    """Whether two parts of a tensor have values in common."""
    for a_begin, a_size, b_begin, b_size in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True):
        if max(a_begin, b_begin) >= min(a_begin + a_size, b_begin + b_size):
            return False
    return True


def fill(folder: Path, into: Mapping[str, Tensor]) -> None:
    """Copy tensors of a folder into those of `into`, by name: a whole tensor, or of a `DTensor` this rank's part.

    Each rank reads for itself, whether others call it or not. Names and shapes must be those of `outline`.
    """
    require_distributed_torch(SHARDS)
    with _unwrap_errors(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it is meant
        state_dict_loader.load(dict(into), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


def load(folder: Path) -> dict[str, Tensor]:
    """The whole tensors of a folder, in this process. Raises UserError where a shard is damaged or missing."""
    into = {name: torch.empty(x.shape, dtype=x.dtype) for name, x in outline(folder).items()}
    fill(folder, into)
    return into


def tensor_readers(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """A function for each tensor that reads it whole, also once the folder is removed. Raises UserError."""
    tensors, metadata = _headers(folder)
    return _readers(tensors, metadata)


def _readers(tensors: Mapping[str, Tensor], metadata: Metadata) -> dict[str, Callable[[], Tensor]]:
    """A function for each tensor that reads it whole; all files are open from now on."""
    paths = {storage.relative_path for storage in metadata.storage_data.values()}
    files = {path: safe_open(path, "pt") for path in paths}

    def read(name: str) -> Tensor:
        x = torch.empty_like(tensors[name], device="cpu")
        storage = metadata.state_dict_metadata[name]
        assert isinstance(storage, TensorStorageMetadata), "`_outline_of` has looked"
        for part in storage.chunks:
            path = metadata.storage_data[MetadataIndex(name, part.offsets)].relative_path
            span = tuple(slice(begin, begin + n) for begin, n in zip(part.offsets, part.sizes, strict=True))
            x[span] = files[path].get_tensor(name)
        return x

    return {name: partial(read, name) for name in tensors}


def as_file(folder: Path) -> Iterator[bytes | memoryview]:
    """The bytes of the one file that one process would have written, tensor by tensor. Raises UserError."""
    tensors, metadata = _headers(folder)
    readers = _readers(tensors, metadata)
    # a file of empty tensors has the order of names, which safetensors sorts by dtype
    empty = {name: torch.empty(0, dtype=x.dtype) for name, x in tensors.items()}
    header = json.loads(safetensors.torch.save(empty, {"format": "pt"})[8:])
    names = [name for name in header if name in tensors]
    end = 0
    for name in names:
        begin = end
        end += tensors[name].nbytes
        header[name]["shape"] = [*tensors[name].shape]
        header[name]["data_offsets"] = [begin, end]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield readers[name]().reshape(-1).view(torch.uint8).numpy().data


def copy_local_parts(tensors: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into those of `into`, by name; of a `DTensor` each rank copies its part, without others."""
    for name, x in into.items():
        value = tensors[name]
        if isinstance(x, DTensor):
            value = distribute_tensor(value, x.device_mesh, x.placements, src_data_rank=None)
        x.copy_(value)


def _local_part(x: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return x.to_local() if isinstance(x, DTensor) else x


@contextmanager
def _unwrap_errors() -> Generator[None, None, None]:
    """Raise an error as the rank raised it: torch wraps it in a `CheckpointException`, which is no Exception."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None
