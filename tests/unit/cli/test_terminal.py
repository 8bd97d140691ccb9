"""What a name holds is shown, not obeyed; a limit of the machine, and what the user can mend, are lines."""

import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import errors
from huggingface_hub.utils import hf_raise_for_status, validate_repo_id
from pydantic import BaseModel, ConfigDict

from dumo.cli.terminal import (
    MEMORY_FIX,
    err,
    explain,
    memory_hint,
    out,
    reopen_streams,
    show_lines,
    show_table,
    stoppable,
)
from dumo.runtime import progress
from dumo.runtime.formatting import escape_controls, escape_line
from dumo.runtime.progress import bar, print_line
from dumo.training.state import Diverged
from dumo.types import UserError

NAME = "a\x1b[31mb\x07c\x9b2Jd\re\u202ef\udc80"
SHOWN = r"a\x1b[31mb\x07c\x9b2Jd\re\u202ef\udc80"


def test_control_characters_are_spelt_out() -> None:
    assert escape_controls(NAME) == SHOWN
    assert escape_controls("a\tb\nc, é, 猫, 👩‍🚀") == "a\tb\nc, é, 猫, 👩‍🚀"
    assert escape_line("a\nb") == r"a\nb"


@pytest.mark.parametrize(
    ("encoding", "printed"), [("ascii", r"1 +- 2... \u732b"), ("latin-1", "1 ± 2... \\u732b"), ("utf-8", "1 ± 2… 猫")]
)
def test_a_terminal_without_utf_8_is_printed_to(encoding: str, printed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    reopen_streams()
    print_line("1 ± 2… 猫")
    sys.stderr.flush()
    assert sys.stderr.buffer.getvalue().decode(encoding) == f"{printed}\n"


def test_wherever_they_come_out(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "300")
    progress._console.cache_clear()
    with bar(NAME, 1) as tick:
        tick(1, NAME)
    moved = capsys.readouterr().err
    assert moved.count(SHOWN) >= 2
    assert "\x1b[31mb" not in moved
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0)
    with bar(f"x\n{NAME}", 1) as tick:
        tick(1, NAME)
    print_line(NAME)
    err.print(NAME, soft_wrap=True)
    show_lines([(NAME, NAME)])
    show_table(NAME, [{NAME: f"x\n{NAME}"}])
    out.print(NAME, soft_wrap=True)
    found = capsys.readouterr()
    assert found.err == f"x\\n{SHOWN}: 1 of 1, {SHOWN}\n{SHOWN}\n{SHOWN}\n"
    assert found.out.count(SHOWN) == 6
    assert not set(found.out) & {"\x1b", "\x07", "\x9b", "\r"}


CUDA = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB, 1.00 GiB of it free."


# The client of the Hub calls httpx or httpx2, depending on its version.
http: Any = import_module(errors.HTTPError.__module__)


class Steps(BaseModel):
    """A model with a field that is refused below."""

    model_config = ConfigDict(extra="forbid")
    steps: int = 1


def raised(call: Callable[[], object]) -> Exception:
    """The error that a call raises."""
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def hub_response(code: int, name: str) -> object:
    """An answer of the Hub that refuses a repository."""
    request = http.Request("GET", "https://huggingface.co/api/models/a/b")
    return http.Response(code, headers={"X-Error-Code": name}, request=request)


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (UserError("a\nb"), "a\nb", 2),
        (raised(lambda: Steps.model_validate({"steps": "x"})), "steps: Input should be a valid integer,", 2),
        (raised(lambda: Steps.model_validate({"setps": 3})), "setps: Extra inputs are not permitted, got 3", 2),
        (raised(lambda: yaml.safe_load("a: b: c")), "mapping values are not allowed here in", 2),
        (raised(lambda: Path("not/there").read_text()), "not/there: No such file or directory", 2),
        (PermissionError(errno.EACCES, "Permission denied", "a\nb"), r"a\nb: Permission denied", 2),
        (OSError(errno.ENOSPC, "No space left on device"), "reading or writing: No space left on device", 2),
        (OSError(errno.ENOSPC, "No space left on device", "run/x"), "run/x: No space left on device", 2),
        (OSError("a/b is no model\nSee the Hub."), "a/b is no model See the Hub.", 2),
        (
            raised(lambda: hf_raise_for_status(hub_response(403, "GatedRepo"))),
            "403 Client Error. Cannot access",
            2,
        ),
        (raised(lambda: hf_raise_for_status(hub_response(404, "RepoNotFound"))), "404 Client Error. Repository Not", 2),
        (raised(lambda: hf_raise_for_status(hub_response(500, ""))), "Server error '500 Internal Server Error'", 2),
        (raised(lambda: validate_repo_id("a/b/c")), "Repo id must be in the form", 2),
        (errors.OfflineModeIsEnabled("offline mode is enabled"), "offline mode is enabled", 2),
        (errors.RemoteEntryNotFoundError("no such file", response=hub_response(404, "")), "no such file", 2),
        (http.ConnectError("[Errno -2] Name or service not known"), "[Errno -2] Name or service not known", 2),
        (Diverged("step 3"), "step 3", 1),
        (torch.OutOfMemoryError(CUDA), f"out of memory at 2.50 GiB more: {MEMORY_FIX}", 1),
        (RuntimeError(f"rank 1: OutOfMemoryError: {CUDA}"), f"out of memory at 2.50 GiB more: {MEMORY_FIX}", 1),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), f"out of memory: {MEMORY_FIX}", 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_an_error_is_explained_in_one_line(error: Exception, line: str, code: int) -> None:
    message, exit_code = explain(error) or ("", 0)
    assert message.startswith(line)
    assert message.count("\n") == line.count("\n")
    assert exit_code == code


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("x"), KeyError("x"), TypeError("x")])
def test_any_other_error_is_a_bug(error: Exception) -> None:
    assert explain(error) is None


def test_too_little_memory_is_known_on_this_machine_and_has_a_way_out() -> None:
    with pytest.raises(RuntimeError) as torch_s, memory_hint("lower train.micro_batch"):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(MemoryError) as numpy_s, memory_hint("lower train.micro_batch"):
        np.empty(2**60, np.uint8)
    for raised in (torch_s, numpy_s):
        line, code = explain(raised.value) or ("", 0)
        assert line.startswith("out of memory at 1")
        assert line.endswith(" more: lower train.micro_batch")
        assert code == 1
    with pytest.raises(RuntimeError) as other, memory_hint("lower train.micro_batch"):
        raise RuntimeError(os.strerror(errno.EIO))
    assert not hasattr(other.value, "__notes__")


@pytest.mark.parametrize("between_pieces", [True, False])
def test_a_signal_is_noted_by_commands_that_stop_between_pieces(between_pieces: bool) -> None:
    """Other commands leave it to the system, so that the first signal ends them."""
    before, found = signal.getsignal(signal.SIGTERM), []
    stoppable(lambda: found.append(signal.getsignal(signal.SIGTERM)), between_pieces=between_pieces)()
    assert (found[0] is not before) == between_pieces
