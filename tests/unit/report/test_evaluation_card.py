"""Only what was measured alike stands in one table."""

import json
from pathlib import Path
from typing import Any

import pytest

from dumo.config.load import load
from dumo.report.comparison import compare, differing_fields, require_comparable, shorten_hashes
from dumo.report.evaluation_card import protocol_settings
from dumo.report.score import mark_best
from dumo.types import UserError

CARD: dict[str, Any] = {
    "protocol": "folder",
    "samples": 10_000,
    "features": "Inception",
    "features_sha256": "a" * 64,
    "reference": "50,000 images of the data",
    "reference_sha256": "b" * 64,
    "resize": "TensorFlow 1",
    "rounding": "0 to 255",
    "data": {"kind": "images", "root": "/here"},
    "codec": {"kind": "taef2", "sha256": "c" * 64},
    "weights": "checkpoints/step-00000004/ema-0.999",
    "weights_sha256": "d" * 64,
    "step": 4,
    "ema": 0.999,
    "solver": {"kind": "restart", "m": 0.5},
    "seed": 0,
}


def written(folder: Path, fid: float = 2.0, **changes: object) -> str:
    """A run's folder with an evaluation."""
    folder.mkdir()
    rows = {"results": [{"nfe": 1, "solver": "restart", "fid": fid}], "contrast": [{"nfe": 1, "solver": "euler"}]}
    (folder / "evaluation.json").write_text(json.dumps({"step": 4, "baselines": {}, "card": CARD | changes, **rows}))
    return str(folder)


FIELDS = ("protocol", "samples", "features", "features_sha256", "reference", "reference_sha256")


@pytest.mark.parametrize("field", [*FIELDS, "resize", "rounding", "colours", "class_mmd", "codec", "seed"])
def test_every_measure_that_differs_is_refused_and_named(field: str) -> None:
    values = {"codec": {"kind": "taef2", "sha256": "e" * 64}, "class_mmd": "over 2 of 3 classes, without 1"}
    value = values.get(field, "another")
    other = CARD | {field: value}
    assert list(differing_fields({"a": CARD, "b": other, "c": CARD})) == [field]
    with pytest.raises(UserError, match=rf"  {field}: .* in a, c; .* in b\n"):
        require_comparable({"a": CARD, "b": other, "c": CARD})


@pytest.mark.parametrize("field", ["weights", "weights_sha256", "step", "ema", "solver", "data"])
def test_what_is_compared_may_differ(field: str) -> None:
    require_comparable({"a": CARD, "b": CARD | {field: "another"}})


def test_classes_that_are_left_out_are_compared() -> None:
    one, other = (CARD | {"class_mmd": f"over 2 of 3 classes, without {k}"} for k in (1, 2))
    assert list(differing_fields({"one": one, "other": other})) == ["class_mmd"]
    assert list(differing_fields({"one": one, "all": CARD})) == ["class_mmd"]


def test_classes_of_the_reference_are_compared_where_both_sides_name_them() -> None:
    fine, coarse = (CARD | {"classes_sha256": digit * 64} for digit in "01")
    assert list(differing_fields({"fine": fine, "coarse": coarse})) == ["classes_sha256"]
    require_comparable({"fine": fine, "without classes": CARD})


def test_captions_of_samples_are_a_part_of_how_well_images_fit_them() -> None:
    card = CARD | {"protocol": "clip-score (10 samples)", "labels": "captions of images, from end to end"}
    other = card | {"labels": "i mod 2, by held templates in turn"}
    assert list(differing_fields({"a": card, "b": other})) == ["labels"]
    require_comparable({"a": CARD | {"labels": "none"}, "b": CARD | {"labels": "i mod 2"}})


def test_the_same_images_are_one_reference_by_any_split() -> None:
    """Of a run, and of images that are compared with the folder of that split."""
    run = CARD | {"reference": "50,000 images of split test"}
    require_comparable({"run": run, "images": CARD})
    held_out = CARD | {"reference": "50,000 images of split test, never trained on"}
    assert list(differing_fields({"run": run, "held out": held_out})) == ["reference"]
    assert list(differing_fields({"run": run | {"reference_sha256": "e" * 64}, "images": CARD})) == ["reference_sha256"]


def test_a_codec_is_known_by_its_weights() -> None:
    codec = CARD["codec"]
    require_comparable({"a": CARD, "b": CARD | {"codec": codec | {"scale": 1.2, "shift": 0.0}}})  # as cards had it
    for other in (None, codec | {"kind": "sd-vae"}):
        assert list(differing_fields({"a": CARD, "b": CARD | {"codec": other}})) == ["codec"]


def test_data_without_a_hash_is_compared_by_what_it_is() -> None:
    draws = {key: value for key, value in CARD.items() if key != "reference_sha256"}
    require_comparable({"a": draws, "b": draws})
    assert list(differing_fields({"a": draws, "b": draws | {"data": {"kind": "moons"}}})) == ["data"]


def test_a_table_of_runs(tmp_path: Path) -> None:
    a, b = written(tmp_path / "a"), written(tmp_path / "b", 1.5, solver={"kind": "restart", "m": 0.3}, step=9)
    found = compare([a, str(tmp_path / "b/evaluation.json")])
    assert found["differs"] == {}
    assert found["rows"] == [
        {"run": a, "step": 4, "m": 0.5, "nfe": 1, "solver": "restart", "fid": 2.0},
        {"run": a, "step": 4, "m": None, "nfe": 1, "solver": "euler", "fid": None},
        {"run": f"{b}/evaluation.json", "step": 4, "m": 0.3, "nfe": 1, "solver": "restart", "fid": 1.5},
        {"run": f"{b}/evaluation.json", "step": 4, "m": None, "nfe": 1, "solver": "euler", "fid": None},
    ]


def test_a_table_says_what_a_perfect_sampler_would_have(tmp_path: Path) -> None:
    one, other = written(tmp_path / "a"), Path(written(tmp_path / "b")) / "evaluation.json"
    found = {"perfect": {"mean": 1.5, "sd": 0.1, "kid": None}, "noise": {"mean": 90.0, "sd": 1.0}}
    other.write_text(json.dumps(json.loads(other.read_text()) | {"baselines": found}))
    assert compare([one, str(other)])["perfect"] == {str(other): {"fid": 1.5, "fid_sd": 0.1}}


def test_a_table_marks_the_best_by_classes_where_all_runs_have_them(tmp_path: Path) -> None:
    """The first has the right images and wrong classes."""
    places = [written(tmp_path / name) for name in "abc"]
    rows = ({"mmd": 1.0, "class_mmd": 90.0}, {"mmd": 2.0, "class_mmd": 3.0}, {"mmd": 3.0})
    for place, scores in zip(places, rows, strict=True):
        file = Path(place) / "evaluation.json"
        errors = {f"{name}_sd": 0.1 for name in scores}
        results = [{"nfe": 1, "solver": "restart", **scores, **errors}]
        file.write_text(json.dumps(json.loads(file.read_text()) | {"results": results, "contrast": []}))
    assert [row["best"] for row in compare(places[:2])["rows"]] == [False, True]
    assert [row["best"] for row in compare(places)["rows"]] == [True, False, False]


def test_a_table_says_what_a_run_was_trained_on(tmp_path: Path) -> None:
    one, two = written(tmp_path / "a"), written(tmp_path / "b", trained_on="Inception")
    assert "trained_on" not in compare([one])["rows"][0]
    assert [row["trained_on"] for row in compare([one, two])["rows"]] == [None, None, "fid", "fid"]


def test_anyway_shows_what_differs(tmp_path: Path) -> None:
    a, b = written(tmp_path / "a"), written(tmp_path / "b", reference_sha256="e" * 64, seed=1)
    with pytest.raises(UserError, match=r"reference_sha256: b{64} in"):
        compare([a, b])
    found = compare([a, b], anyway=True)
    assert found["differs"]["seed"] == {a: 0, b: 1}
    assert [(row["seed"], row["reference_sha256"]) for row in found["rows"][::2]] == [(0, "b" * 8), (1, "e" * 8)]
    assert shorten_hashes(f"taef2 {'c' * 64}") == "taef2 cccccccc"


def test_a_value_that_differs_stays_none_or_a_number(tmp_path: Path) -> None:
    """The table of the terminal shows None as an empty cell, and numbers are numbers in JSON."""
    a, b = written(tmp_path / "a", resize=None), written(tmp_path / "b", samples=50_000)
    rows = compare([a, b], anyway=True)["rows"]
    assert [(row["resize"], row["samples"]) for row in rows[::2]] == [(None, 10_000), ("TensorFlow 1", 50_000)]


def test_what_is_level_with_the_best_of_its_passes_is_marked() -> None:
    rows = [
        {"run": "a", "nfe": 1, "mmd": 1.0, "mmd_sd": 0.1},
        {"run": "b", "nfe": 1, "mmd": 1.25, "mmd_sd": 0.1},
        {"run": "c", "nfe": 1, "mmd": 1.5, "mmd_sd": 0.1},
        {"run": "d", "nfe": 2, "mmd": 4.0, "mmd_sd": 0.1},
        {"run": "e", "nfe": 2, "mmd": None, "mmd_sd": None},
    ]
    assert [row["best"] for row in mark_best(rows, "mmd")] == [True, True, False, True, False]
    others = [{"mmd": 50.0, "mmd_sd": 0.1}, {"nfe": 1, "mmd": 5.0, "mmd_sd": 0.1}]  # images, whose passes are not known
    assert [row["best"] for row in mark_best(others, "mmd")] == [False, True]
    assert [row["best"] for row in mark_best([{"mmd": 1.1, "mmd_sd": 0.1}, *rows], "mmd")][:2] == [True, True]
    assert mark_best([{"nfe": 1, "fd": 1.0}], "fd") == [{"nfe": 1, "fd": 1.0}]
    by_subsets = [{"nfe": 1, "kid": 1.0, "kid_sd": 0.5}]
    assert mark_best(by_subsets, "kid") == by_subsets  # a spread over subsets is no standard error


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ([], {}),
        (["evaluate.protocol.samples=500"], {}),  # which the protocol's name has
        (["evaluate.split=test"], {"split": "test"}),
        (["evaluate.protocol={kind: likelihood, levels: 17, probes: 0}"], {"levels": 17, "probes": 0}),
        (["evaluate.protocol={kind: dinov2, model: /here/dinov2-large}"], {"model": "dinov2-large"}),
    ],
)
def test_a_card_says_what_the_name_of_a_protocol_does_not(words: list[str], settings: dict[str, Any]) -> None:
    assert protocol_settings(load("digits", words)) == settings
