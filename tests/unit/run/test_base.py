"""A run that trains an adapter: what it keeps, what it refuses to go on from, and its own base as its teacher."""

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import SGD

from contract.case import one_each
from dumo.autodiff import float64
from dumo.config.load import load
from dumo.config.spec import Run
from dumo.config.teacher_spec import Start, Teacher
from dumo.flow.guide import CFG
from dumo.flow.noisy_batch import add_noise, make_draws
from dumo.flow.path import Linear
from dumo.flow.reading import available_readings
from dumo.flow.slope import DualSlope
from dumo.io.deferred import load_parameters
from dumo.run import memory
from dumo.run.folder import RunFolder
from dumo.run.net import meta_net
from dumo.run.resolve import resolve
from dumo.run.teacher import base_flow, open_teacher
from dumo.run.weights import build, init_from, load_run
from dumo.testing.exact import APART, ExactFlow, ExactNet
from dumo.training.duration import Duration
from dumo.training.state import State
from dumo.types import Cond, FromTeacher, Frozen, Heads, Sample, Time, UserError
from theory.exact import PRODUCT
from trained import train
from unit.run.adapted import adapt, apart
from unit.run.known import TINY, same, tiny

CPU = torch.device("cpu")
BASE = "teacher.kind=base"


@pytest.mark.nightly
def test_a_run_of_an_adapter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its files hold the adapter, it goes on bit for bit, and is opened, but not on other frozen weights."""
    adapt(monkeypatch)
    more, lines = [BASE, "train.milestones=[2]", "train.ema=[{decay: 0.5}]"], list[str]()
    whole = train(tiny("moons", *more), tmp_path / "whole", print_line=lines.append)
    assert " parameters, 6 of them trained), " in lines[0]
    train(tiny("moons", *more, "train.steps=2"), tmp_path / "run")
    again = train(tiny("moons", *more), tmp_path / "run")
    assert same(whole.net, again.net)
    assert same(whole.sampled_net, again.sampled_net)
    files = [*(tmp_path / "run").glob("checkpoints/*/[en]*/*.safetensors"), *(tmp_path / "run").glob("milestones/*")]
    assert len(files) == 5
    assert all(load_file(file).keys() == {"adapter.weight", "adapter.bias"} for file in files)
    assert same(whole.sampled_net, load_run(str(tmp_path / "run"), device="cpu").net)

    adapt(monkeypatch, source=1)
    with pytest.raises(UserError):
        load_run(str(tmp_path / "run"), device="cpu")
    with pytest.raises(UserError):
        train(tiny("moons", *more, "train.steps=6"), tmp_path / "run")

    shutil.rmtree(tmp_path / "run/checkpoints")
    with pytest.raises(UserError):
        load_run(str(tmp_path / "run"), weights=str(tmp_path / "run/milestones/step-00000002.safetensors"))


@pytest.mark.slow
def test_a_start_from_a_run_of_an_adapter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    adapt(monkeypatch)
    known = train(tiny("moons"), tmp_path / "known")
    net, loaders = init_from(tiny("moons"), Start(source=str(tmp_path / "known")))
    begun = load_parameters(net, loaders)
    assert same(begun, known.sampled_net)


@pytest.mark.slow
def test_weights_of_which_no_copies_fit_are_not_examined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where there is room to train an adapter of them; and that is said."""
    adapt(monkeypatch)
    run, lines = tiny("moons"), list[str]()
    net = meta_net(run)
    whole = memory.weight_bytes(net) + float64.copied_bytes(net)
    monkeypatch.setattr("dumo.run.examination.total_memory", lambda device: whole)
    train(run, tmp_path / "all", print_line=lines.append)
    assert not any("is not examined" in line for line in lines)
    monkeypatch.setattr("dumo.run.examination.total_memory", lambda device: whole - 1)
    train(run, tmp_path / "run", print_line=lines.append)
    assert [line for line in lines if "the slope is not examined on the weights in training: copies of them" in line]


@pytest.mark.slow
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
    net, g = build(run), torch.Generator().manual_seed(0)
    net.train().get_submodule("net").eval()
    modes = [part.training for part in net.modules()]
    x, w, c, t = *torch.randn(2, 4, 2, generator=g).unbind(), torch.zeros(4).long(), torch.rand(4, generator=g)
    velocity = base_flow(Teacher(kind="base"), run, net).readings().velocity
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


@pytest.mark.parametrize("fields", [["teacher.source=here"], ["teacher.pairs.count=4"], ["teacher.kind=run"]])
def test_what_has_no_base_is_refused(fields: list[str]) -> None:
    with pytest.raises(UserError):
        resolve(load("moons", [*TINY, BASE, *fields]))


def test_a_path_of_another_velocity_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    adapt(monkeypatch)
    run = tiny("moons", BASE, "path.sd=0.5")
    with pytest.raises(UserError):
        resolve(run)


LEARNS_VELOCITY = sorted(  # kinds that a subject may be taught by; no net of a pipeline takes knobs
    {
        o.kind
        for o in one_each()
        if available_readings(o).velocity and o.needs.teacher == FromTeacher() and not o.needs.knobs
    }
)


class OnFewStepRun(nn.Module):
    """A few-step run's net, which knows its flow, under a subject's adapters, which change it; `base()` has none."""

    def __init__(self, few_step: ExactNet) -> None:
        super().__init__()
        self.few_step, self.on = few_step, True

    def forward(self, x: Sample, c: Cond, /, **inputs: Time) -> Heads:
        heads = self.few_step(x, c, **inputs)
        return tuple(1 - 2 * h for h in heads) if self.on else heads

    @contextmanager
    def base(self) -> Generator[None, None, None]:
        """The adapters are off inside."""
        self.on = False
        yield
        self.on = True


@pytest.mark.parametrize("flow", [APART, PRODUCT], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("kind", LEARNS_VELOCITY)
def test_prior_rows_learn_the_velocity_of_the_few_step_runs_flow(
    kind: str, flow: ExactFlow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own objective's reading, whatever the net's first output is: FACM's is a jump, its velocity lies at -t."""
    objective = f"objective={{kind: '{kind}'}}"
    words = [objective, "data.labelled=true", "sample.solver={kind: euler}", "train.batch=64"]
    RunFolder(tmp_path).write_run(load("moons", words))
    few_step = load(str(tmp_path))
    monkeypatch.setattr(Run, "has_subject", True)
    subject = few_step.model_copy(update={"start": Start(source=str(tmp_path))})
    net = OnFewStepRun(ExactNet(flow, few_step.objective.needs))
    known = open_teacher(Teacher(kind="base"), subject, State(net, SGD(net.parameters()), Duration(1)), CPU)

    c = torch.arange(64) % flow.classes
    x = flow.data(c, torch.Generator().manual_seed(0))
    draws = make_draws(few_step.objective, x.shape[1:], seed=0, step=0, batch=64, prior=0.5)
    b = add_noise(draws, Linear(), x, c, flow.classes, teacher=known.velocity)
    assert b.teacher_rows is not None
    assert b.teacher_rows.sum() == 32
    wanted = torch.where(b.teacher_rows[:, None], flow.velocity(b.x_t, b.c, b.t), b.z - x)
    assert (b.v_t - wanted).abs().max() < 1e-5


def test_a_few_step_run_that_is_guided_is_not_guided_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "has_subject", True)
    run = tiny("moons", "data.labelled=true", "objective={kind: rcgm}", "sample.solver={kind: hop}")
    RunFolder(tmp_path).write_run(run)
    subject = run.model_copy(update={"start": Start(source=str(tmp_path))})
    net = OnFewStepRun(ExactNet(APART, run.objective.needs))
    with pytest.raises(UserError):
        open_teacher(
            Teacher(kind="base", guide=CFG(scale=2.0)), subject, State(net, SGD(net.parameters()), Duration(1)), CPU
        )
