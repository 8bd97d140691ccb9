"""An exported run of dumo's own network makes the run's samples, by `dumo.load` and as a pipeline of diffusers."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dumo
from dumo.config.load import RUN_FILE, load
from dumo.data import Latents
from dumo.export.write import export
from dumo.io import run_places
from dumo.run import resolve
from dumo.run.folder import EXPORTED_WEIGHTS, RunFolder
from dumo.run.trained import TrainedRun
from dumo.run.weights import build, load_run
from dumo.runtime.progress import no_bar
from dumo.types import UserError

NAME = "digits-trained"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, in which the code of a card runs as it stands."""
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path


def initialized(recipe: str, folder: Path) -> TrainedRun:
    """The run of a recipe with its initial weights, as if it had been trained."""
    run = load(recipe)
    return TrainedRun(run, RunFolder(folder), build(run), step=1, weights="net.safetensors", listed_sha256="0" * 64)


def test_a_folder_holds_what_a_repository_of_the_hub_would(here: Path) -> None:
    out = export(load_run(NAME, device="cpu"), here / "out")
    assert {path.name for path in out.iterdir()} == {
        *("README.md", "run.yaml", "model.safetensors", "pipeline.py", "model_index.json")
    }
    loaded = dumo.load(out, device="cpu")
    assert loaded.step == dumo.load(NAME, device="cpu").step
    assert not [place for _, place in resolve.places(loaded.spec) if Path(place).is_absolute()]


def test_the_blocks_of_a_card_make_the_runs_samples(here: Path) -> None:
    """Verbatim, with labels of the run's own number of network evaluations."""
    export(load_run(NAME, device="cpu"), here / "out")
    card = (here / "out/README.md").read_text("utf-8")
    expected = dumo.load(NAME, device="cpu").sample(labels=[0, 5], nfe=1, seed=0, output="pil")
    blocks = re.findall("```py\n(.*?)```", card, re.S)
    assert len(blocks) == 2
    for block in blocks:
        names: dict[str, Any] = {}
        exec(block, names)
        assert [image.tobytes() for image in names["images"]] == [image.tobytes() for image in expected]


@pytest.mark.parametrize("output_type", ["np", "pt"])
def test_a_pipeline_gives_images_as_others_do(output_type: str, here: Path) -> None:
    from diffusers import DiffusionPipeline

    out = export(load_run(NAME, device="cpu"), here / "out")
    pipe: Any = DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
    (images,) = pipe([3, 5], 2, output_type=output_type, return_dict=False)
    expected = dumo.load(NAME, device="cpu").sample(labels=[3, 5], nfe=2, output="np")
    if output_type == "pt":
        images = images.permute(0, 2, 3, 1).numpy()
    assert abs(images - expected).max() < 1e-6


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_rounds_the_weights_once(dtype: str, here: Path) -> None:
    opened = load_run(NAME, device="cpu")
    out = export(opened, here / "out", dtype=dtype)
    for name, weight in load_file(out / EXPORTED_WEIGHTS).items():
        assert torch.equal(weight, opened.net.state_dict()[name].to(getattr(torch, dtype)))
    images = dumo.load(out, device="cpu").sample(labels=[3], nfe=1)
    torch.testing.assert_close(images, dumo.load(NAME, device="cpu").sample(labels=[3], nfe=1), rtol=0, atol=0.05)


@pytest.mark.parametrize("recipe", ["moons", "digits-flow-matching"])
def test_every_network_of_dumos_is_exported(recipe: str, here: Path) -> None:
    opened = initialized(recipe, here)
    loaded = dumo.load(export(opened, here / "out"), device="cpu")
    c = torch.zeros(2, dtype=torch.long)
    assert torch.equal(loaded.make_samples(c, nfe=2).x, opened.make_samples(c, nfe=2).x)
    assert (here / "out/pipeline.py").exists() == loaded.makes_images


def test_an_export_is_evaluated(here: Path) -> None:
    """Its scores are the run's, in a file of the usual name."""
    run = dumo.load(export(load_run(NAME, device="cpu"), here / "out"), {"evaluate.protocol.samples": 500})
    report = run.evaluate(nfe=1, bar=no_bar)
    assert report["card"]["ema"] == 0.999
    expected = dumo.load(NAME, {"evaluate.protocol.samples": 500}).evaluate(nfe=1, bar=no_bar)
    assert report["results"] == expected["results"]
    assert Path(report["file"]).name == Path(expected["file"]).name


def test_a_new_run_begins_with_an_export(here: Path) -> None:
    export(load_run(NAME, device="cpu"), here / "out")
    changes = {"train.steps": 1, "train.optimizer.lr": 1e-9, "train.optimizer.adamw_lr": 1e-9}
    run = dumo.train(run_places.folder(NAME) / RUN_FILE, {**changes, "start.source": "out"}, out="new", bar=no_bar)
    for name, weight in dumo.load(NAME, device="cpu").net.state_dict().items():
        assert torch.cosine_similarity(run.net.state_dict()[name].flatten(), weight.flatten(), 0) > 0.999, name


def test_an_export_is_not_resumed(here: Path) -> None:
    export(load_run(NAME, device="cpu"), here / "out")
    with pytest.raises(UserError, match=r"start\.source=out"):
        dumo.train("./out", bar=no_bar)


def test_weights_of_another_run_are_refused(here: Path) -> None:
    """Two networks of one shape."""
    for name, recipe in (("one", "digits-flow-matching"), ("other", "digits-meanflow")):
        export(initialized(recipe, here), here / name)
    (here / "other" / EXPORTED_WEIGHTS).replace(here / "one" / EXPORTED_WEIGHTS)
    with pytest.raises(UserError, match="another run"):
        dumo.load("one")


def test_a_card_names_what_a_run_reads_from_elsewhere(here: Path) -> None:
    """A decoder that ships with dumo is not elsewhere."""
    opened = load_run("cifar10-trained", device="cpu")
    assert "it also reads" not in (export(opened, here / "out") / "README.md").read_text("utf-8")
    data = opened.spec.data
    assert isinstance(data, Latents)
    data = data.model_copy(update={"codec": data.codec.model_copy(update={"weights": "/models/taef2.safetensors"})})
    elsewhere = replace(opened, spec=opened.spec.model_copy(update={"data": data}))
    card = (export(elsewhere, here / "elsewhere") / "README.md").read_text("utf-8")
    assert "it also reads `taef2.safetensors` (`data.codec.weights`)" in card
    dumo.load("elsewhere", {"data.codec.weights": data.codec.weights}, device="cpu")
