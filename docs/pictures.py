"""Draw pictures of the pages again; needs $DUMO_DATA/cifar10.

    python docs/pictures.py [NAME ...]    # front, charts; default: all

`draw_front` draws front.png, samples of the two trained models that ship with dumo. `draw_charts` draws the charts of
the measured numbers that are stored in docs/results. Other pictures of the pages are screenshots, or show networks that
are not kept.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure, SubFigure
from PIL import Image
from tables import Row, read_results
from torch import Tensor

from dumo.flow.sampling import labels_in_turn
from dumo.io import picture
from dumo.lab.experiment import Plan, read_plan
from dumo.lab.reproduce import VIEWS, View
from dumo.lab.result_table import main_score
from dumo.report import chart
from dumo.run.judge import reference_data
from dumo.run.trained import TrainedRun
from dumo.run.weights import load_run
from dumo.runtime.formatting import nfe_text

DOCS = Path(__file__).parent
CHARTED = ("best", "fair", "fig4a", "fig4c", "scaling", "stages", "stages-latents", "zoo")
NUM_CLASSES = 10  # of digits and of CIFAR-10
DIGITS = tuple("0123456789")
CIFAR = ("airplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NUM_TEST_IMAGES = 1000  # among which the first of each class is shown


# ------------------------------------------------------------------------------------------------------------ front.png


def sample_each_class(trained: TrainedRun, *passes: int) -> dict[str, Tensor]:
    """Samples by each number of passes, one of each class, from the first seeds: samples are not cherry-picked."""
    labels = labels_in_turn(NUM_CLASSES, NUM_CLASSES)
    return {nfe_text(n): trained.make_samples(labels, nfe=n).x for n in passes}


def first_of_each_class(trained: TrainedRun) -> Tensor:
    """The first real image of each class among some of the test images."""
    x, c = reference_data(trained.spec.data, "test").reference(NUM_TEST_IMAGES, seed=0)
    first_rows = [int((c == label).nonzero()[0]) for label in range(NUM_CLASSES)]
    return x[torch.tensor(first_rows)]


def draw_panel(panel: SubFigure, title: str, class_names: Sequence[str], images_by_row: dict[str, Tensor]) -> None:
    """Draw a row of images for each name of `images_by_row`, with a column for each class."""
    panel.suptitle(title, weight="bold")
    axes_grid = panel.subplots(4, NUM_CLASSES, squeeze=False)
    for axes in axes_grid.flat:
        axes.set(xticks=[], yticks=[], frame_on=False)
    for axes_row, (name, images) in zip(axes_grid, images_by_row.items(), strict=True):
        axes_row[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for axes, pixels in zip(axes_row, picture.to_rows(images), strict=True):
            axes.imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=255)
    for axes, name in zip(axes_grid[0], class_names, strict=True):
        axes.set_title(name, size="small")


def draw_front() -> None:
    """Draw samples of both models side by side, into front.png."""
    digits = load_run("digits-trained", device="cpu")
    cifar = load_run("cifar10-trained", device="cpu")
    figure = Figure((16, 4), dpi=100, layout="constrained")
    left, right = figure.subfigures(1, 2)
    draw_panel(left, "Digits, 8 × 8", DIGITS, sample_each_class(digits, 1, 2, 4, 50))
    cifar_images = {"real": first_of_each_class(cifar), **sample_each_class(cifar, 1, 2, 4)}
    draw_panel(right, "CIFAR-10, 32 × 32", CIFAR, cifar_images)
    figure.savefig(DOCS / "front.png")


# --------------------------------------------------------------------------------------------------------------- charts


def draw_charts() -> None:
    """Draw the charts of stored results whose picture is in docs. To add one, put an empty file NAME.png there."""
    for name in CHARTED:
        plan = read_plan(name)
        table = read_results(name)["table"]
        if name == "best":
            charts = budget_charts(plan, table, (1, 2))
        elif name == "scaling":
            charts = budget_charts(plan, table, (1, 2, 4, 50))
        elif name == "fair":
            charts = {"fair-nfe1": fair_chart(table)}
        else:
            charts = VIEWS.get(name, View()).make_charts(plan, table)
        for chart_name, image in charts.items():
            path = DOCS / f"{chart_name}.png"
            if path.exists():
                picture.write_picture(path, image)


def budget_charts(plan: Plan, table: Sequence[Row], passes: Sequence[int]) -> dict[str, Image.Image]:
    """Distance against budget, a chart per number of passes; a dashed line is the first arm at a budget of 1.

    Arms whose name begins with + are left out.
    """
    score = main_score(table[0])
    first_arm = table[0]["arm"]
    (unit_steps,) = {row["steps"] for row in table if (row["arm"], row["budget"]) == (first_arm, 1)}
    charts: dict[str, Image.Image] = {}
    for nfe in passes:
        curves: dict[str, list[chart.CurvePoint]] = {}
        for row in sorted(table, key=lambda row: row["budget"]):
            if row["nfe"] == nfe and not row["arm"].startswith("+"):
                point = chart.CurvePoint(row["budget"], row[score], row[f"{score}_sd"])
                curves.setdefault(row["arm"], []).append(point)
        (level,) = [point[1] for point in curves[first_arm] if point[0] == 1]
        charts[f"{plan.name}-nfe{nfe}"] = chart.curves(
            f"What a budget buys, {nfe_text(nfe)}",
            f"counted operations, over those of {unit_steps:,} steps of {first_arm}",
            chart.score_label(score),
            curves,
            log_x=True,
            level=chart.Level(level, f"{first_arm} at 1"),
        )
    return charts


def fair_chart(table: Sequence[Row]) -> Image.Image:
    """One NFE: a line per distribution of times, with a mark for each choice of heads and metric, the best on top."""
    score = main_score(table[0])
    names = {("two", "l2"): "two heads", ("one", "adaptive"): "one head, MeanFlow's metric", ("one", "l2"): "one head"}
    points: dict[str, dict[str, Any]] = {}
    for row in sorted(table, key=lambda row: row[score]):
        if row["nfe"] == 1:
            line = f"{row['law']}, {row['jumps']}, on {row['rows']}"
            name = names[row["heads"], row["metric"]]
            points.setdefault(line, {})[name] = chart.Dot(row[score], row.get(f"{score}_sd"))
    title = "Two heads and one at the same times and cost, 1 NFE"
    return chart.dots(title, chart.score_label(score), points, [*names.values()])


DRAWERS = {"front": draw_front, "charts": draw_charts}


def main(names: Sequence[str]) -> None:
    """Draw what is named, or all."""
    for name in names or DRAWERS:
        DRAWERS[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
