"""The command `show` prints a run, the cost of training it (--cost), and tests of this machine (--check).

It needs no data. `dumo.plan` counts and tests; with --json the same facts are printed as one JSON object.
"""

import json
import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dumo.cli.option import AsJson, Device, Overrides, Source, TrustCode
from dumo.cli.terminal import out, show_lines, show_table
from dumo.runtime import shell_path
from dumo.runtime.formatting import minutes_text, number_text
from dumo.runtime.limits import GIGABYTE
from dumo.runtime.progress import bar, print_line

if TYPE_CHECKING:
    from dumo.config.spec import Run
    from dumo.plan.cost import Cost
    from dumo.plan.facts import RunFacts
    from dumo.plan.preflight import Check


def show(
    source: Source,
    overrides: Overrides = None,
    as_yaml: Annotated[bool, typer.Option("--yaml", help="Print only the run, as a file for dumo train.")] = False,
    all_fields: Annotated[bool, typer.Option("--all", help="Print every field, as in run.yaml.")] = False,
    counts_cost: Annotated[bool, typer.Option("--cost", help="Estimate memory, operations and hours.")] = False,
    ranks: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="With --cost: the number of ranks, one GPU each.")
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            metavar="N",
            help="With --cost: the TFLOPS that a GPU sustains, to estimate hours.",
        ),
    ] = None,
    checks: Annotated[
        bool,
        typer.Option(
            "--check", help="Test the derivative, data and weights; hash all images. Exit code 1 if a test fails."
        ),
    ] = False,
    device: Device = "auto",
    as_json: AsJson = False,
    trust_code: TrustCode = False,
) -> None:
    """Print the settings of a run, its size and the cost of a step.

    With --cost, count the memory of each layout; with --check, test the run on this machine.

    Machine settings and empty sections are omitted if they have their defaults. Everything except the settings is
    printed as comments, so that  dumo show digits > my.yaml  makes a file for  dumo train my.yaml.

    Examples:
    dumo show sd3-lora --cost net.lora.rank=16
    dumo show digits lr=1e-3 --yaml > my.yaml
    """
    if as_yaml and (as_json or counts_cost or checks):
        raise typer.BadParameter("--yaml prints only the run: remove --json, --cost and --check")
    if not counts_cost and (ranks or tflops):
        raise typer.BadParameter("--ranks and --tflops need --cost")

    from dumo.config.check_spec import advice
    from dumo.config.load import dump, summary
    from dumo.plan import facts
    from dumo.run.resolve import load_resolved

    # Load the run, and warn on stderr where it departs from its sources.
    run = load_resolved(source, overrides or [])
    for line in advice(run):
        print_line(line)
    if as_yaml:
        print(_comment(" ".join(["dumo show", shell_path(source), shlex.join(overrides or [])]).rstrip()))
        print(dump(run, short=not all_fields), end="")
        return

    # Count and test.
    run_facts = facts.show(run) if as_json or not (counts_cost or checks) else None
    cost = _count_cost(run, ranks or 1, tflops, device) if counts_cost else None
    check = _check(run, device, source) if checks else None

    # Print.
    if as_json:
        assert run_facts is not None
        fields = asdict(run_facts)
        if not all_fields:
            fields["spec"] = summary(run)
        print(json.dumps(fields | {"cost": cost and asdict(cost), "check": check and check.to_json()}))
    else:
        if run_facts:
            out.print(dump(run, short=not all_fields), soft_wrap=True)
            for name, text in _fact_lines(run, run_facts):
                out.print(_comment(f"{name:15} {text}"), soft_wrap=True)
        if cost:
            _print_cost(cost)
        if check:
            _print_check(check)
    if check and not check.is_ok:
        raise typer.Exit(1)


def _fact_lines(run: "Run", facts: "RunFacts") -> list[tuple[str, str]]:
    """Return the lines that describe a run, as pairs of name and text."""
    from dumo.config.word import method
    from dumo.plan.preflight import caption_findings

    lines = [("objective", str(method(run.objective)))]
    if run.shown_shape[1:]:
        lines.append(("images", f"{' x '.join(map(str, run.shown_shape[1:]))} pixels"))
    trained = "" if facts.parameters_trained == facts.parameters else f", {facts.parameters_trained:,} trained"
    lines += [
        ("parameters", f"{facts.parameters:,}{trained}"),
        ("one pass", f"{facts.forward_flops_per_image / 2e9:.4g} G multiply-adds per sample"),
        ("one step", f"{facts.forward_units_per_step:.2f} F (forward units, counted; a backward pass is 2 F)"),
    ]
    if facts.slope:
        lines.append(("slope", f"dual, {facts.slope['text']}: {facts.slope['reason']}"))
    if not run.conditions.are_known:
        what_is_counted = "captions" if run.conditions.captions else "a class per folder"
        lines.append(("classes", f"not known yet: {what_is_counted}, counted when the data are available"))
    lines += [("captions", finding.text) for finding in caption_findings(run.data)]
    jumps_text = "no jump is trained" if facts.far is None else f"{100 * facts.far:.2g} % of the rows"
    lines.append(("P(t - r > 0.9)", jumps_text))
    lines.append(("guidance scale", f"{facts.guidance_scale:.3g} in training (1 is none)"))
    minutes = run.train.minutes
    if minutes is not None:
        lines.append(("length", f"{minutes_text(minutes)}; train.steps only scales the warmup"))
    return lines


def _comment(text: str) -> str:
    """Return a text as a YAML comment."""
    return "# " + "".join(char if char.isprintable() else " " for char in text)


def _count_cost(run: "Run", ranks: int, tflops: float | None, device: str) -> "Cost":
    """Estimate the cost of a run. If `tflops` is None, assume a share of this GPU's peak, if it is known."""
    from dumo.plan import cost
    from dumo.runtime.device import choose_device, known_peak_tflops

    if tflops is None:
        peak = known_peak_tflops(choose_device(device))
        tflops = peak and cost.USUAL_SHARE_OF_PEAK * peak
    return cost.count_cost(run, ranks, tflops, bar)


def _print_cost(cost: "Cost") -> None:
    """Print operations, hours and disk as lines, and the memory of each layout as a table."""
    gpus = "1 GPU" if cost.ranks == 1 else f"{cost.ranks} GPUs"
    hours = "unknown: pass --tflops, the throughput of a GPU"
    if cost.hours is not None and cost.tflops is not None:
        hours = f"{number_text(cost.hours)} on {gpus} at {number_text(cost.tflops)} TFLOP/s each"
    show_lines(
        [
            ("operations", f"{number_text(cost.flops / 1e15)} PFLOP, two to a multiply-add"),
            ("hours", hours),
            ("checkpoints", f"{cost.checkpoint_bytes / GIGABYTE:.3g} GB each"),
        ]
    )
    rows: list[dict[str, Any]] = []
    for layout in cost.memory:
        fields = asdict(layout)
        row: dict[str, Any] = {"layout": fields.pop("layout"), "rows": fields.pop("rows")}
        rows.append(row | {name: f"{size / GIGABYTE:.3g}" for name, size in fields.items()})
    show_table(f"Memory of each of {gpus} in GB, at most" if cost.ranks > 1 else "Memory in GB, at most", rows)


def _check(run: "Run", device: str, source: str) -> "Check":
    """Test a run on this machine. If `source` is a run's folder, also test its images."""
    from dumo.config.source import choose
    from dumo.plan.preflight import check

    chosen = choose(source)
    return check(run, device, chosen.folder if chosen.kind == "run" else None)


def _print_check(check: "Check") -> None:
    """Print this machine's software and hardware, and the result of each test."""
    show_lines(check.environment.items())
    for finding in check.findings:
        out.print(f"{finding.state:8} {finding.name}: {finding.text}", soft_wrap=True)
        if finding.way:
            out.print(f"{'':8} fix: {finding.way}", soft_wrap=True)
