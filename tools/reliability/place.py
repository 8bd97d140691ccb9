"""The places where work is killed: what is started, how its folder shows how far it is, and what must come out.

Every command works in a folder of its own, in which `given` holds what stands before: a trained run and images.
"""

import json
import re
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from autoencoder import taef2
from dumo.io import digest, weights
from dumo.run.folder import CHECKPOINT_WRITTEN
from e2e.shell import TINY, sets
from reliability.process import finish, said

SIDE, SHARD, SHARDS = 32, 8, 12  # pixels, images to a shard, shards
REPORTED = 3  # rows of a report
RICH = sets("train.log_every=1", "train.keep=3", "train.ema=[{decay: 0.99}, {decay: 0.9, ramp: false}]", "train.clip=1")
RICH += sets("train.ref=0.9", "train.schedule.kind=cosine", "train.schedule.warmup=20", "objective.guide.zeta=0.5")
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
    pixels = np.random.default_rng(0).integers(0, 256, (SHARD * SHARDS, SIDE, SIDE, 3), dtype=np.uint8)
    for i, one in enumerate(pixels):
        Image.fromarray(one).save(folder / f"images/{i:03}.png")
    shutil.copytree(run, folder / "digits")
    taef2(folder / "taef2.safetensors")


@contextmanager
def furnished() -> Generator[Path, None, None]:
    """A scratch folder, readable to all, in whose folder `given` lies what the places start from."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        folder.chmod(0o755)
        if finish(("train", "digits", "--out", "digits", *TINY), folder):
            raise SystemExit(said(folder))
        given(folder / "given", folder / "digits")
        yield folder


def fresh(folder: Path, start: Path) -> Path:
    """A new folder to work in, beside what is given."""
    folder.mkdir(parents=True)
    (folder / "given").symlink_to(start)
    shutil.copytree(start / "digits", folder / "judged")
    return folder


def places() -> dict[str, Place]:
    """All, by name."""
    train = ("train", "digits", "--out", "run", *TINY, *RICH)
    often = sets("train.steps=60", "train.save_every=10")
    wide = sets("net.width=256", "net.depth=2", "train.batch=4", "train.steps=12", "train.save_every=2")
    pairs = sets("train.steps=10", "teacher.source=given/digits", "teacher.pairs.count=6144")
    encode = ("encode", "given/images", "cache", "--codec", "taef2", "--side", str(SIDE), "--shard-rows", str(SHARD))
    encode += tuple(sets("data.codec.weights=given/taef2.safetensors"))
    all_ = (
        Place("training", (*train, *often), 60, 0.02, steps, lambda here: last(here).name != "step-00000060", trained),
        Place("saving", (*train, *wide), 6, 0.15, lambda folder: saves(folder) // 2, half_saved, trained),
        Place("encoding", encode, SHARDS, 0.2, shards, lambda folder: shards(folder) < SHARDS, encoded),
        Place("pairs", (*train, *pairs), 6, 0.3, teachings, lambda folder: teachings(folder) < 6, taught),
        Place("evaluating", ("evaluate", "judged", "--nfe", "1,2"), REPORTED, 0.6, rows, unjudged, judged),
    )
    return {place.name: place for place in all_}


def steps(folder: Path) -> int:
    """The rows of a training's log, one for each step."""
    file = folder / "run/metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def last(folder: Path) -> Path:
    """The last checkpoint of a training."""
    return max((folder / "run/checkpoints").glob("step-*"), key=lambda path: path.name, default=folder)


def saves(folder: Path) -> int:
    """The step of the last checkpoint that is written, or being written."""
    names = (path.name for path in (folder / "run/checkpoints").glob("*"))
    return max((int(match[1]) for name in names if (match := re.match(r"\.?step-(\d+)", name))), default=0)


def half_saved(folder: Path) -> bool:
    """Whether a part of a checkpoint lies about: of one that was being written, or removed."""
    return bool(left(folder / "run/checkpoints"))


def shards(folder: Path) -> int:
    """The shards that stand: those with notes, or all once the cache is whole."""
    cache = folder / "cache"
    whole = (cache / "index.json").exists() and "shard-00000" in (cache / "index.json").read_text()
    return SHARDS if whole else min(len(list(cache.glob("shard-*.json"))), SHARDS - 1)


def teachings(folder: Path) -> int:
    """The files of pairs."""
    return len(list((folder / "run/pairs").glob("*.safetensors")))


def rows(folder: Path) -> int:
    """The rows of a report that this start has sampled; all where there is one, as after a kill that came too late."""
    return (
        REPORTED if not unjudged(folder) else sum(line.startswith("sampling, ") for line in said(folder).splitlines())
    )


def unjudged(folder: Path) -> bool:
    """Whether there is no report."""
    return not (folder / "judged/evaluation.json").exists()


def trained(folder: Path) -> End:
    """Every tensor of the last checkpoint, its counters, the names of those kept, every row of the log, the spec."""
    run, checkpoint = folder / "run", last(folder)
    about = json.loads((checkpoint / "state.json").read_text())
    parts = {weights.title(path): path for path in checkpoint.iterdir() if path.suffix not in (".json", ".yaml")}
    tensors = {f"{part} {name}": digest.of_tensor(x) for part in parts for name, x in weights.load(parts[part]).items()}
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    counters = {f"state.json {key}": str(about[key]) for key in ("step", "images")}
    counters["checkpoints"] = str(sorted(path.name for path in (run / "checkpoints").glob("step-*")))
    counters["metrics.jsonl"] = str([row["step"] for row in logged])
    told = {f"metrics.jsonl {row['step']}": timeless(row) for row in logged}
    return tensors | counters | told | placeless(run, "run.yaml") | hashes(run, "data.json")


def taught(folder: Path) -> End:
    """As `trained`, every file of pairs, and who taught."""
    return trained(folder) | hashes(folder / "run/pairs") | placeless(folder / "run", "teacher.json")


def encoded(folder: Path) -> End:
    """Every file of the cache."""
    return hashes(folder / "cache")


def judged(folder: Path) -> End:
    """Every entry of the report."""
    report = json.loads((folder / "judged/evaluation.json").read_text())
    return {key: timeless(value) for key, value in report.items()}


def placeless(run: Path, name: str) -> End:
    """What a file of a run says, but for where it lies."""
    return {name: (run / name).read_text().replace(str(run.parent.resolve()), "")}


def hashes(folder: Path, names: str = "*") -> End:
    """Files by name, hidden ones left out."""
    return {
        f"{folder.name}/{path.name}": digest.of_file(path)
        for path in sorted(folder.glob(names))
        if path.is_file() and not path.name.startswith(".")
    }


def left(folder: Path) -> list[Path]:
    """What lies about under a hidden or temporary name, but for the mark of a run with checkpoints."""
    paths = [path for path in folder.rglob("*") if path.name != CHECKPOINT_WRITTEN]
    return [path for path in paths if path.name.startswith(".") or path.name.endswith(".tmp")]


def timeless(value: Any) -> str:  # noqa: ANN401, what JSON holds
    """As JSON, without what the machine and the hour decide."""

    def bare(value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, dict):
            return {key: bare(one) for key, one in value.items() if key not in TIMES}
        return [bare(one) for one in value] if isinstance(value, list) else value

    return json.dumps(bare(value), sort_keys=True)
