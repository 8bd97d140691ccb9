"""Commands before anything is trained: `recipes`, `data`, `show`, `dry` and `doctor`.

`recipes` and `data` list what there is and what to fetch. The others refuse wrong options, load a run, with advice on
stderr, and print what it is (`show`), what it takes (`dry`), and whether this machine can train it (`doctor`), as
counted by `dumo.plan`. With --json they print the same facts as one object.
"""

import json
import shlex
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from dumo.cli.option import AsJson, Device, Set, Source, TrustCode, one_of, parse_bytes
from dumo.cli.terminal import PlainConsole, out, show_lines
from dumo.config import recipes as shipped_recipes
from dumo.runtime import shell_path
from dumo.runtime.limits import ROWS
from dumo.runtime.progress import print_line
from dumo.runtime.text import minutes_text

if TYPE_CHECKING:
    from dumo.config.conditions import Conditions
    from dumo.config.spec import Run
    from dumo.plan.catalogue import DescribedItem
    from dumo.plan.plan import RunFacts

_DATA_NAMES = (  # of what `dumo.plan.catalogue` lists, which is slow to import
    *("my-images", "pretrained", "few-steps", "cifar10", "imagenet", "imagenet-sample"),
    *("sd-vae", "dc-ae", "inception", "adm"),
)


def recipes(
    as_json: AsJson = False,
    as_schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes, for editors.")] = False,
) -> None:
    """List what can be trained by name.

    Example:  dumo recipes
    """
    if as_schema:
        from dumo.config.schema import schema

        print(json.dumps(schema()))
        return
    if as_json:
        print(json.dumps({"recipes": shipped_recipes.rows()}))
        return
    width = out.width if out.is_terminal else 1000  # a line each, to be searched
    wide = PlainConsole(width=width, highlight=False)
    for group, names in shipped_recipes.by_group().items():
        table = Table(box=None, show_header=False, padding=(0, 0, 0, 2), title=group, title_justify="left")
        table.title_style = "bold"
        for name in names:
            table.add_row(name, shipped_recipes.tree(name)["about"])
        wide.print(table)
        wide.print()
    wide.print("Look at one: dumo show NAME")
    wide.print("Train one:   dumo train NAME")
    wide.print("Change one:  dumo show NAME --yaml > my.yaml")


def data(
    name: Annotated[
        str | None,
        typer.Argument(
            callback=one_of("data set or model", *_DATA_NAMES), help="One of those that are listed, such as cifar10."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List data and models to fetch, how, and what is here.

    Example:  dumo data cifar10
    """
    from dumo.plan import catalogue

    if name is not None:
        item = catalogue.describe(catalogue.find(name))
        if as_json:
            print(json.dumps(item.to_json()))
        else:
            _show_item(item)
        return
    items = [catalogue.describe(item) for item in catalogue.CATALOGUE]
    if as_json:
        print(json.dumps([item.to_json() for item in items]))
        return
    for item in items:
        _show_head(item)
    out.print("\nHow to get one, and where it is looked for:  dumo data NAME", soft_wrap=True)


def _show_head(described: "DescribedItem") -> None:
    """Print what an item of the catalogue is, and whether it is here, on one line."""
    item = described.item
    state = {True: "there", False: "not there", None: "you name it"}[described.is_there]
    out.print(f"{item.name:16} {state:10} {item.what}", soft_wrap=True)


def _show_item(described: "DescribedItem") -> None:
    """Print all that is known of an item of the catalogue."""
    item = described.item
    lines = [("from", item.source)]
    lines += [("get it by", line) for line in item.get]
    lines.append(("layout", item.layout))
    lines += [("looked at", f"{place.place}: {place.state}") for place in described.places]
    lines.append(("recipes", ", ".join(described.recipes) or "none of the packaged ones"))
    _show_head(described)
    for title, text in lines:
        out.print(f"  {title:10} {text}", soft_wrap=True)


def _load_with_advice(source: str, overrides: list[str] | None) -> "Run":
    """Load and resolve a run, and say on stderr where it departs from its sources. Raises UserError as `load`."""
    from dumo.config.fit import advice
    from dumo.run.resolve import load_resolved

    run = load_resolved(source, overrides or [])
    for line in advice(run):
        print_line(line)
    return run


def show(
    source: Source,
    set_: Set = None,
    as_yaml: Annotated[bool, typer.Option("--yaml", help="Print the run alone: a file for dumo train.")] = False,
    all_fields: Annotated[bool, typer.Option("--all", help="Every field, as run.yaml has it.")] = False,
    as_json: AsJson = False,
    trust_code: TrustCode = False,
) -> None:
    """Print all settings of a run, its size and cost of a step.

    Also where it teaches jumps. Nothing is measured: dumo dry counts memory and hours.

    Fields of the machine and parts that are empty are left out where they stand at their defaults. All but the spec is
    printed as comments, so that  dumo show digits > my.yaml  makes a file for  dumo train my.yaml.

    Example:  dumo show digits
    """
    if as_yaml and as_json:
        raise typer.BadParameter("--yaml and --json: give one of them")
    from dumo.config.load import dump, summary
    from dumo.plan.plan import show

    run = _load_with_advice(source, set_)
    if as_yaml:
        print(_comment(" ".join(["dumo show", shell_path(source), *_set_options(set_)])))
        print(dump(run, short=not all_fields), end="")
        return
    facts = show(run)
    if as_json:
        fields = asdict(facts)
        if not all_fields:
            fields["spec"] = summary(run)
        print(json.dumps(fields))
        return
    out.print(dump(run, short=not all_fields), soft_wrap=True)
    for name, text_of_fact in _fact_lines(run, facts):
        out.print(_comment(f"{name:15} {text_of_fact}"), soft_wrap=True)


def _fact_lines(run: "Run", facts: "RunFacts") -> list[tuple[str, str]]:
    """What a run is, in lines, each with its name."""
    from dumo.config.word import method
    from dumo.plan.findings import caption_findings

    lines = [("objective", str(method(run.objective)))]
    if run.shown_shape[1:]:
        lines.append(("images", f"{' x '.join(map(str, run.shown_shape[1:]))} pixels"))
    lines += [
        ("parameters", f"{facts.parameters:,}"),
        ("one pass", f"{facts.forward_flops_per_image / 2e9:.4g} G multiply-adds per sample"),
        ("one step", f"{facts.forward_units_per_step:.2f} F (forward units, counted; a backward pass is 2 F)"),
    ]
    if facts.slope:
        lines.append(("slope", f"dual, {facts.slope['text']}: {facts.slope['why']}"))
    lines += _unknown_class_lines(run.conditions)
    lines += [("captions", finding.text) for finding in caption_findings(run.data)]
    jumps_text = "no jump is taught"
    if facts.far is not None:
        jumps_text = f"{100 * facts.far:.2g} % of the rows"
    lines.append(("P(t - r > 0.9)", jumps_text))
    lines.append(("guidance scale", f"{facts.guidance_scale:.3g} in training (1 is none)"))
    minutes = run.train.minutes
    if minutes is not None:
        length = f"{minutes_text(minutes)}, then it ends; train.steps is a guess until then, and then how many it made"
        lines.append(("length", length))
    return lines


def _set_options(overrides: list[str] | None) -> list[str]:
    """Overrides `a.b=c` as words to type on the command line."""
    return [shlex.quote(f"--set={override}") for override in overrides or []]


def _comment(text: str) -> str:
    """A line that YAML skips."""
    return "# " + "".join(char if char.isprintable() else " " for char in text)


def _unknown_class_lines(conditions: "Conditions") -> list[tuple[str, str]]:
    """A line that says that the classes are not known yet; [] where they are."""
    if conditions.are_known:
        return []
    what_is_counted = "captions" if conditions.captions else "a class per folder"
    return [("classes", f"not known yet: {what_is_counted}, counted when the data are there")]


def dry(
    source: Source,
    set_: Set = None,
    rows: Annotated[
        int | None,
        typer.Option(min=1, max=ROWS, help="Make one real step of this many rows of random numbers, and time it."),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Plan for this many ranks, GPUs; neither they nor torchrun are needed.")
    ] = None,
    share: Annotated[
        int | None, typer.Option(min=1, help="Ranks that hold a copy of the weights between them: train.share.")
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Look for a layout that keeps within it on each rank, e.g. 24GiB."),
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(min=0.001, help="What a GPU makes, 10^12 operations a second: gives hours.")
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
    trust_code: TrustCode = False,
) -> None:
    """Count the memory, time and GPUs that training takes.

    It needs no data. With --rows one step is made and timed.

    With --ranks: the memory of each of these GPUs, what they send one another, hours. With --fit: what to set so
    that they do.

    Example:  dumo dry imagenet256-xl2 --ranks 8 --fit 80GiB
    """
    limit = parse_bytes(fit, "--fit") if fit else None
    if share and share > (ranks or 1):
        raise typer.BadParameter(
            f"{share} ranks hold a copy between them: give as many by --ranks", param_hint="--share"
        )
    from dumo.plan import plan, rehearsal

    overrides = [*(set_ or [])]
    if share:
        overrides.append(f"train.share={share}")
    run = _load_with_advice(source, overrides)
    facts = plan.plan(run)
    rank_plan = None
    if ranks or share or fit or tflops:
        rank_plan = _plan_ranks(run, ranks or 1, limit, tflops, device)
    if not as_json:
        show_lines(_plan_lines(run, facts, rank_plan, source, set_))
    step = asdict(rehearsal.rehearse(run, rows, device)) if rows else None
    if as_json:
        print(json.dumps({**facts, "cluster": rank_plan and rank_plan.to_json(), "step": step}))
    elif step:
        show_lines(plan.rehearsal_lines(step, run.train))


@dataclass(frozen=True)
class _RankPlan:
    """A plan for several ranks."""

    facts: dict[str, Any]  # as `dumo.plan.cluster.cluster` counts them
    fields: dict[str, Any]  # what to set for the layout that was looked for; {}: none was, or nothing is to be set

    def to_json(self) -> dict[str, Any]:
        """The facts, with the fields."""
        return {**self.facts, "fields": self.fields}


def _plan_lines(
    run: "Run", facts: dict[str, Any], rank_plan: _RankPlan | None, source: str, overrides: list[str] | None
) -> list[tuple[str, str]]:
    """What a run takes, in lines, each with its name: on one device, or on the ranks of a plan."""
    from dumo.plan import host, plan

    lines = [*plan.lines(facts, alone=rank_plan is None), *_unknown_class_lines(run.conditions)]
    if rank_plan is None:
        host_bytes = facts["host"]
        lines += _gpu_lines(facts["gpus"], source, overrides)
    else:
        host_bytes = rank_plan.facts["host"]
        lines += plan.rank_lines(rank_plan.facts, run.train.keep)
    lines += [host.line(host_bytes, name) for name in host.DEVICES]
    if rank_plan is not None:
        lines += _set_lines(rank_plan.fields)
    return lines


def _plan_ranks(run: "Run", ranks: int, limit: int | None, tflops: float | None, device: str) -> _RankPlan:
    """Make the plan for these ranks, in a layout that keeps within `limit` bytes on each, if that is given.

    `tflops` None: a share of this GPU's peak, where it is known.
    """
    from dumo.plan import cluster
    from dumo.runtime.device import choose_device, known_peak_tflops

    peak = None if tflops else known_peak_tflops(choose_device(device))
    if peak:
        tflops = cluster.USUAL_SHARE_OF_PEAK * peak
        print_line(
            f"hours: at {cluster.USUAL_SHARE_OF_PEAK:.0%} of this GPU's peak, {peak:g} TFLOP/s; give --tflops if you "
            "know better"
        )
    fields = cluster.fit(run, ranks, limit, print_line) if limit else {}
    facts = cluster.cluster(cluster.with_fields(run, fields), ranks, tflops)
    return _RankPlan(facts, fields)


def _set_lines(fields: dict[str, Any]) -> list[tuple[str, str]]:
    """A line with the --set of a layout that was found; [] where nothing has to be set."""
    from dumo.plan.cluster import set_arguments

    if not fields:
        return []
    return [("so set", " ".join(f"--set {word}" for word in set_arguments(fields)))]


def _gpu_lines(gpus: int | None, source: str, overrides: list[str] | None) -> list[tuple[str, str]]:
    """A line with what to type where a GPU of 80 GiB does not hold the run; [] where it does.

    `gpus` is the number of GPUs on which to look for a layout; None: one holds the run.
    """
    if not gpus:
        return []
    command = ["dumo dry", shell_path(source)]
    if gpus > 1:
        command += ["--ranks", str(gpus)]
    command += ["--fit 80GiB", *_set_options(overrides)]
    return [("GPUs", f"one of 80 GiB is too small; to look for a layout on {gpus}:  {' '.join(command)}")]


def doctor(
    source: Source = "digits",
    set_: Set = None,
    device: Device = "auto",
    as_json: AsJson = False,
    trust_code: TrustCode = False,
) -> None:
    """Test whether this machine computes a run right.

    It says what is installed and which device there is, and compares the run's du/dt with float64. Exit code 1 where
    it fails.

    Example:  dumo doctor digits
    """
    from dumo.plan import doctor

    run = _load_with_advice(source, set_)
    diagnosis = doctor.diagnose(run, device)
    if as_json:
        print(json.dumps(diagnosis.to_json()))
    else:
        show_lines(_unknown_class_lines(run.conditions))
        for finding in diagnosis.findings:
            out.print(f"{finding.state:8} {finding.name}: {finding.text}", soft_wrap=True)
            if finding.way:
                out.print(f"{'':8} way out: {finding.way}", soft_wrap=True)
    if not diagnosis.is_ok:
        raise typer.Exit(1)
