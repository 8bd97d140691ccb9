"""Trained runs that come with dumo: small, as their README.md says, opened where they lie, and never written to."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dumo
from dumo.config.load import RUN_FILE, load
from dumo.config.place import EVALUATION_FILE
from dumo.io import digest, run_places
from dumo.io.read import user_path
from dumo.report import evaluation_card
from dumo.run import read_only, resolve
from dumo.run.folder import EXPORTED_WEIGHTS
from dumo.run.weights import load_run
from dumo.runtime import shell_path
from dumo.runtime.progress import no_bar
from dumo.types import UserError

MEGABYTES = {"cifar10-trained": 14, "digits-trained": 1.5}
NAME = "digits-trained"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DUMO_DATA", raising=False)
    return tmp_path


def test_there_are_those_with_a_limit() -> None:
    assert run_places.names() == [*MEGABYTES]


@pytest.mark.parametrize("name", MEGABYTES)
def test_small_and_as_its_card_says(name: str) -> None:
    files = [path for path in run_places.folder(name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MEGABYTES[name] * 1e6
    weights = run_places.folder(name) / EXPORTED_WEIGHTS
    assert {x.dtype for x in load_file(weights).values()} == {torch.float16}
    card = (run_places.folder(name) / "README.md").read_text()
    assert re.findall(r"SHA-256 (\w+)", card) == [digest.of_file(weights)]


@pytest.mark.parametrize("name", MEGABYTES)
def test_it_is_opened_where_it_lies_and_makes_images(name: str, here: Path) -> None:
    """Where there are no data. Its classes have names; what is made of it goes to a folder here."""
    opened = load_run(name, device="cpu")
    assert opened.run_folder.path == run_places.folder(name)
    assert opened.is_only_read
    assert opened.folder == Path(name) == dumo.load(name, device="cpu").folder
    card = (run_places.folder(name) / "README.md").read_text()
    assert f"{opened.step:,} steps" in card
    assert f"Weights: {sum(p.numel() for p in opened.net.parameters()):,}" in card
    images = opened.make_samples(torch.arange(2), nfe=1).x
    assert images.shape == (2, *opened.spec.shown_shape)
    assert float(images.std()) > 0.3
    assert not [place for _, place in resolve.places(opened.spec) if Path(place).is_absolute()]
    assert not [*here.iterdir()]


def test_classes_of_cifar10_have_their_names() -> None:
    conditions = load("cifar10-trained").conditions
    assert conditions.names[3] == "cat"
    assert conditions.index("truck") == 9


def test_a_place_in_a_shipped_run_is_found_wherever_dumo_is() -> None:
    file = "taef2.safetensors"
    assert user_path(f"dumo:cifar10-trained/{file}", "") == run_places.folder("cifar10-trained") / file
    assert user_path("dumo:cifar10-trained", "") == run_places.folder("cifar10-trained")
    assert user_path("dumo:other/x", "") == Path("dumo:other/x")
    assert load("cifar10-trained").data.codec.digest() == load("cifar10-trained").data.codec.sha256  # pyright: ignore


@pytest.mark.parametrize("name", MEGABYTES)
def test_its_evaluation_is_of_its_weights(name: str) -> None:
    opened = load_run(name, device="cpu")
    report = evaluation_card.read_report(run_places.folder(name) / EVALUATION_FILE)
    assert evaluation_card.is_card_of(report["card"], opened)
    assert [row["nfe"] for row in report["results"]] == [1, 2, 4]


def test_what_was_made_here_goes_before_what_came(here: Path) -> None:
    opened = load_run(NAME, device="cpu")
    assert opened.find_output(EVALUATION_FILE) == run_places.folder(NAME) / EVALUATION_FILE
    (here / NAME).mkdir()
    (here / NAME / EVALUATION_FILE).touch()
    assert opened.find_output(EVALUATION_FILE) == Path(NAME, EVALUATION_FILE)


@pytest.mark.nightly
def test_a_training_begins_with_its_weights(here: Path) -> None:
    changes = {"train.steps": 1, "train.optimizer.lr": 1e-9, "train.optimizer.adamw_lr": 1e-9}
    run = dumo.train(NAME, changes, bar=no_bar)
    assert run.folder == Path("runs", NAME)
    weights = load_run(NAME, device="cpu").net.state_dict()
    for key, x in run.net.state_dict().items():  # a step brings matrices to their magnitude
        assert torch.cosine_similarity(x.flatten(), weights[key].flatten(), 0) > 0.999, key
    assert dumo.train(NAME, changes, bar=no_bar).step == 1  # there is no more to do


def test_a_source_that_is_no_run_is_answered_with_what_there_is(here: Path) -> None:
    with pytest.raises(UserError):
        load_run("digits")
    with pytest.raises(UserError):
        load_run("nothing")
    (here / "runs/digits").mkdir(parents=True)
    (here / "runs/digits" / RUN_FILE).touch()
    with pytest.raises(UserError):
        load_run("digits")


@pytest.mark.slow
def test_another_run_of_this_name_is_not_taken_for_it(here: Path) -> None:
    """Each opens by a name of its own; a folder without a run is no rival."""
    shutil.copytree(run_places.folder(NAME), here / NAME)
    with pytest.raises(UserError):
        load_run(NAME, device="cpu")
    assert load_run(f"./{NAME}", device="cpu").folder == load_run(Path(NAME), device="cpu").folder == Path(NAME)
    assert shell_path(Path(NAME)) == f"./{NAME}"
    ours = dumo.load(f"dumo:{NAME}", device="cpu")
    assert ours.run_folder.path == run_places.folder(NAME)
    assert ours.folder == Path(f"dumo-{NAME}")  # what is written leaves the other run as it is
    (here / NAME / EVALUATION_FILE).unlink()
    assert dumo.compare([ours])["rows"]
    (here / NAME / RUN_FILE).write_text("")
    assert ours.export("out").is_dir()
    (here / NAME / "run.yaml").unlink()
    assert read_only.find(NAME) == read_only.find(Path(NAME)) == run_places.folder(NAME)


@pytest.mark.slow
def test_a_copy_that_an_earlier_dumo_made_is_a_run(here: Path) -> None:
    shutil.copytree(run_places.folder(NAME), here / "runs" / NAME)
    opened = load_run(f"runs/{NAME}", device="cpu")
    assert opened.run_folder.path == opened.folder == Path("runs", NAME)
    assert not opened.is_only_read


@pytest.mark.slow
def test_a_damaged_copy_is_refused(here: Path) -> None:
    shutil.copytree(run_places.folder(NAME), here / "run")
    file = here / "run" / EXPORTED_WEIGHTS
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError):
        load_run("run", device="cpu")
