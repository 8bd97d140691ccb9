"""What networks refuse: one case per row, with the name that the message must contain."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import transformers_tiny as tiny
from dumo.config.load import load
from dumo.encoders.pipeline_folder import Pipeline
from dumo.nets import DiT, Net, UNet
from dumo.nets.family import FLUX2, PIXART, find_family
from dumo.nets.gap import fit_fixed_times
from dumo.nets.lora import Lora
from dumo.nets.route import Route
from dumo.nets.vp import read_scheduler
from dumo.objectives import FACM, MeanFlow, Shortcut
from dumo.types import Needs, UserError
from rows_given import given_rows
from transformers_saved import Saved, built, of
from unit.nets.given import Given
from unit.nets.test_gap import embedders
from unit.nets.test_text_rows import read_words
from unit.nets.test_vp import SD

V = Needs(heads=("v",))
TR = Needs(inputs=("t", "r"), heads=("u",))
SMALL = DiT(patch=2, width=8, depth=2, attention=2)
CONVOLUTIONS = UNet(width=8, multipliers=(1, 2), depth=2, attend=(4,))
KLEIN = {"_class_name": FLUX2, "guidance_embeds": False}

# A network of dumo's own that is built for samples of ten classes.
OWN: list[tuple[Net, dict[str, Any], Needs, tuple[int, ...], str]] = [
    (SMALL, {}, V, (2,), "square"),
    (SMALL, {}, V, (3, 4, 6), "square"),
    (SMALL, {}, V, (3, 5, 5), "net.patch"),
    (SMALL, {"attention": 3}, V, (3, 4, 4), "net.attention"),
    (SMALL, {"attention": 4, "modern": True}, V, (3, 4, 4), "net.modern"),
    (SMALL, {"magnitude": "preserved", "texts": Given()}, V, (3, 4, 4), "net.magnitude"),
    (SMALL, {"depth": 5, "late": 3}, V, (3, 4, 4), "net.late"),
    (SMALL, {"depth": 5, "late": 5}, MeanFlow().needs, (3, 4, 4), "net.late"),
    (SMALL, {"depth": 5, "route": Route(share=0.5, first=3, last=2)}, V, (3, 4, 4), "net.route"),
    (SMALL, {"depth": 5, "route": Route(share=0.5, first=7, last=0)}, V, (3, 4, 4), "net.route"),
    (CONVOLUTIONS, {}, V, (2,), "square"),
    (CONVOLUTIONS, {}, V, (3, 4, 6), "square"),
    (CONVOLUTIONS, {"multipliers": (1, 1, 1)}, V, (3, 6, 6), "net.multipliers"),
    (CONVOLUTIONS, {"augment": 9}, V, (3, 4, 4), "net.augment"),
]

# A pretrained model: its tiny copy, what is changed in its config, or in the fields of the network.
CONFIG: list[tuple[str, dict[str, Any], str]] = [
    ("sd3", {"_class_name": "UNet2DModel"}, "UNet2DModel"),
    ("sd3", {"_class_name": "FooTransformer2DModel"}, "FooTransformer2DModel"),
    ("sd3", {"_class_name": None}, "StableDiffusion3Pipeline"),
    ("sd3", {"in_channels": 3}, "3 channels"),
    ("sd3", {"patch_size": 3}, "3 x 3"),
    ("sd1", {"in_channels": 9}, "9 input channels"),
    ("sd1", {"in_channels": 7}, "7 input channels"),
    ("sd1", {"in_channels": 3, "out_channels": 3}, "3 channels"),
    ("sd1", {"class_embed_type": "timestep"}, "class_embed_type"),
    ("sd1", {"addition_embed_type": "image"}, "addition_embed_type"),
    ("sd1", {"time_cond_proj_dim": 8}, "time_cond_proj_dim"),
    ("sd1", {"flip_sin_to_cos": False}, "flip_sin_to_cos"),
    ("sd1", {"freq_shift": 1}, "freq_shift"),
    ("qwen", {"zero_cond_t": True}, "zero_cond_t"),
    ("z-image", {"siglip_feat_dim": 8}, "siglip_feat_dim"),
    ("sd3", {"reads_more": True}, "reads_more"),
    ("sd3", {"reads": "more"}, "reads"),
]
FIELDS: list[tuple[str, dict[str, Any], str]] = [
    ("sd3", {"guidance": 3.5}, "net.guidance"),
    ("flux2-klein", {"guidance": 3.5}, "net.guidance"),
    ("flux-guided", {"guidance": None}, "net.guidance"),
    ("chroma", {"lowpass": 10.0}, "net.lowpass"),
    ("chroma-masked", {"checkpoint": True}, "net.checkpoint"),
    ("pixart", {"lora": Lora(rank=4, convolutions=True)}, "net.lora.convolutions"),
]
NEEDS: list[tuple[str, Needs, str]] = [
    ("chroma", TR, "objective.kind"),
    ("chroma", FACM().needs, "objective.kind"),
    ("sd3", Shortcut().needs, "objective.kind"),
    ("sd3", Needs(heads=("v", "f")), "objective.kind"),
    ("sd3", Needs(gauges=("g",)), "objective.kind"),
    ("sd3", Needs(knobs={"w": 1.0}), "objective.kind"),
]

# The family of a model, given its config and the class of its pipeline.
FAMILY: list[tuple[dict[str, Any], str, str]] = [
    ({"_class_name": "FooModel"}, "", "FooModel"),
    ({"_class_name": FLUX2}, "Flux2KleinPipeline", "guidance_embeds"),
    (KLEIN, "Flux2KleinInpaintPipeline", "Flux2KleinInpaintPipeline"),
    (KLEIN, "Flux2KleinKVPipeline", "Flux2KleinKVPipeline"),
    (tiny.PIXART | {"_class_name": PIXART, "use_additional_conditions": True, "sample_size": 64}, "", "sample_size"),
    (
        tiny.PIXART | {"_class_name": PIXART, "use_additional_conditions": None, "sample_size": 128},
        "PixArtSigmaPipeline",
        "sample_size",
    ),
]

# What a diffusion model learned, given what its scheduler lacks (...) or has.
SCHEDULER: list[tuple[dict[str, Any], str]] = [
    ({"beta_start": ...}, "beta schedules"),
    ({"beta_schedule": "sigmoid"}, "beta schedules"),
    ({"trained_betas": [0.1, 0.2]}, "beta schedules"),
    ({"prediction_type": "sample"}, "prediction_type"),
    ({"prediction_type": None}, "prediction_type"),
    ({"rescale_betas_zero_snr": True}, "v_prediction"),
    ({"beta_schedule": "squaredcos_cap_v2"}, "v_prediction"),
    ({"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 4000}, "v_prediction"),
]


@pytest.mark.parametrize(("net", "update", "needs", "shape", "name"), OWN)
def test_own(net: Net, update: dict[str, Any], needs: Needs, shape: tuple[int, ...], name: str) -> None:
    with pytest.raises(UserError) as refused:
        net.model_copy(update=update).build(needs, shape, 10)
    assert name in str(refused.value)


@pytest.mark.parametrize(("model", "change", "name"), CONFIG)
def test_config(folder: Saved, tmp_path: Path, model: str, change: dict[str, Any], name: str) -> None:
    source = folder(model).pipeline.folder
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    if (source / "scheduler").exists():
        (tmp_path / "scheduler").symlink_to(source / "scheduler")
    with pytest.raises(UserError) as refused:
        built(of(tmp_path, weights="drawn"))
    assert name in str(refused.value)


@pytest.mark.parametrize(("model", "change", "name"), FIELDS)
def test_fields(folder: Saved, model: str, change: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError) as refused:
        built(folder(model).model_copy(update=change))
    assert name in str(refused.value)


@pytest.mark.parametrize(("model", "needs", "name"), NEEDS)
def test_needs(folder: Saved, model: str, needs: Needs, name: str) -> None:
    with pytest.raises(UserError) as refused:
        built(folder(model), needs)
    assert name in str(refused.value)


@pytest.mark.parametrize(("config", "pipeline", "name"), FAMILY)
def test_family(config: dict[str, Any], pipeline: str, name: str) -> None:
    with pytest.raises(UserError) as refused:
        find_family(config, pipeline)
    assert name in str(refused.value)


@pytest.mark.parametrize(("change", "name"), SCHEDULER)
def test_scheduler(change: dict[str, Any], name: str) -> None:
    config = {key: value for key, value in (SD | change).items() if value is not ...}
    with pytest.raises(UserError) as refused:
        read_scheduler(config)
    assert name in str(refused.value)


def two_transformers(folder: Saved, here: Path) -> None:
    tiny.TINY["wan"].model().save_pretrained(here / "transformer")
    part = ["diffusers", "WanTransformer3DModel"]
    index = {"_class_name": "WanPipeline", "transformer": part, "transformer_2": part}
    (here / "model_index.json").write_text(json.dumps(index))
    built(folder("wan").within(Pipeline(source=str(here))))


def another_transformer(folder: Saved, here: Path) -> None:
    spec = folder("sd3")
    built(spec.within(spec.pipeline.model_copy(update={"facts": {"transformer": "another"}})))


def the_base_of_full_fine_tuning(folder: Saved, here: Path) -> None:
    with built(folder("sd3")).base():
        pass


def float32_passes_of_weights_in_bf16(folder: Saved, here: Path) -> None:
    load("digits", ["net.kind=diffusers", "pipeline=sd3-digits", "net.texts.kind=codes", "net.lora.frozen=bfloat16"])


def an_embedding_without_bias_as_the_velocity_s(folder: Saved, here: Path) -> None:
    built(folder("flux2"), TR).velocity_time_layer()


def passes_at_one_time(folder: Saved, here: Path) -> None:
    embedder, waves = embedders()
    near = torch.stack([waves[0], waves[0] * (1 + 1e-7)])
    outputs = embedder(near).double() + torch.tensor([[1.0], [-1.0]])
    fit_fixed_times(embedder, near, outputs, torch.float32)


def a_prompt_without_the_image_to_edit(folder: Saved, here: Path) -> None:
    given_rows(torch.ones(3, 2, 4), source=torch.zeros(3, 2, 3, 3), read=read_words).append(["a"])


def an_image_for_rows_that_edit_none(folder: Saved, here: Path) -> None:
    given_rows(torch.ones(3, 2, 4), read=read_words).append(["a"], torch.zeros(1, 2, 3, 3))


def a_pipeline_without_a_transformer(folder: Saved, here: Path) -> None:
    index = {"_class_name": "StableCascadeDecoderPipeline", "decoder": ["stable_cascade", "StableCascadeUNet"]}
    (here / "model_index.json").write_text(json.dumps(index))
    built(folder("sd3").within(Pipeline(source=str(here))))


OTHERS: dict[Callable[[Saved, Path], object], str] = {
    two_transformers: "two transformers",
    a_pipeline_without_a_transformer: "StableCascadeDecoderPipeline",
    another_transformer: "the transformer of",
    the_base_of_full_fine_tuning: "net.lora",
    float32_passes_of_weights_in_bf16: "train.precision",
    an_embedding_without_bias_as_the_velocity_s: "bias",
    passes_at_one_time: "--nfe",
    a_prompt_without_the_image_to_edit: "image",
    an_image_for_rows_that_edit_none: "images",
}


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.__name__)
def test_others(folder: Saved, tmp_path: Path, case: Callable[[Saved, Path], object]) -> None:
    with pytest.raises(UserError) as refused:
        case(folder, tmp_path)
    assert OTHERS[case] in str(refused.value)
