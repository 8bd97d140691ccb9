"""A LoRA as one file: what diffusers and ComfyUI make of it is the model that dumo exports."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import transformers_tiny as tiny
from comfyui import loaded, native
from dumo.encoders.pipeline_folder import Pipeline
from dumo.export.lora import adapter_config, lora_products, named_tensors, write_for_comfyui
from dumo.export.model import ExportedModel
from dumo.export.stock import PIPELINE_BY_MODEL
from dumo.io.hub import published_config
from dumo.nets.dualized import Dualized
from dumo.nets.family import FAMILIES, SDXL, UNET, Family
from dumo.nets.lora import FEW_STEP, Lora, with_adapters
from dumo.nets.pretrained import Pretrained
from dumo.nets.text_rows import Codes
from dumo.nets.text_spec import PipelineTexts
from dumo.types import UserError
from tiers import tiered
from transformers_saved import CLASSES, SHAPE

NAMES = ("sd3", "sd3.5", "flux", "flux2", "flux2-klein", "chroma", "qwen", "z-image", "auraflow", "pixart")


def tuned(name: str, *, lora: bool = True, subject: int | None = None) -> tuple[dict[str, torch.Tensor], ExportedModel]:
    """The weights of a tiny model, and that model after all that is trained beside adapters has moved."""
    model: Any = tiny.TINY[name].model()
    model.register_to_config(_class_name=tiny.TINY[name].kind)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    row, spec = (
        FAMILIES[tiny.TINY[name].kind],
        Pretrained(texts=Codes(), lora=Lora(rank=3, subject=subject) if lora else None),
    )
    rows, limit = spec.text_rows(row, model.config, CLASSES), 10.0 if row.time_embedder else None
    net = Dualized(model, row, rows, ("v", "u"), row.patch(model.config, SHAPE[0]), lora=spec.lora, lowpass_limit=limit)
    g = torch.Generator().manual_seed(0)
    for path, p in net.named_parameters():
        is_few_step = subject and any(part in path for part in ("heads.", "timestep_embedder.", ".lora_"))
        if p.requires_grad or (is_few_step and not path.endswith("bias")):
            p.data += 0.1 * torch.randn(p.shape, generator=g)
    run: Any = SimpleNamespace(sample=SimpleNamespace(guide=SimpleNamespace(scale=1.0)))
    read = spec.model_copy(update={"texts": PipelineTexts(root="texts")})  # as is one that was tuned on captions
    return before, ExportedModel(run, read.within(Pipeline(source="sd3-digits")), net, "u")


def file_of(exported: ExportedModel) -> dict[str, torch.Tensor]:
    """The tensors of its LoRA."""
    return named_tensors(exported, lora_products(exported))


@pytest.mark.filterwarnings("ignore:.*FluxPosEmbed", "ignore:.*merg")
@pytest.mark.parametrize("name", [name for name in NAMES if name != "pixart"])  # diffusers loads no LoRA for it
def test_diffusers_adds_every_layer_as_it_is(name: str) -> None:
    """Adapters and whole layers have other ranks, and Flux's last layer is called as one of each block."""
    before, exported = tuned(name)
    component = exported.component_name
    config = adapter_config(lora_products(exported), component)
    assert config[f"{component}.rank_pattern"]
    model: Any = tiny.TINY[name].model()
    model.load_state_dict(before)
    model.load_lora_adapter(file_of(exported), prefix=component, metadata=json.loads(json.dumps(config)))
    after = exported.build_model().state_dict()
    loaded_layers = {path: module for path, module in model.named_modules() if hasattr(module, "lora_A")}
    assert len(loaded_layers) == len(config[f"{component}.target_modules"])
    for path, layer in loaded_layers.items():
        weight = layer.base_layer.weight + layer.get_delta_weight("default_0")
        torch.testing.assert_close(weight, after[f"{path}.weight"], rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*FluxPosEmbed", "ignore:.*merge")
@pytest.mark.parametrize("name", NAMES)
def test_comfyui_merges_what_dumo_merges(name: str) -> None:
    before, exported = tuned(name)
    file, kind = file_of(exported), exported.model_class
    after = native(exported.build_model().state_dict(), kind)
    found = loaded(before, file, kind)
    assert found.keys() == after.keys()
    for key, tensor in after.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    assert any((tensor - native(before, kind)[key]).abs().max() > 0.01 for key, tensor in after.items())


def test_a_subject_and_its_few_step_run_are_one_lora_or_two() -> None:
    """What both add up to is the model of both; the subject's alone is on top of the few-step model."""
    before, exported = tuned("sd3", subject=2)
    fused, alone, kind = (
        file_of(exported),
        file_of(replace(exported, subject_only=True)),
        exported.model_class,
    )
    with with_adapters(exported.net.model, FEW_STEP):
        few = exported.build_model().state_dict()
    after = native(exported.build_model().state_dict(), kind)
    for found in (loaded(before, fused, kind), loaded(few, alone, kind)):
        assert all(torch.allclose(found[key], tensor, rtol=0, atol=1e-6) for key, tensor in after.items())
    assert any((tensor - native(few, kind)[key]).abs().max() > 0.01 for key, tensor in after.items())


def test_a_bias_that_changed_is_in_no_lora() -> None:
    """It would be left out silently."""
    _, exported = tuned("sd3")
    exported.net.heads["u"].out.bias.data += 1
    with pytest.raises(UserError, match="proj_out"):
        lora_products(exported)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sana", "lumina2", "cogview4"])
def test_what_comfyui_finds_by_no_name_is_refused(name: str, tmp_path: Path) -> None:
    assert PIPELINE_BY_MODEL[tiny.TINY[name].kind].loads_lora
    with pytest.raises(UserError, match="ComfyUI does not support the diffusers layer names of"):
        write_for_comfyui(tuned(name)[1], tmp_path / "lora.safetensors", dtype="float32", metadata={})
    known = {name for name, stock in PIPELINE_BY_MODEL.items() if stock.comfyui_names is not None}
    assert {tiny.TINY[name].kind for name in (*NAMES, "sdxl")} == known


def of_unet(model: Any, row: Family, *, convolutions: bool) -> tuple[dict[str, torch.Tensor], ExportedModel]:  # noqa: ANN401
    """As `tuned`, of a UNet of a published pipeline."""
    before = {key: x.clone() for key, x in model.state_dict().items()}
    spec = Pretrained(texts=Codes(), lora=Lora(rank=3, convolutions=convolutions))
    rows = spec.text_rows(row, model.config, CLASSES)
    net = Dualized(model, row, rows, ("v", "u"), 1, lora=spec.lora, lowpass_limit=10.0)
    g = torch.Generator().manual_seed(0)
    for p in net.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=g)
    run: Any = SimpleNamespace(sample=SimpleNamespace(guide=SimpleNamespace(scale=1.0)))
    read = spec.model_copy(update={"texts": PipelineTexts(root="texts")})
    small = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    pipeline = Pipeline(source="stabilityai/stable-diffusion-xl-base-1.0" if row is SDXL else small)
    return before, ExportedModel(run, read.within(pipeline), net, "u")


@pytest.mark.slow
@pytest.mark.parametrize("convolutions", [False, True])
def test_layers_of_a_unet_have_the_names_that_kohya_gave_them(convolutions: bool) -> None:
    """What they add up to is the model that dumo exports, layer by layer; a factor's scale is alpha over its rank."""
    before, exported = of_unet(tiny.TINY["sdxl"].model(), SDXL, convolutions=convolutions)
    file, after = file_of(exported), exported.build_model().state_dict()
    assert {"lora_unet_conv_out.alpha", "lora_unet_time_embedding_linear_1.alpha"} <= file.keys()
    assert convolutions == ("lora_unet_down_blocks_0_downsamplers_0_conv.lora_down.weight" in file)
    left = set(file)
    for key, old in before.items():
        layer, _, what = key.rpartition(".")
        called = "lora_unet_" + layer.replace(".", "_")
        new = old
        if what == "weight" and f"{called}.alpha" in file:
            up, down, alpha = (file[f"{called}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
            new = new + alpha / len(down) * (up.flatten(1) @ down.flatten(1)).view(old.shape)
            left -= {f"{called}.{part}" for part in ("lora_up.weight", "lora_down.weight", "alpha")}
        torch.testing.assert_close(after[key], new, rtol=0, atol=1e-6)
    assert not left


def published_layers() -> set[str]:
    """The layers of SD 1's UNet that a LoRA of kohya's scripts has, by its keys in `safetensors_weight_mapping`.

    PaddlePaddle/PaddleNLP at 0f033fe, ppdiffusers/ppdiffusers/webui_lora_helper.py: 192 of the UNet.
    """
    parts = [f"transformer_blocks_0_attn{i}_to_{x}" for i in (1, 2) for x in ("q", "k", "v", "out_0")]
    parts += ["proj_in", "proj_out", "transformer_blocks_0_ff_net_0_proj", "transformer_blocks_0_ff_net_2"]
    blocks = (
        [(f"down_blocks_{i}", 2) for i in (0, 1, 2)] + [("mid_block", 1)] + [(f"up_blocks_{i}", 3) for i in (1, 2, 3)]
    )
    return {
        f"lora_unet_{block}_attentions_{k}_{part}" for block, count in blocks for k in range(count) for part in parts
    }


@pytest.mark.slow
@pytest.mark.parametrize("convolutions", [False, True])
def test_keys_of_stable_diffusion_are_those_of_published_files(convolutions: bool) -> None:
    """Of SD 1.5's own layout in narrow layers. Without convolutions proj_in and proj_out, 1 x 1, have no adapters."""
    from diffusers import UNet2DConditionModel

    narrow = {"block_out_channels": (32, 32, 32, 32), "cross_attention_dim": 8, "attention_head_dim": 4}
    model: Any = UNet2DConditionModel.from_config(
        published_config("stable-diffusion-v1-5/stable-diffusion-v1-5")["transformer"] | narrow
    )
    _, exported = of_unet(model, FAMILIES[UNET], convolutions=convolutions)
    keys, layers = file_of(exported).keys(), published_layers()
    assert len(layers) == 192
    found = {key.partition(".")[0] for key in keys if ".lora_" in key}
    ends = ("proj_in", "proj_out")
    assert {name for name in found if "attentions" in name} == {
        name for name in layers if convolutions or not name.endswith(ends)
    }
    assert keys == {f"{name}.{end}" for name in found for end in ("lora_down.weight", "lora_up.weight", "alpha")}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", tiered(["sd1", "sdxl"], now=["sdxl"]))
def test_diffusers_reads_kohyas_names_of_all_layers(name: str) -> None:
    """Convolutions, the last layer and the embedding of time are among them."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    kind, row = (StableDiffusionXLPipeline, SDXL) if name == "sdxl" else (StableDiffusionPipeline, FAMILIES[UNET])
    before, exported = of_unet(tiny.TINY[name].model(), row, convolutions=True)
    x, t = tiny.TINY[name].x(), torch.tensor([0.3, 0.9])
    unet: Any = tiny.TINY[name].model()
    unet.load_state_dict(before)
    parts = dict.fromkeys(kind._get_signature_keys(kind)[0])
    pipe = kind(**parts | {"unet": unet, "scheduler": DDIMScheduler()})
    y, base = (tiny.TINY[name](model.train(), x, t) for model in (exported.build_model(), pipe.unet))
    pipe.load_lora_weights(file_of(exported))
    assert (tiny.TINY[name](pipe.unet.train(), x, t) - y).norm() / y.norm() < 1e-5
    assert (base - y).norm() / y.norm() > 0.01


def test_a_model_that_was_tuned_in_full_is_no_lora() -> None:
    with pytest.raises(UserError, match="all weights were trained"):
        lora_products(tuned("sd3", lora=False)[1])
