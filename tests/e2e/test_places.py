"""A run is whole by itself: where things lie is written out when it begins, and what they are is known by hashes."""

import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image

from autoencoder import taef2
from dumo.config import recipe_files
from dumo.config.load import load
from e2e.shell import call, files, refused

SIDE = 16
NET = {"kind": "dit", "patch": 1, "width": 16, "depth": 1, "attention": 2, "time_scale": 10.0}
WEIGHTS = "taef2.safetensors"


def others(file: Path, to: Path) -> None:
    """Other weights of the same sizes."""
    safetensors.torch.save_file({k: 2 * x for k, x in safetensors.torch.load_file(file).items()}, to)


@pytest.fixture
def home(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of latents that was made with a variable and relative paths, and two folders for the variable."""
    for i in range(40):
        (folder := here / "images" / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (SIDE, SIDE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    for name in ("models", "elsewhere"):
        (here / name).mkdir()
    others(taef2(here / "models" / WEIGHTS), here / "elsewhere" / WEIGHTS)
    tree = yaml.safe_load(recipe_files.text("digits"))
    images = {"root": "images", "side": SIDE, "crop": "none"}
    codec = {"kind": "taef2", "weights": f"$PRETRAINED/{WEIGHTS}"}
    tree["data"] = {"kind": "latents", "root": "cache", "images": images, "codec": codec}
    tree["net"], tree["train"]["steps"], tree["train"]["schedule"] = NET, 2, {"kind": "constant"}
    tree["evaluate"]["protocol"] = {"kind": "photos", "samples": 20}
    (here / "recipe.yml").write_text(yaml.safe_dump(tree))
    monkeypatch.setenv("PRETRAINED", str(here / "models"))
    for words in (("encode", "recipe.yml"), ("train", "recipe.yml", "--out", "run")):
        assert (done := call(*words)).code == 0, done
    return here


def sampled(run: Path | str, *words: str) -> dict[str, bytes]:
    """The files of two samples."""
    shutil.rmtree("drawn", ignore_errors=True)
    done = call("sample", run, "--count", "2", "--nfe", "1", "--format", "images", "--out", "drawn", *words)
    assert done.code == 0, done
    return files(Path("drawn"))


@pytest.mark.slow
def test_a_run_keeps_to_what_it_began_with(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, wanted = load("run").data, sampled("run")
    assert data.codec.weights == str(home / "models" / WEIGHTS)  # pyright: ignore
    assert (data.root, data.images.root) == (str(home / "cache"), str(home / "images"))  # pyright: ignore
    assert "$PRETRAINED" in call("show", "recipe.yml").out
    again = ("train", home / "run", "train.steps=3")
    monkeypatch.setenv("PRETRAINED", str(home / "elsewhere"))
    assert sampled("run") == wanted
    monkeypatch.delenv("PRETRAINED")
    assert sampled("run") == wanted
    (home / "sub").mkdir()
    monkeypatch.chdir(home / "sub")
    assert (done := call(*again)).code == 0, done
    assert load(str(home / "run")).data == data
    assert (home / "run/checkpoints/step-00000003").is_dir()


@pytest.mark.nightly
def test_other_weights_are_refused_and_moved_ones_are_found(home: Path) -> None:
    wanted, file = sampled("run"), home / "models" / WEIGHTS
    file.rename(home / WEIGHTS)
    named = ("No such file", str(file))
    refused("sample", "run", "--count", "1", "--nfe", "1", "--out", "x", named=named)
    assert sampled("run", f"data.codec.weights={WEIGHTS}") == wanted
    another = ["data.codec.weights=elsewhere/" + WEIGHTS]
    named = ("data.codec.weights", "elsewhere", "SHA-256", "restore those weights")
    refused("sample", "run", *another, "--out", "x", named=named)
    shutil.copy(home / "elsewhere" / WEIGHTS, file)
    for words in (("sample", "--out", "x"), ("evaluate",)):
        refused(words[0], "run", *words[1:], named=(str(file), "SHA-256"))
    refused("train", "run", *another, "train.steps=3", "train.sheets=1", named=("SHA-256",))


@pytest.mark.nightly
def test_a_moved_run_says_what_it_misses(home: Path) -> None:
    (home / "there").mkdir()
    for name in ("run", "cache", "models"):
        (home / name).rename(home / "there" / name)
    refused("train", "there/run", "train.steps=3", named=(str(home / "models"),))
    moved = ["data.root=there/cache", f"data.codec.weights=there/models/{WEIGHTS}", "train.steps=3"]
    assert (done := call("train", "there/run", *moved)).code == 0, done
    assert load("there/run").data.root == str(home / "there/cache")  # pyright: ignore
    assert sampled("there/run")


@pytest.mark.nightly
def test_a_project_that_was_moved_takes_the_command_that_it_took(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "there").mkdir()
    for name in ("run", "cache", "models", "images", "recipe.yml"):
        (home / name).rename(home / "there" / name)
    monkeypatch.chdir(home / "there")
    monkeypatch.setenv("PRETRAINED", str(home / "there/models"))
    assert (done := call("train", "recipe.yml", "--out", "run", "train.steps=3")).code == 0, done
    data = load("run").data
    assert (data.root, data.images.root) == (str(home / "there/cache"), str(home / "there/images"))  # pyright: ignore


@pytest.mark.nightly
def test_images_that_were_moved_are_those_that_were_trained_on(home: Path) -> None:
    """Of images without a cache: their place is free, what they are is not."""
    fields = ["data={kind: images, root: images, side: 16, crop: none}", "net.patch=8"]
    assert (done := call("train", "recipe.yml", "--out", "plain", *fields)).code == 0, done
    (home / "images").rename(home / "moved")
    assert call("sample", "plain", "--count", "1", "--nfe", "1", "data.root=moved").code == 0
    shutil.copytree(home / "moved/class0", home / "fewer/class0")
    shutil.copytree(home / "moved/class0", home / "fewer/class1")
    named = ("fewer has other images than plain was trained on",)
    refused("evaluate", "plain", "data.root=fewer", named=named, run=home / "plain")
    refused("train", "plain", "data.root=fewer", "train.steps=3", named=("the data are not those",))
    assert call("train", "plain", "data.root=moved", "train.steps=3").code == 0
