"""The commands `reproduce`, which reproduces a figure or table, and `bench`, which times a training step."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dumo.cli.option import Device, Overrides, Source, TrustCode
from dumo.cli.terminal import out, resume_hint, show_table
from dumo.runtime.progress import bar


def reproduce(
    name: Annotated[
        str,
        typer.Argument(
            help="fig3, fig4a, fig4b, fig4c, fig5, sec43, tab2, zoo; ours: best, best-latents, fair, flow-first, "
            "latents, lowpass, pretrained, scaling, stages, stages-latents, words; "
            "or your own YAML file.",
        ),
    ],
    scale: Annotated[
        Literal["smoke", "laptop", "paper"],
        typer.Option(
            help="smoke (a few minutes), laptop (ten minutes to three hours on two cores) or paper (full size, on "
            "GPUs).",
        ),
    ] = "laptop",
    folder: Annotated[
        Path | None,
        typer.Option("--out", file_okay=False, metavar="FOLDER", help="Default: runs/reproduce/NAME-SCALE."),
    ] = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="Number of cells to train in parallel; they share cores and GPUs.")
    ] = 1,
    device: Device = "auto",
    trust_code: TrustCode = False,
) -> None:
    """Reproduce a figure or table of the paper, or run your own plan.

    Writes a picture, a table and results.json. Finished cells are kept, and a stopped cell resumes.

    Examples:
    dumo reproduce fig3 --scale smoke
    dumo reproduce my-plan.yaml --jobs 2
    """
    from dumo.lab.reproduce import reproduce
    from dumo.runtime import dist

    dist.require_one_process("dumo reproduce")
    with resume_hint():
        results = reproduce(name, scale, folder, jobs=jobs, device=device, bar=bar)
    show_table(results["title"], results["table"])
    for cell, message in results["failed"].items():
        out.print(f"{cell}: {message}", soft_wrap=True)
    for file in results["files"]:
        out.print(file, soft_wrap=True)


def bench(
    source: Source = "digits",
    overrides: Overrides = None,
    slope: Annotated[
        str | None,
        typer.Option(
            help="Slopes, e.g. central,dual. Default: all. The step without a slope, none, is always included."
        ),
    ] = None,
    precision: Annotated[str, typer.Option(help="Precisions: fp32, tf32 (GPU) and bf16, e.g. fp32,bf16.")] = "fp32",
    compile_: Annotated[str, typer.Option("--compile", help="none, blocks (each, whole) or loss.")] = "none",
    rounds: Annotated[
        int, typer.Option(min=1, help="Number of repetitions of each step, interleaved with the other steps.")
    ] = 9,
    device: Device = "auto",
    trust_code: TrustCode = False,
) -> None:
    """Time a training step with every slope.

    A slope is a way to compute du/dt. Operations, memory and the error of du/dt are also shown. F is a forward pass,
    whose time is taken as a third of the plain flow-matching step in the same precision.

    Examples:
    dumo bench digits --slope dual
    dumo bench cifar10 batch=64 --precision fp32,bf16
    """
    from dumo.lab import bench
    from dumo.run.resolve import load_resolved
    from dumo.runtime import dist

    dist.require_one_process("dumo bench")
    report = bench.measure(
        load_resolved(source, overrides or []),
        slopes=slope.split(",") if slope else None,
        precisions=precision.split(","),
        compile=compile_,
        rounds=rounds,
        device=device,
        bar=bar,
    )
    shape = " x ".join(map(str, report["shape"]))
    title = f"{report['parameters'] / 1e6:.4g} M parameters, {report['batch']} samples of {shape} at a time, "
    title += f"on {report['machine']}, {report['threads']} threads, {report['rounds']} rounds"
    show_table(title, [_step_cells(row) for row in report["rows"]])
    for row in report["rows"]:
        if row["refused"]:
            out.print(f"{row['slope']} in {row['precision']}: {row['refused']}", soft_wrap=True)


def _step_cells(row: dict[str, Any]) -> dict[str, str]:
    """Return a measured row as cells of a table, by column. A cell is empty if its number is unknown."""

    def cell(key: str, form: str, scale: float = 1.0) -> str:
        return "" if row[key] is None else format(scale * row[key], form)

    quartiles = f"{cell('units_low', '.2f')}-{cell('units_high', '.2f')}"
    return {
        "slope": row["slope"],
        "precision": row["precision"],
        "compiled": row["compile"],
        "strategy": "refused" if row["refused"] else row["strategy"] or "",
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
