"""The commands `sample` and `grid`: make images with a trained run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from dumo.cli.option import (
    Device,
    Folder,
    Nfe,
    Prompts,
    Seed,
    Set,
    SolverName,
    TrustCode,
    Weights,
    one_of,
    parse_classes,
    parse_folder,
    parse_integers,
    parse_path,
)
from dumo.cli.terminal import out, resume_hint
from dumo.runtime.progress import bar, no_bar, print_line

_BENCHMARKS = ("geneval", "dpg")  # whose layouts `dumo.report.benchmark` has
_FORMATS = ("grid", "images", "npz", *_BENCHMARKS)  # what dumo sample writes


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
    trust_code: TrustCode = False,
) -> None:
    """Make images with a trained run: sheets, files or an .npz.

    Under torchrun the ranks share the work.

    Example:  dumo sample digits-trained --nfe 1
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
            with resume_hint():
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
    trust_code: TrustCode = False,
) -> None:
    """Draw samples by passes and by training step, or by class.

    All are from the same noise, after each milestone (Figs. 5 and 6).

    Example:  dumo grid digits-trained --nfe 1,2,4
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
