"""A model in one file, or a pipeline in place of a run: the line that refuses it says what to do."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dumo.encoders.pipeline_folder import Pipeline
from dumo.types import UserError
from e2e.shell import refused


def test_one_file_is_told_how_to_become_a_folder(tmp_path: Path) -> None:
    save_file({"fc.weight": torch.ones(2)}, file := tmp_path / "one.safetensors")
    with pytest.raises(UserError, match="from_single_file"):
        _ = Pipeline(source=str(file)).folder


def test_the_folder_of_a_pipeline_is_no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "model_index.json").write_text("{}")
    refused("train", "owner", named=("is a pipeline folder", "pipeline=owner"))
