"""The shipped classifiers are good, small, say where they come from, and can be trained again, to the bit."""

import json
import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow.parquet import write_table
from safetensors.torch import load_file
from torch import Tensor

import train_classifier as tool
from dumo.data import Digits
from dumo.encoders.classifier import ShippedClassifier, cifar10, digits
from dumo.io import tensor_files
from dumo.io.picture import from_uint8
from dumo.runtime.random import stream
from dumo.types import UserError

# Another file gives other numbers: not under the same name.
SHA256 = "cb20e51f59f64f4a0f1a43fb794106bc5e4c7d54c3c7bff3137d510df2320dba"
DIGITS = Digits().originals()


def pixels(n: int) -> tuple[Tensor, Tensor]:
    """Noise whose colour tells its class."""
    c = torch.arange(n) % 10
    colour = torch.randint(200, (10, 3, 1, 1), generator=stream("colour"))[c]
    return (colour + torch.randint(56, (n, 3, 32, 32), generator=stream("noise"))).to(torch.uint8), c


BOTH = pytest.mark.parametrize(
    ("known", "x"), [(digits, DIGITS.x[:600]), (cifar10, from_uint8(pixels(600)[0]))], ids=["digits", "cifar10"]
)


def origin(known: ShippedClassifier) -> dict[str, str]:
    """What the file says of itself."""
    return json.loads(tensor_files.read_metadata(known.file)["origin"])


def test_shipped_files_are_small_and_say_their_origin() -> None:
    assert digits.file.stat().st_size <= 300_000
    assert cifar10.file.stat().st_size <= 1_000_000
    assert cifar10.sha256 == SHA256
    assert "load_digits" in origin(digits)["data"]
    assert "50,000 training images" in origin(cifar10)["data"]
    assert origin(digits)["held_out"].startswith("359 rows")
    assert origin(cifar10)["tested"].startswith("on the 10,000 test images")
    assert float(origin(cifar10)["accuracy"]) >= 0.8


def test_a_fixed_fifth_of_digits_is_held_out_and_well_known() -> None:
    taught, held = tool.split_digits(1797)
    assert torch.equal(torch.cat([taught, held]).sort().values, torch.arange(1797))
    # The shipped weights have not seen these rows. Should torch ever permute otherwise, make the weights again.
    assert (len(held), held[:6].tolist()) == (359, [39, 1197, 601, 412, 1620, 1069])
    right = (digits.classify(digits.features(DIGITS.x[held])) == DIGITS.c[held]).double().mean().item()
    assert right >= 0.98
    assert f"{right:.4f}" == origin(digits)["accuracy"]
    assert tool.accuracy(digits.net, DIGITS.x[held], DIGITS.c[held]) == right


@pytest.mark.slow
@pytest.mark.data
def test_accuracy_on_test_images_of_cifar10() -> None:
    """Of the first 1,000, within three standard errors of what the file says of 10,000."""
    x, c = tool.cifar_images(Path(os.environ["DUMO_DATA"]) / "cifar10", "test", 1000)
    right = tool.accuracy(cifar10.net, from_uint8(x), c)
    assert right >= 0.78
    assert right == (cifar10.classify(cifar10.features(from_uint8(x))) == c).double().mean().item()
    assert right == pytest.approx(float(origin(cifar10)["accuracy"]), abs=0.033)


def test_features_of_digits_are_standardised() -> None:
    f = digits.features(DIGITS.x)
    assert f.mean(0).abs().max() < 0.3
    assert f.var(0).min() > 0.5
    assert f.var(0).max() < 1.5


@pytest.mark.slow
@pytest.mark.data
def test_features_of_cifar10_are_standardised() -> None:
    x, _ = tool.cifar_images(Path(os.environ["DUMO_DATA"]) / "cifar10", "train", 1000)
    f = cifar10.features(from_uint8(x))
    assert f.mean(0).abs().max() < 0.3
    still = f.var(0) < 1e-3
    assert still.sum() <= 2  # never awake; they must not blow up what wakes them
    assert f.var(0)[~still].min() > 0.5
    assert f.var(0)[~still].max() < 1.6
    assert cifar10.features(torch.randn(50, 3, 32, 32, generator=stream("noise")).clamp(-1, 1)).abs().max() < 20


@pytest.mark.slow
@BOTH
def test_features_are_what_the_head_reads_and_of_a_row_alone(known: ShippedClassifier, x: Tensor) -> None:
    f = known.features(x)
    assert f.shape == (600, int(origin(known)["features"]))
    assert torch.equal(known.classify(f), known.net(x).argmax(1))
    torch.testing.assert_close(f[510:], known.features(x[510:]), rtol=1e-4, atol=1e-4)
    assert known.features(x[:0]).shape == (0, known.width)


@BOTH
def test_loading_draws_nothing_and_asks_for_no_gradient(known: ShippedClassifier, x: Tensor) -> None:
    before = torch.get_rng_state()
    net = ShippedClassifier(known.kind, known.file).net
    assert torch.equal(torch.get_rng_state(), before)
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())


# --- made again


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set in the layout of the hub: 96 images to train on, 40 others."""
    folder = tmp_path_factory.mktemp("cifar10")
    x, c = pixels(136)
    for split, rows in (("train", slice(0, 96)), ("test", slice(96, 136))):
        files = [{"bytes": png(image), "path": "x.png"} for image in x[rows]]
        write_table(pa.table({"image": files, "label": c[rows].tolist()}), folder / tool.FILES[split])
    return folder


def png(image: Tensor) -> bytes:
    file = BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


def test_images_are_the_rows_of_the_table(folder: Path) -> None:
    x, c = pixels(136)
    taught, tested = tool.cifar_images(folder, "train"), tool.cifar_images(folder, "test", 7)
    assert torch.equal(torch.cat([taught[0], tested[0]]), x[:103])
    assert torch.equal(torch.cat([taught[1], tested[1]]), c[:103])
    with pytest.raises(UserError, match=r"there is no .*train-00000-of-00001\.parquet: set DUMO_DATA"):
        tool.cifar_images(folder / "none", "train")
    with pytest.raises(UserError, match="has 40 images, and count=41 are asked for"):
        tool.cifar_images(folder, "test", 41)


def test_images_that_cannot_be_trained_on_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there are 127 images to train on, and a batch has 128"):
        tool.train_cifar10(*pixels(127))
    files = [{"bytes": png(image), "path": "x.png"} for image in pixels(2)[0]]
    write_table(pa.table({"image": files}), tmp_path / tool.FILES["test"])
    with pytest.raises(UserError, match="label"):
        tool.cifar_images(tmp_path, "test")


def test_a_file_stays_until_the_next_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    path.write_text("as before")

    def fail(weights: dict[str, Tensor], file: Path, header: dict[str, str]) -> None:
        file.write_text("half")
        raise OSError("the disk is full")

    monkeypatch.setattr(tool, "save_file", fail)
    with pytest.raises(OSError, match="the disk is full"):
        tool.save_weights(path, {}, {})
    assert path.read_text() == "as before"
    assert [*tmp_path.iterdir()] == [path]


def test_what_is_wrong_is_said_without_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUMO_DATA", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["train_classifier.py", "cifar10"])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    with pytest.raises(SystemExit, match=r"^error: there is no .*set DUMO_DATA"):
        tool.main()


MAKERS: dict[str, Callable[[Path, Path], dict[str, str]]] = {
    "digits": lambda out, folder: tool.make_digits(out),
    "cifar10": tool.make_cifar10,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_the_same_bytes_are_made_and_none_of_a_bad_classifier(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shipped = MAKERS[name], {"digits": digits, "cifar10": cifar10}[name]
    for constant, value in (("CIFAR_EPOCHS", 1), ("CIFAR_BATCH", 48), ("DIGITS_STEPS", 5)):
        monkeypatch.setattr(tool, constant, value)
    with pytest.raises(UserError, match=r"below 0\.\d+: nothing written"):
        make(tmp_path / "bad", folder)
    assert not any(tmp_path.iterdir())
    monkeypatch.setattr(tool, "DIGITS_MIN_ACCURACY", 0.0)
    monkeypatch.setattr(tool, "CIFAR_MIN_ACCURACY", 0.0)
    one, two, before = tmp_path / "one", tmp_path / "two", torch.get_rng_state()
    metadata = make(one, folder)
    assert metadata == make(two, folder)
    assert {"digits": "1,797 images", "cifar10": "on the 96 training images"}[name] in metadata["data"]
    assert one.read_bytes() == two.read_bytes()
    assert torch.equal(torch.get_rng_state(), before)
    again, kept = load_file(one), load_file(shipped.file)
    assert {k: (v.shape, v.dtype) for k, v in again.items()} == {k: (v.shape, v.dtype) for k, v in kept.items()}


@pytest.mark.nightly
def test_training_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "CIFAR_EPOCHS", 4)
    monkeypatch.setattr(tool, "CIFAR_BATCH", 32)
    x, c = pixels(320)
    losses: list[tuple[int, float]] = []
    net = tool.train_cifar10(x[:256], c[:256], lambda epoch, loss: losses.append((epoch, loss)))
    assert tool.accuracy(net, from_uint8(x[256:]), c[256:]) > 0.8
    assert [epoch for epoch, _ in losses] == [0, 1, 2, 3]
    assert losses[-1][1] < losses[0][1] / 2


def test_images_are_mirrored_and_moved_by_up_to_four_pixels() -> None:
    """Every place of a ramp tells where it came from: 0 ... 31 along a row, and its steps whether it was mirrored."""
    ramp = torch.arange(32, dtype=torch.uint8).expand(2000, 3, 32, 32)
    across = tool.flip_and_shift(ramp, stream("across"))
    middle = across[:, 0, :, 8:24].long()
    steps = middle[..., 1] - middle[..., 0]
    assert set(steps.unique().tolist()) == {-1, 1}
    assert steps[:, 0].double().mean().abs() < 0.1  # half of them, to 4 standard errors
    assert torch.equal(middle, middle[:, :1].expand_as(middle))  # whole rows
    assert set((across[:, 0, 0, 16].long() - torch.where(steps[:, 0] > 0, 16, 15)).unique().tolist()) == set(
        range(-4, 5)
    )
    down = tool.flip_and_shift(ramp.transpose(2, 3), stream("down"))[:, 0, :, 0].long()
    assert (down[:, 16] > down[:, 15]).all()  # never upside down
    assert set((down[:, 16] - 16).unique().tolist()) == set(range(-4, 5))
    assert across.max() == down.max() == 31


@pytest.mark.nightly
def test_digits_are_made_as_good(tmp_path: Path) -> None:
    assert float(tool.make_digits(tmp_path / "again.safetensors")["accuracy"]) >= 0.98


def test_shifts_are_by_a_pixel_and_move_background_in() -> None:
    x = torch.full((400, 1, 8, 8), -1.0)
    x[:, 0, 3, 3] = 1
    moved = tool.shift_digits(x, stream("shift"))
    places = {tuple(place) for place in (moved[:, 0] == 1).nonzero()[:, 1:].tolist()}
    assert places == {(i, j) for i in (2, 3, 4) for j in (2, 3, 4)}
    edge = torch.ones(400, 1, 8, 8)
    assert set(tool.shift_digits(edge, stream("edge")).unique().tolist()) == {-1.0, 1.0}
