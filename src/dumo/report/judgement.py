"""The evaluations of a run for its HTML report.

`read_judgements` reads the evaluations of a run's weights. A `Judgement` is an evaluation with additional text for
the report. The template report.html.j2 uses this module as `judgement`, with the tables of `table_rows` and
`baseline_rows`. `dumo.report.score` compares and formats the scores.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dumo.config.place import EVALUATION_FILE, OTHER_EVALUATIONS
from dumo.config.word import BASELINES, merits, word
from dumo.report import score
from dumo.report.evaluation_card import is_card_of, read_report
from dumo.run.trained import TrainedRun

# An evaluation with the additional fields of `read_judgements`.
Judgement = dict[str, Any]
# The solver, the NFE, and the scores as text.
ResultRow = tuple[str, int, list[str]]


def read_judgements(trained: TrainedRun) -> list[Judgement]:
    """Return the evaluations of a run's weights with its current sampling settings, evaluation.json first.

    Each has these additional fields:

    - `name`: the file name
    - `columns`: the scores, with the main score first
    - `summary`: the scores of the summary
    - `words`: the titles of the scores
    - `sentence`: the comparison with a perfect sampler
    - `notes`: how the scores were measured
    - `biased`: the scores that the run was trained on
    """
    paths = [trained.find_output(EVALUATION_FILE), *sorted(trained.folder.glob(OTHER_EVALUATIONS))]
    judgements: list[Judgement] = []
    for path in paths:
        if not path.is_file():
            continue
        report = read_report(path)
        card = report["card"]
        if not is_card_of(card, trained):
            continue
        first_row = report["results"][0]
        columns = score.score_names(first_row, card)
        biased = score.trained_on_names(first_row, card)
        words = merits(columns)
        for name in biased:
            words[name] = replace(words[name], better=f"{words[name].better}; trained on")
        judgements.append(
            {
                **report,
                "name": path.name,
                "columns": columns,
                "summary": score.summary_names(columns),
                "sentence": score.verdict(report["results"], report["baselines"]),
                "notes": score.card_notes(card),
                "words": words,
                "biased": biased,
            }
        )
    return judgements


def table_rows(evaluation: Judgement, columns: Sequence[str]) -> list[list[ResultRow]]:
    """Return the rows of the results, and then those of the contrast, if there are any."""
    groups: list[list[ResultRow]] = []
    for part in (evaluation["results"], evaluation["contrast"]):
        group = [(row["solver"], row["nfe"], [score.score_text(row, name) for name in columns]) for row in part]
        if group:
            groups.append(group)
    return groups


def baseline_rows(evaluation: Judgement, columns: Sequence[str]) -> list[tuple[str, str, list[str]]]:
    """Return a row for each baseline: its title, its meaning, and its scores `columns` as text, "" if it lacks one."""
    rows: list[tuple[str, str, list[str]]] = []
    for name, scores in score.baselines_by_name(evaluation).items():
        words = word(BASELINES, name)
        cells = [score.score_text(scores, column) if column in scores else "" for column in columns]
        rows.append((words.title, words.meaning, cells))
    return rows
