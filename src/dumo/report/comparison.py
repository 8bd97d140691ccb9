"""Compare several evaluations in one table, if they were measured in the same way.

`compare_by_protocol` makes a table for each protocol, for `dumo compare`, and `compare` makes one, for Python's
`dumo.compare`. Both refuse evaluations whose measures differ (`dumo.report.evaluation_card.measure`), unless `anyway`
is set.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from dumo.config.place import EVALUATION_FILE, OTHER_EVALUATIONS
from dumo.evaluation.metric import CLASS_MMD, CLASSES_SHA256
from dumo.report import score
from dumo.report.evaluation_card import Card, Row, measure, read_report
from dumo.run import read_only
from dumo.types import UserError

# An evaluation with its card, as `read_report` returns it.
Report = dict[str, Any]

# Fields that are not compared if a card lacks them: the codec and the seed for existing images, and the classes of the
# reference for images without classes.
UNKNOWN_IF_ABSENT = ("codec", "seed", CLASSES_SHA256)
SHA256_DIGITS = 64
SHOWN_DIGITS = 8


def differing_fields(cards: Mapping[str, Card]) -> dict[str, dict[str, Any]]:
    """Return the fields of the measure that differ: by field, its value on each card. `cards` are by source."""
    measures = {source: measure(card) for source, card in cards.items()}
    differences: dict[str, dict[str, Any]] = {}
    for field in dict.fromkeys(field for fields in measures.values() for field in fields):
        is_optional = field in UNKNOWN_IF_ABSENT
        values = [fields.get(field) for fields in measures.values() if field in fields or not is_optional]
        if any(value != values[0] for value in values):
            differences[field] = {source: fields.get(field) for source, fields in measures.items()}
    return differences


def require_comparable(cards: Mapping[str, Card]) -> None:
    """Raise UserError with the differing fields if the measures of cards differ. `cards` are by source."""
    lines: list[str] = []
    for field, values in differing_fields(cards).items():
        sources_by_value: dict[str, list[str]] = {}
        for source, value in values.items():
            sources_by_value.setdefault(str(value), []).append(source)
        text = "; ".join(f"{value} in {', '.join(sources)}" for value, sources in sources_by_value.items())
        lines.append(f"\n  {field}: {text}")
    if lines:
        raise UserError(
            "these evaluations used different settings, so their scores are not "
            f"comparable:{''.join(lines)}\nEvaluate with the same settings, or add --anyway to print the table with "
            "the differences"
        )


def compare(sources: Sequence[str], *, anyway: bool = False) -> dict[str, Any]:
    """Compare evaluations in one table. `sources` are run folders or evaluation files.

    Returns

    - `rows`: the scores of all evaluations, with `best` if a row is among the best of its number of passes, by
      `class_mmd` if all have it. A row is named by its source; images that others made are named by their place, have
      neither step nor passes, and are compared with all rows. The rows of a run's own solver are followed by those of
      its contrast, the same weights sampled by Euler's method.
    - `perfect`: by source, the scores that a perfect sampler would have, as far as they are known
    - `differs`: by field of the measure that differs, its value for each source

    A setting of the solver that differs, such as m, has a column. Scores that a run was trained on do not count as
    judges of it: they are named in the column `trained_on`.

    Raises UserError if an evaluation is missing, or if they were not measured alike; with `anyway` what differs has
    columns instead.
    """
    return _compare_reports(_read_reports(sources), anyway=anyway)


def compare_by_protocol(sources: Sequence[str], *, anyway: bool) -> dict[str, dict[str, Any]]:
    """Return a comparison table for each kind of protocol. Takes sources and raises as `compare`.

    Scores of different protocols are not comparable. With `anyway`, there is one table, with the key "".
    """
    reports = _read_reports(sources)
    if anyway:
        return {"": _compare_reports(reports, anyway=True)}
    reports_by_kind: dict[str, dict[str, Report]] = {}
    for source, report in reports.items():
        # Deviations from a protocol are in parentheses.
        kind, *_ = report["protocol"].split(" (")
        reports_by_kind.setdefault(kind, {})[source] = report
    return {kind: _compare_reports(of_kind, anyway=False) for kind, of_kind in reports_by_kind.items()}


def _read_reports(sources: Sequence[str]) -> dict[str, Report]:
    """Read the evaluation of each source, once if a source is named twice."""
    return {source: read_report(_evaluation_file(source)) for source in sources}


def _evaluation_file(source: str) -> Path:
    """Return the file of an evaluation: `source` itself, or the one in the folder of the run `source`.

    The user's own evaluation of a run that ships with dumo goes before the one that ships with it. Raises UserError if
    a folder has several evaluations, none of them by the run's own settings.
    """
    for path in (read_only.output_folder(source), read_only.find(source)):
        if path.is_file():
            return path
        if (path / EVALUATION_FILE).is_file():
            return path / EVALUATION_FILE
    others = sorted(read_only.output_folder(source).glob(OTHER_EVALUATIONS))
    if len(others) > 1:
        raise UserError(f"{source} has no {EVALUATION_FILE}: name one of {', '.join(map(str, others))}")
    return others[0] if others else read_only.find(source) / EVALUATION_FILE


def _compare_reports(reports: Mapping[str, Report], *, anyway: bool) -> dict[str, Any]:
    """Return the table of evaluations by source, as `compare` returns it. Raises as `require_comparable`."""
    cards = {source: report["card"] for source, report in reports.items()}
    if not anyway:
        require_comparable(cards)
    differences = differing_fields(cards)
    varied_settings = _varied_settings(list(cards.values()))
    has_trained_on = any("trained_on" in card for card in cards.values())

    # Concatenate the rows of all evaluations.
    rows: list[Row] = []
    for source, report in reports.items():
        card = report["card"]
        first_columns: Row = {"run": report.get("images", source), "step": report.get("step")}
        first_columns |= {field: shorten_hashes(values[source]) for field, values in differences.items()}
        last_columns: Row = {}
        if has_trained_on:
            last_columns["trained_on"] = ", ".join(score.trained_on_names(report["results"][0], card)) or None
        settings = {name: card.get("solver", {}).get(name) for name in varied_settings}
        # The contrast is sampled with Euler's method, which has no settings.
        no_settings = dict.fromkeys(varied_settings)
        rows += [first_columns | settings | row | last_columns for row in report["results"]]
        rows += [first_columns | no_settings | row | last_columns for row in report.get("contrast", [])]

    # Mark the best rows for each NFE.
    first_rows = [report["results"][0] for report in reports.values()]
    has_class_mmd = all(CLASS_MMD in row for row in first_rows)
    rows = score.mark_best(rows, CLASS_MMD if has_class_mmd else score.first_score(first_rows[0]))

    perfect: dict[str, Row] = {}
    for source, report in reports.items():
        scores: Row = dict(score.perfect_sampler(score.baselines_by_name(report)) or {})
        if scores:
            perfect[source] = {name: value for name, value in scores.items() if value is not None}
    columns = dict.fromkeys(name for row in rows for name in row)
    rows = [{name: row.get(name) for name in columns} for row in rows]
    return {"rows": rows, "differs": differences, "perfect": perfect}


def _varied_settings(cards: Sequence[Card]) -> list[str]:
    """Return the names of the settings of the solver that are not the same on all cards that have a solver."""
    solvers = [card["solver"] for card in cards if "solver" in card]
    names = {name for solver in solvers for name in solver if name != "kind"}
    return [name for name in sorted(names) if len({str(solver.get(name)) for solver in solvers}) > 1]


def shorten_hashes(value: JsonValue) -> str | float | None:
    """Return a value of a card for a table.

    Numbers and None stay. Other values become text, with each SHA-256 cut short.
    """
    if value is None or isinstance(value, int | float):
        return value
    words = [word[:SHOWN_DIGITS] if len(word) == SHA256_DIGITS else word for word in str(value).split()]
    return " ".join(words)
