"""The command `compare`: print the scores of several runs side by side."""

import json
from typing import Annotated, Any

import typer

from dumo.cli.option import AsJson
from dumo.cli.terminal import out, show_table


def compare(
    run_folders: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Folders of runs that were evaluated, or single evaluations."),
    ],
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Print the table even if the evaluations differ, and list the differences.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare the scores of runs, one table per protocol.

    Examples:
    dumo compare runs/digits runs/digits-meanflow
    dumo compare runs/photos samples.evaluation.json --json
    """
    from dumo.report.comparison import compare_by_protocol

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
    show_table("* the best score at its NFE, and scores not significantly worse" if "best" in rows[0] else "", rows)
    perfect_scores = dict.fromkeys(score.terminal_text(perfect) for perfect in report["perfect"].values())
    for text in perfect_scores:
        out.print(f"{score.TERMINAL_BASELINES['perfect']}: {text}", soft_wrap=True)
    for field, value_by_run in report["differs"].items():
        values = "; ".join(f"{value} in {name}" for name, value in value_by_run.items())
        out.print(f"measured differently, {field}: {values}", soft_wrap=True)
