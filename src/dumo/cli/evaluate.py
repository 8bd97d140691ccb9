"""Commands on runs that train or have trained: `log`, `evaluate` and `compare`.

Each looks up what its words name (`dumo.cli.precheck`), checks its options, calls what does the work, in
`dumo.report`, and prints what comes back: `log` rows or curves of logs, or how many rows a tracker was sent; `evaluate`
scores, of a run or of images that others made; `compare` a table. Tables go to stdout, as does --json. Imports that
take long stand in the functions that need them.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dumo.cli import precheck
from dumo.cli.option import (
    TRACKERS,
    AsJson,
    Device,
    Nfe,
    Seed,
    Set,
    SolverName,
    Weights,
    one_of,
    parse_file,
    parse_integers,
)
from dumo.cli.terminal import err, keep_pieces, out, show_table
from dumo.runtime.door import shell_settings
from dumo.runtime.progress import bar

if TYPE_CHECKING:
    from dumo.training.log import Row

_DEFAULT_LAST = 10  # rows of a run in the table of a log. Ours


def log(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Folders of runs, such as runs/*, or digits-trained."),
    ],
    last: Annotated[
        int | None, typer.Option(min=1, help=f"How many rows of each run, the latest. Default: {_DEFAULT_LAST}.")
    ] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the curves of all these runs in one picture.")] = False,
    file: Annotated[
        Path | None,
        typer.Option(
            "--out",
            parser=parse_file,
            metavar="FILE",
            help="The picture. Default: log.png in the run's folder; of several, here.",
        ),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="TRACKER",
            callback=one_of("tracker", *TRACKERS),
            help="Send new rows to tensorboard, wandb or trackio.",
        ),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="With --to: go on as the runs do, until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """See how runs train: rows, curves, or in a tracker.

    It prints the last rows of their logs; with --plot it draws their curves; with --to a tracker shows them.

    Nothing is sent but by --to, and there only where that tool is set to send it: tensorboard and trackio keep it on
    this machine, and so does wandb with WANDB_MODE=offline.
    """
    runs = precheck.require_logged(runs)
    if (plot and to) or (as_json and (plot or to)):
        raise typer.BadParameter("--plot, --to and --json: give one of them")
    if follow and not to:
        raise typer.BadParameter("--follow goes with --to")
    if file and not plot:
        raise typer.BadParameter("--out goes with --plot")
    if last and (plot or to):
        raise typer.BadParameter("--last is for rows that are printed: --plot and --to take all")
    if to:
        _send_rows(runs, to, follow=follow)
    elif plot:
        _draw_curves(runs, file)
    else:
        _show_log(runs, last or _DEFAULT_LAST, as_json=as_json)


def _read_logs(runs: list[str]) -> "dict[str, list[Row]]":
    """The rows of each run's log, by what was typed for the run. Raises UserError where there is no log."""
    from dumo.run import shipped
    from dumo.run.speed import log_with_speeds

    return {run: log_with_speeds(shipped.find(run)) for run in runs}


def _show_log(runs: list[str], last: int, *, as_json: bool) -> None:
    """Print the `last` rows of each run's log."""
    rows_by_run = {run: rows[-last:] for run, rows in _read_logs(runs).items()}
    if as_json:
        print(json.dumps({"runs": rows_by_run}))
        return
    for name, rows in rows_by_run.items():
        if rows:
            show_table(name, _log_cells(rows))
        else:
            out.print(f"{name}: nothing is logged yet", soft_wrap=True)


def _log_cells(rows: "list[Row]") -> list[dict[str, Any]]:
    """Rows of a log as rows of a table, by column.

    Parts of the loss are columns only where they are not the loss itself. A skipped step shows how many rows were to
    blame.
    """
    from dumo.report.score import is_error
    from dumo.training.log import is_weighted

    parts: dict[str, None] = {}  # a set in order
    scores: dict[str, None] = {}
    for row in rows:
        row_parts = row.get("parts", {})
        if is_weighted(row.get("loss"), row_parts):
            parts |= dict.fromkeys(row_parts)
        scores |= dict.fromkeys(name for name in row.get("val", {}) if not is_error(name))
    any_skipped = any(row.get("skipped") for row in rows)
    any_timed = any("speed" in row for row in rows)

    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:.4g}"

    table_rows: list[dict[str, Any]] = []
    for row in rows:
        cell_by_column = {"step": f"{row['step']:,}", "loss": cell(row.get("loss"))}
        for part in parts:
            cell_by_column[part] = cell(row.get("parts", {}).get(part))
        cell_by_column["gradient norm"] = cell(row.get("grad_norm"))
        cell_by_column["learning rate"] = cell(row.get("lr"))
        for name in scores:
            cell_by_column[f"val/{name}"] = cell(row.get("val", {}).get(name))
        if any_timed:
            cell_by_column["images/s"] = cell(row.get("speed", {}).get("images_per_second"))
        if any_skipped:
            cell_by_column["skipped for"] = _skipped_text(row)
        table_rows.append(cell_by_column)
    return table_rows


def _skipped_text(row: "Row") -> str:
    """How many of a skipped step's rows were not finite; empty for a step that was not skipped."""
    reason = row.get("skipped")
    if isinstance(reason, dict) and "count" in reason:
        return f"{reason['count']:,} rows"
    return "yes" if reason else ""


def _draw_curves(runs: list[str], file: Path | None) -> None:
    """Draw the curves of these runs into a PNG, and print its path. Raises UserError where nothing is logged yet."""
    from dumo.io.picture import write_picture
    from dumo.report.figure import comparison_picture
    from dumo.run import shipped
    from dumo.types import UserError

    rows_by_run = _read_logs(runs)
    for name, rows in rows_by_run.items():
        if not rows:
            raise UserError(f"{name}: nothing is logged yet, so there is no curve")
    if file is None:
        folder = shipped.output_folder(runs[0]) if len(runs) == 1 else Path()
        file = folder / "log.png"
    write_picture(file, comparison_picture(rows_by_run))
    out.print(str(file), soft_wrap=True)


def _send_rows(runs: list[str], to: str, *, follow: bool) -> None:
    """Send a tracker the rows that it does not have yet, and say on stderr how many. `follow`: go on until Ctrl-C.

    Raises UserError for a run that comes with dumo, in whose folder nothing can be noted.
    """
    from dumo.config.source import trained_name_of
    from dumo.report.feed import feed, poll_forever
    from dumo.types import UserError

    keep_pieces()  # rows that were sent are not sent again
    for run in runs:
        if trained_name_of(run) is not None:
            raise UserError(f"{run} comes with dumo, and its log is done: print it with dumo log {run} --json")
    for run, rows in feed([Path(run) for run in runs], to, poll_forever if follow else None).items():
        err.print(f"{run}: {rows:,} rows sent to {to}", soft_wrap=True)


def evaluate(
    run_folder: Annotated[
        str | None,
        typer.Argument(help="A run's folder, such as runs/digits, or digits-trained."),
    ] = None,
    nfe: Nfe = None,
    seed: Seed = None,
    solver: SolverName = None,
    set_: Set = None,
    weights: Weights = None,
    images: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE",
            help="Judge images that others made, in place of a run: a folder (folders in it are classes), an .npz in "
            "ADM's layout, parquet or tar shards. All of one size: none is resized.",
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="With --images: photos (default; from 20 images on), cifar10-features, digits; by Inception's "
            "features folder, cifar10-train50k, adm-imagenet256-50k, adm-imagenet512-50k; by a model of yours, --set "
            "evaluate.protocol.model=DIR, dinov2, cmmd.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE",
            help="With --images: the real images to compare with: a folder, brought to the size of the others as in "
            "training, if that is square; an .npz of that size; of adm-* ADM's file.",
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--out",
            parser=parse_file,
            metavar="FILE",
            help="With --images: the report. Default, here: PLACE.evaluation.json; by another protocol than photos "
            "PLACE.NAME.evaluation.json.",
        ),
    ] = None,
    all_scores: Annotated[
        bool, typer.Option("--all", help="Print all scores. Without it: the distance that leads, recall and copies.")
    ] = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Score a trained run, or images that others made.

    A run is judged by its protocol, next to what a perfect sampler would have: new real images.

    With --images: judge what another repository, a stock pipeline or a GAN made; dumo compare takes the report next to
    those of runs that the same protocol judged: dumo evaluate --images samples.npz --against photos.
    Under torchrun (torchrun --nproc-per-node 2 -m dumo evaluate RUN) the ranks share the work.
    """
    text = None if run_folder is None else precheck.read_run(run_folder, set_)
    if images is not None:
        run_options = (run_folder, nfe, seed, solver, weights)
        if any(option is not None for option in run_options):
            raise typer.BadParameter("images are made already: --images goes with --protocol, --against, --set, --out")
        _judge_images(
            images,
            protocol=protocol,
            against=against,
            fields=set_ or [],
            file=file,
            device=device,
            as_json=as_json,
            all_scores=all_scores,
        )
        return
    if run_folder is None:
        raise typer.BadParameter("name a run's folder; or, with --protocol, --against and --out, images by --images")
    if protocol:
        setting = shell_settings(f"evaluate.protocol.kind={protocol}")
        raise typer.BadParameter(f"--protocol is for --images; of a run: {setting}")
    if against or file:
        raise typer.BadParameter("--against and --out are for --images: a run is compared with its own data")

    from dumo.report import evaluate
    from dumo.run.weights import open_run
    from dumo.runtime import dist
    from dumo.runtime.progress import no_bar

    with dist.join():
        is_main = dist.is_main()
        opened = open_run(run_folder, set_ or [], text=text, weights=weights, device=device)
        report = evaluate.evaluate(
            opened,
            nfe=parse_integers(nfe, "--nfe"),
            seed=seed,
            solver=solver,
            bar=bar if is_main else no_bar,
        )
    if is_main:
        _show_report(report, as_json=as_json, all_scores=all_scores)


def _judge_images(
    images: str,
    *,
    protocol: str | None,
    against: str | None,
    fields: list[str],
    file: Path | None,
    device: str,
    as_json: bool,
    all_scores: bool,
) -> None:
    """Judge images that others made, and print the scores. The arguments are the options of `evaluate`."""
    from dumo.report import images as image_report
    from dumo.runtime import dist
    from dumo.runtime.progress import no_bar

    with dist.join():
        is_main = dist.is_main()
        report = image_report.judge(
            images,
            protocol or image_report.DEFAULT_KIND,
            against=against,
            fields=fields,
            out=file,
            device=device,
            bar=bar if is_main else no_bar,
        )
    if is_main:
        _show_report(report, as_json=as_json, all_scores=all_scores)


def _show_report(report: dict[str, Any], *, as_json: bool, all_scores: bool) -> None:
    """Print an evaluation: a table of scores, the baselines, the verdict, and the report's file.

    Without `all_scores` the table has the scores of the summary alone.
    """
    from dumo.report import score

    if as_json:
        print(json.dumps(report))
        return
    rows = [*report["results"], *report["contrast"]]
    columns = None
    if not all_scores:
        names = score.score_names(rows[0], report.get("card") or {})
        columns = score.summary_names(names)
        rows = [score.select_scores(row, columns) for row in rows]
    judged = report["images"] if "images" in report else f"{report['run']} at step {report['step']:,}"
    show_table(f"{judged}, protocol {report['protocol']}", rows)
    for line in score.terminal_lines(report, columns):
        out.print(line, soft_wrap=True)
    out.print(report["file"], soft_wrap=True)


def compare(
    run_folders: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Folders of runs that were evaluated, or single evaluations."),
    ],
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Print the table though they were measured otherwise, and say how.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Set scores of runs side by side, a table for each protocol."""
    precheck.require_evaluated(run_folders)

    from dumo.report.compare import compare_by_protocol

    reports = compare_by_protocol(run_folders, anyway=anyway)
    if as_json:
        first_report, *others = reports.values()
        print(json.dumps({"tables": reports} if others else first_report))
        return
    for kind, report in reports.items():
        if len(reports) > 1:
            out.print(f"protocol {kind}", soft_wrap=True)
        _show_comparison(report)


def _show_comparison(report: dict[str, Any]) -> None:
    """Print a table of evaluations, a perfect sampler's scores, and what was measured otherwise."""
    from dumo.report import score

    rows: list[dict[str, Any]] = []
    for row in report["rows"]:
        cell_by_column = {key: "" if value is None else value for key, value in row.items()}
        if "best" in row:
            cell_by_column["best"] = "*" if row["best"] else ""
        rows.append(cell_by_column)
    show_table("* the best of its passes, and what is level with it" if "best" in rows[0] else "", rows)
    perfect_scores = dict.fromkeys(score.terminal_text(perfect) for perfect in report["perfect"].values())
    for text in perfect_scores:
        out.print(f"{score.TERMINAL_BASELINES['perfect']}: {text}", soft_wrap=True)
    for field, value_by_run in report["differs"].items():
        values = "; ".join(f"{value} in {name}" for name, value in value_by_run.items())
        out.print(f"measured otherwise, {field}: {values}", soft_wrap=True)
