"""Experiment trackers: TensorBoard, Weights & Biases, Trackio; and what the numbers of a log are called there.

Nothing is sent anywhere but where the tool itself is set to. TensorBoard writes files. Weights & Biases asks for an
account unless WANDB_MODE=offline, Trackio keeps a database on this machine unless TRACKIO_SPACE_ID names another place.
None of them is imported before it is needed.

Numbers go by the names that people filter by: `train/loss`, `train/grad_norm`, `train/lr`, `val/...`, `speed/...`.
"""

import math
import os
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from dumo.runtime import install
from dumo.training.log import Row
from dumo.types import UserError

PROJECT = "dumo"
Config = dict[str, Any]  # a run as plain values


class Tracker(Protocol):
    """Where rows go."""

    def send(self, step: int, at: float | None, values: dict[str, float]) -> object:
        """One row's numbers; `at`: when it was logged, seconds since 1970."""
        ...

    def close(self) -> object:
        """No more rows come: wait until all that were sent are kept."""
        ...


class TensorBoard:
    """Event files, in a folder of their own in the run's: tensorboard --logdir RUN/tensorboard."""

    def __init__(self, config: Config, folder: Path, key: str) -> None:
        """Goes on in the folder of this key."""
        package("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard" / key))

    def send(self, step: int, at: float | None, values: dict[str, float]) -> None:
        """One row."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step, at)

    def close(self) -> None:
        """Flush."""
        self.writer.close()


class Hosted:
    """A run of a tracker that takes rows by their step."""

    run: Any

    def send(self, step: int, at: float | None, values: dict[str, float]) -> None:
        """One row."""
        self.run.log(values, step=step)

    def close(self) -> None:
        """Wait until what was logged is written, or sent."""
        self.run.finish()


class Wandb(Hosted):
    """Weights & Biases: a run of project dumo (WANDB_PROJECT: another), its files in the run's folder."""

    def __init__(self, config: Config, folder: Path, key: str) -> None:
        """Goes on with the run of this key. Raises UserError where wandb asks for an account and there is none."""
        wandb = package("wandb")
        try:
            self.run = wandb.init(
                project=None if "WANDB_PROJECT" in os.environ else PROJECT,
                name=folder.resolve().name,
                id=key,
                dir=str(folder),
                resume="allow",
                reinit="create_new",
                config=config,
            )
        except wandb.errors.Error as error:
            text = str(error).partition("\n")[0].rstrip(".")
            raise UserError(f"wandb: {text}. With WANDB_MODE=offline it needs no account") from error


class Trackio(Hosted):
    """Trackio: a run of project dumo, in its own database (TRACKIO_DIR): trackio show."""

    def __init__(self, config: Config, folder: Path, key: str) -> None:
        """Goes on with the run of this key."""
        trackio = package("trackio")
        self.run = trackio.init(
            project=PROJECT,
            name=f"{folder.resolve().name}-{key}",
            resume="allow",
            config=config,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        trackio.context_vars.current_run.set(None)  # else the next one to open would close it


TRACKERS: dict[str, Callable[[Config, Path, str], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}


def package(name: str) -> ModuleType:
    """The package of this name. Raises UserError, with the command that installs it, where it is not there."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module(name)
    except ImportError as error:
        raise UserError(f"tracker {name} needs the package {name} ({error}): {install(name)}") from error


def values(row: Row) -> dict[str, float]:
    """All finite numbers of a row by name, those of tables and lists as train/a/b/0; not its step, nor its time."""
    numbers: dict[str, float] = {}

    def collect(name: str, value: Any) -> None:  # noqa: ANN401, what JSON holds
        if isinstance(value, dict):
            for key, part in value.items():
                collect(f"{name}/{key}", part)
        elif isinstance(value, list):
            for i, part in enumerate(value):
                collect(f"{name}/{i}", part)
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            numbers[name] = float(value)

    for key, part in row.items():
        if key in ("speed", "val"):
            collect(key, part)
        elif key != "step":
            collect(f"train/{key}", part)
    numbers.pop("speed/at", None)
    return numbers
