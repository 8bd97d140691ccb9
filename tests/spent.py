"""What tests cost in processor seconds, file by file, whichever of the processes of a session ran them."""

import os
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

COLLECTION = "imports and collection"
SHOWN = 10  # files

seconds_by_file: Counter[str] = Counter()


def processor_seconds() -> float:
    """Of this process and of its children, also of those that still run, with what these have waited for."""
    user, system, children_user, children_system, _ = os.times()
    return user + system + children_user + children_system + sum(map(_seconds_of, _running_children()))


def _running_children() -> list[str]:
    """The servers of forked programs are some (forked.py, stock/recorder.py); none are known but on Linux."""
    found: list[str] = []
    for file in Path("/proc/self/task").glob("*/children"):
        with suppress(FileNotFoundError):  # the thread has ended meanwhile
            found += file.read_text().split()
    return found


def _seconds_of(pid: str) -> float:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # it ended meanwhile
        return 0.0
    fields = stat.rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def say(reporter: pytest.TerminalReporter) -> None:
    """The dearest files, and the sum."""
    if len(seconds_by_file) <= SHOWN:
        return
    reporter.section(f"the {SHOWN} dearest of {len(seconds_by_file)} files")
    for name, seconds in seconds_by_file.most_common(SHOWN):
        reporter.write_line(f"{seconds:7.1f} s of a processor  {name}")
    reporter.write_line(f"{seconds_by_file.total():7.1f} s in all")
