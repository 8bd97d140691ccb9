"""The shipped classifier of CIFAR-10 is good, small, and says where it comes from."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dumo.encoders import cifar10
from dumo.encoders.cifar10 import WEIGHTS, WIDTH
from dumo.io import weights
from dumo.io.picture import from_uint8
from dumo.runtime.random import stream
from train_classifier import accuracy, cifar_images

# Another file gives other numbers: not under the same name.
SHA256 = "cb20e51f59f64f4a0f1a43fb794106bc5e4c7d54c3c7bff3137d510df2320dba"


def pixels(n: int) -> tuple[Tensor, Tensor]:
    """Noise whose colour tells its class."""
    c = torch.arange(n) % 10
    colour = torch.randint(200, (10, 3, 1, 1), generator=stream("colour"))[c]
    return (colour + torch.randint(56, (n, 3, 32, 32), generator=stream("noise"))).to(torch.uint8), c


def some(n: int) -> Tensor:
    return from_uint8(pixels(n)[0])


def test_shipped_file_is_small_whole_and_tells_its_origin() -> None:
    assert WEIGHTS.stat().st_size <= 1_000_000
    assert cifar10.sha256() == SHA256
    origin = json.loads(weights.notes(WEIGHTS)["origin"])
    assert origin["features"] == str(WIDTH)
    assert {"torch", "pillow", "safetensors"} <= set(origin["versions"].replace(",", "").split())
    assert "50,000 training images" in origin["data"]
    assert origin["tested"].startswith("on the 10,000 test images")
    assert float(origin["accuracy"]) >= 0.8


@pytest.mark.data
def test_shipped_accuracy_on_test_images() -> None:
    """Of the first 1,000, within three standard errors of what the file says of 10,000."""
    x, c = cifar_images(Path(os.environ["DUMO_DATA"]) / "cifar10", "test", 1000)
    right = accuracy(cifar10.shipped(), from_uint8(x), c)
    assert right >= 0.78
    assert right == (cifar10.predict(from_uint8(x)) == c).double().mean().item()
    assert right == pytest.approx(float(json.loads(weights.notes(WEIGHTS)["origin"])["accuracy"]), abs=0.033)


@pytest.mark.data
def test_features_are_standardised() -> None:
    x, _ = cifar_images(Path(os.environ["DUMO_DATA"]) / "cifar10", "train", 1000)
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
