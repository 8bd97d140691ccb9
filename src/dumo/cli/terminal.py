"""Terminal output of commands, with results on stdout and everything else on stderr, and exit codes.

`dumo.cli.run_command` calls `reopen_streams`, runs a command within `silenced_other_ranks` (under torchrun) and
`plain_warnings`, and prints the line that `explain` returns for an error. `stoppable` handles the signals of a command.
Commands print with `out`, `err`, `show_lines` and `show_table`, and add hints to an error or a stop with `memory_hint`
and `resume_hint`.
"""

import codecs
import errno
import faulthandler
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, nullcontext
from functools import wraps
from io import StringIO, TextIOWrapper
from typing import Any, NoReturn

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dumo.error import UserError
from dumo.io.read import brief
from dumo.runtime import signals
from dumo.runtime.formatting import escape_controls, escape_line
from dumo.runtime.progress import print_line


class PlainConsole(Console):
    """A console that prints text literally, without interpreting control characters and rich markup."""

    def __init__(self, **options: Any) -> None:  # noqa: ANN401, as rich has them
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:  # noqa: ANN401, as rich has them
        """Render a string as rich does, with its control characters made visible."""
        return super().render_str(escape_controls(text), **options)


out = PlainConsole()
err = PlainConsole(highlight=False, stderr=True)

# The exit code of a command that is ended by a signal is this plus the signal's number.
_STOPPED = 128
# A failed rank waits this long for rank 0 to print the same error, then prints the last lines of its own output.
_RANK_0_SECONDS = 5.0
_MAX_RANK_LINES = 30
_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|Unable to allocate|_STATUS_ALLOC_FAILED")
_MISSING_MEMORY = re.compile(r"allocate ([\d.]+ \w+)")
_HUB_PACKAGES = {"huggingface_hub", "httpx", "httpx2"}
MEMORY_FIX = "use a device with more memory (--device cpu takes the machine's), or stop other processes on it"


# Replacements for characters that a terminal without UTF-8 lacks.
_PLAIN_CHARACTERS = str.maketrans({"±": "+-", "−": "-", "…": "...", "·": ".", "–": "-", "→": "->", "²": "^2"})


def stoppable(command: Callable[..., None], *, between_pieces: bool = True) -> Callable[..., None]:
    """Wrap a command so that a signal ends it with one line and the exit code 128 + the signal (130 for Ctrl-C).

    `between_pieces`: stop between two pieces of work, and at once at a second signal. If false, the first signal ends
    the command at once.
    """

    @wraps(command)
    def run(*words: object, **options: object) -> None:
        try:
            with signals.listening(_acknowledge) if between_pieces else nullcontext():
                command(*words, **options)
        except signals.Stopped as stopped:
            print_line("; ".join([str(stopped), *getattr(stopped, "__notes__", [])]))
            raise typer.Exit(_STOPPED + stopped.number) from None
        except KeyboardInterrupt as interrupt:
            print_line("; ".join(["stopped", *getattr(interrupt, "__notes__", [])]))
            raise typer.Exit(_STOPPED + signal.SIGINT) from None

    return run


@contextmanager
def resume_hint(hint: str = "the same command resumes") -> Generator[None, None, None]:
    """Add a hint on how to resume the work to the message of a signal within the context."""
    try:
        yield
    except (signals.Stopped, KeyboardInterrupt) as stop:
        stop.add_note(hint)
        raise


def _acknowledge(number: int) -> None:
    """Acknowledge Ctrl-C. Writes to stderr directly, because the signal may interrupt a print."""
    if number == signal.SIGINT and sys.stderr.isatty():
        os.write(2, b"\nstopping after the current piece of work; press Ctrl-C again to stop at once\n")


def reopen_streams() -> None:
    """Open standard streams that were closed at the start (>&-), and replace characters that an encoding lacks.

    If a stream is closed, Python drops all output, and a file that is opened later, such as a checkpoint, could get the
    descriptor of the closed stream, to which C code prints. Writing to the new stdout fails; the new stderr discards
    its text. On a terminal without UTF-8, a missing character would end the command with a traceback.
    """
    streams = (("stdin", os.O_RDONLY, "r"), ("stdout", os.O_RDONLY, "w"), ("stderr", os.O_WRONLY, "w"))
    for name, flags, mode in streams:
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, flags), mode, closefd=False))
    codecs.register_error("plain_characters", _spell_out)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="plain_characters")


def _spell_out(error: UnicodeError) -> tuple[str, int]:
    """Return a replacement for characters that a stream's encoding lacks, and the position to continue at."""
    assert isinstance(error, UnicodeEncodeError)
    lacking = error.object[error.start : error.end].translate(_PLAIN_CHARACTERS)
    return lacking.encode("ascii", "backslashreplace").decode(), error.end


@contextmanager
def silenced_other_ranks() -> Generator[Callable[[int], NoReturn], None, None]:
    """Under torchrun, buffer the output of ranks above 0. Yields a function that exits the process with a code.

    A rank that fails waits for some seconds, then prints its buffered output. torchrun stops all ranks as soon as one
    has ended, so only rank 0 prints an error that all ranks raise. Ranks that have joined a process group skip Python's
    own shutdown, in which torch may abort after sharded training.
    """
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    stdout = sys.stdout
    stderr = sys.stderr
    held_back = StringIO()

    def leave(code: int) -> NoReturn:
        # A signal reaches all ranks, so rank 0 prints it.
        if rank and 0 < code < _STOPPED:
            time.sleep(_RANK_0_SECONDS)
            lines = held_back.getvalue().splitlines()[-_MAX_RANK_LINES:]
            print(*(f"rank {rank}: {line}" for line in lines), sep="\n", file=stderr)
        for stream in (stdout, stderr):
            try:
                stream.flush()
            except OSError:
                # The error was reported already, and Python would report it again at exit.
                sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        # `dumo --help` does not import dumo.runtime.dist.
        if getattr(sys.modules.get("dumo.runtime.dist"), "has_joined", False):
            os._exit(code)
        sys.exit(code)

    # Print the stack if torch crashes.
    if world_size > 1:
        faulthandler.enable(sys.__stderr__ or stderr)
    if rank:
        sys.stdout = held_back
        sys.stderr = held_back
    try:
        yield leave
    except Exception:
        if world_size == 1:
            raise
        traceback.print_exc()
        leave(1)


@contextmanager
def plain_warnings() -> Generator[None, None, None]:
    """Print warnings as plain lines on stderr, without the line of code that warns."""

    def show(message: Warning | str, *place: object) -> None:
        print_line(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        # Pillow warns about images of over 89 million pixels, but reads them.
        warnings.filterwarnings("ignore", "Image size .* could be decompression bomb", RuntimeWarning)
        # torch warns about its own code on the first torch.func.jvp.
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
        # torch warns that RMS norms in bf16 use the slower of two implementations.
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight", UserWarning)
        yield


def explain(error: BaseException) -> tuple[str, int] | None:
    """Return the line to print for an error and the exit code, or None for a bug, whose traceback is shown.

    Exit code 2 means an error in the user's input: UserError, values that pydantic rejects, invalid YAML, files that
    cannot be read or written (including a full disk), and errors of the Hugging Face Hub. Exit code 1 means that the
    machine or the run failed: out of memory, divergence.

    Error classes are looked up among the imported modules, so that no module is imported for it.
    """
    # Check for out of memory first, because the operating system raises it as OSError.
    if _is_out_of_memory(error):
        amount = _MISSING_MEMORY.search(str(error))
        message = f"out of memory at {amount[1]} more" if amount else "out of memory"
        hints = getattr(error, "__notes__", [MEMORY_FIX])
        return f"{message}: {'; '.join(hints)}", 1
    if _is_a(error, "dumo.training.state", "Diverged"):
        return str(error), 1

    if isinstance(error, UserError):
        return str(error), 2
    if _is_a(error, "pydantic", "ValidationError"):
        return _validation_line(error), 2
    if _is_a(error, "yaml", "YAMLError"):
        return _one_line(str(error)), 2
    if isinstance(error, OSError) and error.strerror:
        return escape_line(f"{error.filename or 'reading or writing'}: {error.strerror}"), 2
    if isinstance(error, OSError) or _is_of_the_hub(error):
        return _one_line(str(error)), 2
    return None


def _is_a(error: BaseException, module: str, name: str) -> bool:
    """Return whether an error is of this class. A class whose module was not imported cannot have been raised."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(error, kind)


def _is_of_the_hub(error: BaseException) -> bool:
    """Return whether the client of the Hugging Face Hub, or the HTTP library below it, defines the error's class.

    These classes share no base class. Without a network the HTTP library's own errors are raised.
    """
    return any(kind.__module__.partition(".")[0] in _HUB_PACKAGES for kind in type(error).__mro__)


def _validation_line(error: Any) -> str:  # noqa: ANN401, pydantic is not imported
    """Return one line with every field that pydantic rejected, its rule and its value."""
    problems: list[str] = []
    for problem in error.errors(include_url=False, include_context=False):
        field = ".".join(map(str, problem["loc"])) or error.title
        problems.append(f"{field}: {problem['msg']}, got {brief(repr(problem['input']))}")
    return _one_line("; ".join(problems))


def _one_line(text: str) -> str:
    """Join the lines of a text and escape its control characters."""
    return escape_line(" ".join(text.split()))


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means out of memory, on the host or on a GPU."""
    match error:
        case OSError():
            return error.errno == errno.ENOMEM
        case MemoryError():
            return True
        case RuntimeError():
            return bool(_OUT_OF_MEMORY.search(str(error)))
        case _:
            return False


@contextmanager
def memory_hint(hint: str) -> Generator[None, None, None]:
    """Add a hint on how to reduce memory use to the message of an out-of-memory error within the context."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if _is_out_of_memory(error):
            error.add_note(hint)
        raise


def show_lines(lines: Iterable[tuple[str, str]]) -> None:
    """Print pairs of a name and a text, one per line."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, text in lines:
        table.add_row(escape_line(name), escape_line(text))
    if table.row_count:
        out.print(table)


def show_table(title: str, rows: list[dict[str, Any]]) -> None:
    """Print a table of rows with equal keys. Long lines are wrapped, not truncated."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for key in rows[0]:
        table.add_column(escape_line(key), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    needed = PlainConsole(width=10_000).measure(table).maximum
    PlainConsole(width=max(out.width, needed)).print(table)


def _cell(value: object) -> str:
    """Return a value of a table as text."""
    return f"{value:.4g}" if isinstance(value, float) else escape_line(str(value))
