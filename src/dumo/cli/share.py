"""Commands for others: `export` writes a net as files of stock programs, `demo` serves a page to play with runs.

`export` refuses what cannot be written, opens the run on the CPU, writes (`dumo.export`), uploads where that is asked,
and says what to type next. `demo` opens the port, then the runs (`dumo.report.live`), and serves until a signal.
"""

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from dumo.cli.option import Device, Folder, Set, Weights, parse_integers, parse_path
from dumo.cli.terminal import err, explain, out

if TYPE_CHECKING:
    from dumo.encoders.pipeline import Pipeline


def export(
    run_folder: Folder,
    target: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", parser=parse_path, help="A folder, or of comfyui and safetensors a file; not there yet."
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
    write.require_vacant(target)
    if push is not None:
        hub.require(push, parts)
    passes = parse_integers(nfe, "--nfe") or ()
    with low_memory_heap():
        opened = open_run(run_folder, weights=weights, device="cpu")
        exported = write.export(
            opened, target, to=to, head=head, parts=parts, dtype=dtype, name=push, nfe=passes, alone=alone
        )
    out.print(str(exported), soft_wrap=True)
    if push is not None:
        out.print(hub.push(exported, push), soft_wrap=True)
    elif exported.is_dir():
        base_folder = None
        few_steps_run = ""
        if alone and opened.run.start is not None:
            few_steps_run = opened.run.start.source
        elif to == "lora":
            base_folder = _own_base_folder(opened.run.pipeline)
        err.print(f"next:  {_how_to_try(exported.resolve(), base_folder, few_steps_run)}", soft_wrap=True)


def _own_base_folder(pipeline: "Pipeline | None") -> Path | None:
    """The folder of a model that is not published, by whose name a LoRA's card opens it; None: it is published."""
    if pipeline is None or pipeline.is_published or pipeline.repository:
        return None
    return pipeline.folder.resolve()


def _how_to_try(folder: Path, base_folder: Path | None, few_steps_run: str = "") -> str:
    """What to type to run the card of an exported folder, next to the base model or the few-step run's export."""
    from dumo.export.card import FEW_STEPS

    command = f"cd {quote(str(folder.parent))}"
    few_steps_folder = folder.parent / FEW_STEPS
    if few_steps_run and not few_steps_folder.exists():
        command = f"dumo export {quote(few_steps_run)} {quote(str(few_steps_folder))} && {command}"
    if base_folder and not (folder.parent / base_folder.name).exists():
        command += f" && ln -s {quote(str(base_folder))}"
    return f"{command}    then run the Python in {quote(f'{folder.name}/README.md')}"


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
    from dumo.report.address import open_listener, tunnel_text
    from dumo.report.demo import gradio_alone, page, serve
    from dumo.report.live import open_runs
    from dumo.runtime import dist

    dist.require_one_process("dumo demo")
    folders = [run_folder] if other is None else [run_folder, other]

    with open_listener(port) as listener, gradio_alone():
        runs = open_runs(folders, set_ or [], weights=weights, device=device, limit=limit)

        def tell(url: str) -> None:
            out.print(url, soft_wrap=True)
            err.print(tunnel_text(listener), soft_wrap=True)

        serve(page(runs, explain), listener, tell)
