"""Trained runs that come with dumo: small, as their README.md says, and opened as a copy."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dumo.io import digest
from dumo.run import resolve, shipped
from dumo.run.weights import open_run
from dumo.runtime import shell_path
from dumo.training import manifest
from dumo.types import UserError

MEGABYTES = {"cifar10-trained": 12, "digits-trained": 1.5}
NAME = "digits-trained"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_those_with_a_limit() -> None:
    assert shipped.names() == [*MEGABYTES]


@pytest.mark.parametrize("name", MEGABYTES)
def test_small_and_as_its_card_says(name: str) -> None:
    files = [path for path in (shipped.HERE / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MEGABYTES[name] * 1e6
    (weights,) = (path for path in files if path.match("checkpoints/*/*.safetensors"))
    assert {x.dtype for x in load_file(weights).values()} == {torch.float16}
    card = (shipped.HERE / name / "README.md").read_text()
    assert re.findall(r"SHA-256 (\w+)", card) == [digest.of_file(weights)]


@pytest.mark.parametrize("name", MEGABYTES)
def test_it_is_opened_as_a_copy_and_makes_images(name: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no data."""
    monkeypatch.delenv("DUMO_DATA", raising=False)
    opened = open_run(name, device="cpu")
    assert opened.folder.resolve() == here / "runs" / name
    assert opened.file.resolve().is_relative_to(here)  # what is written goes there
    card = (shipped.HERE / name / "README.md").read_text()
    assert f"{opened.step:,} steps" in card
    assert f"Weights: {sum(p.numel() for p in opened.net.parameters()):,}" in card
    before = {path: path.stat().st_mtime_ns for path in (here / "runs").rglob("*")}
    assert open_run(name, device="cpu").sha256 == opened.sha256
    assert {path: path.stat().st_mtime_ns for path in (here / "runs").rglob("*")} == before
    images = opened.sampler.sample(torch.arange(2), nfe=1).x
    assert images.shape == (2, *opened.sampler.pixels)
    assert float(images.std()) > 0.3
    assert not [place for _, place in resolve.places(opened.run) if Path(place).is_absolute()]


@pytest.mark.slow
def test_another_run_of_this_name_is_not_taken_for_it(here: Path) -> None:
    """Each opens by a name of its own; a folder without a run is no rival."""
    shutil.copytree(shipped.HERE / NAME, here / NAME)
    with pytest.raises(UserError, match=rf"holds a run: write dumo:{NAME} for dumo's, or \./{NAME} for the folder"):
        open_run(NAME, device="cpu")
    assert not (here / "runs").exists()
    assert open_run(f"./{NAME}", device="cpu").folder == open_run(Path(NAME), device="cpu").folder == Path(NAME)
    assert shell_path(Path(NAME)) == f"./{NAME}"
    assert open_run(f"dumo:{NAME}", device="cpu").folder == Path("runs", NAME)
    (here / NAME / "run.yaml").unlink()
    assert shipped.find(NAME) == Path("runs", NAME)


@pytest.mark.slow
def test_another_run_at_the_place_of_the_copy_is_refused(here: Path) -> None:
    """Of an older dumo, or one's own: it opens by its path."""
    listed = open_run(NAME, device="cpu").checkpoint.path / manifest.NAME
    text = listed.read_text()
    listed.write_text(text.replace("5300", "5299"))
    with pytest.raises(UserError, match="is not the digits-trained that dumo brings"):
        open_run(NAME, device="cpu")
    listed.write_text(text)
    assert open_run(f"runs/{NAME}", device="cpu").folder == shipped.find(NAME)


@pytest.mark.slow
def test_a_damaged_copy_is_refused(here: Path) -> None:
    file = open_run(NAME, device="cpu").file
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError):
        open_run(NAME, device="cpu")
    assert json.loads((here / "runs" / NAME / "data.json").read_text())
    assert os.path.samefile(shipped.find(NAME), here / "runs" / NAME)
