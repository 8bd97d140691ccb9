"""A run begins with another's weights, where they make the same function here."""

from pathlib import Path

import pytest
import torch

from dumo.run.config.load import load
from dumo.run.folder import open_run
from dumo.run.train import train
from dumo.types import UserError
from unit.run.known import same, tiny


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on moons to begin with."""
    folder = tmp_path_factory.mktemp("start") / "fm"
    train(tiny("moons-flow-matching"), folder)
    return folder


def test_a_start_is_another_runs_weights_by_name(known: Path, tmp_path: Path) -> None:
    asked = ["train.optimizer.lr=1e-12", "train.steps=1", f"start.source={known}"]
    there = open_run(str(known)).net.state_dict()
    state = train(tiny("moons", *asked, "start.heads.u=v"), tmp_path / "run")
    for name, value in state.net.state_dict().items():
        old = name.replace("heads.u.", "heads.v.")
        assert torch.allclose(value, there[old], atol=1e-6), name
    state = train(tiny("moons", *asked), tmp_path / "half")
    assert all(not value.abs().max() > 1e-6 for name, value in state.net.state_dict().items() if "heads.u" in name)


def test_a_start_that_does_not_fit_is_refused(known: Path, tmp_path: Path) -> None:
    for more, said in [
        ("net.width=12", r"the nets differ, .* net\.width: 8 there, 12 asked: set these fields as they are"),
        ("net.time_scale=3", r"net\.time_scale: 10\.0 there, 3\.0 asked"),
        ("start.heads.u=w", "has no head 'w', its heads are v"),
    ]:
        with pytest.raises(UserError, match=said):
            train(tiny("moons", f"start.source={known}", more), tmp_path / "run")
    with pytest.raises(UserError, match=r"path: .*trig.* asked"):
        train(tiny("moons", f"start.source={known}", "objective.kind=sct", "path.kind=trig"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"start\.heads\.w: objective 'dumo' has no such head, its heads are v, u"):
        tiny("moons", f"start.source={known}", "start.heads.w=v")


def test_blocks_that_are_told_r_late_begin_as_a_velocity_that_knows_none(tmp_path: Path) -> None:
    small = (
        "data.held=360",
        "net.width=16",
        "net.attention=2",
        "train.batch=4",
        "train.steps=1",
        "train.probe_every=0",
    )
    train(load("digits-flow-matching", [*small]), tmp_path / "fm")
    asked = [*small, "train.optimizer.lr=1e-12", f"start.source={tmp_path / 'fm'}"]
    train(load("digits-dmf", asked), tmp_path / "late")
    before, after = (open_run(str(tmp_path / name)) for name in ("fm", "late"))
    x, t, c = torch.randn(2, *before.run.data.shape), torch.tensor([0.3, 0.9]), torch.tensor([0, 1])
    assert torch.allclose(after.net(x, c, t=t, r=t)[0], before.net(x, c, t=t)[0], atol=1e-6)
    with pytest.raises(UserError, match=r"net\.late: 3 there, null asked"):
        train(load("digits-meanflow", [*small, f"start.source={tmp_path / 'late'}"]), tmp_path / "all")


def test_a_start_is_made_once(known: Path, tmp_path: Path) -> None:
    """A resumed run goes on from its own weights."""
    asked = [f"start.source={known}", "start.heads.u=v"]
    whole = train(tiny("moons", *asked), tmp_path / "whole")
    train(tiny("moons", *asked, "train.steps=2"), tmp_path / "run")
    again = train(tiny("moons", *asked), tmp_path / "run")
    assert same(whole.net, again.net)
