"""One file of weights as a pipeline: the line that refuses it says how to make a folder of it, and that works."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dumo.encoders.pipeline import Pipeline
from dumo.types import UserError
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
    found = re.search(r'Make a folder DIR of it, python -c "(.*)", and set pipeline=DIR$', line)
    assert found, line
    code = found[1].replace("stable-diffusion-v1-5/stable-diffusion-v1-5", str(configs))
    exec(code.replace("'DIR'", f"'{tmp_path}/made'"))
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
    assert "config='stabilityai/stable-diffusion-xl-base-1.0'" in line
    file.write_bytes(b"nothing")
    assert "is damaged or is not safetensors" in refusal(file)
