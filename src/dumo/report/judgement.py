"""The evaluations of a run as its page shows them: read from files, and set out in tables.

`read_judgement` reads a run's evaluation.json, and `read_benchmarks` its other evaluations. A `Judgement` is an
evaluation with what a page says of it. The template of the page, report.html.j2, calls this file by the name
`judgement`, and sets one out by `table_rows`, `baseline_rows` and `words_of`.

`objectives_table` compares a run with packaged results, whose name `shipped_results` finds.

What the scores themselves say is in `dumo.report.score`, which also says what a row is.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import Any

from dumo.config.conditions import shown_data
from dumo.config.place import EVALUATION_FILE
from dumo.config.word import BASELINES, MERITS, Word, merits, word
from dumo.data import Data
from dumo.evaluation import MetricProtocol
from dumo.io.read import read_json
from dumo.report.card import Row, is_card_of, validate_report
from dumo.report.score import (
    ERROR_SUFFIX,
    card_notes,
    error,
    first_score,
    row_name,
    score_names,
    score_text,
    spread,
    state_sentence,
    summary_names,
    trained_on_names,
)
from dumo.run.weights import RunFolder
from dumo.runtime import shell_path

SHIPPED_RESULTS = {  # names of results, by the kind of the protocol and of the data as they are shown
    ("digits", "digits"): "zoo",
    ("toy", "moons"): "fig3",
    ("cifar10-features", "images"): "latents",
}
BENCHMARK_NAMES = ("clip",)  # in the names of the evaluations, besides the run's own, that a page shows

Judgement = dict[str, Any]  # an evaluation with what a page says of it, as `read_judgement` returns it
ResultRow = tuple[str, int, list[str]]  # the solver, the number of passes, the scores as text


def read_judgement(opened: RunFolder) -> Judgement | None:
    """The evaluation that `dumo evaluate` wrote into a run's folder, with what a page says of it; None without one.

    - `fresh`: whether it is of these weights, sampled as the run samples now
    - `columns`: its scores, the one that leads first; `summary`: some of them; `words`: what they are called
    - `sentence`: on where the run stands; `notes`: on how it was measured (`card_notes`)
    - `biased`: the scores that the run was trained on
    - `baseline`: the first baseline

    Raises UserError if the file is damaged.
    """
    path = opened.find_output(EVALUATION_FILE)
    if not path.is_file():
        return None
    fix = f"run dumo evaluate {shell_path(path.parent)} again"
    evaluation = validate_report(read_json(path, fix), path, fix)
    card = evaluation.get("card") or {}
    first_row = evaluation["results"][0]
    columns = score_names(first_row, card)
    biased_columns = trained_on_names(first_row, card)
    words = merits(columns)
    for name in biased_columns:
        words[name] = replace(words[name], better=f"{words[name].better}; trained on")
    return {
        **evaluation,
        "columns": columns,
        "summary": summary_names(columns),
        "sentence": state_sentence(evaluation),
        "notes": card_notes(card),
        "fresh": is_card_of(card, opened),
        "words": words,
        "biased": biased_columns,
        "baseline": _first_baseline(evaluation, columns[0]),
    }


def read_benchmarks(opened: RunFolder) -> list[Judgement]:
    """The evaluations by BENCHMARK_NAMES of what the run samples now, each with its `columns`, `words` and `rows`.

    Raises UserError where a file is damaged.
    """
    folder = opened.output_folder
    judgements: list[Judgement] = []
    for path in sorted(folder.glob("evaluation-*.json")):
        if path.name.split("-")[1] not in BENCHMARK_NAMES:
            continue
        fix = f"remove it, or run dumo evaluate {shell_path(folder)} again"
        evaluation = validate_report(read_json(path, fix), path, fix)
        if is_card_of(evaluation.get("card") or {}, opened):
            columns = score_names(evaluation["results"][0])
            rows = table_rows(evaluation, columns)
            judgements.append({**evaluation, "columns": columns, "words": merits(columns), "rows": rows})
    return judgements


def table_rows(evaluation: Judgement, columns: Sequence[str]) -> list[list[ResultRow]]:
    """The rows of the results, and then those of the contrast, as far as there are any."""
    groups: list[list[ResultRow]] = []
    for part in (evaluation["results"], evaluation["contrast"]):
        group: list[ResultRow] = []
        for row in part:
            cells = [score_text(row, name) for name in columns]
            group.append((row["solver"], row["nfe"], cells))
        if group:
            groups.append(group)
    return groups


def _first_baseline(evaluation: Judgement, lead: str) -> Judgement | None:
    """The first baseline with its `title`, its `mean` and `sd` those of the score `lead`; None without baselines."""
    for name, scores in evaluation["baselines"].items():
        baseline = {"title": word(BASELINES, name).title, **scores}
        if lead in scores:
            baseline["mean"] = scores[lead]
            baseline["sd"] = scores[lead + ERROR_SUFFIX]
        return baseline
    return None


def baseline_rows(evaluation: Judgement, columns: Sequence[str]) -> list[tuple[str, str, list[str]]]:
    """A row for each baseline: its title, its meaning, and its scores `columns` as text."""
    rows: list[tuple[str, str, list[str]]] = []
    for name in evaluation["baselines"]:
        words = word(BASELINES, name)
        rows.append((words.title, words.meaning, baseline_cells(evaluation, name, columns)))
    return rows


def baseline_cells(evaluation: Judgement, name: str, columns: Sequence[str]) -> list[str]:
    """The scores `columns` of the baseline `name` as text, "" where it lacks one."""
    scores = evaluation["baselines"][name]
    lead = first_score(evaluation["results"][0])
    texts: list[str] = []
    for column in columns:
        if column == lead:
            texts.append(spread(scores["mean"], scores["sd"]))
        elif column in scores:
            texts.append(score_text(scores, column))
        else:
            texts.append("")
    return texts


def words_of(evaluation: Judgement, columns: Iterable[str]) -> list[Word]:
    """The titles and meanings of the scores `columns`."""
    return [evaluation["words"][name] for name in columns]


def shipped_results(protocol: MetricProtocol, data: Data) -> str | None:
    """The name of the packaged results by this protocol on data of this kind; None where there are none."""
    return SHIPPED_RESULTS.get((protocol.kind, shown_data(data).kind))


def objectives_table(results: Row, evaluation: Judgement | None, step: int, cost: float) -> Row:
    """Packaged results as a table with a row per objective, and the run's own if it was judged alike.

    The best in the fewest passes comes first. A row has a `name`, `steps`, `cost` of a step, whether it is the run's
    `own`, and by number of passes its score, `lead`, and `error`. Besides `rows` there are

    - `times`: the cost of the run's training over that of an objective's, which is equal for all of them
    - `unseen`: the number of images, never trained on, that the objectives are judged against and the run is not
    - `alike`: whether the run was judged alike

    `cost` is that of the run's step, in forward passes.
    """
    table = results["table"]
    first_cell = (results.get("cells") or [{}])[0]
    lead = next(name for name in MERITS if name in table[0])
    by_objective: dict[str, Row] = {}
    for row in table:
        name = row_name(row)
        velocity_ratio = row.get("velocity_ratio")
        if velocity_ratio is not None:
            name += f", velocity ratio {velocity_ratio:g}"
        objective = by_objective.setdefault(name, _objective_row(name, row["steps"], row.get("F_per_step")))
        nfe = row.get("nfe", 1)
        objective["lead"][nfe] = row[lead]
        objective["error"][nfe] = row.get("error")
    passes = sorted({nfe for row in by_objective.values() for nfe in row["lead"]})

    is_alike = evaluation is not None and _is_judged_as(evaluation, first_cell, lead)
    if evaluation and is_alike:
        run_row = _objective_row("this run", step, cost, is_own=True)
        for row in evaluation["results"]:
            nfe = row["nfe"]
            if nfe in passes:
                run_row["error"][nfe] = error(row, lead)
                if row.get(lead) is not None:
                    run_row["lead"][nfe] = row[lead]
        by_objective["this run"] = run_row

    objective_step_cost = table[0].get("F_per_step")
    times = None
    if objective_step_cost:
        times = step * cost / (table[0]["steps"] * objective_step_cost)
    unseen = _num_held_out(first_cell)
    if unseen == _num_held_out(evaluation or {}):
        unseen = 0
    return {
        "title": results["title"],
        "origin": results.get("origin", {}),
        "word": word(MERITS, lead),
        "passes": passes,
        "rows": sorted(by_objective.values(), key=lambda row: [row["lead"].get(nfe, inf) for nfe in passes]),
        "alike": is_alike,
        "times": times,
        "unseen": unseen,
    }


def _is_judged_as(evaluation: Judgement, cell: Row, lead: str) -> bool:
    """Whether a run was judged as a cell of packaged results was, by a score `lead` that it was not trained on."""
    return (
        evaluation["fresh"]
        and evaluation["protocol"] == cell.get("protocol")
        and lead in evaluation["results"][0]
        and lead not in evaluation["biased"]
        and _has_reference_of(evaluation, cell)
    )


def _has_reference_of(evaluation: Judgement, cell: Row) -> bool:
    """Whether a run was compared with the images that a cell was, where the cell's are from files.

    Of digits the cells hold some out, and a run need not: the page says so (`unseen`).
    """
    cell_card = cell.get("card") or {}
    if cell_card.get("data", {}).get("kind") != "images":
        return True
    card = evaluation.get("card") or {}
    return card.get("reference_sha256") == cell_card["reference_sha256"]


def _num_held_out(evaluation: Mapping[str, Any]) -> int:
    """The number of images of the data that were held out of training; 0 where the card does not say."""
    return (evaluation.get("card") or {}).get("data", {}).get("held", 0)


def _objective_row(name: str, steps: int, cost: float | None, *, is_own: bool = False) -> Row:
    """A row of `objectives_table`, without its scores."""
    return {"name": name, "steps": steps, "cost": cost, "own": is_own, "lead": {}, "error": {}}
