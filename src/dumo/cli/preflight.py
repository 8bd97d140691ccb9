"""Before anything is trained: what there is, what a run takes, what this machine can do."""

import json
import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from dumo import recipes as packaged
from dumo.bound import ROWS
from dumo.cli.option import AsJson, Device, Set, Source
from dumo.cli.terminal import out, show_lines
from dumo.progress import say

if TYPE_CHECKING:
    from dumo.config.spec import Run


def recipes(as_json: AsJson = False) -> None:
    """List the packaged recipes, by purpose."""
    if as_json:
        rows = ((group, name) for group, found in packaged.GROUPS.items() for name in found)
        told = [
            {"name": name, "about": packaged.about(name), "group": group, "base": packaged.base(name)}
            for group, name in rows
        ]
        print(json.dumps({"recipes": told}))
        return
    wide = Console(width=out.width if out.is_terminal else 1000, highlight=False)  # a line each, to be searched
    for group, found in packaged.GROUPS.items():
        table = Table(box=None, show_header=False, padding=(0, 0, 0, 2), title=group, title_justify="left")
        table.title_style = "bold"
        for name in found:
            table.add_row(name, packaged.about(name))
        wide.print(table)
        wide.print()
    for what, command in (("Look at", "show NAME"), ("Train", "train NAME"), ("Change", "show NAME --yaml > my.yaml")):
        wide.print(f"{what + ' one:':12} dumo {command}")


def advised(source: str, overrides: list[str] | None) -> "Run":
    """The run, and on stderr what of it is not as its sources have it."""
    from dumo.config.advice import advice
    from dumo.config.load import load

    run = load(source, overrides or [])
    for line in advice(run):
        say(line)
    return run


def show(
    source: Source,
    set_: Set = None,
    as_yaml: Annotated[bool, typer.Option("--yaml", help="Print the run alone: a file for dumo train.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print a run before it is run: its complete spec, its size, what a step costs and where it teaches jumps.

    All but the spec is printed as comments, so that  dumo show digits > my.yaml  makes a file for  dumo train my.yaml.
    """
    from dumo.config.load import dump
    from dumo.preflight.show import show

    if as_yaml and as_json:
        raise typer.BadParameter("--yaml and --json: give one of them")
    spec = advised(source, set_)
    if as_yaml:
        print(comment(shlex.join(["dumo", "show", source, *(f"--set={text}" for text in set_ or [])])))
        print(dump(spec), end="")
        return
    facts = show(spec)
    if as_json:
        print(json.dumps(facts))
        return
    far, scale, way = facts["far"], facts["guidance_scale"], facts["slope"]
    lines = [
        ("parameters", f"{facts['parameters']:,}"),
        ("one pass", f"{facts['forward_flops_per_image'] / 2e9:.4g} G multiply-adds per sample"),
        ("one step", f"{facts['forward_units_per_step']:.2f} F (forward units, counted; a backward pass is 2 F)"),
        *([("slope", f"dual, {way['text']}: {way['why']}")] if way else []),
        *unknown_classes(spec),
        ("P(t - r > 0.9)", "no jump is taught" if far is None else f"{100 * far:.2g} % of the rows"),
        ("guidance scale", f"{scale:.3g} in training (1 is none)"),
    ]
    out.print(dump(spec), soft_wrap=True)
    for name, fact in lines:
        out.print(comment(f"{name:15} {fact}"), soft_wrap=True)


def comment(text: str) -> str:
    """A line that YAML skips."""
    return "# " + "".join(char if char.isprintable() else " " for char in text)


def unknown_classes(spec: "Run") -> list[tuple[str, str]]:
    """A line that says so, where classes are not known before the data are there."""
    return (
        []
        if spec.classes_known
        else [("classes", "not known yet: a class per folder, counted when the data are there")]
    )


def dry(
    source: Source,
    set_: Set = None,
    rows: Annotated[
        int | None,
        typer.Option(min=1, max=ROWS, help="Make one real step of so many rows of random numbers, and time it."),
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Try a run before hours are spent on it: what it takes, counted; with --rows one step, timed. Needs no data."""
    from dumo.preflight import plan, rehearsal, table

    spec = advised(source, set_)
    facts = plan.plan(spec)
    if not as_json:
        show_lines([*table.lines(facts), *unknown_classes(spec)])
    step = asdict(rehearsal.rehearse(spec, rows, device)) if rows else None
    if as_json:
        print(json.dumps({**facts, "step": step}))
    elif step:
        show_lines(table.rehearsed(step, spec.train.batch))


def doctor(source: Source = "digits", set_: Set = None, device: Device = "auto", as_json: AsJson = False) -> None:
    """Say what this machine has, and test a run's slope on it against float64. Exit code 1 where it fails."""
    from dumo.preflight import doctor

    spec = advised(source, set_)
    found = doctor.diagnose(spec, device)
    if as_json:
        print(json.dumps(found))
    else:
        show_lines(unknown_classes(spec))
    for line in [] if as_json else found["findings"]:
        out.print(f"{line['state']:8} {line['name']}: {line['text']}", soft_wrap=True)
        if line["way"]:
            out.print(f"{'':8} way out: {line['way']}", soft_wrap=True)
    if not found["ok"]:
        raise typer.Exit(1)
