"""An evaluation is of this run, says by what it was measured, and has a file of its own by other settings."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dumo.config.load import load
from dumo.io import tensor_files
from dumo.report.evaluation import current_report, evaluate, report_path
from dumo.report.evaluation_card import contrast_passes, read_report
from dumo.report.name import name_part
from dumo.run.trained import TrainedRun
from dumo.run.weights import load_run
from trained import train
from unit.run.known import Seen, tiny
from unit.training.by_path import latest


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DuMo on moons, barely trained. Not to be written to."""
    folder = tmp_path_factory.mktemp("run") / "moons"
    train(tiny("moons"), folder)
    return folder


@pytest.fixture
def folder(first: Path, tmp_path: Path) -> Path:
    return shutil.copytree(first, tmp_path / "run")


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("evaluation*.json")}


def open_folder(folder: Path, *overrides: str, weights: str | None = None) -> TrainedRun:
    return load_run(str(folder), overrides, weights=weights, device="cpu")


@pytest.mark.slow
def test_a_report_is_of_this_run_and_repeats(folder: Path) -> None:
    opened = open_folder(folder)
    report = evaluate(opened)
    assert report["file"] == str(folder / "evaluation.json")
    assert [row["nfe"] for row in report["results"]] == list(opened.spec.evaluate.nfe)
    assert {row["solver"] for row in report["contrast"]} == {"euler"}
    assert json.loads((folder / "evaluation.json").read_text()) == report == read_report(folder / "evaluation.json")
    assert evaluate(opened) == report
    assert files(folder) == {"evaluation.json"}


@pytest.mark.slow
def test_precision_is_that_of_training_unless_another_is_asked_for(folder: Path) -> None:
    """It is on the card, and in the name if it is not the run's own."""
    plain = evaluate(open_folder(folder))
    low = evaluate(opened := open_folder(folder, "sample.precision=bf16"))
    assert (plain["card"]["precision"], low["card"]["precision"]) == ("fp32", "bf16")
    assert files(folder) == {"evaluation.json", "evaluation-precisionbf16.json"}
    assert plain["results"] != low["results"]
    train_low = opened.spec.train.model_copy(update={"precision": "bf16"})
    asked = opened.spec.model_copy(update={"train": train_low, "sample": open_folder(folder).spec.sample})
    assert asked.precision == "bf16"


@pytest.mark.slow
def test_the_card_says_by_what_it_was_measured(folder: Path) -> None:
    opened = open_folder(folder, "sample.solver.m=0.25")
    card = evaluate(opened, seed=3)["card"]
    assert (card["protocol"], card["samples"], card["seed"]) == ("toy (40 samples)", 40, 3)
    assert card["reference"] == "40 draws of seed 3"
    assert card["features"].startswith("none")
    assert card["solver"] == {"kind": "restart", "m": 0.25, "start": 1.0}
    assert (card["nfe"], card["contrast"], card["codec"]) == ([1, 2], [1, 2], None)
    assert (card["data"]["kind"], card["step"], card["ema"]) == ("moons", 4, 0.999)
    assert (round(card["data_sd"], 1), card["path"]) == (1.0, {"kind": "linear"})
    assert card["weights_sha256"] == tensor_files.sha256(opened.file)
    assert card["versions"]["torch"] == torch.__version__


@pytest.mark.nightly
def test_what_is_asked_otherwise_is_another_file(folder: Path) -> None:
    own = evaluate(open_folder(folder))
    net = str(folder / "checkpoints/step-00000004/net")
    sha = tensor_files.sha256(Path(net))[:6]
    asked = {
        "evaluation-seed1.json": evaluate(open_folder(folder), seed=1),
        "evaluation-m0.3.json": evaluate(open_folder(folder, "sample.solver.m=0.3")),
        "evaluation-samples41-nfe1.json": evaluate(open_folder(folder, "evaluate.protocol.samples=41"), nfe=[1]),
        f"evaluation-net-{sha}.json": evaluate(open_folder(folder, weights=net)),
        "evaluation-euler-nfe7.json": evaluate(open_folder(folder), solver="euler", nfe=[7]),
    }
    assert files(folder) == {"evaluation.json", *asked}
    for name, report in asked.items():
        assert read_report(folder / name) == report
        assert report["results"] != own["results"]
    assert asked[f"evaluation-net-{sha}.json"]["card"]["ema"] is None
    assert read_report(folder / "evaluation.json") == own
    same = latest(folder / "checkpoints") or Path()
    evaluate(open_folder(folder, weights=str(same / "ema-0.999")), nfe=[1, 2], seed=0, solver="restart")
    assert len(files(folder)) == 6  # all of that is the run's own


@pytest.mark.slow
def test_an_evaluation_of_later_weights_replaces_the_earlier_one(folder: Path) -> None:
    before = evaluate(open_folder(folder))
    train(load(str(folder), ["train.steps=5"]), folder)
    after = evaluate(open_folder(folder))
    assert (before["step"], after["step"]) == (4, 5)
    assert read_report(folder / "evaluation.json") == after


@pytest.mark.nightly
def test_what_stands_is_known_to_be_what_is_asked(folder: Path) -> None:
    assert current_report(open_folder(folder)) is None
    report = evaluate(open_folder(folder))
    assert current_report(open_folder(folder)) == report
    for more in ("sample.solver.m=0.3", "evaluate.seed=1", "evaluate.nfe=[2]", "evaluate.split=test"):
        assert current_report(open_folder(folder, more)) is None


@pytest.mark.parametrize("own_solver", ["restart", "hermite"])
def test_settings_of_a_solver_have_the_files_that_the_page_compares(own_solver: str, tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs/evaluation.md").read_text(encoding="utf-8")
    _, setting, _ = next(line for line in page.splitlines() if "sample.solver" in line and "$m" in line).split('"')
    pattern = page.partition("dumo compare runs/photos/")[2].partition("`")[0]
    train(tiny("moons", f"sample.solver={{kind: {own_solver}}}", "train.steps=2"), tmp_path / "run")
    opened = open_folder(tmp_path / "run", setting.replace("$m", "0.3"))
    path = report_path(opened, opened.spec)
    assert path.match(pattern)
    opened = open_folder(tmp_path / "run")
    assert not report_path(opened, opened.spec).match(pattern)


def test_a_name_has_the_sign_of_a_number() -> None:
    assert [name_part("knobs.a", value) for value in (-1, 1, -0.5)] == ["a-1", "a1", "a-0.5"]


def test_v_stands_beside_at_the_passes_that_are_wanted() -> None:
    for recipe, words, passes in (
        ("moons", [], [1, 2]),
        ("moons", ["evaluate.contrast=[50]", "evaluate.nfe=[1]"], [1, 50]),
        ("moons", ["evaluate.contrast=[]"], []),
        ("digits-flow-matching", ["evaluate.contrast=[1, 50]"], []),  # its own solver is the contrast
    ):
        run = load(recipe, words)
        assert contrast_passes(run) == passes


@pytest.mark.slow
def test_the_work_is_watched(folder: Path) -> None:
    seen = Seen()
    evaluate(open_folder(folder), bar=seen)
    assert seen.titles == [(f"sampling, {kind} at {n}", 40) for kind in ("restart", "euler") for n in (1, 2)]
