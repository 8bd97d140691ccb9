"""Several runs in one table, if they were judged alike."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dumo.evaluation.card import alike, brief, differing, seen
from dumo.evaluation.evaluate import FILE, Row, read_report
from dumo.types import UserError


def compare(sources: Sequence[str], *, anyway: bool = False) -> dict[str, Any]:
    """The evaluations of runs' folders, or files of them, as `rows` of one table.

    A setting of the solver that differs, such as m, has a column, and scores that a run was trained on stand under
    `trained_on`, where there are any: they are no judges of it. Raises UserError where an evaluation is missing, or
    they were measured otherwise, with what differs; `anyway` has the table all the same, what differs in columns of
    their own, and in `differs` the whole of it.
    """
    reports = {source: read_report(_file(source)) for source in sources}
    cards = {source: report["card"] for source, report in reports.items()}
    if not anyway:
        alike(cards)
    differs = differing(list(cards.values()))
    settings = {name for one in cards.values() for name in one["solver"] if name != "kind"}
    varied = [name for name in sorted(settings) if len({str(one["solver"].get(name)) for one in cards.values()}) > 1]
    rows, trained = list[Row](), any("trained_on" in one for one in cards.values())
    for i, (source, report) in enumerate(reports.items()):
        head = {"run": source, "step": report["step"], **{field: brief(found[i]) for field, found in differs.items()}}
        own = {name: report["card"]["solver"].get(name) for name in varied}
        told = {"trained_on": ", ".join(seen(report["results"][0], report["card"])) or None} if trained else {}
        rows += [head | own | scores | told for scores in report["results"]]
        rows += [head | dict.fromkeys(varied) | scores | told for scores in report["contrast"]]
    columns = dict.fromkeys(key for row in rows for key in row)
    return {
        "rows": [{key: row.get(key) for key in columns} for row in rows],
        "differs": {field: dict(zip(cards, found, strict=True)) for field, found in differs.items()},
    }


def _file(source: str) -> Path:
    """The evaluation that a run's folder holds, or the file itself. Raises UserError for neither."""
    path = Path(source)
    if not path.exists():
        raise UserError(f"there is no run's folder or evaluation {source}: give folders such as runs/digits")
    if path.is_dir() and not (path / FILE).exists() and (others := sorted(map(str, path.glob("evaluation-*.json")))):
        raise UserError(
            f"{source} was not judged as its own spec says: name {' or '.join(others)}, or run dumo evaluate {source}"
        )
    return path / FILE if path.is_dir() else path
