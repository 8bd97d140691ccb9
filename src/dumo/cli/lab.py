"""Commands of the lab: `reproduce` makes a figure or table again; `step`, `sample` and `data` are `dumo bench`.

Each checks its options, calls its namesake in `dumo.lab`, and
prints the report as a table, or as JSON.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dumo.cli.option import AsJson, Device, Set, Source, TrustCode, parse_integers
from dumo.cli.terminal import out, resume_hint, show_table
from dumo.runtime.limits import ROWS
from dumo.runtime.progress import bar

Shape = Annotated[
    str | None, typer.Option(help="Shape of a sample, e.g. 4,32,32, of random numbers. Default: the data's.")
]
Precisions = Annotated[str, typer.Option("--precision", help="Of fp32, tf32 (GPU) and bf16, e.g. fp32,bf16.")]
Rounds = Annotated[int, typer.Option(min=1, help="Times that each variant is run, in turn with the others.")]
Threads = Annotated[int | None, typer.Option(min=1, max=4096, help="Threads on a CPU. Default: torch's own choice.")]


def reproduce(
    name: Annotated[
        str,
        typer.Argument(
            help="fig3, fig4a, fig4b, fig4c, fig5, sec43, tab2, zoo; ours: best, best-latents, fair, flow-first, "
            "latents, lowpass, pretrained, scaling, stages, stages-latents, words; "
            "or a YAML file of your own.",
        ),
    ],
    scale: Annotated[
        Literal["smoke", "laptop", "paper"],
        typer.Option(
            help="smoke (a few minutes), laptop (ten minutes to three hours on two cores) or paper (its own size, on "
            "GPUs).",
        ),
    ] = "laptop",
    folder: Annotated[
        Path | None,
        typer.Option("--out", file_okay=False, metavar="FOLDER", help="Default: runs/reproduce/NAME-SCALE."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Cells at a time, which share cores and GPUs.")] = 1,
    device: Device = "auto",
    as_json: AsJson = False,
    trust_code: TrustCode = False,
) -> None:
    """Make a figure or table again, or that of your own plan.

    Picture, table and results.json. Finished cells are kept, a stopped one goes on.

    Example:  dumo reproduce fig3 --scale smoke
    """
    from dumo.lab.reproduce import reproduce
    from dumo.runtime import dist

    dist.require_one_process("dumo reproduce")
    with resume_hint():
        results = reproduce(name, scale, folder, jobs=jobs, device=device, bar=bar)
    if as_json:
        print(json.dumps(results))
        return
    show_table(results["title"], results["table"])
    for name, message in results["diverged"].items():
        out.print(f"{name}: {message}", soft_wrap=True)
    for file in results["files"]:
        out.print(file, soft_wrap=True)


def step(
    source: Source = "digits",
    set_: Set = None,
    slope: Annotated[
        str | None, typer.Option(help="Slopes, e.g. central,dual. Default: all. The plain step, none, is always there.")
    ] = None,
    precision: Precisions = "fp32",
    shape: Shape = None,
    batch: Annotated[int | None, typer.Option(min=1, max=ROWS, help="Rows of a step. Default: the run's own.")] = None,
    compile_: Annotated[str, typer.Option("--compile", help="none, blocks (each, whole) or loss.")] = "none",
    peak: Annotated[
        float | None, typer.Option("--peak-tflops", min=0, help="The GPU's bf16 peak. Default: known of H100 and H200.")
    ] = None,
    rounds: Rounds = 9,
    threads: Threads = None,
    device: Device = "auto",
    as_json: AsJson = False,
    trust_code: TrustCode = False,
) -> None:
    """Measure a training step: operations, time, bytes, error.

    Of every way to take du/dt (slope), with the error of it.

    F is a forward pass; by time it is a third of the plain flow-matching step in the same precision.

    Example:  dumo bench step digits --slope dual
    """
    from dumo.lab import step_bench
    from dumo.run.resolve import load_resolved

    _begin_bench(threads)
    overrides = [*(set_ or [])]
    if batch:
        overrides.append(f"train.batch={batch}")
    report = step_bench.measure(
        load_resolved(source, overrides),
        slopes=slope.split(",") if slope else None,
        precisions=precision.split(","),
        shape=parse_integers(shape, "--shape"),
        compile=compile_,
        rounds=rounds,
        peak_tflops=peak,
        device=device,
        bar=bar,
    )
    if as_json:
        print(json.dumps(report))
        return
    show_table(_title(report), [_step_cells(row) for row in report["rows"]])
    for row in report["rows"]:
        if row["refused"]:
            out.print(f"{row['slope']} in {row['precision']}: {row['refused']}", soft_wrap=True)


def _step_cells(row: dict[str, Any]) -> dict[str, str]:
    """A measured row as cells of a table, by column; a cell is empty where its number is not known."""

    def cell(key: str, form: str, scale: float = 1.0) -> str:
        return "" if row[key] is None else format(scale * row[key], form)

    quartiles = f"{cell('units_low', '.2f')}-{cell('units_high', '.2f')}"
    return {
        "slope": row["slope"],
        "precision": row["precision"],
        "compiled": row["compile"],
        "way": "refused" if row["refused"] else row["way"] or "",
        "F counted": cell("units_counted", ".2f"),
        "F by time": cell("units_timed", ".2f"),
        "quartiles": quartiles.strip("-"),
        "ms": cell("milliseconds", ".4g"),
        "images/s": cell("images_per_second", ".4g"),
        "MB": cell("bytes", ".1f", 1e-6),
        "x central": cell("bytes_over_central", ".2f"),
        "% of peak": cell("share_of_peak", ".1f", 1e2),
        "du/dt off": cell("error", ".1e"),
    }


def sample(
    source: Source = "digits",
    set_: Set = None,
    nfe: Annotated[str, typer.Option("--nfe", help="Passes through the net.")] = "1,2,50",
    precision: Precisions = "fp32",
    shape: Shape = None,
    batch: Annotated[int, typer.Option(min=1, max=ROWS, help="Images made at a time.")] = 256,
    rounds: Rounds = 9,
    threads: Threads = None,
    device: Device = "auto",
    as_json: AsJson = False,
    trust_code: TrustCode = False,
) -> None:
    """Measure images per second by number of passes.

    The weights are random.

    Example:  dumo bench sample digits --nfe 1,2
    """
    from dumo.lab import sample_bench
    from dumo.run.resolve import load_resolved

    _begin_bench(threads)
    report = sample_bench.measure(
        load_resolved(source, set_ or []),
        nfes=parse_integers(nfe, "--nfe") or (),
        precisions=precision.split(","),
        shape=parse_integers(shape, "--shape"),
        batch=batch,
        rounds=rounds,
        device=device,
        bar=bar,
    )
    if as_json:
        print(json.dumps(report))
        return
    show_table(_title(report), report["rows"])
    if report["decoder"]:
        out.print(report["decoder"], soft_wrap=True)


def data(
    source: Annotated[
        str,
        typer.Argument(help="A recipe, a run's folder, or a folder or file of images."),
    ],
    set_: Set = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images at a time. Default: the recipe's, or 256.")] = None,
    side: Annotated[int | None, typer.Option(min=1, help="Pixels of a folder's images. Default: 256.")] = None,
    threads: Annotated[
        str | None,
        typer.Option("--threads", help="Threads that decode, e.g. 1,4. Default: 1, 2, 4 ... all cores, up to 16."),
    ] = None,
    batches: Annotated[int, typer.Option(min=1, help="Batches for each number of threads.")] = 20,
    step_seconds: Annotated[
        float | None,
        typer.Option(min=1e-6, help="What a training step takes. Default: counted, on a GPU that is known."),
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
    trust_code: TrustCode = False,
) -> None:
    """Measure images per second that data give, by threads.

    And compare with what a training step takes.

    Example:  dumo bench data digits
    """
    from dumo.lab import data_bench

    _begin_bench(None)
    counts = parse_integers(threads, "--threads")
    if counts and min(counts) < 1:
        raise typer.BadParameter("is at least 1", param_hint="--threads")
    report = data_bench.measure(
        data_bench.benchmark_of(source, set_ or [], batch=batch, side=side),
        threads=counts,
        batches=batches,
        step_seconds=step_seconds,
        device=device,
        bar=bar,
    )
    if as_json:
        print(json.dumps(report))
        return
    device_states = {None: "", True: "waits", False: "is fed"}
    rows: list[dict[str, Any]] = []
    for row in report["rows"]:
        rows.append(
            {
                "threads": row["threads"] or "",
                "images/s": row["images_per_second"],
                "device": device_states[row["waits"]],
            }
        )
    machine = f"{report['machine']}, {report['cores']} cores"
    show_table(f"{report['kind']}, {report['batch']} at a time, on {machine}", rows)
    out.print(data_bench.verdict(report), soft_wrap=True)


def _begin_bench(threads: int | None) -> None:
    """Set the number of threads of torch, if given. Raises UserError under several ranks, which disturb each other."""
    from dumo.runtime import dist

    dist.require_one_process("dumo bench")
    if threads:
        import torch

        torch.set_num_threads(threads)


def _title(report: dict[str, Any]) -> str:
    """The title of a table: what was measured, and on which machine."""
    parameters = f"{report['parameters'] / 1e6:.4g} M parameters"
    shape = " x ".join(map(str, report["shape"]))
    machine = f"{report['machine']}, {report['threads']} threads, {report['rounds']} rounds"
    return f"{parameters}, {report['batch']} samples of {shape} at a time, on {machine}"
