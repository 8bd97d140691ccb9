"""A decoder must take the latents that a run has."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dumo.export.folder import fits, indexed
from dumo.export.model import INDEX, Exported
from dumo.export.write import vacant
from dumo.run.config.load import load
from dumo.types import UserError

SCALE = 1.2  # of the recipe's codec; its shift is 0


def of(**vae: object) -> Any:  # noqa: ANN401, a function of a folder
    """Whether the decoder with this config fits the recipe cifar10-latents."""

    def asked(folder: Path) -> None:
        (folder / "vae").mkdir()
        (folder / "vae" / "config.json").write_text(json.dumps(vae), encoding="utf-8")
        run = load("cifar10-latents")
        fits(cast(Exported, SimpleNamespace(opened=SimpleNamespace(run=run))), folder)

    return asked


def test_a_decoder_of_these_latents_fits(tmp_path: Path) -> None:
    of(scaling_factor=SCALE, shift_factor=None)(tmp_path)


def test_a_decoder_that_says_none_fits(tmp_path: Path) -> None:
    of(batch_norm_eps=1e-4)(tmp_path)


@pytest.mark.parametrize(
    ("vae", "field"),
    [
        ({"scaling_factor": 0.18215}, "scale"),
        ({"scaling_factor": SCALE, "shift_factor": 0.1}, "shift"),
        ({"latents_mean": [0.0] * 32, "latents_std": [1 / SCALE] * 31 + [1.0]}, "scale"),
    ],
)
def test_a_decoder_of_others_is_refused(vae: dict[str, object], field: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"data.codec is codec taef2, .*{field}"):
        of(**vae)(tmp_path)


def test_a_pipeline_of_two_transformers_is_refused(tmp_path: Path) -> None:
    index: dict[str, Any] = {"transformer": ["diffusers", "WanTransformer3DModel"], "transformer_2": [None, None]}
    (tmp_path / INDEX).write_text(json.dumps(index), encoding="utf-8")
    assert indexed(tmp_path) == index
    (tmp_path / INDEX).write_text(json.dumps(index | {"transformer_2": index["transformer"]}), encoding="utf-8")
    with pytest.raises(UserError, match="was not tuned"):
        indexed(tmp_path)


def test_only_an_empty_place_is_vacant(tmp_path: Path) -> None:
    vacant(tmp_path)
    vacant(tmp_path / "new")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "link", tmp_path / "file"):
        with pytest.raises(UserError, match="is there already"):
            vacant(place)
