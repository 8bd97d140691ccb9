"""Before anything is trained: what there is, what a run takes, what this machine can do."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from dumo import recipes as packaged
from dumo.cli.option import AsJson, Device, Set, Source
from dumo.cli.terminal import out, say, show_lines

if TYPE_CHECKING:
    from dumo.config.spec import Run


def recipes() -> None:
    """List the packaged recipes."""
    table = Table(box=None, pad_edge=False)
    table.add_column("recipe", style="bold")
    table.add_column("what it is")
    for name in packaged.names():
        table.add_row(name, packaged.about(name))
    out.print(table)
    out.print("\nLook at one:  dumo show NAME    Run one:  dumo train NAME")


def advised(source: str, overrides: list[str] | None) -> "Run":
    """The run, and on stderr what of it is not as its sources have it."""
    from dumo.config.advice import advice
    from dumo.config.load import load

    run = load(source, overrides or [])
    for line in advice(run):
        say(line)
    return run


def show(source: Source, set_: Set = None, as_json: AsJson = False) -> None:
    """Print a run before it is run: its complete spec, its size, what a step costs and where it teaches jumps."""
    from dumo.config.load import dump
    from dumo.preflight.show import show

    spec = advised(source, set_)
    facts = show(spec)
    if as_json:
        print(json.dumps(facts))
        return
    out.print(dump(spec), soft_wrap=True)
    far, scale, way = facts["far"], facts["guidance_scale"], facts["slope"]
    lines = [
        ("parameters", f"{facts['parameters']:,}"),
        ("one pass", f"{facts['forward_flops_per_image'] / 2e9:.4g} G multiply-adds per sample"),
        ("one step", f"{facts['forward_units_per_step']:.2f} F (forward units, counted; a backward pass is 2 F)"),
        *([("slope", f"dual, {way['name']}: {way['why']}")] if way else []),
        ("P(t - r > 0.9)", "no jump is taught" if far is None else f"{100 * far:.2g} % of the rows"),
        ("guidance scale", f"{scale:.3g} in training (1 is none)"),
    ]
    show_lines(lines)


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
    from dumo.preflight import plan, rehearsal, table

    spec = advised(source, set_)
    facts = plan.plan(spec)
    if not as_json:
        show_lines(table.lines(facts))
    step = asdict(rehearsal.rehearse(spec, rows, device)) if rows else None
    if as_json:
        print(json.dumps({**facts, "step": step}))
    elif step:
        show_lines(table.rehearsed(step, spec.train.batch))


def doctor(source: Source = "digits", set_: Set = None, device: Device = "auto", as_json: AsJson = False) -> None:
    """Say what this machine has, and test a run's slope on it against float64. Exit code 1 where it fails."""
    from dumo.preflight import doctor

    found = doctor.diagnose(advised(source, set_), device)
    if as_json:
        print(json.dumps(found))
    for line in [] if as_json else found["findings"]:
        out.print(f"{line['state']:8} {line['name']}: {line['text']}", soft_wrap=True)
        if line["way"]:
            out.print(f"{'':8} way out: {line['way']}", soft_wrap=True)
    if not found["ok"]:
        raise typer.Exit(1)
