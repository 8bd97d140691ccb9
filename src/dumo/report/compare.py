"""Set several evaluations side by side in one table, if they were measured alike.

`dumo compare` calls `compare_by_protocol`, which makes a table for each protocol; `dumo.compare` of Python calls
`compare`, which makes one; `dumo.lab` calls `require_comparable` alone. In this order they

1. read the evaluations, each from a run's folder or a file (`read_report`);
2. refuse evaluations that were not measured alike (`differing_fields`), unless the caller says `anyway`;
3. make rows of the scores, with columns for what differs: settings of the solver, and with `anyway` fields of the
   measure;
4. mark the best rows of each number of passes.

Two evaluations are measured alike if the fields MEASURE_FIELDS of their cards are equal; where a reference has no hash,
the data; and by CLIP score, the captions of the samples. What made the samples (the weights, the solver and its
settings) may differ, because it is what is compared. The codec counts as part of the measure: another codec shows other
pixels for the same latent.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from dumo.config.place import EVALUATION_FILE, OTHER_EVALUATIONS
from dumo.evaluation.metric import CLASS_MMD, CLASSES_SHA256
from dumo.report import score
from dumo.report.card import Card, Row, read_report
from dumo.run import shipped
from dumo.runtime import shell_path
from dumo.runtime.door import option
from dumo.types import UserError

Report = dict[str, Any]  # an evaluation with its card, as `read_report` returns it

# The fields of a card that say how samples were measured.
MEASURE_FIELDS = (
    "protocol",
    "samples",
    "features",
    "features_sha256",
    "reference",
    "reference_sha256",
    CLASSES_SHA256,
    "resize",
    "rounding",
    "colours",
    CLASS_MMD,
    "codec",
    "seed",
)
RUN_ONLY_FIELDS = ("codec", "seed")  # unknown, and not compared, where others made the images
LEFT_OUT = "over "  # begins the words about classes that are left out (`class_facts`)
SPLIT_NAME = re.compile(r"\bsplit [^,]+")  # in the words of a reference (`name_of_data`)
SHA256_DIGITS = 64
SHOWN_DIGITS = 8  # of a SHA-256 in a table: ours


def differing_fields(cards: Mapping[str, Card]) -> dict[str, dict[str, Any]]:
    """The fields of the measure that are not the same on all cards: by field, its value on each card.

    `cards` are by source, and so are the values.
    """
    measures = {source: _measure(card) for source, card in cards.items()}
    measures_of_runs = {name: measure for name, measure in measures.items() if not _is_made_by_others(cards[name])}
    measures_with_classes = {name: measure for name, measure in measures.items() if _tells_classes(measure)}
    fields = dict.fromkeys(field for measure in measures.values() for field in measure)
    differences: dict[str, dict[str, Any]] = {}
    for field in fields:
        if field in RUN_ONLY_FIELDS:
            compared_measures = measures_of_runs
        elif field == CLASS_MMD:
            compared_measures = measures_with_classes
        elif field == CLASSES_SHA256:  # others were judged without classes, or are older
            compared_measures = {name: measure for name, measure in measures.items() if field in measure}
        else:
            compared_measures = measures
        values = [measure.get(field) for measure in compared_measures.values()]
        if any(value != values[0] for value in values):
            differences[field] = {source: measure.get(field) for source, measure in measures.items()}
    return differences


def require_comparable(cards: Mapping[str, Card]) -> None:
    """Raise UserError, with the fields that differ, where cards were not measured alike. `cards` are by source."""
    _require_no_differences(differing_fields(cards))


def _require_no_differences(differences: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UserError where there are `differing_fields`."""
    if differences:
        lines = [f"{field}: {_sources_by_value(values)}" for field, values in differences.items()]
        raise UserError(
            "\n  ".join(["these were not measured alike, so they cannot stand in one table:", *lines])
            + f"\nJudge them alike, or print the table with what differs: {option('anyway', True)}"
        )


def compare(sources: Sequence[str], *, anyway: bool = False) -> dict[str, Any]:
    """Set evaluations in one table. `sources` are runs' folders, or files of evaluations.

    Returns

    - `rows`: the scores of all evaluations, with `best` where a row is among the best of its number of passes, by
      `class_mmd` where all have it. A row is named by its source; images that others made are named by their place,
      and have neither step nor passes, so their rivals are all rows. After the rows of the run's own solver follow
      those of its contrast: the same weights sampled by Euler's method.
    - `perfect`: by source, the scores that a perfect sampler would have, as far as they are known
    - `differs`: by field of the measure that differs, its value for each source

    A setting of the solver that differs, such as m, has a column. Scores that a run was trained on do not count as
    judges of it: where there are any, they are named in the column `trained_on`.

    Raises UserError where there is no source, an evaluation is missing, or they were not measured alike; with `anyway`
    what differs has columns instead.
    """
    return _compare_reports(_read_reports(sources), anyway=anyway)


def compare_by_protocol(sources: Sequence[str], *, anyway: bool) -> dict[str, dict[str, Any]]:
    """Set evaluations in a table for each protocol, by the protocol's kind. Takes sources and raises as `compare`.

    Evaluations by different protocols have no scores that could be compared. With `anyway` there is one table of all,
    and its key is "".
    """
    reports = _read_reports(sources)
    if anyway:
        return {"": _compare_reports(reports, anyway=True)}
    reports_by_kind: dict[str, dict[str, Report]] = {}
    for source, report in reports.items():
        kind, *_ = report["protocol"].split(" (")  # brackets hold what is unusual in a protocol
        reports_by_kind.setdefault(kind, {})[source] = report
    tables: dict[str, dict[str, Any]] = {}
    for kind, reports_of_kind in reports_by_kind.items():
        tables[kind] = _compare_reports(reports_of_kind, anyway=False)
    return tables


def _read_reports(sources: Sequence[str]) -> dict[str, Report]:
    """Read the evaluation of each source, once where a source is named twice. Raises as `compare`."""
    if not sources:
        raise UserError("there is nothing to compare: name one run or more, each a folder or an evaluation's file")
    return {source: read_report(_evaluation_file(source), images=True) for source in sources}


def _compare_reports(reports: Mapping[str, Report], *, anyway: bool) -> dict[str, Any]:
    """The table of evaluations by source, one or more, as `compare` returns it. Raises as `require_comparable`."""
    cards = {source: report["card"] for source, report in reports.items()}
    differences = differing_fields(cards)
    if not anyway:
        _require_no_differences(differences)
    varied_settings = _varied_settings(list(cards.values()))
    has_trained_on = any("trained_on" in card for card in cards.values())

    rows: list[Row] = []
    for source, report in reports.items():
        measure = {field: shorten_hashes(values[source]) for field, values in differences.items()}
        rows += _source_rows(source, report, measure, varied_settings, has_trained_on=has_trained_on)
    rows = score.mark_best(rows, _ranking_score(list(reports.values())))

    perfect: dict[str, Row] = {}
    for source, report in reports.items():
        perfect_scores = _perfect_scores(report)
        if perfect_scores:
            perfect[source] = perfect_scores
    return {"rows": _with_all_columns(rows), "differs": differences, "perfect": perfect}


def _source_rows(
    source: str, report: Report, measure: Row, varied_settings: Sequence[str], *, has_trained_on: bool
) -> list[Row]:
    """The rows of one evaluation: those of the run's solver, then those of the contrast.

    Before the scores stand the source, the step, `measure` (the fields of the measure that differ, with this source's
    values) and the settings of the solver that differ. With `has_trained_on` a column after the scores names those that
    the run was trained on.
    """
    card = report["card"]
    first_columns: Row = {"run": report.get("images", source), "step": report.get("step"), **measure}
    last_columns: Row = {}
    if has_trained_on:
        last_columns["trained_on"] = ", ".join(score.trained_on_names(report["results"][0], card)) or None

    solver = card.get("solver", {})
    settings = {name: solver.get(name) for name in varied_settings}
    rows = [first_columns | settings | row | last_columns for row in report["results"]]
    no_settings = dict.fromkeys(varied_settings)  # Euler's method has none
    rows += [first_columns | no_settings | row | last_columns for row in report.get("contrast", [])]
    return rows


def _ranking_score(reports: Sequence[Report]) -> str:
    """The score by which rows are marked as best: `class_mmd` where all have it, else the first score."""
    first_rows = [report["results"][0] for report in reports]
    if all(CLASS_MMD in row for row in first_rows):
        return CLASS_MMD
    return score.first_score(first_rows[0])


def _with_all_columns(rows: Sequence[Row]) -> list[Row]:
    """The rows with the columns of all of them, in one order; None where a row lacks a value."""
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in columns} for row in rows]


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


def _perfect_scores(report: Report) -> Row:
    """The scores, with errors, that a perfect sampler would have, by name; {} where they are not known."""
    scores: Row = dict(score.perfect_sampler(score.baselines_by_name(report)) or {})
    return {name: value for name, value in scores.items() if value is not None}


def shorten_hashes(value: JsonValue) -> str | float | None:
    """A value of a card for a table. Numbers and None stay. Other values become text, with each SHA-256 cut short."""
    if value is None or isinstance(value, int | float):
        return value
    words: list[str] = []
    for word in str(value).split():
        if len(word) == SHA256_DIGITS:
            word = word[:SHOWN_DIGITS]
        words.append(word)
    return " ".join(words)


def _sources_by_value(values: Mapping[str, Any]) -> str:
    """Each value with the sources that have it, as text: '0 in a, b; 1 in c'. `values` are by source."""
    sources: dict[str, list[str]] = {}
    for source, value in values.items():
        sources.setdefault(str(value), []).append(source)
    return "; ".join(f"{value} in {', '.join(names)}" for value, names in sources.items())


def _is_made_by_others(card: Card) -> bool:
    """Whether an evaluation is of images that others made (`dumo evaluate --images`), not of a run's samples."""
    return "images" in card


def _tells_classes(measure: Card) -> bool:
    """Whether a card tells which classes count: all, or those that it names. Older ones only have their number."""
    return str(measure.get(CLASS_MMD, LEFT_OUT)).startswith(LEFT_OUT)


def _measure(card: Card) -> Card:
    """The fields of a card that say how samples were measured, as the top of this file has them."""
    measure: Card = {field: card[field] for field in MEASURE_FIELDS if field in card}
    if str(card.get("protocol")).startswith("clip-score"):
        measure["labels"] = card.get("labels")  # which captions the samples have
    codec = measure.get("codec")
    if codec:
        measure["codec"] = f"{codec['kind']} {codec['sha256']}"
    if "reference_sha256" in measure:  # which says more of the images than the name of their split
        measure["reference"] = SPLIT_NAME.sub("the data", str(card.get("reference")))
    else:
        measure["data"] = card.get("data")
    return measure


def _evaluation_file(source: str) -> Path:
    """The file of an evaluation: `source` itself, or the one in the run's folder `source`.

    For a run that comes with dumo it is the one in the user's own output folder, else the one that came with the run.
    Raises UserError where there is none.
    """
    path = shipped.output_folder(source)
    shipped_folder = shipped.find(source)  # `path` itself, where the run does not come with dumo
    if shipped_folder != path and not (path / EVALUATION_FILE).is_file():
        return shipped_folder / EVALUATION_FILE
    if not path.is_dir():
        return path
    return _evaluation_in_folder(path, source)


def _evaluation_in_folder(folder: Path, source: str) -> Path:
    """The evaluation in a run's folder, which the user typed as `source`.

    Raises UserError where all evaluations there are by other settings than the run's.
    """
    file = folder / EVALUATION_FILE
    other_evaluations = sorted(map(str, folder.glob(OTHER_EVALUATIONS)))
    if other_evaluations and not file.exists():
        fix = f"name {' or '.join(other_evaluations)}, or run dumo evaluate {shell_path(source)}"
        raise UserError(f"{source} has no {EVALUATION_FILE}: {fix}")
    return file
