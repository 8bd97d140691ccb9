"""The command line as a user types it: `call` in this process, which has torch already, `start` in one of its own."""

import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch.distributed import TCPStore

from dumo import cli
from dumo.config.load import RUN_FILE
from dumo.io.audit import FILE as VERIFIED
from forked import ENVIRONMENT, Program, python
from meeting import outputs

PATIENCE = 240  # seconds, on a busy machine
Running = Program | subprocess.Popen[str]


def refuse(name: str) -> None:
    """NaN and infinity are no JSON."""
    raise ValueError(f"{name} is no JSON")


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:  # noqa: ANN401, what JSON holds
        """All of stdout as one strict JSON value."""
        return json.loads(self.out, parse_constant=refuse)


TINY = ["net.width=32", "net.depth=1", "train.batch=16", "train.steps=20", "evaluate.protocol.samples=500"]


def call(*words: object) -> Done:
    """`dumo WORDS`, through `main` as the installed command runs it; what it raises passes through as a traceback."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with patch.object(sys, "argv", ["dumo", *map(str, words)]), redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code
    return Done(code if isinstance(code, int) else 1, out.getvalue(), err.getvalue())


def start(*words: object, cwd: Path, first: str = "", env: Mapping[str, str] = ENVIRONMENT) -> Program:
    """`dumo WORDS` in a process of its own, after the statement `first`."""
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a background shell ignores it
    return python(f"{listen}\n{first}\nfrom dumo.cli import main\nmain()", *words, cwd=cwd, env=env)


def together(n: int, *words: object, cwd: Path) -> list[Done]:
    """What each of n ranks said of `dumo WORDS`; all must end well.

    They are told what torchrun tells its ranks, and meet in a store of this process, as in torchrun's.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started = ranks([words] * n, store, cwd=cwd)
    return [Done(0, *texts) for texts in outputs(started, PATIENCE)]


def apart(commands: Sequence[Sequence[object]], *, cwd: Path, counts: Sequence[int] = ()) -> list[Done]:
    """What each rank said of a command of its own, and how it ended; `counts`: how often torchrun restarted each."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return [finish(rank) for rank in ranks(commands, store, cwd=cwd, counts=counts)]


def ranks(
    commands: Sequence[Sequence[object]], store: TCPStore, *, cwd: Path, counts: Sequence[int] = ()
) -> list[Program]:
    """A rank for each command, told what torchrun tells it: that they meet in this store."""
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{store.port}", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    told |= {"WORLD_SIZE": f"{len(commands)}", "LOCAL_WORLD_SIZE": f"{len(commands)}", **ENVIRONMENT}
    started: list[Program] = []
    for k, words in enumerate(commands):
        mine = told | {"RANK": f"{k}", "LOCAL_RANK": f"{k}"}
        if counts:
            mine |= {"TORCHELASTIC_RESTART_COUNT": f"{counts[k]}"}
        started.append(start(*words, cwd=cwd, env=mine))
    return started


def finish(process: Running) -> Done:
    """Wait for its end."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    return Done(process.returncode, out, err)


def wait(process: Running, event: Callable[[], bool]) -> None:
    """Until the event has come; fails if the process ends before it."""
    late = time.monotonic() + PATIENCE
    while not event():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < late, "waited too long"
        time.sleep(0.002)


def tree(folder: Path, *, trains: bool = False) -> dict[str, bytes | int]:
    """Every file's bytes and every folder's time of change, by path: equal trees were not written to.

    Not the time of a run's folder, where a training `trains`: its lock comes and goes there. Nor the note in a cache on
    which shards were found whole, which whoever reads these may write, nor the time of the cache's folder.
    """
    noted = {path.parent for path in folder.rglob(VERIFIED)}

    def change(path: Path) -> int:
        return 0 if path in noted or (trains and (path / RUN_FILE).exists()) else path.stat().st_mtime_ns

    return {
        str(path.relative_to(folder)): change(path) if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.name != VERIFIED
    }


def files(folder: Path) -> dict[str, bytes]:
    """The bytes of every file, by path."""
    return {name: bits for name, bits in tree(folder).items() if isinstance(bits, bytes)}


def refused(*words: object, named: tuple[str, ...], lines: int | None = 1, run: Path | None = None) -> Done:
    """A command that must end with 2: plain words on stderr that name the thing, nothing on stdout, nothing written.

    It is `lines` long (None: any). What is watched is the folder we are in, and the run's.
    """
    assert not Path("pyproject.toml").exists(), "others write into the repository meanwhile: be in a folder of your own"
    watched = [Path.cwd(), *([run] if run else [])]
    trains = words[0] == "train"
    before = [tree(folder, trains=trains) for folder in watched]
    done = call(*words)
    assert done.code == 2, done
    assert done.out == ""
    assert "Traceback" not in done.err
    if "╭─ Error" not in done.err:  # the frame in which typer puts what it finds wrong itself
        said = done.err[done.err.find("error: ") :].rstrip().splitlines()
        assert said[0].startswith("error: "), done.err
        assert lines is None or len(said) == lines, done.err
    flat = " ".join(done.err.replace("│", " ").split())
    missing = [name for name in named if name not in flat]
    assert not missing, f"{missing} not in: {done.err}"
    after = [tree(folder, trains=trains) for folder in watched]
    assert [
        was | {name: 0 for name, time in now.items() if time == 0} for was, now in zip(before, after, strict=True)
    ] == after
    return done
