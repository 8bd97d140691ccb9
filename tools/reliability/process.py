"""Real processes of the command line, on one rank or by torchrun: started, found and killed without a word."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from e2e.shell import ENVIRONMENT
from forked import Program

LOG = "log.txt"  # what the last start said, in the folder where it was started
Running = Program | subprocess.Popen[bytes]
PATIENCE = 300.0  # seconds: nothing here takes as long
TORCHRUN = ("-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")  # a free port


def start(
    words: Sequence[str],
    cwd: Path,
    ranks: int = 1,
    *,
    before: str = "",
    through: Sequence[str] = (),
    environment: Mapping[str, str] = ENVIRONMENT,
) -> "subprocess.Popen[bytes]":
    """`dumo WORDS` in this folder, by torchrun where there are several ranks; both streams go to its `LOG`.

    `before` is shell to run first, such as `ulimit -n 32`, `through` a command that takes another; the process is the
    same.
    """
    launcher = (*TORCHRUN, "--nproc-per-node", str(ranks)) if ranks > 1 else ()
    command = [sys.executable, "-P", *launcher, "-m", "dumo", *words]
    if before:
        command = ["sh", "-c", f'{before}; exec "$@"', "sh", *command]
    command = [*through, *command]
    with (cwd / LOG).open("wb") as log:
        return subprocess.Popen(
            command, cwd=cwd, env=dict(environment), stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )


def said(cwd: Path) -> str:
    """What the last start in this folder has said so far."""
    return (cwd / LOG).read_text(errors="replace") if (cwd / LOG).exists() else ""


def ended(process: Running, patience: float = PATIENCE) -> int:
    """Wait for its end; its exit code. Raises TimeoutExpired where it hangs, and ends it with all that it started."""
    try:
        return process.wait(patience)
    except subprocess.TimeoutExpired:
        kill([process.pid, *descendants(process.pid)])
        process.wait()
        raise


def finish(words: Sequence[str], cwd: Path, ranks: int = 1) -> int:
    """`dumo WORDS` to its end; its exit code."""
    return ended(start(words, cwd, ranks))


def workers(launcher: int, ranks: int) -> list[int]:
    """The processes that work, by rank, as far as they are there; the launcher itself where it is one."""
    if ranks == 1:
        return [launcher]
    found = {rank: pid for pid in descendants(launcher) if (rank := rank_of(pid)) is not None}
    return [found[rank] for rank in sorted(found)]


def descendants(pid: int) -> list[int]:
    """The processes that this one started, and those that they did, nearest first."""
    children: dict[int, list[int]] = {}
    for place in Path("/proc").iterdir():
        if place.name.isdecimal() and (parent := parent_of(int(place.name))) is not None:
            children.setdefault(parent, []).append(int(place.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found[1:]


def parent_of(pid: int) -> int | None:
    """Who started a process; None where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return None


def rank_of(pid: int) -> int | None:
    """The rank that torchrun gave a process; None where it gave none, or the process is gone."""
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((int(word[5:]) for word in words if word.startswith(b"RANK=")), None)


def alive(pid: int) -> bool:
    """Whether a process still works; one that is dead and not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def kill(pids: Sequence[int]) -> None:
    """SIGKILL to each, in this order."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def orphans(pids: Sequence[int], patience: float = 20.0) -> list[int]:
    """Those of these processes that do not end by themselves within so many seconds; they are killed then."""
    late = time.monotonic() + patience
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < late:
        time.sleep(0.05)
    kill(left)
    return left
