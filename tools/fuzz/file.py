"""The files that dumo reads, each as a whole one to begin with, and what reads it.

`targets` lists them. A target whose format is known, a `Format`, is changed by value as well as by byte.
`file_trials` writes changed files and reads them. A new file that dumo reads is a line in `targets`.
"""

import io
import json
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np
import safetensors.torch
import torch

from dumo.config.load import dump, load
from dumo.data.cache import CacheIndex, read_index
from dumo.evaluation import reference as adm
from dumo.io import weights
from dumo.io.yaml import dump_yaml, parse_yaml
from dumo.report import judgement, verdict
from dumo.report.compare import compare
from dumo.run import datanote
from dumo.training import checkpoint, log, manifest
from fuzz.judge import Trial, outcome_of
from fuzz.mutation import change_bytes, change_values

SHARE_OF_BYTES = 0.4  # of the changes of a target with a format that are of bytes
FEATURE_WIDTH = 6  # of the features of a small reference file
SPATIAL_WIDTH = 4  # and of its spatial ones
TENSORS = {"a.weight": torch.ones(4, 3), "a.bias": torch.ones(4)}


class Format(NamedTuple):
    """How values become a file's bytes, and bytes values."""

    write: Callable[[Any], bytes]
    read: Callable[[bytes], Any]


@dataclass(frozen=True)
class Target:
    """A kind of file."""

    name: str  # of the file, its ending included
    content: bytes  # of a file that is taken
    read: Callable[[Path], object]
    format: Format | None = None  # None: it is changed by byte alone

    def draw_change(self, g: random.Random) -> bytes:
        """The bytes of a changed file."""
        if self.format is None or g.random() < SHARE_OF_BYTES:
            return change_bytes(self.content, g)
        return self.format.write(change_values(self.format.read(self.content), g))


def file_trials(target: Target, numbers: range, seed: int = 0) -> Iterator[Trial]:
    """A trial for each number: a changed file is written, and read."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / target.name
        for number in numbers:
            file.write_bytes(target.draw_change(random.Random(f"{seed}/{target.name}/{number}")))
            yield f"{target.name} {number}", partial(outcome_of, partial(target.read, file))


def targets() -> list[Target]:
    """All files that are changed."""
    index = json.dumps(CACHE_INDEX | {"inputs": CacheIndex.model_validate(CACHE_INDEX).inputs_digest()}).encode()
    log_rows = b"".join(json.dumps(log_row(step)).encode() + b"\n" for step in range(5))
    tensors = safetensors.torch.save(TENSORS, {"step": "20", "format": "pt"})
    override = b"base: digits\nabout: x\ntrain:\n  steps: 7\nnet: {depth: 2}\n"
    note = b'{"sd": 0.5, "rows": 256}'
    return [
        Target("mine.yaml", dump(load("moons")).encode(), read_run, YAML),
        Target("base.yaml", override, read_run),
        Target("index.json", index, lambda file: read_index(file.parent), JSON),
        Target("evaluation.json", json.dumps(EVALUATION).encode(), read_evaluation, JSON),
        Target("data.json", note, lambda file: datanote.read(file.parent), JSON),
        Target("metrics.jsonl", log_rows, log.read_log, JSON_LINES),
        Target("state.json", MANIFEST.model_dump_json().encode(), read_manifest, JSON),
        Target("w.safetensors", tensors, read_weights),
        Target("header.safetensors", tensors, read_weights, SAFETENSORS),
        Target(
            "shard-00001-model-00001-of-00001.safetensors",
            sharded_tensors(),
            lambda file: weights.load(file.parent),
            SAFETENSORS,
        ),
        Target("reference.npz", reference_file(), read_reference),
        Target("small.npz", reference_file(compressed=True), read_reference),
    ]


# ------------------------------------------------------------------------------------------------------------- formats


def write_json(value: object) -> bytes:
    """JSON, NaN and infinity as Python writes them."""
    return json.dumps(value).encode()


def write_json_lines(rows: object) -> bytes:
    """A line of JSON for each row."""
    return b"".join(write_json(row) + b"\n" for row in (rows if isinstance(rows, list) else [rows]))


def write_header(header: object) -> bytes:
    """A safetensors file with this header, and zeros for tensors."""
    data = write_json(header)
    return struct.pack("<Q", len(data)) + data + bytes(64)


def read_header(data: bytes) -> Any:  # noqa: ANN401, what JSON holds
    """The header of a safetensors file."""
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size])


JSON = Format(write_json, json.loads)
JSON_LINES = Format(write_json_lines, lambda data: [json.loads(line) for line in data.splitlines()])
SAFETENSORS = Format(write_header, read_header)
YAML = Format(
    lambda value: dump_yaml(value).encode("utf-8", "surrogatepass"),
    lambda data: parse_yaml(data.decode()),
)

# ------------------------------------------------------------------------------------------------- contents of files

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
CARD = {
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
}
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
    "card": CARD,
}
MANIFEST = manifest.Manifest(
    step=20,
    images=320,
    versions={"torch": "2.13"},
    files={"net.safetensors": manifest.FileEntry(bytes=3, sha256="0" * 64)},
)


def log_row(step: int) -> dict[str, Any]:
    """A row of metrics.jsonl."""
    return {"step": step, "loss": 0.5, "notes": {"beyond_u": 0.5}, "bins": {"loss": [1, None]}}


def sharded_tensors() -> bytes:
    """TENSORS as one rank of torch's distributed checkpoints writes them."""
    offsets = {"a.weight": {"saved_offsets": [0, 0]}, "a.bias": {"saved_offsets": [0]}}
    return safetensors.torch.save(TENSORS, {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0"})


def reference_file(*, compressed: bool = False) -> bytes:
    """A small reference of an evaluation: three images, and moments of features."""
    file = io.BytesIO()
    g = np.random.default_rng(0)
    features = g.normal(size=(20, FEATURE_WIDTH))
    spatial_features = g.normal(size=(20, SPATIAL_WIDTH))
    save = np.savez_compressed if compressed else np.savez
    save(
        file,
        arr_0=np.zeros((3, 4, 4, 3), np.uint8),
        mu=features.mean(0),
        sigma=np.cov(features.T),
        mu_s=spatial_features.mean(0),
        sigma_s=np.cov(spatial_features.T),
    )
    return file.getvalue()


# ------------------------------------------------------------------------------------------------------------- readers


def read_run(file: Path) -> None:
    """Read a run's YAML."""
    load(str(file))


def read_evaluation(file: Path) -> None:
    """Compare an evaluation with itself, and put it into the words of a page."""
    compare([str(file)])
    run = load("moons", ["train.steps=20"])
    flow = SimpleNamespace(objective=run.objective)
    sampler = SimpleNamespace(spec=run.sample, flow=flow, precision="fp32")
    opened = cast(
        Any,
        SimpleNamespace(
            folder=file.parent,
            find_output=file.parent.joinpath,
            step=20,
            weights="net.safetensors",
            sha256="0" * 64,
            run=run,
            sampler=sampler,
            is_shipped=True,
        ),
    )
    evaluation = judgement.read_judgement(opened)
    if evaluation:
        judgement.table_rows(evaluation, evaluation["columns"])
        judgement.baseline_rows(evaluation, evaluation["columns"])
    verdict.reach_verdict(opened, "runs/a", evaluation, None)


def read_manifest(file: Path) -> None:
    """Read a checkpoint's list of files, and compare the checkpoint with it."""
    (file.parent / "net.safetensors").write_bytes(b"abc")
    listed_checkpoint = manifest.Checkpoint(file.parent)
    listed_checkpoint.fault()
    _ = listed_checkpoint.manifest


def read_weights(file: Path) -> None:
    """Load weights, compare their names and shapes with TENSORS, and read their step."""
    weights.compare(file, weights.load(file), TENSORS, "the run", "way out")
    checkpoint.step_of(file, 0)


def read_reference(file: Path) -> None:
    """Read a reference's moments and images, of the small widths."""
    widths_before = (adm.WIDTH, adm.SPATIAL_WIDTH)
    adm.WIDTH = FEATURE_WIDTH
    adm.SPATIAL_WIDTH = SPATIAL_WIDTH
    try:
        reference = adm.read_adm(file, count=20)
        if reference.image_file.shape[:3] == (3, 4, 4):
            list(reference.images(2))
    finally:
        adm.WIDTH, adm.SPATIAL_WIDTH = widths_before
