"""The places where work is killed: what is started, how its folder shows how far it is, and what must come out.

Every command works in a folder of its own, in which `given` holds what stands before: a trained run and images.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dumo.io import digest, weights
from e2e.shell import TINY, sets
from reliability.process import said

SIDE, IMAGES = 32, 96
OFTEN = sets("train.log_every=1", "train.keep=3", "train.ema=[{decay: 0.99}, {decay: 0.9, ramp: false}]")
TIMES = ("seconds", "date", "when", "machine", "rate")  # what tells of the machine and the hour, and not of the run
End = dict[str, str]


@dataclass(frozen=True)
class Place:
    """Work to kill, done in `units` pieces."""

    name: str
    words: tuple[str, ...]  # of the command
    units: int
    pause: float  # seconds that a piece takes, about: a kill comes up to so long after one
    done: Callable[[Path], int]  # how many pieces its folder shows
    inside: Callable[[Path], bool]  # whether the kill that has just come fell into this work
    end: Callable[[Path], End]  # what must be the same, by name


def given(folder: Path, run: Path) -> None:
    """What the places start from: images, and a trained run, which is copied."""
    (folder / "images").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, SIDE, SIDE, 3), dtype=np.uint8)
    for i, one in enumerate(pixels):
        Image.fromarray(one).save(folder / f"images/{i:03}.png")
    shutil.copytree(run, folder / "digits")


def fresh(folder: Path, start: Path) -> Path:
    """A new folder to work in, beside what is given."""
    folder.mkdir(parents=True)
    (folder / "given").symlink_to(start)
    shutil.copytree(start / "digits", folder / "judged")
    return folder


def places(codec: str = "identity") -> dict[str, Place]:
    """All, by name; what is encoded is by this codec."""
    train = ("train", "digits", "--out", "run", *TINY, *OFTEN)
    wide = sets("net.width=256", "net.depth=2", "train.batch=4", "train.steps=40", "train.save_every=4")
    pairs = sets("train.steps=10", "teacher.source=given/digits", "teacher.pairs.count=6144", "teacher.pairs.nfe=4")
    encode = ("encode", "given/images", "cache", "--codec", codec, "--side", str(SIDE), "--shard-rows", "8")
    all_ = (
        Place(
            "training", (*train, *sets("train.steps=60", "train.save_every=10")), 60, 0.02, steps, untrained, trained
        ),
        Place("saving", (*train, *wide), 10, 0.15, lambda folder: saves(folder) // 4, half_saved, trained),
        Place("encoding", encode, IMAGES // 8, 0.05, shards, lambda folder: shards(folder) < IMAGES // 8, encoded),
        Place("pairs", (*train, *pairs), 6, 0.3, teachings, lambda folder: teachings(folder) < 6, taught),
        Place(
            *("evaluating", ("evaluate", "judged", "--nfe", "1,2,4"), 4, 0.6),
            *(rows, lambda folder: not (folder / "judged/evaluation.json").exists(), judged),
        ),
    )
    return {place.name: place for place in all_}


def steps(folder: Path) -> int:
    """The last step in the log, or of the last checkpoint."""
    file = folder / "run/metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def untrained(folder: Path) -> bool:
    """Whether a training has not come to its end."""
    return not (folder / "run/checkpoints/step-00000060").exists()


def saves(folder: Path) -> int:
    """The step of the last checkpoint that is written, or being written."""
    names = (path.name for path in (folder / "run/checkpoints").glob("*"))
    return max((int(match[1]) for name in names if (match := re.match(r"\.?step-(\d+)", name))), default=0)


def half_saved(folder: Path) -> bool:
    """Whether a part of a checkpoint lies about: one that was being written, or removed."""
    return bool(left(folder / "run/checkpoints"))


def shards(folder: Path) -> int:
    """The shards that stand, with their notes or in the list of a whole cache."""
    cache = folder / "cache"
    whole = (cache / "cache.yaml").exists() and "shard-00000" in (cache / "cache.yaml").read_text()
    return IMAGES // 8 if whole else min(len(list(cache.glob("shard-*.json"))), IMAGES // 8 - 1)


def teachings(folder: Path) -> int:
    """The files of pairs."""
    return len(list((folder / "run/pairs").glob("*.safetensors")))


def rows(folder: Path) -> int:
    """The rows that this start has sampled."""
    return said(folder).count("\nsampling, ") + said(folder).startswith("sampling, ")


def trained(folder: Path) -> End:
    """Every tensor of the last checkpoint, its counters, and every row of the log."""
    run = folder / "run"
    last = max((run / "checkpoints").glob("step-*"), key=lambda path: path.name)
    about = json.loads((last / "state.json").read_text())
    parts = {path.name.removesuffix(".safetensors"): path for path in last.iterdir() if path.name != "state.json"}
    tensors = {
        f"{last.name} {part} {name}": digest.of_tensor(x)
        for part, path in parts.items()
        for name, x in weights.load(path).items()
    }
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    counters = {f"state.json {key}": str(about[key]) for key in ("step", "images")}
    return tensors | counters | {f"metrics.jsonl {row['step']}": timeless(row) for row in logged}


def taught(folder: Path) -> End:
    """As `trained`, and every file of pairs."""
    return trained(folder) | hashes(folder / "run/pairs") | hashes(folder / "run", "*.json")


def encoded(folder: Path) -> End:
    """Every file of the cache."""
    return hashes(folder / "cache")


def judged(folder: Path) -> End:
    """Every entry of the report."""
    report = json.loads((folder / "judged/evaluation.json").read_text())
    return {key: timeless(value) for key, value in report.items()}


def hashes(folder: Path, names: str = "*") -> End:
    """Files by name, hidden ones left out."""
    return {
        f"{folder.name}/{path.name}": digest.of_file(path)
        for path in sorted(folder.glob(names))
        if path.is_file() and not path.name.startswith(".")
    }


def left(folder: Path) -> list[Path]:
    """What lies about under a hidden or temporary name."""
    return [path for path in folder.rglob("*") if path.name.startswith(".") or path.name.endswith(".tmp")]


def timeless(value: Any) -> str:  # noqa: ANN401, what JSON holds
    """As JSON, without what the machine and the hour decide."""

    def bare(value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, dict):
            return {key: bare(one) for key, one in value.items() if key not in TIMES}
        return [bare(one) for one in value] if isinstance(value, list) else value

    return json.dumps(bare(value), sort_keys=True)
