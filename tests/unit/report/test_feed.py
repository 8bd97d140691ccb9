"""The rows of a log reach a tracker: as the log grows, is rewound, and is sent from again."""

import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import trap
from dumo import runtime
from dumo.config.load import dump, load
from dumo.io.guard import locked
from dumo.report import feed as feeds
from dumo.report import tracker
from dumo.report.feed import Feed, feed, live_feed, poll_forever
from dumo.run.train import train
from dumo.runtime import signals
from dumo.training import log
from dumo.training.loop import Every
from dumo.types import UserError
from unit.run import known

Sent = dict[str, list[tuple[int, dict[str, float]]]]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    """What a tracker that is called 'kept' was sent, by its key."""
    kept: Sent = {}

    class Kept:
        def __init__(self, config: dict[str, Any], folder: Path, key: str) -> None:
            self.rows = kept.setdefault(key, [])

        def send(self, step: int, logged_at: float | None, values: dict[str, float]) -> None:
            print("a tracker talks")
            self.rows.append((step, values))

        def close(self) -> None:
            pass

    monkeypatch.setitem(tracker.TRACKERS, "kept", Kept)
    return kept


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with two rows."""
    (tmp_path / "run.yaml").write_text(dump(load("moons")))
    for step in (10, 20):
        add(tmp_path, step)
    return tmp_path


def add(folder: Path, step: int, loss: float = 1.0, size: int = 7) -> None:
    """A row of the log, and its speed."""
    log.append(folder / "metrics.jsonl", {"step": step, "loss": loss / step, "bins": {"loss": [0.5, math.nan]}})
    log.append(folder / "speed.jsonl", {"step": step, "at": 1e9, "bytes": size})


def test_each_row_once(run: Path, sent: Sent, capsys: pytest.CaptureFixture[str]) -> None:
    assert feed([run], "kept") == {run: 2}
    assert feed([run], "kept") == {run: 0}
    add(run, 30)
    with (run / "metrics.jsonl").open("a") as opened:
        opened.write('{"step": 40, "lo')  # a row half-written
    assert feed([run], "kept") == {run: 1}
    (rows,) = sent.values()
    assert rows == [(n, {"train/loss": 1 / n, "train/bins/loss/0": 0.5, "speed/bytes": 7.0}) for n in (10, 20, 30)]
    assert capsys.readouterr().out == ""  # answers alone are on stdout


def test_a_run_that_was_stopped_goes_to_the_same_run_of_the_tracker(run: Path, sent: Sent) -> None:
    """The steps that it repeats were sent already, and stay as they were."""
    for step in (30, 40):
        add(run, step)
    following = Feed(run, "kept")
    assert following.send() == 4
    log.rewind(run / "metrics.jsonl", 10)
    assert following.send() == 0
    assert feed([run], "kept") == {run: 0}
    for step in (20, 30, 40, 50):
        add(run, step, loss=3.0)
    assert following.send() == 1
    add(run, 60)
    assert feed([run], "kept") == {run: 1}
    (rows,) = sent.values()
    assert [step for step, _ in rows] == [10, 20, 30, 40, 50, 60]
    assert [values["train/loss"] * step for step, values in rows] == pytest.approx([1, 1, 1, 1, 3, 1])
    (run / "tracked.json").unlink()
    assert feed([run], "kept") == {run: 6}
    assert len(sent) == 2


def test_trackers_that_are_sent_rows_at_once_are_all_noted(
    run: Path, sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tracker.TRACKERS, "other", tracker.TRACKERS["kept"])
    both = [Feed(run, "kept"), Feed(run, "other")]
    write = feeds.file.write

    def write_slowly(path: Path, data: bytes, *, writer: str) -> None:
        time.sleep(0.2)
        write(path, data, writer=writer)

    monkeypatch.setattr(feeds.file, "write", write_slowly)
    with ThreadPoolExecutor() as threads:
        list(threads.map(Feed.send, both))
    assert json.loads((run / "tracked.json").read_text()).keys() == {"kept", "other"}


@pytest.mark.nightly
def test_a_tracker_that_fails_or_hangs_leaves_the_training_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = known.tiny("moons", "train.log_every=1")
    train(run, tmp_path / "alone")
    monkeypatch.setattr(feeds, "LAST_ROWS_SECONDS", 0.2)
    said: dict[str, list[str]] = {}
    for name, program in {
        "fails": "import sys; print('a word'); sys.exit('no account')",
        "hangs": "import time; time.sleep(600)",
        "ends": "import sys; sys.stdin.read()",
    }.items():
        monkeypatch.setattr(feeds, "PROGRAM", program)
        said[name] = []
        with live_feed(tmp_path / name, "tensorboard", said[name].append) as hooks:
            train(run, tmp_path / name, hooks=[*hooks, Every(1, lambda *_: time.sleep(0.05))])
        assert known.bits(tmp_path / name) == known.bits(tmp_path / "alone")
    ((fails,), (hangs,), ends) = said.values()
    assert fails.startswith("warning: tensorboard gets no more rows (no account)")
    assert fails.endswith(f"dumo log {tmp_path}/fails --to tensorboard")
    assert "longer than 0.2 s" in hangs
    assert not ends


def test_no_module_of_the_working_folder_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap.lay(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(feeds, "PROGRAM", f"import {', '.join(trap.NAMES)}, sys; sys.stdin.read()")
    said: list[str] = []
    follower = feeds.TrackerProcess(tmp_path / "run", "tensorboard", said.append)
    follower.start_or_check(cast(Any, None), cast(Any, None))  # at the first step
    follower.close(patience=60)
    assert said == []
    assert trap.sprung(tmp_path) == []


def test_what_is_no_tracker_is_refused_before_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"tracker 'wanddb'.*wandb"), live_feed(tmp_path, "wanddb", print):
        pass
    monkeypatch.setattr(runtime, "installed_version", lambda name: None)
    with pytest.raises(UserError, match=r"tracker wandb needs wandb: .*install"):
        feeds.TrackerProcess(tmp_path, "wandb", print)


def test_following_ends_when_asked(run: Path, sent: Sent, monkeypatch: pytest.MonkeyPatch) -> None:
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        add(run, 20 + 10 * len(naps))
        if len(naps) == 3:
            monkeypatch.setattr(signals, "received_signal", 2)

    monkeypatch.setattr(feeds.time, "sleep", sleep)
    with pytest.raises(signals.Stopped):
        feed([run], "kept", poll_forever)
    (rows,) = sent.values()
    assert [step for step, _ in rows] == [10, 20, 30, 40, 50]


def test_what_is_wrong_is_named(run: Path, sent: Sent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"has no metrics.jsonl"):
        feed([tmp_path / "none"], "kept")
    with locked(run / ".kept.lock"), pytest.raises(UserError, match="is on its way to kept"):
        feed([run], "kept")
    (run / "tracked.json").write_text("{")
    with pytest.raises(UserError, match=r"tracked.json is not JSON .*remove it"):
        feed([run], "kept")
    with pytest.raises(UserError, match=r"tracker not_there needs the package .*pip install not_there"):
        tracker.import_package("not_there")


def test_a_tracker_that_does_not_open_says_what_to_do(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise ConnectionError("the hub is away.\nand more")

    monkeypatch.setattr(tracker, "import_package", lambda name: SimpleNamespace(init=init))
    with pytest.raises(UserError, match=r"^trackio: the hub is away\. Without TRACKIO_SPACE_ID"):
        feed([run], "trackio")


def test_values_are_numbers_by_name() -> None:
    row: dict[str, Any] = {"step": 3, "loss": None, "skipped": {"what": "loss", "count": 2, "rows": [{"t": 0.5}]}}
    assert tracker.numbers_by_name(row) == {"train/skipped/count": 2.0, "train/skipped/rows/0/t": 0.5}
    row = {"lr": 1, "grad_norm": 2, "probe": {"drift": 0.5, "ok": True}, "speed": {"at": 9.0, "bytes": 3}}
    assert tracker.numbers_by_name(row | {"val": {"mmd": 0.25, "mmd_sd": 0.125}}) == {
        "train/lr": 1.0,
        "train/grad_norm": 2.0,
        "train/probe/drift": 0.5,
        "speed/bytes": 3.0,
        "val/mmd": 0.25,
        "val/mmd_sd": 0.125,
    }


def test_tensorboard_reads_what_it_was_sent(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert feed([run], "tensorboard") == {run: 2}
    add(run, 30)
    assert feed([run], "tensorboard") == {run: 1}
    (folder,) = (run / "tensorboard").iterdir()
    assert folder.name == json.loads((run / "tracked.json").read_text())["tensorboard"]["key"]
    read = EventAccumulator(str(folder)).Reload()
    assert {"train/loss", "train/bins/loss/0", "speed/bytes"} == set(read.Tags()["scalars"])
    assert [(e.step, e.wall_time, round(e.value, 6)) for e in read.Scalars("train/loss")] == [
        (n, 1e9, round(1 / n, 6)) for n in (10, 20, 30)
    ]


@pytest.mark.nightly
def test_the_others_keep_two_runs_on_this_machine(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    program = (
        "import sys; from pathlib import Path; from types import SimpleNamespace; from dumo import cli\n"
        "from dumo.report import feed; from dumo.training import log\n"
        "def sleep(seconds):\n"
        "    for run in sys.argv[2:4]: log.append(Path(run) / 'metrics.jsonl', {'step': 30, 'loss': 0.1})\n"
        "    feed.time = SimpleNamespace(sleep=stop)\n"
        "def stop(seconds): raise KeyboardInterrupt\n"
        "feed.time = SimpleNamespace(sleep=sleep)\n"  # trackers sleep by themselves
        "cli.main()"
    )
    env = {**os.environ, "WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONWARNINGS": "ignore"}
    for name in ("wandb", "trackio"):
        for folder in (run, other):
            log.rewind(folder / "metrics.jsonl", 20)
        words = [sys.executable, "-c", program, "log", str(run), str(other), "--to", name, "--follow"]
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=240)
        assert (done.returncode, done.stdout) == (130, ""), done
    for folder in (run, other):
        assert list((folder / "wandb").glob("offline-run-*/run-*.wandb"))
        tracked = json.loads((folder / "tracked.json").read_text())
        assert {name: row["step"] for name, row in tracked.items()} == {"wandb": 30, "trackio": 30}
    with sqlite3.connect(tmp_path / "trackio/dumo.db") as base:
        rows = base.execute("select run_name, step from metrics order by run_name, step").fetchall()
    assert [step for _, step in rows] == [10, 20, 30] * 2
    assert len({name for name, _ in rows}) == 2
