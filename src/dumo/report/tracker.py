"""Experiment trackers, and the rows of a run's log on their way to one: each once, however often this is stopped.

Nothing is sent anywhere but where the tool itself is set to. TensorBoard writes files. Weights & Biases asks for an
account unless WANDB_MODE=offline, Trackio keeps a database on this machine unless TRACKIO_SPACE_ID names another place.
None of them is imported before it is needed.

tracked.json in the run's folder says what each tracker was sent. A run that was stopped goes on from its last
checkpoint and logs the steps after it again, to the bit: they are not sent again. Where they differ, as after going
back to an earlier checkpoint with another learning rate, all rows go to a new run of the tracker.
"""

import hashlib
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from secrets import token_hex
from types import ModuleType
from typing import Any, Protocol

from dumo.io import file
from dumo.io.read import read_json
from dumo.run.config.load import load
from dumo.run.speed import LOG, logged
from dumo.runtime import install, signals
from dumo.training.log import Row
from dumo.types import UserError

PROJECT, FILE = "dumo", "tracked.json"
POLL = 1.0  # seconds between looks at a log that may grow
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
        raise UserError(f"--to {name} needs the package {name} ({error}): {install(name)}") from error


def values(row: Row) -> dict[str, float]:
    """All finite numbers of a row by name, those of tables and lists as a/b/0; not its step, nor the time of day."""

    def found(name: str, value: Any) -> Iterator[tuple[str, float]]:  # noqa: ANN401, what JSON holds
        if isinstance(value, dict):
            for key, part in value.items():
                yield from found(f"{name}/{key}", part)
        elif isinstance(value, list):
            for i, part in enumerate(value):
                yield from found(f"{name}/{i}", part)
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield name, float(value)

    left_out = ("step", "speed/at")
    return {name: number for key, part in row.items() for name, number in found(key, part) if name not in left_out}


class Feed:
    """One run's log to one tracker, which opens when there is something to send."""

    def __init__(self, folder: Path, kind: str) -> None:
        """Go on where the last feed ended. Raises UserError where there is no run, or no log yet."""
        chain = digests(logged(folder))
        self.folder, self.kind, self.config = folder, kind, load(str(folder)).model_dump(mode="json")
        self.tracker: Tracker | None = None
        self.looked: tuple[int, int, int] | None = None  # at which file, when
        past = self.past().get(kind)
        self.key: str = past["key"] if past else token_hex(4)
        known = bool(past) and 0 < past["rows"] <= len(chain) and chain[past["rows"] - 1] == past["digest"]
        self.chain = chain[: past["rows"]] if past and known else []  # of what was sent
        self.anew = bool(past) and not known

    def send(self) -> int:
        """Send the rows that were not sent yet; how many these were."""
        if (looked := self.look()) == self.looked:
            return 0
        rows, self.looked = logged(self.folder), looked
        chain = digests(rows)
        n = len(self.chain)
        if chain == self.chain[: len(chain)]:  # nothing new, or rewound: the rest will come again
            return 0
        if self.anew or chain[:n] != self.chain:
            self.close()
            self.key, self.chain, self.anew, n = token_hex(4), [], False, 0
        if self.tracker is None:
            self.tracker = TRACKERS[self.kind](self.config, self.folder, self.key)
        for row in rows[n:]:
            self.tracker.send(row["step"], row.get("speed", {}).get("at"), values(row))
        self.chain = chain
        now = {**self.past(), self.kind: {"key": self.key, "rows": len(chain), "digest": chain[-1]}}
        file.write(self.folder / FILE, json.dumps(now, indent=2).encode(), writer="")
        return len(chain) - n

    def close(self) -> None:
        """Let the tracker keep what it was sent."""
        if self.tracker:
            self.tracker.close()
            self.tracker = None

    def past(self) -> dict[str, Any]:
        """What each tracker was sent. Raises UserError where that cannot be read."""
        path = self.folder / FILE
        return read_json(path, "remove it, and all rows are sent to new runs") if path.exists() else {}

    def look(self) -> tuple[int, int, int]:
        """Which file the log is, how large, and when it was written to."""
        stat = (self.folder / LOG).stat()
        return stat.st_ino, stat.st_size, stat.st_mtime_ns


def feed(folders: Sequence[Path], kind: str, *, follow: bool = False) -> dict[Path, int]:
    """Send the logs of these runs to a tracker; how many rows of each were new.

    `follow`: go on as they grow, until stopped. Raises UserError as `Feed` and the tracker do, Stopped at a signal.
    """
    feeds = [Feed(folder, kind) for folder in folders]
    sent = dict.fromkeys(folders, 0)
    with redirect_stdout(sys.stderr):  # where trackers say what they do
        try:
            while True:
                for one in feeds:
                    sent[one.folder] += one.send()
                if not follow:
                    return sent
                signals.check()
                time.sleep(POLL)
        finally:
            for one in feeds:
                one.close()


def digests(rows: Sequence[Row]) -> list[str]:
    """A digest after each row, of all rows up to it; of what the run measured, not of the machine's speed."""

    def add(digest: str, row: Row) -> str:
        text = json.dumps({name: value for name, value in row.items() if name != "speed"}, sort_keys=True)
        return hashlib.sha256((digest + text).encode()).hexdigest()

    return [*accumulate(rows, add, initial="")][1:]
