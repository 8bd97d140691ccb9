"""What an export refuses."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dumo.config.load import load
from dumo.export import lora
from dumo.export.model import INDEX, ExportedModel, require_pipeline
from dumo.export.scheduler import restart_for_scheduler
from dumo.export.stock import PIPELINE_BY_MODEL
from dumo.export.upload import require_uploadable
from dumo.export.write import export, other_parts, read_index, require_own_autoencoder, require_vacant
from dumo.flow.path import Linear
from dumo.flow.solver import Hermite, Hop
from dumo.run.weights import load_run
from dumo.types import UserError

NAME = "digits-trained"


def of_own(folder: Path, **options: Any) -> None:  # noqa: ANN401
    """Export a run of dumo's own network with these options."""
    export(load_run(NAME, device="cpu"), folder / "out", **options)


def of_model(name: str, *, scale: float = 1.0) -> Any:  # noqa: ANN401, a stand-in
    """A tuned model that is sampled with this guidance."""
    run = SimpleNamespace(sample=SimpleNamespace(guide=SimpleNamespace(scale=scale)))
    spec = SimpleNamespace(lora=None)
    return SimpleNamespace(run=run, spec=spec, head="u", stock=PIPELINE_BY_MODEL.get(name), model_class=name)


def of_pipeline(name: str, *, scale: float = 1.0) -> None:
    """Ask for the pipeline of a tuned model that is sampled with this guidance."""
    require_pipeline(of_model(name, scale=scale))


def of_lora(name: str, folder: Path) -> None:
    """Write a model as a LoRA for diffusers."""
    none: Any = None
    lora.write(of_model(name), none, folder, "out", dtype="float32")


def hop_of_two_lengths(_: Path) -> None:
    """One and two passes of a hop begin at the same time and end at two."""
    run: Any = SimpleNamespace(sample=SimpleNamespace(solver=Hop()), path=Linear())
    none: Any = None
    model = ExportedModel(run, spec=none, net=none, head="u", nfe=(2,))
    _ = replace(model, nfe=(1, 2)).pass_intervals


def index_of_two_transformers(folder: Path) -> None:
    """A pipeline whose second transformer makes some of the passes."""
    index = {name: ["diffusers", "WanTransformer3DModel"] for name in ("transformer", "transformer_2")}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    read_index(folder)


def existing(folder: Path) -> None:
    """A place where something is."""
    (folder / "file").touch()
    require_vacant(folder / "file")


REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "the place exists": (existing, "exists already"),
    "an unknown form": (lambda folder: of_own(folder, to="onnx"), "onnx"),
    "an unknown treatment of parts": (lambda folder: of_own(folder, parts="move"), "move"),
    "an unknown dtype": (lambda folder: of_own(folder, dtype="int4"), "int4"),
    "one head of dumo's own network": (lambda folder: of_own(folder, head="v"), "net.kind"),
    "dumo's own network as a LoRA": (lambda folder: of_own(folder, to="lora"), "net.kind"),
    "a subject alone of a run without one": (lambda folder: of_own(folder, alone=True), "net.lora.subject"),
    "no stock pipeline": (lambda _: of_pipeline("NoModel"), "NoModel"),
    "a LoRA of all weights": (lambda folder: of_lora("SD3Transformer2DModel", folder), "net.lora"),
    "a pipeline that loads no LoRA": (lambda folder: of_lora("PRXTransformer2DModel", folder), "LoRA"),
    "a pipeline that guides differently": (
        lambda _: of_pipeline("QwenImageTransformer2DModel", scale=2.0),
        "sample.guide.scale",
    ),
    "a pipeline that does not guide": (
        lambda _: of_pipeline("Flux2Transformer2DModel", scale=2.0),
        "sample.guide.scale",
    ),
    "a solver that no scheduler imitates": (lambda _: restart_for_scheduler(Hermite()), "sample.solver"),
    "two ends of one time": (hop_of_two_lengths, "t = 1"),
    "another autoencoder": (lambda _: require_own_autoencoder(load("cifar10-latents").data), "data.codec"),
    "two transformers": (index_of_two_transformers, "transformer_2"),
    "a part outside of the pipeline": (lambda _: other_parts({"../vae": ["diffusers", "Vae"]}), "../vae"),
    "a repository without an owner": (lambda _: require_uploadable("name", "copy"), "OWNER/NAME"),
    "an upload of links": (lambda _: require_uploadable("owner/name", "link"), "parts"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused(name: str, tmp_path: Path) -> None:
    """A UserError names the field or value, and nothing is written."""
    act, word = REFUSALS[name]
    with pytest.raises(UserError) as error:
        act(tmp_path)
    assert word in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
