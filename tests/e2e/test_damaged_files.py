"""Damaged files are read, or refused with an ordinary error: never with a crash or a hang, or in much memory."""

import io
import json
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from zipfile import BadZipFile
from zlib import error as ZlibError

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dumo.config.load import dump, load
from dumo.data.cache import CacheIndex, read_index
from dumo.evaluation import reference
from dumo.io import tensor_files
from dumo.report.comparison import compare
from dumo.training import log
from dumo.training.checkpoint import Checkpoint, Facts, FileEntry, Listing, folder_of
from dumo.types import UserError

# What readers raise: dumo's errors and those of the libraries. A MemoryError or a RecursionError is none of them.
ORDINARY = (UserError, OSError, ValueError, TypeError, LookupError, AttributeError, EOFError)
ORDINARY += (yaml.YAMLError, safetensors.SafetensorError, BadZipFile, ZlibError, NotImplementedError)
MAX_SECONDS = 20  # of the clock, on a busy machine
MAX_EXTRA_BYTES = 2**31  # of address space, above what the process has
INSERTED = (b"\0", b"\xff", b"[" * 2000, b"{", b'"', b"\n", b"-1", b"1e999", b"9" * 5000, b"NaN", b"&a *a ")

CACHE_INDEX = {
    "codec": {"kind": "taef2"},
    "weights": "0" * 64,
    "resolution": 8,
    "crop": "center",
    "source": "x",
    "classes": 2,
    "names": ["a", "b"],
    "store": "samples",
    "dtype": "float16",
    "flips": False,
    "shard_rows": 4,
    "rows": 4,
    "columns": {"x": {"dtype": "float16", "shape": [32, 1, 1]}, "labels": {"dtype": "int64"}},
    "shards": [{"file": "shard-00000.safetensors", "rows": 4, "size": 9, "sha256": "0" * 64}],
}
SOLVER = {"kind": "restart", "m": 0.5}
EVALUATION = {
    "run": "runs/a",
    "file": "runs/a/evaluation.json",
    "step": 20,
    "weights": "net.safetensors",
    "protocol": "digits",
    "samples": 500,
    "seed": 0,
    "solver": SOLVER,
    "state": "untrained",
    "results": [{"nfe": n, "solver": "restart", "fd_grey": 3.5, "fd": 3.25, "fd_sd": 0.5} for n in (1, 2)],
    "contrast": [{"nfe": 1, "solver": "euler", "fd_grey": 5.5, "fd": None, "fd_sd": 0.5}],
    "baselines": {
        "halves": {"mean": 0.5, "sd": 0.25, "splits": 20.0},
        "noise": {"mean": 9.5, "sd": 0.5, "fd_sd": 0.25},
    },
    "card": {
        "protocol": "digits",
        "samples": 500,
        "features": "x",
        "reference": "y",
        "reference_sha256": "0" * 64,
        "codec": {"kind": "taef2", "sha256": None},
        "seed": 0,
        "solver": SOLVER,
        "nfe": [1, 2],
        "contrast": [1],
        "step": 20,
        "weights": "net.safetensors",
    },
}


def reference_file() -> bytes:
    """A small reference of an evaluation: three images, and moments of features."""
    file = io.BytesIO()
    features = np.random.default_rng(0).normal(size=(20, 6))
    moments = {"mu": features.mean(0), "sigma": np.cov(features.T)}
    spatial_moments = {"mu_s": features.mean(0)[:4], "sigma_s": np.cov(features.T)[:4, :4]}
    np.savez(file, arr_0=np.zeros((3, 4, 4, 3), np.uint8), **moments, **spatial_moments)
    return file.getvalue()


def read_reference(file: Path) -> None:
    """Read a reference of features of width 6, and of spatial ones of width 4."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "WIDTH", 6)
        patch.setattr(reference, "SPATIAL_WIDTH", 4)
        reference.read_adm(file, count=20)


def read_state(file: Path) -> None:
    """Read a state.json in the folder of its step."""
    place = file.parent / folder_of(20)
    place.mkdir(exist_ok=True)
    shutil.copy(file, place)
    Checkpoint.read(place)


def files() -> dict[str, tuple[bytes, Callable[[Path], object]]]:
    """The content of a whole file of each kind that dumo reads, and what reads it, by the file's name."""
    index = CacheIndex.model_validate(CACHE_INDEX)
    facts = Facts(step=20, images=320, versions={"torch": "2.13"})
    listing = Listing(facts=facts, files={"net/00000.safetensors": FileEntry(bytes=3, sha256="0" * 64)})
    listing.sum = listing.checksum()
    log_rows = [json.dumps({"step": step, "loss": 0.5, "bins": {"loss": [1, None]}}) + "\n" for step in range(5)]
    tensors = safetensors.torch.save({"a.weight": torch.ones(4, 3)}, {"step": "20", "format": "pt"})
    return {
        "mine.yaml": (dump(load("moons")).encode(), lambda file: load(str(file))),
        "index.json": (
            json.dumps(CACHE_INDEX | {"inputs": index.inputs_digest()}).encode(),
            lambda file: read_index(file.parent),
        ),
        "evaluation.json": (json.dumps(EVALUATION).encode(), lambda file: compare([str(file)])),
        "metrics.jsonl": ("".join(log_rows).encode(), log.read_log),
        "state.json": (listing.model_dump_json().encode(), read_state),
        "w.safetensors": (tensors, tensor_files.load),
        "reference.npz": (reference_file(), read_reference),
    }


FILES = files()


@contextmanager
def limits() -> Generator[None, None, None]:
    """Inside, a TimeoutError is raised after MAX_SECONDS, and MemoryError beyond MAX_EXTRA_BYTES more address space."""

    def raise_late(number: int, frame: object) -> None:
        raise AssertionError(f"it takes above {MAX_SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    handler_before = signal.signal(signal.SIGALRM, raise_late)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + MAX_EXTRA_BYTES, hard))
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler_before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def damage(content: bytes, g: random.Random) -> bytes:
    """The bytes with one to four changes: flipped, cut, inserted, zeroed or doubled, most often near the start."""
    changed = bytearray(content)
    for _ in range(g.choice((1, 1, 2, 4))):
        start = g.randrange(min(len(changed), g.choice((64, len(changed)))) + 1)
        span = slice(start, start + g.randint(1, 64))
        match g.randrange(5):
            case 0:
                changed[start : start + 1] = g.randbytes(1)
            case 1:
                del changed[span]
            case 2:
                changed[start:start] = g.choice(INSERTED)
            case 3:
                changed[span] = bytes(len(changed[span]))
            case _:
                changed[start:start] = changed[span]
    return bytes(changed)


@pytest.mark.parametrize("name", FILES)
def test_a_whole_file_is_read(name: str, tmp_path: Path) -> None:
    content, read = FILES[name]
    (tmp_path / name).write_bytes(content)
    read(tmp_path / name)


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_a_damaged_file_is_read_or_refused(name: str, tmp_path: Path, seed: int) -> None:
    content, read = FILES[name]
    (tmp_path / name).write_bytes(damage(content, random.Random(seed)))
    with limits(), suppress(ORDINARY):
        read(tmp_path / name)
