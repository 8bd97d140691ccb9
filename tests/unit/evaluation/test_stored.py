"""Features in 8 bits stand in for images: as exact as their levels, and refused where another classifier made them."""

from pathlib import Path

import pytest
import torch

from dumo.config.load import load
from dumo.encoders.classifier import cifar10
from dumo.evaluation import BundledProtocol, Context
from dumo.evaluation.measures import features_of, open_cifar10
from dumo.evaluation.stored import FILE, StoredFeatures
from dumo.evaluation.wholeset import Reference
from dumo.io import run_places
from dumo.io.data_source import TensorData
from dumo.run.judge import reference_data
from dumo.runtime.random import stream


def features(rows: int) -> torch.Tensor:
    """Features of very different widths, one of which does not vary."""
    return torch.randn(rows, 4, generator=stream("stored")) * torch.tensor([1.0, 0.1, 20.0, 0.0]) + 3


def test_a_level_is_the_nearest() -> None:
    """So no value is off by more than half a step, and the mean by far less."""
    exact = features(4000)
    stored = StoredFeatures.of(exact, torch.zeros(4000), images="none", features_sha256="x")
    steps = (exact.max(0).values - exact.min(0).values) / 255
    error = stored.features - exact
    assert (error.abs() <= 0.501 * steps + 1e-6).all()
    assert (error.mean(0).abs() <= 0.02 * steps + 1e-6).all()
    assert len(stored.levels[:, 1].unique()) > 150


def test_a_file_comes_back(tmp_path: Path) -> None:
    stored = StoredFeatures.of(features(50), torch.arange(50) % 10, images="fifty images", features_sha256="x")
    stored.save(tmp_path / FILE)
    again = StoredFeatures.read(tmp_path / FILE, "x")
    assert torch.equal(again.features, stored.features)
    assert torch.equal(again.c, stored.c)
    assert again.facts()["reference"].startswith("fifty images, never trained on")
    assert len(again.facts()["reference_sha256"]) == 64


@pytest.mark.nightly
def test_samples_score_against_stored_features_as_against_images(tmp_path: Path) -> None:
    """All but the nearest training image, for which the images of the training are missing."""
    x = torch.rand(2000, 3, 32, 32, generator=stream("images")) * 2 - 1
    x[1000:] *= 0.5
    c = torch.arange(2000) % 10
    data = TensorData(x[::2], c[::2])
    reference = Reference(data.x, data.c)
    stored = StoredFeatures.of(features_of(reference.x), reference.c, images="noise", features_sha256=cifar10.sha256)
    stored.save(tmp_path / FILE)
    protocol = BundledProtocol(kind="cifar10-features", samples=1000)
    context = Context(data=lambda: data, classes=10)
    by_images = open_cifar10(protocol, context)
    by_features = open_cifar10(protocol, Context(data=lambda: data, classes=10, stored=tmp_path / FILE))
    samples = x[1::2]
    exact = by_images.score([(torch.arange(1000), samples)])
    rounded = by_features.score([(torch.arange(1000), samples)])
    assert exact.keys() - rounded.keys() == {"nearest"}
    for name, score in rounded.items():
        assert score == pytest.approx(exact[name], rel=0.02, abs=0.01), name
    baselines = by_features.baselines()
    assert "nearest" not in baselines["perfect"]
    assert baselines["perfect"]["sd"] == pytest.approx(by_images.baselines()["perfect"]["sd"], rel=0.02)
    assert by_features.facts["reference_sha256"] != by_images.facts["reference_sha256"]


@pytest.mark.nightly
@pytest.mark.data
def test_what_comes_with_cifar10_trained_are_the_features_of_its_test_images() -> None:
    run = load("cifar10-trained")
    x, c = reference_data(run.data, run.evaluate.split).reference(10_000, 0)
    stored = StoredFeatures.read(run_places.folder("cifar10-trained") / FILE, cifar10.sha256)
    assert torch.equal(stored.c, c)
    error = stored.features - features_of(x)
    assert (error.abs() <= 0.52 * stored.scale + 1e-4).all()
