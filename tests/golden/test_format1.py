"""A run that was trained in format 1 is read as ever, to the bit, and is not gone on with.

`format1/run` is what dumo of commit 171b424 left, with 40 steps of a tiny net on digits, in two pieces a step.
`samples.npz` holds what it sampled, and the noise it began with; the other files are what it dumped of two recipes.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dumo import api
from dumo.config.format import FORMAT, KEY
from dumo.config.load import dump, load
from dumo.config.source import format_of
from dumo.evaluation.compare import compare
from dumo.random import noise
from dumo.report import page
from dumo.run.folder import claim, open_run
from dumo.run.train import train
from dumo.training.log import read_log
from dumo.types import UserError

HERE = Path(__file__).with_name("format1")
RUN = HERE / "run"
SAMPLES = {name: torch.from_numpy(x) for name, x in np.load(HERE / "samples.npz").items()}
SAME_NET = ["net.width=8", "net.depth=1", "net.attention=1"]
QUICK = [*SAME_NET, "train.batch=8", "train.steps=2", "train.probe_every=0", "train.schedule.warmup=0"]


def close(found: Tensor, then: Tensor) -> bool:
    """To fp32's rounding, which machines differ in; on the one that wrote them all bits are the same."""
    return torch.allclose(found, then, rtol=1e-6, atol=1e-6)


def test_it_is_of_format_1() -> None:
    assert KEY not in (RUN / "run.yaml").read_text()
    assert "accumulate: 2" in (RUN / "run.yaml").read_text()
    assert format_of(RUN) == 1


def test_it_samples_as_it_did() -> None:
    trained = api.load(RUN, device="cpu")
    assert torch.equal(noise(0, range(10), 0, trained.spec.data.shape), SAMPLES["noise"])
    assert close(trained.sample(count=10, nfe=1), SAMPLES["one"])
    assert close(trained.sample(count=10, nfe=2), SAMPLES["two"])
    net = api.load(RUN, weights=RUN / "checkpoints/step-00000040/net.safetensors", device="cpu")
    assert close(net.sample(count=10, nfe=1), SAMPLES["net_one"])
    assert not close(SAMPLES["net_one"], SAMPLES["one"])


def test_its_fields_are_those_of_today() -> None:
    run = load(str(RUN))
    assert (run.train.batch, run.train.micro_batch, run.train.share, run.train.reshard) == (16, 8, 1, False)
    assert load(str(RUN / "run.yaml"), ["train.micro_batch=4"]).train.micro_batch == 4
    with pytest.raises(UserError, match=r"train.accumulate: unknown key; it is micro_batch now"):
        load(str(RUN), ["train.accumulate=1"])


@pytest.mark.parametrize("name", ["digits-ect", "imagenet256-xl2"])
def test_a_recipe_of_then_is_the_one_of_now(name: str, tmp_path: Path) -> None:
    shutil.copy(HERE / f"{name}.yaml", tmp_path / "run.yaml")
    assert load(str(tmp_path)) == load(name)


def test_its_log_and_its_numbers_are_shown(tmp_path: Path) -> None:
    rows = read_log(RUN / "metrics.jsonl")
    assert [row["step"] for row in rows] == [10, 20, 30, 40]
    for row in rows:
        assert row["notes"].keys() == {"clipped_share", "head_gap"}
        assert row["bins"].keys() == {"loss", "v", "u", "clipped_share", "head_gap"}
    folder = shutil.copytree(RUN, tmp_path / "run")
    text = page.write(open_run(str(folder), device="cpu"))[-1].read_text()
    assert "residuals beyond ±1" in text
    assert "gap between the heads" in text
    assert "14.6" in text  # of its evaluation
    (row, *_) = compare([str(folder)])["rows"]
    assert row["fd_grey"] == pytest.approx(14.624, abs=1e-3)


def test_it_may_begin_or_teach_another(tmp_path: Path) -> None:
    begun = load("digits", [*QUICK, f"start.source={RUN}", "train.optimizer.lr=1e-30", "train.ema=[]"])
    found = train(begun, tmp_path / "begun", device="cpu").net.state_dict()
    theirs = open_run(str(RUN), device="cpu").net.state_dict()
    assert all(torch.equal(found[name], value) for name, value in theirs.items())
    taught = load("digits", [*QUICK, f"teacher.source={RUN}"])
    train(taught, tmp_path / "taught", device="cpu")
    assert json.loads((tmp_path / "taught/teacher.json").read_text())["source"] == str(RUN)
    assert format_of(tmp_path / "taught") == FORMAT


def test_it_is_not_gone_on_with(tmp_path: Path) -> None:
    folder = shutil.copytree(RUN, tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    run = load(str(folder), ["train.steps=50"])
    with pytest.raises(UserError, match=r"format 1.*samples and evaluates.*--out.*start.source=.*run") as refused:
        claim(run, folder)
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="format 1"):
        train(run, folder, device="cpu")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    claim(run, tmp_path / "other")
    (folder / "run.yaml").write_text(dump(run))  # as if training here had begun in this format
    claim(run, folder)


def test_a_file_of_ones_own_in_a_folder_is_trained(tmp_path: Path) -> None:
    """It says no format, as that of an old run; there is nothing to go on with."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "run.yaml").write_text(dump(load("digits", QUICK)).removeprefix(f"{KEY}: {FORMAT}\n"))
    train(load(str(folder)), folder, device="cpu")
    assert format_of(folder) == FORMAT
    train(load(str(folder), ["train.steps=3"]), folder, device="cpu")
