"""Figure 4a: how much to spend on the velocity. DuMo weighs its loss on every row, MeanFlow sets rows aside for it."""

from collections.abc import Iterator
from typing import Any

from PIL import Image

from dumo.reproduce import arm, chart
from dumo.reproduce.arm import Arm
from dumo.reproduce.plan import Cell, Finished, Plan

BETAS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)  # ours, as the next: the text does not name the points
RATIOS = (0.0, 0.25, 0.5, 0.75, 0.9)
STEPS = 2000  # of DuMo; ours, for 22 cells within twenty minutes
PAPER = {"DuMo": 63.86, "MeanFlow": 76.04}  # Sec. 4.4: the lowest of each curve


def arms(dumo: str, meanflow: str) -> Iterator[Arm]:
    """Both objectives on recipes, at every share: beta of DuMo, the velocity ratio of MeanFlow."""
    one_pass = ("evaluate.nfe=[1]", "evaluate.contrast=[]")
    for title, recipe, field, shares in (
        ("DuMo", dumo, "objective.beta", BETAS),
        ("MeanFlow", meanflow, "objective.times.velocity_ratio", RATIOS),
    ):
        for share in shares:
            labels = {"objective": title, "share_on_velocity": share}
            yield Arm(f"{title.lower()}-{share}", recipe, (f"{field}={share}", *one_pass), labels)


def cells(scale: str) -> Iterator[Cell]:
    """On digits, two seeds at equal cost; at the paper's size, B/2 for 10,000 steps each."""
    if scale == "paper":
        return arm.equal_steps(list(arms("imagenet256-b2", "imagenet256-b2-meanflow")), scale)
    return arm.equal_cost(list(arms("digits", "digits-meanflow")), scale, seeds=2, steps=STEPS)


def table(done: list[Finished]) -> list[dict[str, Any]]:
    """A row per objective and share; the paper's number is the best of its curve, an FID at another size."""
    return [row | {"paper_best_fid_b2_10k": PAPER[row["objective"]]} for row in arm.averaged(done)]


def charts(table: list[dict[str, Any]]) -> dict[str, Image.Image]:
    """Two curves, share on the velocity to the right, distance upwards."""
    score = arm.measure(table[0])
    points: dict[str, list[tuple[float, float, float | None]]] = {}
    for row in table:
        of = "β of its loss" if row["objective"] == "DuMo" else "velocity ratio of its rows"
        point = row["share_on_velocity"], row[score], row.get(f"{score}_sd")
        points.setdefault(f"{row['objective']}, {of}", []).append(point)
    return {"fig4a": chart.curves("Share on the velocity, one pass", "share on the velocity", arm.axis(score), points)}


PLAN = Plan(
    "Share on the velocity: beta of DuMo, velocity ratio of MeanFlow, one pass (Fig. 4a)", cells, table, charts=charts
)
