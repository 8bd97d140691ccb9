"""From a folder of images to judged samples, by way of a cache: encode, train, sample, evaluate, report."""

import shutil
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from autoencoder import taef2
from dumo.config import recipe_files
from e2e.shell import call, refused

CLASSES, EACH, SIDE = 10, 6, 32
NET = {"kind": "dit", "patch": 1, "width": 16, "depth": 1, "attention": 2, "time_scale": 10.0}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random images in ten classes, and a run that trains on them through a codec of random weights."""
    home = tmp_path_factory.mktemp("home")
    for i in range(CLASSES * EACH):
        folder = home / "images" / f"class{i % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        draws = torch.Generator().manual_seed(i)
        pixels = torch.randint(256, (SIDE, SIDE, 3), dtype=torch.uint8, generator=draws)
        Image.fromarray(pixels.numpy()).save(folder / f"{i:03d}.png")
    tree = yaml.safe_load(recipe_files.text("digits"))
    images = {"root": str(home / "images"), "side": SIDE, "crop": "none", "flip": True}
    codec = {"kind": "taef2", "weights": str(taef2(home / "taef2.safetensors"))}
    tree["data"] = {"kind": "latents", "root": str(home / "cache"), "images": images, "codec": codec}
    tree["net"], tree["train"]["steps"], tree["train"]["schedule"] = NET, 4, {"kind": "constant"}
    tree["evaluate"]["protocol"] = {"kind": "photos", "samples": 20}
    (home / "run.yml").write_text(yaml.safe_dump(tree))
    return home


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is watched for changes is the folder we are in."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.mark.slow
def test_the_whole_way(home: Path) -> None:
    """Each command takes what the one before has left; without a cache and images training says how to make it."""
    run = home / "run"
    away = (home / "images").rename(home / "away")
    refused("train", home / "run.yml", "--out", run, named=("data.root", "dumo encode"))
    assert not run.exists()
    away.rename(home / "images")
    made = call("encode", home / "run.yml")
    assert (made.code, "60 images" in made.out) == (0, True)
    assert call("train", home / "run.yml", "--out", run).code == 0
    sampled = call("sample", run, "--nfe", 1, "--count", 3, "--format", "images")
    assert sampled.code == 0
    with Image.open(run / "samples" / "restart-nfe1-count3" / "000002.png") as image:
        assert image.size == (SIDE, SIDE)
    judged = call("evaluate", run, "--nfe", 1, "--json")
    assert judged.json["results"][0]["pixel_fd"] > 0
    assert judged.json["card"]["codec"]["kind"] == "taef2"
    assert call("report", run).code == 0
    page = (run / "report.html").read_text()
    assert "nearest" in page


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (("data.images.classes=17",), ("10 classes", "17")),
        (("data.codec.weights=w.pth",), ("w.pth", "pickle")),
        (("data.images.side=36",), ("got 36", "8 pixels")),
        (("data.images.root=/nowhere",), ("/nowhere",)),
    ],
)
def test_bad_input_to_encode(home: Path, tmp_path: Path, sets: tuple[str, ...], said: tuple[str, ...]) -> None:
    """One plain line, exit code 2, and nothing begun."""
    refused("encode", home / "run.yml", "--out", tmp_path / "cache", *sets, named=said, lines=None)
    assert not (tmp_path / "cache").exists()


def test_a_file_that_is_no_image_is_named(home: Path, tmp_path: Path) -> None:
    """Refused by its name, and left out if the user says so."""
    images = tmp_path / "images"
    images.mkdir()
    shutil.copy(home / "images" / "class0" / "000.png", images / "good.png")
    (images / "bad.png").write_text("no image")
    words = ("encode", images, "--out", tmp_path / "cache", "--codec", "taef2", "--side", SIDE)
    words += (f"data.codec.weights={home / 'taef2.safetensors'}",)
    refused(*words, named=("bad.png", "data.images.on_bad=skip"))
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        made = call(*words, "data.images.on_bad=skip")
    assert "bad.png" in made.err
    assert "1 images (1 could not be read)" in made.out
