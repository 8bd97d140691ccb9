"""What evaluation refuses: one case per row, with the name that the message must contain."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from dumo.encoders import inception
from dumo.evaluation import (
    BundledProtocol,
    ClipProtocol,
    Context,
    FeatureProtocol,
    ImageProtocol,
    LikelihoodProtocol,
    MetricProtocol,
    Reference,
    reference,
)
from dumo.evaluation.frechet import Moments, frechet_distance, pixel_frechet
from dumo.evaluation.measures import score_cifar10, score_toy
from dumo.evaluation.mmd import kid
from dumo.evaluation.neighbours import precision_recall
from dumo.evaluation.protocol import Evaluator, Protocol
from dumo.evaluation.reference import STANDARDS, Standard
from dumo.evaluation.statistics import order_of, statistics_of
from dumo.evaluation.stored import FILE, StoredFeatures
from dumo.evaluation.user_metrics import UserMetricsEvaluator
from dumo.evaluation.wholeset import collect
from dumo.io.data_source import TensorData
from dumo.io.picture import from_uint8
from dumo.io.read import CACHE_VARIABLE
from dumo.runtime.random import stream
from dumo.types import UserError
from unit.evaluation.extractor import NARROW, WIDTH, Album, Peephole, extractor, images

# Fields of `evaluate.protocol`.
FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"kind": "faces"}, "faces"),
    ({"kind": "digits", "seed": 1}, "seed"),
    ({"kind": "digits", "samples": 100}, "samples"),
    ({"kind": "toy", "samples": 1}, "samples"),
    ({"kind": "cifar10-features", "samples": 999}, "samples"),
    ({"kind": "folder", "reference": "a.npz"}, "reference"),
]

# Samples of another shape, or of other classes, than a protocol judges.
SHAPES: list[tuple[Protocol, tuple[int, ...], int, str]] = [
    (BundledProtocol(kind="digits"), (2,), 0, "(2,)"),
    (BundledProtocol(kind="digits"), (1, 8, 8), 1000, "1000"),
    (BundledProtocol(kind="toy"), (1, 8, 8), 10, "(1, 8, 8)"),
    (BundledProtocol(kind="cifar10-features"), (1, 8, 8), 10, "(1, 8, 8)"),
    (BundledProtocol(kind="cifar10-features"), (3, 32, 32), 1000, "1000"),
    (BundledProtocol(kind="photos"), (4, 8, 8), 0, "channels"),
    (ImageProtocol(kind="adm-imagenet256-50k"), (3, 32, 32), 1000, "256x256"),
    (ImageProtocol(kind="adm-imagenet512-50k"), (3, 256, 256), 1000, "512x512"),
    (ImageProtocol(kind="folder"), (1, 8, 8), 0, "(1, 8, 8)"),
    (ImageProtocol(kind="folder"), (2,), 0, "(2,)"),
    (ImageProtocol(kind="cifar10-train50k"), (3, 32, 32), 17, "17"),
    (ImageProtocol(kind="folder", samples=2048), (3, 64, 64), 0, "2048"),
    (ClipProtocol(kind="clip-score"), (2,), 0, "(2,)"),
    (FeatureProtocol(kind="dinov2"), (4, 32, 32), 0, "(4, 32, 32)"),
    (LikelihoodProtocol(levels=17), (2,), 0, "evaluate.protocol.levels"),
]


@pytest.mark.parametrize(("fields", "name"), FIELDS)
def test_fields(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ValidationError) as refused:
        TypeAdapter[Any](MetricProtocol).validate_python(fields)
    assert name in str(refused.value)


@pytest.mark.parametrize(("protocol", "shape", "classes", "name"), SHAPES)
def test_shapes(protocol: Protocol, shape: tuple[int, ...], classes: int, name: str) -> None:
    with pytest.raises(UserError) as refused:
        protocol.check(shape, classes)
    assert name in str(refused.value)


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A small network in Inception's place, small standards of protocols, and an empty cache."""
    net = Peephole()
    monkeypatch.setattr(inception, "load", lambda path, device: net)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(reference, "WIDTH", WIDTH)
    monkeypatch.setattr(reference, "SPATIAL_WIDTH", NARROW)
    monkeypatch.setitem(STANDARDS, "adm-imagenet256-50k", Standard(120, 4, 1000, 12, 10, "https://there"))
    monkeypatch.setitem(STANDARDS, "cifar10-train50k", Standard(120, 4, 10, 12, 10))


def random_rows(n: int, width: int) -> torch.Tensor:
    return torch.randn(n, width, generator=stream("refusals", n, width))


def evaluator(protocol: Protocol, data: object, **context: Any) -> Evaluator:  # noqa: ANN401, fields of a context
    return protocol.evaluator(Context(lambda: data, **context))  # pyright: ignore[reportArgumentType]


def photos(n: int, classes: int = 0) -> Evaluator:
    x = from_uint8(images(n))
    c = torch.arange(n) % max(classes, 1)
    return evaluator(BundledProtocol(kind="photos", samples=60), TensorData(x, c), classes=classes)


def likelihood(levels: int | None = None, samples: int = 4) -> Evaluator:
    """Of four samples of 17 levels of grey."""
    x = torch.arange(17).repeat(4).view(4, 1, 1, 17) / 8 - 1
    return evaluator(LikelihoodProtocol(samples=samples, levels=levels), TensorData(x, torch.arange(4)))


def adm_file_of_another_size(here: Path) -> Evaluator:
    moments = {"mu": np.zeros(WIDTH), "sigma": np.eye(WIDTH), "mu_s": np.ones(NARROW), "sigma_s": np.eye(NARROW)}
    np.savez(here / "a.npz", arr_0=np.zeros((12, 5, 5, 3), np.uint8), **moments)
    return evaluator(ImageProtocol(kind="adm-imagenet256-50k", reference=str(here / "a.npz")), Album(images(12)))


def features_of_another_classifier(here: Path) -> StoredFeatures:
    stored = StoredFeatures.of(random_rows(50, 128), torch.arange(50) % 10, images="fifty", features_sha256="x")
    stored.save(here / FILE)
    return StoredFeatures.read(here / FILE, "y")


def samples_that_are_not_finite(_: Path) -> object:
    data = TensorData(random_rows(4, 2), torch.zeros(4))
    judged = evaluator(BundledProtocol(kind="toy", samples=4), data)
    return judged.score([(torch.arange(4), data.x / 0)])


def own_metric(name: str, value: object) -> object:
    x = from_uint8(images(60))
    judged = UserMetricsEvaluator(photos(60), {name: lambda x: value})  # pyright: ignore[reportArgumentType]
    return judged.score([(torch.arange(60), x)])


SQUARES = torch.rand(20, 3, 8, 8, generator=stream("squares"))
CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "ADM's protocol without its file": (
        lambda _: evaluator(ImageProtocol(kind="adm-imagenet256-50k"), Album(images(12))),
        "evaluate.protocol.reference",
    ),
    "another file than ADM's": (adm_file_of_another_size, "(12, 5, 5, 3)"),
    "fewer images than the name says": (
        lambda _: evaluator(ImageProtocol(kind="cifar10-train50k"), Album(images(11))),
        "11",
    ),
    "fewer images of a split": (
        lambda _: evaluator(ImageProtocol(kind="cifar10-train50k"), Album(images(11)), split="test"),
        "evaluate.split",
    ),
    "a Fréchet distance to few images": (
        lambda _: evaluator(ImageProtocol(kind="folder", samples=120), Album(images(WIDTH))),
        "evaluate.protocol.frechet",
    ),
    "KID of few samples": (
        lambda _: evaluator(ImageProtocol(kind="folder", samples=99, frechet=False), Album(images(120))),
        "99",
    ),
    "features by no model": (
        lambda _: evaluator(FeatureProtocol(kind="dinov2"), Album(images(4))),
        "evaluate.protocol.model",
    ),
    "captions by no model": (lambda _: evaluator(ClipProtocol(kind="clip-score"), None), "evaluate.protocol.model"),
    "a covariance of few rows": (
        lambda _: frechet_distance(Moments.of(random_rows(8, 8)), Moments.of(random_rows(9, 8))),
        "8 samples",
    ),
    "a covariance of few pixels": (lambda _: pixel_frechet(SQUARES, SQUARES), "got 20"),
    "features of two widths": (lambda _: pixel_frechet(SQUARES, SQUARES[..., :4, :4]), "192"),
    "KID of few rows": (
        lambda _: kid(random_rows(9, 2), random_rows(5, 2), subsets=2, subset_size=6, generator=stream("kid")),
        "6 rows",
    ),
    "neighbours of few rows": (lambda _: precision_recall(random_rows(4, 8), random_rows(3, 8)), "3 rows"),
    "photos of 19 images": (lambda _: photos(19), "20 images"),
    "photos of a class without samples": (lambda _: photos(61, classes=61), "evaluate.protocol.samples"),
    "points of another number": (
        lambda _: score_toy(random_rows(5, 2), torch.zeros(5), Reference(random_rows(4, 2), torch.zeros(4), print)),  # pyright: ignore[reportArgumentType]
        "4",
    ),
    "few images of CIFAR-10": (
        lambda _: score_cifar10(
            from_uint8(torch.zeros(9, 3, 32, 32, dtype=torch.uint8)),
            torch.zeros(9, dtype=torch.long),
            Reference(from_uint8(torch.zeros(9, 3, 32, 32, dtype=torch.uint8)), torch.zeros(9, dtype=torch.long)),
        ),
        "1000 real images",
    ),
    "fewer data than samples of a likelihood": (lambda _: likelihood(17, samples=5), "evaluate.protocol.samples"),
    "data of other levels": (lambda _: likelihood(), "evaluate.protocol.levels"),
    "likelihoods that are not finite": (
        lambda _: likelihood(17).score([(torch.arange(4), torch.tensor([0, 0, 0, torch.nan]))]),
        "finite",
    ),
    "samples that are not finite": (samples_that_are_not_finite, "finite"),
    "a sample that is missing": (lambda _: collect([(torch.tensor([0, 2]), torch.zeros(2, 2))], 3), "0 to 2"),
    "a sample that comes twice": (lambda _: collect([(torch.tensor([0, 0, 1]), torch.zeros(3, 2))], 2), "0 to 1"),
    "no samples": (lambda _: collect([], 3), "no samples"),
    "an image that comes twice": (lambda _: order_of(torch.tensor([9, 2, 9])), "3 images"),
    "no images": (lambda _: statistics_of(extractor, [], 5), "no images"),
    "features of another classifier": (features_of_another_classifier, "classifier"),
    "a metric with the name of a column": (lambda _: own_metric("nfe", 0.0), "nfe"),
    "a metric that is not finite": (lambda _: own_metric("dark", float("inf")), "dark"),
}


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("case", CASES)
def test_others(case: str, tmp_path: Path) -> None:
    act, name = CASES[case]
    with pytest.raises(UserError) as refused:
        act(tmp_path)
    assert name in str(refused.value)
