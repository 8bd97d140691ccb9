"""The rows of a run's log on their way to a tracker: each once, however often this is stopped.

They are sent afterwards (`feed`), or as a run trains by a process of its own that reads the same log (`live`): whatever
a tracker does there, with time, memory, threads or random numbers, it does not do in the training.

tracked.json in the run's folder says what each tracker was sent. A run that was stopped goes on from its last
checkpoint and logs the steps after it again, to the bit: they are not sent again. Where they differ, as after going
back to an earlier checkpoint with another learning rate, all rows go to a new run of the tracker.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from itertools import accumulate
from pathlib import Path
from secrets import token_hex
from select import select
from tempfile import TemporaryFile
from time import perf_counter
from typing import Any

from dumo.config.error import require_known
from dumo.config.source import read
from dumo.io import file
from dumo.io.read import read_json
from dumo.report.tracker import NAMES, TRACKERS, Tracker, values
from dumo.run.speed import LOG, logged
from dumo.runtime import dist, install, installed, signals, typed
from dumo.training.log import Row, cut, read_log
from dumo.training.loop import Every
from dumo.training.record import Record
from dumo.training.state import State
from dumo.types import UserError

FILE = "tracked.json"
POLL = 1.0  # seconds between looks at a log that may grow
IDLE = 20  # times as long as a look took, at least: a long log is looked at less often. Ours
PATIENCE, HURRY = 30.0, 5.0  # seconds that a tracker has for the last rows of a run, and of one that was stopped: ours
PROGRAM = "from dumo.report.feed import follow; follow()"  # with the folder and the tracker
Pause = Callable[[float], bool]  # waits some seconds, and says whether what is there then is the last


class Feed:
    """One run's log to one tracker, which opens when there is something to send."""

    def __init__(self, folder: Path, kind: str) -> None:
        """Go on where the last feed ended. Raises UserError where there is no run, or no log yet."""
        rows = logged(folder)
        self.folder, self.kind, self.config = folder, kind, read(folder).tree
        self.tracker: Tracker | None = None
        self.looked: tuple[int, int, int] | None = None  # at which file, when
        past = self.past().get(kind)
        self.key: str = past["key"] if past else token_hex(4)
        self.chain: list[str] = []  # the digests of what was sent
        if past and past.get("names") == NAMES:
            self.chain = chain_of(rows, undone(folder / LOG), past["rows"], past["digest"])
        self.anew = bool(past) and not self.chain

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
        sent = {"key": self.key, "rows": len(chain), "digest": chain[-1], "names": NAMES}
        now = {**self.past(), self.kind: sent}
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


def nap(seconds: float) -> bool:
    """A pause after which there may be more."""
    time.sleep(seconds)
    return False


def feed(folders: Sequence[Path], kind: str, pause: Pause | None = None, *, wait: bool = False) -> dict[Path, int]:
    """Send the logs of these runs to a tracker; how many rows of each were new.

    `pause`: go on as they grow, until it says so, or stopped. Raises UserError as `Feed` and the tracker do, and, or
    else it will `wait`, where another process sends one of them there; Stopped at a signal.
    """
    sent, last = dict.fromkeys(folders, 0), pause is None
    with ExitStack() as held, redirect_stdout(sys.stderr):  # where trackers say what they do
        for folder in filter(Path.is_dir, folders):
            busy = f"the log of {folder} is on its way to {kind}, as it trains or by another dumo log: wait for its end"
            held.enter_context(file.locked(folder / f".{kind}.lock", None if wait else busy))
        feeds = [Feed(folder, kind) for folder in folders]
        try:
            while True:
                began = perf_counter()
                for one in feeds:
                    sent[one.folder] += one.send()
                if last or pause is None:
                    return sent
                signals.check()
                last = pause(max(POLL, IDLE * (perf_counter() - began)))
        finally:
            for one in feeds:
                one.close()


def follow() -> None:
    """Send the log of a run that trains, as `feed`, until stdin ends, as it does where the training is killed.

    The folder and the tracker are the command line's.
    """
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    os.nice(10)  # the training comes first

    def ended(seconds: float) -> bool:
        return bool(select([sys.stdin], [], [], seconds)[0])

    while not (folder / LOG).is_file():
        if ended(POLL) and not (folder / LOG).is_file():
            return
    try:
        feed([folder], kind, ended, wait=True)  # for who followed the run before it was killed
    except UserError as error:
        sys.exit(str(error))


class Live:
    """A process that sends the log of a run to a tracker as it trains: begun at the first step, looked at after each.

    Where it fails, or does not end, `tell` hears so once, and the training goes on.
    """

    def __init__(self, folder: Path, kind: str, tell: Callable[[str], object]) -> None:
        """Begin nothing yet. Raises UserError for no tracker of this kind, or one that is not installed."""
        require_known("tracker", kind, TRACKERS)
        if not installed(kind):
            raise UserError(f"tracker {kind} needs the package {kind}: {install(kind)}")
        self.folder, self.kind, self.tell = folder, kind, tell
        self.process: subprocess.Popen[bytes] | None = None
        self.words = TemporaryFile()  # noqa: SIM115, what the process says, which may be much
        self.failed = False

    def look(self, state: State, record: Record) -> None:
        """Begin it, or see whether it is still there; on the main rank."""
        if self.failed or not dist.is_main():
            return
        if self.process is None:
            self.start()
        elif self.process.poll() is not None:
            self.fail(self.last_words())

    def start(self) -> None:
        """Begin it. No module of the folder we are in is imported there (-P)."""
        command = [sys.executable, "-P", "-c", PROGRAM, str(self.folder), self.kind]
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # closes when training ends: the sign to finish
                stdout=self.words,
                stderr=self.words,
                start_new_session=True,  # Ctrl-C is for the training alone
            )
        except OSError as error:
            self.fail(str(error))

    def close(self, patience: float) -> None:
        """No more rows come: give it some seconds to send what is there."""
        with self.words, self.process or nullcontext() as process:
            if process is None or self.failed:
                return
            try:
                process.communicate(timeout=patience)
                if process.returncode:
                    self.fail(self.last_words())
            except subprocess.TimeoutExpired:
                process.kill()
                self.fail(f"the last rows took longer than {patience:g} s")

    def last_words(self) -> str:
        """The last line that it said: of an error, what it was."""
        self.words.seek(0)
        lines = self.words.read().decode(errors="replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "it ended")

    def fail(self, why: str) -> None:
        """Say so, and look no more."""
        self.failed = True
        way = f"dumo log {typed(self.folder)} --to {self.kind}"
        self.tell(f"warning: {self.kind} gets no more rows ({why}); the training needs it not. To send them:  {way}")


@contextmanager
def live(folder: Path, kind: str | None, tell: Callable[[str], object]) -> Generator[Sequence[Every], None, None]:
    """Hooks by which a training sends its log to a tracker, if one is given, all of it by the end. Raises as `Live`."""
    if kind is None:
        yield ()
        return
    one, patience = Live(folder, kind, tell), HURRY
    try:
        yield [Every(1, one.look)]
        patience = PATIENCE
    finally:
        one.close(patience)


def chain_of(rows: Sequence[Row], undone: Sequence[Sequence[Row]], count: int, digest: str) -> list[str]:
    """The digests of what was sent, `count` rows of which the last has this one; [] where it is no more known what was.

    It is in the log, or in that and in what a stop undid of it: that may come again, and is not sent again.
    """
    chain, there = digests(rows), {measured(row) for row in rows}
    for block in ((), *undone):
        lost = [row for row in block if measured(row) not in there]
        kept = sum(not lost or row["step"] < lost[0]["step"] for row in rows)
        whole = [*chain[:kept], *digests(lost, chain[kept - 1] if kept else "")]
        if 0 < count <= len(whole) and whole[count - 1] == digest:
            return whole[:count]
    return []


def undone(path: Path) -> list[list[Row]]:
    """The rows that stops undid of a log, the last first; of stops further and further on those of all as one."""
    blocks = list[list[Row]]()
    for row in read_log(cut(path)):
        if not blocks or row["step"] <= blocks[-1][-1]["step"]:
            blocks.append([])
        blocks[-1].append(row)
    return blocks[::-1]


def measured(row: Row) -> str:
    """What the run measured, not the machine's speed."""
    return json.dumps({name: value for name, value in row.items() if name != "speed"}, sort_keys=True)


def digests(rows: Sequence[Row], before: str = "") -> list[str]:
    """A digest after each row, of all rows up to it and of those `before`."""

    def add(digest: str, row: Row) -> str:
        return hashlib.sha256((digest + measured(row)).encode()).hexdigest()

    return [*accumulate(rows, add, initial=before)][1:]
