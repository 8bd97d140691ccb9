"""A run trained, opened and sampled is the run that its folder says it is."""

import json
import re
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from dumo.flow.generate import labels
from dumo.flow.solver import Euler, Heun, Restart
from dumo.io.source import Table
from dumo.io.weights import load as load_weights
from dumo.run.config.load import FILE, load
from dumo.run.config.spec import Run
from dumo.run.folder import RunFolder, open_run
from dumo.run.sample import FORMS, export, solver_of
from dumo.run.train import open_data, outlook, train
from dumo.runtime.progress import Bar, Tick, no_bar
from dumo.runtime.random import noise
from dumo.training import agreement, checkpoint, log
from dumo.types import UserError

TINY = ["net.width=16", "net.depth=1", "train.batch=8", "train.steps=6", "train.save_every=2", "train.log_every=3"]


def tiny(name: str = "moons", *more: str) -> Run:
    """A recipe made small."""
    samples = 40 if name.startswith("moons") else 500
    return load(name, [*TINY, f"evaluate.protocol.samples={samples}", *more])


@pytest.fixture(scope="module")
def moons(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """DuMo on moons, barely trained. Not to be written to."""
    folder = tmp_path_factory.mktemp("run") / "moons"
    train(tiny(), folder)
    return open_run(str(folder))


class Seen:
    """A bar that keeps what it is told."""

    def __init__(self) -> None:
        self.titles: list[tuple[str, int]] = []
        self.ticks: list[int] = []

    @contextmanager
    def __call__(self, title: str, total: int, /) -> Generator[Tick, None, None]:
        self.titles.append((title, total))
        yield lambda done, note: self.ticks.append(done)


def test_bars() -> None:
    assert isinstance(Seen(), Bar)
    assert isinstance(no_bar, Bar)


def test_weights_are_keyed_by_the_seed_alone() -> None:
    run, other = tiny(), tiny("moons", "train.seed=1")
    state = torch.random.get_rng_state()
    first = run.build().state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(7)
    again, third = run.build().state_dict(), other.build("cpu").state_dict()
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert any(not torch.equal(third[name], value) for name, value in first.items())


def test_a_run_is_a_function_of_its_spec(tmp_path: Path) -> None:
    def bits(folder: Path, run: Run) -> dict[str, bytes]:
        state = train(run, folder)
        assert (state.step, state.images) == (6, 48)
        last = checkpoint.latest(folder / "checkpoints")
        assert last is not None
        return {file.name: file.read_bytes() for file in last.iterdir()}

    torch.manual_seed(1)
    first = bits(tmp_path / "a", tiny())
    torch.manual_seed(2)
    assert bits(tmp_path / "b", tiny("moons", "train.log_every=1", "train.save_every=5", "about=mine")) == first
    assert bits(tmp_path / "c", tiny("moons", "train.seed=1")) != first


def test_training_is_watched_and_logged(tmp_path: Path) -> None:
    seen = Seen()
    train(tiny(), tmp_path / "run", bar=seen)
    assert seen.titles == [("training run", 6)]
    assert seen.ticks == [0, 1, 2, 3, 4, 5, 6]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6]
    assert load(str(tmp_path / "run")) == tiny()
    train(tiny("moons", "train.steps=8"), tmp_path / "run", bar=seen)
    assert seen.ticks[7:] == [6, 7, 8]


def test_a_probe_is_logged_whenever_it_is_made(tmp_path: Path) -> None:
    """Of a run that is stopped and resumed, as of one that is not."""
    run = tiny("moons", "train.probe_every=4")
    train(run, tmp_path / "whole")
    rows = log.read_log(tmp_path / "whole/metrics.jsonl")
    assert [row["step"] for row in rows] == [3, 4, 6]
    assert [row["probe"] is not None for row in rows] == [False, True, False]
    assert rows[1]["probe"]["cosines"].keys() == {"v,u"}
    assert rows[0]["notes"].keys() == {"clipped_share", "head_gap"}
    train(tiny("moons", "train.probe_every=4", "train.steps=3", "train.schedule.kind=constant"), tmp_path / "run")
    train(tiny("moons", "train.probe_every=4", "train.schedule.kind=constant"), tmp_path / "run")
    train(tiny("moons", "train.probe_every=4", "train.schedule.kind=constant"), tmp_path / "again")
    assert log.read_log(tmp_path / "run/metrics.jsonl") == log.read_log(tmp_path / "again/metrics.jsonl")


def test_ranks_that_see_different_data_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would have an order of its own: no error, and another batch than the one that is meant."""

    def agreed(work: Callable[[], object]) -> list[object]:
        return [work(), 1700]

    monkeypatch.setattr(agreement, "agreed", agreed)
    with pytest.raises(UserError, match=r"by rank 1,797, 1,700 rows"):
        open_data(load("digits").data)


@pytest.mark.parametrize("device", ["", "gpu", "cuda:99", "meta"])
def test_a_refused_device_leaves_no_folder(device: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"device '{device}'"):
        train(tiny(), tmp_path / "run", device=device)
    assert list(tmp_path.iterdir()) == []


def test_what_is_opened_is_the_first_average(moons: RunFolder) -> None:
    last = checkpoint.latest(moons.folder / "checkpoints")
    assert last is not None
    assert (moons.step, moons.weights) == (6, "checkpoints/step-00000006/ema-0.999.safetensors")
    average = load_weights(last / "ema-0.999.safetensors")
    assert all(torch.equal(average[name], value) for name, value in moons.net.state_dict().items())
    net = load_weights(last / "net.safetensors")
    assert any(not torch.equal(net[name], value) for name, value in moons.net.state_dict().items())


def test_other_weights(moons: RunFolder, tmp_path: Path) -> None:
    last = checkpoint.latest(moons.folder / "checkpoints")
    assert last is not None
    file = str(last / "net.safetensors")
    opened = open_run(str(moons.folder), weights=file)
    assert opened.weights == file
    net = load_weights(Path(file))
    assert all(torch.equal(net[name], value) for name, value in opened.net.state_dict().items())


def test_free_fields_may_be_set_to_look(moons: RunFolder) -> None:
    before = (moons.folder / FILE).read_bytes()
    opened = open_run(str(moons.folder), ["sample.solver.kind=euler", "sample.nfe=[9]"])
    assert opened.run.sample.solver == Euler()
    assert (moons.folder / FILE).read_bytes() == before
    with pytest.raises(UserError, match=r"train\.batch: 8 there, 9 asked"):
        open_run(str(moons.folder), ["train.batch=9"])


def test_a_run_without_averages_shows_its_weights(tmp_path: Path) -> None:
    state = train(tiny("moons", "train.ema=[]"), tmp_path / "run")
    opened = open_run(str(tmp_path / "run"))
    assert all(torch.equal(a, b) for a, b in zip(opened.net.parameters(), state.net.parameters(), strict=True))


def test_samples_are_by_number(moons: RunFolder) -> None:
    few, many = (moons.sampler.sample(labels(n, 0), nfe=2).x for n in (3, 9))
    assert torch.allclose(few, many[:3], atol=1e-6)
    assert not torch.allclose(few, moons.sampler.sample(labels(3, 0), nfe=2, seed=1).x)
    assert torch.equal(few, moons.sampler.sample(labels(3, 0), nfe=2, seed=moons.run.sample.seed).x)
    start = noise(moons.run.sample.seed, [0, 1, 2], 0, (2,))
    straight = moons.sampler.sample(labels(3, 0), nfe=1, solver=Euler()).x
    (v, _) = moons.net(start, labels(3, 0), t=torch.ones(3))
    assert torch.allclose(straight, start - v, atol=1e-6)


def test_sampling_is_watched(moons: RunFolder) -> None:
    seen = Seen()
    assert moons.sampler.sample(labels(300, 0), nfe=3, bar=seen).nfe == 3
    assert [total for _, total in seen.titles] == [300]
    assert seen.ticks[-1] == 300
    assert sorted(seen.ticks) == seen.ticks


def test_solvers_by_name(moons: RunFolder) -> None:
    own = Restart(m=0.25)
    run = tiny("moons", "sample.solver.m=0.25")
    assert solver_of(run.sample, None) == solver_of(run.sample, "restart") == own
    assert solver_of(run.sample, "heun") == Heun()
    for name in ("hoop", "", "Euler"):
        with pytest.raises(UserError, match="there is no"):
            solver_of(run.sample, name)


def test_export_refuses_before_it_writes(moons: RunFolder, tmp_path: Path) -> None:
    for wrong in ({"form": "gif"}, {"form": "images"}, {"only": [0]}, {"solver": "hop"}, {"nfe": [1, 0]}, {"count": 0}):
        with pytest.raises(UserError):
            export(moons, tmp_path / "out", **wrong)
    with pytest.raises(UserError, match="nfe = 3"):
        export(moons, tmp_path / "out", nfe=[2, 3], solver="heun")
    assert list(tmp_path.iterdir()) == []


def test_export_holds_the_samples(moons: RunFolder, tmp_path: Path) -> None:
    (file,) = export(moons, tmp_path, form="npz", count=5, nfe=[2], seed=3)
    with np.load(file) as archive:
        made = torch.from_numpy(archive["arr_0"])
    assert torch.equal(made, moons.sampler.sample(labels(5, 0), nfe=2, seed=3).x)
    assert set(FORMS) == {"grid", "images", "npz"}


def test_a_batch_is_made_once_for_all_its_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ahead of its step, by a thread that is gone when training ends."""
    calls: list[tuple[int, int]] = []
    batch = Table.batch

    def noted(table: Table, step: int, size: int, seed: int, *rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append((step, size))
        return batch(table, step, size, seed, *rows)

    monkeypatch.setattr(Table, "batch", noted)
    run = tiny("digits", "train.steps=5", "train.micro_batch=2")
    train(run, tmp_path / "run", device="cpu")
    assert sorted(step for step, size in calls if size == 8) == list(range(5))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("ahead", "decode", "audit"))]


def test_a_difference_is_told_what_the_slope_that_rides_would_take(tmp_path: Path) -> None:
    said = {
        kind: outlook(tiny("digits-guided", f"objective.slope.kind={kind}"), tmp_path, 1, 0, torch.device("cpu"))
        for kind in ("central", "dual")
    }
    (dual,) = re.findall(r"([\d.]+) F a step \(1 F: one forward pass\)", said["dual"])
    assert (
        f"(1 F: one forward pass; objective.slope.kind=dual takes {dual} F, is exact and may run in bf16)"
        in (said["central"])
    )
    assert "dual takes" not in outlook(tiny("moons-flow-matching"), tmp_path, 1, 0, torch.device("cpu"))
