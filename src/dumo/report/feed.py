"""The rows of a run's log on their way to a tracker: each once, however often the run, or this, is stopped.

tracked.json in the run's folder says what each tracker was sent. A run that was stopped goes on from its last
checkpoint and logs the steps after it again, to the bit: they are not sent again. Where they differ, as after going
back to an earlier checkpoint with another learning rate, all rows go to a new run of the tracker.
"""

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from itertools import accumulate
from pathlib import Path
from secrets import token_hex
from typing import Any

from dumo.io import file
from dumo.report.tracker import TRACKERS, Tracker, values
from dumo.run.config.load import FILE as SPEC
from dumo.run.config.load import load
from dumo.run.speed import LOG, logged
from dumo.runtime import signals
from dumo.training.log import Row
from dumo.types import UserError

FILE = "tracked.json"
POLL = 1.0  # seconds between looks at a log that may grow


class Feed:
    """One run's log to one tracker, which is opened when there is something to send."""

    def __init__(self, folder: Path, kind: str) -> None:
        """Go on where the last feed ended. Raises UserError where there is no run, or no log yet."""
        if not (folder / SPEC).is_file():
            raise UserError(f"{folder} is no run's folder (it has no {SPEC}): give one, such as runs/digits")
        self.folder, self.kind, self.run = folder, kind, load(str(folder))
        self.tracker: Tracker | None = None
        self.looked: tuple[int, int, int] | None = None  # at which file, when
        told = self.told().get(kind)
        self.key: str = told["key"] if told else token_hex(4)
        chain = chained(logged(folder))
        known = bool(told) and 0 < told["rows"] <= len(chain) and chain[told["rows"] - 1] == told["digest"]
        self.chain = chain[: told["rows"]] if told and known else []  # of what was sent
        self.anew = bool(told) and not known

    def send(self) -> int:
        """Send the rows that were not sent yet; how many these were."""
        if (looked := self.look()) == self.looked:
            return 0
        rows, self.looked = logged(self.folder), looked
        chain = chained(rows)
        n = len(self.chain)
        if chain == self.chain[: len(chain)]:  # nothing new, or rewound: the rest will come again
            return 0
        if self.anew or chain[:n] != self.chain:
            self.close()
            self.key, self.chain, self.anew, n = token_hex(4), [], False, 0
        if self.tracker is None:
            self.tracker = TRACKERS[self.kind](self.run, self.folder, self.key)
        for row in rows[n:]:
            self.tracker.send(row["step"], row.get("speed", {}).get("at"), values(row))
        self.chain = chain
        told = {**self.told(), self.kind: {"key": self.key, "rows": len(chain), "digest": chain[-1]}}
        file.write(self.folder / FILE, json.dumps(told, indent=2).encode(), writer="")
        return len(chain) - n

    def close(self) -> None:
        """Let the tracker keep what it was sent."""
        if self.tracker:
            self.tracker.close()
            self.tracker = None

    def told(self) -> dict[str, Any]:
        """What each tracker was sent. Raises UserError where that is not to be read."""
        path = self.folder / FILE
        try:
            return json.loads(path.read_text()) if path.exists() else {}
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}): remove it, and all rows are sent to new runs") from error

    def look(self) -> tuple[int, int, int]:
        """Which file the log is, how large, and when it was written to."""
        stat = (self.folder / LOG).stat()
        return stat.st_ino, stat.st_size, stat.st_mtime_ns


def feed(folders: Sequence[Path], kind: str, *, follow: bool = False) -> dict[Path, int]:
    """Send the logs of these runs to a tracker; how many rows of each were new.

    `follow`: go on as they grow, until stopped. Raises UserError as `Feed` and the tracker do, Stopped where a signal
    asked for it.
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


def chained(rows: Sequence[Row]) -> list[str]:
    """A digest after each row, of all rows up to it; of what the run measured, not of the machine's speed."""

    def add(digest: str, row: Row) -> str:
        told = json.dumps({name: value for name, value in row.items() if name != "speed"}, sort_keys=True)
        return hashlib.sha256((digest + told).encode()).hexdigest()

    return [*accumulate(rows, add, initial="")][1:]
