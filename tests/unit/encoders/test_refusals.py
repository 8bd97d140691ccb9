"""What encoders, tokenizers and autoencoders refuse."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import encoders
from autoencoder import taef2
from dumo.encoders import PipelineVae, SdVae, Taef2, vision
from dumo.encoders.caption_ids import read_prompts
from dumo.encoders.part import DIFFUSERS, TRANSFORMERS, find_weights, require_weights
from dumo.encoders.pipeline_folder import Pipeline
from dumo.encoders.tokens import load_tokenizer
from dumo.encoders.transformers_text import TextEncoder
from dumo.types import UserError
from unit.encoders.test_codec import of, vae_of

WEIGHTS = "diffusion_pytorch_model.safetensors"


def change_json(file: Path, **fields: object) -> None:
    """Change fields of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def drop_tensor(file: Path, name: str) -> None:
    """Leave a tensor out of a file of weights."""
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})


# --- prompts


def table_of_prompts(folder: Path) -> None:
    (folder / "a.csv").write_text("prompt\na cat\n")
    read_prompts(folder / "a.csv")


def no_prompts(folder: Path) -> None:
    (folder / "a.txt").write_text("\n \n")
    read_prompts(folder / "a.txt")


def row_without_prompt(folder: Path) -> None:
    (folder / "a.jsonl").write_text('{"prompt": "a cat"}\n\n{"prompt": " "}\n')
    read_prompts(folder / "a.jsonl")


# --- text encoders


def tokenizer_without_vocabulary(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    load_tokenizer(folder, 8, field="evaluate.protocol.model")


def tokenizer_without_settings(folder: Path) -> None:
    (encoders.t5(folder / "t5") / "tokenizer_config.json").unlink()
    TextEncoder(source=str(folder / "t5")).open()


def text_without_token(folder: Path) -> None:
    clip = encoders.clip(folder / "clip")
    change_json(clip.with_name("tokenizer") / "tokenizer.json", post_processor=None)
    TextEncoder(source=str(clip), length=12).open()(["a red car", ""])


def skip_of_the_text(folder: Path) -> None:
    TextEncoder(source=str(encoders.t5(folder)), template="say: {}!", skip=7).require_tokenizers()


def skip_of_a_whole_text(folder: Path) -> None:
    TextEncoder(source=str(encoders.t5(folder)), skip=2).open()(["a"])


def pooled_of_t5(folder: Path) -> None:
    TextEncoder(source=str(encoders.t5(folder)), pooled=True).open()(["a red car"])


def encoder_without_a_weight(folder: Path) -> None:
    drop_tensor(encoders.t5(folder) / "model.safetensors", "encoder.final_layer_norm.weight")
    TextEncoder(source=str(folder)).open()


def pickled_encoder(folder: Path) -> None:
    file = encoders.t5(folder) / "model.safetensors"
    file.rename(file.with_name("pytorch_model.bin"))
    TextEncoder(source=str(folder)).open()


# --- models of images


def other_image_model(folder: Path) -> None:
    vision.load(encoders.clip_of_both(folder), "dinov2", "evaluate.protocol.model")


def other_clip(folder: Path) -> None:
    vision.load_clip(encoders.dinov2(folder), "evaluate.protocol.model")


# --- folders of weights


def files_of_another_folder(folder: Path) -> None:
    index = {"weight_map": {"w": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    find_weights(folder, TRANSFORMERS)


def missing_shard(folder: Path) -> None:
    index = {"weight_map": {"v": "a.safetensors", "w": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "a.safetensors").touch()
    require_weights(folder, TRANSFORMERS, "net", "fix")


# --- autoencoders


def side_that_does_not_divide(folder: Path) -> None:
    Taef2(weights=str(taef2(folder / "tiny.safetensors"))).shape(250)


def codec_of_another_hash(folder: Path) -> None:
    Taef2(weights=str(taef2(folder / "tiny.safetensors")), sha256="0123").open()


def codec_of_another_net(folder: Path) -> None:
    tensors = load_file(taef2(folder / "tiny.safetensors"))
    tensors["decoder.1.weight"] = torch.zeros(64, 33, 3, 3)
    save_file(tensors, folder / "tiny.safetensors")
    Taef2(weights=str(folder / "tiny.safetensors")).open()


def codec_of_another_variant(folder: Path) -> None:
    SdVae(weights=str(vae_of(folder, scaling_factor=0.13025))).open()


def codec_without_a_weight(folder: Path) -> None:
    drop_tensor(vae_of(folder) / WEIGHTS, "decoder.conv_out.weight")
    SdVae(weights=str(folder)).open()


def codec_of_an_unknown_class(folder: Path) -> None:
    change_json(vae_of(folder / "vae") / "config.json", _class_name="AutoencoderTiny")
    of(folder).open()


def codec_without_a_scale(folder: Path) -> None:
    (folder / "vae").mkdir()
    config = {"_class_name": "AutoencoderDC", "latent_channels": 32, "encoder_block_out_channels": [4] * 6}
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    of(folder).shape(64)


def changed_autoencoder(folder: Path) -> None:
    vae_of(folder / "vae")
    codec = PipelineVae().within(Pipeline(source=str(folder)).with_facts())
    file = folder / "vae" / WEIGHTS
    save_file({name: x + 1 for name, x in load_file(file).items()}, file)
    codec.open()


def changed_config(folder: Path) -> None:
    vae_of(folder / "vae")
    codec = PipelineVae().within(Pipeline(source=str(folder)).with_facts())
    change_json(folder / "vae" / "config.json", scaling_factor=0.3611)
    codec.open()


# --- pipelines


def encoder_that_is_not_there(folder: Path) -> None:
    (folder / "model_index.json").write_text('{"text_encoder": ["transformers", "CLIPTextModel"]}')
    _ = Pipeline(source=str(folder), without=("text_encoder_3",)).text_parts


def index_with(**entries: object) -> Callable[[Path], object]:
    """A pipeline whose model_index.json has these entries."""

    def open_index(folder: Path) -> object:
        (folder / "safety_checker").mkdir()
        (folder / "safety_checker" / "theirs.py").write_text("")
        (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline", **entries}))
        return Pipeline(source=str(folder)).index

    return open_index


def one_file(folder: Path) -> None:
    save_file({"w": torch.ones(2)}, folder / "one.safetensors")
    _ = Pipeline(source=str(folder / "one.safetensors")).folder


REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a table of prompts": (table_of_prompts, "a.csv"),
    "a file without prompts": (no_prompts, "a.txt"),
    "a row of JSON without a prompt": (row_without_prompt, "a.jsonl line 3"),
    "a tokenizer without its vocabulary": (tokenizer_without_vocabulary, "evaluate.protocol.model"),
    "a tokenizer without its settings": (tokenizer_without_settings, "tokenizer_config.json"),
    "a text without a token": (text_without_token, "net.texts.encoder.template"),
    "a skip that cuts the text": (skip_of_the_text, "skip=7"),
    "a skip that leaves nothing of a text": (skip_of_a_whole_text, "skip=2"),
    "an embedding of whole texts that the encoder lacks": (pooled_of_t5, "net.texts.encoder.pooled"),
    "an encoder without one of its weights": (encoder_without_a_weight, "encoder.final_layer_norm.weight"),
    "an encoder in a pickle": (pickled_encoder, "pytorch_model.bin"),
    "features of another model": (other_image_model, "Dinov2Model"),
    "a CLIP that is another model": (other_clip, "CLIPModel"),
    "an index that lists files of another folder": (files_of_another_folder, "outside its folder"),
    "a shard that is missing": (missing_shard, "b.safetensors"),
    "a folder without weights": (lambda folder: require_weights(folder, DIFFUSERS, "net", "fix"), DIFFUSERS),
    "images whose side does not divide": (side_that_does_not_divide, "250"),
    "a codec of another hash": (codec_of_another_hash, "data.codec.weights"),
    "a codec of another net": (codec_of_another_net, "decoder.1.weight"),
    "a codec of another variant": (codec_of_another_variant, "codec sd-vae sd"),
    "a codec without one of its weights": (codec_without_a_weight, "decoder.conv_out.weight"),
    "a codec of an unknown class": (codec_of_an_unknown_class, "AutoencoderTiny"),
    "a codec without shift and scale": (codec_without_a_scale, "AutoencoderDC"),
    "an autoencoder that has changed": (changed_autoencoder, "vae"),
    "a config that has changed": (changed_config, "vae"),
    "a text encoder to leave out that is not there": (encoder_that_is_not_there, "pipeline.without"),
    "an encoder of code of its own": (index_with(text_encoder=["theirs", "Encoder"]), '["theirs", "Encoder"]'),
    "an encoder of Python's own": (index_with(text_encoder=["os.path", "join"]), "text_encoder"),
    "a scheduler of code of its own": (index_with(scheduler=["theirs", "Scheduler"]), "scheduler"),
    "a model of code of its own": (index_with(transformer=["theirs", "Model"]), "transformer"),
    "an unused part of code of its own": (index_with(safety_checker=["theirs", "Checker"]), "safety_checker"),
    "a remote pipeline": (index_with(custom_pipeline="owner/pipeline"), "custom_pipeline"),
    "an encoder without a library": (index_with(text_encoder="CLIPTextModel"), "text_encoder"),
    "an encoder of three words": (index_with(text_encoder=["transformers", "CLIPTextModel", "x"]), "text_encoder"),
    "a pipeline in one file": (one_file, "from_single_file"),
}


@pytest.mark.parametrize(("case", "name"), REFUSALS.values(), ids=REFUSALS)
def test_it_is_refused(case: Callable[[Path], object], name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        case(tmp_path)
    assert name in str(error.value)
