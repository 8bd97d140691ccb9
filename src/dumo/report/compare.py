"""Several runs in one table, if they were judged in the same way.

`compare_by_protocol` is the entrance of the command line, and `compare` that of one table. It

1. reads the evaluations (`read_report`),
2. refuses those that were measured otherwise (`require_comparable`, which the lab calls, too),
3. sets their rows below one another, with columns for what differs,
4. marks the best of each number of passes.

Two numbers may stand in one table if what measured them is the same (`MEASURE_FIELDS`); what made the samples, the
weights, the solver and its settings, may differ, for that is what is compared. A codec counts to the measure: who
decodes in another way shows other pixels for the same latent.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dumo.config.place import EVALUATION, require_evaluation
from dumo.evaluation.metric import CLASS_MMD
from dumo.report import score
from dumo.report.card import Card, Row, read_report
from dumo.run import shipped
from dumo.runtime import shell_path
from dumo.runtime.door import option
from dumo.types import UserError

# The fields of a card that say how samples were measured.
MEASURE_FIELDS = (
    "protocol",
    "samples",
    "features",
    "features_sha256",
    "reference",
    "reference_sha256",
    "resize",
    "rounding",
    "codec",
    "seed",
)
RUN_FIELDS = ("codec", "seed")  # fields of cards of runs alone: nobody knows them of images that others made


def differing_fields(cards: Sequence[Card]) -> dict[str, list[Any]]:
    """The fields of the measure that are not the same on all cards, each with its values in the order of the cards."""
    measures = [_measure(card) for card in cards]
    run_measures = [measure for measure, card in zip(measures, cards, strict=True) if "images" not in card]
    fields = dict.fromkeys(field for measure in measures for field in measure)
    differences: dict[str, list[Any]] = {}
    for field in fields:
        compared_measures = run_measures if field in RUN_FIELDS else measures
        values = [measure.get(field) for measure in compared_measures]
        if any(value != values[0] for value in values):
            differences[field] = [measure.get(field) for measure in measures]
    return differences


def require_comparable(cards: Mapping[str, Card]) -> None:
    """Raise UserError, with the fields that differ, where cards were not measured alike. `cards` are by run."""
    differences = differing_fields(list(cards.values()))
    if differences:
        lines = [f"{field}: {_side_by_side(cards, values)}" for field, values in differences.items()]
        raise UserError(
            "\n  ".join(["these were not measured alike, so no table holds them both:", *lines])
            + f"\nJudge them alike, or print the table with what differs: {option('anyway', True)}"
        )


def compare(sources: Sequence[str], *, anyway: bool = False) -> dict[str, Any]:
    """The evaluations of runs' folders, or of files, in one table.

    Returns

    - `rows`: of all evaluations, with `best` where it is among the least distances of its number of passes, by
      `class_mmd` where all have it. Images that others made are named by their place, without steps and passes.
    - `perfect`: by source, the scores that a perfect sampler would have, as far as they are known
    - `differs`: by field of the measure that differs, its value for each source

    A setting of the solver that differs, such as m, has a column. Scores that a run was trained on are no judges of it:
    where there are any, they are named in the column `trained_on`.

    Raises UserError where an evaluation is missing, or they were measured otherwise; with `anyway` what differs has
    columns instead.
    """
    reports = {source: read_report(_evaluation_file(source), images=True) for source in sources}
    cards = {source: report["card"] for source, report in reports.items()}
    if not anyway:
        require_comparable(cards)
    differences = differing_fields(list(cards.values()))
    varied_settings = _varied_settings(list(cards.values()))
    any_trained_on = any("trained_on" in card for card in cards.values())

    rows: list[Row] = []
    for i, (source, report) in enumerate(reports.items()):
        card = report["card"]
        first_columns: Row = {"run": report.get("images", source), "step": report.get("step")}
        for field, values in differences.items():
            first_columns[field] = shorten_hashes(values[i])
        last_columns: Row = {}
        if any_trained_on:
            last_columns["trained_on"] = ", ".join(score.trained_on_names(report["results"][0], card)) or None
        solver = card.get("solver", {})
        settings = {name: solver.get(name) for name in varied_settings}
        contrast_settings = dict.fromkeys(varied_settings)  # the solver of the contrast has none
        rows += [first_columns | settings | row | last_columns for row in report["results"]]
        rows += [first_columns | contrast_settings | row | last_columns for row in report.get("contrast", [])]

    lead = score.first_score(reports[sources[0]]["results"][0])
    if all(CLASS_MMD in report["results"][0] for report in reports.values()):
        lead = CLASS_MMD
    rows = score.mark_best(rows, lead)
    columns = dict.fromkeys(name for row in rows for name in row)
    perfect = {source: _perfect_scores(report) for source, report in reports.items()}
    return {
        "rows": [{name: row.get(name) for name in columns} for row in rows],
        "differs": {field: dict(zip(cards, values, strict=True)) for field, values in differences.items()},
        "perfect": {source: scores for source, scores in perfect.items() if scores},
    }


def compare_by_protocol(sources: Sequence[str], *, anyway: bool = False) -> dict[str, dict[str, Any]]:
    """The evaluations of runs' folders, or of files, as `compare` has them: a table for each protocol, by its kind.

    What different protocols measured has nothing in common that could be compared; with `anyway` it is one table, whose
    key is "". Raises as `compare`.
    """
    if anyway:
        return {"": compare(sources, anyway=True)}
    sources_by_kind: dict[str, list[str]] = {}
    for source in sources:
        report = read_report(_evaluation_file(source), images=True)
        kind, *_ = report["protocol"].split(" (")  # what is odd about a protocol stands in brackets
        sources_by_kind.setdefault(kind, []).append(source)
    return {kind: compare(alike) for kind, alike in sources_by_kind.items()}


def _varied_settings(cards: Sequence[Card]) -> list[str]:
    """The names of the settings of the solver that are not the same on all cards that have a solver."""
    solvers = [card["solver"] for card in cards if "solver" in card]
    names = {name for solver in solvers for name in solver if name != "kind"}
    varied: list[str] = []
    for name in sorted(names):
        different_values = {str(solver.get(name)) for solver in solvers}
        if len(different_values) > 1:
            varied.append(name)
    return varied


def _perfect_scores(report: Row) -> Row:
    """The scores, with errors, that a perfect sampler would have, by name; {} where they are not known."""
    scores: Row = dict(score.baselines_by_name(report).get("perfect", {}))
    return {name: value for name, value in scores.items() if value is not None}


def shorten_hashes(value: object) -> str:
    """A value of a card as text for a table, with each SHA-256, of 64 characters, cut to 8."""
    return " ".join(word[:8] if len(word) == 64 else word for word in str(value).split())


def _side_by_side(cards: Mapping[str, Card], values: Sequence[Any]) -> str:
    """Each value with the names of the cards that have it: '0 in a, b; 1 in c'."""
    names: dict[str, list[str]] = {}
    for name, value in zip(cards, values, strict=True):
        names.setdefault(str(value), []).append(name)
    return "; ".join(f"{value} in {', '.join(card_names)}" for value, card_names in names.items())


def _measure(card: Card) -> Card:
    """The fields of a card that say how samples were measured, and the data where the reference has no hash."""
    measure: Card = {field: card[field] for field in MEASURE_FIELDS if field in card}
    codec = measure.get("codec")
    if codec:
        measure["codec"] = f"{codec['kind']} {codec['sha256']}"
    if "reference_sha256" not in measure:
        measure["data"] = card.get("data")
    return measure


def _evaluation_file(source: str) -> Path:
    """The file of an evaluation: `source` itself, or the one in the run's folder `source`.

    Of a run that comes with dumo it is the one that was made here, else the one that came with it. Raises UserError
    where there is none.
    """
    path = shipped.output_folder(source)
    shipped_folder = shipped.find(source)
    if shipped_folder != path and not (path / EVALUATION).is_file():
        return shipped_folder / EVALUATION
    require_evaluation(path)
    if not path.is_dir():
        return path
    file = path / EVALUATION
    other_evaluations = sorted(map(str, path.glob("evaluation-*.json")))
    if other_evaluations and not file.exists():
        fix = f"name {' or '.join(other_evaluations)}, or run dumo evaluate {shell_path(source)}"
        raise UserError(f"{source} was not judged as its own spec says: {fix}")
    return file
