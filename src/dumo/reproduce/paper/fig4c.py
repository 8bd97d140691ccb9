"""Figure 4c: which times to train at, t ~ Beta(theta_1, theta_2), by the logarithm of the distance in one pass.

A large theta_1 moves mass to the noise, a large theta_2 to the data; equal ones are symmetric, (1, 1) is uniform.
"""

from collections.abc import Iterator
from itertools import product
from math import log
from typing import Any

from PIL import Image

from dumo.report.word import MERITS, word
from dumo.reproduce import arm, chart
from dumo.reproduce.arm import Arm
from dumo.reproduce.plan import Cell, Finished, Plan

THETAS = (0.5, 1.0, 1.5, 2.0, 2.4)  # ours: the text names (2, 2), Tab. 3 (1, 1) and (2.4, 2.4)
STEPS = 1500  # ours, for all 25 within a quarter of an hour
PAPER = {(2.0, 2.0): 4.06}  # Sec. 4.4: the lowest of its grid


def arms(recipe: str) -> Iterator[Arm]:
    """DuMo at every pair of thetas."""
    for a, b in product(THETAS, THETAS):
        times = f'objective.times={{"kind": "beta", "a": {a}, "b": {b}}}'
        labels = {"theta_1": a, "theta_2": b}
        yield Arm(f"beta-{a}-{b}", recipe, (times, "evaluate.nfe=[1]", "evaluate.contrast=[]"), labels)


def cells(scale: str) -> Iterator[Cell]:
    """On digits, as on ImageNet, every pair once and with as many steps: all cost the same."""
    return arm.equal_steps(
        list(arms("imagenet256-b2" if scale == "paper" else "digits")), scale, steps=None if scale == "paper" else STEPS
    )


def table(done: list[Finished]) -> list[dict[str, Any]]:
    """A row per pair: the distance, its logarithm, and the share of rows where one-step sampling is taught."""
    return [
        row | {"log": log(row[arm.measure(row)]), "paper_log_fid_b2_10k": PAPER.get((row["theta_1"], row["theta_2"]))}
        for row in arm.averaged(done, arm.far)
    ]


def charts(table: list[dict[str, Any]]) -> dict[str, Image.Image]:
    """The grid, theta_1 to the right, theta_2 upwards, in colours and numbers; the lowest is bold."""
    score = arm.measure(table[0])
    values = {(row["theta_1"], row["theta_2"]): log(row[score]) for row in table}
    scale = f"log of the {word(MERITS, score).title} (lower is better)"
    return {"fig4c": chart.heat("t ~ Beta(θ₁, θ₂), one pass", "θ₁", "θ₂", values, scale)}


PLAN = Plan("Law of times: Beta(theta_1, theta_2), one pass (Fig. 4c)", cells, table, charts=charts)
