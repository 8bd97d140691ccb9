"""`dumo export`: write a trained net as files of stock programs, or for `dumo.load`.

It checks what needs no run, the place and the Hub; opens the run on the CPU; writes it (`dumo.export.write`); and
uploads what was written (`dumo.export.upload`).
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from dumo.cli.option import Folder, Set, TrustCode, Weights, parse_integers
from dumo.cli.terminal import err, out


def export(
    run_folder: Folder,
    target: Annotated[
        Path | None,
        typer.Argument(
            metavar="[OUT]",
            help="The folder to write, or for comfyui and safetensors the file. It must not exist yet. Default: next "
            "to the run, or here for a run that ships with dumo, by its name and --to.",
        ),
    ] = None,
    to: Annotated[
        Literal["diffusers", "lora", "comfyui", "safetensors"],
        typer.Option(
            "--to",
            help="diffusers (a folder for from_pretrained; a network of dumo's own for dumo.load, too), lora (a folder "
            "for load_lora_weights), comfyui (a LoRA as one file) or safetensors (all weights as one file).",
        ),
    ] = "diffusers",
    head: Annotated[
        str | None,
        typer.Option(help="Of a pretrained model: u, which jumps, or v, an ordinary flow. Default: u, if taught."),
    ] = None,
    parts: Annotated[
        Literal["copy", "link", "none"],
        typer.Option(help="The pipeline's other parts (text encoders, decoder ...): copy, link or none."),
    ] = "copy",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="In which weights are written.")
    ] = "float32",
    nfe: Annotated[
        str | None,
        typer.Option(
            help="For a pretrained model of two times: the numbers of passes that the export can make, e.g. 1,2,4. "
            "They are fixed, because stock programs give a model t alone. Default: 2, and 1 if both jump to the data."
        ),
    ] = None,
    alone: Annotated[
        bool,
        typer.Option(
            "--alone",
            help="For a run on top of a few-step run: write its own adapters alone, to load onto that run's export. "
            "Default: both in one LoRA, to load onto the stock model.",
        ),
    ] = False,
    set_: Set = None,
    weights: Weights = None,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME",
            help="Also upload it to this repository of the Hugging Face Hub; a new one is private. Needs a token.",
        ),
    ] = None,
    trust_code: TrustCode = False,
) -> None:
    """Write a run for dumo.load, diffusers, ComfyUI or the Hub.

    Example:  dumo export runs/digits digits-export
    """
    from dumo.export import upload, write
    from dumo.run.weights import load_run
    from dumo.runtime import dist, signals

    # Check what needs no run.
    dist.require_one_process("dumo export")
    if target is None:
        target = _default_target(run_folder, to)
    write.require_vacant(target)
    if push is not None:
        upload.require_uploadable(push, parts)

    # Open the run, and write it.
    passes = parse_integers(nfe, "--nfe") or ()
    trained = load_run(run_folder, set_ or [], weights=weights, device="cpu")
    exported = write.export(
        trained, target, to=to, head=head, parts=parts, dtype=dtype, name=push, nfe=passes, alone=alone
    )
    out.print(str(exported), soft_wrap=True)

    # Upload it.
    if push is not None:
        signals.check()
        out.print(upload.push(exported, push), soft_wrap=True)
    elif exported.is_dir():
        err.print(f"{exported / 'README.md'} says how to load it", soft_wrap=True)


def _default_target(run_folder: str, to: str) -> Path:
    """The default place of an export: next to the run, by its name and the form, such as digits-trained-diffusers."""
    from dumo.export.write import FILE_FORMS
    from dumo.run import read_only

    folder = read_only.output_folder(run_folder)
    # A run may be named by . or .., which have no name to begin with.
    if folder.name in ("", ".."):
        folder = folder.resolve()
    ending = ".safetensors" if to in FILE_FORMS else ""
    return folder.with_name(f"{folder.name}-{to}{ending}")
