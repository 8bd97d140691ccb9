"""An evaluation is of this run, says by what it was measured, and never writes over another."""

import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from dumo.config.load import load
from dumo.report.card import contrast_passes, read_report
from dumo.report.compare import compare
from dumo.report.evaluate import current_report, evaluate, report_path, write_report
from dumo.report.name import name_part
from dumo.run.sampler import sampler_of
from dumo.run.train import train
from dumo.run.weights import RunFolder, open_run
from dumo.types import UserError
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


def open_folder(folder: Path, *overrides: str, weights: str | None = None) -> RunFolder:
    return open_run(str(folder), overrides, weights=weights, device="cpu")


@pytest.mark.slow
def test_a_report_is_of_this_run_and_repeats(folder: Path) -> None:
    opened = open_folder(folder)
    report = evaluate(opened)
    assert report["file"] == str(folder / "evaluation.json")
    assert [row["nfe"] for row in report["results"]] == list(opened.run.evaluate.nfe)
    assert {row["solver"] for row in report["contrast"]} == {"euler"}
    assert json.loads((folder / "evaluation.json").read_text()) == report == read_report(folder / "evaluation.json")
    assert evaluate(opened) == report
    assert files(folder) == {"evaluation.json"}


@pytest.mark.slow
def test_precision_is_that_of_training_unless_another_is_asked_for(folder: Path) -> None:
    """It is on the card, and in the name where it is not the run's own; an older card means fp32."""
    plain = evaluate(open_folder(folder))
    low = evaluate(opened := open_folder(folder, "sample.precision=bf16"))
    assert (plain["card"]["precision"], low["card"]["precision"]) == ("fp32", "bf16")
    assert files(folder) == {"evaluation.json", "evaluation-precisionbf16.json"}
    assert plain["results"] != low["results"]
    train_low = opened.run.train.model_copy(update={"precision": "bf16"})
    asked = opened.run.model_copy(update={"train": train_low, "sample": open_folder(folder).run.sample})
    assert asked.precision == "bf16"
    (file := folder / "evaluation.json").write_text(file.read_text().replace('"precision": "fp32",', ""))
    assert read_report(file)["card"]["precision"] == "fp32"
    assert current_report(open_folder(folder)) is not None


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
    assert card["weights_sha256"] == hashlib.sha256(opened.file.read_bytes()).hexdigest()
    assert card["versions"]["torch"] == torch.__version__


@pytest.mark.nightly
def test_what_is_asked_otherwise_is_another_file(folder: Path) -> None:
    own = evaluate(open_folder(folder))
    net = str(folder / "checkpoints/step-00000004/net.safetensors")
    sha = hashlib.sha256(Path(net).read_bytes()).hexdigest()[:6]
    asked = {
        "evaluation-seed1.json": evaluate(open_folder(folder), seed=1),
        "evaluation-m0.3.json": evaluate(open_folder(folder, "sample.solver.m=0.3")),
        "evaluation-samples41.json": evaluate(open_folder(folder, "evaluate.protocol.samples=41"), nfe=[1]),
        f"evaluation-net-{sha}.json": evaluate(open_folder(folder, weights=net)),
        "evaluation-euler.json": evaluate(open_folder(folder), solver="euler", nfe=[7]),
    }
    assert files(folder) == {"evaluation.json", *asked}
    for name, report in asked.items():
        assert read_report(folder / name) == report
        assert report["results"] != own["results"]
    assert asked[f"evaluation-net-{sha}.json"]["card"]["ema"] is None
    assert read_report(folder / "evaluation.json") == own
    same = latest(folder / "checkpoints") or Path()
    evaluate(open_folder(folder, weights=str(same / "ema-0.999.safetensors")), nfe=[1, 2], seed=0, solver="restart")
    assert len(files(folder)) == 6  # all of that is the run's own


@pytest.mark.slow
def test_an_evaluation_of_an_earlier_step_is_kept(folder: Path) -> None:
    before = evaluate(open_folder(folder))
    train(load(str(folder), ["train.steps=5"]), folder)
    after = evaluate(open_folder(folder))
    assert (before["step"], after["step"]) == (4, 5)
    assert read_report(folder / "evaluation.json") == after
    assert read_report(folder / "evaluation-step4.json") == before


@pytest.mark.slow
def test_rows_of_other_passes_are_collected(folder: Path) -> None:
    """So what was judged at one pass, then at others, is what a comparison and a report show."""
    one = evaluate(open_folder(folder), nfe=[1])
    assert one["file"] == str(folder / "evaluation.json")
    assert current_report(open_folder(folder)) is None  # its own spec asks for two passes as well
    three = evaluate(open_folder(folder), nfe=[3])
    assert [row["nfe"] for row in three["results"]] == [3]  # what was asked
    whole = evaluate(open_folder(folder))
    kept = read_report(folder / "evaluation.json")
    assert kept["results"] == [*whole["results"], *three["results"]]
    assert kept["contrast"] == [*whole["contrast"], three["contrast"][-1]]
    assert (kept["card"]["nfe"], kept["card"]["contrast"]) == ([1, 2, 3], [1, 2, 3])
    assert current_report(open_folder(folder)) == whole
    assert [row["nfe"] for row in compare([str(folder)])["rows"]] == [1, 2, 3] * 2
    assert files(folder) == {"evaluation.json"}


@pytest.mark.nightly
def test_guided_rows_are_collected_by_the_passes_asked_for(tmp_path: Path) -> None:
    """The net counts two passes where it is guided, so a row of one asked for says 2."""
    folder = tmp_path / "run"
    train(tiny("digits", "objective.drop=0.1", "sample.guide.scale=2"), folder)
    two, one = (evaluate(open_folder(folder), nfe=[n]) for n in (2, 1))
    kept = read_report(folder / "evaluation.json")
    assert kept["results"] == [*one["results"], *two["results"]]
    assert ([row["nfe"] for row in kept["results"]], kept["card"]["nfe"]) == ([2, 4], [1, 2])


@pytest.mark.slow
def test_rows_of_another_card_are_put_aside(folder: Path) -> None:
    evaluate(open_folder(folder), nfe=[1])
    before = read_report(folder / "evaluation.json")
    before["card"]["versions"]["torch"] = "0"
    (folder / "evaluation.json").write_text(json.dumps(before))
    after = evaluate(open_folder(folder), nfe=[2])
    assert read_report(folder / "evaluation.json") == after
    (aside,) = folder.glob("evaluation-step4-*.json")
    assert read_report(aside) == before


@pytest.mark.parametrize(
    "asked",
    [
        [(4, "cpu", 1), (4, "cpu", 2), (4, "cuda", 1), (4, "cpu", 4), (4, "cuda", 1)],
        [(4, "cpu", 1), (5, "cpu", 1), (4, "cuda", 1), (5, "cpu", 1)],
    ],
    ids=["one step", "back at an earlier step"],
)
def test_a_report_that_was_put_aside_is_never_written_over(asked: list[tuple[int, str, int]], tmp_path: Path) -> None:
    for step, device, passes in asked:
        card = {"solver": {}, "codec": None, "nfe": [passes], "contrast": [], "step": step, "device": device}
        rows = {"results": [{"nfe": passes, "solver": "restart", "fd": 1.0}], "contrast": []}
        write_report(tmp_path / "evaluation.json", {"step": step, "card": card, "baselines": {}, **rows})
    kept: set[tuple[int, str, int]] = set()
    for name in files(tmp_path):
        report = read_report(tmp_path / name)
        kept |= {(report["step"], report["card"]["device"], row["nfe"]) for row in report["results"]}
    assert kept == {*asked}


@pytest.mark.nightly
def test_two_evaluations_at_once_lose_no_row(folder: Path) -> None:
    """Between reading what stands and writing, nobody else writes."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: evaluate(open_folder(folder), nfe=[n]), range(1, 9)))
    kept = read_report(folder / "evaluation.json")
    assert [row["nfe"] for row in kept["results"]] == list(range(1, 9))


@pytest.mark.nightly
def test_what_stands_is_known_to_be_what_is_asked(folder: Path) -> None:
    assert current_report(open_folder(folder)) is None
    report = evaluate(open_folder(folder))
    assert current_report(open_folder(folder)) == report
    for more in ("sample.solver.m=0.3", "evaluate.seed=1", "evaluate.nfe=[1, 3]", "evaluate.contrast=[4]"):
        assert current_report(open_folder(folder, more)) is None
    for more in ("evaluate.nfe=[2]", "evaluate.contrast=[]"):  # less than stands is known, too
        assert current_report(open_folder(folder, more)) == evaluate(open_folder(folder, more))
    (folder / "evaluation.json").write_text(json.dumps({"step": 4}))  # of a version without cards
    assert current_report(open_folder(folder)) is None


@pytest.mark.slow
def test_what_is_judged_against_another_split_is_something_new(folder: Path) -> None:
    report = evaluate(open_folder(folder), nfe=[1])
    assert "protocol_settings" in report["card"]
    assert current_report(open_folder(folder, "evaluate.nfe=[1]")) == report
    assert current_report(open_folder(folder, "evaluate.nfe=[1]", "evaluate.split=test")) is None
    older = {**report, "card": {name: value for name, value in report["card"].items() if name != "protocol_settings"}}
    (folder / "evaluation.json").write_text(json.dumps(older))
    assert current_report(open_folder(folder, "evaluate.nfe=[1]")) == report
    assert current_report(open_folder(folder, "evaluate.nfe=[1]", "evaluate.split=test")) is None


@pytest.mark.parametrize("own_solver", ["restart", "hermite"])
def test_settings_of_a_solver_have_the_files_that_the_page_compares(own_solver: str, tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs/evaluation.md").read_text(encoding="utf-8")
    _, setting, _ = next(line for line in page.splitlines() if "sample.solver" in line and "$m" in line).split('"')
    pattern = page.partition("dumo compare runs/photos/")[2].partition("`")[0]
    train(tiny("moons", f"sample.solver={{kind: {own_solver}}}", "train.steps=2"), tmp_path / "run")
    path = report_path(open_folder(tmp_path / "run", setting.replace("$m", "0.3")))
    assert path.match(pattern)
    assert not report_path(open_folder(tmp_path / "run")).match(pattern)


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
        assert contrast_passes(sampler_of(run, nn.Identity()), run.evaluate) == passes


@pytest.mark.slow
def test_the_work_is_watched(folder: Path) -> None:
    seen = Seen()
    evaluate(open_folder(folder), bar=seen)
    assert seen.titles == [(f"sampling, {kind} at {n}", 40) for kind in ("restart", "euler") for n in (1, 2)]


def test_a_file_that_is_no_report_is_told_what_one_is(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    path.write_text("{}")
    with pytest.raises(UserError, match=r"notes\.json has no report card: name a run's folder, or a file that dumo"):
        read_report(path)


def test_no_report_is_read_without_a_card(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    for text, said in ((None, "is not there"), ("{", "is not JSON"), ("[]", "no report card"), ("{}", "no report")):
        if text:
            path.write_text(text)
        with pytest.raises(UserError, match=rf"evaluation\.json .*{said}.*: run dumo evaluate {tmp_path} first"):
            read_report(path)
