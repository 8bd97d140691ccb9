"""`dumo export`: write a trained net as files of stock programs, or for `dumo.load`.

It checks what needs no run, the place and the Hub; opens the run on the CPU; writes it (`dumo.export.write`); and
uploads what was written (`dumo.export.upload`).
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from dumo.cli.option import Folder, SamplingOverrides, TrustCode, Weights, parse_integers
from dumo.cli.terminal import err, out


def export(
    run_folder: Folder,
    overrides: SamplingOverrides = None,
    to: Annotated[
        Literal["diffusers", "lora", "comfyui", "safetensors"],
        typer.Option(
            "--to",
            metavar="FORM",
            show_default=False,
            help="diffusers (default; a folder for from_pretrained, and for dumo.load), lora (a folder for "
            "load_lora_weights), comfyui (a LoRA as one file) or safetensors (all weights as one file).",
        ),
    ] = "diffusers",
    target: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="PATH",
            help="A new folder; for comfyui and safetensors a new file. Default: next to the run, named after it and "
            "--to; for a bundled run in the current directory.",
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            metavar="HEAD",
            help="For a pretrained model: u, the few-step model, or v, an ordinary flow model. Default: u, if it was "
            "trained.",
        ),
    ] = None,
    parts: Annotated[
        Literal["copy", "link", "none"],
        typer.Option(
            metavar="HOW",
            show_default=False,
            help="The pipeline's other components (text encoders, decoder ...): copy (default), link or none.",
        ),
    ] = "copy",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(metavar="DTYPE", help="Data type of the weights: float32, bfloat16 or float16."),
    ] = "float32",
    nfe: Annotated[
        str | None,
        typer.Option(
            metavar="N,N...",
            help="For a pretrained model with two times: the NFE that the export supports. They are fixed at export "
            "because standard pipelines pass only t. Default: 2, and also 1 if both jump to the data.",
        ),
    ] = None,
    alone: Annotated[
        bool,
        typer.Option(
            "--alone",
            help="For a run on top of a few-step run: write only its own adapters, to load onto that run's export.",
        ),
    ] = False,
    weights: Weights = None,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME",
            help="Also upload it to this repository of the Hugging Face Hub; a new one is private.",
        ),
    ] = None,
    trust_code: TrustCode = False,
) -> None:
    """Write a run for dumo.load, diffusers, ComfyUI or the Hub.

    Examples:
    dumo export runs/digits --out digits-export
    dumo export runs/sd3-lora --to lora
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
    trained = load_run(run_folder, overrides or [], weights=weights, device="cpu")
    exported = write.export(
        trained, target, to=to, head=head, parts=parts, dtype=dtype, name=push, nfe=passes, alone=alone
    )
    out.print(str(exported), soft_wrap=True)

    # Upload it.
    if push is not None:
        signals.check()
        out.print(upload.push(exported, push), soft_wrap=True)
    elif exported.is_dir():
        err.print(f"see {exported / 'README.md'} for how to load it", soft_wrap=True)


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
