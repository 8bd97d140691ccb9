"""A flow transformer of diffusers, trained by flow matching, made a few-step one: in full, by adapters, and from nothing.

The model is an SD3 of 1.3 M parameters that learns CIFAR-10 in the latents of a small autoencoder, and reads 1000 t as
published ones do. The other cells begin from what diffusers saved of it. The features of the distances are those of the
shipped classifier, so none of these numbers is an FID.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dumo.config.load import load
from dumo.config.spec import Run
from dumo.io import archive
from dumo.io.json import write_json
from dumo.progress import Bar
from dumo.report import gallery
from dumo.reproduce import arm
from dumo.reproduce.plan import Cell, Finished, Plan, finish_all, units

BASE, CONFIG = "base", "config"  # folders beside the cells: of the trained model, and of its sizes alone
MODEL = {
    "_class_name": "SD3Transformer2DModel",
    "in_channels": 32,
    "out_channels": 32,
    "sample_size": 4,
    "pos_embed_max_size": 4,
    "patch_size": 1,
    "num_layers": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 24,
    "caption_projection_dim": 96,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "qk_norm": "rms_norm",
}
STEPS = {"smoke": (20, 10), "laptop": (3000, 1000)}  # of the base; of the cell whose cost all others have
LORA = {"rank": 16}
NFE = "evaluate.nfe=[1,2,4]"


def net(**fields: object) -> str:
    """The net as an override; its source is put in once it is there."""
    return f"net={json.dumps({'kind': 'diffusers', 'source': BASE, **fields})}"


def cells(scale: str) -> Iterator[Cell]:
    """The base, then three ways to few passes, with several seeds and at equal counted cost."""
    small = [one for one in arm.LATENTS if not one.startswith("net.")] if scale == "smoke" else []
    long, steps = STEPS[scale]
    drawn = net(source=CONFIG, weights="drawn", lowpass=None)
    sets = [drawn, f"train.steps={long}", f"train.milestones=[0,{long // 3}]", "evaluate.nfe=[1,2,4,50]"]
    yield Cell(BASE, load("cifar10-latents-flow-matching", [*small, *sets]), {"begins as": "nothing, flow matching"})
    ways: dict[str, tuple[str, ...]] = {
        "the base, in full": (net(),),
        "the base, adapters, taught by it": (net(lora=LORA), "teacher={kind: base}"),
        "nothing": (net(source=CONFIG, weights="drawn"),),
    }
    budget = 0.0
    for begins, way in ways.items():
        spec = load("cifar10-latents", [*small, *way, NFE])
        budget = budget or steps * units(spec)
        count = round(budget / units(spec))
        labels = {"begins as": begins, "steps": count, "F_per_step": round(units(spec), 2)}
        for seed in range(1 if scale == "smoke" else 3):
            train = {"steps": count, "seed": seed, "milestones": (0, count // 5)}
            train = spec.train.model_copy(update=train)
            name = begins.split(",")[1 if "," in begins else 0].strip().replace(" ", "-")
            yield Cell(f"{name}-{seed}", spec.model_copy(update={"train": train}), labels)


def finish(cells: Sequence[Cell], folder: Path, *, jobs: int, device: str, bar: Bar) -> list[Finished]:
    """The base first, which diffusers saves; then what begins from it. Raises UserError as `finish_all`."""
    beside = folder.parent
    write_json(beside / CONFIG / "config.json", MODEL)
    first, *rest = (replace(cell, spec=placed(cell.spec, beside)) for cell in cells)
    begun = finish_all([first], folder, jobs=1, device=device, bar=bar)
    if not (beside / BASE / "config.json").exists():
        begun[0].opened.net.stock("v").save_pretrained(beside / BASE)  # pyright: ignore[reportCallIssue], diffusers'
    return [*begun, *finish_all(rest, folder, jobs=jobs, device=device, bar=bar)]


def placed(spec: Run, beside: Path) -> Run:
    """The run with the folder that its net begins from."""
    return spec.model_copy(update={"net": spec.net.model_copy(update={"source": str(beside / spec.net.source)})})


def draw(done: list[Finished], folder: Path) -> list[Path]:
    """Trajectories of the base and of the first seed of each way: before, during and after (as Figs. 5 and 6)."""
    rows: dict[str, Any] = {}
    for one, *_ in arm.seeds_of(done):
        for reading, row in gallery.trajectories(one.opened).items():
            rows[f"{one.cell.labels['begins as']},\n{reading.name}"] = row
    archive.write_picture(folder / "pretrained.png", gallery.side_by_side(rows))
    return [folder / "pretrained.png"]


PLAN = Plan(
    "A flow transformer of diffusers made a few-step one, on CIFAR-10 latents",
    cells,
    lambda done: list(arm.averaged(done)),
    draw,
    finish,
    unpublished="the paper's pretrained models are text to image",
)
