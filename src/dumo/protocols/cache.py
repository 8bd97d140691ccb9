"""What was counted once and need not be again: statistics of data, in a folder that may be emptied at any time.

The name of a file is a hash of what it is of, which the file itself repeats: the data's pixels, the network's weights,
the protocol. So what has changed is counted anew, and what is damaged too.
"""

import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError

from dumo import dist
from dumo.io import digest, file
from dumo.io.path import user_path
from dumo.metrics.statistics import Statistics, load_statistics, save_statistics
from dumo.types import UserError

VARIABLE = "DUMO_CACHE"  # of the environment: the folder


def folder() -> Path:
    """Where `VARIABLE` says, else ~/.cache/dumo."""
    return user_path(os.environ.get(VARIABLE) or "~/.cache/dumo", VARIABLE)


def cached(told: Mapping[str, str], make: Callable[[], Statistics]) -> Statistics:
    """The statistics of what is told: as they were kept if every rank can read them, else made and kept."""
    key = digest.of_bytes(json.dumps(dict(told), sort_keys=True).encode())[:16]
    path = folder() / f"statistics-{key}.safetensors"
    try:
        found = load_statistics(path, told) if path.is_file() else None
    except UserError:  # half a file, or another's
        found = None
    everywhere = all(bool(rank) for rank in dist.gathered(torch.tensor([found is not None])))
    if found is not None and everywhere:
        return found
    made = make()
    if dist.is_main():
        _keep(path, made, told)
    return made


def _keep(path: Path, statistics: Statistics, told: Mapping[str, str]) -> None:
    """Write it whole or not at all. Where it cannot be written the numbers still stand: only a warning."""
    try:
        with file.whole(path) as half:
            save_statistics(half, statistics, told)
    except (OSError, SafetensorError) as error:
        warnings.warn(f"{path} cannot be written ({error}), so the data is counted again next time", stacklevel=2)
