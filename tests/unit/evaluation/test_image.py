"""The image protocols: what a name fixes, and that the numbers are those of its definition."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dumo.data.in_memory import Memory
from dumo.encoders import inception
from dumo.evaluation import Context, reference
from dumo.evaluation.fid import ImageEvaluator, ImageProtocol
from dumo.evaluation.frechet import Moments, frechet_distance
from dumo.evaluation.protocol import Evaluator, NumberedSamples
from dumo.evaluation.reference import (
    STANDARDS,
    Standard,
    adm_facts,
    adm_statistics,
    data_facts,
    data_statistics,
    open_adm_file,
)
from dumo.evaluation.statistics import SPLIT_SIZE, Extractor, Statistics
from dumo.io.data_source import Finite
from dumo.io.picture import to_uint8
from dumo.io.read import CACHE_VARIABLE
from dumo.types import UserError
from golden import inception as recipe
from unit.evaluation.extractor import NARROW, WIDTH, Album, Peephole, extractor, images

N = 120
FOLDER = ImageProtocol(kind="folder", samples=N)


def samples(pixels: Tensor) -> Tensor:
    """What a net would have made of them."""
    return pixels.float() / 127.5 - 1


def made(pixels: Tensor, batch: int = 50) -> NumberedSamples:
    """Batches of them."""
    x = samples(pixels)
    return [(rows, x[rows]) for rows in torch.arange(len(x)).split(batch)]


def evaluator(real: Statistics, protocol: ImageProtocol = FOLDER, extractor: Extractor = extractor) -> ImageEvaluator:
    return ImageEvaluator(protocol.kind, protocol.standard, protocol.total, protocol.frechet, extractor, real)


def counted(pixels: Tensor) -> Statistics:
    """What data comes to."""
    return data_statistics(extractor, Album(pixels))


def test_names_lock_what_the_papers_do() -> None:
    assert [(k, v.samples, v.size, v.classes, v.reference_images) for k, v in STANDARDS.items()] == [
        ("adm-imagenet256-50k", 50_000, 256, 1000, 10_000),
        ("adm-imagenet512-50k", 50_000, 512, 1000, 10_000),
        ("cifar10-train50k", 50_000, 32, 10, 50_000),
        ("folder", 10_000, None, None, None),
    ]
    assert [v.kid_subset_size for v in STANDARDS.values()] == [1000, 1000, 1000, 100]
    assert SPLIT_SIZE == 5000


def test_the_numbers_are_those_of_their_definitions() -> None:
    """Against the features of all images at once; KID and neighbours have tests of their own."""
    fake, data = images(N, "made"), images(150, "data")
    of = evaluator(counted(data))
    scores = of.score(made(fake))
    assert of.score(made(fake)) == scores
    assert of.score(made(fake, 9)) == pytest.approx(scores, rel=1e-9)
    assert list(scores) == ["fid", "sfid", "kid", "kid_sd", "is", "precision", "recall"]
    for name, part in (("fid", "pool"), ("sfid", "spatial")):
        wanted = frechet_distance(*(Moments.of(getattr(extractor(x), part)) for x in (fake, data)))
        assert scores[name] == pytest.approx(wanted, rel=1e-9)
    p = extractor(fake).logits.double().softmax(1)
    assert scores["is"] == pytest.approx((p * (p / p.mean(0)).log()).sum(1).mean().exp().item(), rel=1e-9)
    assert abs(scores["kid"]) < 3 * scores["kid_sd"]
    assert 0.5 < scores["precision"] <= 1
    assert 0.5 < scores["recall"] <= 1


def test_the_inception_score_is_of_full_splits_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the batches; the last twenty of 120 images are no split of fifty."""
    fake = images(N, "made")
    of = evaluator(counted(images(150, "data")))
    monkeypatch.setattr("dumo.evaluation.statistics.SPLIT_SIZE", 50)
    scores = of.score(made(fake, 7))
    splits = torch.tensor([counted(fake[rows]).inception_score.value()[0] for rows in (slice(50), slice(50, 100))])
    assert scores["is"] == pytest.approx(splits.mean().item(), rel=1e-6)
    assert scores["is_sd"] == pytest.approx(splits.std(correction=0).item(), rel=1e-4)


@pytest.mark.slow
def test_copies_of_the_data_are_perfect_and_shifts_are_not() -> None:
    data = images(N) // 2
    of = evaluator(counted(data))
    same, brighter = (of.score(made(x)) for x in (data, data + 100))
    assert same["fid"] == pytest.approx(0, abs=1e-9)
    assert (same["precision"], same["recall"]) == (1, 1)
    one = of.score(made(data[:1].repeat(N, 1, 1, 1)))
    assert one["precision"] == 1
    assert one["recall"] < 0.1
    shift = extractor(data[:1] + 100).pool.double() - extractor(data[:1]).pool.double()
    assert brighter["fid"] == pytest.approx(shift.square().sum().item(), rel=1e-6)
    assert brighter["kid"] > same["kid"]
    assert brighter["is"] == pytest.approx(of.score(made(data + 100, batch=7))["is"], rel=1e-12)


def test_few_images_have_no_frechet_distance_but_may_go_without() -> None:
    few, many = counted(images(WIDTH)), counted(images(N))
    fake = evaluator(many).statistics(made(images(N)))
    for of, statistics in ((evaluator(few), fake), (evaluator(many), replaced(fake, few))):
        with pytest.raises(UserError):
            of.compare(statistics)
    without = ImageProtocol(kind="folder", samples=N, frechet=False)
    scores = evaluator(many, without).score(made(images(N)))
    assert list(scores) == ["kid", "kid_sd", "is", "precision", "recall"]


def replaced(statistics: Statistics, moments: Statistics) -> Statistics:
    """These features with the moments of others."""
    return replace(statistics, pool=moments.pool, spatial=moments.spatial)


@pytest.mark.slow
def test_new_images_are_as_far_as_a_perfect_sampler() -> None:
    """Of parts of one law; of too few images there is none."""
    real = counted(images(400))
    perfect, fewer = (
        evaluator(real, ImageProtocol(kind="folder", samples=n)).baselines()["perfect"] for n in (N, N // 2)
    )
    new = evaluator(real).score(made(images(N, "new")))["fid"]
    far = evaluator(real).score(made(images(N) // 2))["fid"]
    assert abs(new - perfect["mean"]) < 4 * perfect["sd"]
    assert 0 < perfect["mean"] < far / 10
    assert fewer["mean"] / perfect["mean"] == pytest.approx((2 / N + 1 / 400) / (1 / N + 1 / 400), rel=1e-9)
    without = ImageProtocol(kind="folder", samples=N, frechet=False)
    perfect = evaluator(real, without).baselines()["perfect"]
    kid = evaluator(real, without).score(made(images(N, "new")))["kid"]
    assert abs(kid - perfect["mean"]) < 4 * perfect["sd"]
    assert evaluator(counted(images(399)), without).baselines() == {}
    assert evaluator(counted(images(59))).baselines() == {}


def test_images_that_cannot_be_read_are_left_out_and_the_rest_is_known_by_hash() -> None:
    data = images(70)
    rest = data[[i for i in range(70) if i not in (3, 66)]]
    albums = Album(data), Album(data, (3, 66)), Album(rest), Album(data.flip(0))
    whole, some, same, turned = (data_facts(album, "folder", STANDARDS["folder"]) for album in albums)
    assert (whole["reference"], some["reference"]) == ("70 images of the data", "68 images of the data")
    assert some == same
    assert whole["reference_sha256"] != turned["reference_sha256"]
    statistics = data_statistics(extractor, Album(data, (3, 66)))
    assert torch.equal(statistics.features, extractor(rest).pool)
    assert statistics.image_numbers.tolist() == list(range(68))
    assert isinstance(Album(data), Finite)


class Bytes(Album):
    """The same images, not as numbers in [-1, 1]."""

    def rows(self, rows: slice) -> tuple[Tensor, Tensor]:
        x, c = super().rows(rows)
        return to_uint8(x)[:, : x.shape[1]], c


@pytest.mark.parametrize("channels", [1, 3])
def test_images_may_come_as_bytes(channels: int) -> None:
    data = images(70)[:, :channels]
    facts, of_bytes = (data_facts(album, "folder", STANDARDS["folder"]) for album in (Album(data), Bytes(data)))
    assert facts == of_bytes


def filed(path: Path, size: int = 4) -> Path:
    """A reference file of 12 images whose moments are no one's."""
    pool, spatial = {"mu": np.arange(WIDTH) + 0.5, "sigma": 3 * np.eye(WIDTH)}, {"mu_s": np.ones(NARROW)}
    np.savez(path, arr_0=np.zeros((12, size, size, 3), np.uint8), **pool, **spatial, sigma_s=np.eye(NARROW))
    return path


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> ImageProtocol:
    """ADM's protocol for what a small extractor sees of small images."""
    monkeypatch.setattr(reference, "WIDTH", WIDTH)
    monkeypatch.setattr(reference, "SPATIAL_WIDTH", NARROW)
    monkeypatch.setitem(STANDARDS, "adm-imagenet256-50k", Standard(N, 4, 1000, 12, 10, "https://there"))
    monkeypatch.setitem(STANDARDS, "cifar10-train50k", Standard(N, 4, 10, 12, 10))
    return ImageProtocol(kind="adm-imagenet256-50k")


def test_adms_file_gives_moments_of_all_and_features_of_its_images(tmp_path: Path, tiny: ImageProtocol) -> None:
    file = open_adm_file(filed(tmp_path / "a.npz"), tiny.kind, tiny.standard)
    real = adm_statistics(extractor, file)
    assert real.pool.count == real.spatial.count == reference.IMAGENET_TRAIN_IMAGES == 1_281_167
    torch.testing.assert_close(real.pool.covariance, 3 * torch.eye(WIDTH, dtype=torch.float64), rtol=1e-14, atol=0)
    assert torch.equal(real.features, extractor(torch.zeros(12, 3, 4, 4, dtype=torch.uint8)).pool)
    of = evaluator(real, tiny)
    fake = of.statistics(made(images(N)))
    assert of.compare(fake)["fid"] == pytest.approx(frechet_distance(fake.pool, real.pool), rel=1e-12)
    assert adm_facts(file)["reference"] == "a.npz"


@pytest.fixture
def peephole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Peephole:
    """A small network in Inception's place, and an empty cache."""
    net = Peephole()
    monkeypatch.setattr(inception, "load", lambda path, device: net)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return net


def opened(protocol: ImageProtocol, pixels: Tensor) -> Evaluator:
    return protocol.evaluator(Context(lambda: Album(pixels)))


def test_facts_name_features_and_reference_by_hash(tmp_path: Path, tiny: ImageProtocol, peephole: Peephole) -> None:
    facts = opened(FOLDER, images(N)).facts
    fields = {"features", "features_sha256", "reference", "reference_sha256", "resize", "rounding", "kid"}
    assert set(facts) == fields
    assert facts["kid"] == "mean and spread over 100 subsets of 100 images"
    assert (facts["reference"], len(facts["reference_sha256"])) == (f"{N} images of the data", 64)
    of_split = FOLDER.evaluator(Context(lambda: Album(images(N)), split="test")).facts
    assert of_split["reference"] == f"{N} images of split test"
    assert opened(FOLDER, images(N, "others")).facts["reference_sha256"] != facts["reference_sha256"]
    path = filed(tmp_path / "a.npz")
    with_file = opened(ImageProtocol(kind=tiny.kind, reference=str(path)), images(1)).facts
    assert (with_file["reference"], with_file["features_sha256"]) == ("a.npz", facts["features_sha256"])
    peephole.scale += 1
    assert opened(FOLDER, images(N)).facts["features_sha256"] != facts["features_sha256"]


@pytest.mark.usefixtures("peephole")
def test_an_array_is_gone_through_as_files_are() -> None:
    data = Memory.of(images(N))
    facts = FOLDER.evaluator(Context(data.originals)).facts
    assert facts == opened(FOLDER, images(N)).facts


def test_data_is_counted_once_and_anew_when_anything_changes(tmp_path: Path, peephole: Peephole) -> None:
    first = opened(FOLDER, images(N)).score(made(images(N, "made")))
    assert peephole.seen == 2 * N
    assert opened(FOLDER, images(N)).score(made(images(N, "made"))) == first
    assert peephole.seen == 3 * N  # the samples alone
    opened(ImageProtocol(kind="folder", samples=99), images(N))  # the data is the same
    assert peephole.seen == 3 * N
    opened(FOLDER, images(N).roll(1, 0))
    assert peephole.seen == 4 * N
    peephole.scale *= 2
    opened(FOLDER, images(N))
    assert peephole.seen == 5 * N
    (path, *_) = sorted((tmp_path / "cache").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    path.write_bytes(path.read_bytes()[:-9])
    peephole.scale /= 2
    assert opened(FOLDER, images(N)).score(made(images(N, "made"))) == first
    assert peephole.seen == 7 * N
    assert len(list((tmp_path / "cache").iterdir())) == 3


@pytest.mark.usefixtures("peephole")
def test_a_device_without_float64_leaves_kernels_to_the_cpu() -> None:
    of = FOLDER.evaluator(Context(lambda: Album(images(N)), device="mps"))
    assert isinstance(of, ImageEvaluator)
    assert of.device == torch.device("cpu")


def test_where_nothing_can_be_kept_the_numbers_stand(
    tmp_path: Path, peephole: Peephole, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file/folder"))
    with pytest.warns(UserWarning, match="cannot be written .* recomputed next time"):
        opened(FOLDER, images(N))
    monkeypatch.setenv(CACHE_VARIABLE, "$NOWHERE/cache")
    with pytest.raises(UserError, match="NOWHERE is not set"):
        opened(FOLDER, images(N))


def test_what_is_not_there_is_told_before_anybody_asks_and_before_the_data_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never() -> Album:
        raise AssertionError

    monkeypatch.delenv(inception.VARIABLE, raising=False)
    assert "docs/data.md" in str(FOLDER.missing)
    with pytest.raises(UserError, match="needs Inception weights, but no path is given"):
        FOLDER.evaluator(Context(never))
    monkeypatch.setenv(inception.VARIABLE, "/none")
    with pytest.raises(FileNotFoundError, match="/none"):
        FOLDER.evaluator(Context(never))
    (tmp_path / "weights").touch()
    monkeypatch.setenv(inception.VARIABLE, str(tmp_path / "weights"))
    assert FOLDER.missing is None


def test_adms_file_is_missing_until_it_is_where_the_protocol_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights").touch()
    monkeypatch.setenv(inception.VARIABLE, str(tmp_path / "weights"))
    monkeypatch.delenv("DUMO_ADM", raising=False)
    assert "in evaluate.protocol.reference: see docs/data.md" in str(ImageProtocol(kind="adm-imagenet256-50k").missing)
    named = ImageProtocol(kind="adm-imagenet256-50k", reference="$DUMO_ADM/256.npz")
    assert named.missing == "ADM's reference, $DUMO_ADM/256.npz: see docs/data.md"
    monkeypatch.setenv("DUMO_ADM", str(tmp_path))
    assert named.missing == "ADM's reference, $DUMO_ADM/256.npz: see docs/data.md"
    (tmp_path / "256.npz").touch()
    assert named.missing is None


@pytest.mark.nightly
def test_inception_itself_serves() -> None:
    """Three images through the real network, of random weights; its widths are those of ADM's files."""
    net, protocol = recipe.net(), ImageProtocol(kind="folder", samples=3, frechet=False)
    x = samples(torch.randint(256, (3, 3, 40, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    of = evaluator(data_statistics(net, Album(torch.zeros(1, 3, 8, 8))), protocol, net)
    statistics = of.statistics((rows, x[rows]) for rows in torch.arange(3).split(2))
    assert (statistics.features.shape, statistics.spatial.mean.shape) == ((3, 2048), (2023,))
    torch.testing.assert_close(statistics.features[2:], net(to_uint8(x[2:])).pool, rtol=1e-5, atol=1e-4)
