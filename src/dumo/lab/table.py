"""Tables: a row per arm and number of passes, with means and deviations over seeds. Trains and draws nothing."""

from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import Any

from dumo.evaluation.protocol import headline
from dumo.lab.cell import Result

Row = dict[str, Any]


def by_arm(results: Sequence[Result]) -> list[list[Result]]:
    """The results of each arm, which differ in their seed alone."""
    found: dict[str, list[Result]] = {}
    for one in results:
        found.setdefault(one.cell.name.rpartition("-")[0], []).append(one)
    return list(found.values())


def averaged(results: Sequence[Result], more: Callable[[Result], Row] = lambda one: {}) -> list[Row]:
    """A row per arm and number of passes: its columns, `more` of its first seed, means over seeds, one sd."""
    return [
        same[0].cell.labels | more(same[0]) | over_seeds(rows)
        for same in by_arm(results)
        for rows in zip(*(by_passes(one.report) for one in same), strict=True)
    ]


def by_passes(report: Row) -> list[Row]:
    """The rows of a report by number of passes; Euler's where there is no other."""
    known = {row["nfe"] for row in report["results"]}
    return [*report["results"], *(row for row in report["contrast"] if row["nfe"] not in known)]


def over_seeds(rows: Sequence[Row]) -> Row:
    """One row of equal rows of several seeds: the main score first, then `fd` where that is another, each with sd."""
    names = [key for key in rows[0] if key not in ("nfe", "solver") and not key.endswith("_sd")]
    main = [name for name in dict.fromkeys((headline(names), "fd")) if name in names]
    found: Row = {"nfe": rows[0]["nfe"], "solver": rows[0]["solver"]}
    for name in main:
        values = [row[name] for row in rows]
        found |= {name: fmean(values), f"{name}_sd": stdev(values) if len(values) > 1 else None}
    return {**found, **{n: fmean(row[n] for row in rows) for n in names if n not in main}, "seeds": len(rows)}


def from_cells(stored: Row) -> list[Row]:
    """The table of stored results, its deviations taken from their cells: older tables lack those of the main score."""
    arms: dict[str, list[Row]] = {}
    for cell in stored["cells"]:
        arms.setdefault(cell["cell"].rpartition("-")[0], []).append(cell)
    rows = [over_seeds(same) for of in arms.values() for same in zip(*map(by_passes, of), strict=True)]
    return [row | again for row, again in zip(stored["table"], rows, strict=True)]


def main_score(row: Row) -> str:
    """The main score of an averaged row: what a file holds, or the first that has a deviation."""
    return headline([key for key in row if f"{key}_sd" in row or key == "fd_grey"])


def markdown(title: str, table: Sequence[Row]) -> str:
    """The table as Markdown."""
    head = list(table[0])
    rows = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in table]
    lines = [head, ["---"] * len(head), *rows]
    return f"# {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def passes(n: int) -> str:
    """A number of passes in words."""
    return f"{n} pass{'es' * (n > 1)}"
