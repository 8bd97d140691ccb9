"""A folder of images is enough: what is there and what the machine makes of it say the rest."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from dumo.run.config.load import load
from dumo.run.plan import proposal
from e2e.shell import call, sets

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


def test_a_folder_is_enough(photos: Path) -> None:
    done = call("train", "photos", "--yes", "--minutes", "0.5", "--device", "cpu", *QUICK, *sets("train.steps=3"))
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
    assert load("runs/photos").data.classes == 2
    copied = call("show", "runs/photos", "--yaml")
    Path("mine.yaml").write_text(copied.out)
    assert load("mine.yaml").train.steps == 4


def test_minutes_are_steps(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proposal, "step_seconds", lambda run, here: 0.5)
    found = proposal.propose("photos", minutes=10, device="cpu")
    steps = found.run.train.steps
    assert 600 * 0.95 < found.seconds < 600 * 1.05
    assert steps == pytest.approx(600 / (0.5 * proposal.SLACK), rel=0.05)
    assert found.run.train.schedule.model_dump()["warmup"] == steps // proposal.WARMUP
    assert proposal.propose("photos", device="cpu").seconds == pytest.approx(60 * proposal.MINUTES, rel=0.05)
    assert proposal.propose("photos", ["train.steps=7", "data.side=16"], device="cpu").run.train.steps == 7
    assert dict(found.lines())["images"].startswith("13 in 2 classes")


@pytest.mark.parametrize(("answer", "code"), [("n\n", 1), ("\n", 0), ("y\n", 0)])
def test_it_asks_on_a_terminal(photos: Path, monkeypatch: pytest.MonkeyPatch, answer: str, code: int) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(proposal, "step_seconds", lambda run, here: 0.5)
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    done = call("train", "photos", "--device", "cpu", *QUICK, *sets("train.steps=1"))
    assert done.code == code, done
    assert "train? [Y/n]" in done.err
    assert Path("runs/photos").exists() == (code == 0)


def test_what_cannot_be_proposed_is_said(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proposal, "step_seconds", lambda run, here: 0.5)
    (photos.parent / "empty").mkdir()
    (photos.parent / "bad").mkdir()
    (photos.parent / "bad/one.png").write_bytes(b"no image")
    for words, said in (
        (("train", "photos", "--device", "cpu"), "give --yes"),
        (
            ("train", "empty", "--yes"),
            "a place of images, for it has no run.yaml: no images in empty",
        ),
        (("train", "bad", "--yes"), "none of the 1 images that were looked at can be read"),
        (("train", "digits", "--minutes", "3"), "--minutes and --yes are for a folder of images"),
        (("train", "photos", "--yes", *sets("net.widht=3")), "net.widht: unknown key; did you mean 'width'"),
    ):
        done = call(*words)
        assert done.code == 2, done
        assert said in " ".join(done.err.replace("│", " ").split()), done.err
    assert not Path("runs").exists()
