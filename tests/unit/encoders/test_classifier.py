"""The shipped classifiers are good, small, and say where they come from."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dumo.data import Digits
from dumo.encoders.classifier import Shipped, cifar10, digits
from dumo.io import weights
from dumo.io.picture import from_uint8
from dumo.runtime.random import stream
from train_classifier import accuracy, cifar_images, split_digits

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


def origin(known: Shipped) -> dict[str, str]:
    """What the file says of itself."""
    return json.loads(weights.notes(known.file)["origin"])


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
    taught, held = split_digits(1797)
    assert torch.equal(torch.cat([taught, held]).sort().values, torch.arange(1797))
    # The shipped weights have not seen these rows. Should torch ever permute otherwise, make the weights again.
    assert (len(held), held[:6].tolist()) == (359, [39, 1197, 601, 412, 1620, 1069])
    right = (digits.predict(DIGITS.x[held]) == DIGITS.c[held]).double().mean().item()
    assert right >= 0.98
    assert f"{right:.4f}" == origin(digits)["accuracy"]
    assert accuracy(digits.net, DIGITS.x[held], DIGITS.c[held]) == right


@pytest.mark.data
def test_accuracy_on_test_images_of_cifar10() -> None:
    """Of the first 1,000, within three standard errors of what the file says of 10,000."""
    x, c = cifar_images(Path(os.environ["DUMO_DATA"]) / "cifar10", "test", 1000)
    right = accuracy(cifar10.net, from_uint8(x), c)
    assert right >= 0.78
    assert right == (cifar10.predict(from_uint8(x)) == c).double().mean().item()
    assert right == pytest.approx(float(origin(cifar10)["accuracy"]), abs=0.033)


def test_features_of_digits_are_standardised() -> None:
    f = digits.features(DIGITS.x)
    assert f.mean(0).abs().max() < 0.3
    assert f.var(0).min() > 0.5
    assert f.var(0).max() < 1.5


@pytest.mark.data
def test_features_of_cifar10_are_standardised() -> None:
    x, _ = cifar_images(Path(os.environ["DUMO_DATA"]) / "cifar10", "train", 1000)
    f = cifar10.features(from_uint8(x))
    assert f.mean(0).abs().max() < 0.3
    still = f.var(0) < 1e-3
    assert still.sum() <= 2  # never awake; they must not blow up what wakes them
    assert f.var(0)[~still].min() > 0.5
    assert f.var(0)[~still].max() < 1.6
    assert cifar10.features(torch.randn(50, 3, 32, 32, generator=stream("noise")).clamp(-1, 1)).abs().max() < 20


@BOTH
def test_features_are_what_the_head_reads_and_of_a_row_alone(known: Shipped, x: Tensor) -> None:
    f = known.features(x)
    assert f.shape == (600, int(origin(known)["features"]))
    assert torch.equal(known.classify(f), known.predict(x))
    torch.testing.assert_close(f[510:], known.features(x[510:]), rtol=1e-4, atol=1e-4)
    assert known.features(x[:0]).shape == (0, known.width)


@BOTH
def test_loading_draws_nothing_and_asks_for_no_gradient(known: Shipped, x: Tensor) -> None:
    before = torch.get_rng_state()
    net = Shipped(known.kind, known.file).net
    assert torch.equal(torch.get_rng_state(), before)
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())
