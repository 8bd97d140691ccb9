"""What others use: a net as files of stock programs, and a page to play with it."""

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from dumo.cli.option import Device, Folder, Set, Weights, numbers, place
from dumo.cli.terminal import err, explain, out


def export(
    run_folder: Folder,
    target: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", parser=place, help="A folder, or of comfyui and safetensors a file; not there yet."
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="diffusers (a folder for from_pretrained), lora (one for load_lora_weights), comfyui (a LoRA as one "
            "file) or safetensors (all weights as one).",
        ),
    ] = "diffusers",
    head: Annotated[
        str | None, typer.Option(help="u, which jumps, or v, an ordinary flow model. Default: u, if taught.")
    ] = None,
    parts: Annotated[
        str, typer.Option(help="The source's other parts (text encoders, decoder ...): copy, link or none.")
    ] = "copy",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    nfe: Annotated[
        str | None,
        typer.Option(
            help="Of a net of two times: passes for which a stock model, which is given t alone, is fixed, e.g. 1,2,4. "
            "Default: 2, and 1 where both jump to the data."
        ),
    ] = None,
    alone: Annotated[
        bool,
        typer.Option(
            "--alone",
            help="Of a run on top of a few-step run: its own adapters alone, to load onto that run's export. Default: "
            "both in one LoRA, to load onto the stock model.",
        ),
    ] = False,
    weights: Weights = None,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME",
            help="Upload it to this repository of the Hugging Face Hub, too: private where it is new. Needs a token.",
        ),
    ] = None,
) -> None:
    """Write a trained net as stock programs take it."""
    from dumo.export import hub, write
    from dumo.run.weights import open_run
    from dumo.runtime import dist
    from dumo.runtime.heap import low_memory_heap

    dist.require_one_process("dumo export")
    write.vacant(target)
    if push is not None:
        hub.require(push, parts)
    passes = numbers("--nfe", nfe) or ()
    with low_memory_heap():
        opened = open_run(run_folder, weights=weights, device="cpu")
        done = write.export(
            opened, target, to=to, head=head, parts=parts, dtype=dtype, name=push, nfe=passes, alone=alone
        )
    out.print(str(done), soft_wrap=True)
    if done.is_dir() and push is None:
        where, pipeline = done.resolve().parent, opened.run.pipeline
        near = ""
        if to == "lora" and not alone and pipeline and not pipeline.known and not pipeline.repository:
            base = pipeline.folder.resolve()  # the card opens it by its name
            near = "" if (where / base.name).exists() else f" && ln -s {quote(str(base))}"
        card = quote(f"{done.resolve().name}/README.md")
        err.print(f"next:  cd {quote(str(where))}{near}    then run the Python in {card}", soft_wrap=True)
    if push is not None:
        out.print(hub.push(done, push), soft_wrap=True)


def demo(
    run_folder: Folder = "digits-trained",
    other: Annotated[
        str | None, typer.Argument(metavar="[OTHER]", help="Another run's folder, to show next to it.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 7860,  # Gradio's own
    limit: Annotated[float, typer.Option(min=0.1, help="Seconds that an answer may take.")] = 60.0,
    set_: Set = None,
    weights: Weights = None,
    device: Device = "auto",
) -> None:
    """Serve a page to play with a run, or with two next to each other. It needs Gradio, the extra demo.

    This machine alone can reach it; elsewhere, open it through ssh -L 7860:localhost:7860 MACHINE. Without a run it
    takes digits-trained, which comes with dumo.
    """
    from dumo.report.address import listening, tunnel
    from dumo.report.demo import gradio_alone, page, serve
    from dumo.report.live import open_lives
    from dumo.runtime import dist

    dist.require_one_process("dumo demo")
    folders = [run_folder] if other is None else [run_folder, other]

    with listening(port) as listener, gradio_alone():
        lives = open_lives(folders, set_ or [], weights=weights, device=device, limit=limit)

        def tell(url: str) -> None:
            out.print(url, soft_wrap=True)
            err.print(tunnel(listener), soft_wrap=True)

        serve(page(lives, explain), listener, tell)
