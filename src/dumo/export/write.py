"""Exporting a run: checked first, then written whole or not at all."""

from pathlib import Path
from typing import Literal, cast, get_args

from dumo.export import folder, lora, single, standalone
from dumo.export.model import chosen
from dumo.io import file as files
from dumo.nets import DiT
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
    or left out. Raises UserError where `out` is there and not empty, for an option that is none, and where the run
    cannot be said so; OSError where nothing can be written. Then nothing is.
    """
    for name, value, known in (("--to", to, FORMS), ("--parts", parts, folder.PARTS), ("--dtype", dtype, DTYPES)):
        if value not in known:
            raise UserError(f"{name} {value}: it is one of {', '.join(known)}")
    vacant(out)
    if isinstance(opened.run.net, DiT) and to == "diffusers":
        with files.whole(out) as half:
            half.mkdir()
            standalone.write(opened, half, out.name, head=head, dtype=dtype)
        return out
    exported = chosen(opened, head)
    with files.whole(out) as half:
        if to == "safetensors":
            single.write(exported, half, dtype=dtype)
            return out
        half.mkdir()
        if to == "lora":
            lora.write(exported, half, out.name, dtype=dtype)
        else:
            folder.write(exported, half, out.name, parts=cast(folder.Parts, parts), dtype=dtype)
    return out


def vacant(out: Path) -> None:
    """Raise UserError where something stands already."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UserError(f"{out} is there already: remove it, or give another place")
