"""The work that `kill.py` kills: which command, how its folder shows how far it has come, and what must come out.

`workloads` lists all five by name. A command works in a folder of its own, in this order:

1. `prepared_folder` makes a scratch folder whose subfolder INPUTS has what commands read: images, an autoencoder with
   random weights and a trained run (`write_inputs`).
2. `new_work_folder` makes an empty folder for one command, with a link to INPUTS.
3. While the command runs, `Workload.count_units` reads from the folder how many pieces of the work are done.
4. At its end, `Workload.fingerprint` reads what must be equal to the bit, and `temporary_files` what lies about.
"""

import json
import re
import shutil
from collections.abc import Callable, Generator
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from autoencoder import taef2
from dumo.data import Latents
from dumo.io import digest, tensor_files
from dumo.run import fill_caches
from dumo.run.folder import CHECKPOINT_MARK
from e2e.shell import TINY
from reliability import process

Fingerprint = dict[str, str]  # texts and hashes by name: two ends of a work are the same if these are equal

INPUTS = "inputs"
IMAGE_SIDE = 32  # pixels
SHARD_ROWS = 8  # images in a shard of latents
NUM_SHARDS = 12
NUM_STEPS = 60  # of the workload `training`
NUM_SAVES = 6  # of the workload `saving`, each after STEPS_PER_SAVE steps
STEPS_PER_SAVE = 2
NUM_PAIR_FILES = 6  # of the workload `pairs`: 6,144 pairs in files of 1,024
NUM_REPORT_ROWS = 3  # of the workload `evaluating`
VOLATILE_KEYS = ("seconds", "date", "when", "machine", "rate")  # of JSON: they differ from run to run
TRAINING_FIELDS = [  # all that has a state: two averages, reference draws, a schedule with warm-up, clipping
    "train.log_every=1",
    "train.keep=3",
    "train.ema=[{decay: 0.99}, {decay: 0.9, ramp: false}]",
    "train.clip=1",
    "train.ref=0.9",
    "train.schedule.kind=cosine",
    "train.schedule.warmup=20",
    "objective.guide.zeta=0.5",
]


@dataclass(frozen=True)
class Workload:
    """A command to kill. Its work is done in `num_units` pieces, such as steps or shards."""

    name: str
    words: tuple[str, ...]  # of the command
    num_units: int
    unit_seconds: float  # about what a unit takes: a kill comes up to as long after one
    count_units: Callable[[Path], int]  # how many units the folder shows to be done
    was_interrupted: Callable[[Path], bool]  # whether the kill that has just come fell into this work
    fingerprint: Callable[[Path], Fingerprint]  # of what the finished command leaves in the folder


def workloads() -> dict[str, Workload]:
    """All workloads by name."""
    train = ("train", "digits", "--out", "run", *TINY, *TRAINING_FIELDS)
    saving_fields = [
        "net.width=256",  # so that writing a checkpoint takes time
        "net.depth=2",
        "train.batch=4",
        f"train.steps={NUM_SAVES * STEPS_PER_SAVE}",
        f"train.save_every={STEPS_PER_SAVE}",
    ]
    encode = ("encode", f"{INPUTS}/images", "--out", "cache", "--codec", "taef2", "--side", str(IMAGE_SIDE))
    codec_weights = [f"data.codec.weights={INPUTS}/taef2.safetensors"]
    teacher_fields = ["train.steps=10", f"teacher.source={INPUTS}/digits", "teacher.pairs.count=6144"]
    all_workloads = [
        Workload(
            name="training",
            words=(*train, f"train.steps={NUM_STEPS}", "train.save_every=10"),
            num_units=NUM_STEPS,
            unit_seconds=0.02,
            count_units=_count_logged_steps,
            was_interrupted=_lacks_last_checkpoint,
            fingerprint=training_fingerprint,
        ),
        Workload(
            name="saving",
            words=(*train, *saving_fields),
            num_units=NUM_SAVES,
            unit_seconds=0.15,
            count_units=_count_saves,
            was_interrupted=_has_partial_checkpoint,
            fingerprint=training_fingerprint,
        ),
        Workload(
            name="encoding",
            words=(*encode, *codec_weights),
            num_units=NUM_SHARDS,
            unit_seconds=0.2,
            count_units=_count_shards,
            was_interrupted=_lacks_shards,
            fingerprint=_cache_fingerprint,
        ),
        Workload(
            name="pairs",
            words=(*train, *teacher_fields),
            num_units=NUM_PAIR_FILES,
            unit_seconds=0.3,
            count_units=_count_pair_files,
            was_interrupted=_lacks_pairs,
            fingerprint=_pairs_fingerprint,
        ),
        Workload(
            name="evaluating",
            words=("evaluate", "judged", "--nfe", "1,2"),
            num_units=NUM_REPORT_ROWS,
            unit_seconds=0.6,
            count_units=_count_sampled_rows,
            was_interrupted=_lacks_report,
            fingerprint=_report_fingerprint,
        ),
    ]
    return {workload.name: workload for workload in all_workloads}


# --------------------------------------------------------------------------------------------------- folders to work in


@contextmanager
def prepared_folder() -> Generator[Path, None, None]:
    """Make a scratch folder with INPUTS in it, and remove it at the end. Every user may read it."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        folder.chmod(0o755)
        exit_code = process.run(("train", "digits", "--out", "digits", *TINY), folder)
        if exit_code:
            raise SystemExit(process.read_log(folder))
        write_inputs(folder / INPUTS, folder / "digits")
        yield folder


def write_inputs(inputs: Path, trained_run: Path) -> None:
    """Fill `inputs`: images of noise, the weights of an autoencoder, a cache without shards, a copy of a run."""
    images = inputs / "images"
    images.mkdir(parents=True)
    shape = (SHARD_ROWS * NUM_SHARDS, IMAGE_SIDE, IMAGE_SIDE, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(images / f"{i:03}.png")
    shutil.copytree(trained_run, inputs / "digits")
    taef2(inputs / "taef2.safetensors")

    # Begin a cache whose shards have few images. `dumo encode` resumes it and keeps their number.
    with chdir(inputs.parent):
        codec_weights = f"data.codec.weights={INPUTS}/taef2.safetensors"
        work = fill_caches.encoding_work(
            f"{INPUTS}/images", [codec_weights], out=f"{INPUTS}/cache", codec="taef2", side=IMAGE_SIDE
        )
        assert isinstance(work.data, Latents)
        fill_caches.encode(work.data, shard_rows=SHARD_ROWS, rank=NUM_SHARDS, world=NUM_SHARDS + 1)


def new_work_folder(folder: Path, inputs: Path) -> Path:
    """Make the folder in which a command works: with a link to the inputs, and a run of its own to evaluate."""
    folder.mkdir(parents=True)
    (folder / INPUTS).symlink_to(inputs)
    shutil.copytree(inputs / "digits", folder / "judged")
    shutil.copytree(inputs / "cache", folder / "cache")
    return folder


def temporary_files(folder: Path) -> list[Path]:
    """What lies in a folder under a hidden or temporary name, but for the mark of a run that has checkpoints."""
    paths: list[Path] = []
    for path in folder.rglob("*"):
        is_temporary = path.name.startswith(".") or path.name.endswith(".tmp")
        if is_temporary and path.name != CHECKPOINT_MARK:
            paths.append(path)
    return paths


# -------------------------------------------------------------------------------------------- how far the work has come


def _count_logged_steps(folder: Path) -> int:
    """The rows of a training's log: it has one for each step."""
    log = folder / "run/metrics.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def _lacks_last_checkpoint(folder: Path) -> bool:
    """Whether the checkpoint of a training's last step is not written."""
    return _last_checkpoint(folder).name != f"step-{NUM_STEPS:08}"


def _last_checkpoint(folder: Path) -> Path:
    """The folder of a training's last checkpoint; `folder` itself where there is none."""
    checkpoints = (folder / "run/checkpoints").glob("step-*")
    return max(checkpoints, key=lambda path: path.name, default=folder)


def _count_saves(folder: Path) -> int:
    """How many checkpoints have been written, or begun."""
    last_step = 0
    for path in (folder / "run/checkpoints").glob("*"):
        match = re.match(r"\.?step-(\d+)", path.name)  # hidden while it is being written
        if match:
            last_step = max(last_step, int(match[1]))
    return last_step // STEPS_PER_SAVE


def _has_partial_checkpoint(folder: Path) -> bool:
    """Whether a part of a checkpoint lies about, which was being written or removed."""
    return bool(temporary_files(folder / "run/checkpoints"))


def _count_shards(folder: Path) -> int:
    """The shards of latents that are written. The last one counts when the cache's index names them all."""
    index = folder / "cache/index.json"
    if index.exists() and "shard-00000" in index.read_text():
        return NUM_SHARDS
    notes = list((folder / "cache").glob("shard-*.json"))
    return min(len(notes), NUM_SHARDS - 1)


def _lacks_shards(folder: Path) -> bool:
    """Whether the cache is not complete."""
    return _count_shards(folder) < NUM_SHARDS


def _count_pair_files(folder: Path) -> int:
    """The files of a teacher's pairs."""
    return len(list((folder / "run/pairs").glob("*.safetensors")))


def _lacks_pairs(folder: Path) -> bool:
    """Whether some of a teacher's pairs are not written."""
    return _count_pair_files(folder) < NUM_PAIR_FILES


def _count_sampled_rows(folder: Path) -> int:
    """The rows of a report that the running evaluation has begun to sample; all once the report is written."""
    if not _lacks_report(folder):
        return NUM_REPORT_ROWS  # as after a kill that came too late
    titles = (line.partition(":")[0] for line in process.read_log(folder).splitlines())
    return len({title for title in titles if title.startswith("sampling, ")})


def _lacks_report(folder: Path) -> bool:
    """Whether the report is not written."""
    return not (folder / "judged/evaluation.json").exists()


# ------------------------------------------------------------------------------------------------ what must be the same


def training_fingerprint(folder: Path) -> Fingerprint:
    """Of the training in folder/run: spec, data, tensors and counters of the last checkpoint, and every log row.

    The names of the checkpoints that are kept count, too.
    """
    run = folder / "run"
    checkpoint = _last_checkpoint(folder)
    fingerprint: Fingerprint = {}

    # Counters.
    state = json.loads((checkpoint / "state.json").read_text())
    for key in ("step", "images"):
        fingerprint[f"state.json {key}"] = str(state["facts"][key])
    fingerprint["checkpoints"] = str(sorted(path.name for path in (run / "checkpoints").glob("step-*")))

    # tensors
    for part in filter(Path.is_dir, checkpoint.iterdir()):
        for name, tensor in tensor_files.load(part).items():
            fingerprint[f"{part.name} {name}"] = digest.of_tensor(tensor)

    # log
    log_rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    fingerprint["metrics.jsonl"] = str([row["step"] for row in log_rows])
    for row in log_rows:
        fingerprint[f"metrics.jsonl {row['step']}"] = _stable_json(row)

    return fingerprint | _text_without_folder(run, "run.yaml")


def _pairs_fingerprint(folder: Path) -> Fingerprint:
    """Of the training in folder/run: its own fingerprint, every file of pairs, and what the run says of its teacher."""
    run = folder / "run"
    return training_fingerprint(folder) | _file_hashes(run / "pairs") | _text_without_folder(run, "teacher.json")


def _cache_fingerprint(folder: Path) -> Fingerprint:
    """Of every file of the cache."""
    return _file_hashes(folder / "cache")


def _report_fingerprint(folder: Path) -> Fingerprint:
    """Of every entry of the report."""
    report = json.loads((folder / "judged/evaluation.json").read_text())
    return {key: _stable_json(value) for key, value in report.items()}


def _text_without_folder(run: Path, name: str) -> Fingerprint:
    """The text of a run's file, without the path of the folder in which the run lies."""
    text = (run / name).read_text()
    return {name: text.replace(str(run.parent.resolve()), "")}


def _file_hashes(folder: Path, pattern: str = "*") -> Fingerprint:
    """The hashes of a folder's files with a pattern, by folder's and file's name. Hidden files do not count."""
    hashes: Fingerprint = {}
    for path in sorted(folder.glob(pattern)):
        if path.is_file() and not path.name.startswith("."):
            hashes[f"{folder.name}/{path.name}"] = digest.of_file(path)
    return hashes


def _stable_json(value: object) -> str:
    """A value of JSON as text, without the entries at any depth whose keys are VOLATILE_KEYS."""
    return json.dumps(_without_volatile_keys(value), sort_keys=True)


def _without_volatile_keys(value: Any) -> Any:  # noqa: ANN401, what JSON holds
    if isinstance(value, dict):
        return {key: _without_volatile_keys(entry) for key, entry in value.items() if key not in VOLATILE_KEYS}
    if isinstance(value, list):
        return [_without_volatile_keys(entry) for entry in value]
    return value
