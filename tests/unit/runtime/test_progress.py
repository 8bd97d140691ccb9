"""How far a work is, where nobody watches: few lines, each of use."""

import sys
import time

import pytest

from dumo.runtime.formatting import bytes_text, duration_text, number_text
from dumo.runtime.progress import Bar, bar, no_bar, print_line


def pretend_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make stderr look like a terminal."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")


def test_bars() -> None:
    for one in (bar, no_bar):
        assert isinstance(one, Bar)


def test_a_file_gets_a_line_a_minute(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with bar("training run", 1500) as tick:
        tick(500, "")  # of a run that is resumed
        for done in range(501, 1501):
            now += 0.25
            tick(done, f"loss {1 / done:.4f}")
    assert capsys.readouterr().err.splitlines() == [
        "training run: 740 of 1,500, 4/s, loss 0.0014, 3:10 left",
        "training run: 980 of 1,500, 4/s, loss 0.0010, 2:10 left",
        "training run: 1,220 of 1,500, 4/s, loss 0.0008, 1:10 left",
        "training run: 1,460 of 1,500, 4/s, loss 0.0007, 0:10 left",
    ]


def test_what_is_not_known_is_not_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with bar("sampling", 100) as tick:
        now = 70.0
        tick(100, "")
    assert capsys.readouterr().err == "sampling: 100 of 100\n"


def test_a_terminal_gets_a_bar_that_moves(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_terminal(monkeypatch)
    with bar("sampling", 10) as tick:
        tick(10, "a note")
    moved = capsys.readouterr().err
    assert "\x1b" in moved
    assert "10/10" in moved
    assert "a note" in moved
    monkeypatch.setenv("TERM", "dumb")
    with bar("sampling", 10) as tick:
        tick(10, "")
    assert not capsys.readouterr().err


def test_other_ranks_show_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_terminal(monkeypatch)
    monkeypatch.setenv("RANK", "1")
    with bar("sampling", 10) as tick:
        tick(10, "a note")
    assert not capsys.readouterr().err


def test_a_bar_inside_another_is_shown_below_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that wrote by itself would take the line of the other."""
    pretend_terminal(monkeypatch)
    with bar("judging", 10) as tick:
        tick(1, "")
        with bar("decoding", 9) as inner_tick:
            inner_tick(3, "")
            time.sleep(0.3)  # of which rich draws every tenth of a second
            capsys.readouterr()
            print_line("a line")
            frame = capsys.readouterr().err
    assert "judging" in frame
    assert "decoding" in frame


def test_spans_and_sizes() -> None:
    spans = [duration_text(s) for s in (0, 59.6, 61, 3599, 3600, 90061, -0.4, -61)]
    assert spans == ["0:00", "1:00", "1:01", "59:59", "1:00:00", "25:01:01", "0:00", "-1:01"]
    assert [number_text(value) for value in (0.1234, 99.9, 1234.5, -5000)] == ["0.123", "99.9", "1,234", "-5,000"]
    sizes = (0, 999, 1500, 562e6, 999.6e6, 1.234e9, 5e15, 7e19)
    assert [bytes_text(n) for n in sizes] == [
        "0 kB",
        "0.999 kB",
        "1.5 kB",
        "562 MB",
        "1 GB",
        "1.23 GB",
        "5 PB",
        "70,000 PB",
    ]
    assert [bytes_text(n, 1024) for n in (1024, 24 * 2**30)] == ["1 KiB", "24 GiB"]
