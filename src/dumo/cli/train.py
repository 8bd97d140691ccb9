"""The command `train`: train a recipe or a folder of images, or resume a run."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from dumo.cli.option import TRACKERS, Device, Set, SourceOrImages, TrustCode, Verify, one_of, parse_folder
from dumo.cli.terminal import err, memory_hint, resume_hint, show_lines
from dumo.runtime import shell_path, signals
from dumo.runtime.door import goes_on_line, program, settings, train_call
from dumo.runtime.limits import MINUTES
from dumo.runtime.progress import bar, print_line

if TYPE_CHECKING:
    from dumo.config.spec import Run


def train(
    source: SourceOrImages,
    folder: Annotated[
        Path | None,
        typer.Option("--out", parser=parse_folder, metavar="FOLDER", help="The run's folder. Default: runs/NAME."),
    ] = None,
    step: Annotated[
        int | None,
        typer.Option("--from", metavar="STEP", min=0, help="Go on from the checkpoint of this step; later ones go."),
    ] = None,
    accept: Annotated[
        bool, typer.Option("--accept", help="Go on with other fields or data than it was trained by, and note them.")
    ] = False,
    verify: Verify = False,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0.1, max=MINUTES, help="How long to train on images, or go on with a run. Default: 6 on a CPU."
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Of a folder of images: do not ask.")] = False,
    track: Annotated[
        str | None,
        typer.Option(
            metavar="TRACKER",
            callback=one_of("tracker", *TRACKERS),
            help="Send rows of the log as it trains: tensorboard, wandb, trackio.",
        ),
    ] = None,
    set_: Set = None,
    device: Device = "auto",
    trust_code: TrustCode = False,
) -> None:
    """Train a recipe or your images; again, and it goes on.

    A recipe or a run's folder goes on where it stopped: resuming is starting again.

    digits-trained or cifar10-trained, which dumo brings, begin a new run of their settings with their weights.

    Given a folder of images, look at them and at this machine, measure a step, propose a run that fits both, and ask
    before it starts. It ends when its --minutes are over; dumo train runs/NAME --minutes 30 goes on for 30 more.

    Under torchrun (torchrun --nproc-per-node 2 -m dumo train digits) the ranks share every batch.
    --track also sends each row of the log to a tracker.

    Example:  dumo train digits --set train.steps=500
    """
    from dumo.config.source import RUN_FILE, choose, read, settings_of_images, without_resolved

    # Decide what to train, and where.
    chosen = choose(source, folder)
    changes = set_ or []
    are_images = chosen.kind == "images"
    run_folder = folder or chosen.folder
    goes_on = chosen.kind == "run" and chosen.folder == run_folder
    if yes and not are_images:
        raise typer.BadParameter("--yes is for a folder of images: of all else nothing is asked")
    if minutes and not (are_images or goes_on):
        has_run = (run_folder / RUN_FILE).is_file()
        raise typer.BadParameter(_minutes_hint(minutes, run_folder, has_run=has_run))
    text = None  # images that have no run yet
    if not are_images:
        text = read(str(chosen.word))
    elif (run_folder / RUN_FILE).is_file():
        text = read(run_folder)
    began = time.perf_counter()  # `stopwatch.wall_clock`: the time of a run that goes on counts from here

    from dumo.config.load import load
    from dumo.report.sheet import Sheets
    from dumo.report.tracker import open_tracker, require_tracker
    from dumo.run.folder import require_place
    from dumo.run.job import open_job
    from dumo.run.judge import missing_to_judge
    from dumo.run.train import train_job

    if track:
        require_tracker(track)

    # the run to begin; None: that of the folder goes on, with `changes`
    run: Run | None = None
    if text is None:  # images that have no run yet
        require_place(run_folder)
        run = _propose_run(source, changes, minutes, device, ask=not yes)
        began = time.perf_counter()
    elif are_images:  # images whose run goes on
        if minutes:
            print_line(goes_on_line(run_folder, minutes))
        changes = settings_of_images(text.tree, changes, source)
    elif goes_on:
        pass
    else:  # a recipe, a file, or the settings of another run
        run = load(without_resolved(text), [*chosen.settings, *changes])

    opened = open_job(
        run_folder,
        run,
        text=text,
        changes=changes,
        device=device,
        tell=print_line,
        step=step,
        accept=accept,
        verify=verify,
        sheets=Sheets,
        minutes=minutes if goes_on else None,
        began=began,
        bar=bar,
    )
    with opened as job, open_tracker(track, run_folder, job.run, job.state.step) as send_row:
        if chosen.kind != "recipe":  # a path may hold several things
            print_line(f"source: {chosen.meaning}")
        # The run is resumed by its folder: --minutes typed again would add time, and --from would go back again.
        resume = f"resume with:  {train_call(run_folder)}"
        with memory_hint(_less_memory_hint(job.run)), resume_hint(resume):
            state = train_job(job, bar, send_row=send_row)
    err.print(
        f"trained {state.step:,} steps on {state.images:,} images: {run_folder}/checkpoints",
        highlight=False,
        soft_wrap=True,
    )
    missing = missing_to_judge(job.run, job.data.size)
    print_next(_next_commands(job.run, run_folder, can_judge=not missing), missing)


def _minutes_hint(minutes: float, folder: Path, *, has_run: bool) -> str:
    """Why --minutes is refused of a recipe or a file, with what to type; `has_run`: its folder holds a run."""
    hint = "--minutes is for a folder of images, or to go on with a run's folder; of a recipe set train.steps, "
    hint += f"or by the clock:  {settings(f'train.minutes={minutes:g}')}"
    if has_run:
        hint += f". To go on with its run:  {train_call(folder, minutes=minutes)}"
    return hint


def _propose_run(place: str, overrides: list[str], minutes: float | None, device: str, *, ask: bool) -> "Run":
    """Propose a run for the images at `place`, and return it once the user agrees.

    Raises BadParameter without a terminal to `ask` on, Exit where the answer is no, UserError where no run fits.
    """
    from dumo.plan import proposal

    proposed_run = proposal.propose(place, overrides, minutes=minutes, device=device, bar=bar)
    show_lines(proposed_run.lines())
    if ask and not sys.stdin.isatty():
        raise typer.BadParameter("there is no terminal to ask on: give --yes to train so, or --set to change it")
    if ask:
        with signals.default_handlers():  # Ctrl-C ends it there
            agrees = typer.confirm("train?", default=True, err=True)
        if not agrees:
            raise typer.Exit(1)
    return proposed_run.run


def _less_memory_hint(run: "Run") -> str:
    """A hint, for an error: what to set so that a run trains in less memory."""
    from dumo.nets.textfamily import has_embeddings

    train = run.train
    texts = run.net.texts
    rows = f"train.micro_batch={train.micro_batch}" if train.micro_batch else "all"
    hint = f"set train.micro_batch lower, the rows of a pass (now {rows} of a rank's of train.batch={train.batch})"
    if has_embeddings(texts) and not texts.is_mapped(run.data.classes):
        hint += ", or net.texts.memory=0, which keeps captions on the host"
    if run.net.checkpoint not in (None, True):
        hint += ", or net.checkpoint=true in a new run"
    return hint


def _next_commands(run: "Run", folder: Path, *, can_judge: bool) -> list[str]:
    """The commands to type once a run is trained, in order of use; `can_judge`: nothing is missing to judge it."""
    from dumo.config.code import shell_command
    from dumo.nets import is_pretrained

    dumo = quote(program())
    commands = [f"{dumo} sample {shell_path(folder)}"]
    if can_judge:
        commands.append(f"{dumo} evaluate {shell_path(folder)}")
    commands.append(f"{dumo} report {shell_path(folder)}")
    if is_pretrained(run.net):
        from dumo.export.stock import export_forms

        for form in export_forms(run.net):
            commands.append(f"{dumo} export {shell_path(folder)} {shell_path(f'{folder}-{form}')} --to {form}")
    return [shell_command(run, command) for command in commands]


def print_next(commands: Sequence[str], missing: str | None) -> None:
    """Print the commands to type next, and what is missing to judge the run; None: nothing."""
    err.print("next:  " + "    ".join(commands), soft_wrap=True)
    if missing:
        err.print(f"dumo evaluate needs {missing}", soft_wrap=True)
