"""How fast it is: training steps, sampling and reading data, measured on this machine."""

import json
from typing import Annotated

import typer

from dumo.bound import ROWS
from dumo.cli.option import AsJson, Device, Set, Source, numbers
from dumo.cli.terminal import out, show_table
from dumo.progress import bar

Shape = Annotated[
    str | None, typer.Option(help="Shape of a sample in place of the data's, e.g. 4,32,32: random numbers.")
]
Precisions = Annotated[str, typer.Option("--precision", help="Of fp32, tf32 (GPU) and bf16, e.g. fp32,bf16.")]
Rounds = Annotated[int, typer.Option(min=1, help="Times that each variant is run, in turn with the others.")]
Threads = Annotated[int | None, typer.Option(min=1, max=4096, help="Threads on a CPU. Default: torch's own choice.")]


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
) -> None:
    """Measure a training step by every slope: operations, time, bytes, and the error of du/dt.

    F is a forward pass; by time it is a third of the plain flow-matching step in the same precision.
    """
    from dumo import dist
    from dumo.bench import table, training
    from dumo.config.load import load

    dist.alone("dumo bench")
    spec = load(source, [*(set_ or []), *([f"train.batch={batch}"] if batch else [])])
    use(threads)
    report = training.measure(
        spec,
        slopes=slope.split(",") if slope else None,
        precisions=precision.split(","),
        shape=numbers("--shape", shape),
        compile=compile_,
        rounds=rounds,
        peak_tflops=peak,
        device=device,
        bar=bar,
    )
    if as_json:
        print(json.dumps(report))
        return
    show_table(table.title(report), [table.cells(row) for row in report["rows"]])
    for line in table.notes(report):
        out.print(line, soft_wrap=True)


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
) -> None:
    """Measure images per second by number of passes, with random weights."""
    from dumo import dist
    from dumo.bench import sampling, table
    from dumo.config.load import load

    dist.alone("dumo bench")
    spec = load(source, set_ or [])
    use(threads)
    report = sampling.measure(
        spec,
        nfes=numbers("--nfe", nfe) or (),
        precisions=precision.split(","),
        shape=numbers("--shape", shape),
        batch=batch,
        rounds=rounds,
        device=device,
        bar=bar,
    )
    if as_json:
        print(json.dumps(report))
        return
    show_table(table.title(report), report["rows"])
    if report["decoder"]:
        out.print(report["decoder"], soft_wrap=True)


def data(
    source: Annotated[str, typer.Argument(help="A recipe, a run's folder, or a folder or file of images.")],
    set_: Set = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images at a time. Default: the recipe's, or 256.")] = None,
    side: Annotated[int | None, typer.Option(min=1, help="Pixels of a folder's images. Default: 256.")] = None,
    threads: Annotated[
        str | None, typer.Option("--threads", help="Threads that decode, e.g. 1,4. Default: 1, 2, 4 ... all cores.")
    ] = None,
    batches: Annotated[int, typer.Option(min=1, help="Batches for each number of threads.")] = 20,
    step_seconds: Annotated[
        float | None,
        typer.Option(min=1e-6, help="What a training step takes. Default: counted, on a GPU that is known."),
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure images per second that data give, by threads, beside those that a training step takes."""
    from dumo import dist
    from dumo.bench import data

    dist.alone("dumo bench")
    counts = numbers("--threads", threads)
    if counts and min(counts) < 1:
        raise typer.BadParameter("is at least 1", param_hint="--threads")
    reading = data.asked(source, set_ or [], batch=batch, side=side)
    report = data.measure(reading, threads=counts, batches=batches, step_seconds=step_seconds, device=device, bar=bar)
    if as_json:
        print(json.dumps(report))
        return
    title = f"{report['kind']}, {report['batch']} at a time, on {report['machine']}, {report['cores']} cores"
    words = {None: "", True: "waits", False: "is fed"}
    rows = [{"threads": row["threads"] or "", "images/s": row["images_per_second"], "device": words[row["waits"]]}
            for row in report["rows"]]  # fmt: skip
    show_table(title, rows)
    out.print(data.verdict(report), soft_wrap=True)


def use(threads: int | None) -> None:
    """Set the number of threads of this process."""
    if threads:
        import torch

        torch.set_num_threads(threads)
