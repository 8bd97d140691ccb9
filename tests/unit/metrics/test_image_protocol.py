"""The image protocols: what a name locks, and that the numbers are those of its definition."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dumo.metrics import image_protocol, reference
from dumo.metrics.frechet import frechet_distance
from dumo.metrics.image_protocol import LOCKED, ImageProtocol, Locked, to_pixels
from dumo.metrics.moments import Moments
from dumo.metrics.tally import Tally
from dumo.types import UserError
from golden import inception as recipe
from unit.metrics.eye import NARROW, WIDTH, eye, images

N = 120
FOLDER = ImageProtocol(kind="folder", samples=N)


def samples(pixels: Tensor) -> Tensor:
    """What a net would have made of them."""
    return pixels.float() / 127.5 - 1


def judged(pixels: Tensor, batch: int = 50, protocol: ImageProtocol = FOLDER) -> Tally:
    x = samples(pixels)
    return protocol.judge(eye, ((rows, x[rows]) for rows in torch.arange(len(x)).split(batch)))


def test_names_lock_what_the_papers_do() -> None:
    assert [(k, v.samples, v.size, v.classes, v.real) for k, v in LOCKED.items()] == [
        ("adm-imagenet256-50k", 50_000, 256, 1000, 10_000),
        ("adm-imagenet512-50k", 50_000, 512, 1000, 10_000),
        ("cifar10-train50k", 50_000, 32, 10, 50_000),
        ("folder", 10_000, None, None, None),
    ]
    with pytest.raises(ValidationError):
        ImageProtocol(kind="adm-imagenet256-10k")


def test_the_name_says_what_is_not_as_it_says() -> None:
    assert ImageProtocol(kind="cifar10-train50k").name == "cifar10-train50k"
    assert ImageProtocol(kind="cifar10-train50k", samples=50_000).name == "cifar10-train50k"
    assert ImageProtocol(kind="cifar10-train50k", samples=5000).name == "cifar10-train50k (5000 samples)"
    assert ImageProtocol(kind="folder", samples=9, frechet=False).name == "folder (9 samples, no Fréchet distances)"


def test_classes_are_balanced() -> None:
    labels = ImageProtocol(kind="adm-imagenet256-50k").labels(1000)
    assert labels.bincount().tolist() == [50] * 1000
    assert labels[:5000].bincount().tolist() == [5] * 1000  # and in every split of the Inception Score
    assert ImageProtocol(kind="cifar10-train50k").labels().tolist() == [0] * 50_000


@pytest.mark.parametrize(
    ("protocol", "shape", "classes", "said"),
    [
        (ImageProtocol(kind="adm-imagenet256-50k"), (3, 32, 32), 1000, "256x256, not samples of shape .*decode"),
        (ImageProtocol(kind="adm-imagenet512-50k"), (3, 256, 256), 1000, "512x512, not"),
        (ImageProtocol(kind="folder"), (1, 8, 8), 0, "any size, not samples of shape"),
        (ImageProtocol(kind="folder"), (2,), 0, "any size, not samples of shape"),
        (ImageProtocol(kind="cifar10-train50k"), (3, 32, 32), 17, "is of 10 classes, not 17"),
        (ImageProtocol(kind="folder", samples=2048), (3, 64, 64), 0, "more than 2048 samples, here are 2048"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_any_work(
    protocol: ImageProtocol, shape: tuple[int, ...], classes: int, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        protocol.check(shape, classes)


def test_what_can_be_judged_is_not() -> None:
    ImageProtocol(kind="adm-imagenet256-50k").check((3, 256, 256), 1000)
    ImageProtocol(kind="cifar10-train50k", samples=2049).check((3, 32, 32))
    ImageProtocol(kind="folder", samples=10, frechet=False).check((3, 48, 64), 7)


def test_colours_are_rounded_to_the_nearest_and_clamped() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    nudged = torch.stack([samples(every)[0] + d for d in (-0.49 / 127.5, 0, 0.49 / 127.5)])
    assert torch.equal(to_pixels(nudged), every.expand(3, 3, -1, -1))
    assert to_pixels(torch.tensor([-7.0, 9]).view(2, 1, 1, 1).expand(2, 3, 1, 1)).flatten().unique().tolist() == [
        0,
        255,
    ]
    for wrong, said in ((torch.zeros(1, 4, 2, 2), "decode"), (torch.full((1, 3, 1, 1), torch.nan), "not finite")):
        with pytest.raises(UserError, match=said):
            to_pixels(wrong)


def test_the_numbers_are_those_of_their_definitions() -> None:
    """Against the features of all images at once; KID and neighbours have tests of their own."""
    made, data = images(N, "made"), images(150, "data")
    scores = FOLDER.score(judged(made), FOLDER.reference(eye, data.split(64)))
    assert list(scores) == ["fid", "sfid", "kid", "kid_sd", "is", "is_sd", "precision", "recall"]
    for name, part in (("fid", "pool"), ("sfid", "spatial")):
        wanted = frechet_distance(*(Moments.of(getattr(eye(x), part)) for x in (made, data)))
        assert scores[name] == pytest.approx(wanted, rel=1e-9)
    p = eye(made).logits.double().softmax(1)
    assert scores["is"] == pytest.approx((p * (p / p.mean(0)).log()).sum(1).mean().exp().item(), rel=1e-9)
    assert abs(scores["kid"]) < 3 * scores["kid_sd"]
    assert 0.5 < scores["precision"] <= 1
    assert 0.5 < scores["recall"] <= 1


def test_copies_of_the_data_are_perfect_and_shifts_are_not() -> None:
    data = images(N) // 2
    real = FOLDER.reference(eye, [data])
    same, brighter = (FOLDER.score(judged(x), real) for x in (data, data + 100))
    assert same["fid"] == pytest.approx(0, abs=1e-9)
    assert (same["precision"], same["recall"]) == (1, 1)
    one = FOLDER.score(judged(data[:1].repeat(N, 1, 1, 1)), real)
    assert one["precision"] == 1
    assert one["recall"] < 0.1
    shift = eye(data[:1] + 100).pool.double() - eye(data[:1]).pool.double()
    assert brighter["fid"] == pytest.approx(shift.square().sum().item(), rel=1e-6)
    assert brighter["kid"] > same["kid"]
    assert brighter["is"] == pytest.approx(FOLDER.score(judged(data + 100, batch=7), real)["is"], rel=1e-12)


def test_the_same_samples_have_the_same_scores() -> None:
    made, real = images(N, "made"), FOLDER.reference(eye, [images(150, "data")])
    assert FOLDER.score(judged(made), real) == FOLDER.score(judged(made), real)
    assert FOLDER.score(judged(made, 9), real) == pytest.approx(FOLDER.score(judged(made), real), rel=1e-9)


def test_few_images_have_no_frechet_distance_but_may_go_without() -> None:
    few, many = (FOLDER.reference(eye, [images(n)]) for n in (WIDTH, N))
    for pair in ((judged(images(N)), few), (replaced(judged(images(N)), few), many)):
        with pytest.raises(UserError, match=r"give no Fréchet distance of 6 features: .* set frechet to false"):
            FOLDER.score(*pair)
    without = ImageProtocol(kind="folder", samples=N, frechet=False)
    scores = without.score(judged(images(N), protocol=without), many)
    assert list(scores) == ["kid", "kid_sd", "is", "is_sd", "precision", "recall"]
    with pytest.raises(UserError, match="subsets of 100 rows do not fit"):
        without.score(judged(images(N), protocol=without), few)


def replaced(tally: Tally, moments: Tally) -> Tally:
    """These features with the moments of others."""
    return Tally(moments.pool, moments.spatial, tally.score, tally.rows, tally.index)


def test_samples_must_be_as_many_as_the_name_says() -> None:
    with pytest.raises(UserError, match="119 images came"):
        judged(images(N - 1))


def adm(path: Path, size: int = 4) -> Path:
    """A reference file of 12 images whose moments are no one's."""
    arrays = {
        "mu": np.arange(WIDTH) + 0.5,
        "sigma": 3 * np.eye(WIDTH),
        "mu_s": np.ones(NARROW),
        "sigma_s": np.eye(NARROW),
    }
    np.savez(path, arr_0=np.zeros((12, size, size, 3), np.uint8), **arrays)
    return path


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> ImageProtocol:
    """ADM's protocol for what a small eye sees of small images."""
    monkeypatch.setattr(reference, "WIDTH", WIDTH)
    monkeypatch.setattr(reference, "SPATIAL_WIDTH", NARROW)
    monkeypatch.setitem(LOCKED, "adm-imagenet256-50k", Locked(N, 4, 1000, 12, 10, "https://there"))
    monkeypatch.setitem(LOCKED, "cifar10-train50k", Locked(N, 4, 10, 12, 10))
    return ImageProtocol(kind="adm-imagenet256-50k")


def test_adms_file_gives_moments_of_all_and_features_of_its_images(tmp_path: Path, tiny: ImageProtocol) -> None:
    real = tiny.reference(eye, adm(tmp_path / "a.npz"))
    assert real.pool.count == real.spatial.count == image_protocol.TRAIN == 1_281_167
    torch.testing.assert_close(real.pool.covariance, 3 * torch.eye(WIDTH, dtype=torch.float64), rtol=1e-14, atol=0)
    assert torch.equal(real.rows, eye(torch.zeros(12, 3, 4, 4, dtype=torch.uint8)).pool)
    made = judged(images(N), protocol=tiny)
    assert tiny.score(made, real)["fid"] == pytest.approx(frechet_distance(made.pool, real.pool), rel=1e-12)


def test_another_reference_is_refused(tmp_path: Path, tiny: ImageProtocol) -> None:
    with pytest.raises(UserError, match="compares with the file https://there: give that"):
        tiny.reference(eye, [images(12)])
    with pytest.raises(UserError, match=r"images of shape \(12, 5, 5, 3\), .* compares with 12 of 4x4: give the file"):
        tiny.reference(eye, adm(tmp_path / "a.npz", size=5))
    with pytest.raises(UserError, match="compares with the images themselves"):
        FOLDER.reference(eye, tmp_path / "a.npz")
    with pytest.raises(UserError, match="compares with 12 images, here are 11: give them all"):
        ImageProtocol(kind="cifar10-train50k").reference(eye, [images(11)])


def test_inception_itself_serves() -> None:
    """Three images through the real network, of random weights; its widths are those of ADM's files."""
    net, protocol = recipe.net(), ImageProtocol(kind="folder", samples=3, frechet=False)
    x = samples(torch.randint(256, (3, 3, 40, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    tally = protocol.judge(net, ((rows, x[rows]) for rows in torch.arange(3).split(2)))
    assert (tally.rows.shape, tally.spatial.mean.shape) == ((3, 2048), (2023,))
    torch.testing.assert_close(tally.rows[2:], net(to_pixels(x[2:])).pool, rtol=1e-5, atol=1e-4)
