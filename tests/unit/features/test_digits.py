"""The shipped classifier is good, small, says where it comes from, and can be made again."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dumo.features import digits as classifier
from dumo.features.digits import KEY, WEIGHTS, WIDTH, accuracy, digits, features, make, origin, predict, shipped, split
from dumo.types import UserError


def test_data_are_the_grey_levels_of_ten_classes() -> None:
    x, c = digits()
    assert x.shape == (1797, 1, 8, 8)
    assert torch.equal(((x + 1) * 8).unique(), torch.arange(17.0))
    assert c.bincount().min() > 170
    assert len(c.unique()) == 10


def test_a_fixed_fifth_is_held_out() -> None:
    taught, held = split(1797)
    assert len(held) == 359
    assert torch.equal(torch.cat([taught, held]).sort().values, torch.arange(1797))
    assert torch.equal(held, split(1797)[1])
    # The shipped weights have not seen these rows. Should torch ever permute otherwise, make the weights again.
    assert held[:6].tolist() == [39, 1197, 601, 412, 1620, 1069]


def test_shipped_accuracy_on_held_out_digits() -> None:
    x, c = digits()
    held = split(len(x))[1]
    right = (predict(x[held]) == c[held]).double().mean().item()
    assert right >= 0.98
    assert f"{right:.4f}" == origin()["accuracy"]
    assert accuracy(shipped(), x[held], c[held]) == right


def test_shipped_file_is_small_and_tells_its_origin() -> None:
    assert WEIGHTS.stat().st_size <= 300_000
    told = origin()
    assert told["recipe"] == f"python -m {KEY}"  # as this module was called then
    assert told["features"] == str(WIDTH)
    assert {"torch", "scikit-learn", "safetensors"} <= set(told["versions"].replace(",", "").split())
    assert "load_digits" in told["data"]
    assert told["held_out"].startswith("359 rows")


def test_features_are_standardised_and_what_the_head_reads() -> None:
    x, c = digits()
    f, net = features(x), shipped()
    assert f.shape == (1797, WIDTH)
    assert f.mean(0).abs().max() < 0.3
    assert f.var(0).min() > 0.5
    assert f.var(0).max() < 1.5
    assert torch.equal(net.head(torch.nn.functional.silu(f)).argmax(1), predict(x))
    assert (predict(x) == c).double().mean() > 0.99


def test_features_of_a_row_do_not_depend_on_the_others() -> None:
    x, _ = digits()
    torch.testing.assert_close(features(x[:600])[510:], features(x[510:600]), rtol=1e-5, atol=1e-5)
    assert features(x[:0]).shape == (0, WIDTH)


def test_loading_draws_nothing_and_asks_for_no_gradient() -> None:
    before = torch.get_rng_state()
    shipped.cache_clear()
    net = shipped()
    assert torch.equal(torch.get_rng_state(), before)
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())


def test_the_recipe_makes_as_good_a_file(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    told = make(tmp_path / "again.safetensors")
    assert torch.equal(torch.get_rng_state(), before)
    assert float(told["accuracy"]) >= 0.98
    assert origin(tmp_path / "again.safetensors") == told
    again, kept = load_file(tmp_path / "again.safetensors"), load_file(WEIGHTS)
    assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in kept.items()}


def test_the_recipe_makes_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "STEPS", 10)
    monkeypatch.setattr(classifier, "FLOOR", 0.0)
    one, two = tmp_path / "one", tmp_path / "two"
    assert make(one) == make(two)
    assert one.read_bytes() == two.read_bytes()


def test_a_bad_classifier_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "STEPS", 2)
    with pytest.raises(UserError, match=r"below 0\.98: nothing written"):
        make(tmp_path / "bad.safetensors")
    assert not any(tmp_path.iterdir())


def test_shifts_are_by_a_pixel_and_move_background_in() -> None:
    x = torch.full((400, 1, 8, 8), -1.0)
    x[:, 0, 3, 3] = 1
    moved = classifier._shift(x, classifier.stream("shift"))
    places = {tuple(place) for place in (moved[:, 0] == 1).nonzero()[:, 1:].tolist()}
    assert places == {(i, j) for i in (2, 3, 4) for j in (2, 3, 4)}
    edge = torch.ones(400, 1, 8, 8)
    assert set(classifier._shift(edge, classifier.stream("edge")).unique().tolist()) == {-1.0, 1.0}
