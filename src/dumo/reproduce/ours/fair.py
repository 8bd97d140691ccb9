"""Two heads or one? The ablation that the paper lacks: at the same law of times, the same metric and the same cost.

DuMo differs from MeanFlow in its heads, but also in where it trains: its jumps all end at the data, r = 0, and it makes
one on every row, where MeanFlow's end anywhere and three quarters of its rows have none, r = t. Here each is varied by
itself:

    law    of t: DuMo's on digits, the paper's, MeanFlow's
    jumps  end at the data, r = 0, or at a second time of the same law
    rows   with a jump: all of them, or a quarter, r = t on the others
    heads  two, v and u on every row; or one, which learns the velocity on the rows with r = t alone

All have plain l2; MeanFlow as it is, with its adaptive metric, stands beside them. `far` is P(t - r > 0.9), the share
of rows where one-step sampling is taught. One confound is left: r reaches a second head's output layer only, but the
whole trunk of a net with one head.
"""

import json
from collections.abc import Iterator
from itertools import product
from typing import Any

from PIL import Image

from dumo.reproduce import arm, chart
from dumo.reproduce.arm import Arm
from dumo.reproduce.plan import Cell, Finished, Plan

UNIFORM, BELL, LOW = "uniform", "Beta(2.4, 2.4)", "logit-normal(-0.4, 1)"
LAWS = {
    UNIFORM: {"kind": "uniform"},  # DuMo on digits
    BELL: {"kind": "beta", "a": 2.4, "b": 2.4},  # Tab. 3
    LOW: {"kind": "logit_normal", "mean": -0.4, "std": 1.0},  # MeanFlow, Tab. 4
}
TIMES = ((UNIFORM, "to data"), (BELL, "to data"), (LOW, "to data"), (UNIFORM, "between"), (LOW, "between"))
STEPS = 1500  # of DuMo; ours, for 63 cells within an hour on two cores
BETA, RATIO = 0.7, 0.75  # weight of v, Tab. 3; share of the rows without a jump, MeanFlow's Tab. 4


def times(law: str, jumps: str, rows: str) -> dict[str, Any]:
    """The law of (t, r)."""
    if (jumps, rows) == ("to data", "all"):
        return LAWS[law]
    end = {"to": {"kind": "uniform", "low": 0.0, "high": 0.0}} if jumps == "to data" else {}
    return {"kind": "pair", "of": LAWS[law], "velocity_ratio": 0.0 if rows == "all" else RATIO, **end}


def trained(law: str, jumps: str, rows: str, heads: str) -> dict[str, Any]:
    """The objective."""
    common = {"times": times(law, jumps, rows), "drop": 0.0, "guide": {}, "slope": {"kind": "dual"}}
    if heads == "one":
        return {"kind": "meanflow", "power": 0.0, **common}
    if (jumps, rows) == ("to data", "all"):
        return {"kind": "dumo", "beta": BETA, **common}
    parts = [{"kind": "velocity", "weight": BETA}, {"kind": "average", "weight": 1 - BETA}]
    return {"kind": "several", "parts": parts, **common}


def arms(scale: str) -> Iterator[Arm]:
    """Every combination, without guidance: on digits, or on the paper's B/2."""
    host, meanflow = (
        ("imagenet256-b2", "imagenet256-b2-meanflow") if scale == "paper" else ("digits", "digits-meanflow")
    )
    judged = ("evaluate.nfe=[1,2]", "evaluate.contrast=[]")
    for (law, jumps), rows, heads in product(TIMES, ("all", "a quarter"), ("two", "one")):
        solver = {"kind": "restart", "m": 0.5} if jumps == "to data" else {"kind": "hop"}
        sets = {"objective": trained(law, jumps, rows, heads), "sample.solver": solver}
        labels = {"law": law, "jumps": jumps, "rows": rows, "heads": heads}
        asked = (*(f"{name}={json.dumps(value)}" for name, value in sets.items()), *judged)
        yield Arm("-".join(labels.values()), host, asked, labels | {"metric": "l2"})
    labels = {"law": LOW, "jumps": "between", "rows": "a quarter", "heads": "one", "metric": "adaptive"}
    yield Arm("meanflow", meanflow, ("objective.drop=0", "objective.guide={}", *judged), labels)


def cells(scale: str) -> Iterator[Cell]:
    """On digits three seeds, at equal cost; at the paper's size once, for 10,000 steps each."""
    if scale == "paper":
        return arm.equal_steps(list(arms(scale)), scale)
    return arm.equal_cost(list(arms(scale)), scale, seeds=3, steps=STEPS)


def table(done: list[Finished]) -> list[dict[str, Any]]:
    """A row per combination and number of passes."""
    return list(arm.averaged(done, arm.far))


def charts(table: list[dict[str, Any]]) -> dict[str, Image.Image]:
    """A line per law, two heads and one on it, the best on top; a picture per number of passes."""
    drawn: dict[str, Image.Image] = {}
    score = arm.measure(table[0])
    for nfe in dict.fromkeys(row["nfe"] for row in table):
        points: dict[str, dict[str, tuple[float, float | None]]] = {}
        for row in sorted((row for row in table if row["nfe"] == nfe), key=lambda row: row[score]):
            line = f"{row['law']}, {row['jumps']}, on {row['rows']}"
            heads = f"{row['heads']} head{'s' * (row['heads'] == 'two')}"
            name = f"{heads}, MeanFlow's metric" if row["metric"] == "adaptive" else heads
            points.setdefault(line, {})[name] = row[score], row.get(f"{score}_sd")
        points = {line: dict(sorted(of.items(), reverse=True)) for line, of in points.items()}  # two heads first
        title = f"Two heads and one at the same times and cost, {nfe} pass{'es' * (nfe > 1)}"
        drawn[f"fair-nfe{nfe}"] = chart.dots(title, arm.axis(score), points)
    return drawn


PLAN = Plan("Two heads and one, at the same law of times and equal counted cost (ours)", cells, table, charts=charts)
