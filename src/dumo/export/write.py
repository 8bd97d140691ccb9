"""Export a run: `export` checks everything first, then writes all or nothing.

1. It refuses options, a place or a run that cannot be exported, and chooses the head.
2. It writes into a temporary place, which then becomes `out`: one file of weights (`_write_file`); a LoRA
   (`dumo.export.lora`); a net of dumo's own with its code (`dumo.export.standalone`); or a pretrained model as a
   pipeline (`_write_pipeline`).
3. Next to the weights in a folder, it notes the run in dumo.json (`_note_run`).

Callers also ask `require_diffusers`, `require_options` and `require_vacant`, to refuse before they open the run. The
folder of a pipeline, for `DiffusionPipeline.from_pretrained(OUT)`:

transformer/       the model, with one head instead of its last layer
scheduler/         of a flow map, one that adds fresh noise between two passes; of a velocity, the source's own
vae/ ...           the other parts of the pipeline that the model came from, if it came from one
model_index.json   which parts there are
codes.safetensors  what stands for classes, where the model was tuned on none but them
README.md          the model card
dumo.json          the run, and the SHA-256 of the weights that this was made of
"""

import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import safetensors.torch
from torch import nn

from dumo.config.suggestion import require_known
from dumo.data import Data, Latents
from dumo.encoders.pipeline import SECOND_TRANSFORMER, TRANSFORMER, UNET, has_component
from dumo.export import card, lora, standalone
from dumo.export.model import DTYPES, INDEX, ExportedModel, Head, choose_exported_model, require_pipeline
from dumo.export.scheduler import SCHEDULER, write_flow_map_scheduler, write_velocity_scheduler
from dumo.export.serve import IGNORED_KEY, reason_not_servable, vllm_index_entries
from dumo.flow.path import Diffusion, Linear
from dumo.io import file as files
from dumo.io.read import brief, read_settings, write_json
from dumo.io.weights import PICKLES, unshared
from dumo.nets import DiT, Pretrained, UNet
from dumo.run.weights import RunFolder, build
from dumo.runtime import require_package, signals
from dumo.runtime.door import option
from dumo.training.frozen import trained_state_dict
from dumo.types import Objective, UserError

Form = Literal["diffusers", "lora", "comfyui", "safetensors"]
Parts = Literal["copy", "link", "none"]
FORMS: tuple[Form, ...] = get_args(Form)
FILE_FORMS = ("comfyui", "safetensors")  # one file, no folder
PARTS: tuple[Parts, ...] = get_args(Parts)
ORIGIN = "dumo.json"  # the file that notes the run
# Beginnings of entries of an index: where the pipeline came from, and what servers read of its passes.
_LEFT_OUT = ("_name_or_path", IGNORED_KEY, "dmd2_")
TAKE_ANOTHER = "take another copy of the pipeline"  # the end of messages


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

    `head` is u or v; None: u where it was taught. `parts` of the pipeline that the model came from, or a published text
    encoder, are copied, linked or left out. `name` is what the card opens, OWNER/NAME on the hub; None: the folder.
    `nfe` are the numbers of passes for which a net of two times is fixed. `alone`: of adapters on top of a few-step
    run's, these without those.

    Raises UserError without diffusers, where `out` exists and is not empty, for an unknown option, and where no stock
    program runs what the run has; OSError where nothing can be written. Then nothing is written.
    """
    require_diffusers()
    require_options(to, parts, dtype)
    if alone and not (opened.run.has_subject and to in ("lora", "comfyui")):
        raise UserError(
            f"{option('alone', True)} leaves out a few-step run's adapters, of a run on top of one (net.lora.subject): "
            f"give {option('to', 'lora')} or comfyui, and such a run"
        )
    require_vacant(out, to)
    sampler = opened.sampler
    spec = opened.run.net
    provenance = card.Provenance.of(opened)
    if to in ("diffusers", "safetensors"):
        sampler = replace(sampler, flow=sampler.flow.of(_net_with_uncoded_base(opened)))
    chosen_head = _choose_head(sampler.flow.objective, head)
    exported: ExportedModel | None = None  # None: a net of dumo's own, which is written with its code
    if to != "diffusers" or not isinstance(spec, DiT | UNet):
        # a LoRA is rounded alone, without what it is added to
        model_dtype = "float32" if to in ("lora", "comfyui") else dtype
        exported = choose_exported_model(sampler, spec, chosen_head, tuple(nfe), model_dtype)
        exported = replace(exported, subject_only=alone)
    elif nfe:
        raise UserError(f"an export of dumo's own net makes any number of passes: leave out {option('nfe')}")
    path = sampler.flow.path
    is_stock_path = path == Linear() or isinstance(path, Diffusion)
    is_path_of_own_net = exported is None and isinstance(path, Linear)  # its pipeline multiplies by sd
    if not (is_stock_path or is_path_of_own_net):
        raise UserError(
            f"stock schedulers know the path x_t = (1 - t) x + t z alone, and this run's is {path.kind} with sd "
            f"{path.sd:g}: train with path.kind=linear and path.sd=1, or sample it by dumo sample"
        )
    files.sweep(out.parent, is_users=True)  # a killed export's may be tens of GB
    with files.atomic_write(out) as temporary:
        if exported is not None and to in FILE_FORMS:
            _write_file(exported, provenance, temporary, to=to, dtype=dtype)
            return out
        temporary.mkdir()
        card_name = name or out.name
        if exported is None:
            assert isinstance(spec, DiT | UNet)
            standalone.write(
                sampler, spec, provenance, temporary, card_name, head=chosen_head, parts=parts, dtype=dtype
            )
        elif to == "lora":
            lora.write(exported, provenance, temporary, card_name, dtype=dtype)
        else:
            _write_pipeline(exported, provenance, temporary, card_name, parts=cast(Parts, parts))
        _note_run(temporary / ORIGIN, provenance, exported)
    return out


def require_diffusers() -> None:
    """Raise UserError without diffusers, which makes the samples that an export is compared by."""
    require_package("diffusers", "diffusers", "an export")


def require_options(to: str, parts: str, dtype: str) -> None:
    """Raise UserError for a form, a treatment of parts or a dtype that there is not, or parts of a form without any."""
    require_known(option("to"), to, FORMS)
    require_known(option("parts"), parts, PARTS)
    require_known(option("dtype"), dtype, DTYPES)
    if parts != "copy" and to != "diffusers":
        raise UserError(
            f"{option('parts', parts)} is for {option('to', 'diffusers')}, and {option('to', to)} writes no other "
            f"parts: leave {option('parts')} out"
        )


def _net_with_uncoded_base(opened: RunFolder) -> nn.Module:
    """The net of a run. A base that is held in few bits is read anew as it is stored, so that adapters can be added."""
    spec = opened.run.net
    if not isinstance(spec, Pretrained):
        return opened.net
    uncoded_spec = spec.with_uncoded_weights()
    if uncoded_spec is spec:
        return opened.net
    net = build(opened.run.model_copy(update={"net": uncoded_spec}), opened.device)
    trained_weights = trained_state_dict(opened.net)
    net.load_state_dict(trained_weights, strict=False, assign=True)  # assigned, so memory holds them once
    return net.eval()


def require_vacant(out: Path, to: str) -> None:
    """Raise UserError unless `out` is missing, or an empty folder for a form that is a folder.

    A file must have the ending by which programs find weights. A folder needs a name: it replaces what has this name.
    """
    if out.name in ("", ".."):
        kind, example = ("file", "dumo.safetensors") if to in FILE_FORMS else ("folder", "few-steps")
        raise UserError(f"{out} is no name for an export: name a {kind} in it, such as {out / example}")
    if to in FILE_FORMS:
        if out.is_dir():
            example = out / "dumo.safetensors"
            raise UserError(f"{out} is a folder, and {option('to', to)} writes a file: name one in it, {example}")
        if out.suffix != ".safetensors":
            raise UserError(f"{out} has not the ending of {option('to', to)}: name it {out}.safetensors")
    is_empty_folder = out.is_dir() and not any(out.iterdir())
    if out.is_symlink() or (out.exists() and not is_empty_folder):
        raise UserError(f"{out} exists already: remove it, or give another place")


def _choose_head(objective: Objective, head: str | None) -> Head:
    """The head to export; None: u where it was taught. Raises UserError for one that was not."""
    exportable: list[Head] = [name for name in ("u", "v") if name in objective.needs.heads]
    if not exportable:
        raise UserError(f"objective '{objective.kind}' has no head that can be exported: sample it by dumo sample")
    if head is None:
        return exportable[0]
    if head not in exportable:
        raise UserError(
            f"{option('head', brief(head))}: of objective '{objective.kind}' only {' and '.join(exportable)} can be "
            f"exported: give another {option('head')}, or sample it by dumo sample"
        )
    return head


def _write_file(exported: ExportedModel, provenance: card.Provenance, file: Path, *, to: str, dtype: str) -> None:
    """Write one file of weights: a LoRA for ComfyUI, or with `to` safetensors a whole model."""
    if to == "comfyui":
        weights = lora.comfyui_tensors(exported, dtype=dtype)
    else:
        weights = unshared(exported.build_model().state_dict())
        if exported.class_embeddings:
            warnings.warn(
                "the file has the weights alone, without what the model reads for classes: "
                f"{option('to', 'diffusers')} writes that, too, where a stock pipeline runs the model",
                stacklevel=2,
            )
    safetensors.torch.save_file(weights, file, metadata=card.header_metadata(exported, provenance))


def _note_run(file: Path, provenance: card.Provenance, exported: ExportedModel | None) -> None:
    """Write dumo.json: the run as a tree, and what programs may ask of the export."""
    facts: dict[str, Any] = dict(provenance.facts)
    facts["run"] = json.loads(facts["run"])
    if exported is not None:
        facts |= exported.facts
    write_json(file, facts)


def _write_pipeline(
    exported: ExportedModel,
    provenance: card.Provenance,
    out: Path,
    out_name: str,
    *,
    parts: Parts,
) -> None:
    """Write a pipeline into the empty folder `out`, which will be called `out_name`.

    The source's other parts are copied, linked to, or left out. Raises UserError where no stock pipeline runs the
    model, or the source's decoder reads other latents than the run has.
    """
    stock = require_pipeline(exported)
    source = exported.source_folder
    index: dict[str, Any] = read_index(source) if source else {"_class_name": stock.pipeline}
    if source and parts != "none":
        exported.spec.pipeline.verify()
        require_own_autoencoder(exported.sampler.data)
    exported.build_model().save_pretrained(out / exported.component_name)
    index[exported.component_name] = ["diffusers", exported.model_class]
    if exported.head == "u":
        index[SCHEDULER] = write_flow_map_scheduler(
            out / SCHEDULER,
            exported.solver,
            exported.net.diffusion,
            takes_times=bool(stock.time_arguments),
            makes_hops=exported.makes_hops,
        )
    elif source:
        _copy_part(source / SCHEDULER, out / SCHEDULER, "copy")
    else:
        index[SCHEDULER] = write_velocity_scheduler(out / SCHEDULER, exported.net.diffusion)
    absent_parts = exported.spec.pipeline.absent_parts
    for name in other_parts(index):
        if name in absent_parts:
            index[name] = [None, None]
        elif source and parts != "none":
            _copy_part(source / name, out / name, parts)
        else:
            del index[name]
    if reason_not_servable(exported, index) is None:
        index |= vllm_index_entries(exported)
    write_json(out / INDEX, index)
    codes = exported.class_embeddings
    if codes:
        safetensors.torch.save_file(codes, out / card.CODES, {"format": "pt"})
    readme = card.tuned_card(exported, provenance, stock, out_name, index)
    (out / "README.md").write_text(readme, encoding="utf-8")


def read_index(source: Path) -> dict[str, Any]:
    """The model_index.json of a pipeline, without the entries that say what ours is not (`_LEFT_OUT`).

    Raises UserError for a file that is no such index, and for a pipeline of two transformers.
    """
    index = read_settings(source / INDEX, TAKE_ANOTHER)
    if has_component(index.get(SECOND_TRANSFORMER)):
        raise UserError(
            f"{source} is no pipeline of one transformer: {TAKE_ANOTHER}; or, of two, {SECOND_TRANSFORMER} was not "
            f"tuned and would make some of the passes: take {option('to', 'safetensors')}"
        )
    return {key: entry for key, entry in index.items() if not key.startswith(_LEFT_OUT)}


def other_parts(index: Mapping[str, Any]) -> list[str]:
    """The parts of a pipeline other than model and scheduler. Raises UserError for a name that leads elsewhere."""
    parts = list[str]()
    for name, entry in index.items():
        if not has_component(entry) or name in (TRANSFORMER, UNET, SCHEDULER):
            continue
        if Path(name).name != name:
            raise UserError(f"pipeline: {INDEX} has a part called {brief(name)!r}, which is no folder: {TAKE_ANOTHER}")
        parts.append(name)
    return parts


def _copy_part(part: Path, destination: Path, parts: Parts) -> None:
    """Copy a part, or with `parts` link make a link to it. Raises UserError where it is missing."""
    if not part.is_dir():
        raise UserError(f"pipeline: {part} is missing, and {INDEX} has it: {TAKE_ANOTHER}")
    if parts == "link":
        destination.symlink_to(part.resolve(), target_is_directory=True)
    else:
        _copy_files(part, destination)


def _copy_files(source: Path, destination: Path) -> None:
    """Copy the files of a folder, but for a pickle next to safetensors of its name, which hold the same weights.

    Raises the first OSError: `shutil.copytree` goes on, and raises all of them as one. Raises Stopped between two files
    once a stop is asked for.
    """
    for folder, _, names in os.walk(source, followlinks=True, onerror=_raise_error):
        copied_folder = destination / Path(folder).relative_to(source)
        copied_folder.mkdir()
        for name in names:
            stem, ending = os.path.splitext(name)
            twins = (f"{stem}.safetensors", f"{stem.removeprefix('pytorch_')}.safetensors")
            if ending in PICKLES and not {*twins}.isdisjoint(names):
                continue
            signals.check()
            shutil.copyfile(Path(folder, name), copied_folder / name)


def _raise_error(error: OSError) -> None:
    """Raise the error of a folder that cannot be listed, which `os.walk` would skip."""
    raise error


def require_own_autoencoder(data: Data) -> None:
    """Raise UserError where the net makes latents of another autoencoder than the pipeline decodes with."""
    if isinstance(data, Latents) and data.codec.kind != "pipeline":
        raise UserError(
            f"data.codec is {data.codec.label}, and the pipeline decodes with its own autoencoder: train with "
            f"data.codec.kind=pipeline, or export with {option('parts', 'none')}"
        )
