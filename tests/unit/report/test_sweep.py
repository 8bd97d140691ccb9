"""A sweep is the evaluation of each value, one after another, with the best one marked."""

import json
from pathlib import Path

import pytest

from dumo.report.evaluate import evaluate
from dumo.report.sweep import full, mark, sweep, values
from dumo.run.train import train
from dumo.run.weights import open_run
from dumo.types import UserError
from unit.run.known import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DuMo on moons with two averages, barely trained."""
    folder = tmp_path_factory.mktemp("run") / "moons"
    train(tiny("moons", "train.ema=[{decay: 0.5, ramp: false}, {decay: 0.99}]"), folder)
    return folder


def test_ranges_have_both_ends_and_round_numbers() -> None:
    assert values("sample.m=0.2:0.8:0.1") == ("sample.m", ["0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8"])
    assert values("a=1:2:0.3") == ("a", ["1", "1.3", "1.6", "1.9"])
    assert values("a=1:1:1") == ("a", ["1"])
    assert values("a = 0.3, x") == ("a", ["0.3", "x"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sample.m", "write it as sample.m=0.2:0.8:0.1"),
        ("sample.m=", "write it as"),
        ("sample.m=0.2:0.8", "'0.2:0.8' is no range"),
        ("sample.m=a:b:c", "'a:b:c' is no range"),
        ("sample.m=0.2:nan:1", "nothing in it"),
        ("sample.m=0.2:0.8:-0.1", "nothing in it"),
        ("sample.m=0:1:0.0001", "more than 1,000 values"),
        ("sample.m=0.2:1.2:0.5", r"sample\.solver\.m: .*less than 1"),
        ("sample.q=1", r"sample\.solver\.q: unknown key"),
        ("train.steps=1,2", "no evaluation depends on it"),
        ("evaluate.nfe=1,2", r"evaluate\.nfe: .*a list"),
        ("evaluate.sede=1,2", r"evaluate\.sede: unknown key; did you mean 'seed'"),
        ("sample.solver.kind=restart,hop", "needs flow_map"),
    ],
)
def test_what_is_no_sweep_is_refused_before_any_work(folder: Path, text: str, said: str) -> None:
    before = set(folder.iterdir())
    with pytest.raises(UserError, match=said):
        sweep(open_run(str(folder)), text)
    assert set(folder.iterdir()) == before


def test_short_names() -> None:
    assert full("sample.m") == full("sample.solver.m") == "sample.solver.m"
    assert full("sample.guide.scale") == "sample.guide.scale"
    assert full("evaluate.seed") == "evaluate.seed"
    assert full("sample.knobs.w") == "sample.knobs.w"


@pytest.mark.slow
def test_each_value_is_what_evaluating_it_gives(folder: Path) -> None:
    opened = open_run(str(folder), device="cpu")
    report = sweep(opened, "sample.m=0.3:0.5:0.2")
    assert report["values"] == ["0.3", "0.5"]
    assert [(row["value"], row["nfe"]) for row in report["rows"]] == [(m, n) for m in ("0.3", "0.5") for n in (1, 2)]
    assert read_rows(folder / "sweep-sample.m-0.3-0.5-0.2.json") == report["rows"]
    for m in ("0.3", "0.5"):
        alone = evaluate(open_run(str(folder), [f"sample.solver.m={m}"], device="cpu"))
        mine = [row for row in report["rows"] if row["value"] == m]
        assert [row["mmd2"] for row in mine] == [row["mmd2"] for row in alone["results"]]
        assert mine[0]["card"] == alone["card"]
    twos = {row["mmd2"]: row["best"] for row in report["rows"] if row["nfe"] == 2}
    assert twos[min(twos)]
    assert not twos[max(twos)]
    assert not any(row["best"] for row in report["rows"] if row["nfe"] == 1)  # one jump knows no m


def read_rows(path: Path) -> object:
    """The rows of a file that is no evaluation."""
    return json.loads(path.read_text())["rows"]


def test_every_average_and_the_weights_in_training(folder: Path) -> None:
    opened = open_run(str(folder), device="cpu")
    report = sweep(opened, "ema")
    assert report["values"] == ["ema-0.5", "ema-0.99", "net"]
    cards = {row["value"]: row["card"] for row in report["rows"]}
    assert [card["ema"] for card in cards.values()] == [0.5, 0.99, None]
    assert len({card["weights_sha256"] for card in cards.values()}) == 3
    first = [row["mmd2"] for row in report["rows"] if row["value"] == "ema-0.5"]
    assert first == [row["mmd2"] for row in evaluate(opened)["results"]]
    assert (folder / "sweep-ema.json").is_file()


def test_other_protocols_have_evaluators_of_their_own(folder: Path) -> None:
    report = sweep(open_run(str(folder)), "evaluate.seed=0,1")
    draws = [f"40 draws of seed {seed}" for seed in (0, 0, 1, 1)]
    assert [row["card"]["reference"] for row in report["rows"]] == draws


def test_the_best_is_marked_by_number_of_passes() -> None:
    rows = [{"value": v, "nfe": n, "solver": "s", "fd": f, "kid": -f} for v, n, f in
            (("a", 1, 3.0), ("b", 1, 2.0), ("a", 2, 0.5), ("b", 2, 0.5))]  # fmt: skip
    mark(rows)
    assert [row["best"] for row in rows] == [False, True, False, False]
    rising = [{"value": score, "nfe": 1, "solver": "restart", "clip_score": score} for score in (20.0, 31.5, 24.0)]
    mark(rising)
    assert [row["best"] for row in rising] == [False, True, False]


def test_what_a_run_was_trained_on_marks_no_best() -> None:
    card = {"features": "dumo's classifier of digits", "trained_on": "classifier of digits"}
    for figures, best in (("fd auc", [False, True]), ("fd", [False, False])):  # by auc, and by none
        both = [{"fd": x, "auc": 1 - x} for x in (0.1, 0.3)]
        rows = [
            {"value": "a", "nfe": 1, "solver": "s", "card": card, **{k: x[k] for k in figures.split()}} for x in both
        ]
        mark(rows)
        assert [row["best"] for row in rows] == best
