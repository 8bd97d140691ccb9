"""Somebody's own photos, with no network and nothing fetched: by the recipe my-images, and by `dumo train FOLDER`."""

import io
import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import yaml
from PIL import Image

import dumo
from dumo.config.load import load
from dumo.plan import photos as rules
from e2e.shell import Done, call, refused
from forked import ENVIRONMENT
from tiers import tiered

CLASSES = ("cats", "dogs", "fish", "zoo birds")
FOR_CPU = ["train.compile=none", "train.precision=fp32"]
SMALL = [
    *FOR_CPU,
    "net.width=32",
    "net.depth=1",
    "train.steps=3",
    "train.batch=64",
    "evaluate.nfe=[1]",
    "sample.nfe=[1]",
]
PIXELS = [*SMALL, "net.attention=2", "data.side=16", "evaluate.protocol.samples=40", "evaluate.contrast=[]"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """61 images as telephones leave them: turned, grey, transparent; one is cut off."""
    root, draws = tmp_path_factory.mktemp("own") / "photos", np.random.default_rng(0)
    turned = Image.Exif()
    turned[0x0112] = 6
    for k, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for i in range(15):
            pixels = draws.integers(60 * k, 60 * k + 60, (24, 30, 3), dtype=np.uint8)
            image, file = Image.fromarray(pixels), root / name / f"IMG_{i:04}"
            if i == 0:
                image.save(file.with_suffix(".JPG"), exif=turned)
            else:
                image.convert({1: "L", 2: "RGBA"}.get(i, "RGB")).save(file.with_suffix(".png"))
    whole = (root / "cats" / "IMG_0003.png").read_bytes()
    (root / "dogs" / "broken.png").write_bytes(whole[: len(whole) // 2])
    return root


@pytest.fixture(scope="module")
def run(photos: Path) -> Path:
    folder = photos.parent / "run"
    done, told = said("train", "my-images", "--out", folder, *PIXELS, f"data.root={photos}")
    assert done.code == 0, done
    assert "1 of 61 images cannot be read" in told
    assert "dogs/broken.png" in told
    assert "61 images in 4 classes: cats, dogs, fish, zoo birds" in told
    return folder


@pytest.fixture(autouse=True)
def alone(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, no folder that is named, nothing fetched before."""

    def no(*_: object) -> NoReturn:
        raise AssertionError("the network is asked")

    monkeypatch.setattr(socket.socket, "connect", no)
    monkeypatch.setattr(socket, "getaddrinfo", no)
    for name in ("MY_IMAGES", "DUMO_INCEPTION"):
        monkeypatch.delenv(name, raising=False)


def said(*words: object) -> tuple[Done, str]:
    """A command, and all it said on stderr, warnings too."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = call(*words)
    return done, " ".join(" ".join([done.err, *(str(one.message) for one in caught)]).split())


def test_folders_are_classes_by_name(run: Path) -> None:
    found = yaml.safe_load((run / "run.yaml").read_text())["resolved"]
    assert found["data.classes"] == 4
    assert found["data.names"] == list(CLASSES)
    spec = load(str(run))
    assert [spec.conditions.name(k) for k in range(4)] == list(CLASSES)
    assert [spec.conditions.index(name) for name in ("fish", " zoo birds", "3")] == [2, 3, 3]


@pytest.mark.slow
def test_the_hints_work_when_typed(run: Path, photos: Path) -> None:
    done, _ = said("train", run)
    assert done.code == 0
    hint = done.err.split("next:  dumo ")[1].splitlines()[0].split("    dumo ")
    assert [words.split()[0] for words in hint] == ["sample", "evaluate", "report"]
    for words in hint:
        done, told = said(*words.split())
        assert done.code == 0, (words, told)
        assert ("perfect sampler: class_mmd " in " ".join(done.out.split())) == words.startswith("evaluate")
    judged = json.loads((run / "evaluation.json").read_text())
    assert judged["protocol"] == "photos (40 samples)"
    assert "fid" not in json.dumps(judged["results"])
    assert "no FID" in judged["card"]["features"]
    assert judged["card"]["data"]["root"] == "photos"  # no path of this machine
    assert "rough" in judged["card"]["spread"]
    assert (run / "report.html").stat().st_size > 10_000


def test_photos_that_are_gone_or_others_are_not_taken_for_those_of_the_training(run: Path, photos: Path) -> None:
    """Neither does the page count them, nor is the run judged by them."""
    page = run / "report.html"
    without_data = "The training data could not be read"
    moved = photos.rename(photos.with_name("moved"))
    assert said("report", run)[0].code == 0
    assert without_data in page.read_text()
    moved.rename(photos)

    added = photos / "cats/added.png"
    shutil.copy(photos / "cats/IMG_0003.png", added)
    judged, _ = said("evaluate", run)
    assert (judged.code, "has other images than" in judged.err) == (2, True), judged
    assert said("report", run)[0].code == 0
    assert without_data in page.read_text()
    assert "it saw each of them" not in page.read_text()
    added.unlink()
    assert said("report", run)[0].code == 0
    assert without_data not in page.read_text()


@pytest.mark.slow
def test_labels_by_name(run: Path) -> None:
    by_name = call("sample", run, "--labels", "fish,cats", "--count", 8, "--out", "a", "--format", "npz").out
    by_number = call("sample", run, "--labels", "2,0", "--count", 8, "--out", "b", "--format", "npz").out
    one, other = (np.load(text.strip()) for text in (by_name, by_number))
    assert one["arr_1"].tolist() == [2, 0] * 4
    assert np.array_equal(one["arr_0"], other["arr_0"])
    refused("sample", run, "--labels", "fsh", named=("label 'fsh'", "did you mean 'fish'"), run=run)
    refused("sample", run, "--labels", "4", named=("there is no label '4'", "0 to 3"), run=run)


@pytest.mark.slow
def test_the_settings_of_a_run_are_those_of_a_new_one_on_other_classes(photos: Path, run: Path, tmp_path: Path) -> None:
    for name in CLASSES[2:]:
        shutil.copytree(photos / name, tmp_path / "others" / name)
    done, told = said("train", run, "--out", "new", f"data.root={tmp_path / 'others'}")
    assert done.code == 0, done
    assert "30 images in 2 classes: fish, zoo birds" in told


@pytest.mark.slow
def test_other_folders_are_refused(photos: Path, run: Path) -> None:
    again = ("train", run)
    (photos / "cats").rename(photos / "lions")
    try:
        refused(*again, f"data.root={photos}", named=("without cats", "with lions"), run=run)
    finally:
        (photos / "lions").rename(photos / "cats")
    fields = [f"data.root={photos}", "data.on_bad=raise"]
    refused("train", "my-images", *PIXELS, *fields, named=("dogs/broken.png", "data.on_bad=skip"))


@pytest.mark.slow
def test_a_run_that_needs_inception_does_not_hint_at_judging(photos: Path) -> None:
    fields = [f"data.root={photos}", "evaluate.protocol={kind: folder, samples: 40, frechet: false}"]
    done, told = said("train", "my-images", *PIXELS[: PIXELS.index("evaluate.protocol.samples=40") - 1], *fields)
    assert done.code == 0
    assert "dumo evaluate runs" not in told
    assert "docs/data.md" in told


@pytest.mark.nightly
@pytest.mark.data
def test_in_latents(photos: Path) -> None:
    """With a real autoencoder: stopped by the broken file, nothing is in the way of the true run."""
    fields = [f"data.images.root={photos}", "data.images.side=32"]
    before = call("encode", "my-images-256", *fields, "data.images.on_bad=raise")
    assert before.code == 2
    assert "broken.png" in before.err
    assert "data.images.on_bad=skip" in before.err
    done, told = said("encode", "my-images-256", *fields)
    assert done.code == 0, told
    assert "60 images (1 could not be read)" in done.out
    hint = done.err.split("next:  dumo ")[1].splitlines()[0].split()
    rest = ["net.attention=2", "evaluate.protocol.samples=20", "evaluate.contrast=[]"]
    assert hint == ["train", "my-images-256", *fields]
    done, told = said(*hint, *SMALL, *rest)
    assert done.code == 0, told
    run = Path("runs/my-images-256")
    assert load(str(run)).conditions.name(3) == "zoo birds"
    for words in (("sample", run, "--labels", "cats"), ("evaluate", run), ("report", run)):
        done, told = said(*words)
        assert done.code == 0, told
    assert os.path.getsize(run / "report.html") > 10_000


@pytest.mark.slow
@pytest.mark.data
def test_what_an_empty_beginning_left_is_no_obstacle(photos: Path) -> None:
    """A cache that holds nothing yet binds nobody to the number of images that there were."""
    fields = ["--codec=taef2", "--side=32", "data.images.on_bad=raise"]
    assert call("encode", photos, "--out", "cache", *fields).code == 2
    bad = (photos / "dogs" / "broken.png").rename(photos.parent / "broken.png")
    try:
        done = call("encode", photos, "--out", "cache", *fields)
    finally:
        bad.rename(photos / "dogs" / "broken.png")
    assert done.code == 0, done
    assert "60 images as" in done.out


# `dumo train FOLDER`
QUICK = ["net.width=32", "net.depth=1", "net.route=null", "train.batch=8", "train.coupling=null"]
QUICK_PIXELS = ["net.width=8", "net.multipliers=[1, 1]", "net.attend=[]", "train.batch=4"]
JUDGED = ["evaluate.protocol.samples=20"]


def save(folder: Path, side: int, classes: tuple[str, ...] = ("cats", "dogs")) -> Path:
    """Soft spots of colour, twelve images in each class; without classes, in the folder itself."""
    for k, name in enumerate(classes or (".",)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(12):
            spots = np.random.default_rng(12 * k + i).integers(0, 256, (6, 8, 3), dtype=np.uint8)
            size = (side * 4 // 3, side)
            Image.fromarray(spots).resize(size, Image.Resampling.BICUBIC).save(folder / name / f"{i}.png")
    return folder


@pytest.mark.slow
def test_photos_are_learned_in_latents_which_training_makes(here: Path) -> None:
    photos = save(here / "photos", 48)
    began = call("train", "photos", "--yes", "--device", "cpu", *QUICK, *JUDGED, "train.steps=2")
    assert began.code == 0, began
    assert "trained as  latents of taef2 at 48 x 48" in began.out
    root = Path(load("runs/photos").data.root)
    assert root.parent == here / "runs/latents"

    # Again, in Python, and for another run: the cache is there.
    again = call("train", "photos", "train.steps=3", "data.on_bad=skip")
    assert (again.code, "encoding" in again.err) == (0, False), again
    assert dumo.train("photos", {"train.steps": 4}, device="cpu").step == 4
    second = call("train", "photos", "--out", "second", "--yes", *QUICK, *JUDGED, "train.steps=2")
    assert (second.code, "encoding" in second.err) == (0, False), second
    for words in (("sample", "--nfe", "1,2"), ("evaluate", "--nfe", "1"), ("report",)):
        done = call(words[0], "runs/photos", *words[1:])
        assert done.code == 0, done

    # A lost cache is made again.
    shutil.rmtree(root)
    lost = call("train", "runs/photos", "train.steps=5")
    assert (lost.code, root.is_dir()) == (0, True), lost

    # Another photo: the run refuses it, with its cache and without, and a new run has a cache of its own.
    Image.new("RGB", (64, 48)).save(photos / "cats/3.png")
    other = call("train", "photos", "train.steps=6")
    assert (other.code, "cats/3.png" in other.err) == (2, True), other
    shutil.rmtree(root)
    without_cache = call("train", "photos", "train.steps=6")
    assert without_cache.code == 2, without_cache
    new = call("train", "photos", "--out", "new", "--yes", *QUICK, *JUDGED, "train.steps=2")
    assert new.code == 0, new
    assert load("new").data.root != str(root)


@pytest.mark.slow
def test_small_photos_are_learned_in_pixels_by_the_clock(here: Path) -> None:
    """And a run that has ended goes on for more minutes."""
    save(here / "photos", 12)
    began = time.perf_counter()
    done = call("train", "photos", "--yes", "minutes=0.15", "--device", "cpu", *QUICK_PIXELS)
    assert done.code == 0, done
    assert "trained as  pixels at 16 x 16" in done.out
    assert "length      9 seconds" in done.out
    again = call("train", "photos", "--yes", "minutes=0.15", "--device", "cpu", *QUICK_PIXELS)
    assert "runs/photos has trained its 9 seconds. For more:  dumo train runs/photos" in again.err
    more = call("train", "runs/photos", "minutes=0.25")
    assert more.code == 0, more
    assert "0:06 of 0:15 are left, from step" in " ".join(more.err.split())
    assert load("runs/photos").train.minutes == 0.25
    assert 9 + 6 - 2 < time.perf_counter() - began < 300  # of a machine that may be busy


@pytest.mark.nightly
def test_captions_are_read(here: Path) -> None:
    photos = save(here / "photos", 48)
    reading = ["net.width=16", "net.depth=1", "net.attention=2", "train.batch=4", "train.steps=2"]
    for i in range(12):
        (photos / f"cats/{i}.txt").write_text(f"a cat, number {i}")
    incomplete = call("train", "photos", "--yes", "--device", "cpu", *reading)
    assert incomplete.code == 2
    assert "12 of 24 images have no caption" in incomplete.err
    assert not Path("runs").exists()
    for file in photos.glob("dogs/*"):
        file.with_suffix(".txt").touch()  # no caption, on purpose
    done = call("train", "photos", "--yes", "--device", "cpu", *reading)
    assert done.code == 0, done
    assert "12 different captions" in " ".join(done.out.split())
    run = load("runs/photos")
    assert (run.data.captions.kind, run.net.kind, run.net.texts.kind) == ("files", "dit", "learned")
    assert call("sample", "runs/photos", "--prompt", "a dog", "--nfe", "1").code == 0
    assert call("train", "photos", "train.steps=3").code == 0

    # A run that was moved with its texts finds them.
    Path("runs").rename("big")
    assert call("sample", "big/photos", "--prompt", "a dog", "--nfe", "1").code == 0
    assert call("train", "big/photos", "train.steps=4").code == 0
    assert not Path("runs").exists()


def test_a_folder_that_is_in_use_is_refused_before_the_plan(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def propose(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a run is proposed")

    save(here / "photos", 12)
    monkeypatch.setattr(rules, "propose", propose)
    Path("results").mkdir()
    Path("results/notes.txt").touch()
    occupied = call("train", "photos", "--yes", "--out", "results")
    assert (occupied.code, "results" in occupied.err) == (2, True), occupied
    assert not Path("runs").exists()


ANSWERS = [("n\n", 1), ("\n", 0), ("y\n", 0)]


@pytest.mark.parametrize(("answer", "code"), tiered(ANSWERS, ci=ANSWERS[:1], id=repr))
def test_it_asks_on_a_terminal(here: Path, monkeypatch: pytest.MonkeyPatch, answer: str, code: int) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    save(here / "photos", 12)
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    done = call("train", "photos", "--device", "cpu", *QUICK_PIXELS, "train.steps=1")
    assert done.code == code, done
    assert "train? [Y/n]" in done.err
    assert Path("runs/photos").exists() == (code == 0)


@pytest.mark.slow
def test_ctrl_c_at_the_question_ends_it(here: Path) -> None:
    save(here / "photos", 12)
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell may ignore it
    program += "from dumo.cli import main; main()"
    command = [sys.executable, "-c", program, "train", "photos", "--device", "cpu", "train.steps=1"]
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
def test_a_folder_that_cannot_be_trained_on_is_refused(here: Path) -> None:
    save(here / "photos", 12)
    (here / "empty").mkdir()
    (here / "bad").mkdir()
    (here / "bad/one.png").write_bytes(b"no image")
    for words, name in (
        (("photos", "--device", "cpu"), "--yes"),
        (("empty", "--yes"), "empty"),
        (("bad", "--yes"), "one.png"),
        (("photos", "--yes", "net.widht=3"), "widht"),
    ):
        done = call("train", *words)
        assert (done.code, name in done.err) == (2, True), done
    assert not Path("runs").exists()
