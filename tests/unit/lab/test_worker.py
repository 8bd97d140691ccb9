"""Every process of a plan reports its end, and none is left."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import trap
from dumo.config.change import override
from dumo.lab import worker as workers
from dumo.runtime import door, signals
from dumo.runtime.heartbeat import Lost
from dumo.training.state import Diverged
from dumo.types import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forked processes, which need not import torch; signals as in a fresh one."""
    serve = workers.serve

    def fresh(*given: object) -> None:
        signals.is_listening = False
        for number in signals.SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        serve(*given)

    monkeypatch.setattr(workers, "process_context", multiprocessing.get_context("fork"))
    monkeypatch.setattr(workers, "serve", fresh)


def nobody_is_left() -> bool:
    """Whether all processes have ended."""
    return multiprocessing.active_children() == []


def work(name: str) -> None:
    """What the name says: nothing, a signal, or an error."""
    if name.isupper():
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(60)
    if name == "diverged":
        raise Diverged("step 3 diverged")
    if name == "wrong":
        raise UserError("this is wrong")
    if name == "defect":
        raise KeyError(name)


def test_no_module_of_the_working_folder_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a process that starts afresh."""
    trap.lay(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(workers, "process_context", multiprocessing.get_context("spawn"))
    monkeypatch.setattr(workers, "serve", print)  # which needs no torch
    worker = workers.Worker(len, 1)
    worker.process.join()
    worker.pipe.close()
    assert worker.process.exitcode == 0
    assert trap.sprung(tmp_path) == []


def test_a_killed_process_is_known_by_its_work_and_the_others_go_on() -> None:
    pieces = ["a", "SIGKILL", "b", "c", "d"]
    done = dict(workers.run_side_by_side(work, pieces, jobs=2, threads=1))
    lost = done.pop("SIGKILL")
    assert isinstance(lost, Lost)
    assert str(lost) == "its process was ended by SIGKILL, as where memory is used up"
    assert done == dict.fromkeys("abcd")
    assert nobody_is_left()


@pytest.mark.parametrize(("num_gpus", "chosen"), [(0, [[], [], []]), (2, [[0], [0], [1]])])
def test_processes_are_spread_over_the_gpus(
    num_gpus: int, chosen: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three at a time; this machine may have no GPU."""
    set_gpus: list[int] = []
    monkeypatch.setattr(workers.torch.cuda, "set_device", set_gpus.append)

    def note(name: str) -> None:
        (tmp_path / name).write_text(str(set_gpus))

    list(workers.run_side_by_side(note, ["a", "b", "c"], jobs=3, threads=1, num_gpus=num_gpus))
    assert sorted(file.read_text() for file in tmp_path.iterdir()) == [str(gpus) for gpus in chosen]


def test_one_that_diverges_leaves_the_others(tmp_path: Path) -> None:
    done = dict(workers.run_side_by_side(work, ["a", "diverged", "b", "c"], jobs=2, threads=1))
    assert str(done.pop("diverged")) == "step 3 diverged"
    assert done == dict.fromkeys("abc")
    assert nobody_is_left()


def test_messages_name_options_as_they_were_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a process that starts afresh."""
    monkeypatch.undo()  # the forks
    with door.command_line(), pytest.raises(UserError, match=r"write --set train\.steps=2000"):
        list(workers.run_side_by_side(partial(override, {}), [["small"]], jobs=1, threads=1))


def long_work(folder: Path) -> Callable[[str], None]:
    """Work that goes on until it is to stop, and then saves what it has."""

    def long(name: str) -> None:
        (folder / f"{name}.began").touch()
        while not signals.poll():
            time.sleep(0.01)
        (folder / f"{name}.saved").touch()
        signals.check()

    def first(name: str) -> None:
        if name == "long":
            long(name)
        while not (folder / "long.began").exists():
            time.sleep(0.01)
        work(name)

    return first


def test_one_that_fails_stops_the_others_which_save(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="this is wrong"):
        list(workers.run_side_by_side(long_work(tmp_path), ["long", "wrong", "never"], jobs=2, threads=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.began", "long.saved"]
    assert nobody_is_left()


def test_a_defect_shows_where_it_arose() -> None:
    with pytest.raises(KeyError) as raised:
        list(workers.run_side_by_side(work, ["defect"], jobs=2, threads=1))
    assert "in work" in str(raised.value.__cause__)


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on(number: int, tmp_path: Path) -> None:
    """Also to a process that had it from the terminal or the scheduler; all save."""

    def interrupted(name: str) -> None:
        if name == "all":
            while not (tmp_path / "long.began").exists():
                time.sleep(0.01)
            os.kill(os.getppid(), number)
            os.kill(os.getpid(), number)
            time.sleep(2 * workers.POLL_SECONDS)
            (tmp_path / "all.saved").touch()
            signals.check()
        long_work(tmp_path)(name)

    with signals.listening(), pytest.raises(signals.Stopped):
        list(workers.run_side_by_side(interrupted, ["long", "all", "never"], jobs=2, threads=1))
    assert sorted(path.name for path in tmp_path.glob("*.saved")) == ["all.saved", "long.saved"]
    assert nobody_is_left()


def test_a_process_without_its_parent_ends(tmp_path: Path) -> None:
    """Its parent was killed."""

    def alone() -> None:
        list(workers.run_side_by_side(long_work(tmp_path), ["long"], jobs=2, threads=1))

    process = multiprocessing.get_context("fork").Process(target=alone)
    process.start()
    while not (tmp_path / "long.began").exists():
        time.sleep(0.01)
    process.kill()
    process.join()
    late = time.monotonic() + 20
    while not (tmp_path / "long.saved").exists():
        assert time.monotonic() < late
        time.sleep(0.01)
