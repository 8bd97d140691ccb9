"""How fast it is: training steps and sampling, measured on this machine."""

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


def use(threads: int | None) -> None:
    """Set the number of threads of this process."""
    if threads:
        import torch

        torch.set_num_threads(threads)
