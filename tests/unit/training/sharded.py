"""A checkpoint as ranks write it, made of one process's in no time; test_ranks.py shows that they write it so."""

import json
from itertools import pairwise
from pathlib import Path

import safetensors.torch

from dumo.training import manifest


def split(checkpoint: Path, ranks: int) -> None:
    """Cut each file into shards, in place: tensors along their first axis, those without axes to the last rank."""
    for file in [path for path in checkpoint.iterdir() if path.suffix == ".safetensors"]:
        whole = safetensors.torch.load_file(file)
        file.unlink()
        (folder := file.with_suffix("")).mkdir()
        for rank in range(ranks):
            shard, offsets = {}, {}
            for name, x in whole.items():
                ends = [len(x) * r // ranks for r in range(ranks + 1)] if x.dim() else []
                start, end = [*pairwise(ends)][rank] if x.dim() else (0, 0)
                if start < end or (not x.dim() and rank == ranks - 1):
                    shard[name] = x[start:end].clone() if x.dim() else x
                    offsets[name] = {"saved_offsets": [start, *([0] * (x.dim() - 1))] if x.dim() else []}
            about = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
            place = folder / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
            safetensors.torch.save_file(shard, place, metadata=about)
    sign(checkpoint, ranks)


def sign(checkpoint: Path, ranks: int = 1) -> None:
    """Let a checkpoint list the files that it now has."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != manifest.NAME)
    entries = manifest.file_entries(checkpoint, files)
    about = manifest.read(checkpoint).model_copy(update={"files": entries, "ranks": ranks})
    manifest.write(checkpoint, about)
