"""`dumo export`: write a trained net as files of stock programs.

`export` is the command. In this order it

1. checks what needs no run: the target and the hub's repository; typer has checked --to, --parts and --dtype;
2. opens the run on the CPU, and writes it (`dumo.export.write`), which checks what depends on the run: --head, --nfe
   and --alone;
3. uploads what was written (`dumo.export.hub`), or says what to type next.
"""

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dumo.cli.option import Folder, Set, TrustCode, Weights, parse_integers
from dumo.cli.terminal import err, out
from dumo.runtime import shell_path
from dumo.runtime.door import program

if TYPE_CHECKING:
    from dumo.config.spec import Run


def export(
    run_folder: Folder,
    target: Annotated[
        Path | None,
        typer.Argument(
            metavar="[OUT]",
            help="The folder to write, or for comfyui and safetensors the file. It must not exist yet. Default: next "
            "to the run, here for a run that dumo brings, by its name and --to.",
        ),
    ] = None,
    to: Annotated[
        Literal["diffusers", "lora", "comfyui", "safetensors"],
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
        Literal["copy", "link", "none"],
        typer.Option(
            help="The source's other parts (text encoders, decoder ...): copy, link or none.",
        ),
    ] = "copy",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(help="Precision of the weights that are written."),
    ] = "float32",
    nfe: Annotated[
        str | None,
        typer.Option(
            help="For a net of two times: the numbers of passes that the export can make, e.g. 1,2,4. They are fixed, "
            "because stock programs give a model t alone. Default: 2, and 1 where both jump to the data."
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
            help="Upload it to this repository of the Hugging Face Hub, too: private where it is new. Needs a token.",
        ),
    ] = None,
    trust_code: TrustCode = False,
) -> None:
    """Write a run for diffusers, ComfyUI or the Hub.

    Example:  dumo export runs/digits digits-diffusers
    """
    from dumo.export import hub, write
    from dumo.run.weights import open_run
    from dumo.runtime import dist, signals
    from dumo.runtime.heap import low_memory_heap

    dist.require_one_process("dumo export")
    if target is None:
        target = _default_target(run_folder, to)
    write.require_diffusers()
    write.require_options(to, parts, dtype)
    write.require_vacant(target, to)
    if push is not None:
        hub.require_uploadable(push, parts)
    passes = parse_integers(nfe, "--nfe") or ()
    with low_memory_heap():
        opened = open_run(run_folder, set_ or [], weights=weights, device="cpu")
        exported = write.export(
            opened, target, to=to, head=head, parts=parts, dtype=dtype, name=push, nfe=passes, alone=alone
        )
    out.print(str(exported), soft_wrap=True)
    if push is not None:
        signals.check()
        out.print(hub.push(exported, push), soft_wrap=True)
    elif exported.is_dir():  # with a model card
        err.print(f"next:  {_next_command(opened.run, exported.resolve(), to, parts, alone)}", soft_wrap=True)


def _default_target(run_folder: str, to: str) -> Path:
    """Where an export goes: next to the run, by its name and the form, such as digits-trained-diffusers."""
    from dumo.export.write import FILE_FORMS
    from dumo.run import shipped

    folder = shipped.output_folder(run_folder)
    if folder.name in ("", ".."):  # a run that is named by . or ..
        folder = folder.resolve()
    ending = ".safetensors" if to in FILE_FORMS else ""
    return folder.with_name(f"{folder.name}-{to}{ending}")


def _next_command(run: "Run", exported: Path, to: str, parts: str, alone: bool) -> str:
    """What to type to try an exported folder: where to go, and the model card whose Python to run there.

    The Python opens what the export is loaded onto by its name, next to the export. Where that is missing, commands
    bring it: the export of the few-step run, or a link to what `_folder_to_open` says.
    """
    from dumo.export.card import FEW_STEPS

    parent = exported.parent
    commands = [f"cd {shell_path(parent)}"]
    if alone and run.start is not None:
        few_steps_export = parent / FEW_STEPS
        if not few_steps_export.exists():
            arguments = f"{shell_path(run.start.source)} {shell_path(few_steps_export)}"
            commands.insert(0, f"{quote(program())} export {arguments}")
    else:
        folder = _folder_to_open(run, to, parts)
        if folder is not None and not (parent / folder.name).exists():
            commands.append(f"ln -s {shell_path(folder)}")
    card = Path(exported.name) / "README.md"
    return f"{' && '.join(commands)}    then run the Python in {shell_path(card)}"


def _folder_to_open(run: "Run", to: str, parts: str) -> Path | None:
    """What the card of an export opens next to it, besides the export; None where that is nothing.

    It is the pipeline of a LoRA, or of a model without other parts; or the text encoder that dumo's own net is without.
    """
    from dumo.nets import is_pretrained

    if to != "lora" and parts != "none":
        return None
    folder: Path | None = None
    if is_pretrained(run.net):
        if run.pipeline is not None and not run.pipeline.is_published:
            folder = run.pipeline.folder
    elif run.net.texts is not None and run.net.texts.kind == "table":
        folder = run.net.texts.encoder.find_folder().common_folder
    return folder.absolute() if folder else None  # of a link its own name, which is the one on the card
