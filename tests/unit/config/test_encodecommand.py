"""The command that makes a cache or a table of texts, typed, makes that one."""

import shlex
from pathlib import Path

import pytest

from dumo.config import recipes
from dumo.config.encodecommand import encode_command, encode_texts_command
from dumo.config.load import load_recipe
from dumo.config.source import parse_recipe
from dumo.data import Latents, is_latents
from dumo.nets.textfamily import has_table
from dumo.run.encode import encoding_work
from unit.data.animals import as_folder

# of their own, not of their base's
CACHES = [
    name for name in recipes.names() if parse_recipe(name).get("data", {}).get("root", "$MY")[:3] not in ("$MY", "$DU")
]
CACHES += ["imagenet256-xl2", "imagenet512-xl1-dcae", "imagenet512-xl4"]


def latents(recipe: str, *changes: str) -> Latents:
    data = load_recipe(recipe, changes).data
    assert is_latents(data)
    return data


def typed(command: str) -> tuple[list[str], list[str]]:
    """The words of a command, and its settings; without the pipeline, which is not here."""
    words = shlex.split(command)
    first = words.index("--set") if "--set" in words else len(words)
    return words[:first], [text for text in words[first + 1 :: 2] if not text.startswith("pipeline=")]


@pytest.mark.parametrize("recipe", CACHES)
def test_it_makes_the_same_data(recipe: str) -> None:
    data = latents(recipe)
    words, settings = typed(encode_command(data))
    assert settings == []
    assert latents(words[2]) == data

    changes = ["data.images.root=my photos", "data.images.crop=bicubic", "data.images.split=train"]
    changes += ["data.images.label=fine", f"data.images.flip={not data.images.flip}", "data.images.on_bad=skip"]
    changed = latents(recipe, *changes)
    words, settings = typed(encode_command(changed))
    assert latents(words[2], *settings) == changed


def test_it_sets_what_the_recipe_has_otherwise() -> None:
    command = "dumo encode my-images-256 --set data.images.root=photos"
    assert encode_command(latents("my-images-256", "data.images.root=photos")) == command
    data = latents(
        "my-images-256", "data.images.root=photos", "data.codec.kind=sd-vae", "data.images.buckets={step: 32}"
    )
    words, settings = typed(encode_command(data))
    assert latents(words[2], *settings) == data
    data = latents("my-images-64", "data.root=/there/runs/latents/my-images-64", "data.images.count=3")
    command = "dumo encode my-images-64 --count 3 --set data.root=/there/runs/latents/my-images-64"
    assert encode_command(data) == command


def test_a_cache_of_no_recipe_is_made_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    as_folder(tmp_path / "photos")
    data = latents("my-images-256", "data.root=my cache", "data.images.root=photos", "data.images.flip=false")
    words, settings = typed(encode_command(data))
    assert words == ["dumo", "encode", "photos", "my cache", "--codec", "taef2", "--side", "256"]
    made = encoding_work(words[2], settings, out=words[3], codec=words[5], side=int(words[7])).data
    assert made == data.with_facts()


def with_pipeline(data: Latents, source: str) -> Latents:
    """Latents of a pipeline that lies elsewhere."""
    assert data.codec.kind == "pipeline"
    pipeline = data.codec.pipeline.model_copy(update={"source": source})
    return data.model_copy(update={"codec": data.codec.within(pipeline)})


def test_it_names_the_pipeline() -> None:
    """A recipe has its name alone; none where it is that of a few-step run, or no recipe is known."""
    assert encode_command(latents("sd3-lora")) == "dumo encode sd3-lora --set 'pipeline=$PRETRAINED'"
    larger = with_pipeline(latents("sd3-lora", "data.images.side=768"), "/my models/sd3")
    command = "dumo encode sd3-lora --set 'pipeline=/my models/sd3' --set data.images.side=768"
    assert encode_command(larger) == command
    command = "dumo encode sdxl-lora --set pipeline=/sdxl"
    assert encode_command(with_pipeline(latents("sdxl-lora"), "/sdxl")) == command
    assert encode_command(with_pipeline(latents("personal"), "/sd3")) == "dumo encode personal"
    assert encode_command(latents("sd3-lora", "data.root=elsewhere")) == "dumo encode"


def test_a_table_of_texts_is_made_by_the_recipe_and_what_differs_from_it() -> None:
    changes = ["net.texts.root=my texts", "net.texts.encoder.length=77", "net.texts.width=768", "net.texts.memory=0"]
    plain, changed = load_recipe("text-256"), load_recipe("text-256", changes)
    assert has_table(plain.net.texts)
    assert has_table(changed.net.texts)
    assert encode_texts_command(plain.data, plain.net.texts) == "dumo encode text-256"
    words, settings = typed(encode_texts_command(changed.data, changed.net.texts))
    assert words == ["dumo", "encode", "text-256"]
    assert load_recipe("text-256", [*settings, "net.texts.memory=0"]).net.texts == changed.net.texts
    elsewhere = encode_texts_command(plain.data, plain.net.texts, in_other_folder=True)
    assert elsewhere == "dumo encode text-256 --set net.texts.root=DIR"
    tuned = load_recipe("sd3-lora")
    assert has_table(tuned.net.texts)
    assert encode_texts_command(tuned.data, tuned.net.texts) == "dumo encode sd3-lora --set 'pipeline=$PRETRAINED'"


def test_a_table_of_no_recipes_texts_is_made_by_the_settings_that_are_there() -> None:
    pixels, texts = load_recipe("digits").data, load_recipe("text-256").net.texts
    assert has_table(texts)
    assert encode_texts_command(pixels, texts) == "dumo encode with this recipe and its settings"
    assert encode_texts_command(load_recipe("sd3-lora").data, texts, in_other_folder=True) == (
        "dumo encode with this recipe and its settings, and --set net.texts.root=DIR"
    )
