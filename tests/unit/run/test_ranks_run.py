"""A run whose checkpoints ranks wrote is as one process has it: opened, judged, gone on with, begun from, asked."""

import shutil
from pathlib import Path

import pytest

from dumo.report.evaluation import evaluate
from dumo.run.trained import TrainedRun
from dumo.run.weights import load_run
from trained import train
from unit.run.known import same, tiny
from unit.training.sharded import split

RANKS = 3
MORE = ["train.ema=[{decay: 0.999}, {decay: 0.5}]"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run twice: as one process left it, and its last checkpoint in shards. Not to be written to."""
    folder = tmp_path_factory.mktemp("runs")
    train(tiny("moons-flow-matching", *MORE), folder / "files")
    shutil.copytree(folder / "files", folder / "shards")
    split(folder / "shards/checkpoints/step-00000004", RANKS)
    return {"files": folder / "files", "shards": folder / "shards"}


def opened(folder: Path, weights: str | None = None) -> TrainedRun:
    return load_run(str(folder), weights=weights and str(folder / "checkpoints" / weights), device="cpu")


@pytest.mark.slow
def test_what_is_shown_is_the_same_and_other_weights_may_be_a_folder(runs: dict[str, Path]) -> None:
    for weights in (None, "step-00000004/net"):
        assert same(opened(runs["files"], weights).net, opened(runs["shards"], weights).net)
    assert opened(runs["shards"]).weights == "checkpoints/step-00000004/ema-0.999"
    assert not same(opened(runs["shards"], "step-00000004/net").net, opened(runs["shards"]).net)
    assert opened(runs["shards"], "step-00000002/net").step == 2
    with pytest.raises(FileNotFoundError):
        opened(runs["shards"], "step-00000004/none")


@pytest.mark.nightly
def test_a_card_is_the_same_but_for_the_file(runs: dict[str, Path], tmp_path: Path) -> None:
    found = {}
    for kind, folder in runs.items():
        run = shutil.copytree(folder, tmp_path / kind)
        reports = [evaluate(opened(run))]
        for name in ("ema-0.5", "net"):
            weights_file = run / "checkpoints/step-00000004" / name
            reports.append(evaluate(load_run(str(run), weights=str(weights_file), device="cpu")))
        found[kind] = (
            [report["results"] for report in reports],
            [{**report["card"], "weights": None, "weights_sha256": None} for report in reports],
        )
    assert found["files"] == found["shards"]
    assert [card["ema"] for card in found["shards"][1]] == [0.999, 0.5, None]


@pytest.mark.slow
def test_it_goes_on_bit_for_bit(runs: dict[str, Path], tmp_path: Path) -> None:
    states = [
        train(tiny("moons-flow-matching", *MORE, "train.steps=6"), shutil.copytree(folder, tmp_path / kind))
        for kind, folder in runs.items()
    ]
    assert same(states[0].net, states[1].net)
    last = [tmp_path / kind / "checkpoints/step-00000006" for kind in runs]
    names = {path.relative_to(last[0]) for path in last[0].rglob("*") if path.is_file()}
    assert names == {path.relative_to(last[1]) for path in last[1].rglob("*") if path.is_file()}
    assert all((last[0] / name).read_bytes() == (last[1] / name).read_bytes() for name in names)


@pytest.mark.slow
def test_it_may_be_begun_from_and_taught_by(runs: dict[str, Path], tmp_path: Path) -> None:
    nets = []
    for kind, folder in runs.items():
        asked = ["train.steps=1", f"start.source={folder}", "start.heads.u=v", f"teacher.source={folder}"]
        nets.append(train(tiny("moons", *asked), tmp_path / kind).net)
    assert same(*nets)
