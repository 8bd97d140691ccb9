"""Tables of the results of cells: a row per arm and number of passes, with means and deviations over seeds.

`average_by_arm` makes a table of results, `with_diverged_seeds` adds the seeds that it leaves out, `from_cells` makes
it again of the cells stored in a results.json, and `markdown` writes it. `main_score` is the score that a table leads
with; `main_score_of_names` chooses it among names. `group_by_arm`, `rows_of_all_passes` and `error_of_mean` are the
steps, for tables of other forms.
"""

from collections.abc import Callable, Collection, Sequence
from statistics import fmean, stdev
from typing import Any

from dumo.evaluation.metric import headline_score, metric
from dumo.lab.cell import Result, Row
from dumo.lab.plan import Cell


def group_by_arm(results: Sequence[Result]) -> list[list[Result]]:
    """The results of each arm, which differ in their seed alone."""
    arms: dict[str, list[Result]] = {}
    for result in results:
        arms.setdefault(result.cell.arm, []).append(result)
    return list(arms.values())


def average_by_arm(results: Sequence[Result], more_columns: Callable[[Result], Row] | None = None) -> list[Row]:
    """A row for each arm and number of passes: the arm's labels, and means over its seeds (`_average_rows`).

    `more_columns` makes further columns from the result of the arm's first seed.
    """
    table: list[Row] = []
    for results_of_arm in group_by_arm(results):
        first = results_of_arm[0]
        columns = dict(first.cell.labels)
        if more_columns:
            columns |= more_columns(first)
        rows_of_seeds = [rows_of_all_passes(result.report) for result in results_of_arm]
        for rows_of_passes in zip(*rows_of_seeds, strict=True):  # a row of each seed, of one number of passes
            table.append(columns | _average_rows(rows_of_passes))
    return table


def rows_of_all_passes(report: Row) -> list[Row]:
    """The rows of a report, one for each number of passes: by the run's solver, or, where that was not run, Euler's."""
    rows = list(report["results"])
    passes = {row["nfe"] for row in rows}
    for row in report["contrast"]:  # by Euler's method
        if row["nfe"] not in passes:
            rows.append(row)
    return rows


def _average_rows(rows: Sequence[Row]) -> Row:
    """The means over the rows of several seeds, which have one number of passes and one solver.

    The main score comes first, then `fd` where that is another, both with their standard deviations; `error` is the
    standard error of the main score's mean, where each row has an error. Other scores follow, None where a seed has
    none, and the number of seeds.
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

    It is taken from the scatter of the values or from their errors, whichever gives more: few seeds tell little of
    their scatter.
    """
    scatter = stdev(value for value, _ in points) if len(points) > 1 else 0.0
    return max(fmean(error**2 for _, error in points) ** 0.5, scatter) / len(points) ** 0.5


def from_cells(stored: Row) -> list[Row]:
    """Make the table of results.json again from its stored cells, with two columns more.

    They are `by_seed`, the row of each cell by its seed, and `protocol`, what judged them.
    """
    cells_by_arm: dict[str, dict[str, Row]] = {}
    for cell in stored["cells"]:
        arm, _, seed = cell["cell"].rpartition("-")
        cells_by_arm.setdefault(arm, {})[seed] = cell
    rows: list[Row] = []
    for cells in cells_by_arm.values():
        protocol = next(iter(cells.values()))["protocol"]
        rows_of_seeds = [rows_of_all_passes(cell) for cell in cells.values()]
        for rows_of_passes in zip(*rows_of_seeds, strict=True):
            by_seed = dict(zip(cells, rows_of_passes, strict=True))
            rows.append({**_average_rows(rows_of_passes), "by_seed": by_seed, "protocol": protocol})
    return [stored_row | row for stored_row, row in zip(stored["table"], rows, strict=True)]


def with_diverged_seeds(
    table: Sequence[Row], columns: Sequence[str], cells: Sequence[Cell], diverged: Collection[str]
) -> list[Row]:
    """The table with a column `diverged`: the seeds of each arm whose runs diverged, which its means leave out.

    `columns` are the plan's, by which arms differ, and `diverged` the names of the cells. An arm without a
    finished seed has no row. Where no row has such seeds, there is no column.
    """

    def arm_of(labels: Row) -> tuple[Any, ...]:
        return tuple(labels[name] for name in columns)

    seeds_by_arm: dict[tuple[Any, ...], list[str]] = {}
    for cell in cells:
        if cell.name in diverged:
            seeds_by_arm.setdefault(arm_of(cell.labels), []).append(str(cell.spec.train.seed))
    diverged_seeds = [", ".join(seeds_by_arm.get(arm_of(row), [])) for row in table]
    if not any(diverged_seeds):
        return list(table)
    return [row | {"diverged": seeds} for row, seeds in zip(table, diverged_seeds, strict=True)]


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
    head = list(table[0])
    lines = [head, ["---"] * len(head)]
    for row in table:
        lines.append([_cell_text(value) for value in row.values()])
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"# {title}\n\n{body}\n"


def _cell_text(value: object) -> str:
    """A value as a table shows it: a float by four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
