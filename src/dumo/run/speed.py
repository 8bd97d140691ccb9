"""How fast a run trains: shown by its bar, and kept in speed.jsonl next to its log.

`Meter` measures it: `begin` before the first step, `note` after each. `log_with_speeds` joins the log's rows with their
speeds, and `seconds_between` says how long steps took, or will take.

Times are the machine's, not the run's: they have a file of their own, so that a log is the same to the bit wherever and
however often the run was stopped. It is only ever added to; of a step that was made twice the last row holds.
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
    """The speed since the row before: wall time, with checkpoints and all else that the run did but judge itself."""

    step: int
    at: float  # when: seconds since 1970
    seconds: float  # since the row before, or since the training began
    steps_per_second: float
    images_per_second: float
    bytes: int  # the most so far on rank 0: of a GPU's allocator, else resident
    share_of_peak: float | None  # counted operations over the dense bf16 peak of all GPUs; None where it is not known

    def __str__(self) -> str:
        """As the bar says it."""
        text = f"{number_text(self.images_per_second)} images/s, {bytes_text(self.bytes)}"
        if self.share_of_peak is not None:
            text += f", {self.share_of_peak:.0%} of peak"
        return text


class Meter:
    """Measures a training from here on, on rank 0: a row for each step that is logged."""

    def __init__(
        self,
        train: Train,
        folder: Path,
        device: torch.device,
        flops: float | None,
        clock: Clock = wall_clock,
    ) -> None:
        """Nothing is measured before `begin`. `flops` are the operations of a step, for an image; None: not known."""
        self.train = train
        self.path = folder / FILE
        self.device = device
        self.clock = clock
        self.peak_tflops = known_peak_tflops(device) if dist.is_main() else None
        self.flops = flops
        self.last: Speed | None = None
        self.first_step = 0  # of what the next row measures
        self.began = 0.0  # by the clock, when that step was done

    def begin(self, step: int) -> None:
        """Measure from now on, the step of this number being done."""
        self.first_step = step
        self.began = self.clock()

    def leave_out(self, seconds: float) -> None:
        """Count these seconds, which have passed since the last row, as no training."""
        self.began += seconds

    def note(self, metrics: StepMetrics) -> str:
        """The text of the bar after a step. On rank 0 a row is added where one is due."""
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
        """The speed of the steps up to this one since the last call, or since `begin`."""
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
    """The loss, and its parts where it is weighted by its own size, since that says nothing."""
    if not math.isfinite(metrics.loss):
        return "step skipped"
    losses = [f"loss {metrics.loss:.4f}"]
    if log.is_weighted(metrics.loss, metrics.parts):
        losses += [f"{name} {value:.4g}" for name, value in metrics.parts.items()]
    return ", ".join(losses)


def log_with_speeds(folder: Path) -> list[log.Row]:
    """The rows of a run's log, each with its `speed` where that was measured: the last row of its step in speed.jsonl.

    Raises UserError where there is no log, and as `log.read_log`.
    """
    if not (folder / LOG_FILE).is_file():
        raise UserError(f"{folder} has no {LOG_FILE}: give the folder of a run that has trained a while")
    speed_by_step = {row.pop("step"): row for row in log.read_log(folder / FILE)}
    rows = log.read_log(folder / LOG_FILE)
    for row in rows:
        if row["step"] in speed_by_step:
            row["speed"] = speed_by_step[row["step"]]
    return rows


def seconds_between(folder: Path, first: int, last: int) -> float | None:
    """How long the run trains from step `first` to step `last`; None where no speed was measured.

    A step that was made twice counts once, at its last speed; steps beyond those measured have the last speed.
    """
    rates: dict[int, float] = {}  # steps a second, by the step up to which they hold
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
