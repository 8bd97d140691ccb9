"""Programs in processes of their own that need not import torch first: each is forked from a server that has it.

The server is Python's own (multiprocessing's "forkserver"), one for all tests of a process. It only imports: it has no
threads and drew no random number. Signals, exit codes, files and limits of a program are as if Python had started it.
"""

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from multiprocessing import current_process, get_context, set_forkserver_preload
from multiprocessing.connection import Connection, wait
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from unittest.mock import patch

import dumo
from mutated_module import START_METHOD_VARIABLE

# What programs import, and torch leaves for later; not dumo.cli, which looks at the terminal when it is imported, nor
# all of scikit-learn, whose pyarrow starts a thread.
IMPORTED = [
    *("dumo.cli.api", "typer", "rich.console", "torch._dynamo", "torch._refs", "torch.distributed.fsdp"),
    *("scipy.stats", "PIL.Image", "peft", "diffusers.models.transformers.transformer_flux"),
]
TESTS = Path(__file__).parent
ROOTS = os.pathsep.join(map(str, (Path(dumo.__file__).parents[1], TESTS, TESTS.with_name("tools"))))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOTS, "COLUMNS": "80"}


class Program:
    """A program that runs, of the methods of `subprocess.Popen` those that tests use."""

    def __init__(self, text: str, words: tuple[str, ...], cwd: Path, env: Mapping[str, str], merged: bool) -> None:
        method = os.environ.get(START_METHOD_VARIABLE, "forkserver")
        if method == "forkserver":
            set_forkserver_preload(IMPORTED)
            with patch.dict(os.environ, ENVIRONMENT):
                ensure_running()
        context = get_context(method)
        pipes = [context.Pipe(duplex=False) for _ in range(1 if merged else 2)]
        self._open = [end for end, _ in pipes]
        self._said = {end: bytearray() for end in self._open}
        ends = tuple(end for _, end in pipes)
        self._process = context.Process(target=_run, args=(text, words, str(cwd), {**env}, ends[0], ends[-1]))
        self._process.start()
        for end in ends:
            end.close()

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        """Its exit code, minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, when it has ended, as `subprocess.Popen.wait` does."""
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired("program", timeout or 0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it said, when it has ended, as `subprocess.Popen.communicate` does."""
        late = None if timeout is None else time.monotonic() + timeout
        left = timeout
        while self._open:
            left = None if late is None else late - time.monotonic()
            if not (ready := wait(self._open, left)):
                raise subprocess.TimeoutExpired("program", timeout or 0)
            for end in self._open[:]:
                if end in ready:
                    self._said[end] += (part := os.read(end.fileno(), 2**16))
                    if not part:
                        self._open.remove(end)
        self._process.join(left)
        out, *err = (said.decode() for said in self._said.values())
        return out, "".join(err)


def python(text: str, *words: object, cwd: Path, env: Mapping[str, str] = ENVIRONMENT, merged: bool = False) -> Program:
    """`python -c TEXT WORDS` in this folder and environment; `merged`: stderr goes where stdout goes."""
    return Program(text, tuple(map(str, words)), cwd, env, merged)


def main_of(module: str, *words: object, cwd: Path) -> Program:
    """`main(*WORDS)` of a module of the tests, by their names from there on, all words as texts."""
    return python(f"import sys\nfrom {module} import main\nmain(*sys.argv[1:])", *words, cwd=cwd)


def _run(text: str, words: tuple[str, ...], cwd: str, env: dict[str, str], out: Connection, err: Connection) -> None:
    """What the process does; its exit code is that of the program."""
    for number, end in ((1, out), (2, err)):
        os.dup2(end.fileno(), number)
    out.close()
    err.close()
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = ["-c", *words]
    forked = type(current_process()).__name__ == "ForkProcess"
    if forked:  # from pytest, to which warnings are errors
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", UserWarning)
    exec(compile(text, "<string>", "exec"), {"__name__": "__main__"})
    if forked:  # begun by a thread that is not there to be waited for
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
