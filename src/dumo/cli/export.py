"""What others run: a trained net as a pipeline of diffusers, a LoRA, or a file."""

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from dumo.cli.option import RunFolder, Weights, place
from dumo.cli.terminal import err, out


def export(
    run_folder: RunFolder,
    target: Annotated[
        Path, typer.Argument(metavar="OUT", parser=place, help="A folder, or of safetensors a file; not there yet.")
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to", help="diffusers (a folder for from_pretrained), lora (for load_lora_weights) or safetensors."
        ),
    ] = "diffusers",
    head: Annotated[
        str | None, typer.Option(help="u, which jumps, or v, an ordinary flow model. Default: u, if taught.")
    ] = None,
    parts: Annotated[
        str, typer.Option(help="The source's other parts (text encoders, decoder ...): copy, link or none.")
    ] = "copy",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    weights: Weights = None,
) -> None:
    """Write a trained net as stock programs take it."""
    from dumo.export import write
    from dumo.run.folder import open_run
    from dumo.runtime import dist

    dist.alone("dumo export")
    write.vacant(target)
    opened = open_run(run_folder, weights=weights, device="cpu")
    done = write.export(opened, target, to=to, head=head, parts=parts, dtype=dtype)
    out.print(str(done), soft_wrap=True)
    if done.is_dir():
        err.print(f"how it is called: {quote(str(done / 'README.md'))}", soft_wrap=True)
