"""A checkpoint as ranks write it, made of one process's in no time; test_ranks.py shows that they write it so."""

from itertools import pairwise
from pathlib import Path

from torch import Tensor

from dumo.io import tensor_files
from dumo.training.checkpoint import STATE_FILE, Checkpoint, FileEntry, write_state_file


def split(checkpoint: Path, ranks: int) -> None:
    """Cut each part into files, in place: tensors along their first axis, those without axes to the last rank."""
    for folder in filter(Path.is_dir, checkpoint.iterdir()):
        whole = {name: x.clone() for name, x in tensor_files.load(folder).items()}
        for rank in range(ranks):
            rows = dict[str, Tensor]()
            offsets: tensor_files.Offsets = {}
            for name, x in whole.items():
                ends = [len(x) * r // ranks for r in range(ranks + 1)] if x.dim() else []
                start, end = [*pairwise(ends)][rank] if x.dim() else (0, 0)
                if start < end or (not x.dim() and rank == ranks - 1):
                    rows[name] = x[start:end].clone() if x.dim() else x
                    offsets[name] = [start, *([0] * (x.dim() - 1))] if x.dim() else []
            tensor_files.write_part(folder / f"{rank:05d}.safetensors", rows, offsets)
    sign(checkpoint, ranks)


def sign(checkpoint: Path, ranks: int = 1, **facts: object) -> None:
    """Let a checkpoint list the files that it now has, with other facts."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != STATE_FILE]
    entries = {path.relative_to(checkpoint).as_posix(): FileEntry.of(path) for path in files}
    now = Checkpoint.read(checkpoint).facts.model_copy(update={"ranks": ranks, **facts})
    write_state_file(checkpoint, now, entries)
