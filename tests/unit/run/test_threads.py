"""The number of threads of a run: chosen by its steps, recorded in its checkpoints, kept when it goes on."""

from pathlib import Path
from threading import current_thread, main_thread

import pytest
import torch

from dumo.cli.api import TrainedRun
from dumo.config.spec import Run
from dumo.io import digest
from dumo.report.evaluate import evaluate
from dumo.report.sample import sample_to_files
from dumo.run.train import train
from dumo.run.weights import RunFolder, open_run
from dumo.runtime import threads
from dumo.training import log, loop, manifest
from unit.run import known

WAITS = "1 thread, for 2 would wait: the machine is busy; OMP_NUM_THREADS=N sets another"


class Torch:
    """torch's number of threads, of a machine of two cores where nobody has set it; no thread is made."""

    def __init__(self) -> None:
        self.threads = 2

    def use(self, number: int) -> None:
        if current_thread() is main_thread():  # threads that make batches ahead have their own number
            self.threads = number


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> Torch:
    made = Torch()
    monkeypatch.setattr(torch, "get_num_threads", lambda: made.threads)
    monkeypatch.setattr(torch, "set_num_threads", made.use)
    monkeypatch.setattr(threads, "may_choose", lambda device: made.threads > 1)
    monkeypatch.setattr(threads, "cores", lambda: 2)
    monkeypatch.setattr(threads, "MAX_PAIRS", 1)
    monkeypatch.setattr(threads, "MAX_RESUME_SLOWDOWN", float("inf"))
    monkeypatch.setattr(threads, "_answer", None)
    monkeypatch.setattr(threads, "max_threads_without_waiting", lambda most: most)
    return made


def tiny(*more: str) -> Run:
    """Moons, of eight steps, with checkpoints of 2, 4, 6 and 8."""
    return known.tiny("moons", "train.batch=8", "train.steps=8", "train.log_every=2", "train.keep=9", *more)


@pytest.fixture(scope="module")
def moons(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with one thread, as the tests have it. Not to be written to."""
    folder = tmp_path_factory.mktemp("run") / "moons"
    train(tiny(), folder)
    return open_run(str(folder))


def recorded(folder: Path) -> dict[int, tuple[int | None, int | None]]:
    """Threads and cores that the checkpoints of a run record, by step."""
    found = {step: manifest.read(place) for step, place in manifest.paths_by_step(folder / "checkpoints").items()}
    return {step: (about.threads, about.cores) for step, about in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("clearly", "number"), [(float("inf"), 1), (0.0, 2)])
def test_the_number_is_chosen_recorded_and_kept(
    two_cores: Torch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clearly: float, number: int
) -> None:
    monkeypatch.setattr(threads, "MIN_SPEEDUP", clearly)
    said: list[str] = []
    train(tiny("train.save_every=2"), tmp_path / "run", tell=said.append)
    assert len([line for line in said if "OMP_NUM_THREADS" in line]) == 1
    assert two_cores.threads == 2  # as before
    assert recorded(tmp_path / "run") == dict.fromkeys((2, 4, 6, 8), (number, 2))

    again: list[str] = []
    taken: list[int] = []
    seen = loop.Every(1, lambda state, record: taken.append(two_cores.threads))
    train(tiny("train.save_every=2", "train.steps=14"), tmp_path / "run", tell=again.append, hooks=[seen])
    word = "1 thread" if number == 1 else "2 threads"
    assert f"{word}, as up to step 8; OMP_NUM_THREADS=N sets another" in again
    assert recorded(tmp_path / "run")[14] == (number, 2)
    assert taken == [number] * 6


@pytest.mark.slow
def test_steps_on_trial_leave_the_run_as_it_is(
    two_cores: Torch, monkeypatch: pytest.MonkeyPatch, moons: RunFolder, tmp_path: Path
) -> None:
    """To the bit, and a run has one number of threads from its first step."""
    monkeypatch.setattr(threads, "MAX_PAIRS", 3)
    monkeypatch.setattr(threads, "MIN_SPEEDUP", float("inf"))
    taken: list[int] = []
    train(tiny(), tmp_path / "run", hooks=[loop.Every(1, lambda state, record: taken.append(two_cores.threads))])
    assert taken == [1] * 8
    ours = open_run(str(tmp_path / "run")).net.state_dict()
    assert all(value.equal(ours[name]) for name, value in moons.net.state_dict().items())
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (moons.folder / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_a_number_of_other_cores_is_chosen_anew(
    two_cores: Torch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(threads, "MIN_SPEEDUP", float("inf"))
    train(tiny(), tmp_path / "run")
    monkeypatch.setattr(threads, "cores", lambda: 16)
    monkeypatch.setattr(threads, "MIN_SPEEDUP", 0.0)
    train(tiny("train.steps=12"), tmp_path / "run")
    assert recorded(tmp_path / "run")[12] == (2, 16)


def test_a_number_that_was_set_is_recorded(moons: RunFolder) -> None:
    assert set(recorded(moons.folder).values()) == {(1, threads.cores())}


def test_a_checkpoint_from_before_threads_were_kept_keeps_its_checksum(moons: RunFolder) -> None:
    about = moons.checkpoint.manifest
    older = about.model_copy(update={"threads": None, "cores": None})
    assert older.checksum() == digest.short(older.model_dump_json(exclude={"sum", "threads", "cores"}))
    assert about.checksum() != older.checksum()  # what is recorded is in it


@pytest.mark.slow
def test_a_faster_machine_before_is_no_reason_to_measure_again(
    two_cores: Torch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its rows are in the same speed.jsonl."""
    monkeypatch.setattr(threads, "MIN_SPEEDUP", 0.0)
    train(tiny(), tmp_path / "run")
    file = tmp_path / "run/speed.jsonl"
    rows = log.read_log(file)
    for row in rows:
        row["steps_per_second"] = 1e9
    file.write_text("".join(map(log.to_line, rows)))
    monkeypatch.setattr(threads, "WINDOW_SECONDS", 0.0)
    monkeypatch.setattr(threads, "WINDOWS", 1)
    monkeypatch.setattr(threads, "MAX_SLOWDOWN", 1e4)
    taken: list[int] = []
    seen = loop.Every(1, lambda state, record: taken.append(two_cores.threads))
    train(tiny("train.steps=12"), tmp_path / "run", hooks=[seen])
    assert taken == [2] * 4


@pytest.mark.parametrize("door", ["dumo sample", "run.sample", "dumo evaluate"])
def test_samples_are_made_with_fewer_threads_on_a_busy_machine(
    two_cores: Torch,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    moons: RunFolder,
    tmp_path: Path,
    door: str,
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(threads, "max_threads_without_waiting", lambda most: 1)
    moons.net.register_forward_pre_hook(lambda net, inputs: taken.append(two_cores.threads))
    if door == "dumo sample":
        sample_to_files(moons, tmp_path, count=8, nfe=[1], bar=known.Seen())
    elif door == "run.sample":
        TrainedRun(moons).sample(count=8, nfe=1, bar=known.Seen())
    else:
        evaluate(moons, nfe=[1], bar=known.Seen())
    assert set(taken) == {1}
    assert capsys.readouterr().err.splitlines().count(WAITS) == 1
    assert two_cores.threads == 2
