"""The command `train`: train a recipe or a folder of images, or resume a run."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dumo.cli.option import Device, Overrides, SourceOrImages, TrustCode
from dumo.cli.terminal import err, memory_hint, resume_hint, show_lines
from dumo.runtime import shell_path, signals
from dumo.runtime.progress import bar, print_line

if TYPE_CHECKING:
    from dumo.plan.photos import Proposal


def train(
    source: SourceOrImages,
    overrides: Overrides = None,
    folder: Annotated[
        Path | None,
        typer.Option("--out", file_okay=False, metavar="FOLDER", help="The run's folder. Default: runs/NAME."),
    ] = None,
    step: Annotated[
        int | None,
        typer.Option(
            "--from", metavar="STEP", min=0, help="Start a new run in --out from the checkpoint of this step."
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Train on a folder of images without asking.")] = False,
    track: Annotated[
        Literal["tensorboard", "wandb", "trackio"] | None,
        typer.Option(metavar="NAME", help="Send the rows of the log to tensorboard, wandb or trackio."),
    ] = None,
    device: Device = "auto",
    trust_code: TrustCode = False,
) -> None:
    """Train a recipe or your images, or resume a run.

    Run the same command again to resume, or with more steps or minutes, which are totals, to train for longer. --from
    STEP --out NEW starts a new run NEW from a checkpoint of a run, with other data or fields if they are given.

    If SOURCE is an image dataset, propose a run that suits it and this machine, and ask for confirmation. On a CPU it
    takes 6 minutes, unless minutes=N or steps=N is given.

    digits-trained and cifar10-trained, which ship with dumo, start a new run with their settings and weights.

    Under torchrun (torchrun --nproc-per-node 2 -m dumo train digits) the ranks share every batch.

    Examples:
    dumo train digits steps=500 objective=meanflow net.width=96
    dumo train photos minutes=30
    """
    # train.minutes counts from here, for new and resumed runs.
    began = time.perf_counter()

    from dumo.config.code import shell_command
    from dumo.nets import Pretrained
    from dumo.plan.prepare import prepare
    from dumo.report.tracker import require_tracker, tracked
    from dumo.run.judge import missing_to_judge
    from dumo.run.trainer import open_trainer
    from dumo.training.state import Diverged

    if track:
        require_tracker(track)

    # Decide what to train, and where.
    prepared = prepare(source, overrides or [], folder, step=step, device=device)
    if prepared.proposal:
        _agree(prepared.proposal, ask=not yes)
        began = time.perf_counter()

    # Train it.
    opened = open_trainer(
        prepared.path,
        prepared.run,
        changes=prepared.changes,
        origin=prepared.origin,
        device=device,
        print_line=print_line,
        bar=bar,
        began=began,
    )
    run_folder = prepared.path
    with opened as trainer, tracked(trainer, track):
        run = trainer.run
        # A path may be taken for a file, a run or images, so print which it was.
        if prepared.meaning:
            print_line(f"source: {prepared.meaning}")
        less_memory = f"set train.micro_batch below {run.train.micro_batch or run.train.batch}"
        if run.net.checkpoint is False:
            less_memory += ", or net.checkpoint=true in a new run"
        resume = f"resume with:  {shell_command(run, f'dumo train {shell_path(run_folder)}')}"
        with memory_hint(less_memory), resume_hint(resume):
            try:
                state = trainer.train()
            except Diverged as error:
                raise Diverged(f"{error} {trainer.restart_hint()}") from None

    # Print what was trained, and the commands to type next.
    err.print(f"trained {state.step:,} steps on {state.images:,} images: {run_folder}/checkpoints", soft_wrap=True)
    folder_word = shell_path(run_folder)
    missing = missing_to_judge(run, trainer.data.size)
    commands = [f"sample {folder_word}", f"report {folder_word}"]
    if not missing:
        commands.insert(1, f"evaluate {folder_word}")
    if isinstance(run.net, Pretrained):
        from dumo.export.stock import export_forms

        for form in export_forms(run.net):
            commands.append(f"export {folder_word} --to {form}")
    lines = [shell_command(run, f"dumo {command}") for command in commands]
    err.print("next:  " + "    ".join(lines), soft_wrap=True)
    if missing:
        err.print(f"dumo evaluate needs {missing}", soft_wrap=True)


def _agree(proposal: "Proposal", *, ask: bool) -> None:
    """Show a run that is proposed for images, and return once the user agrees.

    Raises BadParameter without a terminal to `ask` on, Exit if the answer is no.
    """
    show_lines(proposal.lines())
    if not ask:
        return
    if not sys.stdin.isatty():
        raise typer.BadParameter("confirmation needs a terminal: add --yes to train without asking")
    # Ctrl-C at the prompt ends the process at once.
    with signals.default_handlers():
        agrees = typer.confirm("train?", default=True, err=True)
    if not agrees:
        raise typer.Exit(1)
