"""A model in one file, or a name of the Hub, in place of a folder: the line that refuses it says how to get one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dumo.encoders.pipeline import Pipeline
from dumo.types import UserError
from e2e.shell import call, refused, sets


def test_one_file_is_told_how_to_become_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the pipeline and as the source."""
    monkeypatch.chdir(tmp_path)
    save_file({"fc.weight": torch.ones(2)}, file := tmp_path / "one.safetensors")
    with pytest.raises(UserError, match="from_single_file"):
        _ = Pipeline(source=str(file)).folder
    refused("train", file, named=("from_single_file", "pipeline=DIR"))


def test_a_name_on_the_hub_is_told_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the pipeline and as the source; a path that begins here is none."""
    monkeypatch.chdir(tmp_path)
    name = "stabilityai/stable-diffusion-xl-base-1.0"
    fetch = f"hf download {name} --include model_index.json", "--local-dir stable-diffusion-xl-base-1.0"
    refused("show", "sdxl-lora", *sets(f"pipeline={name}"), named=(*fetch, "set pipeline=stable-diffusion-xl-base-1.0"))
    refused("train", name, named=(*fetch, "dumo encode sdxl-lora --set pipeline=stable-diffusion-xl-base-1.0"))
    refused("train", "owner/model", named=("If it is a model on the Hugging Face hub", "hf download owner/model"))
    (tmp_path / "owner").mkdir()
    for words in (("train", "owner/model"), ("train", "runs/model")):
        assert "hf download" not in call(*words).err
    (tmp_path / "owner" / "model_index.json").write_text("{}")
    refused("train", "owner", named=("is the pipeline of a model", "--set pipeline=owner"))
