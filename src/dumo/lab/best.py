"""What a budget buys: the tables and curves of the plans `best`, `best-latents` and `best-pixels`."""

from collections.abc import Sequence
from itertools import pairwise
from math import exp, log

from PIL import Image

from dumo.lab import chart
from dumo.lab.cell import Result
from dumo.lab.plan import Plan
from dumo.lab.table import Row, averaged, main_score, passes

Curve = list[tuple[float, float, float | None]]  # budget, distance, its deviation


def table(plan: Plan, results: list[Result]) -> list[Row]:
    """A row per arm, budget and number of passes.

    `even_at` is the budget at which an arm is as near in one pass as the first is at a budget of 1: read off between
    its own budgets, straight where both axes are logarithms; None beyond them.
    """
    rows = averaged(results)
    return [row | {"even_at": even(curve(rows, row["arm"]), level(rows)) if row["nfe"] == 1 else None} for row in rows]


def curve(rows: Sequence[Row], name: str, nfe: int = 1) -> Curve:
    """The curve of one arm."""
    score = main_score(rows[0])
    own = [row for row in rows if (row["arm"], row["nfe"]) == (name, nfe)]
    return sorted((row["budget"], row[score], row[f"{score}_sd"]) for row in own)


def level(rows: Sequence[Row], nfe: int = 1) -> float:
    """The distance of the first arm at a budget of 1."""
    return next(y for budget, y, _ in curve(rows, rows[0]["arm"], nfe) if budget == 1)


def even(points: Curve, to: float) -> float | None:
    """Where a curve comes down to this distance."""
    for (a, high, _), (b, low, _) in pairwise(points):
        if low <= to <= high and low < high:
            return exp(log(a) + log(b / a) * log(high / to) / log(high / low))
    return None


def charts(plan: Plan, table: list[Row]) -> dict[str, Image.Image]:
    """Distance against budget in one pass and in two, ours first, and where the paper's recipe is at a budget of 1."""
    names = list(dict.fromkeys(row["arm"] for row in table if not row["arm"].startswith("+")))
    paper, ours, *rivals = names
    steps = plan.at("laptop").steps
    return {
        f"{plan.name}-nfe{nfe}": chart.curves(
            f"What a budget buys, {passes(nfe)}",
            f"counted operations, over those of {steps:,} steps of {paper}",
            chart.axis(main_score(table[0])),
            {name: curve(table, name, nfe) for name in (ours, *sorted(rivals), paper)},
            level=(level(table, nfe), f"{paper} at 1"),
        )
        for nfe in (1, 2)
    }
