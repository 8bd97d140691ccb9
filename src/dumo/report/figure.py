"""A comparison of the logs of several runs: a panel for each measured value, and in it a curve for each run.

- `comparison_picture` is the picture; `comparison_figure` is the figure before it becomes one.
- `curves_by_title` reads the values of a run from the rows of its log.

`dumo.report.runchart` has the charts of one run; `dumo.report.curve` lists the keys of a row.
"""

from collections.abc import Mapping, Sequence
from math import isfinite

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from dumo.io import picture
from dumo.report import score
from dumo.report.chart import PAGE_SIZE, PAGE_STYLE, log_unless_narrow
from dumo.report.curve import DRIFT, LEARNING_RATE, TIME_SLOPE, Curve, colour_by_name, draw_curve, highest_norms
from dumo.training import log
from dumo.types import UserError

PANELS_TO_A_ROW = 3
PANEL_DPI = 130
MIN_LOG_RATIO = 10  # of the largest value in a panel to the least: from here on its scale is logarithmic. Ours


def comparison_picture(rows_by_run: Mapping[str, Sequence[log.Row]]) -> Image.Image:
    """The logs of runs, by name, as a picture: a panel for each measured value, and in it a curve for each run.

    Raises UserError where no row of any log has a finite number.
    """
    return picture.from_figure(comparison_figure(rows_by_run))


def comparison_figure(rows_by_run: Mapping[str, Sequence[log.Row]]) -> Figure:
    """The figure of `comparison_picture`. The first panel marks the steps that were skipped.

    Raises UserError where no row of any log has a finite number.
    """
    curves_by_run = {run: curves_by_title(rows) for run, rows in rows_by_run.items()}
    colours = colour_by_name(rows_by_run)
    titles: list[str] = []
    for curves in curves_by_run.values():
        for title in curves:
            if title not in titles:
                titles.append(title)
    if not titles:
        names = ", ".join(rows_by_run)
        raise UserError(f"{names}: no step has a finite number, so there is nothing to draw: train with a lower rate")
    num_columns = min(PANELS_TO_A_ROW, len(titles))
    num_rows = -(-len(titles) // PANELS_TO_A_ROW)
    width, height = PAGE_SIZE
    with rc_context(PAGE_STYLE):
        figure = Figure((num_columns * width, num_rows * height), dpi=PANEL_DPI, layout="constrained")
        panels = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
        for axes, title in zip(panels, titles, strict=False):  # the last row may have panels to spare
            for run, curves in curves_by_run.items():
                if title in curves:
                    steps, values = curves[title]
                    draw_curve(axes, steps, values, run, colours[run])
            _finish_panel(axes, title)
        for axes in panels[len(titles) :]:
            axes.set_axis_off()
        for run, rows in rows_by_run.items():
            _mark_skipped_steps(panels[0], rows, colours[run])
        if len(rows_by_run) > 1:
            handles, labels = panels[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper left", frameon=False, ncols=PANELS_TO_A_ROW)
    return figure


def _mark_skipped_steps(axes: Axes, rows: Sequence[log.Row], colour: str) -> None:
    """Mark the steps that a run skipped, by ticks at the foot of the axes."""
    skipped_steps = [row["step"] for row in rows if row.get("skipped")]
    foot = axes.get_xaxis_transform()
    axes.plot(skipped_steps, [0.02] * len(skipped_steps), "|", color=colour, ms=7, transform=foot)


def curves_by_title(rows: Sequence[log.Row]) -> dict[str, Curve]:
    """The measured values of a log, by the title of their panel, at the steps at which they are finite numbers."""
    curves: dict[str, Curve] = {}
    for row in rows:
        for title, value in _values_by_title(row).items():
            if isinstance(value, int | float) and isfinite(value):
                steps, values = curves.setdefault(title, ([], []))
                steps.append(row["step"])
                values.append(value)
    return curves


def _values_by_title(row: log.Row) -> dict[str, object]:
    """The values of a row of a log by the titles of their panels, in order. Some may be None, or not finite."""
    parts = row.get("parts", {})
    values: dict[str, object] = {"loss": row.get("loss")}
    if log.is_weighted(row.get("loss"), parts):  # else the loss is its only part
        values.update(parts)
    values["gradient norm"] = row.get("grad_norm")
    for module, norm in highest_norms(row).items():
        values[f"gradient norm, {module}"] = norm
    values[TIME_SLOPE] = row.get("time_slope")
    values[LEARNING_RATE] = row.get("lr")
    for name, value in row.get("val", {}).items():
        if not score.is_error(name):
            values[f"validation, {name}"] = value
    values.update(row.get("notes", {}))
    probe = row.get("probe") or {}
    values[DRIFT] = probe.get("drift")
    values["images a second"] = row.get("speed", {}).get("images_per_second")
    return values


def _finish_panel(axes: Axes, title: str) -> None:
    """Set the title of a panel, and a log scale where its values are positive and span a factor MIN_LOG_RATIO.

    The rate's scale stays linear.
    """
    axes.set(title=title, xlabel="step")
    low, high = axes.dataLim.intervaly
    if title != LEARNING_RATE and 0 < MIN_LOG_RATIO * low < high:
        log_unless_narrow(axes.yaxis, axes.set_yscale)  # it spans enough; this sets plain numbers, too
