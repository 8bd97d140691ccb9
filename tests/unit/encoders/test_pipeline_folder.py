"""What a folder of diffusers says of itself, and who reads it."""

import json
from pathlib import Path

import pytest

from dumo.config.load import dump, load
from dumo.config.spec import with_pipeline
from dumo.encoders import PipelineVae
from dumo.encoders.pipeline_folder import Pipeline
from dumo.io.hub import TRANSFORMER, VAE, published_config
from dumo.nets import Pretrained
from dumo.nets.text_rows import Codes
from dumo.run.resolve import with_hashes
from dumo.types import UserError
from pipelines import save

SD3 = "stabilityai/stable-diffusion-3-medium-diffusers"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole pipeline: to be read."""
    return save("SD3", tmp_path_factory.mktemp("pipeline") / "sd3")


@pytest.mark.slow
def test_a_run_notes_each_part_and_hands_the_folder_to_who_reads_it(folder: Path, tmp_path: Path) -> None:
    run = load("sd3-lora", [f"pipeline={folder}", "data.images.side=64", "train.precision=bf16"])
    began = with_hashes(run)
    facts = (began.pipeline and began.pipeline.facts) or {}
    assert facts.keys() == {"class", "transformer", "vae", "vae.weights", "scheduler", "texts"}
    assert facts["class"] == "StableDiffusion3Pipeline"
    assert began.net.pipeline == began.data.codec.pipeline == began.pipeline  # pyright: ignore
    moved = began.model_copy(update={"pipeline": Pipeline(source="elsewhere")})
    assert moved.net.pipeline.source == moved.net.texts.pipeline.source == "elsewhere"  # pyright: ignore
    assert began.net.pipeline.source == str(folder)  # pyright: ignore
    (tmp_path / "run.yaml").write_text(text := dump(began))
    assert text.count(str(folder)) == 1
    assert load(str(tmp_path)) == began


def test_a_run_notes_the_parts_that_are_there(tmp_path: Path) -> None:
    """As where the text encoders were left out of a download, for the captions are encoded already."""
    index = {"_class_name": "FluxPipeline", "text_encoder": ["transformers", "CLIPTextModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for part in (TRANSFORMER, VAE):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text("{}")
    began = Pipeline(source=str(tmp_path)).with_facts()
    assert (began.facts or {}).keys() == {"class", TRANSFORMER, VAE}
    (tmp_path / VAE / "config.json").write_text('{"scaling_factor": 2}')
    with pytest.raises(UserError, match=r"the vae of .* has changed"):
        began.config(VAE)
    assert Pipeline(source=str(tmp_path / "nowhere")).with_facts().facts is None


def test_who_needs_a_pipeline_says_so() -> None:
    with pytest.raises(UserError, match="pipeline is missing: pipeline="):
        _ = Pretrained(texts=Codes()).pipeline
    known = Pipeline.model_validate(SD3)
    assert with_pipeline(PipelineVae(), known).shape(512) == (16, 64, 64)
    with pytest.raises(UserError, match="sd3-small is a config without weights"):
        _ = Pipeline(source="sd3-small").folder
    with pytest.raises(UserError, match="sd3-small is a transformer without a vae"):
        Pipeline(source="sd3-small").config("vae")


def test_a_safety_checker_of_diffusers_and_what_is_null_are_read(tmp_path: Path) -> None:
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index = {"safety_checker": checker, "image_encoder": [None, None], "_versions": ["a", "b"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert Pipeline(source=str(tmp_path)).index == index


def test_a_unet_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    with pytest.raises(UserError, match=r"has no transformer/config\.json"):
        Pipeline(source=str(tmp_path)).part_folder(TRANSFORMER)
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    pipeline = Pipeline(source=str(tmp_path))
    assert (pipeline.part_folder(TRANSFORMER), pipeline.model_part) == (tmp_path / "unet", "unet")


def test_other_parts_come_from_the_repository_that_the_index_notes(tmp_path: Path) -> None:
    (tmp_path / TRANSFORMER).mkdir()
    (tmp_path / TRANSFORMER / "config.json").write_text(
        json.dumps(published_config("black-forest-labs/FLUX.1-dev")[TRANSFORMER])
    )
    pipeline = Pipeline(source=str(tmp_path))
    assert pipeline.repository == ""
    (tmp_path / "model_index.json").write_text('{"_name_or_path": "owner/model"}')
    assert pipeline.repository == "owner/model"
    assert Pipeline(source=f"{SD3}@{'0' * 40}").repository == SD3


@pytest.mark.parametrize("noted", ["./sd15-mine", "../sd15", "outputs/sd15", "sd15", "/data/sd15"])
def test_a_place_in_an_index_is_no_name_on_the_hub(noted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps({"_name_or_path": noted}))
    assert Pipeline(source=str(tmp_path)).repository == ""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: other\nlicense_name: mine\ntags: [a]\n---\n", {"license": "other", "license_name": "mine"}),
        ("# no head", {}),
    ],
)
def test_the_licence_is_that_of_the_card(text: str, found: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert Pipeline(source=str(tmp_path)).license == found
