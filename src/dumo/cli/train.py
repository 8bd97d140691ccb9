"""The command `train`: train a recipe or a folder of images, or resume a run."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dumo.cli.option import Device, Set, SourceOrImages, TrustCode
from dumo.cli.terminal import err, memory_hint, resume_hint, show_lines
from dumo.runtime import shell_path, signals
from dumo.runtime.limits import MINUTES
from dumo.runtime.progress import bar, print_line

if TYPE_CHECKING:
    from dumo.config.spec import Run


def train(
    source: SourceOrImages,
    folder: Annotated[
        Path | None,
        typer.Option("--out", file_okay=False, metavar="FOLDER", help="The run's folder. Default: runs/NAME."),
    ] = None,
    step: Annotated[
        int | None,
        typer.Option("--from", metavar="STEP", min=0, help="Resume at the checkpoint of this step; delete later ones."),
    ] = None,
    accept: Annotated[
        bool, typer.Option("--accept", help="Resume with fields or data that have changed since, and record them.")
    ] = False,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0.1, max=MINUTES, help="How long to train in all (train.minutes). Default for images on a CPU: 6."
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Train on a folder of images without asking.")] = False,
    track: Annotated[
        Literal["tensorboard", "wandb", "trackio"] | None, typer.Option(help="Send the rows of the log to a tracker.")
    ] = None,
    set_: Set = None,
    device: Device = "auto",
    trust_code: TrustCode = False,
) -> None:
    """Train a recipe or your images, or resume a run.

    Run the same command again to resume.

    digits-trained and cifar10-trained, which ship with dumo, begin a new run with their settings and weights.

    Given a folder of images, propose a run that suits them and this machine, and ask before it starts. It ends when its
    --minutes are over, or those of a later command that gives it more.

    Under torchrun (torchrun --nproc-per-node 2 -m dumo train digits) the ranks share every batch.
    --track also sends each row of the log to a tracker.

    Example:  dumo train digits --set train.steps=500
    """
    from dumo.config.source import RUN_FILE, choose, read, settings_of_images, without_resolved

    # Decide what to train, and where.
    chosen = choose(source, folder)
    changes = [*(set_ or []), *([] if minutes is None else [f"train.minutes={minutes:g}"])]
    are_images = chosen.kind == "images"
    run_folder = folder or chosen.folder
    goes_on = chosen.kind == "run" and chosen.folder == run_folder
    text = None  # images that have no run yet
    if not are_images:
        text = read(str(chosen.word))
    elif (run_folder / RUN_FILE).is_file():
        text = read(run_folder)
    # The time of a resumed run counts from here.
    began = time.perf_counter()

    from dumo.config.code import shell_command
    from dumo.config.load import load
    from dumo.nets import Pretrained
    from dumo.report.tracker import open_tracker, require_tracker
    from dumo.run.folder import require_free
    from dumo.run.job import open_job
    from dumo.run.judge import missing_to_judge
    from dumo.run.sheet import Sheets
    from dumo.run.train import train_job

    if track:
        require_tracker(track)

    # Prepare the run to begin. It stays None if the run in the folder is resumed, with `changes`.
    run: Run | None = None
    if text is None:  # images that have no run yet
        require_free(run_folder)
        run = _propose_run(source, changes, device, ask=not yes)
        began = time.perf_counter()
    elif are_images:  # images whose run goes on
        changes = settings_of_images(text.tree, changes, source)
    elif goes_on:
        pass
    else:  # a recipe, a file, or the settings of another run
        run = load(without_resolved(text), [*chosen.settings, *changes])

    opened = open_job(
        run_folder,
        run,
        changes=changes,
        device=device,
        tell=print_line,
        step=step,
        accept=accept,
        sheets=Sheets,
        began=began,
        bar=bar,
    )
    with opened as job, open_tracker(track, run_folder, job.run, job.state.step) as send_row:
        # A path may be taken for a file, a run or images, so print which it was.
        if chosen.kind != "recipe":
            print_line(f"source: {chosen.meaning}")
        less_memory = f"set train.micro_batch below {job.run.train.micro_batch or job.run.train.batch}"
        if job.run.net.checkpoint is False:
            less_memory += ", or net.checkpoint=true in a new run"
        resume = f"resume with:  {shell_command(job.run, f'dumo train {shell_path(run_folder)}')}"
        with memory_hint(less_memory), resume_hint(resume):
            state = train_job(job, bar, send_row=send_row)

    # Print what was trained, and the commands to type next.
    err.print(f"trained {state.step:,} steps on {state.images:,} images: {run_folder}/checkpoints", soft_wrap=True)
    folder_word = shell_path(run_folder)
    missing = missing_to_judge(job.run, job.data.size)
    commands = [f"sample {folder_word}", f"report {folder_word}"]
    if not missing:
        commands.insert(1, f"evaluate {folder_word}")
    if isinstance(job.run.net, Pretrained):
        from dumo.export.stock import export_forms

        for form in export_forms(job.run.net):
            commands.append(f"export {folder_word} {shell_path(f'{run_folder}-{form}')} --to {form}")
    lines = [shell_command(job.run, f"dumo {command}") for command in commands]
    err.print("next:  " + "    ".join(lines), soft_wrap=True)
    if missing:
        err.print(f"dumo evaluate needs {missing}", soft_wrap=True)


def _propose_run(place: str, changes: list[str], device: str, *, ask: bool) -> "Run":
    """Propose a run for the images at `place`, and return it once the user agrees.

    Raises BadParameter without a terminal to `ask` on, Exit if the answer is no.
    """
    from dumo.plan import photos

    proposal = photos.propose(place, changes, device=device)
    show_lines(proposal.lines())
    if ask and not sys.stdin.isatty():
        raise typer.BadParameter("there is no terminal to ask on: give --yes to train so, or --set to change it")
    if ask:
        with signals.default_handlers():  # Ctrl-C ends it there
            agrees = typer.confirm("train?", default=True, err=True)
        if not agrees:
            raise typer.Exit(1)
    return proposal.run
