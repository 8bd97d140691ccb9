"""Export a run. `export` checks everything before it writes, and leaves nothing behind on failure.

It writes to a temporary path, which it then renames to `out`: the folder of a run with its own network
(`dumo.export.dumo_run`), a pipeline folder of a pretrained model (`_write_pipeline`), a LoRA (`dumo.export.lora`), or
one weight file (`_write_file`). A pipeline folder, for `DiffusionPipeline.from_pretrained(OUT)`:

transformer/       the model, with one head instead of its last layer
scheduler/         a scheduler that adds fresh noise between passes for a flow map, or the source's for a velocity
vae/ ...           the other components of the source pipeline, if there is one
model_index.json   the list of components
codes.safetensors  the class embeddings, if the model was tuned on classes
README.md          the model card
dumo.json          the run, and the SHA-256 of the exported weights
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
from dumo.encoders.pipeline_folder import SECOND_TRANSFORMER, TRANSFORMER, UNET, has_component
from dumo.export import dumo_run, lora, model_card
from dumo.export.model import DTYPES, INDEX, ExportedModel, Head, choose_exported_model, require_pipeline
from dumo.export.scheduler import SCHEDULER, write_flow_map_scheduler, write_velocity_scheduler
from dumo.flow.path import Diffusion, Linear
from dumo.io import file as files
from dumo.io.read import read_json, write_json
from dumo.io.tensor_files import PICKLES, unshared
from dumo.nets import Pretrained
from dumo.nets.dualized import Dualized
from dumo.nets.heads import with_submodules
from dumo.run.trained import TrainedRun
from dumo.run.weights import build, load_run
from dumo.runtime import signals
from dumo.training.frozen import trained_state_dict
from dumo.types import Objective, UserError

Form = Literal["diffusers", "lora", "comfyui", "safetensors"]
Parts = Literal["copy", "link", "none"]
FORMS: tuple[Form, ...] = get_args(Form)
# Formats that are one file, not a folder.
FILE_FORMS = ("comfyui", "safetensors")
PARTS: tuple[Parts, ...] = get_args(Parts)
# The file with the run and the hash of its weights.
ORIGIN = "dumo.json"
# Prefixes of keys in a source's model_index.json that do not apply to a tuned model: its name, and few-step settings
# that some servers read.
_SOURCE_ONLY_KEYS = ("_name_or_path", "_use_default_values", "dmd2_")
# The size of a guidance embedding that the UNet ignores. diffusers divides by half of it minus one.
_GUIDANCE_WIDTH = 4


def export(
    trained: TrainedRun,
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
    """Write a run as a folder, a LoRA's folder or file, or a file of weights; return `out`.

    A network from dumo or from the user is written as a whole, for `dumo.load`. For a pretrained model, one head is
    written for stock diffusers:

    - `head` is u or v; None means u if it was trained.
    - `parts`, the other components of the source pipeline, are copied, linked or omitted ("none").
    - `nfe` are the numbers of passes to which a network of two times is fixed.
    - `alone` omits the few-step adapters under a subject's adapters.

    A run on another device is opened again on the CPU. `name` is what the card opens, OWNER/NAME on the Hub; None takes
    the name of `out`. Raises UserError for an unknown option, if `out` exists, and if no stock program samples as the
    run does; OSError if nothing can be written. Nothing is written then.
    """
    # Check the options, and what the run has to export.
    require_known("form of export", to, FORMS)
    require_known("treatment of parts", parts, PARTS)
    require_known("dtype", dtype, DTYPES)
    require_vacant(out)
    if alone and not (trained.spec.has_subject and to in ("lora", "comfyui")):
        raise UserError(
            "alone writes only a subject's adapters, without the few-step adapters: use it for a run with "
            "net.lora.subject, exported to lora or comfyui"
        )
    if trained.device.type != "cpu":
        trained = load_run(trained.source, trained.overrides, weights=trained.given_weights, device="cpu")
    exported: ExportedModel | None = None
    if isinstance(trained.spec.net, Pretrained):
        exported = _exported_model(trained, to, head=head, nfe=nfe, dtype=dtype, alone=alone)
    elif to != "diffusers" or head is not None or nfe:
        kind = trained.spec.net.kind
        raise UserError(
            f"net.kind is {kind}, which is always exported with all heads and for any NFE: remove to, head and nfe"
        )

    # Write it.
    provenance = model_card.Provenance.of(trained)
    card_name = name or out.name
    with files.atomic_write(out) as temporary:
        if exported is not None and to in FILE_FORMS:
            _write_file(exported, provenance, temporary, to=to, dtype=dtype)
            return out
        temporary.mkdir()
        if exported is None:
            dumo_run.write(trained, provenance, temporary, card_name, dtype=dtype)
            return out
        if to == "lora":
            lora.write(exported, provenance, temporary, card_name, dtype=dtype)
        else:
            _write_pipeline(exported, provenance, temporary, card_name, parts=cast(Parts, parts))
        facts: dict[str, Any] = {**provenance.facts, "run": json.loads(provenance.facts["run"]), **exported.facts}
        write_json(temporary / ORIGIN, facts)
    return out


def require_vacant(out: Path) -> None:
    """Raise UserError if something exists at `out`, which the export would replace."""
    if os.path.lexists(out):
        raise UserError(f"{out} exists already: remove it, or choose another path")


def _exported_model(
    trained: TrainedRun, to: str, *, head: str | None, nfe: Sequence[int], dtype: str, alone: bool
) -> ExportedModel:
    """Choose the head of a pretrained model to export. Raises UserError as `export`."""
    spec = trained.spec.net
    assert isinstance(spec, Pretrained)
    path = trained.spec.path
    if path != Linear() and not isinstance(path, Diffusion):
        raise UserError(
            f"path is {path.kind} with sd {path.sd:g}, but standard schedulers only support x_t = (1 - t) x + t z: "
            "train with path.kind=linear and path.sd=1, or use dumo sample"
        )
    net = _net_with_uncoded_base(trained, spec) if to in ("diffusers", "safetensors") else trained.net
    assert isinstance(net, Dualized)
    chosen_head = _choose_head(trained.spec.objective, head)
    # A LoRA is rounded by itself, without the base weights.
    model_dtype = "float32" if to in ("lora", "comfyui") else dtype
    exported = choose_exported_model(trained.spec, spec, net, chosen_head, tuple(nfe), model_dtype)
    return replace(exported, subject_only=alone)


def _net_with_uncoded_base(trained: TrainedRun, spec: Pretrained) -> nn.Module:
    """Return the net of a run.

    A base that is held in few bits is read again as it is stored, so adapters can be added.
    """
    uncoded_spec = spec.with_uncoded_weights()
    if uncoded_spec is spec:
        return trained.net
    net = build(trained.spec.model_copy(update={"net": uncoded_spec}), trained.device)
    # Assign the trained weights, to avoid a copy in memory.
    net.load_state_dict(trained_state_dict(trained.net), strict=False, assign=True)
    return net.eval()


def _choose_head(objective: Objective, head: str | None) -> Head:
    """Return the head to export; None means u if it was trained. Raises UserError for a head that was not trained."""
    exportable: list[Head] = [name for name in ("u", "v") if name in objective.needs.heads]
    if not exportable:
        raise UserError(f"objective '{objective.kind}' has no head that can be exported: use dumo sample")
    if head is None:
        return exportable[0]
    if head not in exportable:
        raise UserError(f"objective '{objective.kind}' has no head {head} to export: use {' or '.join(exportable)}")
    return head


def _write_file(exported: ExportedModel, provenance: model_card.Provenance, file: Path, *, to: str, dtype: str) -> None:
    """Write one weight file: a LoRA for ComfyUI, or the whole model if `to` is "safetensors"."""
    metadata = model_card.header_metadata(exported, provenance)
    if to == "comfyui":
        lora.write_for_comfyui(exported, file, dtype=dtype, metadata=metadata)
        return
    weights = unshared(exported.build_model().state_dict())
    if exported.class_embeddings:
        warnings.warn(
            "the file lacks the embeddings of classes that the model was tuned on: the form diffusers has them",
            stacklevel=2,
        )
    safetensors.torch.save_file(weights, file, metadata=metadata)


def _write_pipeline(
    exported: ExportedModel,
    provenance: model_card.Provenance,
    out: Path,
    out_name: str,
    *,
    parts: Parts,
) -> None:
    """Write a pipeline into the empty folder `out`, which will be called `out_name`.

    The source's other components are copied, linked or omitted. Raises UserError if no stock pipeline runs the model,
    or if the run's latents are from another autoencoder.
    """
    stock = require_pipeline(exported)
    source = exported.source_folder
    index: dict[str, Any] = read_index(source) if source else {}
    # The source may have an older class name, which the installed diffusers does not have.
    index = {"_class_name": stock.pipeline} | {key: entry for key, entry in index.items() if key != "_class_name"}
    if source and parts != "none":
        exported.spec.pipeline.verify()
        require_own_autoencoder(exported.run.data)
    model = exported.build_model()
    if model_card.ignores_guidance(exported):
        model = _without_guidance(model)
    model.save_pretrained(out / exported.component_name)
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
    write_json(out / INDEX, index)
    codes = exported.class_embeddings
    if codes:
        safetensors.torch.save_file(codes, out / model_card.CODES, {"format": "pt"})
    readme = model_card.tuned_card(exported, provenance, stock, out_name, index)
    (out / "README.md").write_text(readme, encoding="utf-8")


def _without_guidance(unet: nn.Module) -> Any:  # noqa: ANN401, a diffusers model
    """Return a UNet with which its pipeline skips CFG for any guidance_scale, because the default would be wrong.

    As for LCM models, the pipeline passes an embedding of the scale to the model. Its projection has zero weights.
    """
    first_layer = unet.get_submodule("time_embedding.linear_1")
    assert isinstance(first_layer, nn.Linear)
    projection = nn.Linear(_GUIDANCE_WIDTH, first_layer.in_features, bias=False, dtype=first_layer.weight.dtype)
    nn.init.zeros_(projection.weight)
    new: Any = with_submodules(unet, {"time_embedding.cond_proj": projection})
    new.register_to_config(time_cond_proj_dim=_GUIDANCE_WIDTH)
    return new


def read_index(source: Path) -> dict[str, Any]:
    """Return the model_index.json of a pipeline, without the keys that only apply to the source.

    Raises UserError for a pipeline with two transformers, because the untuned second one would make some passes.
    """
    index = read_json(source / INDEX)
    if has_component(index.get(SECOND_TRANSFORMER)):
        raise UserError(
            f"{source} has two transformers, and {SECOND_TRANSFORMER}, which was not trained, would run some of the "
            "steps: export to safetensors"
        )
    return {key: entry for key, entry in index.items() if not key.startswith(_SOURCE_ONLY_KEYS)}


def other_parts(index: Mapping[str, Any]) -> list[str]:
    """Return the parts of a pipeline other than model and scheduler.

    Raises UserError for a name that leaves the folder.
    """
    parts = list[str]()
    for name, entry in index.items():
        if not has_component(entry) or name in (TRANSFORMER, UNET, SCHEDULER):
            continue
        if Path(name).name != name:
            raise UserError(f"pipeline: {INDEX} has a component {name!r}, which is a path: download the pipeline again")
        parts.append(name)
    return parts


def _copy_part(part: Path, destination: Path, parts: Parts) -> None:
    """Copy a component, or link to it if `parts` is "link"."""
    if parts == "link":
        destination.symlink_to(part.resolve(strict=True), target_is_directory=True)
    else:
        _copy_files(part, destination)


def _copy_files(source: Path, destination: Path) -> None:
    """Copy the files of a folder, except pickles next to safetensors of the same name.

    Raises the first OSError, unlike `shutil.copytree`, which continues. Raises Stopped between two files if a stop is
    requested.
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
    """Raise an error that `os.walk` would ignore."""
    raise error


def require_own_autoencoder(data: Data) -> None:
    """Raise UserError if the run's latents are not from the pipeline's autoencoder."""
    if isinstance(data, Latents) and data.codec.kind != "pipeline":
        raise UserError(
            f"data.codec is {data.codec.label}, but the pipeline decodes with its own autoencoder: train with "
            "data.codec.kind=pipeline, or export without parts"
        )
