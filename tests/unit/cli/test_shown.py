"""What a name holds is shown, not obeyed."""

import sys

import pytest

from dumo.cli.terminal import err, out, show_lines, show_table
from dumo.runtime.progress import bar, inline, plain, say

NAME = "a\x1b[31mb\x07c\x9b2Jd\re\u202ef\udc80"
SHOWN = r"a\x1b[31mb\x07c\x9b2Jd\re\u202ef\udc80"


def test_control_characters_are_spelt_out() -> None:
    assert plain(NAME) == SHOWN
    assert plain("a\tb\nc, é, 猫, 👩‍🚀") == "a\tb\nc, é, 猫, 👩‍🚀"
    assert inline("a\nb") == r"a\nb"


def test_wherever_they_come_out(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "300")
    with bar(NAME, 1) as tick:
        tick(1, NAME)
    moved = capsys.readouterr().err
    assert moved.count(SHOWN) >= 2
    assert "\x1b[31mb" not in moved
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    with bar(f"x\n{NAME}", 1) as tick:
        tick(1, NAME)
    say(NAME)
    err.print(NAME, soft_wrap=True)
    show_lines([(NAME, NAME)])
    show_table(NAME, [{NAME: f"x\n{NAME}"}])
    out.print(NAME, soft_wrap=True)
    found = capsys.readouterr()
    assert found.err == f"x\\n{SHOWN}: 1 of 1, {SHOWN}, took 0:00\n{SHOWN}\n{SHOWN}\n"
    assert found.out.count(SHOWN) == 6
    assert not set(found.out) & {"\x1b", "\x07", "\x9b", "\r"}
