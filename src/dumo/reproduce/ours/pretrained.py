"""A flow transformer of diffusers, trained by flow matching, then made a few-step one: in full, or by adapters.

The model is an SD3 of 1.3 M parameters that learns CIFAR-10 in the latents of a small autoencoder, and reads 1000 t as
published ones do. The other cells begin from what diffusers saved of it. The features of the distances are those of the
shipped classifier, so none of these numbers is an FID.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from dumo.config.load import load
from dumo.config.spec import Run
from dumo.export.write import export
from dumo.io import archive, picture, weights
from dumo.nets.dualized import Dualized
from dumo.nets.pretrained import Pretrained
from dumo.progress import Bar
from dumo.random import noise
from dumo.report import gallery
from dumo.reproduce import arm
from dumo.reproduce.plan import Cell, Finished, Plan, finish_all, trained_as, units
from dumo.run.folder import RunFolder

MODEL, BASE = "sd3-small", "base"  # its sizes, which come with dumo; where it is saved, beside the cells
STEPS = {"smoke": (20, 10), "laptop": (3000, 1000)}  # of the base; of the cell whose cost all others have
LORA = {"rank": 16}
NFE = "evaluate.nfe=[1,2,4]"


def net(**fields: object) -> str:
    """The net as an override. Where its weights are not drawn, `finish` names the folder that they are in."""
    return f"net={json.dumps({'kind': 'diffusers', 'source': MODEL, **fields})}"


def cells(scale: str) -> Iterator[Cell]:
    """The base, then three ways to few passes, with several seeds and at equal counted cost."""
    small = [one for one in arm.LATENTS if not one.startswith("net.")] if scale == "smoke" else []
    long, steps = STEPS[scale]
    drawn = net(source=MODEL, weights="drawn", lowpass=None)
    sets = [drawn, f"train.steps={long}", f"train.milestones=[0,{long // 3}]", "evaluate.nfe=[1,2,4,50]"]
    base = load("cifar10-latents-flow-matching", [*small, *sets])
    labels = {"begins as": "nothing, by flow matching", "steps": long, "F_per_step": round(units(base), 2)}
    yield Cell(BASE, base, labels)
    ways: dict[str, tuple[str, ...]] = {
        "the base, in full": (net(),),
        "the base, taught by it, adapters": (net(lora=LORA), "teacher={kind: base}"),
        "nothing": (net(source=MODEL, weights="drawn"),),
    }
    budget = 0.0
    for begins, way in ways.items():
        spec = load("cifar10-latents", [*small, *way, NFE])
        each = units(spec)
        budget = budget or steps * each
        labels = {"begins as": begins, "steps": (count := round(budget / each)), "F_per_step": round(each, 2)}
        for seed in range(1 if scale == "smoke" else 3):
            run = trained_as(spec, steps=count, seed=seed, milestones=(0, count // 5))
            yield Cell(f"{begins.split()[-1]}-{seed}", run, labels)


def finish(cells: Sequence[Cell], folder: Path, *, jobs: int, device: str, bar: Bar) -> list[Finished]:
    """The base first, which diffusers saves; then what begins from it. Raises UserError as `finish_all`."""
    first, *rest = cells
    begun, base = finish_all([first], folder, jobs=1, device=device, bar=bar), folder.parent / BASE
    save(begun[0].opened.net, base)
    moved = [replace(cell, spec=begun_at(cell.spec, base)) for cell in rest]
    return [*begun, *finish_all(moved, folder, jobs=jobs, device=device, bar=bar)]


def save(net: nn.Module, folder: Path) -> None:
    """The model of a net, as diffusers saves it, with v's head; not again where it is."""
    assert isinstance(net, Dualized)
    if not (folder / "config.json").exists():
        net.stock("v").save_pretrained(folder)


def begun_at(spec: Run, folder: Path) -> Run:
    """The run with the weights of a folder, where it begins from weights."""
    net = spec.net
    if not isinstance(net, Pretrained) or net.weights == "drawn":
        return spec
    return spec.model_copy(update={"net": net.model_copy(update={"source": str(folder)})})


def draw(done: list[Finished], folder: Path) -> list[Path]:
    """Trajectories of the base and of the first seed of each way: before, during and after (as Figs. 5 and 6).

    And what the stock pipeline makes of the first one that was tuned, once exported.
    """
    made: list[Path] = []
    for one, *_ in arm.seeds_of(done):  # a picture each, for each has steps of its own
        made.append(folder / f"pretrained-{one.cell.name.removesuffix('-0')}.png")
        rows = {reading.name: row for reading, row in gallery.trajectories(one.opened).items()}
        archive.write_picture(made[-1], gallery.side_by_side(rows))
    made.append(folder / "pretrained-stock.png")
    archive.write_picture(made[-1], by_stock(done[1].opened, folder / "exported"))
    return made


def by_stock(opened: RunFolder, folder: Path) -> Image.Image:
    """An image of each class by diffusers' own pipeline of an export, in one pass and in two; rows are passes."""
    diffusers: Any = import_module("diffusers")  # typed as if a pipeline could not do without text encoders
    if not folder.exists():
        export(opened, folder)
    model = diffusers.SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    none = dict.fromkeys(("vae", *(f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3"))))
    pipe = diffusers.StableDiffusion3Pipeline(transformer=model, scheduler=scheduler, **none)
    pipe.set_progress_bar_config(disable=True)
    codes, n = weights.load(folder / "codes.safetensors"), opened.run.data.classes
    told = {"prompt_embeds": codes["tokens"][:n], "pooled_prompt_embeds": codes["pooled"][:n]}
    m, side = opened.run.sample.solver.m, 8 * opened.run.data.shape[-1]  # pyright: ignore[reportAttributeAccessIssue]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)  # of the noise between two passes
        z = noise(0, range(n), 0, opened.run.data.shape)
        made = [
            pipe(**told, latents=z, sigmas=sigmas, guidance_scale=1.0, height=side, width=side, output_type="latent")
            for sigmas in ([1.0], [1.0, m])
        ]
    names = [opened.run.class_name(c) for c in range(n)]
    return picture.sheet(picture.to_rows(opened.decode(torch.cat([one.images for one in made]))), n, titles=names)


PLAN = Plan(
    "A flow transformer of diffusers made a few-step one, on CIFAR-10 latents",
    cells,
    lambda done: list(arm.averaged(done)),
    draw,
    finish,
    unpublished="the paper's pretrained models are text to image",
)
