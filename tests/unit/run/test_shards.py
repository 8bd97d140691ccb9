"""A run whose checkpoints ranks wrote is as one process has it: opened, judged, gone on with, begun from, asked."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dumo.io import weights
from dumo.report.evaluate import evaluate
from dumo.run.train import train
from dumo.run.weights import OpenedRun, open_run
from dumo.training import checkpoint
from dumo.types import UserError
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


def opened(folder: Path, weights: str | None = None) -> OpenedRun:
    return open_run(str(folder), weights=weights and str(folder / "checkpoints" / weights), device="cpu")


@pytest.mark.slow
def test_what_is_shown_is_the_same_and_other_weights_may_be_a_folder(runs: dict[str, Path]) -> None:
    for folder, file in ((None, None), ("step-00000004/net", "step-00000004/net.safetensors")):
        assert same(opened(runs["files"], file).net, opened(runs["shards"], folder).net)
    assert opened(runs["shards"]).weights == "checkpoints/step-00000004/ema-0.999"
    assert not same(opened(runs["shards"], "step-00000004/net").net, opened(runs["shards"]).net)
    assert opened(runs["shards"], "step-00000002/net.safetensors").step == 2
    with pytest.raises(FileNotFoundError):
        opened(runs["shards"], "step-00000004/none")


@pytest.mark.nightly
def test_a_card_and_its_file_are_the_same_but_for_the_place(runs: dict[str, Path], tmp_path: Path) -> None:
    found = {}
    for kind, folder in runs.items():
        run = shutil.copytree(folder, tmp_path / kind)
        reports = [evaluate(opened(run))]
        for name in ("ema-0.5", "net"):
            weights_file = checkpoint.part_path(run / "checkpoints/step-00000004", name)
            reports.append(evaluate(open_run(str(run), weights=str(weights_file), device="cpu")))
        found[kind] = (
            sorted(path.name for path in run.glob("*.json")),
            [report["results"] for report in reports],
            [{**report["card"], "weights": None} for report in reports],
        )
    assert found["files"] == found["shards"]
    assert [card["ema"] for card in found["shards"][2]] == [0.999, 0.5, None]


@pytest.mark.slow
def test_it_goes_on_bit_for_bit(runs: dict[str, Path], tmp_path: Path) -> None:
    states = [
        train(tiny("moons-flow-matching", *MORE, "train.steps=6"), shutil.copytree(folder, tmp_path / kind))
        for kind, folder in runs.items()
    ]
    assert same(states[0].net, states[1].net)
    last = [tmp_path / kind / "checkpoints/step-00000006" for kind in runs]
    names = {path.name for path in last[0].iterdir()}
    assert names == {path.name for path in last[1].iterdir()}
    assert all((last[0] / name).read_bytes() == (last[1] / name).read_bytes() for name in names)


@pytest.mark.slow
def test_it_may_be_begun_from_and_taught_by(runs: dict[str, Path], tmp_path: Path) -> None:
    nets, known = [], []
    for kind, folder in runs.items():
        asked = ["train.steps=1", f"start.source={folder}", "start.heads.u=v", f"teacher.source={folder}"]
        nets.append(train(tiny("moons", *asked), tmp_path / kind).net)
        known.append(json.loads((tmp_path / kind / "teacher.json").read_text())["sha256"])
    assert same(*nets)
    assert known[0] == known[1]


@pytest.mark.parametrize("offset", [0, -1, 2, "2", None])
def test_parts_that_overlap_leave_a_gap_or_lie_outside(offset: object, tmp_path: Path) -> None:
    """Their sizes sum up to the whole, and torch would read what was in memory before."""
    for rank, start in enumerate((0, offset, 4)):
        notes = json.dumps({"a": {"saved_offsets": [start]}})
        file = tmp_path / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
        save_file({"a": torch.ones(2)}, file, {"DCP_SHARDING_INFO": notes})
    if offset == 2:
        assert torch.equal(weights.load(tmp_path)["a"], torch.ones(6))
        return
    with pytest.raises(UserError):
        weights.load(tmp_path)
