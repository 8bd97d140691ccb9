"""The rules that choose how to train on images: by captions, the shorter side, and the device."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dumo.data.caption import NoCaptionsError
from dumo.plan import photos
from dumo.runtime.device import choose_device

COUNT = 6


def save(folder: Path, side: int, *, classes: Sequence[str] = (), captions: bool = False) -> None:
    """Images of 3:4, `side` pixels high, in a folder of each class."""
    draws = np.random.default_rng(0)
    for name in classes or (".",):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(COUNT):
            pixels = draws.integers(0, 256, (side, side * 4 // 3, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
            if captions:
                (folder / name / f"{i}.txt").write_text(f"number {i}")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


def pretend_device(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(photos, "choose_device", lambda name: torch.device(device))


RULES = [
    # device, side of the images, captions, changes, kind of data, side trained on, kind of network
    ("cpu", 80, False, (), "latents", 64, "dit"),
    ("cpu", 52, False, (), "latents", 48, "dit"),
    ("cpu", 32, False, (), "latents", 32, "dit"),
    ("cpu", 80, False, ("data.side=40",), "latents", 40, "dit"),
    ("cpu", 31, False, (), "images", 24, "unet"),
    ("cpu", 8, False, (), "images", 16, "unet"),
    ("cpu", 80, False, ("data.kind=images",), "images", 32, "unet"),
    ("cpu", 80, False, ("data.kind=images", "data.side=56"), "images", 56, "unet"),
    ("cpu", 80, False, ("net.kind=dit",), "images", 32, "dit"),
    ("cpu", 80, True, (), "images", 32, "dit"),
    ("cpu", 80, True, ("data.captions=null",), "latents", 64, "dit"),
    ("cpu", 80, True, ("net.kind=unet",), "images", 32, "unet"),
    ("cuda", 80, False, (), "images", 64, "dit"),
    ("cuda", 52, False, (), "images", 48, "dit"),
    ("cuda", 80, True, (), "images", 64, "dit"),
]


@pytest.mark.parametrize(("device", "side", "captions", "changes", "data", "trained_side", "net"), RULES)
def test_the_recipe_is_chosen_by_captions_side_and_device(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    side: int,
    captions: bool,
    changes: Sequence[str],
    data: str,
    trained_side: int,
    net: str,
) -> None:
    pretend_device(monkeypatch, device)
    save(folder, side, captions=captions)
    run = photos.propose("photos", changes).run
    assert (run.data.kind, run.net.kind) == (data, net)
    images = run.data.images if data == "latents" else run.data
    assert (images.root, images.side) == ("photos", trained_side)
    assert (run.train.minutes is None) == (device == "cuda")
    reads_captions = captions and not changes
    assert (run.net.texts is not None) == reads_captions
    if reads_captions:
        assert run.net.texts.tokenizer.length == len("number 0") + 1
    if net == "unet" and "net.kind=unet" not in changes:
        assert run.net.attend == (trained_side // 4,)


def test_classes_are_guided_by(folder: Path) -> None:
    save(folder, 40, classes=("cats", "dogs"))
    proposal = photos.propose("photos", device="cpu")
    run = proposal.run
    assert proposal.classes == 2
    assert (run.objective.drop, run.objective.guide.zeta) == (0.1, 0.55)
    unlabelled = photos.propose("photos", ["data.classes=0", "data.labelled=false"], device="cpu").run
    assert (unlabelled.objective.drop, unlabelled.objective.guide.zeta) == (0.0, 0.0)


def test_other_images_have_another_cache(folder: Path) -> None:
    save(folder, 40)
    roots = [photos.propose("photos", device="cpu").run.data.root for _ in range(2)]
    roots.append(photos.propose("photos", ["data.side=32"], device="cpu").run.data.root)
    roots.append(photos.propose("photos", ["data.flip=false"], device="cpu").run.data.root)
    Image.new("RGB", (50, 40)).save(folder / "more.png")
    roots.append(photos.propose("photos", device="cpu").run.data.root)
    assert roots[0] == roots[1]
    assert len({*roots}) == 4
    assert all(root.startswith("runs/latents/photos-") for root in roots)
    named = photos.propose("photos", ["data.root=mine"], device="cpu").run.data
    assert (named.root, named.images.root) == ("mine", "photos")


@pytest.mark.parametrize(
    ("count", "changes", "on_a_cpu", "fields"),
    [
        (1000, (), True, {"train.minutes": 6.0}),
        (12, (), True, {"train.minutes": 1.4}),
        (1, (), True, {"train.minutes": 0.1}),
        (1000, ("train.steps=5",), True, {}),
        (1000, ("train.minutes=5",), True, {}),
        (1000, (), False, {}),
    ],
)
def test_a_run_on_a_cpu_ends_by_the_clock(
    count: int, changes: Sequence[str], on_a_cpu: bool, fields: dict[str, float]
) -> None:
    assert photos.length_fields(count, changes, on_a_cpu=on_a_cpu) == fields


def test_captions_that_are_asked_for_must_be_there(folder: Path) -> None:
    save(folder, 40)
    with pytest.raises(NoCaptionsError):
        photos.propose("photos", ["data.captions={kind: files}"], device="cpu")
    (folder / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": f"{i}.png", "tags": f"tag {i}"}) for i in range(COUNT))
    )
    run = photos.propose("photos", ["data.captions={kind: files, name: tags}"], device="cpu").run
    assert (run.data.captions.name, run.net.texts.kind) == ("tags", "learned")


@pytest.mark.parametrize("name", ["2024", "trip #1: Rome"])
def test_the_name_of_a_folder_is_no_yaml(folder: Path, name: str) -> None:
    save(folder.with_name(name), 40)
    run = photos.propose(name, device="cpu").run
    assert run.data.images.root == name
    assert Path(run.data.root).parent == Path("runs/latents")


def test_the_lines_say_what_is_trained_on_what(folder: Path) -> None:
    save(folder, 40, classes=("cats", "dogs"))
    lines = dict(photos.propose("photos", device=str(choose_device("cpu"))).lines())
    assert lines["images"] == "12, 2 classes, shorter side 40 pixels"
    assert "few" in lines
    assert lines["trained as"].startswith("latents of taef2 at 40 x 40")
    assert lines["length"] == "1.4 minutes, after the images are encoded"
