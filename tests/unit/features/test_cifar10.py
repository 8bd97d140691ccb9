"""The shipped classifier of CIFAR-10 is good, small, says where it comes from, and can be made again."""

import os
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow.parquet import write_table
from safetensors.torch import load_file
from torch import Tensor

from dumo.features import cifar10
from dumo.features.cifar10 import FILES, WEIGHTS, WIDTH
from dumo.io.picture import from_uint8
from dumo.random import stream
from dumo.types import UserError

# Another file gives other numbers: not under the same name.
SHA256 = "cb20e51f59f64f4a0f1a43fb794106bc5e4c7d54c3c7bff3137d510df2320dba"


def pixels(n: int) -> tuple[Tensor, Tensor]:
    """Noise whose colour tells its class."""
    c = torch.arange(n) % 10
    colour = torch.randint(200, (10, 3, 1, 1), generator=stream("colour"))[c]
    return (colour + torch.randint(56, (n, 3, 32, 32), generator=stream("noise"))).to(torch.uint8), c


def some(n: int) -> Tensor:
    return from_uint8(pixels(n)[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set in the layout of the hub: 96 images to train on, 40 others."""
    folder = tmp_path_factory.mktemp("cifar10")
    x, c = pixels(136)
    for split, rows in (("train", slice(0, 96)), ("test", slice(96, 136))):
        files = [{"bytes": png(image), "path": "x.png"} for image in x[rows]]
        write_table(pa.table({"image": files, "label": c[rows].tolist()}), folder / FILES[split])
    return folder


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of training."""
    monkeypatch.setattr(cifar10, "EPOCHS", 1)
    monkeypatch.setattr(cifar10, "BATCH", 48)


def png(image: Tensor) -> bytes:
    file = BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


def test_shipped_file_is_small_whole_and_tells_its_origin() -> None:
    assert WEIGHTS.stat().st_size <= 1_000_000
    assert cifar10.sha256() == SHA256
    told = cifar10.origin()
    assert told["recipe"] == f"python -m {cifar10.KEY}"  # as this module was called then
    assert told["features"] == str(WIDTH)
    assert {"torch", "pillow", "safetensors"} <= set(told["versions"].replace(",", "").split())
    assert "50,000 training images" in told["data"]
    assert told["tested"].startswith("on the 10,000 test images")
    assert float(told["accuracy"]) >= 0.8


@pytest.mark.data
def test_shipped_accuracy_on_test_images() -> None:
    """Of the first 1,000, within three standard errors of what the file says of 10,000."""
    x, c = cifar10.images(Path(os.environ["DUMO_DATA"]) / "cifar10", "test", 1000)
    right = cifar10.accuracy(cifar10.shipped(), x, c)
    assert right >= 0.78
    assert right == (cifar10.predict(from_uint8(x)) == c).double().mean().item()
    assert right == pytest.approx(float(cifar10.origin()["accuracy"]), abs=0.033)


@pytest.mark.data
def test_features_are_standardised() -> None:
    x, _ = cifar10.images(Path(os.environ["DUMO_DATA"]) / "cifar10", "train", 1000)
    f = cifar10.features(from_uint8(x))
    assert f.mean(0).abs().max() < 0.3
    still = f.var(0) < 1e-3
    assert still.sum() <= 2  # never awake; they must not blow up what wakes them
    assert f.var(0)[~still].min() > 0.5
    assert f.var(0)[~still].max() < 1.6
    assert cifar10.features(torch.randn(50, 3, 32, 32, generator=stream("noise")).clamp(-1, 1)).abs().max() < 20


def test_features_are_what_the_head_reads() -> None:
    x = some(20)
    f = cifar10.features(x)
    assert f.shape == (20, WIDTH)
    assert torch.equal(cifar10.classify(f), cifar10.predict(x))
    assert torch.equal(cifar10.shipped()(x).argmax(1), cifar10.predict(x))


def test_features_of_a_row_do_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    x = some(50)
    whole = cifar10.features(x)
    monkeypatch.setattr(cifar10, "PIECE", 20)
    torch.testing.assert_close(cifar10.features(x), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cifar10.features(x[30:]), whole[30:], rtol=1e-4, atol=1e-4)
    assert cifar10.features(x[:0]).shape == (0, WIDTH)


def test_loading_draws_nothing_and_asks_for_no_gradient() -> None:
    before = torch.get_rng_state()
    cifar10.shipped.cache_clear()
    net = cifar10.shipped()
    assert torch.equal(torch.get_rng_state(), before)
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())


def test_images_are_the_rows_of_the_table(folder: Path) -> None:
    x, c = pixels(136)
    taught, tested = cifar10.images(folder, "train"), cifar10.images(folder, "test", 7)
    assert torch.equal(torch.cat([taught[0], tested[0]]), x[:103])
    assert torch.equal(torch.cat([taught[1], tested[1]]), c[:103])
    assert from_uint8(
        torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 32, 32)
    ).unique().tolist() == [-1, 1]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no .*train-00000-of-00001\.parquet: set DUMO_DATA"):
        cifar10.make(tmp_path)


@pytest.mark.usefixtures("brief")
def test_the_recipe_makes_the_same_bytes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "FLOOR", 0.0)
    one, two, before = tmp_path / "one", tmp_path / "two", torch.get_rng_state()
    told = cifar10.make(folder, one)
    assert told == cifar10.make(folder, two) == cifar10.origin(one)
    assert one.read_bytes() == two.read_bytes()
    assert torch.equal(torch.get_rng_state(), before)
    again, kept = load_file(one), load_file(WEIGHTS)
    assert {k: (v.shape, v.dtype) for k, v in again.items()} == {k: (v.shape, v.dtype) for k, v in kept.items()}


@pytest.mark.usefixtures("brief")
def test_a_bad_classifier_is_not_written(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"below 0\.8: nothing written"):
        cifar10.make(folder, tmp_path / "bad")
    assert not any(tmp_path.iterdir())


def test_training_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "EPOCHS", 4)
    monkeypatch.setattr(cifar10, "BATCH", 32)
    x, c = pixels(320)
    losses: list[tuple[int, float]] = []
    net = cifar10.train(x[:256], c[:256], lambda epoch, loss: losses.append((epoch, loss)))
    assert cifar10.accuracy(net, x[256:], c[256:]) > 0.8
    assert [epoch for epoch, _ in losses] == [0, 1, 2, 3]
    assert losses[-1][1] < losses[0][1] / 2


def test_images_are_mirrored_and_moved_by_up_to_four_pixels() -> None:
    """Every place of a ramp tells where it came from: 0 ... 31 along a row, and its steps whether it was mirrored."""
    ramp = torch.arange(32, dtype=torch.uint8).expand(2000, 3, 32, 32)
    across = cifar10._moved(ramp, stream("across"))
    middle = across[:, 0, :, 8:24].long()
    steps = middle[..., 1] - middle[..., 0]
    assert set(steps.unique().tolist()) == {-1, 1}
    assert steps[:, 0].double().mean().abs() < 0.1  # half of them, to 4 standard errors
    assert torch.equal(middle, middle[:, :1].expand_as(middle))  # whole rows
    assert set((across[:, 0, 0, 16].long() - torch.where(steps[:, 0] > 0, 16, 15)).unique().tolist()) == set(
        range(-4, 5)
    )
    down = cifar10._moved(ramp.transpose(2, 3), stream("down"))[:, 0, :, 0].long()
    assert (down[:, 16] > down[:, 15]).all()  # never upside down
    assert set((down[:, 16] - 16).unique().tolist()) == set(range(-4, 5))
    assert across.max() == down.max() == 31
