"""What tests cost in processor seconds, file by file, whichever of the processes of a session ran them."""

import os
from collections import Counter
from multiprocessing import forkserver
from pathlib import Path

import pytest

COLLECTION = "imports and collection"
SHOWN = 10  # files

seconds_by_file: Counter[str] = Counter()


def processor_seconds() -> float:
    """Of this process, of its children that ended, and of the server of forked programs with its own."""
    user, system, children_user, children_system, _ = os.times()
    return user + system + children_user + children_system + _server_seconds()


def _server_seconds() -> float:
    """That server (forked.py) does not end before this process, so Linux is asked; 0 on another system."""
    stat = Path(f"/proc/{forkserver._forkserver._forkserver_pid}/stat")
    if not stat.exists():
        return 0.0
    fields = stat.read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def say(reporter: pytest.TerminalReporter) -> None:
    """The dearest files, and the sum."""
    if len(seconds_by_file) <= SHOWN:
        return
    reporter.section(f"the {SHOWN} dearest of {len(seconds_by_file)} files")
    for name, seconds in seconds_by_file.most_common(SHOWN):
        reporter.write_line(f"{seconds:7.1f} s of a processor  {name}")
    reporter.write_line(f"{seconds_by_file.total():7.1f} s in all")
