"""Experiment trackers: TensorBoard, Weights & Biases and Trackio get each row of a run's log as it is written.

`require_tracker` checks, before anything is trained, that a tracker is installed. `tracked` opens it in the training
process and adds the hook that sends each row. An error of the tracker ends the training as
any other error does; the checkpoints and the log do not depend on it.

A resumed run resumes the tracker's run. TensorBoard discards the events after the checkpoint, and Weights & Biases
keeps the first row of a step, so neither shows a step twice. Trackio shows repeated steps twice.
"""

import math
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any, Protocol, cast

from dumo.config.load import dump
from dumo.config.spec import Run
from dumo.config.suggestion import require_known
from dumo.io.yaml import parse_yaml
from dumo.run.hooks import Hook
from dumo.run.trainer import Trainer
from dumo.runtime import dist, require
from dumo.training.log import Row
from dumo.training.metrics import StepMetrics

TRACKERS = ("tensorboard", "wandb", "trackio")
PROJECT = "dumo"


class Tracker(Protocol):
    """A run of a tracker. The run objects of wandb and trackio have these methods."""

    def log(self, values: dict[str, float], /, *, step: int) -> object:
        """Log the values of a step."""
        ...

    def finish(self) -> object:
        """Wait until all values are written or sent."""
        ...


class _TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, values: dict[str, float], /, *, step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self.writer.close()


def require_tracker(name: str) -> None:
    """Raise UserError if a tracker is unknown or not installed."""
    require_known("tracker", name, TRACKERS)
    require(name, name, f"tracker {name}")


class SendRows(Hook):
    """Sends each row of the log to a tracker, after the checkpoint: a slow network must not delay what is saved."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tracker: Tracker | None = None

    def before_training(self, trainer: Trainer) -> None:
        """Open the run of the tracker, or resume it, once the folder holds the run."""
        self.tracker = open_tracker(self.name, trainer.folder.path, trainer.run, trainer.state.step)

    def after_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        """Send the row of this step, if it has one, with its speed."""
        row = trainer.write_log.row
        if row and self.tracker:
            self.tracker.log(numbers_by_name(trainer.show_progress.meter.add_speed(row)), step=row["step"])


@contextmanager
def tracked(trainer: Trainer, name: str | None) -> Generator[None, None, None]:
    """Send the log of a training to a tracker, whose run is finished at the end.

    Does nothing without a name, and on ranks other than the first. Raises UserError as `require_tracker`.
    """
    if name is None or not dist.is_main():
        yield
        return
    require_tracker(name)
    hook = SendRows(name)
    trainer.hooks.append(hook)
    try:
        yield
    finally:
        if hook.tracker:
            hook.tracker.finish()


def open_tracker(name: str, folder: Path, run: Run, step: int) -> Tracker:
    """Open the run of a tracker, or resume it."""
    if name == "tensorboard":
        return _TensorBoard(folder, step)
    title = folder.resolve().name
    run_id = _tracker_run_id(folder)
    config: Any = parse_yaml(dump(run))
    if name == "wandb":
        import wandb

        project = os.environ.get("WANDB_PROJECT", PROJECT)
        return wandb.init(project=project, name=title, id=run_id, dir=str(folder), resume="allow", config=config)
    import trackio

    return trackio.init(project=PROJECT, name=f"{title}-{run_id}", resume="allow", config=config, embed=False)


def _tracker_run_id(folder: Path) -> str:
    """Return the id of the tracker's run, which is kept in the run's folder so that a resumed training finds it."""
    path = folder / "tracker-id"
    if not path.exists():
        path.write_text(token_hex(4))
    return path.read_text()


def numbers_by_name(row: Row) -> dict[str, float]:
    """All finite numbers of a row of the log by name, such as train/loss, train/bins/v/0, val/mmd and speed/seconds."""
    numbers: dict[str, float] = {}

    def collect(name: str, value: object) -> None:
        if isinstance(value, dict):
            for key, part in cast(dict[str, object], value).items():
                collect(f"{name}/{key}", part)
        elif isinstance(value, list):
            for i, part in enumerate(cast(list[object], value)):
                collect(f"{name}/{i}", part)
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            numbers[name] = float(value)

    for key, part in row.items():
        if key in ("speed", "val"):
            collect(key, part)
        elif key != "step":
            collect(f"train/{key}", part)
    return numbers
