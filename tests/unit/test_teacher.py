"""A teacher's velocity takes the place of the data's, its pairs the place of data and noise; another's is refused."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dumo import teacher
from dumo.config.load import load
from dumo.config.spec import Run
from dumo.config.teacher import Teacher
from dumo.run import open_run, train
from dumo.sample.noise import noise
from dumo.train import checkpoint
from dumo.types import Cond, Reads, Sample, Time, UserError
from dumo.watch import unwatched
from unit.known import line

CPU = torch.device("cpu")
TINY = ["net.width=8", "net.depth=1", "train.batch=4", "train.steps=4", "train.save_every=2"]
TINY += ["train.schedule.kind=constant", "train.probe_every=0", "evaluate.protocol.samples=40"]
USER = ["teacher.kind=python", "teacher.source=unit.known:line"]


def tiny(name: str = "moons", *more: str) -> Run:
    """A recipe in no time."""
    return load(name, [*TINY, *more])


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that can teach others on moons."""
    folder = tmp_path_factory.mktemp("teacher") / "fm"
    train(tiny("moons-flow-matching"), folder)
    return folder


def rows(n: int = 5) -> tuple[Sample, Time, Cond, Sample]:
    """Points, times 0, .25, .5, .75, 1, labels, and velocities of the data."""
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(n, 2, generator=g),
        torch.linspace(0, 1, n),
        torch.zeros(n).long(),
        torch.randn(n, 2, generator=g),
    )


def constant(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
    return torch.full_like(x, 3.0)


@pytest.mark.parametrize(
    ("fields", "weights"),
    [
        ({}, [1, 1, 1, 1, 1]),
        ({"mix": 2.0, "interval": {"high": 0.75}, "elsewhere": 0.5}, [2, 2, 2, 2, 0.5]),  # UCGM's released recipe
        ({"mix": 0.25}, [0.25] * 5),
        ({"interval": {"low": 0.5, "high": 0.75}, "elsewhere": 0.0}, [0, 0, 1, 1, 0]),
    ],
)
def test_what_is_learned_is_a_mean_of_both(fields: dict[str, object], weights: list[float]) -> None:
    spec = Teacher.model_validate({"source": "somewhere", **fields})
    x, t, c, v = rows()
    found = teacher.velocity(spec, Reads(velocity=constant))(x, t, c, v)
    share = torch.tensor(weights)[:, None]
    assert torch.allclose(found, share * 3 + (1 - share) * v)


def test_a_teacher_without_a_velocity_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no velocity"):
        teacher.velocity(Teacher(source="a:b"), Reads())
    with pytest.raises(UserError, match="has no velocity"):
        train(tiny("moons", "teacher.kind=python", "teacher.source=unit.known:mute"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("unit.known", "Give module:function"),
        ("unit.nowhere:line", "No module named"),
        ("unit.known:nothing", "no attribute 'nothing'"),
        ("unit.known:wrong", "returned int"),
    ],
)
def test_a_function_that_is_none_is_refused(source: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        train(tiny("moons", "teacher.kind=python", f"teacher.source={source}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_net_learns_what_the_teacher_says(tmp_path: Path) -> None:
    """Of data that are two moons it learns one point, which is what its teacher knows."""
    few = ["net.width=32", "net.depth=2", "train.steps=300", "train.batch=64", "train.optimizer.lr=0.003"]
    run = tiny("moons-flow-matching", *USER, *few, "objective.times.low=0.05")
    train(run, tmp_path / "run")
    trained = open_run(str(tmp_path / "run"))
    velocity = trained.run.objective.read(trained.net).velocity
    x, t, c, _ = rows()
    t = t.clamp(min=0.5)
    near = torch.tensor([1.0, -2.0]) * (1 - t)[:, None] + t[:, None] * x
    wanted = line(run, CPU).velocity
    assert velocity
    assert wanted
    with torch.no_grad():
        assert (velocity(near, t, c) - wanted(near, t, c)).abs().mean() < 0.3


def test_a_run_teaches_and_is_remembered(known: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    one = train(tiny("moons-meanflow", f"teacher.source={known}"), folder)
    plain = train(tiny("moons-meanflow"), tmp_path / "plain")
    a, b = one.net.state_dict(), plain.net.state_dict()
    assert any(not torch.equal(a[name], b[name]) for name in a)
    about = json.loads((folder / "teacher.json").read_text())
    assert about["source"] == str(known)
    assert len(about["sha256"]) == 64


def test_stopped_and_resumed_is_the_same(known: Path, tmp_path: Path) -> None:
    for more in ([], ["teacher.pairs.count=24", "teacher.pairs.nfe=2"]):
        name = f"{len(more)}"
        taught = [f"teacher.source={known}", *more]
        whole = train(tiny("moons", *taught), tmp_path / f"whole{name}")
        train(tiny("moons", *taught, "train.steps=2"), tmp_path / f"run{name}")
        again = train(tiny("moons", *taught), tmp_path / f"run{name}")
        for key, value in whole.net.state_dict().items():
            assert torch.equal(again.net.state_dict()[key], value), key


def test_another_teacher_in_the_middle_is_refused(known: Path, tmp_path: Path) -> None:
    other = tmp_path / "teacher"
    train(tiny("moons-flow-matching"), other)
    taught = tiny("moons", f"teacher.source={other}", "train.steps=2")
    train(taught, tmp_path / "run")
    train(tiny("moons-flow-matching", "train.steps=6"), other)  # it has learned something since
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*"))
    with pytest.raises(UserError, match=r"began with another teacher[\s\S]*teacher\.weights"):
        train(tiny("moons", f"teacher.source={other}"), tmp_path / "run")
    assert sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*")) == before


def test_a_teacher_of_other_data_is_refused(known: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"knows other data: data\.shape is \(2,\) there, \(1, 8, 8\) here"):
        train(load("digits", [f"teacher.source={known}", "net.width=16", "net.depth=1"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_pairs_are_joined_by_the_teachers_flow(tmp_path: Path) -> None:
    """Its one point, whatever the noise; kept, and made again to the same bits where a file is missing."""
    run = tiny("moons", *USER, "teacher.pairs.count=1500", "teacher.pairs.nfe=4", "teacher.pairs.solver.kind=euler")
    assert run.teacher
    assert run.teacher.pairs
    made = teacher.couple(run, run.teacher.pairs, line(run, CPU), tmp_path, CPU, unwatched)
    files = sorted(tmp_path.iterdir())
    assert [len(checkpoint.load_weights(file)["x"]) for file in files] == [1024, 476]
    x, c, z = made.batch(3, 8, 0)
    assert torch.allclose(x, torch.tensor([1.0, -2.0]).expand(8, 2), atol=1e-5)
    assert torch.equal(made.z[:3], noise(0, range(3), 0, (2,)))
    assert (x.shape, c.shape, z.shape) == ((8, 2), (8,), (8, 2))
    second, first = files[1].read_bytes(), files[0].stat().st_mtime_ns
    files[1].unlink()
    teacher.couple(run, run.teacher.pairs, line(run, CPU), tmp_path, CPU, unwatched)
    assert files[1].read_bytes() == second
    assert files[0].stat().st_mtime_ns == first


def test_pairs_are_trained_on_as_they_are(tmp_path: Path) -> None:
    """Their slopes z - x have no scatter: a net that knows the line has loss 0 to learn."""
    few = ["net.width=32", "net.depth=2", "train.steps=300", "train.batch=64", "train.optimizer.lr=0.003"]
    pairs = ["teacher.pairs.count=512", "teacher.pairs.nfe=1", "teacher.pairs.solver.kind=euler"]
    train(tiny("moons-flow-matching", *USER, *few, *pairs), tmp_path / "run")
    train(tiny("moons-flow-matching", *few), tmp_path / "plain")
    last = [json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in ("run", "plain")]
    assert last[0]["loss"] < 0.1 < 0.3 < last[1]["loss"]


def test_guidance_twice_is_refused() -> None:
    guided = ["teacher.source=x", "teacher.guide.scale=2", "objective.drop=0.1"]
    with pytest.raises(UserError, match=r"teacher\.guide has guided"):
        load("digits-guided", guided)
    with pytest.raises(UserError, match="no classes to guide by"):
        load("moons", guided)
    with pytest.raises(UserError, match=r"sample\.guide\.scale"):
        load("digits", [*guided, "sample.guide.scale=2"])
    with pytest.raises(UserError, match="leave mix and elsewhere at 1"):
        load("digits", ["teacher.source=x", "teacher.mix=2", "teacher.pairs.count=5"])


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
    with pytest.raises(UserError, match="the nets differ"):
        train(tiny("moons", f"start.source={known}", "net.width=12"), tmp_path / "run")
    with pytest.raises(UserError, match="has no head 'w'"):
        train(tiny("moons", f"start.source={known}", "start.heads.u=w"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_start_is_made_once(known: Path, tmp_path: Path) -> None:
    """A resumed run goes on from its own weights."""
    asked = [f"start.source={known}", "start.heads.u=v"]
    whole = train(tiny("moons", *asked), tmp_path / "whole")
    train(tiny("moons", *asked, "train.steps=2"), tmp_path / "run")
    again = train(tiny("moons", *asked), tmp_path / "run")
    assert all(
        torch.equal(a, b) for a, b in zip(whole.net.state_dict().values(), again.net.state_dict().values(), strict=True)
    )
