"""The weights of a part: which of a folder's files are opened, and that those are fetched from a repository."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from dumo.encoders import PipelineVae
from dumo.encoders.part import (
    DIFFUSERS,
    DIFFUSERS_FILE,
    TRANSFORMERS,
    TRANSFORMERS_FILE,
    choose_files,
    find_weights,
    require_weights,
)
from dumo.encoders.pipeline_folder import TRANSFORMER, VAE, Pipeline
from dumo.encoders.pipeline_folder import _choose_files as choose_pipeline_files
from dumo.nets import Pretrained
from dumo.nets.family import find_family
from dumo.nets.pretrained import model_weights
from dumo.nets.text_rows import Codes
from dumo.nets.text_spec import PipelineTexts
from dumo.types import UserError
from pipelines import PIPELINES, save

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers', of its own code
PLAIN = ["model.safetensors"]
FP16 = ["model.fp16.safetensors"]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
FP16_SHARDS = ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"]
SD3 = "stabilityai/stable-diffusion-3-medium-diffusers"
OLD_SHARDS = ["model-00001-of-00002.fp16.safetensors", "model-00002-of-00002.fp16.safetensors"]


def write(folder: Path, *names: str, index: str = "", lists: list[str] | None = None) -> None:
    """Files without tensors, and an index that lists some."""
    for name in names:
        save_file({}, folder / name)
    if index:
        weight_map = {str(k): name for k, name in enumerate(lists or [])}
        (folder / index).write_text(json.dumps({"weight_map": weight_map}))


def names_and_variant(folder: Path) -> tuple[list[str], str | None] | None:
    """What is opened."""
    found = find_weights(folder, TRANSFORMERS)
    return None if found is None else ([file.name for file in found.files], found.variant)


@pytest.mark.parametrize(
    ("files", "index", "variant"),
    [
        (PLAIN, "", None),
        (SHARDS, "model.safetensors.index.json", None),
        (FP16, "", "fp16"),
        (FP16_SHARDS, "model.safetensors.index.fp16.json", "fp16"),
        (OLD_SHARDS, "model.safetensors.index.fp16.json", "fp16"),
    ],
)
def test_each_way_to_hold_weights_is_found(files: list[str], index: str, variant: str | None, tmp_path: Path) -> None:
    write(tmp_path, *files, index=index, lists=files)
    assert names_and_variant(tmp_path) == (files, variant)


def test_plain_weights_are_taken_before_a_variant_if_they_are_complete(tmp_path: Path) -> None:
    """An index, or some of its files, is not enough: as a download leaves them that was interrupted."""
    assert names_and_variant(tmp_path) is None
    write(tmp_path, index="model.safetensors.index.json", lists=SHARDS)
    assert names_and_variant(tmp_path) is None
    write(tmp_path, SHARDS[0])
    with pytest.raises(UserError, match=rf"^net: .* lacks {SHARDS[1]}, which model.safetensors.index.json lists: fix$"):
        require_weights(tmp_path, TRANSFORMERS, "net", "fix")
    write(tmp_path, *FP16)
    assert names_and_variant(tmp_path) == (FP16, "fp16")
    write(tmp_path, SHARDS[1])
    assert names_and_variant(tmp_path) == (SHARDS, None)
    write(tmp_path, *PLAIN)
    assert names_and_variant(tmp_path) == (PLAIN, None)


def test_of_one_file_and_shards_the_hash_is_of_what_diffusers_opens(tmp_path: Path) -> None:
    """As where one file was saved next to older shards: diffusers takes the shards."""
    model = AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, layers_per_block=1)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    weights = {name: torch.full_like(x, 7) for name, x in model.state_dict().items()}
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    found = require_weights(tmp_path, DIFFUSERS, "net", "fix")
    assert len(found.files) > 1
    opened, _ = found.build_model(AutoencoderKL)
    for name, x in opened.state_dict().items():
        assert torch.equal(x, found.load()[name])


def test_shards_are_one_model_and_one_hash(tmp_path: Path) -> None:
    for k, name in enumerate(SHARDS):
        save_file({str(k): torch.full((2,), float(k))}, tmp_path / name)
    write(tmp_path, index="model.safetensors.index.json", lists=SHARDS)
    found = require_weights(tmp_path, TRANSFORMERS, "net", "fix")
    assert [x.tolist() for x in found.load().values()] == [[0, 0], [1, 1]]
    before = found.sha256()
    save_file({"1": torch.zeros(2)}, tmp_path / SHARDS[1])
    assert found.sha256() != before


def opened(folder: Path) -> list[torch.Tensor]:
    """Numbers of all that is opened of a pipeline: of its model, its autoencoder and its text encoders."""
    pipeline = Pipeline(source=str(folder))
    net = Pretrained(texts=Codes()).within(pipeline)
    config = pipeline.config(TRANSFORMER)
    with torch.device("cpu"):
        _, stored = net.load_model(config, find_family(config, pipeline.class_name))
    vae: Any = PipelineVae().within(pipeline).open().net
    texts = PipelineTexts(root=str(folder / "texts"), dtype="float32").within(pipeline).reader_spec.open()(["a dog"])
    weights = [stored[name].float() for name in sorted(stored)]
    return [*weights, *vae.net.state_dict().values(), texts.tokens]


def saved_again(folder: Path, to: Path, *, variant: str | None, shard_size: str) -> Path:
    """A pipeline as diffusers saves it: of a variant, in shards."""
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    dtype = torch.float32 if variant is None else torch.float16
    pipe: Any = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
    pipe.save_pretrained(to, variant=variant, max_shard_size=shard_size)
    return to


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "shard_size"), [(None, "20KB"), ("fp16", "5GB"), ("fp16", "20KB")])
def test_a_pipeline_opens_however_its_weights_are_saved(
    variant: str | None, shard_size: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Sharded, and of a variant alone: the same numbers, rounded as the variant is. No library shows its own bars."""
    plain = save("SD3", tmp_path / "plain")
    other = saved_again(plain, tmp_path / "other", variant=variant, shard_size=shard_size)
    assert not [*other.rglob(DIFFUSERS_FILE), *other.rglob(TRANSFORMERS_FILE)] or shard_size == "20KB"
    found = Pipeline(source=str(other)).weights(VAE)
    assert (found.variant, found.index is not None) == (variant, shard_size == "20KB")
    facts = Pipeline(source=str(other)).with_facts().facts or {}
    assert facts["vae.weights"] == PipelineVae().within(Pipeline(source=str(other))).open().sha256
    capfd.readouterr()
    opened_other = opened(other)
    assert "Loading" not in capfd.readouterr().err
    for mine, theirs in zip(opened_other, opened(plain), strict=True):
        if variant is None:
            assert torch.equal(mine, theirs)
        else:
            assert torch.allclose(mine, theirs, atol=2e-2)


def holds_everything_twice(folder: Path) -> None:
    """Beside every file of weights what hubs have: a variant of other numbers, pickles, other programs' files."""
    for file in [*folder.rglob("*.safetensors")]:
        broken = {name: torch.full_like(x, torch.nan) for name, x in load_file(file).items()}
        for variant in ("fp16", "non_ema"):
            save_file(broken, file.with_name(f"{file.stem}.{variant}.safetensors"))
        for name in (f"{file.stem}.bin", "pytorch_model.bin", "flax_model.msgpack", "model.onnx", "openvino_model.bin"):
            file.with_name(name).write_text("")
        file.with_name(f"{file.name}.index.fp16.json").write_text("{}")
    (folder / "all.safetensors").write_text("")
    for name in ("safety_checker", "vae_1_0", "vae_decoder"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
        (folder / name / "model.safetensors").write_text("")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SD3", "SDXL"])
def test_a_download_brings_what_is_opened_and_no_other_weights(name: str, tmp_path: Path) -> None:
    """What is chosen suffices, of a repository that holds everything twice."""
    whole = save(name, tmp_path / "whole")
    expected = opened(whole)
    pipeline = Pipeline(source=str(whole))
    opened_files = {file for part in (TRANSFORMER, VAE) for file in pipeline.weights(part).all_files}
    for part in pipeline.text_parts:
        opened_files |= {*pipeline.text_files(part)}
    holds_everything_twice(whole)
    assert {file for part in (TRANSFORMER, VAE) for file in pipeline.weights(part).all_files} <= opened_files
    there = [str(file.relative_to(whole)) for file in whole.rglob("*") if file.is_file()]
    matched = {*choose_pipeline_files(there, without=(), with_weights=True)}
    assert {one for one in matched if not one.endswith(".safetensors")} == {
        *choose_pipeline_files(there, without=(), with_weights=False)
    }
    assert {str(file.relative_to(whole)) for file in opened_files} <= matched
    assert {one for one in matched if one.endswith(".safetensors")} == {
        str(file.relative_to(whole)) for file in opened_files if file.suffix == ".safetensors"
    }
    assert not [one for one in matched if Path(one).suffix in (".bin", ".msgpack", ".onnx", ".ckpt")]
    brought = tmp_path / "brought"
    for one in matched:
        (brought / one).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(whole / one, brought / one)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(opened(brought), expected, strict=True))
    assert Pipeline(source=str(brought)).texts_hash() == pipeline.texts_hash(), "what is not read is not hashed"


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_a_variant_is_fetched_if_there_are_no_other_weights(variant: str) -> None:
    names = [f"unet/{DIFFUSERS}.{variant}.safetensors", f"unet/{DIFFUSERS}.non_ema.safetensors", "unet/config.json"]
    assert choose_files(names, "unet") == ["unet/config.json", names[0]]
    shards = [f"unet/{DIFFUSERS}.{variant}-0000{k}-of-00002.safetensors" for k in (1, 2)]
    index = f"unet/{DIFFUSERS}.safetensors.index.{variant}.json"
    assert choose_files([*names, *shards, index], "unet") == sorted(["unet/config.json", *shards, index])
    assert choose_files([*names, f"unet/{DIFFUSERS}.safetensors"], "unet")[1:] == [f"unet/{DIFFUSERS}.safetensors"]


def test_the_model_of_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(UserError, match=r"has no weights .*net.weights=drawn"):
        model_weights(Pipeline(source=str(tmp_path)))


@pytest.mark.slow
def test_a_text_encoder_may_be_left_out(tmp_path: Path) -> None:
    """SD3's T5: null in model_index.json, missing with it, or left out of a folder that has it."""
    whole = save("SD3", tmp_path / "whole")
    assert len(PIPELINES["SD3"].parts) == 6
    assert Pipeline(source=str(whole)).absent_parts == []
    left_out = Pipeline(source=str(whole), without=("text_encoder_3",))
    null = Path(shutil.copytree(whole, tmp_path / "null"))
    index = json.loads((null / "model_index.json").read_text())
    for part in ("text_encoder_3", "tokenizer_3"):
        index[part] = [None, None]
        shutil.rmtree(null / part)
    (null / "model_index.json").write_text(json.dumps(index))
    without = Pipeline(source=str(null))
    assert without.text_parts == left_out.text_parts == ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"]
    assert without.absent_parts == left_out.absent_parts == ["text_encoder_3", "tokenizer_3"]
    assert without.texts_hash() == left_out.texts_hash() != Pipeline(source=str(whole)).texts_hash()
    rows = []
    for pipeline in (without, left_out, Pipeline(source=str(whole))):
        spec = PipelineTexts(root=str(tmp_path / "texts"), dtype="float32").within(pipeline).reader_spec
        rows.append(spec.open()(["a dog"]).tokens)
    assert torch.equal(rows[0], rows[1])
    assert rows[0].shape == rows[2].shape
    assert not torch.equal(rows[0], rows[2])
    names = [str(file.relative_to(whole)) for file in whole.rglob("*") if file.is_file()]
    chosen = choose_pipeline_files(names, without=left_out.without, with_weights=True)
    assert {name.partition("/")[0] for name in names} - {name.partition("/")[0] for name in chosen} == {
        "text_encoder_3",
        "tokenizer_3",
    }


def test_a_published_name_is_counted_without_what_is_left_out() -> None:
    """As its T5 is that of PixArt."""
    sd3, t5 = (
        Pipeline(source=SD3),
        Pipeline(source="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"),
    )
    whole, without, alone = (
        p.text_encoder_bytes(2) for p in (sd3, sd3.model_copy(update={"without": ("text_encoder_3",)}), t5)
    )
    assert whole is not None
    assert alone is not None
    assert without == whole - alone
