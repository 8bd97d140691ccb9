"""A run trained, opened and sampled is the run that its folder says it is."""

import json
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import encoders
from dumo.config.load import load
from dumo.config.spec import Run
from dumo.encoders.transformers_text import EncoderModel, TextEncoder
from dumo.flow.sampling import labels_in_turn
from dumo.flow.solver import Heun, Restart
from dumo.io.data_source import TensorData
from dumo.io.tensor_files import load as load_weights
from dumo.nets.text_spec import EncoderTexts
from dumo.run import fill_caches
from dumo.run.hooks import Hook
from dumo.run.trained import TrainedRun, choose_solver
from dumo.run.trainer import Trainer, open_data, open_trainer
from dumo.run.weights import load_run
from dumo.runtime.progress import no_bar
from dumo.training import agreement
from dumo.training.metrics import StepMetrics
from dumo.types import UserError
from tiers import tiered
from trained import train
from unit.run import known
from unit.training.by_path import latest


def tiny(name: str = "moons", *more: str) -> Run:
    """A recipe made small, of six steps."""
    return known.tiny(name, "train.batch=8", "train.steps=6", "train.log_every=3", *more)


@pytest.fixture(scope="module")
def moons(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """DuMo on moons, barely trained. Not to be written to."""
    folder = tmp_path_factory.mktemp("run") / "moons"
    train(tiny(), folder)
    return load_run(str(folder))


def test_opening_a_run_outlines_its_net_at_most_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once to compare it with the rest of the run, and once to count it: outlines of large nets take minutes."""
    run = tiny()
    build = type(run.net).build
    devices: list[str] = []

    def noted_build(*args: Any, **named: Any) -> nn.Module:  # noqa: ANN401
        net = build(*args, **named)
        devices.append(next(net.parameters()).device.type)
        return net

    monkeypatch.setattr(type(run.net), "build", noted_build)
    with open_trainer(tmp_path, run, device="cpu"):
        assert devices.count("meta") <= 2


def test_a_network_that_is_built_in_evaluation_mode_is_trained_in_training_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the model of a pipeline is, whose wrapper is in training mode."""
    run = tiny()
    build = type(run.net).build

    def built_in_evaluation_mode(*args: Any, **named: Any) -> nn.Module:  # noqa: ANN401
        net = build(*args, **named)
        for part in net.children():
            part.eval()
        return net

    monkeypatch.setattr(type(run.net), "build", built_in_evaluation_mode)
    with open_trainer(tmp_path, run, device="cpu") as trainer:
        assert all(part.training for part in trainer.state.net.modules())


@pytest.mark.slow
def test_hooks_are_called_in_their_order_and_in_the_precision_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before training, after each step and at the end; steps and hooks in one precision of products."""
    calls: list[tuple[str, str, int, int]] = []
    inside: list[object] = []

    @contextmanager
    def noted(*given: object) -> Generator[None]:
        inside.append(given)
        yield
        inside.clear()

    class Noted(Hook):
        def __init__(self, name: str) -> None:
            self.name = name

        def before_training(self, trainer: Trainer) -> None:
            calls.append((self.name, "before", trainer.state.step, len(inside)))

        def after_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
            calls.append((self.name, "step", metrics.step, len(inside)))

        def after_training(self, trainer: Trainer) -> None:
            calls.append((self.name, "after", trainer.state.step, len(inside)))

    monkeypatch.setattr("dumo.run.trainer.product_precision", noted)
    train(tiny("moons", "train.steps=2"), tmp_path, hooks=[Noted("a"), Noted("b")])
    events = [("before", 0, 0), ("step", 1, 1), ("step", 2, 1), ("after", 2, 0)]
    assert calls == [(name, *event) for event in events for name in ("a", "b")]


def test_a_run_is_a_function_of_its_spec(tmp_path: Path) -> None:
    def made(folder: Path, run: Run) -> dict[str, bytes]:
        state = train(run, folder)
        assert (state.step, state.images) == (6, 48)
        return {name: file for name, file in known.bits(folder).items() if name.endswith(".safetensors")}

    torch.manual_seed(1)
    first = made(tmp_path / "a", tiny())
    torch.manual_seed(2)
    assert made(tmp_path / "b", tiny("moons", "train.log_every=1", "train.save_every=5", "about=mine")) == first
    assert made(tmp_path / "c", tiny("moons", "train.seed=1")) != first


@pytest.mark.slow
def test_training_is_watched_and_logged(tmp_path: Path) -> None:
    seen = known.Seen()
    train(tiny(), tmp_path / "run", bar=seen)
    assert seen.titles == [("training run", 6)]
    assert seen.ticks == [0, 1, 2, 3, 4, 5, 6]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6]
    assert load(str(tmp_path / "run")).model_copy(update={"resolved": {}}) == tiny()
    train(tiny("moons", "train.steps=8"), tmp_path / "run", bar=seen)
    assert seen.ticks[7:] == [6, 7, 8]


def test_ranks_that_see_different_data_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would have an order of its own: no error, and another batch than the one that is meant."""

    def gather_results(work: Callable[[], object]) -> list[object]:
        return [work(), 1700]

    monkeypatch.setattr(agreement, "gather_results", gather_results)
    with pytest.raises(UserError):
        open_data(load("digits").data)


def test_ranks_that_see_different_checkpoints_are_refused(moons: TrainedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would go on from a step of its own, and no collective would say so."""

    def gather_results(work: Callable[[], object], *, is_long: bool = False) -> list[object]:
        result = work()
        return [result, [] if isinstance(result, list) else result]

    monkeypatch.setattr(agreement, "gather_results", gather_results)
    with pytest.raises(UserError), open_trainer(moons.folder, tiny(), device="cpu"):
        pass


@pytest.mark.slow
def test_what_is_opened_is_the_first_average(moons: TrainedRun) -> None:
    last = latest(moons.folder / "checkpoints")
    assert last is not None
    assert (moons.step, moons.weights) == (6, "checkpoints/step-00000006/ema-0.999")
    average = load_weights(last / "ema-0.999")
    assert all(torch.equal(average[name], value) for name, value in moons.net.state_dict().items())
    net = load_weights(last / "net")
    assert any(not torch.equal(net[name], value) for name, value in moons.net.state_dict().items())


def test_solvers_by_name() -> None:
    sample = tiny("moons", "sample.solver.m=0.25").sample
    assert choose_solver(sample, None) == choose_solver(sample, "restart") == Restart(m=0.25)
    assert choose_solver(sample, "heun") == Heun()
    assert choose_solver(sample, Restart(m=0.3)) == Restart(m=0.3)
    for name in ("hoop", "", "Euler"):
        with pytest.raises(UserError):
            choose_solver(sample, name)


@pytest.mark.slow
def test_a_batch_is_made_once_for_all_its_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the run's seed, ahead of its step, by a thread that is gone when training ends."""
    calls: list[tuple[int, int, int]] = []
    batch = TensorData.batch

    def noted(table: TensorData, step: int, size: int, seed: int, *rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append((step, size, seed))
        return batch(table, step, size, seed, *rows)

    monkeypatch.setattr(TensorData, "batch", noted)
    run = tiny("digits", "train.steps=5", "train.micro_batch=2", "train.seed=3")
    train(run, tmp_path / "run", device="cpu")
    assert sorted(call for call in calls if call[1] == 8) == [(step, 8, 3) for step in range(5)]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("ahead", "decode", "audit"))]


@pytest.mark.parametrize("route", tiered(["", "tread"], ci=["tread"]))
def test_stopped_and_resumed_it_hides_the_same_tokens(route: str, tmp_path: Path) -> None:
    """Words that are dropped, and tokens that skip blocks."""
    recipe = "digits-guided" if route else "digits-words"
    words = ["net.depth=1", "net.texts.width=8", "net.texts.drop=0.5"]
    routed = ["net.depth=3", f"net.route={{kind: {route}, share: 0.5, first: 1, last: 1}}"]
    tiny = ["net.width=8", "train.batch=4", "train.schedule.kind=constant", "train.save_every=1"]
    tiny += routed if route else words
    runs = {steps: load(recipe, [*tiny, f"train.steps={steps}"]) for steps in (2, 4)}
    whole = train(runs[4], tmp_path / "whole").net.state_dict()
    train(runs[2], tmp_path / "run")
    assert all(torch.equal(x, whole[name]) for name, x in train(runs[4], tmp_path / "run").net.state_dict().items())


def test_runs_that_start_together_encode_their_captions_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = TextEncoder(source=str(encoders.t5(tmp_path / "t5")), length=40)
    texts = EncoderTexts(root=str(tmp_path / "texts"), encoder=encoder, width=encoders.WIDTH)
    run = load("digits-words")
    run = run.model_copy(update={"net": run.net.model_copy(update={"texts": texts})})
    opened = list[TextEncoder]()
    open_encoder = TextEncoder.open

    def open_slowly(spec: TextEncoder, device: torch.device | str = "cpu") -> EncoderModel:
        opened.append(spec)
        time.sleep(0.2)
        return open_encoder(spec, device)

    monkeypatch.setattr(TextEncoder, "open", open_slowly)
    fill = partial(fill_caches.encode_what_is_missing, run, device="cpu", bar=no_bar, print_line=print)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: fill(), range(3)))
    assert len(opened) == 1


@pytest.mark.slow
@pytest.mark.data
def test_the_recipe_trains_on_its_data(tmp_path: Path) -> None:
    """On the test images, which are fewer, with a net of a few layers, and makes images in one pass."""
    small = ["net.width=8", "net.depth=1", "net.multipliers=[1]", "net.attend=[1]", "train.batch=4", "train.steps=2"]
    few = ["data.split=test", "data.memory=0", "train.log_every=1"]
    train(load("cifar10", [*small, *few]), tmp_path, device="cpu")
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["images"] for record in records] == [4, 8]
    assert all(0 < record["loss"] < 10 for record in records)
    (made,) = load_run(str(tmp_path), device="cpu").make_batches(labels_in_turn(3, 0), nfe=1)
    assert made.x.shape == (3, 3, 32, 32)
