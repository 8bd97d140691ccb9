"""What do captions cost? DuMo by words against DuMo by classes, of equal width, depth and counted cost.

An image has one of several sentences around its class's name, and a small encoder of bytes is trained along. Beside the
distance of all samples stands the mean distance of each class's samples to its own images, the class FD: by captions
that were trained on, and by templates that were held out. Texts that are understood keep both low.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from dumo.config.load import load
from dumo.features import digits
from dumo.io import archive
from dumo.metrics.frechet import frechet_distance
from dumo.metrics.moments import Moments
from dumo.protocols.cifar10 import features_of
from dumo.reproduce import arm
from dumo.reproduce.plan import Cell, Finished, Plan, flops, trained_as
from dumo.run.folder import RunFolder
from dumo.run.sample import real_data, sample
from dumo.sampling.generate import labels

PAIRS = {"digits": "digits-words", "cifar10-latents": "cifar10-latents-words"}
STEPS = {"digits": 3000, "cifar10-latents": 1200}  # by words: three minutes of two cores, and five
FEATURES = {"digits": digits.features, "cifar10-features": features_of}
MOST = 4000  # samples of a class FD, 400 a class: ours
SCORES = ("nfe", "fd", "fd_sd", "fd_grey", "fd_grey_sd", "precision", "recall", "accuracy")


def cells(scale: str) -> Iterator[Cell]:
    """Both ways on both data, with several seeds; for smoke on digits, which need no encoding."""
    smoke = scale == "smoke"
    for data, words in PAIRS.items():
        if smoke and data != "digits":
            continue
        sets = [*(arm.SMALL if smoke else ()), "evaluate.nfe=[1,2]"]
        steps, cost = arm.SMOKE // 2 if smoke else STEPS[data], arm.work(load(words, sets))
        for by, recipe in (("class", data), ("words", words)):
            spec = load(recipe, [*sets, f"train.steps={round(steps * cost / arm.work(load(recipe, sets)))}"])
            each = round(flops(spec) / 1e6, 2)
            told = {"condition": by, "data": data, "steps": spec.train.steps, "MFLOP_per_pass": each}
            for seed in range(1 if smoke else 3):
                yield Cell(f"{recipe}-{seed}", trained_as(spec, seed=seed), told)


def table(done: list[Finished]) -> list[dict[str, Any]]:
    """A row per data, condition and number of passes: means over seeds, and the class FD of one pass."""
    rows: list[dict[str, Any]] = []
    for same in arm.seeds_of(done):
        words, real = same[0].opened.run.captions is not None, images(same[0].opened)
        apart = {
            "class_fd": fmean(class_fd(one.opened, real) for one in same),
            "class_fd_held": fmean(class_fd(one.opened, real, held=True) for one in same) if words else None,
        }
        for row in arm.averaged(same):
            told = {name: row.get(name) for name in (*same[0].cell.labels, *SCORES)}
            rows.append(told | (apart if row["nfe"] == 1 else dict.fromkeys(apart)) | {"seeds": row["seeds"]})
    return rows


def class_fd(opened: RunFolder, real: Sequence[Moments], *, held: bool = False) -> float:
    """The mean over classes of the Fréchet distance of their samples, of one pass, to their images, `real`."""
    run = opened.run
    protocol, many = run.evaluate.protocol, run.data.labels
    c = labels(min(MOST, 2 * len(protocol.labels(many))), many)
    made = sample(opened, nfe=1, c=run.conditions(c, held=held), seed=run.evaluate.seed).x
    fake = FEATURES[protocol.kind](made)
    return fmean(frechet_distance(Moments.of(fake[c == k]), of) for k, of in enumerate(real))


def images(opened: RunFolder) -> list[Moments]:
    """Those of the features of the data's images, by class."""
    run = opened.run
    x, c = real_data(run).reference(run.train.batch, 0)
    features = FEATURES[run.evaluate.protocol.kind](x)
    return [Moments.of(features[c == k]) for k in range(run.data.labels)]


def apart(done: Sequence[Finished]) -> dict[str, list[Finished]]:
    """The cells by their data."""
    return {data: found for data in PAIRS if (found := [one for one in done if one.cell.labels["data"] == data])}


def draw(done: list[Finished], folder: Path) -> list[Path]:
    """What the first seeds make in one pass, a picture for each of the data."""
    pictures = {folder / f"words-{data}-samples.png": arm.side_by_side(same) for data, same in apart(done).items()}
    for path, image in pictures.items():
        archive.write_picture(path, image)
    return [*pictures]


PLAN = Plan(
    "DuMo by words against DuMo by classes, of equal size and counted cost (ours)",
    cells,
    table,
    draw,
    unpublished="the paper's text-to-image model is tuned from Qwen-Image, of 20 B parameters",
)
