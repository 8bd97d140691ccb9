"""Measure the training speed, which the progress bar shows and speed.jsonl records.

Call `Meter.begin` before the first step and `Meter.note` after each step. `log_with_speeds` joins log rows with their
speeds, and `seconds_between` estimates the duration of a range of steps.

Speeds are in a separate file, so that the log is bit-identical on any machine and after any interruption. The file is
append-only; if a step occurs twice, its last row counts.
"""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dumo.config.place import LOG_FILE
from dumo.runtime import dist
from dumo.runtime.device import known_peak_tflops, peak_bytes
from dumo.runtime.formatting import bytes_text, number_text
from dumo.runtime.stopwatch import Clock, wall_clock
from dumo.training import log
from dumo.training.metrics import StepMetrics
from dumo.training.settings import Train
from dumo.types import UserError

FILE = "speed.jsonl"


@dataclass(frozen=True)
class Speed:
    """The speed since the previous row, by wall time including checkpoints but excluding validation."""

    step: int
    # Unix time.
    at: float
    # Seconds since the previous row or the start of training.
    seconds: float
    steps_per_second: float
    images_per_second: float
    # Peak memory of rank 0: of the GPU's allocator, or resident on a CPU.
    bytes: int
    # Counted FLOPS over the dense bf16 peak of all GPUs; None if unknown.
    share_of_peak: float | None

    def __str__(self) -> str:
        """Format the speed for the progress bar."""
        text = f"{number_text(self.images_per_second)} images/s, {bytes_text(self.bytes)}"
        if self.share_of_peak is not None:
            text += f", {self.share_of_peak:.0%} of peak"
        return text


class Meter:
    """Measures the speed on rank 0, and writes a row for each logged step."""

    def __init__(
        self,
        train: Train,
        folder: Path,
        device: torch.device,
        flops: float | None,
        clock: Clock = wall_clock,
    ) -> None:
        """`flops` are the operations of a step per image; None if unknown."""
        self.train = train
        self.path = folder / FILE
        self.device = device
        self.clock = clock
        self.peak_tflops = known_peak_tflops(device) if dist.is_main() else None
        self.flops = flops
        self.last: Speed | None = None
        # The step after which the current interval began, and its time.
        self.first_step = 0
        self.began = 0.0

    def begin(self, step: int) -> None:
        """Start measuring after step `step`."""
        self.first_step = step
        self.began = self.clock()

    def leave_out(self, seconds: float) -> None:
        """Exclude these seconds from the current interval."""
        self.began += seconds

    def note(self, metrics: StepMetrics) -> str:
        """Return the text of the progress bar after a step. On rank 0, write a row if it is due."""
        if dist.is_main() and metrics.step % self.train.log_every == 0:
            self.last = self._measure(metrics.step)
            log.append(self.path, asdict(self.last))
        loss = _loss_text(metrics)
        return f"{loss}, {self.last}" if self.last else loss

    def add_speed(self, row: log.Row) -> log.Row:
        """Add the speed of a row's step to the row, if it was measured."""
        if self.last is None or self.last.step != row["step"]:
            return row
        speed = asdict(self.last)
        return {**row, "speed": {name: speed[name] for name in speed if name not in ("step", "at")}}

    def _measure(self, step: int) -> Speed:
        """Return the speed since the last call or `begin`."""
        now = self.clock()
        steps = step - self.first_step
        seconds = now - self.began
        self.first_step = step
        self.began = now
        steps_per_second = steps / max(seconds, 1e-9)
        images_per_second = steps_per_second * self.train.batch
        share_of_peak = None
        if self.peak_tflops and self.flops is not None:
            share_of_peak = images_per_second * self.flops / (1e12 * self.peak_tflops * dist.world())
        return Speed(
            step=step,
            at=time.time(),
            seconds=seconds,
            steps_per_second=steps_per_second,
            images_per_second=images_per_second,
            bytes=peak_bytes(self.device),
            share_of_peak=share_of_peak,
        )


def _loss_text(metrics: StepMetrics) -> str:
    """Format the loss, with its parts if the loss is weighted by its own size and therefore not informative."""
    if not math.isfinite(metrics.loss):
        return "step skipped"
    losses = [f"loss {metrics.loss:.4f}"]
    if log.is_weighted(metrics.loss, metrics.parts):
        losses += [f"{name} {value:.4g}" for name, value in metrics.parts.items()]
    return ", ".join(losses)


def log_with_speeds(folder: Path) -> list[log.Row]:
    """Return the rows of a run's log, each with `speed`, the last row of its step in speed.jsonl, if available.

    Raise UserError if there is no log.
    """
    if not (folder / LOG_FILE).is_file():
        raise UserError(f"{folder} has no {LOG_FILE}: give the folder of a run that has been training")
    speed_by_step = {row.pop("step"): row for row in log.read_log(folder / FILE)}
    rows = log.read_log(folder / LOG_FILE)
    for row in rows:
        if row["step"] in speed_by_step:
            row["speed"] = speed_by_step[row["step"]]
    return rows


def seconds_between(folder: Path, first: int, last: int) -> float | None:
    """Estimate the seconds from step `first` to step `last`; None if no speed was measured.

    Repeated steps count once with their last speed, and future steps with the last measured speed.
    """
    # Steps per second, by the last step of each interval.
    rates: dict[int, float] = {}
    for row in log.read_log(folder / FILE):
        rates[row["step"]] = row["steps_per_second"]
    if not rates:
        return None
    seconds = 0.0
    step = 0
    for row_step in sorted(rates):
        seconds += max(0, min(row_step, last) - max(step, first)) / rates[row_step]
        step = row_step
    return seconds + max(0, last - max(step, first)) / rates[step]
