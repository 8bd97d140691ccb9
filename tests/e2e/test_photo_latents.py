"""Colour photos are learned in latents of the autoencoder that comes with dumo, others in pixels; the plan says why."""

import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

import dumo
from dumo.config.load import load
from dumo.config.source import settings_of_images
from dumo.data import cache
from dumo.data.album import MAX_THREADS
from dumo.data.pixel import ToSquare
from dumo.data.store import Store
from dumo.plan import photodraft, photolatents, proposal
from dumo.plan.photolook import ImagesFound
from dumo.run import proposedcache
from dumo.run.encode import encoding_work
from dumo.run.resolve import absolute_path
from dumo.runtime import signals
from dumo.runtime.progress import Bar
from dumo.training import deadline
from e2e.shell import call, sets

QUICK = sets(
    "net.width=32",
    "net.depth=1",
    "net.route=null",
    "train.batch=8",
    "train.coupling=null",
    "evaluate.protocol.samples=20",
)
Paint = Callable[[int], np.ndarray]


def blobs(i: int) -> np.ndarray:
    """Soft spots of colour, which the autoencoder knows: 64 x 80 pixels."""
    spots = torch.rand(1, 3, 8, 10, generator=torch.Generator().manual_seed(i))
    large = interpolate(spots, size=(64, 80), mode="bicubic").clamp(0, 1)
    return (255 * large[0]).byte().permute(1, 2, 0).numpy()


def grey(i: int) -> np.ndarray:
    return np.repeat(blobs(i)[:, :, :1], 3, axis=2)


def small(i: int) -> np.ndarray:
    return blobs(i)[:24, :24]


def noise(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def save(folder: Path, paint: Paint, classes: tuple[str, ...] = ("cats", "dogs")) -> Path:
    """Twelve images in each class; without classes, in the folder itself."""
    for k, name in enumerate(classes or (".",)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(12):
            Image.fromarray(paint(12 * k + i)).save(folder / name / f"{i}.png")
    return folder


def lines(*changes: str, minutes: float | None = None) -> tuple[dict[str, str], dumo.config.spec.Run]:
    found = proposal.propose("photos", changes, minutes=minutes, device="cpu")
    return dict(found.lines()), found.run


@pytest.fixture
def photos(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(proposal, "_step_seconds", lambda run, here: 0.5)
    return here / "photos"


def test_colour_photos_are_learned_in_latents(photos: Path) -> None:
    save(photos, blobs)
    said, run = lines()
    line = r"latents by taef2, which changes these images by \d% of full brightness \(2\d\.\d dB\); in pixels by .*"
    assert re.fullmatch(line, said["learned as"])
    assert said["size"].startswith("64 x 64 pixels")
    assert said["few"].startswith("24 images: expect their colours and textures")
    assert (run.data.kind, run.data.shape, run.objective.kind) == ("latents", (32, 8, 8), "dumo")
    assert run.data.root.startswith("runs/latents/photos-")
    assert (run.objective.drop, run.objective.guide.zeta, run.data.images.flip) == (0.1, 0.55, True)
    assert run.resolved["proposed"]["data.root"] == run.data.root
    _, again = lines("data.on_bad=raise", "data.side=56")
    assert (again.data.images.on_bad, again.data.images.side) == ("raise", 56)
    assert again.data.root != run.data.root, "of another size"


def test_without_classes_there_is_no_guidance(photos: Path) -> None:
    save(photos, blobs, classes=())
    _, run = lines()
    assert run.data.kind == "latents"
    assert (run.data.labels, run.objective.drop, run.objective.guide.zeta) == (0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("paint", "reason"),
    [
        (grey, "pixels: 8 of 8 images are grey, and latents are of colours; in latents all the same by  dumo encode"),
        (small, "pixels: images of 24 pixels are too small for latents, which begin at 32"),
        (
            noise,
            "more than 10% of full brightness (20.0 dB); in latents all the same by  dumo encode",
        ),
    ],
)
def test_other_images_are_learned_in_pixels(photos: Path, paint: Paint, reason: str) -> None:
    save(photos, paint)
    said, run = lines()
    assert reason in said["learned as"]
    assert (run.data.kind, run.net.kind) == ("images", "unet")


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        ("data.kind=images", "pixels: "),
        ("net.kind=unet", 'unet"} asks for them'),
        (
            "data.side=24",
            'data.side=24, and latents take multiples of 8 from 32 on: changes={"data.side": 32}',
        ),
    ],
)
def test_the_user_may_ask_for_pixels(photos: Path, field: str, reason: str) -> None:
    save(photos, blobs)
    said, run = lines(field)
    assert reason in said["learned as"]
    assert run.data.kind == "images"


def test_many_images_in_little_time_are_not_encoded(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(photos, blobs)
    trial = photolatents.AutoencoderTrial(decibels=25.0, encode_seconds=2.0)
    monkeypatch.setattr(photolatents, "try_autoencoder", lambda codec, pixels: trial)
    said, run = lines(minutes=2)
    line = "pixels: to encode them takes 1:36 of 2:00, more than 50%; in latents by minutes=4"
    assert said["learned as"] == line
    assert run.data.kind == "images"
    assert lines("train.minutes=2")[0]["learned as"] == line
    assert lines(minutes=4)[1].data.kind == "latents"
    assert lines("train.steps=3")[1].data.kind == "latents"

    # where they are encoded already, that takes no time
    folder = Path(lines(minutes=4)[1].data.root)
    monkeypatch.setattr(cache, "is_finished", lambda cache_folder: cache_folder == folder)
    folder.mkdir(parents=True)
    found = proposal.propose("photos", minutes=2, device="cpu")
    assert (found.run.data.kind, found.draft.prepare_seconds) == ("latents", 0)


def test_images_are_decoded_before_they_are_encoded(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding counts, too, and a plan without time for a step says so."""
    save(photos, blobs)
    look_at = photodraft.look_at

    def look_slowly(store: Store, to_pixels: ToSquare, bar: Bar) -> ImagesFound:
        return replace(look_at(store, to_pixels, bar), image_seconds=3.0 * MAX_THREADS)

    monkeypatch.setattr(photodraft, "look_at", look_slowly)
    trial = photolatents.AutoencoderTrial(decibels=25.0, encode_seconds=0.5)
    monkeypatch.setattr(photolatents, "try_autoencoder", lambda codec, pixels: trial)
    said, _ = lines(minutes=2)
    assert said["learned as"].startswith("pixels: to encode them takes 1:36 of 2:00")
    assert "too short" not in said
    said, run = lines(minutes=1)
    assert said["too short"] == (
        "images take 1:12 to prepare, and no time is left for steps: give it more, as by minutes=3"
    )
    assert run.train.steps == 1
    assert "too short" not in lines("train.steps=3")[0]


@pytest.mark.slow
def test_training_encodes_the_photos_once(photos: Path) -> None:
    save(photos, blobs)
    began = call("train", "photos", "--yes", "--device", "cpu", *QUICK, *sets("train.steps=2", "data.on_bad=skip"))
    assert began.code == 0, began
    assert f"encoding {photos}: 24 of 24" in began.err
    root = Path(load("runs/photos").data.root)
    assert root.parent == photos.parent / "runs/latents"
    assert load("runs/photos").data.codec.weights == "dumo:cifar10-trained/taef2.safetensors"

    # again, and for another run: the cache is there
    again = call("train", "photos", *sets("train.steps=3", "data.on_bad=skip"))
    assert (again.code, "encoding" in again.err) == (0, False), again
    assert dumo.train("photos", {"train.steps": 4}, device="cpu").step == 4
    second = call("train", "photos", "--out", "second", "--yes", *QUICK, *sets("train.steps=2"))
    assert (second.code, "encoding" in second.err) == (0, False), second
    shutil.rmtree(root)
    ended = call("train", "runs/photos")
    assert ended.code == 2, ended
    assert "runs/photos has trained its 4 steps. For more:  dumo train runs/photos --set train.steps=8" in ended.err
    assert "dumo encode" in ended.err
    assert not root.exists(), "nothing is encoded for nothing"
    lost = call("train", "runs/photos", *sets("train.steps=5"))
    assert lost.code == 0, lost
    assert "encoding" in lost.err

    for words in (("sample", "--nfe", "1,2"), ("evaluate", "--nfe", "1"), ("report",)):
        done = call(words[0], "runs/photos", *words[1:])
        assert done.code == 0, done

    # another photo: the run refuses it, and a new run has a cache of its own
    Image.fromarray(blobs(99)).save(photos / "cats/3.png")
    other = call("train", "photos", *sets("train.steps=6"))
    assert other.code == 2, other
    assert "cats/3.png" in other.err
    assert "begin a new run on them, with another --out DIR" in " ".join(other.err.split())
    new = call("train", "photos", "--out", "new", "--yes", *QUICK, *sets("train.steps=2"))
    assert new.code == 0, new
    assert "encoding" in new.err
    assert load("new").data.root != str(root)


@pytest.mark.parametrize("name", ["2024", "trip #1: Rome"])
def test_the_name_of_a_folder_is_taken_as_it_is(photos: Path, name: str) -> None:
    """It is no YAML."""
    save(photos.with_name(name), small)
    assert proposal.propose(name, device="cpu").run.data.root == name
    assert encoding_work(name, out=name, codec="taef2", side=32).data.root == name
    greys = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    words = shlex.split(photolatents.reason_by_colours(greys, name))
    assert words[-1] == f"data.images.root='{name}'"


def test_settings_of_images_are_of_the_images_of_latents() -> None:
    of_latents = {"data": {"kind": "latents"}}
    texts = ["data.side=48", "data.memory=2", "data.images.flip=false", "net.width=8", "data.captions.kind=files"]
    assert settings_of_images(of_latents, texts, "a") == [
        "data.images.root=a",
        "data.images.side=48",
        "data.memory=2",
        "data.images.flip=false",
        "net.width=8",
        "data.images.captions.kind=files",
    ]
    assert settings_of_images({"data": {"kind": "images"}}, texts, "a") == ["data.root=a", *texts]
    assert settings_of_images({}, [], "2024") == ["data.root='2024'"]


def test_what_comes_with_dumo_keeps_its_name() -> None:
    place = "dumo:cifar10-trained/taef2.safetensors"
    assert absolute_path(place, maybe=True) == place


@pytest.mark.slow
def test_encoding_that_takes_too_long_is_interrupted_and_resumed(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(photos, blobs)
    monkeypatch.setattr(deadline, "MAX_PREPARATION_SHARE", 0.0)
    monkeypatch.setattr(proposedcache, "SHARD_ROWS", 8)
    stopped = call("train", "photos", "--yes", "--minutes", "3", "--device", "cpu", *QUICK)
    assert stopped.code == 128 + signals.CLOCK, stopped
    said = " ".join(stopped.err.split())
    assert re.search(
        r"stopped: 0 of 24 photos are encoded after 0:\d\d, and the others take 0:\d\d, more than 75% ", said
    )
    assert "With enough time: dumo train runs/photos --minutes 3" in said
    assert load("runs/photos").train.minutes == 3

    # the command that it named, without a question, and as in the old days by steps
    monkeypatch.setattr(deadline, "MAX_PREPARATION_SHARE", 0.9)
    resumed = call("train", "runs/photos", *sets("train.minutes=null", "train.steps=2"))
    assert resumed.code == 0, resumed
    assert "encoding" in resumed.err
    assert cache.read_index(Path(load("runs/photos").data.root)).shard_rows == 8

    # moved with its latents, it finds them
    Path("runs").rename("big")
    moved = call("train", "big/photos", *sets("train.steps=3"))
    assert moved.code == 0, moved
    assert "encoding" not in moved.err
    assert not Path("runs").exists()
    assert Path(load("big/photos").data.root).parent == Path("big/latents").absolute()
