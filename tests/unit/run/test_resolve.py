"""Places are whole once a run begins, and stay where they were; what lies there has a hash."""

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from dumo.config.load import RUN_FILE, dump, load
from dumo.config.spec import Run
from dumo.run.resolve import (
    absolute_path,
    load_resolved,
    places,
    resolve,
    with_absolute_paths,
    with_hashes,
    without_paths,
)

LATENTS = {"data.root", "data.images.root", "data.codec.weights"}
IMAGES = "evaluate.protocol={kind: photos, samples: 24}"
SD3 = "stabilityai/stable-diffusion-3-medium-diffusers"


def images(root: str, *more: str) -> Run:
    """Of images in a place."""
    return load("digits", [f"data={{kind: images, root: '{root}', side: 8, classes: 10}}", IMAGES, *more])


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLACE", str(tmp_path / "one"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NOWHERE", raising=False)


@pytest.mark.parametrize(
    ("text", "is_whole"),
    [("./a/b", "a/b"), ("./a", "a"), ("~/a", "home/a"), ("$PLACE/a", "one/a"), ("${PLACE}", "one"), ("a/../b", "b")],
)
def test_a_place_is_made_whole(text: str, is_whole: str, tmp_path: Path) -> None:
    assert absolute_path(text) == str(tmp_path / is_whole) == absolute_path(str(tmp_path / is_whole))
    assert absolute_path(text, maybe=True) == text  # nothing is there
    found = with_absolute_paths(images(text))
    assert found.data.root == str(tmp_path / is_whole)  # pyright: ignore
    assert without_paths(found).data.root == Path(is_whole).name  # pyright: ignore


def test_what_has_no_value_stays(tmp_path: Path) -> None:
    assert absolute_path("$NOWHERE/a") == "$NOWHERE/a"
    assert with_absolute_paths(images("$NOWHERE/a")) == images("$NOWHERE/a")


@pytest.mark.parametrize("root", ["data.root", "data"])
def test_a_run_of_other_data_has_their_classes(root: str, tmp_path: Path) -> None:
    """As `dumo show RUN data.root=b` loads it; of its own data what was found stays, also where they are gone."""
    for name, classes in (("a", 2), ("b", 3)):
        for i in range(classes):
            (tmp_path / name / str(i)).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / name / str(i) / "0.png")
    fields = "kind: images, side: 8"
    run = with_absolute_paths(load("digits", [f"data={{{fields}, root: a}}", IMAGES]))
    (tmp_path / RUN_FILE).write_text(dump(resolve(run)))
    change = "data.root=b" if root == "data.root" else f"data={{{fields}, root: b}}"
    assert load_resolved(str(tmp_path), [change]).conditions.count == 3
    shutil.rmtree("a")
    assert load_resolved(str(tmp_path), ["train.steps=3"]).conditions.count == 2


def test_names_are_no_places(tmp_path: Path) -> None:
    """Of models on the Hub and of functions; a folder of that name is a place."""
    assert dict(places(with_absolute_paths(load("sd3-lora"))))["pipeline.source"] == SD3
    pinned = f"owner/name@{'0' * 40}"
    assert dict(places(with_absolute_paths(load("cifar10", [f"data.root={pinned}"]))))["data.root"] == pinned
    os.makedirs(SD3)
    assert dict(places(with_absolute_paths(load("sd3-lora"))))["pipeline.source"] == str(tmp_path / SD3)
    taught = load("digits", ["teacher={kind: python, source: a:b}"])
    assert dict(places(with_absolute_paths(taught)))["teacher.source"] == "a:b"
    os.mkdir("runs")
    taught = load("digits", ["teacher={source: runs}"])
    assert dict(places(with_absolute_paths(taught)))["teacher.source"] == str(tmp_path / "runs")


@pytest.mark.parametrize(
    ("recipe", "fields"),
    [
        ("imagenet-sample", LATENTS),
        ("text-256", {*LATENTS, "net.texts.root", "net.texts.encoder.source"}),
        ("z-image", {"data.root", "data.images.root", "net.texts.root", "pipeline.source"}),
    ],
)
def test_which_fields_are_places(recipe: str, fields: set[str]) -> None:
    assert {field for field, _ in places(load(recipe))} == fields


def test_a_pin_is_taken_from_the_run_that_it_goes_on_as(tmp_path: Path) -> None:
    file = tmp_path / "taef2.safetensors"
    file.write_bytes(b"weights")
    codec = f"codec: {{kind: taef2, weights: '{file}'}}"
    data = f"data={{kind: latents, root: cache, images: {{root: '.', side: 8, classes: 10}}, {codec}}}"
    run = load("digits", [data, IMAGES, "net.patch=1"])
    began = with_hashes(run)
    sha256 = began.data.codec.sha256  # pyright: ignore
    assert sha256
    assert began.resolved["data.codec.sha256"] == sha256
    file.write_bytes(b"others")
    assert with_hashes(run, began).data == began.data
    assert with_hashes(run).data.codec.sha256 != sha256  # pyright: ignore
    file.unlink()
    assert with_hashes(run) == run  # nothing is there
