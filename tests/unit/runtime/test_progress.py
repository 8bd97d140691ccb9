"""How far a work is, where nobody watches: few lines, each of use."""

import sys
from functools import partial

import pytest

from dumo.runtime.progress import Bar, bar, bar_of_seconds, delayed_bar, log_bar, no_bar, print_line
from dumo.runtime.text import bytes_text, duration_text, number_text


class Clock:
    """Goes on when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_bars() -> None:
    for one in (bar, no_bar):
        assert isinstance(one, Bar)


def test_a_line_a_minute_and_one_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with log_bar("training run", 1500, clock=clock) as tick:
        tick(500, "")  # where it goes on
        for done in range(501, 1501):
            clock.now += 0.25
            tick(done, f"loss {1 / done:.4f}")
    assert capsys.readouterr().err.splitlines() == [
        "training run: 740 of 1,500 at 4/s, loss 0.0014, 3:10 left",
        "training run: 980 of 1,500 at 4/s, loss 0.0010, 2:10 left",
        "training run: 1,220 of 1,500 at 4/s, loss 0.0008, 1:10 left",
        "training run: 1,460 of 1,500 at 4/s, loss 0.0007, 0:10 left",
        "training run: 1,500 of 1,500 at 4/s, loss 0.0007, took 4:10",
    ]


def test_seconds_are_shown_as_a_clock_does(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with log_bar("training run", 360, clock=clock, are_seconds=True) as tick:
        for done in (0, 252, 360):
            clock.now = done
            tick(done, f"step {done // 4}")
    assert capsys.readouterr().err.splitlines() == [
        "training run: 4:12 of 6:00, step 63",
        "training run: 6:00 of 6:00, step 90",
        "training run: 6:00 of 6:00, step 90",
    ]
    assert bar_of_seconds(no_bar) is no_bar
    with bar_of_seconds(bar)("training run", 6) as tick:
        tick(6, "step 9")
    assert capsys.readouterr().err == "training run: 0:06 of 0:06, step 9\n"


def test_what_is_not_known_is_not_said(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with log_bar("sampling", 100, clock=clock) as tick:
        clock.now = 70
        tick(100, "")
    assert capsys.readouterr().err == "sampling: 100 of 100\nsampling: 100 of 100, took 1:10\n"
    with log_bar("sampling", 100, clock=clock):
        pass
    assert capsys.readouterr().err == "sampling: 0 of 100, took 0:00\n"
    with pytest.raises(KeyboardInterrupt), log_bar("sampling", 100, clock=clock):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("seconds", "said"), [(2, ""), (4, "decoding: 9 of 9 at 4/s, took 0:01\n")])
def test_short_work_shows_nothing(seconds: float, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Longer work is shown from the first tick after some seconds on."""
    clock = Clock()
    with delayed_bar("decoding", 9, clock=clock, inner=partial(log_bar, clock=clock)) as tick:
        tick(1, "")
        clock.now = seconds
        tick(5, "")
        clock.now += seconds / 4
        tick(9, "")
    assert capsys.readouterr().err == said


def test_a_terminal_gets_a_bar_that_moves(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with bar("sampling", 10) as tick:
        tick(10, "")
    assert "\x1b" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with bar("sampling", 10) as tick:
        tick(10, "a note")
    moved = capsys.readouterr().err
    assert "\x1b" in moved
    assert "10/10" in moved
    assert "a note" in moved
    with bar_of_seconds(bar)("training run", 360) as tick:
        tick(252, "")
    assert "4:12 of 6:00," not in capsys.readouterr().err
    monkeypatch.setenv("TERM", "dumb")
    with bar("sampling", 10) as tick:
        tick(10, "")
    assert "\x1b" not in capsys.readouterr().err


def test_a_bar_inside_another_is_shown_below_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that wrote by itself would take the line of the other."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with bar("judging", 10) as tick:
        tick(1, "")
        with delayed_bar("decoding", 9, after=0.0) as inner_tick:
            inner_tick(3, "")
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
