"""Figures of training logs: a panel for each logged value, and in it a curve for each run.

`draw_logs` draws the logs of several runs as one picture, for `dumo report RUN RUN ...`. `draw_panels` draws each panel
of one run as a picture of its own, for the page of the run. Both draw with `_draw_panel`, from the values that
`read_curves` reads from the rows of a log.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from math import isfinite
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from dumo.io import picture
from dumo.report import score
from dumo.report.chart import log_unless_narrow
from dumo.training import log
from dumo.types import UserError

STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "font.size": 8,
}
PANEL_INCHES = (3.7, 2.4)
PANEL_DPI = 150
PANELS_PER_ROW = 3
RUN_COLOURS = ("#3f7fbf", "#d2603a", "#7d8a3c", "#8b62b0", "#2f9a94", "#b0823c")
# A value that spans less than this factor keeps a linear scale.
MIN_LOG_RATIO = 10
# The moving average of n values reaches over n / 15 of them on either side.
SMOOTHING_DIVISOR = 15
LEARNING_RATE = "learning rate"


@dataclass(frozen=True)
class Curve:
    """A logged value at the steps at which it is a finite number."""

    steps: list[int] = field(default_factory=list[int])
    values: list[float] = field(default_factory=list[float])
    # Standard deviations of the values; empty if none were logged.
    errors: list[float] = field(default_factory=list[float])


@dataclass(frozen=True)
class Panel:
    """A panel as a picture, for a page."""

    title: str
    alt: str
    picture: Image.Image


def draw_logs(rows_by_run: Mapping[str, Sequence[log.Row]]) -> Image.Image:
    """Draw the logs of runs, by name, as one picture. Ticks at the foot of the first panel mark skipped steps.

    Raises UserError if no log has a row with a finite number.
    """
    curves_by_run = {run: read_curves(rows) for run, rows in rows_by_run.items()}
    colours = dict(zip(rows_by_run, cycle(RUN_COLOURS), strict=False))
    titles = list(dict.fromkeys(title for curves in curves_by_run.values() for title in curves))
    if not titles:
        raise UserError(f"{', '.join(rows_by_run)}: the logs have no finite number to draw")
    num_columns = min(PANELS_PER_ROW, len(titles))
    num_rows = -(-len(titles) // PANELS_PER_ROW)
    width, height = PANEL_INCHES
    with rc_context(STYLE):
        figure = Figure((num_columns * width, num_rows * height), dpi=PANEL_DPI, layout="constrained")
        axes_of_panels = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
        for axes, title in zip(axes_of_panels, titles, strict=False):
            axes.set(title=title)
            _draw_panel(
                axes, title, {run: curves[title] for run, curves in curves_by_run.items() if title in curves}, colours
            )
        for axes in axes_of_panels[len(titles) :]:
            axes.set_axis_off()
        for run, rows in rows_by_run.items():
            _mark_skipped_steps(axes_of_panels[0], rows, colours[run])
        if len(rows_by_run) > 1:
            handles, labels = axes_of_panels[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper left", frameon=False, ncols=PANELS_PER_ROW)
        return picture.from_figure(figure)


def draw_panels(rows: Sequence[log.Row]) -> list[Panel]:
    """Draw each logged value of one run that was logged twice or more."""
    panels: list[Panel] = []
    for title, curve in read_curves(rows).items():
        if len(curve.steps) < 2:
            continue
        with rc_context(STYLE):
            figure = Figure(PANEL_INCHES, dpi=PANEL_DPI, layout="constrained")
            _draw_panel(figure.subplots(), title, {"": curve}, {"": RUN_COLOURS[0]})
            alt = (
                f"Curve: {title} is {curve.values[0]:.3g} at step {curve.steps[0]} and {curve.values[-1]:.3g} at step "
                f"{curve.steps[-1]}."
            )
            panels.append(Panel(title, alt, picture.from_figure(figure)))
    return panels


def read_curves(rows: Sequence[log.Row]) -> dict[str, Curve]:
    """Read the values of a log, by the title of their panel."""
    curves: dict[str, Curve] = {}
    for row in rows:
        errors = _errors_by_title(row)
        for title, value in _values_by_title(row).items():
            if isinstance(value, int | float) and isfinite(value):
                curve = curves.setdefault(title, Curve())
                curve.steps.append(row["step"])
                curve.values.append(value)
                if title in errors:
                    curve.errors.append(errors[title])
    return curves


def _values_by_title(row: log.Row) -> dict[str, object]:
    """Return the values of a row by the titles of their panels, in order. Some may be None or not finite."""
    parts = row.get("parts", {})
    values: dict[str, object] = {"loss": row.get("loss")}
    # A loss with one unweighted part equals that part.
    if log.is_weighted(row.get("loss"), parts):
        values.update(parts)
    values["gradient norm"] = row.get("grad_norm")
    values[LEARNING_RATE] = row.get("lr")
    for name, value in row.get("val", {}).items():
        if not score.is_error(name):
            values[f"validation, {name}"] = value
    values.update(row.get("notes", {}))
    values["images a second"] = row.get("speed", {}).get("images_per_second")
    return values


def _errors_by_title(row: log.Row) -> dict[str, float]:
    """Return the standard deviations of a row's validation scores, by the titles of their panels."""
    scores = row.get("val", {})
    errors: dict[str, float] = {}
    for name in scores:
        deviation = score.error(scores, name)
        if deviation is not None:
            errors[f"validation, {name}"] = deviation
    return errors


def _draw_panel(axes: Axes, title: str, curves: Mapping[str, Curve], colours: Mapping[str, str]) -> None:
    """Draw the curve of each run: pale as logged, with its moving average on top, or with error bars.

    The learning rate has no noise and is drawn as logged.
    """
    for run, curve in curves.items():
        # A single point would be invisible as a line.
        marker = "." if len(curve.steps) == 1 else None
        if len(curve.errors) == len(curve.steps):
            axes.errorbar(
                curve.steps,
                curve.values,
                yerr=curve.errors,
                lw=1.2,
                marker=".",
                capsize=2,
                label=run,
                color=colours[run],
            )
        elif title == LEARNING_RATE:
            axes.plot(curve.steps, curve.values, lw=1.5, label=run, color=colours[run], marker=marker)
        else:
            axes.plot(curve.steps, curve.values, lw=0.8, alpha=0.25, color=colours[run])
            smooth = moving_average(curve.values)
            axes.plot(curve.steps, smooth, lw=1.5, label=run, color=colours[run], marker=marker)
    axes.set(xlabel="step")
    low, high = axes.dataLim.intervaly
    if title != LEARNING_RATE and 0 < MIN_LOG_RATIO * low < high:
        log_unless_narrow(axes.yaxis, axes.set_yscale)


def moving_average(values: Sequence[float]) -> np.ndarray:
    """Return the moving average (n,) over n // SMOOTHING_DIVISOR neighbours on either side, fewer at the ends."""
    x = np.asarray(values, dtype=float)
    reach = len(values) // SMOOTHING_DIVISOR
    return np.array([x[max(0, i - reach) : i + reach + 1].mean() for i in range(len(x))])


def _mark_skipped_steps(axes: Axes, rows: Sequence[log.Row], colour: str) -> None:
    """Mark the steps that a run skipped by ticks at the foot of the axes."""
    skipped_steps = [row["step"] for row in rows if row.get("skipped")]
    foot = axes.get_xaxis_transform()
    axes.plot(skipped_steps, [0.02] * len(skipped_steps), "|", color=colour, ms=7, transform=foot)
