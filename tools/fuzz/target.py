"""What dumo reads, each as a function of a file's bytes: a whole file to begin with, and the reader."""

import io
import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import safetensors.torch
import torch

from dumo.config.load import dump, load
from dumo.data.cache import CacheIndex, read_index
from dumo.evaluation import reference as adm
from dumo.io import weights, yaml
from dumo.report import score
from dumo.report.compare import compare
from dumo.run import datanote
from dumo.training import checkpoint, log, manifest
from fuzz.mutation import mutated, replaced

Read = Callable[[Path], object]
WIDE, NARROW = 6, 4  # of the features of a small reference file


@dataclass(frozen=True)
class Target:
    """A kind of file."""

    name: str  # of the file, its ending included
    whole: bytes
    read: Read
    written: Callable[[Any], bytes] | None = None  # how values are: such files are changed by value, too
    values: Callable[[bytes], Any] = json.loads

    def input(self, g: random.Random) -> bytes:
        """A changed file."""
        if self.written is None or g.random() < 0.4:
            return mutated(self.whole, g)
        return self.written(replaced(self.values(self.whole), g))


def targets() -> list[Target]:
    """All of them."""
    wanted = {"a.weight": torch.ones(4, 3), "a.bias": torch.ones(4)}

    def weigh(file: Path) -> None:
        weights.compare(file, weights.load(file), wanted, "the run", "way out")
        checkpoint.step_of(file, 0)

    def shards(file: Path) -> None:
        weights.load(file.parent)

    cache = json.dumps(CACHE | {"inputs": CacheIndex.model_validate(CACHE).inputs_digest()}).encode()
    tensors = safetensors.torch.save(wanted, {"step": "20", "format": "pt"})
    return [
        Target("mine.yaml", dump(load("moons")).encode(), lambda file: load(str(file)), in_yaml, of_yaml),
        Target(
            "base.yaml", b"base: digits\nabout: x\ntrain:\n  steps: 7\nnet: {depth: 2}\n", lambda file: load(str(file))
        ),
        Target(
            "index.json",
            cache,
            lambda file: read_index(file.parent),
            in_json,
        ),
        Target("evaluation.json", json.dumps(EVALUATION).encode(), judge, in_json),
        Target("data.json", b'{"sd": 0.5, "rows": 256}', lambda file: datanote.read(file.parent), in_json),
        Target("metrics.jsonl", b"".join(map(json_line, range(5))), log.read_log, in_lines, of_lines),
        Target("state.json", MANIFEST.model_dump_json().encode(), state, in_json),
        Target("w.safetensors", tensors, weigh),
        Target("header.safetensors", tensors, weigh, in_header, of_header),
        Target("shard-00001-model-00001-of-00001.safetensors", shard(), shards, in_header, of_header),
        Target("reference.npz", npz(), reference),
        Target("small.npz", npz(compressed=True), reference),
    ]


CACHE = {
    **{"codec": {"kind": "taef2"}, "weights": "0" * 64, "resolution": 8, "crop": "center", "source": "x", "classes": 2},
    **{"names": ["a", "b"], "store": "samples", "dtype": "float16", "flips": False, "shard_rows": 4, "rows": 4},
    "columns": {"x": {"dtype": "float16", "shape": [32, 1, 1]}, "labels": {"dtype": "int64"}},
    "shards": [{"file": "shard-00000.safetensors", "rows": 4, "size": 9, "sha256": "0" * 64}],
}
EVALUATION = {
    **{
        "run": "runs/a",
        "file": "runs/a/evaluation.json",
        "step": 20,
        "weights": "net.safetensors",
        "protocol": "digits",
    },
    **{"samples": 500, "seed": 0, "solver": {"kind": "restart", "m": 0.5}, "state": "untrained"},
    "results": [{"nfe": n, "solver": "restart", "fd_grey": 3.5, "fd": 3.25, "fd_sd": 0.5} for n in (1, 2)],
    "contrast": [{"nfe": 1, "solver": "euler", "fd_grey": 5.5, "fd": None, "fd_sd": 0.5}],
    "baselines": {
        "halves": {"mean": 0.5, "sd": 0.25, "splits": 20.0},
        "noise": {"mean": 9.5, "sd": 0.5, "fd_sd": 0.25},
    },
    "card": {
        **{"protocol": "digits", "samples": 500, "features": "x", "reference": "y", "reference_sha256": "0" * 64},
        **{"codec": {"kind": "taef2", "sha256": None}, "seed": 0, "solver": {"kind": "restart", "m": 0.5}},
        **{"nfe": [1, 2], "contrast": [1], "step": 20, "weights": "net.safetensors"},
    },
}
MANIFEST = manifest.Manifest(
    step=20,
    images=320,
    versions={"torch": "2.13"},
    files={"net.safetensors": manifest.Listed(bytes=3, sha256="0" * 64)},
)


def judge(file: Path) -> None:
    """Set beside itself, and on a page."""
    compare([str(file)])
    opened = cast(Any, SimpleNamespace(folder=file.parent, step=20, weights="net.safetensors"))
    judged = score.judgement(opened.folder, opened.step, opened.weights)
    if judged:
        score.rows(judged, judged["columns"])
        score.baselines(judged, judged["columns"])
        score.doubts(5000, 20, judged, None)


def json_line(step: int) -> bytes:
    """A row of a log."""
    return (
        json.dumps({"step": step, "loss": 0.5, "notes": {"beyond_u": 0.5}, "bins": {"loss": [1, None]}}).encode()
        + b"\n"
    )


def in_json(value: object) -> bytes:
    """As JSON, NaN and infinity as Python writes them."""
    return json.dumps(value).encode()


def in_yaml(value: object) -> bytes:
    """As YAML."""
    return yaml.dump(value).encode("utf-8", "surrogatepass")


def of_yaml(data: bytes) -> Any:  # noqa: ANN401
    """The values in YAML."""
    return yaml.parse(data.decode())


def in_lines(rows: object) -> bytes:
    """A log of these rows."""
    return b"".join(in_json(row) + b"\n" for row in (rows if isinstance(rows, list) else [rows]))


def of_lines(data: bytes) -> list[Any]:
    """The rows of a log."""
    return [json.loads(line) for line in data.splitlines()]


def state(file: Path) -> None:
    """A checkpoint's list, and what it says of the checkpoint."""
    (file.parent / "net.safetensors").write_bytes(b"abc")
    checkpoint = manifest.Checkpoint(file.parent)
    checkpoint.fault()
    _ = checkpoint.manifest


def in_header(header: object) -> bytes:
    """A safetensors file with another header."""
    data = in_json(header)
    return struct.pack("<Q", len(data)) + data + bytes(64)


def of_header(data: bytes) -> Any:  # noqa: ANN401
    """The header of a safetensors file."""
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size])


def shard() -> bytes:
    """What a rank writes."""
    where = {"a.weight": {"saved_offsets": [0, 0]}, "a.bias": {"saved_offsets": [0]}}
    whole = {"a.weight": torch.ones(4, 3), "a.bias": torch.ones(4)}
    return safetensors.torch.save(whole, {"DCP_SHARDING_INFO": json.dumps(where), "DCP_VERSION": "1.0"})


def npz(*, compressed: bool = False) -> bytes:
    """A small reference file."""
    file, g = io.BytesIO(), np.random.default_rng(0)
    x, y = g.normal(size=(20, WIDE)), g.normal(size=(20, NARROW))
    arrays = {"mu": x.mean(0), "sigma": np.cov(x.T), "mu_s": y.mean(0), "sigma_s": np.cov(y.T)}
    (np.savez_compressed if compressed else np.savez)(file, arr_0=np.zeros((3, 4, 4, 3), np.uint8), **arrays)
    return file.getvalue()


def reference(file: Path) -> None:
    """Its moments, and its images."""
    adm.WIDTH, adm.SPATIAL_WIDTH, before = WIDE, NARROW, (adm.WIDTH, adm.SPATIAL_WIDTH)
    try:
        found = adm.read_adm(file, count=20)
        if found.image_file.shape[:3] == (3, 4, 4):
            list(found.images(2))
    finally:
        adm.WIDTH, adm.SPATIAL_WIDTH = before
