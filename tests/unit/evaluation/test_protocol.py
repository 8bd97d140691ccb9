"""Protocols see what is wrong with samples, say how large nothing is, and refuse what they cannot judge."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dumo.config.load import load
from dumo.data import Digits, Images
from dumo.encoders.classifier import digits
from dumo.evaluation import BundledProtocol, Context, measures
from dumo.evaluation.estimate import mean_sd
from dumo.evaluation.frechet import Moments, frechet_distance, pixel_frechet
from dumo.evaluation.mmd import gaussian_mmd
from dumo.evaluation.wholeset import Reference
from dumo.run.judge import evaluator_of, trained_data
from dumo.runtime.progress import no_bar
from dumo.runtime.random import stream
from dumo.types import UserError

DIGITS = BundledProtocol(kind="digits")


@pytest.fixture(scope="module")
def data() -> Reference:
    return Reference(*Digits().originals().reference(0, 0))


@pytest.fixture(scope="module")
def split() -> Reference:
    return Reference.of(Digits(held=359).originals(), DIGITS.total, 0)


@pytest.fixture(scope="module")
def perfect(data: Reference) -> dict[str, float]:
    return measures.baselines_digits(data, some(data)[1])["perfect"]


@pytest.fixture(scope="module")
def good(data: Reference) -> dict[str, float]:
    """The score of the data's own rows."""
    return measures.score_digits(*some(data), data)


def some(data: Reference, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """2,000 of the data's rows, or of these, with their classes."""
    rows = torch.arange(len(data.x)) if rows is None else rows
    rows = rows[torch.randint(len(rows), (DIGITS.total,), generator=stream("some"))]
    return data.x[rows], data.c[rows]


def noisy(x: Tensor, sd: float) -> Tensor:
    return x + sd * torch.randn(x.shape, generator=stream("noisy"))


def blurred(x: Tensor) -> Tensor:
    return 0.5 * x + 0.5 * F.avg_pool2d(F.pad(x, (1, 1, 1, 1), value=-1), 3, 1)


def points(i: int, n: int = 400) -> Tensor:
    return torch.randn(n, 2, generator=stream("points", i))


def toy() -> Reference:
    return Reference(points(-1), torch.zeros(400, dtype=torch.long), points)


@pytest.mark.nightly
def test_real_digits_score_well(good: dict[str, float], perfect: dict[str, float]) -> None:
    assert list(good)[:6] == ["mmd", "mmd_sd", "class_mmd", "class_mmd_sd", "fd_grey", "fd"]
    assert good["mmd"] < 2 * perfect["sd"]
    assert good["fd"] < perfect["fd"] + 3 * perfect["fd_sd"]
    assert good["precision"] > 0.95
    assert good["recall"] > 0.85
    assert good["accuracy"] > 0.98
    assert good["auc"] < 0.55  # copies of the data, so even below 0.5
    assert good["pixel_fd"] < perfect["pixel_fd"]
    assert good["nearest"] == 0


@pytest.mark.parametrize("fault", ["blur", "noise", "one class", "no threes"])
def test_faults_are_seen(fault: str, data: Reference, good: dict[str, float], perfect: dict[str, float]) -> None:
    x, c = some(data)
    if fault == "blur":
        x = blurred(x)
    elif fault == "noise":
        x = noisy(x, 0.4)
    else:
        x, c = some(data, torch.nonzero((data.c == 3) if fault == "one class" else (data.c != 3)).flatten())
    bad = measures.score_digits(x, c, data)
    assert bad["mmd"] > 3 * bad["mmd_sd"] > 6 * perfect["sd"]
    assert bad["fd"] > perfect["fd"] + 10 * perfect["fd_sd"]
    assert bad["fd"] > 10 * good["fd"]
    assert bad["pixel_fd"] > 4 * good["pixel_fd"]
    assert bad["auc"] > good["auc"] + 2 * perfect["auc_sd"]
    share = "recall" if fault in ("one class", "no threes") else "precision"
    assert bad[share] < good[share] - 0.05


@pytest.mark.nightly
def test_filed_digits_are_judged_at_the_grey_levels_of_the_data(data: Reference, good: dict[str, float]) -> None:
    """A quarter of a level either way, and light beyond black and white, change nothing that a file would hold."""
    x, c = some(data)
    off = x + (torch.rand(x.shape, generator=stream("off")) - 0.5) / 16
    off = torch.where(x == 1, 1.5, torch.where(x == -1, -7.0, off))
    score = measures.score_digits(off, c, data)
    for name in ("mmd", "fd_grey", "auc", "pixel_fd", "nearest"):
        assert score[name] == good[name]
    assert good["fd_grey"] == good["fd"]
    assert score["fd"] > 10 * good["fd"]
    # Why there are two: noise of mean zero hardly moves the features, until half of it is cut off.
    score = measures.score_digits(x + 0.2 * torch.randn(x.shape, generator=stream("noise")), (c + 1) % 10, data)
    assert good["fd"] < score["fd"] < score["fd_grey"] / 2
    assert score["accuracy"] < 0.02  # of the classes asked for


@pytest.mark.slow
def test_a_perfect_sampler_of_digits(data: Reference, perfect: dict[str, float]) -> None:
    """As two sets of digits have it that are drawn with replacement, the classes of the samples in turn."""
    assert all(perfect[f"fd{end}"] == perfect[f"fd_grey{end}"] for end in ("", "_sd"))
    found: dict[str, list[float]] = {"mean": [], "fd": [], "pixel_fd": []}
    features, own = digits.features(data.x), [(data.c == k).nonzero()[:, 0] for k in range(10)]
    for i in range(30):
        draws = stream("perfect", i)
        rows = torch.cat([of[torch.randint(len(of), (200,), generator=draws)] for of in own])
        again = torch.cat([of[torch.randint(len(of), (len(of),), generator=draws)] for of in own])
        x, y, c, d = features[rows], features[again], data.c[rows], data.c[again]
        found["mean"].append(gaussian_mmd(x, y, measures.DIGITS_WIDTH, c, d).value)
        found["fd"].append(frechet_distance(Moments.of(x), Moments.of(y)))
        found["pixel_fd"].append(pixel_frechet(data.x[rows], data.x[again]))
    for name, values in found.items():
        mean, sd = mean_sd(values)
        assert perfect[name] == pytest.approx(mean, abs=sd)
        assert perfect["sd" if name == "mean" else f"{name}_sd"] == pytest.approx(sd, rel=0.5)


@pytest.mark.slow
def test_samples_are_judged_against_what_was_held_out(split: Reference) -> None:
    """New digits have what a perfect sampler has, at its sizes; training images are copies."""
    assert split.trained is not None
    assert "never trained on" in split.facts(0, None)["reference"]
    assert (len(split.x), len(split.trained)) == (359, 1797 - 359)
    part = Reference(split.x[::2], split.c[::2], trained=split.trained)
    new, c = split.x[1::2].repeat(3, 1, 1, 1), split.c[1::2].repeat(3)
    score, perfect = measures.score_digits(new, c, part), measures.baselines_digits(part, split.c[1::2])["perfect"]
    assert abs(score["mmd"]) < 4 * perfect["sd"]
    assert score["nearest"] == pytest.approx(1, abs=3 * perfect["nearest_sd"])
    assert measures.score_digits(split.trained[:600], torch.arange(600) % 10, split)["nearest"] == 0


def test_only_another_split_is_held_out() -> None:
    images = Images(root="photos", side=8, split="train", classes=0)
    assert trained_data(images, "test") == images.originals
    assert trained_data(images, "train") is None
    assert trained_data(images, None) is None


def test_a_report_says_which_split_samples_are_compared_with(tmp_path: Path) -> None:
    """All of it, however few images of another are trained on; copies are looked for among the latter."""
    pixels = np.random.default_rng(0).integers(0, 256, (49, 8, 8, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        file = tmp_path / ("test" if i < 24 else "train") / f"{i}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(file)
    data = [f"data.root={tmp_path}", "data.side=8", "data.split=train", "data.classes=0", "data.count=21"]
    run = load("my-images", [*data, "evaluate.split=test", "evaluate.protocol={kind: photos, samples: 20}"])
    evaluator = evaluator_of(run, run.evaluate, torch.device("cpu"), no_bar)
    assert evaluator.facts["reference"] == "24 of 24 images of split test"
    assert evaluator.facts["copies"] == "looked for among 21 of 21 images that were trained on"


def test_of_five_folds_all_digits_are_held_out_but_two() -> None:
    held = [Digits(held=359, fold=fold).originals().held_out.x for fold in range(6)]
    assert len(torch.cat(held[:5]).unique(dim=0)) == len(torch.cat(held[:5])) == 1795
    assert torch.equal(held[5], held[0])


@pytest.mark.nightly
def test_toy_null_tells_a_draw_from_a_difference() -> None:
    null = measures.baselines_toy(toy(), toy().c)["null"]
    same = [measures.score_toy(points(i), toy().c, toy())["mmd2"] for i in range(100, 105)]
    assert max(map(abs, same)) < 4 * null["sd"]
    assert abs(null["mean"]) < 4 * null["sd"] / math.sqrt(50)
    for wrong in (points(100) + 0.4, 1.5 * points(100), points(100) * torch.tensor([1.0, 0.3])):
        assert measures.score_toy(wrong, toy().c, toy())["mmd2"] > 8 * null["sd"]


@pytest.mark.nightly
def test_scores_repeat(data: Reference, good: dict[str, float]) -> None:
    assert measures.score_digits(*some(data), data) == good
    assert measures.score_toy(points(1), toy().c, toy()) == measures.score_toy(points(1), toy().c, toy())


def test_points_of_ones_own_are_compared_with_any_number_of_samples() -> None:
    """They cannot be drawn anew, so there is no null to stand beside."""
    own = Reference(points(0, 50), torch.zeros(50, dtype=torch.long))
    near = measures.score_toy(points(1), toy().c, own)["mmd2"]
    assert near < measures.score_toy(points(1) + 0.5, toy().c, own)["mmd2"]
    assert measures.baselines_toy(own, toy().c) == {}


def test_toy_widths_are_in_sd_of_the_data() -> None:
    """So points in another unit, or another place, have the same score."""
    metres, feet = toy(), Reference(3.28 * toy().x + 5, toy().c)
    score = measures.score_toy(points(1) + 0.2, metres.c, metres)["mmd2"]
    assert measures.score_toy(3.28 * (points(1) + 0.2) + 5, feet.c, feet)["mmd2"] == pytest.approx(score, rel=1e-4)


def test_samples_that_do_not_fit_are_refused(data: Reference) -> None:
    x, _ = some(data)
    evaluator, every = DIGITS.evaluator(Context(Digits().originals, 10)), torch.arange(2000)
    with pytest.raises(UserError):
        evaluator.score([(every[1:], x[1:])])
    with pytest.raises(UserError):
        evaluator.score([(every, x / 0)])
    with pytest.raises(UserError):
        measures.score_toy(points(1), toy().c, Reference(points(0, 399), toy().c[1:], points))
