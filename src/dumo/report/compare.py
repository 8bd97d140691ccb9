"""Several runs in one table, if they were judged in the same way.

`compare` reads the evaluations, refuses those that were measured otherwise (`require_comparable`), and sets their rows
below one another, the best of each number of passes marked.

Two numbers may stand in one table if what measured them is the same (`MEASURED`); what made the samples, the weights,
the solver and its settings, may differ, for that is what is compared. A codec counts to the measure: who decodes in
another way shows other pixels for the same latent.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dumo.evaluation.metric import CLASS_MMD
from dumo.report import score
from dumo.report.card import FILE, Card, Row, read_report
from dumo.runtime import typed
from dumo.types import UserError

# the fields of a card that say how samples were measured
MEASURED = (
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
OF_RUNS = ("codec", "seed")  # fields that only runs have: nobody knows them of images that others made


def differing_fields(cards: Sequence[Card]) -> dict[str, list[Any]]:
    """The fields of the measure that are not the same on all cards, each with its values in the order of the cards."""
    measures = [_measure(card) for card in cards]
    runs = [i for i, card in enumerate(cards) if "images" not in card]
    fields = dict.fromkeys(field for measure in measures for field in measure)
    differs: dict[str, list[Any]] = {}
    for field in fields:
        values = [measure.get(field) for measure in measures]
        compared = [values[i] for i in runs] if field in OF_RUNS else values
        if any(value != compared[0] for value in compared):
            differs[field] = values
    return differs


def require_comparable(cards: Mapping[str, Card]) -> None:
    """Refuse cards, by name, that were measured otherwise. Raises UserError with the fields side by side."""
    differs = differing_fields(list(cards.values()))
    if differs:
        lines = [f"{field}: {_side_by_side(cards, values)}" for field, values in differs.items()]
        raise UserError(
            "\n  ".join(["these were not measured alike, so no table holds them both:", *lines])
            + "\nJudge them alike, or print the table with what differs: --anyway"
        )


def compare(sources: Sequence[str], *, anyway: bool = False) -> dict[str, Any]:
    """The evaluations of runs' folders, or files of them, as `rows` of one table; and of each what is `perfect`.

    Images that others made go by their place, and have neither steps nor passes.
    `best` marks the least distance of each number of passes and those level with it: by `class_mmd` where all have it.
    A setting of the solver that differs, such as m, has a column, and scores that a run was trained on stand under
    `trained_on`, where there are any: they are no judges of it. Raises UserError where an evaluation is missing, or
    they were measured otherwise, with what differs; `anyway` has the table all the same, what differs in columns of
    their own, and in `differs` the whole of it.
    """
    reports = {source: read_report(_file(source), images=True) for source in sources}
    cards = {source: report["card"] for source, report in reports.items()}
    if not anyway:
        require_comparable(cards)
    differs = differing_fields(list(cards.values()))
    varied_settings = _varied_settings(list(cards.values()))
    any_trained_on = any("trained_on" in card for card in cards.values())

    rows: list[Row] = []
    for i, (source, report) in enumerate(reports.items()):
        first_row = report["results"][0]
        card = report["card"]
        head: Row = {"run": report.get("images", source), "step": report.get("step")}
        for field, values in differs.items():
            head[field] = shorten_hashes(values[i])
        tail: Row = {}
        if any_trained_on:
            tail["trained_on"] = ", ".join(score.trained_on_names(first_row, card)) or None
        solver = card.get("solver", {})
        own_settings = {name: solver.get(name) for name in varied_settings}
        other_settings = dict.fromkeys(varied_settings)
        rows += [head | own_settings | row | tail for row in report["results"]]
        rows += [head | other_settings | row | tail for row in report.get("contrast", [])]

    lead = score.first_score(reports[sources[0]]["results"][0])
    if all(CLASS_MMD in report["results"][0] for report in reports.values()):
        lead = CLASS_MMD
    rows = score.mark_best(rows, lead)
    columns = dict.fromkeys(name for row in rows for name in row)
    known_perfect = {source: perfect_scores(report) for source, report in reports.items()}
    return {
        "rows": [{name: row.get(name) for name in columns} for row in rows],
        "differs": {field: dict(zip(cards, values, strict=True)) for field, values in differs.items()},
        "perfect": {source: scores for source, scores in known_perfect.items() if scores},
    }


def _varied_settings(cards: Sequence[Card]) -> list[str]:
    """The settings of the solver that are not the same on all cards that have one."""
    solvers = [card["solver"] for card in cards if "solver" in card]
    names = {name for solver in solvers for name in solver if name != "kind"}
    return [name for name in sorted(names) if len({str(solver.get(name)) for solver in solvers}) > 1]


def perfect_scores(report: Row) -> Row:
    """What a perfect sampler would have of a report's scores, by name, with errors; {} where that is not known."""
    scores: Row = dict(score.baselines_by_name(report).get("perfect", {}))
    return {name: value for name, value in scores.items() if value is not None}


def shorten_hashes(value: object) -> str:
    """A value of a card as text for a table, with hashes cut to 8 characters."""
    return " ".join(word[:8] if len(word) == 64 else word for word in str(value).split())


def _side_by_side(cards: Mapping[str, Card], values: Sequence[Any]) -> str:
    """Each value with the names of the cards that have it: '0 in a, b; 1 in c'."""
    names: dict[str, list[str]] = {}
    for name, value in zip(cards, values, strict=True):
        names.setdefault(str(value), []).append(name)
    return "; ".join(f"{value} in {', '.join(which)}" for value, which in names.items())


def _measure(card: Card) -> Card:
    """The fields of a card that say how samples were measured, and the data where the reference has no hash."""
    measure = {field: card[field] for field in MEASURED if field in card}
    codec = measure.get("codec")
    if codec:
        measure["codec"] = f"{codec['kind']} {codec['sha256']}"
    if "reference_sha256" not in measure:
        measure["data"] = card.get("data")
    return measure


def _file(source: str) -> Path:
    """The evaluation that a run's folder holds, or the file itself. Raises UserError for neither."""
    path = Path(source)
    if not path.exists():
        raise UserError(f"there is no run's folder or evaluation {source}: give folders such as runs/digits")
    if not path.is_dir():
        return path
    file = path / FILE
    others = sorted(map(str, path.glob("evaluation-*.json")))
    if others and not file.exists():
        fix = f"name {' or '.join(others)}, or run dumo evaluate {typed(source)}"
        raise UserError(f"{source} was not judged as its own spec says: {fix}")
    return file
