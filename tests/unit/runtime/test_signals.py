"""A signal leaves word; a second one does what it did before; a child does not outlive who started it."""

import os
import signal
import threading

import pytest
import torch

from dumo.flow.path import Linear
from dumo.flow.solver import Euler
from dumo.runtime import signals
from dumo.runtime.signals import TORCHRUN_VARIABLE
from dumo.types import Cond, Readings, Sample, Time

pytestmark = pytest.mark.usefixtures("default_signals")


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_signal_is_heard_once(number: int) -> None:
    heard, ended = list[int](), list[int]()
    signal.signal(number, lambda n, frame: ended.append(n))
    ours = signal.getsignal(number)
    with signals.listening(heard.append):
        signals.check()
        os.kill(os.getpid(), number)
        assert (signals.poll(), heard, ended) == (number, [number], [])
        with pytest.raises(signals.Stopped) as stopped:
            signals.check()
        assert stopped.value.number == number
        os.kill(os.getpid(), number)
        assert ended == [number]
    assert signal.getsignal(number) is ours
    assert signals.poll() is None


def test_what_is_ignored_stays_so_and_other_threads_hear_nothing() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    with signals.listening():
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.poll() is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    found: list[bool] = []

    def listen() -> None:
        with signals.listening():
            found.append(signals.is_listening)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [False]


def test_within_another_the_outer_one_listens() -> None:
    with signals.listening():
        with signals.listening():
            os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.poll() == signal.SIGUSR1


def test_a_wait_in_c_is_ended_by_the_signal_itself() -> None:
    with signals.listening():
        handlers = [signal.getsignal(number) for number in signals.SIGNALS]
        with signals.default_handlers():
            assert {signal.getsignal(number) for number in signals.SIGNALS} == {signal.SIG_DFL}
        assert [signal.getsignal(number) for number in signals.SIGNALS] == handlers
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(signals.Stopped), signals.default_handlers():
            pass


def test_a_child_may_hear_one_word_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the scheduler, and from torchrun, which had it from there; what comes later is meant."""
    ended: list[int] = []
    signal.signal(signal.SIGTERM, lambda n, frame: ended.append(n))
    with signals.listening(child=True):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert (signals.poll(), ended) == (signal.SIGTERM, [])
        monkeypatch.setattr(signals, "REPEAT_SECONDS", 0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended == [signal.SIGTERM]


@pytest.mark.parametrize(
    ("environment", "child", "stops"),
    [
        ({}, None, False),
        ({TORCHRUN_VARIABLE: "1"}, None, True),
        ({}, True, True),
        ({TORCHRUN_VARIABLE: "1"}, False, False),
    ],
)
def test_without_whom_a_process_works_on(
    environment: dict[str, str], child: bool | None, stops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell may go; torchrun, or whoever has this process as a child, may not."""
    monkeypatch.delenv(TORCHRUN_VARIABLE, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "getppid", lambda: 1000)  # this one's own may be 1 already
    with signals.listening(child=child):
        assert signals.poll() is None
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert signals.poll() == (signal.SIGTERM if stops else None)


def test_it_says_what_stopped_it() -> None:
    assert [str(signals.Stopped(number)) for number in (2, 15)] == ["stopped", "stopped by SIGTERM"]


def test_a_solver_stops_between_two_passes() -> None:
    """And so do samples, evaluations, grids, reports and a teacher's pairs, which all ask one."""
    passes: list[float] = []

    def velocity(x: Sample, t: Time, c: Cond) -> Sample:
        passes.append(t[0].item())
        os.kill(os.getpid(), signal.SIGTERM)
        return x

    x, path = torch.ones(1, 2), Linear()
    with signals.listening(), pytest.raises(signals.Stopped):
        Euler()(Readings(velocity=velocity), path, x, torch.zeros(1).long(), 4, lambda k: x)
    assert passes == [1.0]
