"""The command line. torch is imported inside the commands, so that help answers at once.

Exit codes: 0 done, 1 failed, 2 what the user gave was wrong. Pictures of progress go to stderr, answers to stdout.
"""

import json
import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dumo import recipes as packaged

if TYPE_CHECKING:
    from dumo.run import Tick

app = typer.Typer(
    name="dumo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Train generative models that make an image in one or two network passes.\n\n"
    "Start with  dumo train digits,  then  dumo sample,  dumo evaluate  and  dumo report  with  runs/digits.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console(markup=False, emoji=False)  # what users typed is shown as they typed it
err = Console(markup=False, emoji=False, highlight=False, stderr=True)

Source = Annotated[str, typer.Argument(help="A recipe's name (see dumo recipes), a YAML file, or a run's folder.")]
RunFolder = Annotated[str, typer.Argument(help="A run's folder, such as runs/digits.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Set a field, e.g. --set train.steps=2000. May be given many times."),
]
Nfe = Annotated[str | None, typer.Option("--nfe", help="Passes through the net, e.g. 1,2,4. Default: the run's own.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed of the sampling noise. Default: the run's own.")]
SolverName = Annotated[
    str | None, typer.Option("--solver", help="euler, heun (velocity), restart (endpoint) or hop (flow map).")
]
Device = Annotated[str, typer.Option(help="auto (the GPU where there is one), cpu, cuda, cuda:1 ...")]
Weights = Annotated[
    str | None, typer.Option("--weights", help="Other weights than the run's first average: a safetensors file.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]


@app.command()
def recipes() -> None:
    """List the packaged recipes."""
    table = Table(box=None, pad_edge=False)
    table.add_column("recipe", style="bold")
    table.add_column("what it is")
    for name in packaged.names():
        table.add_row(name, packaged.about(name))
    out.print(table)
    out.print("\nLook at one:  dumo show NAME    Run one:  dumo train NAME")


@app.command()
def show(source: Source, set_: Set = None, as_json: AsJson = False) -> None:
    """Print a run before it is run: its complete spec, its size, what a step costs and where it teaches jumps."""
    from dumo import run
    from dumo.config.load import dump, load

    spec = load(source, set_ or [])
    facts = run.show(spec)
    if as_json:
        print(json.dumps(facts))
        return
    out.print(dump(spec), soft_wrap=True)
    far, scale = facts["far"], facts["guidance_scale"]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("parameters", f"{facts['parameters']:,}")
    table.add_row("one pass", f"{facts['forward_flops_per_image'] / 2e9:.4g} G multiply-adds per sample")
    table.add_row(
        "one step", f"{facts['forward_units_per_step']:.2f} F (forward units, counted; a backward pass is 2 F)"
    )
    if way := facts["slope"]:
        table.add_row("slope", f"dual, {way['name']}: {way['why']}")
    table.add_row("P(t - r > 0.9)", "no jump is taught" if far is None else f"{100 * far:.2g} % of the rows")
    table.add_row("guidance scale", f"{scale:.3g} in training (1 is none)")
    out.print(table)


@app.command()
def dry(
    source: Source,
    set_: Set = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Make one real step of so many rows of random numbers, and time it.")
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Try a run before hours are spent on it: what it takes, counted; with --rows one step, timed. Needs no data."""
    from dumo.config.load import load
    from dumo.dry import plan, rehearsal, table

    spec = load(source, set_ or [])
    facts = plan.plan(spec)
    if not as_json:
        _print_lines(table.lines(facts))
    step = asdict(rehearsal.rehearse(spec, rows, device)) if rows else None
    if as_json:
        print(json.dumps({**facts, "step": step}))
    elif step:
        _print_lines(table.rehearsed(step, spec.train.batch))


@app.command()
def train(
    source: Source,
    folder: Annotated[Path | None, typer.Option("--out", help="The run's folder. Default: runs/NAME.")] = None,
    set_: Set = None,
    device: Device = "auto",
) -> None:
    """Train a recipe, or go on with a run's folder where it stopped: resuming is starting again."""
    from dumo import run
    from dumo.config.load import load, place

    spec, folder = load(source, set_ or []), folder or place(source)
    with resumable(f"dumo train {folder}"):
        state = run.train(spec, folder, device=device, watch=bar)
    err.print(
        f"trained {state.step:,} steps on {state.images:,} images: {folder}/checkpoints",
        highlight=False,
        soft_wrap=True,
    )
    err.print(
        f"next:  dumo sample {folder}    dumo evaluate {folder}    dumo report {folder}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def encode(
    source: Annotated[str, typer.Argument(help="A recipe that trains on latents, or a folder or file of images.")],
    folder: Annotated[
        str | None, typer.Argument(metavar="[OUT]", help="The cache's folder. Default: the recipe's data.root.")
    ] = None,
    codec: Annotated[str | None, typer.Option(help="taef2, sd-vae, dc-ae or identity. Default: the recipe's.")] = None,
    side: Annotated[int | None, typer.Option(min=1, help="Pixels along a side. Default: the recipe's.")] = None,
    store: Annotated[
        str, typer.Option(help="moments, drawn from anew at every visit, or samples, drawn once, half the size.")
    ] = "moments",
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "float16",
    shard_rows: Annotated[int, typer.Option(min=1, help="Images to a shard: what a stop may lose.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="Images that the codec takes at a time.")] = 32,
    part: Annotated[
        str | None, typer.Option(metavar="K/N", help="Make part K of N, from 0. Default: as torchrun says.")
    ] = None,
    set_: Set = None,
    device: Device = "auto",
) -> None:
    """Encode images into the cache of latents that a recipe trains on; started again, it goes on where it stopped.

    Both flips are kept where the data are flipped. A shard that is damaged is named and made again.
    """
    from dumo import encode

    data = encode.asked(source, set_ or [], out=folder, codec=codec, side=side)
    with resumable("the same dumo encode"):
        made = encode.encode(
            data,
            store=store,
            dtype=dtype,
            shard_rows=shard_rows,
            batch=batch,
            part=encode.part_of(part),
            device=device,
            watch=bar,
        )
    for line in encode.told(made):
        out.print(line, soft_wrap=True)


@app.command()
def sample(
    run_folder: RunFolder,
    nfe: Nfe = None,
    count: Annotated[int, typer.Option(min=1, help="How many samples.")] = 100,
    labels: Annotated[str | None, typer.Option(help="Classes, in turn, e.g. 3,5. Default: all in turn.")] = None,
    seed: Seed = None,
    solver: SolverName = None,
    form: Annotated[
        str, typer.Option("--format", help="grid (one PNG), images (a PNG each) or npz (ADM's layout).")
    ] = "grid",
    folder: Annotated[Path | None, typer.Option("--out", help="Default: samples/ in the run's folder.")] = None,
    set_: Set = None,
    weights: Weights = None,
    device: Device = "auto",
) -> None:
    """Make samples with a trained run: sheets of images, single images, or an .npz that others' evaluators read."""
    from dumo import run

    trained = run.open_run(run_folder, set_ or [], weights=weights, device=device)
    files = run.export(
        trained,
        folder or trained.folder / "samples",
        form=form,
        count=count,
        only=_numbers("--labels", labels),
        nfe=_numbers("--nfe", nfe),
        seed=seed,
        solver=solver,
        watch=bar,
    )
    for file in files:
        out.print(str(file), soft_wrap=True)


@app.command()
def evaluate(
    run_folder: RunFolder,
    nfe: Nfe = None,
    seed: Seed = None,
    solver: SolverName = None,
    set_: Set = None,
    weights: Weights = None,
    sweep: Annotated[
        str | None,
        typer.Option(help="Judge at several values: sample.m=0.2:0.8:0.1, sample.m=0.3,0.5, or ema, every average."),
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Judge a trained run by its protocol, beside the same distances where nothing is wrong.

    Under torchrun (torchrun --nproc-per-node 2 -m dumo.cli evaluate RUN) the ranks share the work.
    """
    from dumo import dist, run
    from dumo.judge import evaluation
    from dumo.judge import sweep as sweeps

    with dist.join():
        main, watch = dist.is_main(), bar if dist.is_main() else run.unwatched
        trained = run.open_run(run_folder, set_ or [], weights=weights, device=device)
        asked = evaluation.asked(trained, nfe=_numbers("--nfe", nfe), seed=seed, solver=solver)
        report = sweeps.sweep(asked, sweep, watch=watch) if sweep else evaluation.evaluate(asked, watch=watch)
    if not main:
        return
    if as_json:
        print(json.dumps(report))
        return
    if sweep:
        rows = [{**row, "best": "*" if row["best"] else ""} for row in report["rows"]]
        rows = [{key: row[key] for key in row if key != "card"} for row in rows]
        _print_table(f"{report['run']}, {sweep}; * is the best of its number of passes", rows)
    else:
        rows = [*report["results"], *report["contrast"]]
        _print_table(f"{report['run']} at step {report['step']:,}, protocol {report['protocol']}", rows)
        for name, value in report["baselines"].items():
            facts = ", ".join(f"{key} {number:.4g}" for key, number in value.items())
            out.print(f"where nothing is wrong, {name}: {facts}")
    out.print(report["file"], soft_wrap=True)


@app.command()
def compare(
    run_folders: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Folders of runs that were evaluated, or single evaluations.")
    ],
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Print the table though they were measured otherwise, and say how.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Set the evaluations of several runs side by side, if they were measured alike."""
    from dumo.judge import comparison

    found = comparison.compare(run_folders, anyway=anyway)
    if as_json:
        print(json.dumps(found))
        return
    _print_table("", [{key: "" if value is None else value for key, value in row.items()} for row in found["rows"]])
    for field, values in found["differs"].items():
        told = "; ".join(f"{value} in {name}" for name, value in values.items())
        out.print(f"measured otherwise, {field}: {told}", soft_wrap=True)


@app.command()
def reproduce(
    name: Annotated[str, typer.Argument(help="fig3 (velocity ratio on moons) or zoo (every objective on digits).")],
    scale: Annotated[
        str, typer.Option(help="smoke (under a minute) or laptop (fig3 ten minutes, zoo thirty).")
    ] = "laptop",
    folder: Annotated[Path | None, typer.Option("--out", help="Default: runs/reproduce/NAME-SCALE.")] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Make a figure or table again: picture, table and results.json. Finished cells are kept, a stopped one goes on."""
    from dumo import reproduce

    with resumable(f"dumo reproduce {name} --scale {scale}" + (f" --out {folder}" if folder else "")):
        results = reproduce.reproduce(name, scale, folder, device=device, watch=bar)
    if as_json:
        print(json.dumps(results))
        return
    _print_table(results["title"], results["table"])
    for file in results["files"]:
        out.print(file, soft_wrap=True)


@app.command()
def report(run_folder: RunFolder, device: Device = "auto") -> None:
    """Write a run's report.html: one page with its samples, trajectories, neighbours, losses and figures."""
    from dumo import report, run

    for file in report.write(run.open_run(run_folder, device=device), watch=bar):
        out.print(str(file), soft_wrap=True)


@app.command()
def grid(
    run_folder: RunFolder,
    nfe: Annotated[
        str | None, typer.Option("--nfe", help="Passes through the net. Default: 1,2,4,8,16,50; of --classes, 1.")
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(help="Milestones (train.milestones) and the last step, or all. Default: all; of --classes, last."),
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="Rows, or images of a class. Default: 8; of points, 2000.")
    ] = None,
    labels: Annotated[str | None, typer.Option(help="Classes of the rows, in turn, e.g. 3,5. Default: all.")] = None,
    classes: Annotated[
        str | None, typer.Option(help="Class grids in place of trajectories, of these classes, e.g. 3,5, or all.")
    ] = None,
    reading: Annotated[
        str | None, typer.Option(help="u (jumps) and v (Heun). Default: both, if taught; of --classes, the first.")
    ] = None,
    seed: Seed = None,
    folder: Annotated[Path | None, typer.Option("--out", help="Default: grids/ in the run's folder.")] = None,
    set_: Set = None,
    device: Device = "auto",
) -> None:
    """Draw samples by number of passes, after each milestone, from the same noise (Figs. 5 and 6), or by class."""
    from dumo import gallery, run

    if labels and classes:
        raise typer.BadParameter("--labels is of trajectories, --classes asks for class grids: give one of them")
    trained = run.open_run(run_folder, set_ or [], device=device)
    asked: dict[str, Any] = {"seed": seed, "watch": bar, "letters": reading.split(",") if reading else None}
    asked |= {"nfe": _numbers("--nfe", nfe)} if nfe else {}
    asked |= {"steps": None if steps == "all" else _numbers("--steps", steps)} if steps else {}
    asked |= {"count": count} if count else {}
    folder = folder or trained.folder / "grids"
    if classes:
        only = None if classes == "all" else _numbers("--classes", classes)
        files = gallery.write_class_grids(folder, gallery.class_grids(trained, only, **asked))
    else:
        panels = gallery.trajectories(trained, only=_numbers("--labels", labels), **asked)
        files = gallery.write_trajectories(folder, panels)
    for file in files:
        out.print(str(file), soft_wrap=True)


@app.command()
def doctor(source: Source = "digits", set_: Set = None, device: Device = "auto", as_json: AsJson = False) -> None:
    """Say what this machine has, and test a run's slope on it against float64. Exit code 1 where it fails."""
    from dumo import doctor
    from dumo.config.load import load

    found = doctor.diagnose(load(source, set_ or []), device)
    if as_json:
        print(json.dumps(found))
    for line in [] if as_json else found["findings"]:
        out.print(f"{line['state']:8} {line['name']}: {line['text']}", soft_wrap=True)
        if line["way"]:
            out.print(f"{'':8} way out: {line['way']}", soft_wrap=True)
    if not found["ok"]:
        raise typer.Exit(1)


bench = typer.Typer(no_args_is_help=True, help="Measure training steps and sampling on this machine.")
app.add_typer(bench, name="bench")

Shape = Annotated[
    str | None, typer.Option(help="Shape of a sample in place of the data's, e.g. 4,32,32: random numbers.")
]
Precisions = Annotated[str, typer.Option("--precision", help="Of fp32, tf32 (GPU) and bf16, e.g. fp32,bf16.")]
Rounds = Annotated[int, typer.Option(min=1, help="Times that each variant is run, in turn with the others.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads on a CPU. Default: torch's own choice.")]


@bench.command("step")
def bench_step(
    source: Source = "digits",
    set_: Set = None,
    slope: Annotated[
        str | None, typer.Option(help="Slopes, e.g. central,dual. Default: all. The plain step, none, is always there.")
    ] = None,
    precision: Precisions = "fp32",
    shape: Shape = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Rows of a step. Default: the run's own.")] = None,
    compile_: Annotated[str, typer.Option("--compile", help="none, blocks (each, whole) or loss.")] = "none",
    peak: Annotated[
        float | None, typer.Option("--peak-tflops", min=0, help="The GPU's bf16 peak. Default: known of H100 and H200.")
    ] = None,
    rounds: Rounds = 9,
    threads: Threads = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure a training step by every slope: operations, time, bytes, and the error of du/dt.

    F is a forward pass; by time it is a third of the plain flow-matching step in the same precision.
    """
    from dumo.bench import table, training
    from dumo.config.load import load

    spec = load(source, [*(set_ or []), *([f"train.batch={batch}"] if batch else [])])
    _use(threads)
    report = training.measure(
        spec,
        slopes=slope.split(",") if slope else None,
        precisions=precision.split(","),
        shape=_numbers("--shape", shape),
        compile=compile_,
        rounds=rounds,
        peak_tflops=peak,
        device=device,
        watch=bar,
    )
    if as_json:
        print(json.dumps(report))
        return
    _print_table(table.title(report), [table.cells(row) for row in report["rows"]])
    for line in table.notes(report):
        out.print(line, soft_wrap=True)


@bench.command("sample")
def bench_sample(
    source: Source = "digits",
    set_: Set = None,
    nfe: Annotated[str, typer.Option("--nfe", help="Passes through the net.")] = "1,2,50",
    precision: Precisions = "fp32",
    shape: Shape = None,
    batch: Annotated[int, typer.Option(min=1, help="Images made at a time.")] = 256,
    rounds: Rounds = 9,
    threads: Threads = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure images per second by number of passes, with random weights."""
    from dumo.bench import sampling, table
    from dumo.config.load import load

    spec = load(source, set_ or [])
    _use(threads)
    report = sampling.measure(
        spec,
        nfes=_numbers("--nfe", nfe) or (),
        precisions=precision.split(","),
        shape=_numbers("--shape", shape),
        batch=batch,
        rounds=rounds,
        device=device,
        watch=bar,
    )
    if as_json:
        print(json.dumps(report))
        return
    _print_table(table.title(report), report["rows"])
    if report["decoder"]:
        out.print(report["decoder"], soft_wrap=True)


@contextmanager
def bar(title: str, total: int, /) -> "Generator[Tick, None, None]":
    """A live progress bar on stderr."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=err) as progress:
        task = progress.add_task(title, total=total, note="")
        yield lambda done, note: progress.update(task, completed=done, note=note)


@contextmanager
def resumable(command: str) -> Generator[None, None, None]:
    """Turn Ctrl-C into a line that says how to go on, and exit code 1."""
    try:
        yield
    except KeyboardInterrupt:
        err.print(f"stopped; to go on from the last checkpoint:  {command}", soft_wrap=True)
        raise typer.Exit(1) from None


def main() -> NoReturn:
    """Run the command line, and turn every failure into a plain line and an exit code."""
    try:
        app()
    except (ValueError, RuntimeError) as error:  # the two that dumo's own errors derive from
        from dumo.train.step import Diverged
        from dumo.types import UserError

        if not isinstance(error, UserError | Diverged):
            raise
        err.print(f"error: {error}", soft_wrap=True)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except OSError as error:  # a full disk, a folder that may not be written to
        err.print(f"error: {error.filename or 'writing'}: {error.strerror}", soft_wrap=True)
        sys.exit(2)
    sys.exit(0)


def _numbers(option: str, text: str | None) -> list[int] | None:
    """'1,2,4' as [1, 2, 4]."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"'{text}' is no list of whole numbers such as 1,2,4", param_hint=option) from None


def _use(threads: int | None) -> None:
    """Set the number of threads of this process."""
    if threads:
        import torch

        torch.set_num_threads(threads)


def _print_lines(lines: Iterable[tuple[str, str]]) -> None:
    """Print a name and what is to be said of it, line by line."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for line in lines:
        table.add_row(*line)
    out.print(table)


def _print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows of equal keys, never narrower than its numbers: a narrow terminal wraps, but nothing is lost."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for key in rows[0]:
        table.add_column(key, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=max(out.width, 160)).print(table)


if __name__ == "__main__":
    main()
