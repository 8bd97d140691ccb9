"""One file of weights as a pipeline: the line that refuses it says how to make a folder of it, and that works."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dumo.encoders.pipeline import Pipeline
from dumo.encoders.singlefile import unpack_hint
from dumo.types import UserError
from e2e.shell import call, refused, sets
from ldm import file_of
from pipelines import save


def refusal(file: Path) -> str:
    """The line."""
    with pytest.raises(UserError) as raised:
        _ = Pipeline(source=str(file)).folder
    return str(raised.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_file_of_the_original_layout_becomes_the_folder(tmp_path: Path) -> None:
    """By the command as it stands, but for a folder of configs and tokenizers in place of the hub's."""
    folder, configs = save("SD1", tmp_path / "sd1"), tmp_path / "configs"
    file = file_of(folder, tmp_path / "one.safetensors")
    shutil.copytree(folder, configs, ignore=shutil.ignore_patterns("*.safetensors"))
    line = refusal(file)
    found = re.search(r"Make a folder DIR of it, python -c '(.*)', and set pipeline=DIR$", line)
    assert found, line
    code = found[1].replace("stable-diffusion-v1-5/stable-diffusion-v1-5", str(configs))
    exec(code.replace('"DIR"', f'"{tmp_path}/made"'))
    weights = [one.relative_to(folder) for one in folder.rglob("*.safetensors")]
    assert len(weights) == 3
    for one in weights:
        before, after = load_file(folder / one), load_file(tmp_path / "made" / one)
        assert before.keys() == after.keys()
        assert all(torch.equal(x.flatten(), after[name].flatten()) for name, x in before.items())
    assert Pipeline(source=str(tmp_path / "made")).class_name == "StableDiffusionPipeline"


def test_which_pipeline_a_file_is_of(tmp_path: Path) -> None:
    save_file({"conditioner.embedders.1.model.ln_final.weight": torch.ones(2)}, file := tmp_path / "xl.safetensors")
    assert "StableDiffusionXLPipeline" in (line := refusal(file))
    assert 'config="stabilityai/stable-diffusion-xl-base-1.0"' in line
    file.write_bytes(b"nothing")
    assert "is damaged or is not safetensors" in refusal(file)


@pytest.mark.parametrize("name", ["it's.safetensors", 'a "b".safetensors', "$HOME `x` \\.safetensors"])
@pytest.mark.parametrize("tensor", ["cond_stage_model.transformer.bias", "double_blocks.0.img_attn.qkv.weight"])
def test_the_command_reaches_python_whatever_the_file_is_called(name: str, tensor: str, tmp_path: Path) -> None:
    save_file({tensor: torch.ones(2)}, file := tmp_path / name)
    found = re.search(r"python -c (.*)$", unpack_hint(file))
    assert found
    code = subprocess.check_output(["bash", "-c", f"printf %s {found[1]}"], text=True)
    strings = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert str(file) in strings


SD3 = ("transformer_blocks.0.norm1_context.linear.bias", "pos_embed.proj.bias", "time_text_embed.a.bias")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            ["model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "guidance_in.in_layer.bias"],
            "FLUX.1-dev",
        ),
        (["double_blocks.0.img_attn.qkv.weight"], "FLUX.1-schnell"),
        (["double_blocks.0.img_attn.qkv.weight", "distilled_guidance_layer.in_proj.bias"], "Chroma1-HD"),
        (["double_stream_modulation_img.lin.weight", "single_blocks.47.linear1.weight"], "FLUX.2-dev"),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "stable-diffusion-3-medium-diffusers"),
        (["joint_blocks.37.x_block.mlp.fc1.weight"], "stable-diffusion-3.5-large"),
        ([*SD3, "transformer_blocks.0.attn.to_q.weight"], "stable-diffusion-3-medium-diffusers"),
        ([*SD3, "transformer_blocks.0.attn2.to_q.weight"], "stable-diffusion-3.5-medium"),
        ([*SD3, "transformer_blocks.37.norm1_context.linear.bias"], "stable-diffusion-3.5-large"),
        (["double_blocks.0.a", "guidance_in.b", "txt_in.individual_token_refiner.c"], "no model that dumo knows"),
        (["head.modulation", "img_emb.proj.0.weight"], "no model that dumo knows"),
        (["transformer_blocks.0.img_mod.1.weight"], "Qwen/Qwen-Image"),
        (["cap_pad_token", "cap_embedder.0.weight"], "Tongyi-MAI/Z-Image"),
        (["cap_embedder.0.weight"], "Lumina-Image-2.0"),
        (["blocks.0.cross_attn.q_linear.weight", "attention_y_norm.weight"], "Sana_1600M"),
        (["blocks.0.cross_attn.q_linear.weight"], "PixArt-Sigma"),
        (["cond_stage_model.model.ln_final.weight"], "stable-diffusion-2-1"),
        (["cond_stage_model.transformer.text_model.final_layer_norm.bias"], "stable-diffusion-v1-5"),
    ],
)
def test_a_file_gets_the_command_of_its_own_family(names: list[str], said: str, tmp_path: Path) -> None:
    save_file({name: torch.ones(2) for name in names}, file := tmp_path / "one.safetensors")
    line = refusal(file)
    assert said in line
    assert said == "stable-diffusion-v1-5" or "StableDiffusionPipeline" not in line or said == "stable-diffusion-2-1"


def test_a_file_of_no_known_family_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"fc.weight": torch.ones(2)}, file := tmp_path / "one.safetensors")
    assert "by its tensors (fc.weight ...) of no model that dumo knows" in (line := refusal(file))
    assert "from_single_file" not in line
    refused("train", file, named=("of no model that dumo knows", "pipeline=DIR"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_file_of_a_transformer_becomes_that_part_of_the_folder(tmp_path: Path) -> None:
    """By the command as it stands, behind the download of the other parts."""
    folder = save("Flux", tmp_path / "flux")
    (weights,) = (folder / "transformer").glob("*.safetensors")
    file = weights.rename(tmp_path / "one.safetensors")
    line = refusal(file)
    found = re.search(r"of a FluxTransformer2DModel, .*'tokenizer\*/\*' .* && python -c '(.*)', and set", line)
    assert found, line
    exec(found[1].replace('"DIR', f'"{folder}'))
    before, after = load_file(file), load_file(weights)
    assert before.keys() == after.keys()
    assert all(torch.equal(x, after[name]) for name, x in before.items())


def test_a_name_on_the_hub_is_told_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the pipeline and as the source; a path that begins here is none."""
    monkeypatch.chdir(tmp_path)
    name = "stabilityai/stable-diffusion-xl-base-1.0"
    fetch = f"hf download {name} --include model_index.json", "--local-dir stable-diffusion-xl-base-1.0"
    refused("dry", "sdxl-lora", *sets(f"pipeline={name}"), named=(*fetch, "set pipeline=stable-diffusion-xl-base-1.0"))
    refused("train", name, named=(*fetch, "dumo encode sdxl-lora --set pipeline=stable-diffusion-xl-base-1.0"))
    refused("train", "owner/model", named=("If it is a model on the Hugging Face hub", "hf download owner/model"))
    (tmp_path / "owner").mkdir()
    for words in (("train", "owner/model"), ("train", "runs/model")):
        assert "hf download" not in call(*words).err
    (tmp_path / "owner" / "model_index.json").write_text("{}")
    refused("train", "owner", named=("is the pipeline of a model", "--set pipeline=owner"))
