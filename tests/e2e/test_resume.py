"""Whatever stops a run, starting again makes the same run: after a kill, an interrupt, a full disk, or more steps."""

import json
import resource
import shlex
import shutil
import signal
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from e2e.shell import TINY, call, files, finish, start, wait
from tiers import tiered

OFTEN = ["train.log_every=1", "train.save_every=10", "train.keep=3", "train.schedule.kind=constant"]


def steps_logged(run: Path) -> list[int]:
    """The steps in the run's log, a torn last line left out."""
    file = run / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line)["step"] for line in text.split("\n")[:-1]]


def steps_saved(run: Path) -> list[int]:
    """The steps of its checkpoints."""
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def test_more_steps_are_the_same_as_many_at_once(here: Path) -> None:
    for name, steps in (("whole", 17), ("parts", 9)):
        assert call("train", "moons", "--out", name, *TINY, *OFTEN, f"train.steps={steps}").code == 0
    done = call("train", "parts", "train.steps=17")
    assert done.code == 0
    assert "17" in done.err
    last = "checkpoints/step-00000017"
    assert files(here / "parts" / last) == files(here / "whole" / last)
    for name in ("metrics.jsonl", "run.yaml"):
        assert (here / "parts" / name).read_bytes() == (here / "whole" / name).read_bytes(), name


@pytest.mark.slow
def test_fields_that_may_change_do_and_are_kept(here: Path, trained: dict[str, Path]) -> None:
    shutil.copytree(trained["moons"], here / "run")
    words = ["train.steps=22", "train.log_every=1", "train.save_every=2", "train.keep=1", "about=mine"]
    words += ["sample.nfe=[3]", "evaluate.protocol.samples=300", "sample.solver.kind=euler"]
    assert call("train", "run", *words).code == 0
    assert steps_saved(here / "run") == [22]
    assert steps_logged(here / "run") == [5, 10, 15, 20, 21, 22]
    kept = call("show", "run", "--json").json["spec"]
    assert (kept["train"]["steps"], kept["about"], kept["sample"]["nfe"]) == (22, "mine", [3])
    assert (kept["evaluate"]["protocol"]["samples"], kept["sample"]["solver"]["kind"]) == (300, "euler")


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is(here: Path, trained: dict[str, Path]) -> None:
    run = shutil.copytree(trained["moons"], here / "run")
    before = files(run)
    assert call("train", "run").code == 0
    assert files(run) == before


@pytest.mark.slow
@pytest.mark.parametrize("how", ["gone", "link", "loop", "file"])
def test_a_run_whose_checkpoints_cannot_be_seen_does_not_start_over(
    how: str, here: Path, trained: dict[str, Path]
) -> None:
    """Their disk is not mounted, readable or restored: nothing is written, and no line advises to remove a thing."""
    run = shutil.copytree(trained["moons"], here / "run")
    kept = (run / "checkpoints").rename(here / "disk")
    if how == "link":
        (run / "checkpoints").symlink_to(here / "unmounted/disk")
    elif how == "loop":
        (run / "checkpoints").symlink_to(run / "checkpoints")
    elif how == "file":
        (run / "checkpoints").write_bytes(b"")
    before = files(run) if how in ("gone", "file") else {}  # a link to nowhere cannot be read here, either
    for command in ("train", "sample") if how != "gone" else ("train",):
        done = call(command, "run")
        assert done.code == 2
        assert "run/checkpoints" in done.err
        assert "remove" not in done.err
    assert not before or files(run) == before

    if how != "gone":
        (run / "checkpoints").unlink()
    kept.rename(run / "checkpoints")
    assert call("train", "run").code == 0


@pytest.mark.slow
def test_a_run_without_its_checkpoints_and_log_starts_over(here: Path, trained: dict[str, Path]) -> None:
    run = shutil.copytree(trained["moons"], here / "run")
    before = files(run)
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").unlink()
    assert call("train", "run").code == 0
    assert {**files(run), "speed.jsonl": b""} == {**before, "speed.jsonl": b""}  # of the machine


@pytest.mark.slow
@pytest.mark.parametrize("name", ["state.json", "net/00000.safetensors"])
def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_damaged(
    name: str, here: Path, trained: dict[str, Path]
) -> None:
    """A link to itself fails as a disk or a permission does, for every user."""
    run = shutil.copytree(trained["moons"], here / "run")
    file = sorted((run / "checkpoints").iterdir())[-1] / name
    kept = file.rename(here / "kept")
    file.symlink_to(file)
    done = call("train", "run", "train.steps=1000")
    assert done.code == 2
    assert str(file.relative_to(here)) in done.err
    assert "remove" not in done.err
    file.unlink()
    kept.rename(file)
    assert call("sample", "run").code == 0


def test_interrupt_says_so_and_can_go_on(here: Path) -> None:
    run = here / "run"
    process = start("train", "moons", "--out", "run", *TINY, *OFTEN, "train.steps=1000000", cwd=here)
    wait(process, lambda: bool(steps_saved(run)))
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.code == 130, done
    assert done.out == ""
    assert "Traceback" not in done.err
    _, _, hint = done.err.rstrip().splitlines()[-1].partition("  dumo ")
    steps = steps_logged(run)[-1] + 3
    assert call(*shlex.split(hint), f"train.steps={steps}").code == 0  # as it was typed
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == [".saved"]
    assert steps_logged(run) == list(range(1, steps + 1))


@contextmanager
def files_up_to(size: int) -> Generator[None, None, None]:
    """As on a full disk: no file grows beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
def test_full_disk_keeps_the_last_good_checkpoint(here: Path) -> None:
    words = ["moons", *TINY, *OFTEN, "net.width=128"]  # weights larger than the log
    more = ["train.steps=40"]
    assert call("train", *words, "--out", "whole", *more).code == 0
    assert call("train", *words, "--out", "full").code == 0
    full = here / "full"
    before = files(full / "checkpoints")
    with files_up_to((full / "checkpoints/step-00000020/net/00000.safetensors").stat().st_size - 1):
        done = call("train", "full", *more)
    assert done.code == 2, done
    assert "full/checkpoints/.step-00000030.tmp/" in done.err
    assert files(full / "checkpoints") == before
    assert call("sample", "full", "--count", "2", "--nfe", "1").code == 0

    assert call("train", "full", *more).code == 0
    last = "checkpoints/step-00000040"
    assert files(full / last) == files(here / "whole" / last)
    assert steps_logged(full) == list(range(1, 41))


@pytest.mark.parametrize("size", tiered([4096, 100], ci=[4096]))
def test_full_disk_when_anything_else_is_written(size: int, here: Path, trained: dict[str, Path]) -> None:
    run = shutil.copytree(trained["moons"], here / "run")
    before = files(run)
    fresh = ["train", "moons", "--out", "new", *TINY, "train.log_every=1"]
    commands = [
        ["train", "run", "train.steps=40", "train.log_every=1"],
        fresh,
        ["evaluate", "run", "--nfe", "1"],
        ["sample", "run", "--count", "1000", "--nfe", "1", "--format", "npz"],
    ]
    # What the others write is less than the largest; a part of it is a harder case than nothing.
    for words in commands if size == 100 else commands[:2]:
        with files_up_to(size):
            done = call(*words)
        assert done.code == 2, (words, done)
        assert done.err.rstrip().splitlines()[-1].startswith("error: "), words
        assert "Traceback" not in done.err
    for name, kept in before.items():
        if name.startswith("checkpoints"):
            assert (run / name).read_bytes() == kept
    assert call("train", "run").code == call(*fresh).code == 0
