"""Names on the Hugging Face hub: what dumo knows of published pipelines, and the commands that fetch them.

`is_hub_name` tells a name on the hub from a place, and `fetch_hint` answers one where a folder is wanted.
`pipeline_command` brings what dumo reads of a pipeline. `published_name` says whether dumo knows a repository, and
`published_config` has the configs of a pipeline that it knows. Nothing here asks the hub, and nothing imports torch.
"""

import json
import re
import shlex
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

INDEX = "model_index.json"  # in the folder of a pipeline of diffusers
TRANSFORMER = "transformer"
UNET = "unet"  # where a UNet is the model
VAE = "vae"
SCHEDULER = "scheduler"
# A file NAME.json for each of PUBLISHED and SMALL. It has the pipeline's class, its repository (`_name_or_path`) and
# the configs of parts by name; `_readers` are the parameters of all text encoders, `_optional_readers` of those that
# may be left out.
_CONFIGS = files("dumo") / "encoders" / "published"
# of repositories on the hub
PUBLISHED = ("sd3-medium", "sana-1600m", "flux-dev", "qwen-image", "z-image", "sd15", "sdxl", "pixart-sigma")
SMALL = ("sd3-small", "sd3-digits", "unet-small")  # ours: for latents of CIFAR-10, but for digits the second
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # OWNER/NAME
SUFFIX = ".safetensors"
# Variants, which have a second dot in their names. Patterns of fnmatch, in which * matches / and dots, too.
EXCLUDED = (f"*.*{SUFFIX}", "*.index.*.json")


@lru_cache
def published_config(name: str) -> dict[str, Any]:
    """The file of _CONFIGS of this name, one of PUBLISHED or SMALL."""
    return json.loads((_CONFIGS / f"{name}.json").read_text(encoding="utf-8"))


def published_name(repository: str) -> str:
    """The published pipeline of a repository on the hub; "": it is none of PUBLISHED."""
    for name in PUBLISHED:
        if str(published_config(name)["_name_or_path"]).lower() == repository.lower():
            return name
    return ""


def is_hub_name(name: str) -> bool:
    """Whether it is OWNER/NAME, and OWNER is no folder here."""
    return bool(_HUB_NAME.fullmatch(name)) and not Path(name).parent.exists()


def fetch_hint(name: str) -> str:
    """What a name on the hub is, and the command that fetches it; "": it is no such name."""
    if not is_hub_name(name):
        return ""
    command = pipeline_command(name, Path(name).name)
    if published_name(name):
        return f"{name} is a model on the Hugging Face hub, and dumo reads a folder: fetch what it reads, {command}"
    return (
        f"{name} is no folder here. If it is a model on the Hugging Face hub, fetch what dumo reads of it, {command} "
        "(leave --exclude out if the repository has only variants, such as fp16 files)"
    )


def one_file_hint(file: Path) -> str:
    """What to do with a model in one safetensors file, as ComfyUI and others share them."""
    return (
        f"{file} is one file, without the configs and tokenizers of a pipeline: make a folder DIR of it by "
        "PIPELINE_OR_MODEL.from_single_file(FILE).save_pretrained(DIR) of diffusers"
    )


def pipeline_command(repository: str, folder: str, *, third_encoder: bool = True) -> str:
    """The command that brings what dumo reads of a pipeline into a folder, with or without a third text encoder.

    Weights are those in safetensors, without variants such as fp16. `folder` is not quoted.
    """
    text_parts = ["text_encoder*", "tokenizer*"]
    if not third_encoder:
        text_parts = ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"]
    words = ["hf", "download", repository, "--include", INDEX, "--include", "README.md"]
    for part in (*_model_parts(repository), VAE, SCHEDULER, *text_parts):
        if part.startswith("tokenizer"):  # files of many names
            words += ["--include", f"{part}/*"]
            continue
        words += ["--include", f"{part}/*.json"]
        if part != SCHEDULER:
            words += ["--include", f"{part}/*{SUFFIX}"]
    for pattern in EXCLUDED:
        words += ["--exclude", pattern]
    return f"{shlex.join(words)} --local-dir {folder}"


def _model_parts(repository: str) -> list[str]:
    """The folder that holds the model of a repository: of one that dumo does not know, both that may."""
    name = published_name(repository)
    if not name:
        return [TRANSFORMER, UNET]
    class_name = str(published_config(name)[TRANSFORMER]["_class_name"])
    return [UNET if class_name.startswith("UNet") else TRANSFORMER]
