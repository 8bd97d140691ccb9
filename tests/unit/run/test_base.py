"""A run that trains an adapter: what it keeps, what it refuses to go on from, and its own base as its teacher."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dumo.flow.slope import DualSlope
from dumo.run.config.load import load
from dumo.run.config.teacher import Start
from dumo.run.folder import begin_from, open_run
from dumo.run.teacher import of_base
from dumo.run.train import train
from dumo.runtime import dist
from dumo.types import Frozen, UserError
from unit.run.adapted import adapt, apart
from unit.run.known import TINY, same, tiny

CPU = torch.device("cpu")
BASE = "teacher.kind=base"


def test_a_run_of_an_adapter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its files hold the adapter, it goes on bit for bit, and is opened, but not on other frozen weights."""
    adapt(monkeypatch)
    more, lines = [BASE, "train.milestones=[2]", "train.ema=[{decay: 0.5}]"], list[str]()
    whole = train(tiny("moons", *more), tmp_path / "whole", tell=lines.append)
    assert " parameters, 6 of them trained), " in lines[0]
    train(tiny("moons", *more, "train.steps=2"), tmp_path / "run")
    again = train(tiny("moons", *more), tmp_path / "run")
    assert same(whole.net, again.net)
    assert same(whole.shown, again.shown)
    files = [*(tmp_path / "run").glob("checkpoints/*/[en]*.safetensors"), *(tmp_path / "run").glob("milestones/*")]
    assert len(files) == 5
    assert all(load_file(file).keys() == {"adapter.weight", "adapter.bias"} for file in files)
    assert same(whole.shown, open_run(str(tmp_path / "run"), device="cpu").net)

    adapt(monkeypatch, source=1)
    with pytest.raises(UserError, match="run was trained on other frozen weights"):
        open_run(str(tmp_path / "run"), device="cpu")
    with pytest.raises(UserError, match="step-00000004 was trained on other frozen weights"):
        train(tiny("moons", *more, "train.steps=6"), tmp_path / "run")


def test_a_start_from_a_run_of_an_adapter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    adapt(monkeypatch)
    known = train(tiny("moons"), tmp_path / "known")
    net, made = begin_from(tiny("moons"), Start(source=str(tmp_path / "known")))
    begun = made.fill(net)
    assert same(begun, known.shown)


def test_weights_of_which_no_copies_fit_are_not_examined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where there is room to train an adapter of them; and that is said."""
    adapt(monkeypatch)
    run, lines = tiny("moons"), list[str]()
    whole = sum(p.nbytes for p in run.outline().parameters())
    monkeypatch.setattr(dist, "memory", lambda device: 4 * whole)
    train(run, tmp_path / "all", tell=lines.append)
    assert not any("is not examined" in line for line in lines)
    monkeypatch.setattr(dist, "memory", lambda device: 4 * whole - 1)
    train(run, tmp_path / "run", tell=lines.append)
    assert [line for line in lines if "the slope is not examined on the weights in training: copies of them" in line]


@pytest.mark.parametrize("guide", [1.0, 2.0])
def test_the_base_teaches_as_a_net_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, guide: float) -> None:
    adapt(monkeypatch)
    data = ["data.labelled=true", "objective.drop=0.5"]
    asked = [*data, f"teacher.guide.scale={guide}"]
    own = train(tiny("moons", BASE, *asked), tmp_path / "own")
    user = ["teacher.kind=python", "teacher.source=unit.run.adapted:apart"]
    other = train(tiny("moons", *user, *asked), tmp_path / "other")
    assert same(own.net, other.net)
    assert not same(own.net, train(tiny("moons", *data), tmp_path / "none").net)


def test_asking_the_base_leaves_the_net_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the midst of a step: modes, gradients, and the tape of a dual number that is played later."""
    adapt(monkeypatch)
    run = tiny("moons")
    net, g = run.build(), torch.Generator().manual_seed(0)
    net.train().get_submodule("net").eval()
    modes = [part.training for part in net.modules()]
    x, w, c, t = *torch.randn(2, 4, 2, generator=g).unbind(), torch.zeros(4).long(), torch.rand(4, generator=g)
    velocity = of_base(net, run.train.precision, run.objective.needs).velocity
    assert velocity

    def slopes(ask: bool) -> list[Tensor]:
        heads, along = DualSlope()(net, Frozen(net), x, c, t=t)
        taught = velocity(x, t, c) if ask else torch.zeros(())
        assert not taught.requires_grad
        adapter = [*net.get_submodule("adapter").parameters()]
        out = [*along(w), *torch.autograd.grad(torch.stack(heads).sum(), adapter)]
        if ask:
            assert torch.equal(taught, apart(run, CPU).velocity(x, t, c))  # pyright: ignore[reportOptionalCall]
        return out

    assert all(map(torch.equal, slopes(ask=True), slopes(ask=False)))
    assert [part.training for part in net.modules()] == modes
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ([], r"asks for the net with its adapters off.* net 'mlp' .* set teacher\.kind=run and teacher\.source"),
        (["teacher.source=here"], r"base is the net in training: leave teacher\.source and teacher\.pairs out"),
        (["teacher.pairs.count=4"], r"base is the net in training: leave teacher\.source and teacher\.pairs out"),
        (["teacher.kind=run"], r"source is missing: name a run's folder, or set teacher\.kind=base"),
    ],
)
def test_what_has_no_base_is_refused(fields: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load("moons", [*TINY, BASE, *fields])


def test_a_path_of_another_velocity_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    adapt(monkeypatch)
    with pytest.raises(UserError, match=r"on path 'linear' of sd 1; .* of sd 0.5: set teacher\.kind=run"):
        tiny("moons", BASE, "path.sd=0.5")
