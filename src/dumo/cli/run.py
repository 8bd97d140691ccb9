"""Commands that make things: `encode`, `train`, `sample`, `average`, `grid` and `report`, in the order of use.

Each checks its options, opens a recipe or a run, calls what does the work, prints the paths of what was written on
stdout, and says on stderr what to type next.
"""

import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from shlex import join, quote
from typing import TYPE_CHECKING, Annotated

import typer

from dumo.cli.option import (
    TRACKERS,
    Device,
    Folder,
    Nfe,
    Prompts,
    Seed,
    Set,
    SolverName,
    SourceOrImages,
    Verify,
    Weights,
    one_of,
    parse_classes,
    parse_file,
    parse_folder,
    parse_integers,
    parse_path,
)
from dumo.cli.terminal import drop_from_resume, err, keep_pieces, memory_hint, out, show_lines
from dumo.runtime import shell_path, signals
from dumo.runtime.door import goes_on_line, program, settings, train_call
from dumo.runtime.limits import MINUTES, ROWS
from dumo.runtime.progress import bar, no_bar, print_line

if TYPE_CHECKING:
    from dumo.config.spec import Run
    from dumo.data import Data
    from dumo.run.encode import EncodeResult

_BENCHMARKS = ("geneval", "dpg")  # whose layouts `dumo.report.benchmark` has
_FORMATS = ("grid", "images", "npz", *_BENCHMARKS)  # what dumo sample writes


def encode(
    source: Annotated[
        str,
        typer.Argument(help="A recipe of latents or captions, or a folder or file of images."),
    ],
    folder: Annotated[
        str | None, typer.Argument(metavar="[OUT]", help="The cache's folder. Default: the recipe's data.root.")
    ] = None,
    codec: Annotated[str | None, typer.Option(help="taef2, sd-vae, dc-ae or pipeline. Default: the recipe's.")] = None,
    side: Annotated[int | None, typer.Option(min=1, help="Pixels along a side. Default: the recipe's.")] = None,
    count: Annotated[
        int | None, typer.Option(min=1, max=ROWS, help="Encode the first images alone. Default: all.")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            help="moments, drawn from at every visit, or samples, half as large. Default: the cache's, or moments."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float16, bfloat16 or float32. Default: the cache's, or float16.")
    ] = None,
    shard_rows: Annotated[
        int | None, typer.Option(min=1, help="Images to a shard: what a stop may lose. Default: the cache's, or 1024.")
    ] = None,
    batch: Annotated[
        int,
        typer.Option(
            min=1,
            max=ROWS,
            help="Images, or captions, that are encoded at a time; of images no more pixels than 16 x 256 x 256.",
        ),
    ] = 32,
    part: Annotated[
        str | None, typer.Option(metavar="K/N", help="Make part K of N, from 0. Default: as torchrun says.")
    ] = None,
    verify: Verify = False,
    set_: Set = None,
    device: Device = "auto",
) -> None:
    """Encode images to latents, and captions to a table, once.

    Of images it makes the cache that a recipe trains on, and of captions the table that its net reads.

    Started again, it goes on where it stopped. Both flips are kept where the data are flipped. A shard that is damaged
    is named and made again; one of other images than are here is refused. Under torchrun the ranks share the work.
    """
    from dumo.config.source import choose
    from dumo.data import is_latents
    from dumo.run import encode as encoding
    from dumo.runtime import dist

    work = encoding.encoding_work(source, set_ or [], out=folder, codec=codec, side=side, count=count)
    ranks = dist.join() if part is None else nullcontext()  # it ends when all are done
    results: list[EncodeResult] = []
    with memory_hint(_smaller_batch_hint(batch, work.data)), ranks:
        rank, world = encoding.parse_part(part)
        if is_latents(work.data):
            latents = encoding.encode(
                work.data,
                batch=batch,
                rank=rank,
                world=world,
                store=store,
                dtype=dtype,
                shard_rows=shard_rows,
                verify=verify,
                device=device,
                bar=bar,
            )
            results.append(latents)
        no_table = encoding.reason_without_text_table(work.data, work.texts) if work.texts else ""
        if no_table:
            print_line(no_table)
        elif work.texts:
            texts = encoding.encode_texts(
                work.data,
                work.texts,
                batch=batch,
                rank=rank,
                world=world,
                shard_rows=shard_rows,
                device=device,
                bar=bar,
            )
            results.append(texts)

    # what was made, and what to type next
    for result in results:
        for line in result.lines():
            out.print(line, soft_wrap=True)
    is_complete = all(result.read_index() for result in results)
    if is_complete and choose(source).kind == "recipe":
        options = encoding.options_as_settings(folder, codec, side, count)
        _print_train_command(source, [*options, *(set_ or [])])


def _smaller_batch_hint(batch: int, data: "Data") -> str:
    """A hint, for an error: what to set so that encoding takes less memory."""
    from dumo.data import is_latents
    from dumo.encoders.codec import images_at_once

    if not is_latents(data):
        return f"set --batch lower (now {batch})"
    at_once = images_at_once(data.images.side, data.images.side)
    return f"set --batch lower (now {batch}, and of images at most {at_once} at a time)"


def _print_train_command(recipe: str, changes: Sequence[str]) -> None:
    """Print how to train a recipe with these changes, each a.b=c, as what to type next."""
    command = [program(), "train", recipe]
    for change in changes:
        command += ["--set", change]
    err.print(f"next:  {join(command)}", soft_wrap=True)


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
) -> None:
    """Train a recipe or your images; again, and it goes on.

    A recipe or a run's folder goes on where it stopped: resuming is starting again.

    digits-trained or cifar10-trained, which dumo brings, begin a new run of their settings with their weights.

    Given a folder of images, look at them and at this machine, measure a step, propose a run that fits both, and ask
    before it starts. It ends when its --minutes are over; dumo train runs/NAME --minutes 30 goes on for 30 more.

    Under torchrun (torchrun --nproc-per-node 2 -m dumo train digits) the ranks share every batch.
    --track also sends each row of the log to a tracker.
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
        drop_from_resume("--minutes", "--from")  # they are obeyed: run.yaml has the time, and the run went back
        with memory_hint(_less_memory_hint(job.run)):
            state = train_job(job, bar, send_row=send_row)
    err.print(
        f"trained {state.step:,} steps on {state.images:,} images: {run_folder}/checkpoints",
        highlight=False,
        soft_wrap=True,
    )
    missing = missing_to_judge(job.run, job.data.size)
    _print_next(_next_commands(job.run, run_folder, can_judge=not missing), missing)


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


def _print_next(commands: Sequence[str], missing: str | None) -> None:
    """Print the commands to type next, and what is missing to judge the run; None: nothing."""
    err.print("next:  " + "    ".join(commands), soft_wrap=True)
    if missing:
        err.print(f"dumo evaluate needs {missing}", soft_wrap=True)


def sample(
    run_folder: Folder,
    nfe: Nfe = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="How many samples. Default: 100, or one of each prompt.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Classes by name or number, e.g. cats,dogs or 3,5. Default: all in turn.")
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", metavar="TEXT", help="What an image shows, in words. May be given many times."),
    ] = None,
    prompts: Prompts = None,
    source: Annotated[
        Path | None,
        typer.Option(parser=parse_path, metavar="FILE", help="The image that a prompt edits, of a run that edits."),
    ] = None,
    seed: Seed = None,
    solver: SolverName = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="WIDTHxHEIGHT", help="Pixels, of a run on buckets: one of them. Default: the square."),
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            callback=one_of("--format", *_FORMATS),
            help="grid (one PNG), images (a PNG each), npz (ADM's layout); geneval or dpg: as these benchmarks read "
            "images of their --prompts, four of each.",
        ),
    ] = "grid",
    folder: Annotated[
        Path | None,
        typer.Option("--out", parser=parse_folder, metavar="FOLDER", help="Default: samples/ in the run's folder."),
    ] = None,
    set_: Set = None,
    weights: Weights = None,
    device: Device = "auto",
) -> None:
    """Make images with a trained run: sheets, files or an .npz.

    Under torchrun the ranks share the work.
    """
    if sum(map(bool, (labels, prompt, prompts))) > 1:
        raise typer.BadParameter("--labels, --prompt and --prompts are ways to say what to make: give one of them")
    if source and not (prompt or prompts):
        raise typer.BadParameter("--source is edited by a text: give --prompt, too")
    if form in _BENCHMARKS and (count or size or source or not prompts):
        raise typer.BadParameter(
            f"--format {form} makes 4 square images of each of --prompts: give these; no --count, --size, --source"
        )

    from dumo.encoders.caption import read_prompts
    from dumo.report.benchmark import LAYOUTS, make_images
    from dumo.report.sample import DEFAULT_COUNT, sample_to_files
    from dumo.run.weights import open_run
    from dumo.runtime import dist

    with dist.join():
        opened = open_run(run_folder, set_ or [], weights=weights, device=device)
        passes = parse_integers(nfe, "--nfe")
        progress = bar if dist.is_main() else no_bar
        folder = folder or opened.output_folder / "samples"
        if prompts and form in LAYOUTS:
            keep_pieces()
            files = make_images(
                opened, LAYOUTS[form], prompts, folder, nfe=passes, seed=seed, solver=solver, bar=progress
            )
        else:
            texts = [row.text for row in read_prompts(prompts)] if prompts else prompt or []
            classes = parse_classes(labels, opened.sampler.conditions)
            files = sample_to_files(
                opened,
                folder,
                form=form,
                count=count or len(texts) or max(DEFAULT_COUNT, len(classes or ())),
                only=classes,
                prompts=texts,
                source=source,
                nfe=passes,
                seed=seed,
                solver=solver,
                size=size,
                bar=progress,
            )
    for file in files:
        out.print(str(file), soft_wrap=True)


def average(
    run_folder: Folder,
    std: Annotated[
        float, typer.Option(help="Its width, the standard deviation of its profile as a share of the run, e.g. 0.12.")
    ],
    file: Annotated[
        Path | None,
        typer.Option("--out", parser=parse_file, metavar="FILE", help="Default: averages/ in the run's folder."),
    ] = None,
) -> None:
    """Average the weights that a run kept, by another width.

    For --weights of a command. A run keeps some where train.snapshots says so.

    They are averages by a power (EDM2), of train.ema; which one is best is known after training alone.
    """
    from dumo.config.code import shell_command
    from dumo.config.load import load
    from dumo.run import shipped
    from dumo.run.average import average
    from dumo.run.judge import missing_to_judge
    from dumo.runtime import dist

    dist.require_one_process("dumo average")
    averaged = average(run_folder, std, file)
    err.print(
        f"the average of width {std:g} after step {averaged.step:,}, from {averaged.count} snapshots, "
        f"{averaged.error:.1%} off",
        highlight=False,
        soft_wrap=True,
    )
    out.print(str(averaged.file), soft_wrap=True)
    arguments = f"{shell_path(run_folder)} --weights {shell_path(averaged.file)}"
    dumo = quote(program())
    next_commands = [f"{dumo} sample {arguments}"]
    run = load(shipped.find(run_folder))
    missing = missing_to_judge(run, num_images=None)  # images are not opened for it
    if not missing:
        next_commands.append(f"{dumo} evaluate {arguments}")
    _print_next([shell_command(run, command) for command in next_commands], missing)


def grid(
    run_folder: Folder,
    nfe: Annotated[
        str | None,
        typer.Option(
            "--nfe", help="Passes. Default: those of 1,2,4,8,16,50 that the solver can make; of --classes, 1."
        ),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(help="Milestones (train.milestones) and the last step, or all. Default: all; of --classes, last."),
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="Rows, or images of a class. Default: 8; of points, 2000.")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="Classes of the rows, by name or number, e.g. cats or 3,5. Default: all in turn."),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(help="Class grids instead of trajectories, of these classes, e.g. cats or 3,5, or all."),
    ] = None,
    reading: Annotated[
        str | None, typer.Option(help="u (jumps) and v (Heun). Default: both, if taught; of --classes, the first.")
    ] = None,
    seed: Seed = None,
    folder: Annotated[
        Path | None,
        typer.Option("--out", parser=parse_folder, metavar="FOLDER", help="Default: grids/ in the run's folder."),
    ] = None,
    set_: Set = None,
    device: Device = "auto",
) -> None:
    """Draw samples by passes and by training step, or by class.

    All are from the same noise, after each milestone (Figs. 5 and 6).
    """
    if labels and classes:
        raise typer.BadParameter("--labels is of trajectories, --classes asks for class grids: give one of them")

    from dumo.io import file
    from dumo.report import gallery
    from dumo.run.weights import open_run
    from dumo.runtime import dist, threads

    dist.require_one_process("dumo grid")
    opened = open_run(run_folder, set_ or [], device=device)
    passes = parse_integers(nfe, "--nfe")
    chosen_steps: Sequence[int] | None = None  # all
    if steps is None and classes is not None:
        chosen_steps = ()  # the last
    elif steps is not None and steps != "all":
        chosen_steps = parse_integers(steps, "--steps")
    letters = None if reading is None else reading.split(",")
    grids_folder = folder or opened.output_folder / "grids"
    file.check_writable(grids_folder)
    with threads.fewer_when_busy(opened.device, print_line):
        if classes is not None:
            only = None if classes == "all" else parse_classes(classes, opened.sampler.conditions)
            grids = gallery.class_grids(
                opened,
                only,
                nfe=passes,
                steps=chosen_steps,
                count=count or gallery.DEFAULT_COUNT,
                letters=letters,
                seed=seed,
                bar=bar,
            )
            files = gallery.write_class_grids(grids_folder, grids)
        else:
            only = parse_classes(labels, opened.sampler.conditions)
            panels = gallery.trajectories(
                opened,
                nfe=passes,
                steps=chosen_steps,
                count=count,
                only=only,
                letters=letters,
                seed=seed,
                bar=bar,
            )
            files = gallery.write_trajectories(grids_folder, panels)
    for path in files:
        out.print(str(path), soft_wrap=True)


def report(
    run_folders: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Folders of runs, such as runs/digits, or digits-trained.")
    ],
    prompts: Prompts = None,
    file: Annotated[
        Path | None,
        typer.Option("--out", parser=parse_file, metavar="FILE", help="The figure of several runs. Default: log.png."),
    ] = None,
    device: Device = "auto",
) -> None:
    """Write a page on a run, or draw logs of several.

    The page, report.html in the run's folder, shows samples, trajectories, nearest training images, curves of the log
    and scores. A run with captions is sampled with --prompts, or with captions of its data.
    """
    if len(run_folders) > 1:
        from dumo.io.picture import write_picture
        from dumo.report.figure import draw_logs
        from dumo.run import shipped
        from dumo.run.speed import log_with_speeds

        file = file or Path("log.png")
        write_picture(file, draw_logs({run: log_with_speeds(shipped.find(run)) for run in run_folders}))
        out.print(str(file), soft_wrap=True)
        return
    if file:
        raise typer.BadParameter("--out is for the figure of several runs: the page of a run is in its folder")
    [run_folder] = run_folders

    from dumo.encoders.caption import read_prompts
    from dumo.report import page
    from dumo.run.weights import open_run
    from dumo.runtime import dist

    dist.require_one_process("dumo report")
    texts = [row.text for row in read_prompts(prompts)] if prompts else []
    for path in page.write(open_run(run_folder, device=device), bar, texts):
        out.print(str(path), soft_wrap=True)
