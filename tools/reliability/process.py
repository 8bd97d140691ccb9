"""`dumo` commands in processes of their own, on one rank or under torchrun: start them, find them, kill them.

`start` begins a command in a folder, and what it prints goes to the file LOG there, which `read_log` reads.
`wait_for_exit` waits for its end; `run` starts a command and waits. `worker_pids` and `descendants` find the processes
that a command has started, `is_alive` asks whether one still runs. `kill` sends SIGKILL; `kill_orphans` first gives
processes time to end by themselves.

Processes are looked up in /proc, so all of this needs Linux.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from e2e.shell import ENVIRONMENT
from forked import Program

RunningCommand = Program | subprocess.Popen[bytes]

LOG = "log.txt"  # in a command's folder: what the last command there printed
COMMAND = Path(__file__).with_name("command.py")
MAX_SECONDS = 300.0  # of a command: none of ours takes as long, so it hangs
ORPHAN_SECONDS = 20.0  # that a worker has to end after its launcher: ours
TORCHRUN = ("-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")  # a free port


def start(words: Sequence[str], folder: Path, ranks: int = 1) -> "subprocess.Popen[bytes]":
    """Start `dumo WORDS` in a folder, under torchrun for several ranks; its output goes to LOG there."""
    launcher: Sequence[str] = ()
    if ranks > 1:
        launcher = (*TORCHRUN, "--nproc-per-node", str(ranks))
    command = [sys.executable, "-P", *launcher, str(COMMAND), *words]
    with (folder / LOG).open("wb") as log:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=dict(ENVIRONMENT),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def wait_for_exit(command: RunningCommand, max_seconds: float = MAX_SECONDS) -> int:
    """Wait until a command ends; return its exit code.

    Raises TimeoutExpired where it takes longer, having killed it and all processes that it started.
    """
    try:
        return command.wait(max_seconds)
    except subprocess.TimeoutExpired:
        kill([command.pid, *descendants(command.pid)])
        command.wait()
        raise


def run(words: Sequence[str], folder: Path, ranks: int = 1) -> int:
    """Run `dumo WORDS` in a folder to its end; return its exit code. Raises TimeoutExpired where it hangs."""
    return wait_for_exit(start(words, folder, ranks))


def read_log(folder: Path) -> str:
    """What the last command in a folder has printed so far; empty where there was none."""
    log = folder / LOG
    return log.read_text(errors="replace") if log.exists() else ""


# ---------------------------------------------------------------------------------------------------- finding processes


def worker_pids(launcher: int, ranks: int) -> list[int]:
    """The process ids of the ranks that a command has started by now, in the order of ranks.

    launcher: the command's own process id. On one rank it is the worker, too.
    """
    if ranks == 1:
        return [launcher]
    pid_by_rank: dict[int, int] = {}
    for pid in descendants(launcher):
        rank = _rank_of(pid)
        if rank is not None:
            pid_by_rank[rank] = pid
    return [pid_by_rank[rank] for rank in sorted(pid_by_rank)]


def descendants(pid: int) -> list[int]:
    """The ids of all processes below one: its children first, then their children, and so on."""
    children_by_parent: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        child = int(entry.name)
        stat = _stat_fields(child)
        if stat is not None:
            parent = int(stat[1])
            children_by_parent.setdefault(parent, []).append(child)
    pids = [pid]
    for parent in pids:  # the list grows while it is walked
        pids += children_by_parent.get(parent, [])
    return pids[1:]


def is_alive(pid: int) -> bool:
    """Whether a process still runs. A dead one that its parent has not waited for does not."""
    stat = _stat_fields(pid)
    if stat is None:
        return False
    state = stat[0]
    return state not in ("Z", "X")  # zombie, dead


def _stat_fields(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the third on: state, parent's id, ...; None where the process is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return text.rsplit(")", 1)[1].split()  # the second is the program's name in parentheses, and may have blanks


def _rank_of(pid: int) -> int | None:
    """The rank that torchrun gave a process; None where it gave none, or the process is gone."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    for variable in variables:
        if variable.startswith(b"RANK="):
            return int(variable.removeprefix(b"RANK="))
    return None


# ---------------------------------------------------------------------------------------------------- killing processes


def kill(pids: Sequence[int]) -> None:
    """Send SIGKILL to each process, in this order; those that are gone are passed over."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def kill_orphans(pids: Sequence[int]) -> list[int]:
    """Give processes ORPHAN_SECONDS to end by themselves, kill those that are left, and return their ids."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    orphans = [pid for pid in pids if is_alive(pid)]
    while orphans and time.monotonic() < deadline:
        time.sleep(0.05)
        orphans = [pid for pid in pids if is_alive(pid)]
    kill(orphans)
    return orphans
