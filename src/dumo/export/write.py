"""Exporting a run: checked first, then written whole or not at all. What stock diffusers opens is a folder.

`DiffusionPipeline.from_pretrained(OUT)`:

transformer/       the model, with one head instead of its last layer
scheduler/         of a flow map, one that adds fresh noise between two passes; of a velocity, the source's own
vae/ ...           the other parts of the pipeline that the model came from, if it came from one
model_index.json   which parts there are
codes.safetensors  what stands for classes, where the model was tuned on none but them
README.md          the model card
dumo.json          the run, and the SHA-256 of the weights that this was made of
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import safetensors.torch
from torch import nn

from dumo.config.error import require_known
from dumo.data import Data, Latents
from dumo.encoders.pipeline import TRANSFORMER, UNET
from dumo.export import card, lora, standalone
from dumo.export.model import INDEX, Exported, Head, of_net, require
from dumo.export.scheduler import SCHEDULER, write_euler, write_scheduler
from dumo.export.serve import UNREAD, is_whole, served, there, unserved
from dumo.flow.path import Diffusion, Linear
from dumo.io import file as files
from dumo.io.read import brief, read_settings, write_json
from dumo.io.weights import apart
from dumo.nets import DiT, Pretrained
from dumo.run.weights import RunFolder, build
from dumo.training.frozen import trained
from dumo.types import Objective, UserError

Form = Literal["diffusers", "lora", "comfyui", "safetensors"]
Parts = Literal["copy", "link", "none"]
FORMS: tuple[Form, ...] = get_args(Form)
PARTS: tuple[Parts, ...] = get_args(Parts)
DTYPES = ("float32", "bfloat16", "float16")
SECOND = "transformer_2"
ORIGIN = "dumo.json"
ANOTHER = "take another copy of the pipeline"


def export(
    opened: RunFolder,
    out: Path,
    *,
    to: str = "diffusers",
    head: str | None = None,
    parts: str = "copy",
    dtype: str = "float32",
    name: str | None = None,
    nfe: Sequence[int] = (),
    alone: bool = False,
) -> Path:
    """Write a run's head as a pipeline's folder, a LoRA's folder or file, or a file of weights; returns `out`.

    `head` is u or v; None: u where it was taught. `parts` of the pipeline that the model came from are copied, linked
    or left out. `name` is what the card opens, OWNER/NAME on the hub; None: the folder. `nfe` are the numbers of passes
    for which a net of two times is fixed. `alone`: of adapters on top of a few-step run's, these without those.

    Raises UserError where `out` is there and not empty, for an option that is none, and where no stock program runs
    what the run has; OSError where nothing can be written. Then nothing is.
    """
    for option, value, known in (("--to", to, FORMS), ("--parts", parts, PARTS), ("--dtype", dtype, DTYPES)):
        require_known(option, value, known)
    if alone and not (opened.run.has_subject and to in ("lora", "comfyui")):
        raise UserError(
            "--alone leaves out a few-step run's adapters, of a run on top of one (net.lora.subject): give --to lora "
            "or comfyui, and such a run"
        )
    vacant(out)
    sampler, spec, made = opened.sampler, opened.run.net, card.Provenance.of(opened)
    if to in ("diffusers", "safetensors"):
        sampler = replace(sampler, flow=sampler.flow.of(uncoded(opened)))
    found, path = choose_head(sampler.flow.objective, head), sampler.flow.path
    if isinstance(spec, DiT) and to == "diffusers":
        net = spec
    else:  # a LoRA is rounded alone, without what it is added to
        net = of_net(sampler, spec, found, tuple(nfe), "float32" if to in ("lora", "comfyui") else dtype)
        net = replace(net, alone=alone)
    if path != Linear() and not isinstance(path, Diffusion):
        raise UserError(
            f"stock schedulers know the path x_t = (1 - t) x + t z alone, and this run's is {path.kind} with sd "
            f"{path.sd:g}: train with path.kind=linear and path.sd=1, or sample it by dumo sample"
        )
    files.sweep(out.parent, ours=False)  # a killed export's may be tens of GB
    with files.whole(out) as half:
        if to in ("comfyui", "safetensors") and not isinstance(net, DiT):  # one by the model's own names
            weights = lora.comfyui(net, dtype=dtype) if to == "comfyui" else apart(net.model().state_dict())
            safetensors.torch.save_file(weights, half, metadata=card.notes(net, made))
            return out
        half.mkdir()
        name = name or out.name
        if isinstance(net, DiT):
            standalone.write(sampler, net, made, half, name, head=found, dtype=dtype)
        elif to == "lora":
            lora.write(net, made, half, name, dtype=dtype)
        else:
            write_folder(net, made, half, name, parts=cast(Parts, parts))
        facts = made.facts
        facts = {**facts, "run": json.loads(facts["run"])}
        write_json(half / ORIGIN, facts | (net.facts if isinstance(net, Exported) else {}))
    return out


def uncoded(opened: RunFolder) -> nn.Module:
    """A run's net with adapters that can be added to their layers: on a base that is read anew where it is coded."""
    spec = opened.run.net
    if not isinstance(spec, Pretrained) or (whole := spec.uncoded()) is spec:
        return opened.net
    net = build(opened.run.model_copy(update={"net": whole}), opened.device)
    net.load_state_dict(trained(opened.net), strict=False, assign=True)  # which are there once
    return net.eval()


def vacant(out: Path) -> None:
    """Raise UserError where something stands already."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UserError(f"{out} is there already: remove it, or give another place")


def choose_head(objective: Objective, head: str | None) -> Head:
    """The head to export; None: u where it was taught. Raises UserError for one that was not."""
    has: list[Head] = [one for one in ("u", "v") if one in objective.needs.heads]
    if not has or (head or has[0]) not in has:
        raise UserError(
            f"objective '{objective.kind}' has {', '.join(has) or 'no'} head{'s' * (len(has) > 1)} that can be "
            "exported: give another --head, or sample it by dumo sample"
        )
    return has[0] if head is None else cast(Head, head)


def write_folder(
    exported: Exported,
    made: card.Provenance,
    out: Path,
    out_name: str,
    *,
    parts: Parts = "copy",
) -> None:
    """Write the folder `out`, which is there and empty, and will be called `out_name`.

    The source's other parts are copied, linked to, or left out. Raises UserError where no stock pipeline runs the
    model, or the source's decoder reads other latents than the run has.
    """
    stock, source = require(exported), exported.source
    index: dict[str, Any] = read_index(source) if source else {"_class_name": stock.pipeline}
    if source and parts != "none":
        exported.spec.pipeline.verify()
        fits(exported.sampler.data)
    exported.model().save_pretrained(out / exported.part)
    index[exported.part] = ["diffusers", exported.kind]
    if exported.head == "u":
        index[SCHEDULER] = write_scheduler(
            out / SCHEDULER, exported.solver, exported.net.frame, takes_times=bool(stock.times), hops=exported.hops
        )
    elif source:
        bring(source / SCHEDULER, out / SCHEDULER, "copy")
    else:
        index[SCHEDULER] = write_euler(out / SCHEDULER, exported.net.frame)
    for name in others(index):
        if source and parts != "none":
            bring(source / name, out / name, parts)
        else:
            del index[name]
    if not unserved(exported, whole=is_whole(index)):
        index |= served(exported)
    write_json(out / INDEX, index)
    if codes := exported.codes:
        safetensors.torch.save_file(codes, out / card.CODED, {"format": "pt"})
    (out / "README.md").write_text(card.of_tuned(exported, made, stock, out_name, index), encoding="utf-8")


def read_index(source: Path) -> dict[str, Any]:
    """The model_index.json of a pipeline, without what servers read of its passes, for ours are others.

    Raises UserError for one that is none, or has two transformers.
    """
    index = read_settings(source / INDEX, ANOTHER)
    if there(index.get(SECOND)):
        raise UserError(
            f"{source} is no pipeline of one transformer: {ANOTHER}; or, of two, {SECOND} was not tuned and would make "
            "some of the passes: take --to safetensors"
        )
    return {key: entry for key, entry in index.items() if not key.startswith("dmd2_") and key != UNREAD}


def others(index: Mapping[str, Any]) -> list[str]:
    """The parts of a pipeline other than model and scheduler. Raises UserError for a name that leads elsewhere."""
    parts = [name for name, entry in index.items() if there(entry) and name not in (TRANSFORMER, UNET, SCHEDULER)]
    if strange := [name for name in parts if Path(name).name != name]:
        raise UserError(f"pipeline: {INDEX} has a part called {brief(strange[0])!r}, which is no folder: {ANOTHER}")
    return parts


def bring(part: Path, to: Path, how: Parts) -> None:
    """Copy a part, or link to it where it lies now. Raises UserError where it is missing."""
    if not part.is_dir():
        raise UserError(f"pipeline: {part} is missing, and {INDEX} has it: {ANOTHER}")
    if how == "link":
        to.symlink_to(part.resolve(), target_is_directory=True)
    else:
        shutil.copytree(part, to)


def fits(data: Data) -> None:
    """Raise UserError where the net makes latents of another autoencoder than the pipeline decodes with."""
    if isinstance(data, Latents) and data.codec.kind != "pipeline":
        raise UserError(
            f"data.codec is {data.codec.about}, and the pipeline decodes with its own autoencoder: train with "
            "data.codec.kind=pipeline, or export with --parts none"
        )
