"""A folder of images is enough: what is there and what the machine makes of it say the rest."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from pyarrow.parquet import read_table, write_table

from dumo.config.load import load
from dumo.plan import photocaptions, proposal
from dumo.report import tracker
from dumo.runtime import door
from dumo.types import UserError
from e2e.shell import call, sets
from forked import ENVIRONMENT
from tiers import tiered

pytestmark = pytest.mark.filterwarnings("default:.* cannot be read:UserWarning")
QUICK = sets("net.width=8", "net.multipliers=[1, 1]", "net.attend=[]", "train.batch=4")


@pytest.fixture
def photos(here: Path) -> Path:
    """Cats and dogs, of noise, of 40 x 30 pixels, and a file that is no image."""
    draws = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (here / "photos" / name).mkdir(parents=True)
        for i in range(6):
            pixels = draws.integers(0, 256, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(here / "photos" / name / f"{i}.png")
    (here / "photos/dogs/broken.jpg").write_bytes(b"no image")
    return here / "photos"


@pytest.mark.slow
def test_a_folder_is_enough(photos: Path) -> None:
    done = call("train", "photos", "--yes", "--device", "cpu", *QUICK, *sets("train.steps=3"))
    assert done.code == 0, done
    for said in ("13 in 2 classes, 30 pixels", "1 of all looked at cannot be read", "24 x 24", "fp32, compile none"):
        assert said in " ".join(done.out.split()), done.out
    tree = yaml.safe_load(Path("runs/photos/run.yaml").read_text())
    found = tree["resolved"]["proposed"]
    assert found["data.side"] == 24
    assert (found["train.precision"], tree["train"]["precision"]) == ("fp32", "fp32")
    assert tree["train"]["steps"] == 3
    again = call("train", "photos", *sets("train.steps=4"))
    assert (again.code, load("runs/photos").train.steps) == (0, 4)
    assert "4 steps" in again.err
    assert again.err.endswith("dumo evaluate needs 20 images or more\n")
    assert "dumo evaluate runs" not in again.err
    assert load("runs/photos").data.classes == 2
    copied = call("show", "runs/photos", "--yaml")
    Path("mine.yaml").write_text(copied.out)
    assert load("mine.yaml").train.steps == 4


def test_what_cannot_be_written_or_tracked_is_refused_before_the_plan(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(*_: object, **__: object) -> None:
        raise AssertionError("it is planned")

    monkeypatch.setattr(proposal, "propose", plan)
    Path("results").mkdir()
    Path("results/notes.txt").touch()
    occupied = call("train", "photos", "--yes", "--out", "results")
    assert (occupied.code, "results" in occupied.err) == (2, True), occupied
    monkeypatch.setattr(tracker, "require_package", refuse_package)
    untracked = call("train", "photos", "--yes", "--track", "wandb")
    assert (untracked.code, "tracker wandb needs" in untracked.err) == (2, True), untracked
    assert not Path("runs").exists()


def refuse_package(package: str, extra: str, subject: str) -> None:
    raise UserError(f"{subject} needs {package}")


@pytest.mark.slow
def test_minutes_go_by_on_a_real_clock(photos: Path) -> None:
    """And a run that has ended goes on for more of them."""
    began = time.perf_counter()
    done = call("train", "photos", "--yes", "--minutes", "0.15", "--device", "cpu", *QUICK)
    assert done.code == 0, done
    assert "0:09, then it ends, with as many steps as it made" in " ".join(done.out.split())
    assert "training photos: 0:09 of 0:09, step " in done.err
    steps = load("runs/photos").train.steps
    assert f"trained {steps:,} steps" in done.err
    again = call("train", "photos", "--minutes", "0.1")
    assert "runs/photos has trained its 9 seconds. For more:  dumo train runs/photos --minutes 0.1" in again.err
    assert load("runs/photos").train.steps == steps
    more = call("train", "runs/photos", "--minutes", "0.1")
    assert more.code == 0, more
    assert "0:06 of 0:15 are left, from step" in " ".join(more.err.split())
    run = load("runs/photos")
    assert run.train.minutes == 0.25
    assert run.train.steps > steps
    assert 9 + 6 - 2 < time.perf_counter() - began < 300  # of a machine that may be busy


READING = sets("net.width=16", "net.depth=1", "net.attention=2", "train.batch=4", "train.steps=2")


@pytest.mark.nightly
def test_captions_are_read(photos: Path) -> None:
    for i in range(6):
        (photos / f"cats/{i}.txt").write_text(f"a cat, number {i}")
    refused = call("train", "photos", "--yes", "--device", "cpu", *READING)
    assert refused.code == 2
    assert "7 of 13 images without a caption: 'dogs/0.png', 'dogs/1.png', 'dogs/2.png' and 4 more" in refused.err
    assert not Path("runs").exists()
    for file in photos.glob("dogs/*"):
        file.with_suffix(".txt").touch()  # no caption, on purpose
    done = call("train", "photos", "--yes", "--device", "cpu", *READING)
    assert done.code == 0, done
    said = " ".join(done.out.split())
    assert "13, 30 pixels" in said  # captions are no classes
    assert "captions 6 different ones of 13 images, one each; 7 images have none; the net reads them" in said
    run = load("runs/photos")
    assert (run.data.captions.kind, run.net.kind, run.net.texts.kind) == ("files", "dit", "learned")
    assert run.net.texts.tokenizer.length == len("a cat, number 0") + 1
    assert call("sample", "runs/photos", "--prompt", "a dog", "--nfe", "1").code == 0
    assert call("train", "photos", *sets("train.steps=3")).code == 0

    # moved with its texts, it finds them
    Path("runs").rename("big")
    assert call("sample", "big/photos", "--prompt", "a dog", "--nfe", "1").code == 0
    assert call("train", "big/photos", *sets("train.steps=4")).code == 0
    assert not Path("runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("data.captions=null", "1 found, not used: --set data.captions=null says what the net reads"),
        ("net.kind=unet", "1 found, not used: --set net.kind=unet says what the net reads"),
    ],
)
def test_captions_that_are_not_read_are_said(
    photos: Path, monkeypatch: pytest.MonkeyPatch, field: str, said: str
) -> None:
    monkeypatch.setattr(proposal, "_step_seconds", lambda run, here: 0.5)
    monkeypatch.setattr(photocaptions, "package_problem", lambda package, extra: package)
    monkeypatch.setattr(photocaptions, "install_command", lambda extra: "pip install transformers")
    rows = [{"file_name": str(file.relative_to(photos)), "text": ""} for file in sorted(photos.rglob("*.*g"))]
    rows[1]["text"] = "a cat"
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with door.command_line():
        found = proposal.propose("photos", [field], device="cpu")
    assert " ".join(dict(found.lines())["captions"].split()) == said
    assert (found.run.net.kind, found.run.data.classes) == ("unet", 2)
    with pytest.raises(UserError, match=r"photos has 1 captions, .* needs transformers: pip install .*data.captions"):
        proposal.propose("photos", ["train.steps=3"], device="cpu")
    (photos / "metadata.jsonl").write_text('{"file_name": "cats/1.png", "text": ')
    assert "captions" not in dict(proposal.propose("photos", ["data.captions=null"], device="cpu").lines())
    monkeypatch.setattr(photocaptions, "package_problem", lambda package, extra: "")
    with pytest.raises(UserError, match=r"line 1 is not JSON.*data\.captions"):
        proposal.propose("photos", [], device="cpu")


@pytest.mark.slow
@pytest.mark.data
def test_a_table_of_captions_is_read(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real photographs, with a class and a text each: what was written of each says more."""
    monkeypatch.setattr(proposal, "_step_seconds", lambda run, here: 0.5)
    table = read_table(next(Path(os.environ["DUMO_DATA"], "imagenet-sample").glob("*.parquet"))).slice(0, 30)
    texts = [f"a photo of kind {label}" for label in table["label"].to_pylist()]
    write_table(table.append_column("text", [texts]), "photos.parquet")
    found = proposal.propose("photos.parquet", device="cpu")
    lines = dict(found.lines())
    assert lines["images"].startswith("30, ")
    assert lines["captions"].startswith("30 different ones of 30 images, one each; the net reads them")
    assert found.run.data.classes == 30
    named = proposal.propose(
        "photos.parquet", ["data.captions={kind: files, name: text}", "net.texts.depth=2"], device="cpu"
    ).run
    assert (named.data.classes, named.data.captions.name, named.net.texts.depth) == (30, "text", 2)
    without = proposal.propose("photos.parquet", ["data.captions=null"], device="cpu")
    assert without.run.data.kind == "latents"  # which no caption is read in
    assert "in 30 classes" in dict(without.lines())["images"]


def test_minutes_are_a_deadline_and_about_so_many_steps(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proposal, "_step_seconds", lambda run, here: 5.0)
    found = proposal.propose("photos", minutes=10, device="cpu")
    steps = found.run.train.steps
    assert (found.run.train.minutes, found.seconds) == (10, 600)
    assert dict(found.lines())["time"].startswith("10:00, then it ends, with as many steps as it made; 5 s a step")
    assert dict(found.lines())["steps"].startswith(f"about {steps:,} of 32 images: each image about ")
    assert steps == pytest.approx(600 / (5.0 * proposal.SLACK), rel=0.05)
    assert found.run.train.schedule.model_dump()["warmup"] == steps // proposal.WARMUP_SHARE
    assert proposal.propose("photos", device="cpu").seconds == 60 * proposal.DEFAULT_MINUTES
    by_steps = proposal.propose("photos", ["train.steps=7", "data.side=16"], device="cpu")
    assert (by_steps.run.train.steps, by_steps.run.train.minutes) == (7, None)
    assert by_steps.run.train.schedule.model_dump()["warmup"] == 7 // proposal.WARMUP_SHARE
    assert dict(found.lines())["images"].startswith("13 in 2 classes")
    by_setting = proposal.propose("photos", ["train.minutes=10"], device="cpu")
    assert (by_setting.run.train.minutes, by_setting.run.train.steps) == (10, steps)


def test_few_images_are_learned_before_the_time_is_over(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More steps copy them, and in time training breaks (docs/log.md)."""
    monkeypatch.setattr(proposal, "_step_seconds", lambda run, here: 0.1)
    found = proposal.propose("photos", minutes=10, device="cpu")
    # 1,500 times 12 images, by 32: one of the 13 cannot be read
    assert (found.run.train.steps, found.run.train.minutes) == (563, None)
    assert found.seconds < 600 / 2
    assert dict(found.lines())["ends early"].startswith("before 10 minutes: more steps on so few images copy them")
    longer = proposal.propose("photos", ["train.minutes=10"], device="cpu")
    assert longer.run.train.minutes == 10
    assert "ends early" not in dict(longer.lines())
    with_little_to_spare = proposal.propose("photos", minutes=1.5, device="cpu")  # 818 steps, and not twice 563
    assert with_little_to_spare.run.train.minutes == 1.5


@pytest.mark.parametrize("length", ["train.steps=5", "train.minutes=3"])
def test_minutes_and_steps_are_not_both_obeyed(photos: Path, length: str) -> None:
    """Nothing is looked at, and nothing is made."""
    done = call("train", "photos", "--yes", "--minutes", "1", "--device", "cpu", *sets(length))
    assert done.code == 2, done
    said = " ".join(done.err.split())
    assert f"--minutes 1 and --set {length} both say how long to train: give one of them" in said
    assert "looking at images" not in said
    assert not Path("runs").exists()
    with pytest.raises(UserError, match=r"minutes=1 and changes=.* both say how long"):
        proposal.propose("photos", [length], minutes=1.0, device="cpu")


ANSWERS = [("n\n", 1), ("\n", 0), ("y\n", 0)]


@pytest.mark.parametrize(("answer", "code"), tiered(ANSWERS, ci=ANSWERS[:1], id=repr))
def test_it_asks_on_a_terminal(photos: Path, monkeypatch: pytest.MonkeyPatch, answer: str, code: int) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(proposal, "_step_seconds", lambda run, here: 0.5)
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    done = call("train", "photos", "--device", "cpu", *QUICK, *sets("train.steps=1"))
    assert done.code == code, done
    assert "train? [Y/n]" in done.err
    assert Path("runs/photos").exists() == (code == 0)


@pytest.mark.slow
def test_ctrl_c_at_the_question_ends_it(photos: Path) -> None:
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell may ignore it
    program += "from dumo.plan import proposal; proposal._step_seconds = lambda run, here: 0.5\n"
    program += "from dumo.cli import main; main()"
    command = [sys.executable, "-c", program, "train", photos.name, "--device", "cpu", *QUICK, *sets("train.steps=1")]
    terminal, its_end = pty.openpty()
    running = subprocess.Popen(command, stdin=its_end, stdout=its_end, stderr=its_end, env=ENVIRONMENT)
    os.close(its_end)
    told = b""
    while b"train?" not in told:
        told += os.read(terminal, 1000)
    try:
        running.send_signal(signal.SIGINT)
        assert running.wait(timeout=10) == -signal.SIGINT
    finally:
        running.kill()
        running.wait()
        os.close(terminal)
    assert not Path("runs").exists()


@pytest.mark.slow
def test_what_cannot_be_proposed_is_said(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proposal, "_step_seconds", lambda run, here: 0.5)
    (photos.parent / "empty").mkdir()
    (photos.parent / "bad").mkdir()
    (photos.parent / "bad/one.png").write_bytes(b"no image")
    for words, said in (
        (("train", "photos", "--device", "cpu"), "give --yes"),
        (
            ("train", "empty", "--yes"),
            "empty has neither a run.yaml nor images, at any depth: give a folder with image files",
        ),
        (("train", "bad", "--yes"), "none of the 1 images that were looked at can be read"),
        (("train", "photos", "--yes", *sets("net.widht=3")), "net.widht: unknown key; did you mean 'width'"),
    ):
        done = call(*words)
        assert done.code == 2, done
        assert said in " ".join(done.err.replace("│", " ").split()), done.err
    assert not Path("runs").exists()
