"""Exporting a run: checked first, then written whole or not at all."""

from pathlib import Path
from typing import Literal, cast, get_args

import safetensors.torch

from dumo.export import card, folder, lora, standalone
from dumo.export.model import Exported, Head, of_net
from dumo.flow.path import Linear
from dumo.flow.path import Path as FlowPath
from dumo.io import file as files
from dumo.io.weights import apart
from dumo.nets import DiT
from dumo.objectives import Objective
from dumo.run.config.error import require_known
from dumo.run.folder import RunFolder
from dumo.types import UserError

Form = Literal["diffusers", "lora", "safetensors"]
FORMS: tuple[Form, ...] = get_args(Form)
DTYPES = ("float32", "bfloat16", "float16")


def export(
    opened: RunFolder,
    out: Path,
    *,
    to: str = "diffusers",
    head: str | None = None,
    parts: str = "copy",
    dtype: str = "float32",
) -> Path:
    """Write a run's head as a pipeline's folder, a LoRA's folder or a safetensors file; returns `out`.

    `head` is u or v; None: u where it was taught. `parts` of the pipeline that the model came from are copied, linked
    or left out. Raises UserError where `out` is there and not empty, for an option that is none, and where no stock
    program runs what the run has; OSError where nothing can be written. Then nothing is.
    """
    for name, value, known in (("--to", to, FORMS), ("--parts", parts, folder.PARTS), ("--dtype", dtype, DTYPES)):
        require_known(name, value, known)
    vacant(out)
    sampler, spec, made = opened.sampler, opened.run.net, card.Provenance.of(opened)
    if isinstance(spec, DiT) and to == "diffusers":
        found = choose_head(sampler.objective, head)
        linear(sampler.path)
        with files.whole(out) as half:
            half.mkdir()
            standalone.write(sampler, spec, made, half, out.name, head=found, dtype=dtype)
        return out
    model = of_net(sampler, spec, choose_head(sampler.objective, head))
    linear(sampler.path)
    with files.whole(out) as half:
        if to == "safetensors":
            write_file(model, made, half, dtype=dtype)
            return out
        half.mkdir()
        if to == "lora":
            lora.write(model, made, half, out.name, dtype=dtype)
        else:
            folder.write(model, made, half, out.name, parts=cast(folder.Parts, parts), dtype=dtype)
    return out


def write_file(model: Exported, made: card.Provenance, out: Path, *, dtype: str = "float32") -> None:
    """Write all weights as one file `out`, by the model's own names, with notes on what it is in its header."""
    weights = apart(model.model(dtype).state_dict())
    safetensors.torch.save_file(weights, out, metadata=card.notes(model, made))


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


def linear(path: FlowPath) -> None:
    """Raise UserError for a path on which no stock scheduler steps."""
    if path != Linear():
        raise UserError(
            f"stock schedulers know the path x_t = (1 - t) x + t z alone, and this run's is {path.kind} with sd "
            f"{path.sd:g}: train with path.kind=linear and path.sd=1, or sample it by dumo sample"
        )
