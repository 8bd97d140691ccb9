"""Experiment trackers: TensorBoard, Weights & Biases, Trackio; and what the numbers of a log are called there.

- `TRACKERS` opens a tracker by its name. Each entry is called with dumo's run as plain values, its folder, and the id
  of the tracker's own run; if the tracker has a run of this id, that one is resumed.
- `numbers_by_name` gives the numbers of a row of the log by the names that people filter by: `train/loss`,
  `train/grad_norm`, `train/lr`, `val/...`, `speed/...`.

`dumo.report.feed` opens a tracker, calls its `send` for each row, and its `close`.

Nothing is sent anywhere but where the tool itself is set to. TensorBoard writes files. Weights & Biases asks for an
account unless WANDB_MODE=offline, Trackio keeps a database on this machine unless TRACKIO_SPACE_ID names another place.
None of them is imported before it is needed.
"""

import math
import os
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

from dumo.runtime import install_command
from dumo.training.log import Row
from dumo.types import UserError

PROJECT = "dumo"  # the name of the project in trackers that have projects
Config = dict[str, Any]  # a run as plain values


class Tracker(Protocol):
    """A run of an experiment tracker, open to be written."""

    def send(self, step: int, logged_at: float | None, values: dict[str, float]) -> None:
        """Send the values of a row, by name, that was logged `logged_at` seconds after 1970 began; None: not known."""
        ...

    def close(self) -> None:
        """Wait until all rows that were sent are kept. No more come."""
        ...


class _TensorBoard:
    """TensorBoard: event files in RUN/tensorboard/ID. To look: tensorboard --logdir RUN/tensorboard."""

    def __init__(self, config: Config, folder: Path, tracker_run_id: str) -> None:
        """Open the folder of this id. Raises UserError where tensorboard is not installed."""
        import_package("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard" / tracker_run_id))

    def send(self, step: int, logged_at: float | None, values: dict[str, float]) -> None:
        """Write the values of a row."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step, logged_at)

    def close(self) -> None:
        """Write what is buffered."""
        self.writer.close()


class _RunTracker:
    """A tracker whose library has an object for its run. The libraries differ in how that is opened."""

    run: Any  # of wandb or trackio

    def send(self, step: int, logged_at: float | None, values: dict[str, float]) -> None:
        """Log the values of a row."""
        self.run.log(values, step=step)

    def close(self) -> None:
        """Wait until what was logged is written, or sent."""
        self.run.finish()


class _Wandb(_RunTracker):
    """Weights & Biases: a run of project dumo (WANDB_PROJECT: another), its files in the run's folder."""

    def __init__(self, config: Config, folder: Path, tracker_run_id: str) -> None:
        """Open the run of this id.

        Raises UserError where wandb is not installed, or asks for an account and there is none, or reaches no server.
        """
        wandb = import_package("wandb")
        try:
            self.run = wandb.init(
                project=None if "WANDB_PROJECT" in os.environ else PROJECT,
                name=folder.resolve().name,
                id=tracker_run_id,
                dir=str(folder),
                resume="allow",
                reinit="create_new",
                config=config,
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"wandb: {_first_line(error)}. With WANDB_MODE=offline it needs neither account nor network"
            ) from error


class _Trackio(_RunTracker):
    """Trackio: a run of project dumo, in its own database (TRACKIO_DIR): trackio show."""

    def __init__(self, config: Config, folder: Path, tracker_run_id: str) -> None:
        """Open the run of this id.

        Raises UserError where trackio is not installed, or cannot reach the place that TRACKIO_SPACE_ID names.
        """
        trackio = import_package("trackio")
        try:
            self.run = trackio.init(
                project=PROJECT,
                name=f"{folder.resolve().name}-{tracker_run_id}",
                resume="allow",
                config=config,
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        except Exception as error:  # its own, or those of the hub's client or of HTTP's
            text = _first_line(error)
            raise UserError(
                f"trackio: {text}. Without TRACKIO_SPACE_ID it needs neither account nor network"
            ) from error
        trackio.context_vars.current_run.set(None)  # else the next one to open would close it


def _first_line(error: Exception) -> str:
    """The first line of an error's text, without the full stop at its end."""
    return str(error).partition("\n")[0].rstrip(".")


TRACKERS: dict[str, Callable[[Config, Path, str], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}


def import_package(name: str) -> ModuleType:
    """Import the package of this name. Raises UserError, with the command that installs it, where that fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module(name)
    except ImportError as error:
        raise UserError(f"tracker {name} needs the package {name} ({error}): {install_command(name)}") from error


def numbers_by_name(row: Row) -> dict[str, float]:
    """All finite numbers of a row of the log by name, without its step and the time when it was logged.

    Names of nested values are paths: train/bins/v/0.
    """
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
        if key == "speed":
            collect("speed", {name: value for name, value in part.items() if name != "at"})
        elif key == "val":
            collect("val", part)
        elif key != "step":
            collect(f"train/{key}", part)
    return numbers
