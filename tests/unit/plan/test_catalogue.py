"""What is to be fetched: every place that a recipe reads is told, and what stands there is looked at."""

import re
from pathlib import Path

import pytest

from dumo.config import recipes
from dumo.plan import catalogue
from dumo.plan.catalogue import CATALOGUE, describe, find, recipes_needing
from e2e.shell import call, refused
from recipe import recipe

VARIABLES = (
    "DUMO_DATA",
    "DUMO_LATENTS",
    "IMAGENET",
    "MY_IMAGES",
    "DUMO_INCEPTION",
    "DUMO_ADM",
    "PRETRAINED",
    "FEW_STEPS",
)


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (*VARIABLES, "HF_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_every_variable_that_a_recipe_reads_is_told() -> None:
    read = {name for recipe in recipes.names() for name in re.findall(r"\$([A-Z_]+)", recipes.text(recipe))}
    assert read <= set(VARIABLES)
    said = " ".join(" ".join((*item.places, *item.get, item.layout)) for item in CATALOGUE)
    assert not [name for name in VARIABLES if f"${name}" not in said]


@pytest.mark.parametrize("item", CATALOGUE, ids=lambda item: item.name)
def test_no_command_writes_to_a_folder_of_a_variable_that_is_not_set(item: catalogue.Item) -> None:
    """mkdir -p $DUMO_DATA/cifar10, typed as it is printed, would be /cifar10."""
    exported: set[str] = set()
    for line in item.get:
        exported |= set(re.findall(r"export ([A-Z_]+)=", line))
        assert set(re.findall(r"\$([A-Z_]+)", line)) <= exported | {"PWD"}, line


@pytest.mark.slow
def test_a_recipe_is_named_by_what_it_needs() -> None:
    named = {name: {*recipes_needing(find(name))} for name in ("sd-vae", "dc-ae", "inception", "pretrained")}
    for name in ("imagenet256-xl2", "cifar10-latents", "my-images-256", "imagenet512-xl1-dcae", "sana"):
        spec = recipe(name)
        inception = "inception" if hasattr(spec.evaluate.protocol, "frechet") else None
        wanted = {"pretrained"} if name == "sana" else {spec.data.codec.kind, inception}  # type: ignore[union-attr]
        wanted -= {None, "taef2"}  # which comes with dumo
        assert {item for item in named if name in named[item]} == wanted, name


def test_what_stands_there_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "recipes_needing", lambda item: iter(()))  # seconds
    sample = find("imagenet-sample")
    assert describe(sample).places[0].state == "the variable is not set"
    monkeypatch.setenv("DUMO_DATA", str(tmp_path))
    assert "not there" in describe(sample).places[0].state
    (tmp_path / "imagenet-sample").mkdir()
    assert [describe(item).is_there for item in CATALOGUE] == [
        item.name == "imagenet-sample" if item.places else None for item in CATALOGUE
    ]


@pytest.mark.parametrize("model", ["transformer", "unet"])
def test_a_pipeline_has_its_model_in_either_folder(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "recipes_needing", lambda item: iter(()))  # seconds
    monkeypatch.setenv("PRETRAINED", str(tmp_path))
    (tmp_path / "vae").mkdir()
    for name in ("model_index.json", "vae/config.json"):
        (tmp_path / name).touch()
    assert describe(find("pretrained")).is_there is False
    (tmp_path / model).mkdir()
    (tmp_path / model / "config.json").touch()
    assert describe(find("pretrained")).is_there


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    one = call("data", "cifar10")
    monkeypatch.setattr(catalogue, "recipes_needing", lambda item: iter(()))  # seconds
    every = call("data", "--json")
    assert (every.code, every.err, one.code) == (0, "", 0)
    assert [item["name"] for item in every.json] == [item.name for item in CATALOGUE]
    for word in ("curl", "train-00000-of-00001.parquet", "the variable is not set", "cifar10-latents"):
        assert word in one.out
    refused("data", "cifr10", named=("'cifr10'", "did you mean 'cifar10'?"))
