"""Tables of the results of cells: a row per arm and number of passes.

`ranked_table` is the default table, with means over seeds and how each arm compares with the best. `with_failed_seeds`
adds the seeds that the means leave out, and `markdown` writes a table. `average_rows`, `rows_of_all_passes` and
`error_of_mean` also serve the tables of the pages, which docs/tables.py makes of stored results.
"""

from collections.abc import Callable, Collection, Sequence
from statistics import fmean, stdev
from typing import Any

from dumo.evaluation.metric import headline_score, higher_is_better, metric
from dumo.lab.cell import Result, Row
from dumo.lab.plan import Cell
from dumo.lab.ranking import ArmScore, is_level, paired_difference


def group_by_arm(results: Sequence[Result]) -> list[list[Result]]:
    """The results of each arm, which differ in their seed alone."""
    arms: dict[str, list[Result]] = {}
    for result in results:
        arms.setdefault(result.cell.arm, []).append(result)
    return list(arms.values())


def ranked_table(results: Sequence[Result]) -> list[Row]:
    """A row for each arm and number of passes: means over seeds, and how the arm compares with the best one.

    `best` is * for the best arm and for those not significantly worse. `behind` is the mean difference from the best
    arm, seed by seed, and `margin` half the width of its 95 % confidence interval; both are None for the best arm, and
    with fewer than two seeds. Arms are compared at equal passes, protocol and budget. They are not ranked if a higher
    score is better, or if an arm has one seed and its score no standard error.
    """
    table: list[Row] = []
    # The rows that are compared with each other: the place of each in the table, and its score.
    rivals: dict[tuple[Any, ...], list[tuple[int, ArmScore | None]]] = {}
    for results_of_arm in group_by_arm(results):
        cell = results_of_arm[0].cell
        rows_by_seed = [rows_of_all_passes(result.report) for result in results_of_arm]
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
            rivals.setdefault(key, []).append((len(table), _arm_score(results_of_arm, rows, score)))
            table.append({**cell.labels, **columns, **averages})

    # Mark the best of each comparison and those not significantly worse.
    for places_and_arms in rivals.values():
        arms = {place: arm for place, arm in places_and_arms if arm is not None}
        if len(arms) < len(places_and_arms):
            continue
        best_place = min(arms, key=lambda place: arms[place].mean)
        best = arms[best_place]
        for place, arm in arms.items():
            table[place]["best"] = "*" if is_level(arm, best) else ""
            difference = paired_difference(arm.by_seed, best.by_seed)
            if place != best_place and difference is not None:
                table[place]["behind"] = difference.mean
                table[place]["margin"] = difference.margin
    return table


def _arm_score(results: Sequence[Result], rows: Sequence[Row], score: str) -> ArmScore | None:
    """The score of an arm, from the row of each of its results; None if it cannot be ranked by this score."""
    has_errors = all(f"{score}_sd" in row for row in rows) and not metric(score).sd_is_spread
    if higher_is_better(score) or (len(rows) == 1 and not has_errors):
        return None
    by_seed: dict[str, float] = {}
    for result, row in zip(results, rows, strict=True):
        by_seed[str(result.cell.spec.train.seed)] = row[score]
    return ArmScore(by_seed, error_of_mean([(row[score], row[f"{score}_sd"] if has_errors else 0.0) for row in rows]))


def average_by_arm(results: Sequence[Result], more_columns: Callable[[Result], Row] | None = None) -> list[Row]:
    """A row for each arm and number of passes: the arm's labels, and means over its seeds (`average_rows`).

    `more_columns` makes further columns from the result of the arm's first seed.
    """
    table: list[Row] = []
    for results_of_arm in group_by_arm(results):
        first = results_of_arm[0]
        columns = dict(first.cell.labels)
        if more_columns:
            columns |= more_columns(first)
        rows_of_seeds = [rows_of_all_passes(result.report) for result in results_of_arm]
        for rows_of_passes in zip(*rows_of_seeds, strict=True):
            table.append(columns | average_rows(rows_of_passes))
    return table


def rows_of_all_passes(report: Row) -> list[Row]:
    """The rows of a report, one for each number of passes: by the run's solver, or by Euler's where it was not run."""
    rows = list(report["results"])
    passes = {row["nfe"] for row in rows}
    for row in report["contrast"]:
        if row["nfe"] not in passes:
            rows.append(row)
    return rows


def average_rows(rows: Sequence[Row]) -> Row:
    """The means over the rows of several seeds, which have one number of passes and one solver.

    The main score comes first, then `fd` if that is another one, both with their standard deviations; `error` is the
    standard error of the main score's mean, if each row has an error. Other scores follow, None if a seed has none, and
    the number of seeds.
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
    """The standard error of the mean of `points`, each a value and its own standard error.

    It is the larger of two estimates, from the scatter of the values and from their errors, since few seeds say little
    about their scatter.
    """
    scatter = stdev(value for value, _ in points) if len(points) > 1 else 0.0
    return max(fmean(error**2 for _, error in points) ** 0.5, scatter) / len(points) ** 0.5


def with_failed_seeds(
    table: Sequence[Row], columns: Sequence[str], cells: Sequence[Cell], failed: Collection[str]
) -> list[Row]:
    """The table with a column `failed`: the seeds of each arm whose runs failed, which its means leave out.

    `columns` are the plan's, by which arms differ, and `failed` the names of the cells. An arm without a finished seed
    has no row.
    """

    def arm_of(labels: Row) -> tuple[Any, ...]:
        return tuple(labels[name] for name in columns)

    seeds_by_arm: dict[tuple[Any, ...], list[str]] = {}
    for cell in cells:
        if cell.name in failed:
            seeds_by_arm.setdefault(arm_of(cell.labels), []).append(str(cell.spec.train.seed))
    return [row | {"failed": ", ".join(seeds_by_arm.get(arm_of(row), []))} for row in table]


def main_score(row: Row) -> str:
    """The main score of an averaged row. Scores that are None do not count."""
    return main_score_of_names([key for key, value in row.items() if value is not None and f"{key}_sd" in row])


def main_score_of_names(scores: Sequence[str]) -> str:
    """The main score among these names: `class_mmd`, else `mmd`, else the protocol's (`headline_score`)."""
    for name in ("class_mmd", "mmd"):
        if name in scores:
            return name
    return headline_score(scores)


def markdown(title: str, table: Sequence[Row]) -> str:
    """The table as Markdown."""
    columns = list(dict.fromkeys(name for row in table for name in row))
    lines = [columns, ["---"] * len(columns)]
    for row in table:
        lines.append([_cell_text(row.get(name)) for name in columns])
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"# {title}\n\n{body}\n"


def _cell_text(value: object) -> str:
    """A value as a table shows it: a float with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
