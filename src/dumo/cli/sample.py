"""The command `sample`: make images with a trained run, or draw how samples changed during its training."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from dumo.cli.option import (
    Device,
    Folder,
    Nfe,
    Prompts,
    SamplingOverrides,
    Seed,
    SolverName,
    TrustCode,
    Weights,
    parse_classes,
    parse_integers,
)
from dumo.cli.terminal import out
from dumo.runtime.progress import bar

_BENCHMARKS = ("geneval", "dpg")


def sample(
    run_folder: Folder,
    overrides: SamplingOverrides = None,
    nfe: Nfe = None,
    count: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Number of samples. Default: 100, or one for each prompt.")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(metavar="A,B...", help="Classes by name or number, e.g. cats,dogs or 3,5. Default: all in turn."),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", metavar="TEXT", help="A text prompt. Repeat the option for several prompts."),
    ] = None,
    prompts: Prompts = None,
    source: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The image to edit, for a run that edits images.")
    ] = None,
    seed: Seed = None,
    solver: SolverName = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="WIDTHxHEIGHT", help="Image size, for a run trained on several sizes. Default: square."),
    ] = None,
    checkpoints: Annotated[
        str | None,
        typer.Option(
            metavar="STEPS",
            help="Sample the same noise with these checkpoints (train.milestones and the last), e.g. 1000,5000 or all.",
        ),
    ] = None,
    form: Annotated[
        Literal["grid", "images", "npz", "geneval", "dpg"],
        typer.Option(
            "--format",
            metavar="FORM",
            show_default=False,
            help="grid (default; one PNG), images (a PNG each), npz (ADM's layout); geneval or dpg: four images per "
            "prompt in the layout of these benchmarks.",
        ),
    ] = "grid",
    folder: Annotated[
        Path | None,
        typer.Option("--out", file_okay=False, metavar="FOLDER", help="Default: samples/ in the run's folder."),
    ] = None,
    weights: Weights = None,
    device: Device = "auto",
    trust_code: TrustCode = False,
) -> None:
    """Make images with a trained run: sheets, files or an .npz.

    Under torchrun the ranks share the work.

    Examples:
    dumo sample digits-trained --nfe 1
    dumo sample runs/digits sample.solver.m=0.3 --labels 3,5 --out samples
    """
    # Refuse options that would otherwise be ignored.
    if sum(map(bool, (labels, prompt, prompts))) > 1:
        raise typer.BadParameter("--labels, --prompt and --prompts cannot be combined: give only one")
    if source and not (prompt or prompts):
        raise typer.BadParameter("--source needs a prompt that describes the edit: add --prompt")
    if form in _BENCHMARKS and (count or size or source or not prompts):
        raise typer.BadParameter(
            f"--format {form} needs --prompts, makes 4 square images of each, and cannot be combined with --count, "
            "--size or --source: add --prompts, or remove the others"
        )
    if checkpoints and (prompt or prompts or solver or size or weights or form != "grid"):
        raise typer.BadParameter("--checkpoints can only be combined with --nfe, --count, --labels, --seed and --out")

    from dumo.encoders.caption_ids import read_prompts
    from dumo.report import gallery
    from dumo.report.benchmark import LAYOUTS, make_images
    from dumo.report.sample_to_files import DEFAULT_COUNT, sample_to_files
    from dumo.run.weights import load_run
    from dumo.runtime import dist

    if checkpoints:
        dist.require_one_process("dumo sample --checkpoints")
    with dist.join():
        trained = load_run(run_folder, overrides or [], weights=weights, device=device)
        folder = folder or trained.folder / "samples"
        passes = parse_integers(nfe, "--nfe")
        classes = parse_classes(labels, trained.spec.conditions)
        if checkpoints:
            steps = None if checkpoints == "all" else parse_integers(checkpoints, "--checkpoints")
            panels = gallery.trajectories(
                trained, nfe=passes, steps=steps, count=count, only=classes, seed=seed, bar=bar
            )
            files = gallery.write_trajectories(folder, panels)
        elif prompts and form in LAYOUTS:
            files = make_images(trained, form, prompts, folder, nfe=passes, seed=seed, solver=solver, bar=bar)
        else:
            texts = [row.text for row in read_prompts(prompts)] if prompts else prompt or []
            files = sample_to_files(
                trained,
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
                bar=bar,
            )
    for file in files:
        out.print(str(file), soft_wrap=True)
