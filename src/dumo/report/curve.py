"""Curves of one run's log or of several, side by side: a panel for each thing that is measured, a colour for each run.

Curves are pale as logged, and smoothed before it; steps that were skipped are marked below.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle
from math import isfinite
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from dumo.report.figure import PALE, smoothed
from dumo.training.log import Row

COLOURS = ("#3f7fbf", "#d2603a", "#7d8a3c", "#8b62b0", "#2f9a94", "#b0823c")
ACROSS, SIZE, DPI = 3, (3.7, 2.4), 130
Points = tuple[list[int], list[float]]  # steps, values


def curves(runs: Mapping[str, Sequence[Row]]) -> Figure:
    """All panels: loss, its parts, the gradient norm, the learning rate, notes, drift, images a second."""
    found = {name: measured(rows) for name, rows in runs.items()}
    panels = list(dict.fromkeys(panel for one in found.values() for panel in one))
    down = -(-len(panels) // ACROSS)
    style: dict[Any, Any] = {
        "font.size": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.6,
    }
    with rc_context(style):
        across = min(ACROSS, len(panels))
        figure = Figure((across * SIZE[0], down * SIZE[1]), dpi=DPI, layout="constrained")
        grid = figure.subplots(down, across, squeeze=False).ravel()
        for axes, panel in zip(grid, panels, strict=False):
            for (name, one), colour in zip(found.items(), cycle(COLOURS), strict=False):
                if panel in one:
                    draw(axes, one[panel], name, colour)
            finish(axes, panel)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        for rows, colour in zip(runs.values(), cycle(COLOURS), strict=False):
            mark(grid[0], [row["step"] for row in rows if row.get("skipped")], colour)
        if len(runs) > 1:
            figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper left", frameon=False, ncols=ACROSS)
    return figure


def measured(rows: Sequence[Row]) -> dict[str, Points]:
    """What the rows measured, by name, each at the steps at which it is a finite number."""
    found: dict[str, Points] = {}
    for row in rows:
        parts, probe = row.get("parts", {}), row.get("probe") or {}
        told = {
            "loss": row.get("loss"),
            **(parts if len(parts) > 1 else {}),
            "gradient norm": row.get("grad_norm"),
            "learning rate": row.get("lr"),
            **row.get("notes", {}),
            "drift": probe.get("drift"),
            "images a second": row.get("speed", {}).get("images_per_second"),
        }
        for name, value in told.items():
            if isinstance(value, int | float) and isfinite(value):
                steps, values = found.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    return found


def draw(axes: Axes, points: Points, name: str, colour: str) -> None:
    """One run's curve."""
    steps, values = points
    axes.plot(steps, values, lw=0.8, alpha=PALE, color=colour)
    axes.plot(steps, smoothed(values), lw=1.5, color=colour, label=name, marker="." if len(steps) == 1 else None)


def mark(axes: Axes, steps: Sequence[int], colour: str) -> None:
    """Ticks at the foot of the loss, where steps were skipped."""
    axes.plot(steps, [0.02] * len(steps), "|", color=colour, ms=7, transform=axes.get_xaxis_transform())


def finish(axes: Axes, panel: str) -> None:
    """Title and scale: by powers of ten where all is positive and some of it far from the rest."""
    axes.set(title=panel, xlabel="step")
    low, high = axes.dataLim.intervaly
    if panel != "learning rate" and 0 < 10 * low < high:
        axes.set_yscale("log")


def picture(figure: Figure) -> Image.Image:
    """The figure as a picture."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
