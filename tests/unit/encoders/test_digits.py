"""The shipped classifier is good, small, and says where it comes from."""

import json

import torch

from dumo.data import Digits
from dumo.encoders.digits import WEIGHTS, WIDTH, features, predict, shipped
from dumo.io import weights
from train_classifier import accuracy, split_digits

DIGITS = Digits().originals()


def test_a_fixed_fifth_is_held_out() -> None:
    taught, held = split_digits(1797)
    assert len(held) == 359
    assert torch.equal(torch.cat([taught, held]).sort().values, torch.arange(1797))
    assert torch.equal(held, split_digits(1797)[1])
    # The shipped weights have not seen these rows. Should torch ever permute otherwise, make the weights again.
    assert held[:6].tolist() == [39, 1197, 601, 412, 1620, 1069]


def test_shipped_accuracy_on_held_out_digits() -> None:
    x, c = DIGITS.x, DIGITS.c
    held = split_digits(len(x))[1]
    right = (predict(x[held]) == c[held]).double().mean().item()
    assert right >= 0.98
    assert f"{right:.4f}" == json.loads(weights.notes(WEIGHTS)["origin"])["accuracy"]
    assert accuracy(shipped(), x[held], c[held]) == right


def test_shipped_file_is_small_and_tells_its_origin() -> None:
    assert WEIGHTS.stat().st_size <= 300_000
    origin = json.loads(weights.notes(WEIGHTS)["origin"])
    assert origin["features"] == str(WIDTH)
    assert {"torch", "scikit-learn", "safetensors"} <= set(origin["versions"].replace(",", "").split())
    assert "load_digits" in origin["data"]
    assert origin["held_out"].startswith("359 rows")


def test_features_are_standardised_and_what_the_head_reads() -> None:
    x, c = DIGITS.x, DIGITS.c
    f, net = features(x), shipped()
    assert f.shape == (1797, WIDTH)
    assert f.mean(0).abs().max() < 0.3
    assert f.var(0).min() > 0.5
    assert f.var(0).max() < 1.5
    assert torch.equal(net.head(torch.nn.functional.silu(f)).argmax(1), predict(x))
    assert (predict(x) == c).double().mean() > 0.99


def test_features_of_a_row_do_not_depend_on_the_others() -> None:
    x = DIGITS.x
    torch.testing.assert_close(features(x[:600])[510:], features(x[510:600]), rtol=1e-5, atol=1e-5)
    assert features(x[:0]).shape == (0, WIDTH)


def test_loading_draws_nothing_and_asks_for_no_gradient() -> None:
    before = torch.get_rng_state()
    shipped.cache_clear()
    net = shipped()
    assert torch.equal(torch.get_rng_state(), before)
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())
