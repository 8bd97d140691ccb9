"""How fast a run trains is measured between the rows of its log, and kept beside it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dumo.config.load import load
from dumo.run import speed
from dumo.run.speed import Meter, log_with_speeds, seconds_between
from dumo.training import log
from dumo.training.metrics import StepMetrics
from dumo.types import UserError

CPU = torch.device("cpu")


def record(step: int, loss: float = 0.5) -> StepMetrics:
    """Of a step."""
    return StepMetrics(step, 8 * step, loss, {}, {}, {}, [], 1.0, 1e-3)


def test_a_row_for_each_that_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, now = load("moons", ["train.batch=8", "train.log_every=10", "net.width=8", "net.depth=1"]), [5.0]
    monkeypatch.setattr(speed, "known_peak_tflops", lambda here: 1e-6)
    monkeypatch.setattr(speed, "peak_bytes", lambda here: 3 * 10**9)
    meter = Meter(run.train, tmp_path, CPU, 1e3, clock=lambda: now[0])
    meter.begin(7)
    said: list[str] = []
    for step in range(8, 31):
        now[0] += 0.5 if step <= 20 else 0.25
        said.append(meter.note(record(step, float("nan") if step == 9 else 0.5)))
    rows = log.read_log(tmp_path / "speed.jsonl")
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert [row["seconds"] for row in rows] == [1.5, 5.0, 2.5]
    assert [row["steps_per_second"] for row in rows] == [2.0, 2.0, 4.0]
    assert [row["images_per_second"] for row in rows] == [16.0, 16.0, 32.0]
    assert [row["bytes"] for row in rows] == [3 * 10**9] * 3
    assert rows[0]["share_of_peak"] == pytest.approx(16e3 / 1e6)
    assert said[:2] == ["loss 0.5000", "step skipped"]
    assert said[-1] == f"loss 0.5000, 32 images/s, 3 GB, {32e3 / 1e6:.0%} of peak"


def test_the_bar_shows_mean_squares_where_the_loss_says_nothing(tmp_path: Path) -> None:
    """Under MeanFlow's metric of power 1 the loss is 1 throughout."""
    meter = Meter(load("moons", ["train.log_every=9"]).train, tmp_path, CPU, 0.0)
    for parts, said in (
        ({"v": 1.25, "u": 2.5}, "loss 1.0000, v 1.25, u 2.5"),
        ({"u": 2.5}, "loss 1.0000, u 2.5"),
        ({"v": 1.0}, "loss 1.0000"),
    ):
        assert meter.note(replace(record(1, 1.0), parts=parts)) == said


def test_what_is_left_out_is_no_time_of_the_steps(tmp_path: Path) -> None:
    now = [5.0]
    meter = Meter(load("moons", ["train.log_every=2"]).train, tmp_path, CPU, 0.0, clock=lambda: now[0])
    meter.begin(0)
    for step in range(1, 5):
        now[0] += 0.5
        meter.note(record(step))
        if step in (1, 2):
            now[0] += 100.0
            meter.leave_out(100.0)
    assert [row["steps_per_second"] for row in log.read_log(tmp_path / "speed.jsonl")] == [2.0, 2.0]


def test_a_device_whose_peak_is_not_known_has_no_share(tmp_path: Path) -> None:
    run = load("moons", ["train.log_every=1"])
    assert "of peak" not in Meter(run.train, tmp_path, CPU, 0.0).note(record(1))
    assert log.read_log(tmp_path / "speed.jsonl")[0]["share_of_peak"] is None


def test_rows_of_the_log_have_the_last_speed_of_their_step(tmp_path: Path) -> None:
    def rows(*pairs: tuple[int, float]) -> str:
        return "".join(json.dumps({"step": step, "images_per_second": value}) + "\n" for step, value in pairs)

    with pytest.raises(UserError):
        log_with_speeds(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 1.0}\n{"step": 20, "loss": null}\n{"step": 25}\n')
    assert log_with_speeds(tmp_path) == [{"step": 10, "loss": 1.0}, {"step": 20, "loss": None}, {"step": 25}]
    (tmp_path / "speed.jsonl").write_text(rows((10, 1.0), (20, 2.0), (30, 3.0), (20, 4.0)))  # stopped after 30
    assert [row.get("speed") for row in log_with_speeds(tmp_path)] == [
        {"images_per_second": 1.0},
        {"images_per_second": 4.0},
        None,
    ]


def test_how_long_steps_took_and_will_take(tmp_path: Path) -> None:
    """Steps 0 to 10 at 1 a second, to 20 at 4, which were made twice, and on at 4."""
    assert seconds_between(tmp_path, 0, 10) is None
    rows = [(10, 1.0), (20, 2.0), (20, 4.0)]
    text = "".join(json.dumps({"step": step, "steps_per_second": rate}) + "\n" for step, rate in rows)
    (tmp_path / "speed.jsonl").write_text(text)
    spans = [(0, 10), (0, 5), (0, 20), (0, 16), (15, 20), (20, 40), (8, 40)]
    assert [seconds_between(tmp_path, *span) for span in spans] == [10, 5, 12.5, 11.5, 1.25, 5, 9.5]
