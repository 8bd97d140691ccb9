"""Knobs, and inputs of a head's own: samples follow, and what is built around a net serves one that has them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dumo.config.load import load
from dumo.config.spec import Run
from dumo.config.teacher_spec import Teacher
from dumo.flow.noisy_batch import draw
from dumo.flow.path import Linear
from dumo.lab.bench import PlainStep, slope_error
from dumo.run import teacher
from dumo.run.examination import examine
from dumo.run.folder import RunFolder
from dumo.run.trained import TrainedRun
from dumo.run.weights import build
from dumo.testing.network import randomise
from dumo.types import frozen

SMALL = ["net.width=16", "net.depth=1", "sample.nfe=[1]"]
GUIDED = [*SMALL, "objective.drop=0.1", "objective.w=8.0"]


def guided(*more: str) -> Run:
    """Improved MeanFlow on digits, its guidance an input."""
    return load("digits-imf", [*GUIDED, *more])


def test_samples_follow_the_knobs(tmp_path: Path) -> None:
    runs = [guided(), guided("sample.knobs.w=8"), guided("sample.knobs={w: 2, low: 0.1, high: 0.9}")]
    net = randomise(build(runs[0]))
    c = torch.arange(4)
    trained = [TrainedRun(run, RunFolder(Path("x")), net.eval()) for run in runs]
    one, same, other = (of.make_samples(c, nfe=1).x for of in trained)
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)


def test_a_teacher_has_the_knobs_of_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    run = guided("sample.knobs.w=2")
    opened = SimpleNamespace(spec=run, net=build(run), file=Path("x"))
    monkeypatch.setattr(teacher, "load_run", lambda *_, **__: opened)
    monkeypatch.setattr(teacher.tensor_files, "sha256", lambda _: "0")
    flow, _ = teacher._run_flow(Teacher(kind="run", source="x"), run.data, run.path, torch.device("cpu"))
    assert flow.knobs == run.sample.knobs


@pytest.mark.parametrize("slope", ["dual", "jvp"])
def test_a_knob_may_be_called_as_a_direction_is(slope: str) -> None:
    """What examines a slope calls the direction w, too."""
    run = guided(f"objective.slope.kind={slope}")
    assert examine(run, torch.device("cpu")).passed
    net = randomise(build(run))
    x, c = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(8)
    b = draw(run.objective, Linear(), x, c, torch.full_like(c, 10), seed=0, step=0)
    assert slope_error(net, frozen(net), run.objective, b) < 1e-3


@pytest.mark.parametrize("name", ["digits-three-heads", "digits-three-heads-shortcut"])
def test_the_bench_and_the_examination_serve_heads_with_inputs_of_their_own(name: str) -> None:
    run = load(name, ["net.width=16", "net.depth=2", "train.batch=16"])
    c, x = torch.arange(16) % 10, torch.randn(16, *run.data.shape, generator=torch.Generator().manual_seed(0))
    net = randomise(build(run))
    b = draw(run.objective, run.path, x, c, torch.full_like(c, 10), seed=0, step=0)
    PlainStep(of=run.objective).loss(net, frozen(net), b).loss.mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters() if p.numel() > 11 * 16)
    assert slope_error(net, frozen(net), run.objective, b) < 1e-3
    errors = examine(run, torch.device("cpu")).errors
    assert list(errors) == ["v", "u", "m"]
    assert all(0 < error < 1e-4 for error in errors.values())
