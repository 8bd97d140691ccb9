"""Tabulate the results of cells, with a row per arm and NFE.

`ranked_table` is the default table: means over seeds, and each arm's difference from the best one. `with_failed_seeds`
adds a column of failed seeds, and `markdown` formats a table. docs/tables.py uses `average_rows`, `rows_of_all_nfes`
and `error_of_mean` for tables of stored results.
"""

from collections.abc import Callable, Collection, Sequence
from statistics import fmean, stdev
from typing import Any

from dumo.evaluation.metric import headline_score, higher_is_better, metric
from dumo.lab.cell import Result, Row
from dumo.lab.experiment import Cell
from dumo.lab.ranking import ArmScore, is_tied, paired_difference


def group_by_arm(results: Sequence[Result]) -> list[list[Result]]:
    """Group results that differ only in their seed."""
    arms: dict[str, list[Result]] = {}
    for result in results:
        arms.setdefault(result.cell.arm, []).append(result)
    return list(arms.values())


def ranked_table(results: Sequence[Result]) -> list[Row]:
    """Average over the seeds of each arm and NFE, and compare each arm with the best one.

    `best` is * for the best arm and arms not significantly worse. `behind` is the mean difference from the best arm,
    paired by seed, and `margin` half the width of its 95 % confidence interval; both are None for the best arm and for
    fewer than two seeds. Arms are compared at equal NFE, protocol and budget. They are not ranked if a higher score is
    better, or if an arm has only one seed and its score has no standard error.
    """
    table: list[Row] = []
    # The table index and score of each row, grouped by NFE, protocol and budget.
    groups: dict[tuple[Any, ...], list[tuple[int, ArmScore | None]]] = {}
    for results_of_arm in group_by_arm(results):
        cell = results_of_arm[0].cell
        rows_by_seed = [rows_of_all_nfes(result.report) for result in results_of_arm]
        for rows in zip(*rows_by_seed, strict=True):
            averages = average_rows(rows)
            score = main_score(averages)
            columns: Row = {
                "nfe": averages["nfe"],
                "best": "",
                score: averages[score],
                "behind": None,
                "margin": None,
            }
            key = (averages["nfe"], cell.spec.evaluate.protocol.kind, cell.labels.get("budget"))
            groups.setdefault(key, []).append((len(table), _arm_score(results_of_arm, rows, score)))
            table.append({**cell.labels, **columns, **averages})

    # Mark the best arm of each group and the arms that are not significantly worse.
    for group in groups.values():
        arms = {index: arm for index, arm in group if arm is not None}
        if len(arms) < len(group):
            continue
        best_index = min(arms, key=lambda index: arms[index].mean)
        best = arms[best_index]
        for index, arm in arms.items():
            table[index]["best"] = "*" if is_tied(arm, best) else ""
            difference = paired_difference(arm.by_seed, best.by_seed)
            if index != best_index and difference is not None:
                table[index]["behind"] = difference.mean
                table[index]["margin"] = difference.margin
    return table


def _arm_score(results: Sequence[Result], rows: Sequence[Row], score: str) -> ArmScore | None:
    """Return the score of an arm from the rows of its results; None if arms cannot be ranked by this score."""
    has_errors = all(f"{score}_sd" in row for row in rows) and not metric(score).sd_is_spread
    if higher_is_better(score) or (len(rows) == 1 and not has_errors):
        return None
    by_seed: dict[str, float] = {}
    for result, row in zip(results, rows, strict=True):
        by_seed[str(result.cell.spec.train.seed)] = row[score]
    return ArmScore(by_seed, error_of_mean([(row[score], row[f"{score}_sd"] if has_errors else 0.0) for row in rows]))


def average_by_arm(results: Sequence[Result], more_columns: Callable[[Result], Row] | None = None) -> list[Row]:
    """Return the labels and means over seeds (`average_rows`) of each arm and NFE.

    `more_columns` computes additional columns from the result of the arm's first seed.
    """
    table: list[Row] = []
    for results_of_arm in group_by_arm(results):
        first = results_of_arm[0]
        columns = dict(first.cell.labels)
        if more_columns:
            columns |= more_columns(first)
        rows_by_seed = [rows_of_all_nfes(result.report) for result in results_of_arm]
        for rows in zip(*rows_by_seed, strict=True):
            table.append(columns | average_rows(rows))
    return table


def rows_of_all_nfes(report: Row) -> list[Row]:
    """Return one row of a report per NFE: with the run's solver if it was evaluated, otherwise with Euler's."""
    rows = list(report["results"])
    nfes = {row["nfe"] for row in rows}
    for row in report["contrast"]:
        if row["nfe"] not in nfes:
            rows.append(row)
    return rows


def average_rows(rows: Sequence[Row]) -> Row:
    """Average rows of several seeds with equal NFE and solver.

    The main score and `fd` come first, with their standard deviations. `error` is the standard error of the main
    score's mean, if all rows have a standard error. A mean is None if the score of a seed is None.
    """
    names = [key for key in rows[0] if key not in ("nfe", "solver") and not key.endswith("_sd")]
    main = main_score_of_names(names)
    with_deviation = [name for name in dict.fromkeys((main, "fd")) if name in names]
    averages: Row = {"nfe": rows[0]["nfe"], "solver": rows[0]["solver"]}
    for name in with_deviation:
        values = [row[name] for row in rows]
        averages[name] = fmean(values)
        averages[f"{name}_sd"] = stdev(values) if len(values) > 1 else None
    has_errors = all(f"{main}_sd" in row for row in rows)
    if has_errors and not metric(main).sd_is_spread:
        averages["error"] = error_of_mean([(row[main], row[f"{main}_sd"]) for row in rows])
    for name in names:
        if name not in with_deviation:
            values = [row[name] for row in rows]
            averages[name] = None if None in values else fmean(values)
    averages["seeds"] = len(rows)
    return averages


def error_of_mean(points: Sequence[tuple[float, float]]) -> float:
    """Return the standard error of the mean of `points`, pairs of a value and its standard error.

    It is the larger of two estimates, from the scatter of the values and from their errors, since the scatter of few
    seeds is unreliable.
    """
    scatter = stdev(value for value, _ in points) if len(points) > 1 else 0.0
    return max(fmean(error**2 for _, error in points) ** 0.5, scatter) / len(points) ** 0.5


def with_failed_seeds(
    table: Sequence[Row], columns: Sequence[str], cells: Sequence[Cell], failed: Collection[str]
) -> list[Row]:
    """Add the column `failed` with each arm's failed seeds, which its means exclude.

    `columns` are the plan's columns, which identify an arm, and `failed` the names of failed cells.
    """

    def arm_key(labels: Row) -> tuple[Any, ...]:
        return tuple(labels[name] for name in columns)

    seeds_by_arm: dict[tuple[Any, ...], list[str]] = {}
    for cell in cells:
        if cell.name in failed:
            seeds_by_arm.setdefault(arm_key(cell.labels), []).append(str(cell.spec.train.seed))
    return [row | {"failed": ", ".join(seeds_by_arm.get(arm_key(row), []))} for row in table]


def main_score(row: Row) -> str:
    """Return the name of the main score of an averaged row, ignoring scores that are None."""
    return main_score_of_names([key for key, value in row.items() if value is not None and f"{key}_sd" in row])


def main_score_of_names(scores: Sequence[str]) -> str:
    """Return the main score among these names: `class_mmd`, else `mmd`, else the protocol's (`headline_score`)."""
    for name in ("class_mmd", "mmd"):
        if name in scores:
            return name
    return headline_score(scores)


def markdown(title: str, table: Sequence[Row]) -> str:
    """Format a table as Markdown."""
    columns = list(dict.fromkeys(name for row in table for name in row))
    lines = [columns, ["---"] * len(columns)]
    for row in table:
        lines.append([_cell_text(row.get(name)) for name in columns])
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"# {title}\n\n{body}\n"


def _cell_text(value: object) -> str:
    """Format a value for a table, with four digits if it is a float."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
