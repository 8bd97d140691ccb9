"""Send the rows of a run's log to a tracker: afterwards (`feed`), or as the run trains (`live_feed`).

`feed` locks each run's log for the tracker, reads the rows after the last that was sent, and sends them (`Feed`); with
a pause, such as `poll_forever`, it looks again and again. `live_feed` starts a process at the first step of a training
(`TrackerProcess`), which runs `follow`, which calls `feed`, and is ended when the training is.

It is a process of its own so that what a tracker does, with time, memory, threads or random numbers, it does not do in
the training; and where it hangs, the training continues.

tracked.json in the run's folder has the last step that each tracker was sent, and the id of the tracker's run, `key`.
The next feed sends the rows after that step to the same run of the tracker. After a kill a few rows may be there twice,
and where a run went back to an earlier checkpoint, those of the steps that it repeats stay as they were.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from secrets import token_hex
from select import select
from tempfile import TemporaryFile
from time import perf_counter
from typing import Any

from dumo.config.place import LOG_FILE
from dumo.config.source import read
from dumo.config.suggestion import require_known
from dumo.io import file
from dumo.io.guard import locked
from dumo.io.read import read_json
from dumo.report.tracker import TRACKERS, Tracker, numbers_by_name
from dumo.run.speed import log_with_speeds
from dumo.runtime import dist, require_package, shell_path, signals
from dumo.training.loop import Every
from dumo.training.record import Record
from dumo.training.state import State
from dumo.types import UserError

FILE = "tracked.json"  # in a run's folder
POLL_SECONDS = 1.0  # between two looks at a log that may grow: ours
REST_SHARE = 20  # seconds of rest, at least, for each second that a look took: a long log is read less often. Ours
LAST_ROWS_SECONDS = 30.0  # that a tracker has for the last rows of a run that is done: ours
STOPPED_ROWS_SECONDS = 5.0  # that it has for the last rows of a run that was stopped: ours
PROGRAM = "from dumo.report.feed import follow; follow()"  # takes the folder and the tracker as arguments

Pause = Callable[[float], bool]  # waits this many seconds; True: the next look at the log is the last


class Feed:
    """Sends one run's log to one tracker, which is opened when there is something to send."""

    def __init__(self, folder: Path, tracker_name: str) -> None:
        """Resume where the last feed ended.

        Raises UserError where there is no run, it has no log yet, or tracked.json is damaged.
        """
        log_with_speeds(folder)  # raises where there is no log
        self.folder = folder
        self.tracker_name = tracker_name
        self.config = read(folder).tree
        self.tracker: Tracker | None = None
        sent = _read_sent(folder).get(tracker_name, {})
        self.tracker_run_id: str = sent.get("key") or token_hex(4)
        self.last_step: int = sent.get("step", -1)  # of the last row that was sent

    def send(self) -> int:
        """Send the rows after the last step that was sent; return their number."""
        new_rows = [row for row in log_with_speeds(self.folder) if row["step"] > self.last_step]
        if not new_rows:
            return 0
        if self.tracker is None:
            self.tracker = TRACKERS[self.tracker_name](self.config, self.folder, self.tracker_run_id)
        for row in new_rows:
            logged_at = row.get("speed", {}).get("at")
            self.tracker.send(row["step"], logged_at, numbers_by_name(row))
        self.last_step = new_rows[-1]["step"]
        self._write_sent()
        return len(new_rows)

    def _write_sent(self) -> None:
        """Write into tracked.json what this tracker was sent. Other trackers' feeds write it, too."""
        with locked(self.folder / f".{FILE}.lock"):
            sent_by_tracker = _read_sent(self.folder)
            sent_by_tracker[self.tracker_name] = {"key": self.tracker_run_id, "step": self.last_step}
            file.write(self.folder / FILE, json.dumps(sent_by_tracker, indent=2).encode(), writer="")

    def close(self) -> None:
        """Close the tracker, which first keeps what it was sent. `send` opens it again."""
        if self.tracker is not None:
            self.tracker.close()
            self.tracker = None


def _read_sent(folder: Path) -> dict[str, Any]:
    """What each tracker was sent, by its name: the id of its run, `key`, and the last `step`; {} before the first feed.

    Raises UserError where tracked.json is no JSON.
    """
    path = folder / FILE
    if not path.exists():
        return {}
    return read_json(path, "remove it, and all rows are sent to new runs")


def poll_forever(seconds: float) -> bool:
    """A `Pause` after which there is always another look."""
    time.sleep(seconds)
    return False


def feed(
    folders: Sequence[Path], tracker_name: str, pause: Pause | None = None, *, wait_for_lock: bool = False
) -> dict[Path, int]:
    """Send the logs of these runs to a tracker; return the number of rows that were sent of each.

    With `pause`, look again after each pause, until it says that the next look is the last. Only one process at a time
    sends a run to a tracker: where another does, wait for its end with `wait_for_lock`, else raise UserError. Raises
    UserError, too, where a run has no log, and where the tracker cannot be opened; and Stopped at a signal.
    """
    sent_rows = dict.fromkeys(folders, 0)
    with ExitStack() as locks, redirect_stdout(sys.stderr):  # trackers print to stdout, which is for answers
        for folder in folders:
            if not folder.is_dir():
                continue  # `Feed` says what is missing
            busy_message = (
                f"the log of {folder} is on its way to {tracker_name}, as it trains or by another dumo log: "
                "wait for its end"
            )
            lock = locked(folder / f".{tracker_name}.lock", None if wait_for_lock else busy_message)
            locks.enter_context(lock)
        feeds = [Feed(folder, tracker_name) for folder in folders]
        is_last_look = False
        try:
            while True:
                began = perf_counter()
                for run_feed in feeds:
                    sent_rows[run_feed.folder] += run_feed.send()
                if pause is None or is_last_look:
                    return sent_rows
                signals.check()
                seconds = perf_counter() - began
                is_last_look = pause(max(POLL_SECONDS, REST_SHARE * seconds))
        finally:
            for run_feed in feeds:
                run_feed.close()


def follow() -> None:
    """Send a run's log until stdin ends, as it does with the training, however that ends: `PROGRAM` calls it.

    Exits with the text of an error, whose last line `TrackerProcess` logs.
    """
    folder = Path(sys.argv[1])
    tracker_name = sys.argv[2]
    os.nice(10)  # the training comes first

    def wait_for_training_end(seconds: float) -> bool:
        readable, _, _ = select([sys.stdin], [], [], seconds)
        return bool(readable)

    log_file = folder / LOG_FILE
    has_ended = False
    while not log_file.is_file() and not has_ended:
        has_ended = wait_for_training_end(POLL_SECONDS)
    if not log_file.is_file():
        return
    try:
        # a training that was killed may have left a process that still sends its rows
        feed([folder], tracker_name, wait_for_training_end, wait_for_lock=True)
    except UserError as error:
        sys.exit(str(error))


def require_tracker(name: str) -> None:
    """Raise UserError where a tracker is unknown, or not installed."""
    require_known("tracker", name, TRACKERS)
    require_package(name, name, f"tracker {name}")


class TrackerProcess:
    """A process that sends the log of a run to a tracker as it trains.

    `start_or_check` is called after each step: the first starts the process, and the others see whether it still runs.
    Where it failed, or does not end, `log_line` is called with one line, and the training continues.
    """

    def __init__(self, folder: Path, tracker_name: str, log_line: Callable[[str], object]) -> None:
        """Start nothing yet. Raises UserError where the tracker is unknown, or not installed."""
        require_tracker(tracker_name)
        self.folder = folder
        self.tracker_name = tracker_name
        self.log_line = log_line
        self.process: subprocess.Popen[bytes] | None = None
        self.output = TemporaryFile()  # noqa: SIM115, closed in `close`; a pipe that nobody reads would fill up
        self.has_failed = False

    def start_or_check(self, state: State, record: Record) -> None:
        """Start the process, or see whether it still runs. Ranks other than the main one do nothing."""
        if self.has_failed or not dist.is_main():
            return
        if self.process is None:
            self._start()
        elif self.process.poll() is not None:
            self._log_failure(self._last_line())

    def _start(self) -> None:
        """Start the process, in which no module of the working folder is imported (-P)."""
        command = [sys.executable, "-P", "-c", PROGRAM, str(self.folder), self.tracker_name]
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # closes when training ends: the sign to finish
                stdout=self.output,
                stderr=self.output,
                start_new_session=True,  # Ctrl-C is for the training alone
            )
        except OSError as error:
            self._log_failure(str(error))

    def close(self, patience: float) -> None:
        """Give the process `patience` seconds to send the last rows, then kill it."""
        with self.output:
            if self.process is None:
                return
            with self.process:
                if self.has_failed:
                    return
                try:
                    self.process.communicate(timeout=patience)
                except subprocess.TimeoutExpired:
                    self.process.kill()
                    self._log_failure(f"the last rows took longer than {patience:g} s")
                    return
                if self.process.returncode:
                    self._log_failure(self._last_line())

    def _last_line(self) -> str:
        """The last line that the process printed, which names an error if there was one."""
        self.output.seek(0)
        text = self.output.read().decode(errors="replace").strip()
        if not text:
            return "it ended"
        return text.splitlines()[-1].strip()

    def _log_failure(self, reason: str) -> None:
        """Log that the process has failed, and do not check it again."""
        self.has_failed = True
        command = f"dumo log {shell_path(self.folder)} --to {self.tracker_name}"
        self.log_line(
            f"warning: {self.tracker_name} gets no more rows ({reason}); the training continues. "
            f"To send them:  {command}"
        )


@contextmanager
def live_feed(
    folder: Path, tracker_name: str | None, log_line: Callable[[str], object]
) -> Generator[Sequence[Every], None, None]:
    """Give the hooks by which a training sends its log to a tracker; none without a tracker.

    Raises UserError where the tracker is unknown, or not installed.
    """
    if tracker_name is None:
        yield ()
        return
    process = TrackerProcess(folder, tracker_name, log_line)
    patience = STOPPED_ROWS_SECONDS  # unless the training comes to its end
    try:
        yield [Every(1, process.start_or_check)]
        patience = LAST_ROWS_SECONDS
    finally:
        process.close(patience)
