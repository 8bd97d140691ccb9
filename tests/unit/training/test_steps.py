"""A run is a function of its spec: stopped and resumed from disk, it is the same run."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from contract.drawn import counting
from dumo.training.metrics import StepMetrics
from dumo.training.optim import AdamW
from dumo.training.schedule import Cosine
from dumo.training.settings import Train
from dumo.training.state import State, begin
from dumo.types import NoisyBatch, Terms
from trained import ToyTrainer
from unit.training.by_path import latest, restore, save
from unit.training.toy import (
    AVERAGES,
    CLASSES,
    OPTIMIZERS,
    Small,
    batches,
    flow_of_toy,
    run,
    same,
    tensors,
    toy,
    trained,
)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o.kind)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ref", ["self", 0.9])
def test_resumed_is_uninterrupted(tmp_path: Path, optimizer: AdamW, dtype: torch.dtype, ref: str | float) -> None:
    spec = Train.model_validate(
        {"steps": 13, "batch": 12, "micro_batch": 6, "optimizer": optimizer, "schedule": Cosine(warmup=3), "ref": ref}
        | {"ema": AVERAGES, "clip": 1.0, "save_every": 7}
    )
    whole = run(begin(Small(0, dtype=dtype), spec), spec)

    first = begin(Small(0, dtype=dtype), spec)

    def save_and_stop(state: State, metrics: StepMetrics) -> None:
        if state.step == 7:
            save(tmp_path, state, 1)
        if state.step == 9:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(first, spec, after=[save_and_stop])
    second = begin(Small(1, dtype=dtype), spec)  # other weights: all must come from the disk
    found = latest(tmp_path)
    restore(found, second)
    assert (second.step, second.images) == (7, 84)
    run(second, spec)

    assert same(tensors(whole), tensors(second))
    assert (second.step, second.images) == (whole.step, whole.images) == (13, 156)


@pytest.mark.nightly
def test_training_lowers_the_loss() -> None:
    losses: list[float] = []
    spec = Train(steps=300, batch=64, optimizer=AdamW(lr=1e-2), schedule=Cosine())
    run(begin(Small(), spec), spec, after=[lambda _, metrics: losses.append(metrics.parts["v"])])
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])


def test_what_an_objective_sees() -> None:
    """Progress, and the null label, which is the one after the last class."""
    seen: list[tuple[float, bool]] = []

    def note(terms: Terms, b: NoisyBatch) -> Terms:
        dropped = torch.equal(b.c[~b.kept], b.null[~b.kept])
        seen.append((b.progress, bool((b.null == CLASSES).all()) and dropped))
        return terms

    spec = Train(steps=4, batch=32)
    run(begin(Small(), spec), spec, objective=toy(note))
    assert seen == [(0.0, True), (0.25, True), (0.5, True), (0.75, True)]


def test_what_is_drawn_ahead_is_what_a_step_draws_and_nothing_is_drawn_twice() -> None:
    """Of a batch in pieces: the noise of each row once a step, whoever draws it."""
    spec = Train(steps=3, batch=12, micro_batch=4, ema=())
    own, given = (begin(Small(), spec) for _ in range(2))
    with counting() as drawn:
        run(own, spec)
    assert drawn.rows == 3 * list(range(12))
    trainer = ToyTrainer(given, flow_of_toy(given, spec), spec)
    data = [batches(12)(step) for step in range(3)]
    draws = [trainer.draws(step, (2,)) for step in range(3)]
    with counting() as drawn:
        for step in range(3):
            trainer.train_step(data[step], draws[step])
    assert (drawn.rows, drawn.scalars) == ([], 0)
    assert same(tensors(own), tensors(given))


def test_the_first_average_is_shown() -> None:
    state = trained()
    assert state.sampled_net is state.averages[0.99].module
    assert trained(Train(steps=1, batch=12, ema=())).sampled_net.training  # the net itself


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"steps": 0}, "steps"),
        ({"batch": 0}, "batch"),
        ({"micro_batch": 0}, "micro_batch"),
        ({"share": 0}, "share"),
        ({"accumulate": 2}, "accumulate"),
        ({"ref": "ema"}, "ref"),
        ({"clip": 0}, "clip"),
        ({"max_skips": 0}, "max_skips"),
        ({"save_minutes": 0}, "save_minutes"),
        ({"precision": "fp16"}, "precision"),
        ({"optimizer": {"kind": "sgd"}}, "adamw"),
        ({"schedule": {"kind": "linear"}}, "cosine"),
        ({"learning_rate": 1}, "learning_rate"),
    ],
)
def test_refusals(bad: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Train.model_validate({"steps": 2, "batch": 4} | bad)
