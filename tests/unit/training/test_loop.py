"""A run is a function of its spec: stopped and resumed from disk, it is the same run."""

import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from contract.drawn import counting
from dumo.flow.path import Linear
from dumo.runtime import signals
from dumo.training import loop
from dumo.training.loop import Every, train
from dumo.training.optim import AdamW
from dumo.training.record import Record
from dumo.training.schedule import Cosine
from dumo.training.spec import Train
from dumo.training.state import Diverged, State, begin
from dumo.training.step import draws_of
from dumo.types import Cond, NoisyBatch, Sample, Terms
from unit.training.by_path import latest, restore, save
from unit.training.toy import (
    AVERAGES,
    CLASSES,
    OPTIMIZERS,
    Small,
    batches,
    flow_of,
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
    stop = Every(7, lambda state, _: save(tmp_path, state, 1) and None)
    with pytest.raises(InterruptedError):
        run(first, spec, hooks=[stop, Every(9, interrupt)])
    second = begin(Small(1, dtype=dtype), spec)  # other weights: all must come from the disk
    found = latest(tmp_path)
    restore(found, second)
    assert (second.step, second.images) == (7, 84)
    run(second, spec)

    assert same(tensors(whole), tensors(second))
    assert (second.step, second.images) == (whole.step, whole.images) == (13, 156)


def interrupt(state: State, record: Record) -> None:
    raise InterruptedError


@pytest.mark.nightly
def test_training_lowers_the_loss() -> None:
    losses: list[float] = []
    spec = Train(steps=300, batch=64, optimizer=AdamW(lr=1e-2), schedule=Cosine())
    run(begin(Small(), spec), spec, hooks=[Every(1, lambda _, record: losses.append(record.parts["v"]))])
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])


def test_hooks_come_in_order_and_in_time() -> None:
    calls: list[tuple[str, int]] = []
    spec = Train(steps=6, batch=4)
    hooks = [
        Every(2, lambda state, record: calls.append(("a", state.step))),
        Every(3, lambda state, record: calls.append(("b", record.step))),
    ]
    run(begin(Small(), spec), spec, hooks=hooks)
    assert calls == [("a", 2), ("b", 3), ("a", 4), ("a", 6), ("b", 6)]


def test_what_an_objective_sees() -> None:
    """Progress, and the null label, which is the one after the last class."""
    seen: list[tuple[float, bool]] = []

    def note(terms: Terms, b: NoisyBatch) -> Terms:
        dropped = torch.equal(b.c[~b.kept], b.null[~b.kept])
        seen.append((b.progress, bool((b.null == CLASSES).all()) and dropped))
        return terms

    spec = Train(steps=4, batch=32)
    state = begin(Small(), spec)
    train(state, flow_of(state, spec, toy(note), Linear(), CLASSES), batches(32), spec)
    assert seen == [(0.0, True), (0.25, True), (0.5, True), (0.75, True)]


def spoilt(*steps: int) -> Callable[[int], tuple[Sample, Cond]]:
    """The batches, those of some steps, counted from 0, with a number that is none."""

    def of(step: int) -> tuple[Sample, Cond]:
        x, c = batches(12)(step)
        return x * torch.nan if step in steps else x, c

    return of


@pytest.mark.parametrize(("skips", "last"), [(1, 2), (2, 5), (3, 9)])
def test_so_many_skipped_in_a_row_stop_it_after_the_hooks(skips: int, last: int) -> None:
    spec, seen = Train(steps=20, batch=12, ema=AVERAGES, max_skips=skips), list[bool]()
    state = begin(Small(), spec)
    count = Every(1, lambda _, record: seen.append(record.skipped is not None))
    with pytest.raises(Diverged, match=f"step {last} diverged: loss, v, pull is not finite, in 12 of 12 rows"):
        train(state, flow_of_toy(state, spec), spoilt(1, 3, 4, 6, 7, 8), spec, [count])
    assert (state.step, state.skips) == (last, skips)
    assert [i for i, skipped in enumerate(seen) if skipped] == [i for i in (1, 3, 4, 6, 7, 8) if i < last]


def test_asked_to_stop_it_ends_after_that_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is due at a step is in its record."""
    spec, due = Train(steps=9, batch=12, ema=AVERAGES), iter([False, True, False])
    state, seen = begin(Small(), spec), list[tuple[int, bool]]()

    def hear(state: State, record: Record) -> None:
        seen.append((record.received_signal or 0, record.due))
        monkeypatch.setattr(signals, "received_signal", signal.SIGUSR1 if state.step == 2 else None)

    with pytest.raises(signals.Stopped) as stopped:
        train(state, flow_of_toy(state, spec), batches(12), spec, [Every(1, hear)], lambda: next(due))
    assert (state.step, stopped.value.number) == (3, signal.SIGUSR1)
    assert seen == [(0, False), (0, True), (signal.SIGUSR1, False)]


def test_what_is_drawn_ahead_is_what_a_step_draws_and_nothing_is_drawn_twice() -> None:
    """Of a batch in pieces: the noise of each row once a step, whoever draws it."""
    spec = Train(steps=3, batch=12, micro_batch=4, ema=())
    own, given = (begin(Small(), spec) for _ in range(2))
    with counting() as drawn:
        run(own, spec)
    assert drawn.rows == 3 * list(range(12))
    flow = flow_of_toy(given, spec)
    made, data = ([f(step) for step in range(3)] for f in (lambda k: draws_of(flow, spec, k, (2,)), batches(12)))
    with counting() as drawn:
        train(given, flow, data.__getitem__, spec, draws_at=made.__getitem__)
    assert (drawn.rows, drawn.scalars) == ([], 0)
    assert same(tensors(own), tensors(given))


def test_a_run_is_in_its_precision_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[object] = []

    @contextmanager
    def noted(*given: object) -> Generator[None]:
        inside.append(given)
        yield
        inside.clear()

    monkeypatch.setattr(loop, "product_precision", noted)
    spec, seen = Train(steps=2, batch=4, precision="tf32"), list[int]()
    run(begin(Small(), spec), spec, hooks=[Every(1, lambda *_: seen.append(len(inside)))])
    assert seen == [1, 1]  # the backward pass and the hooks, too
    assert inside == []


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
