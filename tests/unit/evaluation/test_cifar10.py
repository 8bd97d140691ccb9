"""The protocol of CIFAR-10 sees what is wrong with samples, and says how large nothing is."""

import os
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from dumo.encoders.classifier import cifar10
from dumo.evaluation import BundledProtocol, Context
from dumo.evaluation import measures as protocol
from dumo.evaluation.measures import baselines_cifar10 as baselines
from dumo.evaluation.measures import cached_features, feature_cache, features_of
from dumo.evaluation.measures import score_cifar10 as score
from dumo.evaluation.wholeset import Reference
from dumo.io.data_source import TensorData
from dumo.io.picture import from_uint8
from dumo.runtime.random import noise, stream
from train_classifier import cifar_images

QUICK = BundledProtocol(kind="cifar10-features", samples=1000)


def real(split: str, count: int) -> Reference:
    x, c = cifar_images(Path(os.environ["DUMO_DATA"]) / "cifar10", split, count)
    return Reference(from_uint8(x), c)


@pytest.fixture(scope="module")
def data() -> Reference:
    """The reference."""
    return real("train", 3000)


@pytest.fixture(scope="module")
def test() -> Reference:
    """As good as samples can be."""
    return real("test", 1000)


@pytest.fixture(scope="module")
def good(data: Reference, test: Reference) -> dict[str, float]:
    return score(test.x, test.c, data)


@pytest.fixture(scope="module")
def blobs() -> Reference:
    """A thousand smooth images of no meaning, which need no file."""
    x = F.interpolate(torch.randn(1000, 3, 4, 4, generator=stream("blobs")), 32, mode="bilinear")
    return Reference(from_uint8(((x + 1) * 127.5).clamp(0, 255).to(torch.uint8)), torch.arange(1000) % 10)


@pytest.mark.slow
@pytest.mark.data
def test_unseen_real_images_score_near_the_baseline(data: Reference, test: Reference, good: dict[str, float]) -> None:
    assert list(good)[:5] == ["mmd", "mmd_sd", "class_mmd", "class_mmd_sd", "fd"]
    perfect = baselines(data, test.c)["perfect"]
    assert perfect["mean"] == 0
    assert abs(good["mmd"]) < 3 * perfect["sd"] < 6 * good["mmd_sd"]
    assert 0 < 5 * perfect["fd_sd"] < perfect["fd"]
    assert perfect["fd"] - 3 * perfect["fd_sd"] < good["fd"] < 1.5 * perfect["fd"]
    for name in ("accuracy", "nearest", "auc_features"):
        assert abs(good[name] - perfect[name]) < 4 * perfect[f"{name}_sd"] + 0.1 * (name == "accuracy")
    assert min(good["precision"], good["recall"]) > 0.6


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("fault", ["blur", "noise", "one class"])
def test_faults_are_seen(fault: str, data: Reference, test: Reference, good: dict[str, float]) -> None:
    x = test.x
    if fault == "blur":
        x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    elif fault == "noise":
        x = x + 0.2 * torch.randn(x.shape, generator=stream("noise"))
    else:
        rows = (data.c == 3).nonzero().flatten()
        x = data.x[rows[torch.randint(len(rows), (1000,), generator=stream("rows"))]]
    bad = score(x, test.c, data)
    assert bad["fd"] > 3 * good["fd"]
    assert bad["mmd"] > 3 * bad["mmd_sd"] > 3 * good["mmd_sd"]
    assert bad["auc_features"] > good["auc_features"] + 0.1
    share = "recall" if fault == "one class" else "precision"
    assert bad[share] < good[share] - 0.05


@pytest.mark.slow
@pytest.mark.data
def test_mirrored_images_are_as_good_and_accuracy_is_of_the_classes_asked_for(
    data: Reference, test: Reference, good: dict[str, float]
) -> None:
    mirrored = score(test.x.flip(3), test.c, data)
    assert mirrored["fd"] == pytest.approx(good["fd"], rel=0.1)
    assert mirrored["accuracy"] == pytest.approx(good["accuracy"], abs=0.03)
    shifted = score(test.x, (test.c + 1) % 10, data)
    perfect = baselines(data, test.c)["perfect"]
    assert shifted["accuracy"] < 0.1
    assert abs(good["class_mmd"]) < 3 * perfect["class_mmd_sd"]
    assert shifted["class_mmd"] > 100 * perfect["class_mmd_sd"]


@pytest.mark.nightly
def test_samples_count_by_their_number_whatever_their_batches(blobs: Reference) -> None:
    evaluator = QUICK.evaluator(Context(lambda: TensorData(blobs.x, blobs.c), 10))
    upside_down = blobs.x.flip(2)
    order = torch.randperm(1000, generator=stream("order"))
    found = evaluator.score((part, upside_down[part]) for part in order.split(300))
    assert found == score(upside_down, blobs.c, blobs)
    assert found["fd"] > 0.01
    assert evaluator.facts["features_sha256"] == cifar10.sha256


@pytest.mark.nightly
def test_without_classes_there_is_no_accuracy(blobs: Reference) -> None:
    assert "accuracy" not in score(blobs.x, QUICK.labels(0), blobs)


@pytest.mark.slow
def test_baselines_take_the_rows_that_samples_are_compared_with(
    blobs: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a reference that is sorted by class, whose first rows lack most classes."""
    monkeypatch.setattr(protocol, "MAX_REAL", 400)
    order = blobs.c.argsort(stable=True)
    by_class = Reference(blobs.x[order], blobs.c[order])
    samples = noise(0, range(1000), 0, (3, 32, 32))
    found = score(samples, QUICK.labels(0), by_class)
    known = baselines(by_class, QUICK.labels(0))["noise"]
    assert known["mean"] == pytest.approx(found["mmd"], rel=1e-9)
    assert known["sd"] == pytest.approx(found["mmd_sd"], rel=1e-9)


@pytest.mark.slow
def test_samples_are_compared_with_images_of_their_classes(blobs: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with some of the reference, whose classes come in any order; a class is a colour here."""
    monkeypatch.setattr(protocol, "MAX_REAL", 400)
    c = torch.randint(10, (1000,), generator=stream("classes"))
    colours = torch.randn(10, 3, 1, 1, generator=stream("colours"))
    coloured = Reference((blobs.x / 2 + colours[c] / 2).clamp(-1, 1), c)
    x, c = coloured.x[:300], c[:300]
    sd = baselines(coloured, c)["perfect"]["class_mmd_sd"]
    assert abs(score(x, c, coloured)["class_mmd"]) < 4 * sd
    assert score(x, (c + 1) % 10, coloured)["class_mmd"] > 20 * sd


@pytest.mark.slow
def test_copies_of_three_images_are_precise_and_recall_few(blobs: Reference) -> None:
    copies = score(blobs.x[:3].repeat(334, 1, 1, 1)[:1000], QUICK.labels(0), blobs)
    assert copies["precision"] == 1
    assert copies["recall"] < 0.1


def test_images_are_judged_as_a_file_holds_them(blobs: Reference) -> None:
    """A quarter of a level either way, and light beyond black and white, change nothing."""
    x = blobs.x[:50]
    off = x + (torch.rand(x.shape, generator=stream("off")) - 0.5) / 255
    off = torch.where(x == 1, 1.5, torch.where(x == -1, -7.0, off))
    assert not torch.equal(off, x)
    assert torch.equal(features_of(off), features_of(x))
    assert torch.equal(features_of(x), cifar10.features(x))
    assert not torch.equal(features_of(x + 2 / 255), features_of(x))


def test_a_reference_is_read_once(blobs: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    monkeypatch.setattr(protocol, "features_of", lambda x: read.append(len(x)) or features_of(x))
    feature_cache.clear()
    first, second, third = blobs.x[:20], blobs.x[20:50], blobs.x[50:90]
    assert torch.equal(cached_features(first), features_of(first))
    assert torch.equal(cached_features(first.clone()), features_of(first))
    cached_features(second)
    cached_features(first)
    assert read == [20, 30]
    changed = first.clone()
    changed[0, 0, 0, 0] *= -1
    assert not torch.equal(cached_features(changed), features_of(first))
    cached_features(third)
    assert len(feature_cache) == protocol.MAX_CACHED
