"""Places are whole once a run begins, and stay where they were; what lies there has a hash."""

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from dumo.config.load import RUN_FILE, dump, load
from dumo.config.spec import Run
from dumo.io.hub import PUBLISHED
from dumo.run.resolve import (
    absolute_path,
    as_given,
    load_resolved,
    paths_as_typed,
    places,
    resolve,
    with_absolute_paths,
    with_hashes,
)

LATENTS = {"data.root", "data.images.root", "data.codec.weights"}
IMAGES = "evaluate.protocol={kind: photos, samples: 24}"


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
    [("a/b", "a/b"), ("./a", "a"), ("~/a", "home/a"), ("$PLACE/a", "one/a"), ("${PLACE}", "one"), ("a/../b", "b")],
)
def test_a_place_is_made_whole(text: str, is_whole: str, tmp_path: Path) -> None:
    assert absolute_path(text) == str(tmp_path / is_whole) == absolute_path(str(tmp_path / is_whole))
    assert absolute_path(text, maybe=True) == text  # nothing is there
    found = with_absolute_paths(images(text))
    assert found.data.root == str(tmp_path / is_whole)  # pyright: ignore
    assert paths_as_typed(found.resolved) == {"data.root": text}
    assert as_given(found) == images(text)


def test_what_has_no_value_stays(tmp_path: Path) -> None:
    assert absolute_path("$NOWHERE/a") == "$NOWHERE/a"
    assert with_absolute_paths(images("$NOWHERE/a")) == images("$NOWHERE/a")


def test_the_words_that_a_run_began_with_mean_what_they_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began, there = with_absolute_paths(images("$PLACE")), str(tmp_path / "one")
    (tmp_path / RUN_FILE).write_text(dump(began))
    before = load(str(tmp_path))
    assert before == began
    monkeypatch.setenv("PLACE", "/elsewhere")
    for same in (images("$PLACE"), before):
        assert with_absolute_paths(same, before) == began
    monkeypatch.delenv("PLACE")
    assert with_absolute_paths(images("$PLACE"), before) == began
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir("sub")
    moved = with_absolute_paths(images("two"), before)
    assert (moved.data.root, paths_as_typed(moved.resolved)) == (str(tmp_path / "sub/two"), {"data.root": "two"})  # pyright: ignore
    assert with_absolute_paths(images(there), before) == began


def test_where_nothing_is_at_the_old_place_the_words_lead_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a project that was moved; where it was copied, a line says which of both is taken."""
    os.makedirs("there/one")
    os.mkdir("one")
    before = with_absolute_paths(images("one"))
    monkeypatch.chdir("there")
    here = str(tmp_path / "there/one")
    told: list[str] = []
    assert with_absolute_paths(images("one"), before, told.append) == before
    assert told == [f"data.root is {tmp_path / 'one'}, as when this run began. To take {here}:  data.root={here}"]
    os.rmdir(tmp_path / "one")
    moved = with_absolute_paths(images("one"), before, told.append)
    assert (moved.data.root, paths_as_typed(moved.resolved)) == (here, {"data.root": "one"})  # pyright: ignore
    assert len(told) == 1


def test_a_run_of_a_project_that_was_moved_finds_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own text has absolute places; the words that were typed once lead from here."""
    os.makedirs("there/one")
    os.mkdir("one")
    before = with_absolute_paths(images("one"))
    monkeypatch.chdir("there")
    told: list[str] = []
    assert with_absolute_paths(before, before, told.append) == before
    assert not told, "nothing was typed"
    os.rmdir(tmp_path / "one")
    moved = with_absolute_paths(before, before)
    assert dict(places(moved))["data.root"] == str(tmp_path / "there/one")
    assert paths_as_typed(moved.resolved) == {"data.root": "one"}


@pytest.mark.parametrize("root", ["data.root", "data"])
def test_a_run_of_other_data_has_their_classes(root: str, tmp_path: Path) -> None:
    """As `dumo show RUN --set data.root=b` loads it; of its own data what was found stays, also where they are gone."""
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
    """Of models that are known by name, and of functions; a folder of that name changes nothing for the first."""
    os.mkdir(PUBLISHED[0])
    assert dict(places(with_absolute_paths(load("sd3-lora"))))["pipeline.source"] == PUBLISHED[0]
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
