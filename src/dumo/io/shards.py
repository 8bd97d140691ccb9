"""Folders of shards: tensors that ranks write together, each its part; any number of ranks reads them.

    net/shard-00001-model-00001-of-00001.safetensors  net/shard-00002-model-00001-of-00001.safetensors ...

`torch.distributed.checkpoint` reads them. Its own writer first makes one text of bytes of a shard: another copy of it,
while no other thread of Python runs. So `safetensors` writes them here, in the same format. A shard knows which part of
a tensor it holds, not how many others there are: before a folder of a checkpoint is read, look whether all its files
are there.
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
from dumo.runtime.dist import require_ranks
from dumo.types import UserError

DAMAGED = (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)  # in its notes
# Of the format: a shard's header has, under this key, where each part begins in its tensor.
CUSTOM_METADATA_KEY = "DCP_SHARDING_INFO"
SAVED_OFFSETS_KEY = "saved_offsets"
SHARDS = "weights in shards, as ranks write them"  # the files of torch before 2.10 differ


def mine(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The tensors of which this rank writes its part, and where in the whole that part begins.

    What several ranks hold is written by one of them, by size in turn, so that all write equally much. Every rank finds
    the same for itself.
    """
    load, found = Counter[int](), dict[str, tuple[int, ...]]()
    for name, x in sorted(tensors.items(), key=lambda item: -item[1].numel()):
        place, count = _replica(x)
        writer = min(range(count), key=lambda k: load[k])
        load[writer] += x.numel()
        if writer == place and part(x).numel():
            found[name] = begin(x)
    return found


def _replica(x: Tensor) -> tuple[int, int]:
    """Which of those who hold the same part of a tensor this rank is, and how many they are."""
    if not isinstance(x, DTensor):
        return dist.rank(), dist.world()
    place, count = 0, 1
    for size, here, how in zip(x.device_mesh.shape, x.device_mesh.get_coordinate() or (), x.placements, strict=True):
        if not how.is_shard():
            place, count = place * size + here, count * size
    return place, count


def begin(x: Tensor) -> tuple[int, ...]:
    """Where the part of this rank begins."""
    if not isinstance(x, DTensor):
        return (0,) * x.ndim
    return compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)[1]


def write(folder: Path, parts: Mapping[str, Tensor], begin: Mapping[str, Sequence[int]]) -> None:
    """Write this rank's parts, contiguous and each in memory of its own, as its file, and flush it to the disk.

    `begin` is as `mine` has it.
    """
    folder.mkdir(exist_ok=True)
    said = json.dumps({name: {SAVED_OFFSETS_KEY: [*begin[name]]} for name in parts})
    if parts:  # one entry: two come in any order
        file = folder / names(dist.rank()).replace("*", "model-00001-of-00001")
        safetensors.torch.save_file(dict(parts), file, metadata={CUSTOM_METADATA_KEY: said})
        flush(file)


def names(rank: int) -> str:
    """The pattern of the files that a rank writes."""
    return f"shard-{rank + 1:05d}-*.safetensors"


def outline(folder: Path) -> dict[str, Tensor]:
    """The whole tensors that a folder holds, by name, on the device 'meta'.

    Raises UserError for a folder without shards, a damaged shard, one that lacks, and an old torch.
    """
    return _headers(folder)[0]


def _headers(folder: Path) -> tuple[dict[str, Tensor], Metadata]:
    """What `outline` gives, and what the headers of all shards say. Raises as that."""
    require_ranks(SHARDS)
    try:
        about = HuggingFaceStorageReader(str(folder)).read_metadata()
    except DAMAGED as error:
        raise UserError(f"{folder} has a damaged shard ({brief(repr(error))}): take another copy of it") from error
    if not about.state_dict_metadata:
        raise UserError(f"{folder} holds no shards: give a safetensors file, or a folder of them that ranks wrote")
    return {name: _outlined(folder, name, one) for name, one in about.state_dict_metadata.items()}, about


def _outlined(folder: Path, name: str, about: object) -> Tensor:
    """A tensor of the shape that its parts fill. Raises UserError where they do not."""
    assert isinstance(about, TensorStorageMetadata), "safetensors holds nothing else"
    parts = sorted(about.chunks, key=lambda part: part.offsets)
    outside = any(offset < 0 for part in parts for offset in part.offsets)
    whole = sum(math.prod(part.sizes) for part in parts) == math.prod(about.size)
    if outside or not whole or any(itertools.starmap(_overlap, itertools.pairwise(parts))):
        raise UserError(f"{folder} lacks a part of {name}, or has it twice: take another copy, with all its shards")
    return torch.empty(about.size, dtype=about.properties.dtype, device="meta")


def _overlap(one: ChunkStorageMetadata, other: ChunkStorageMetadata) -> bool:
    """Whether two parts of a tensor have numbers in common."""
    spans = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    return all(max(a, b) < min(a + n, b + m) for a, n, b, m in spans)


def fill(folder: Path, into: Mapping[str, Tensor]) -> None:
    """Copy the tensors of these names into `into`, of a whole tensor all and of a rank's part that part.

    Each rank reads for itself: no other must call it. Names and shapes are as `outline` has them.
    """
    require_ranks(SHARDS)
    with plainly(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it is meant
        state_dict_loader.load(dict(into), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


def load(folder: Path) -> dict[str, Tensor]:
    """The whole tensors of a folder, in this process. Raises as `outline`."""
    into = {name: torch.empty(x.shape, dtype=x.dtype) for name, x in outline(folder).items()}
    fill(folder, into)
    return into


def lazily(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """What reads each whole tensor of a folder, also when that is removed meanwhile. Raises as `outline`."""
    return _readers(*_headers(folder))


def _readers(outlined: Mapping[str, Tensor], about: Metadata) -> dict[str, Callable[[], Tensor]]:
    """Those of `lazily`, of what the headers say; all files are open from now on."""
    files = {file: safe_open(file, "pt") for file in {one.relative_path for one in about.storage_data.values()}}

    def read(name: str) -> Tensor:
        into, found = torch.empty_like(outlined[name], device="cpu"), about.state_dict_metadata[name]
        assert isinstance(found, TensorStorageMetadata), "as `outline` found"
        for part in found.chunks:
            opened = files[about.storage_data[MetadataIndex(name, part.offsets)].relative_path]
            place = tuple(slice(at, at + n) for at, n in zip(part.offsets, part.sizes, strict=True))
            into[place] = opened.get_tensor(name)
        return into

    return {name: partial(read, name) for name in outlined}


def as_file(folder: Path) -> Iterator[bytes | memoryview]:
    """The bytes of the one file that one process would have written, tensor by tensor. Raises as `outline`."""
    outlined, about = _headers(folder)
    read = _readers(outlined, about)
    none = {name: torch.empty(0, dtype=x.dtype) for name, x in outlined.items()}
    head, end = json.loads(safetensors.torch.save(none, {"format": "pt"})[8:]), 0  # in the order of a file
    names = [name for name in head if name in outlined]
    for name in names:
        begin, end = end, end + outlined[name].nbytes
        head[name] |= {"shape": [*outlined[name].shape], "data_offsets": [begin, end]}
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield read[name]().reshape(-1).view(torch.uint8).numpy().data


def share(whole: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into those of these names: of one that ranks share, each takes its part, for itself."""
    for name, x in into.items():
        mine = whole[name]
        if isinstance(x, DTensor):
            mine = distribute_tensor(mine, x.device_mesh, x.placements, src_data_rank=None)
        x.copy_(mine)


def part(x: Tensor) -> Tensor:
    """What of a tensor this rank holds."""
    return x.to_local() if isinstance(x, DTensor) else x


@contextmanager
def plainly() -> Generator[None, None, None]:
    """What went wrong on a rank, as that rank raised it: torch wraps it in what is no Exception."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None
