"""Logs as figures: charts of one run for its page, and a comparison of several runs in one picture.

- `page_charts` are the charts of a run's page, `validation_charts` those of the demo. A chart has a title and a text
  for those who cannot see it (`dumo.report.chart`), and may hold several curves.
- `comparison_picture` has a panel for each measured value, and in it a curve for each run. `comparison_figure` is the
  figure before it becomes a picture.
- `points_by_title` reads the values of a comparison from the rows of a log; `moving_average` smooths a curve.

Pages group values that belong together, with texts that panels lack, so each side chooses its own values from a row.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle
from math import isfinite
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from PIL import Image

from dumo.io import picture
from dumo.report import score
from dumo.report.chart import PAGE_SIZE, PAGE_STYLE, Chart, in_both_inks, log_ticks, log_unless_narrow
from dumo.training import log

PART_COLOURS = {"v": "#3f7fbf", "u": "#d2603a"}  # of the loss; readable on either page
OTHER_PART_COLOURS = ("#7d8a3c", "#8b62b0", "#2f9a94")  # of other parts of the loss, in turn
RUN_COLOURS = ("#3f7fbf", "#d2603a", "#7d8a3c", "#8b62b0", "#2f9a94", "#b0823c")  # of runs, or modules, in turn
PANELS_TO_A_ROW = 3
PANEL_DPI = 130
SMOOTHING_DIVISOR = 15  # the mean around a value reaches over n / 15 of n values on either side: ours
RAW_OPACITY = 0.25  # of a curve as it was logged, behind its moving average
MIN_LOG_RATIO = 10  # of the largest value in a panel to the least: from here on its scale is logarithmic. Ours
# titles of panels and charts that are also asked for by name
TIME_SLOPE = "slope of the time embedding"
LEARNING_RATE = "learning rate"
DRIFT = "drift"
Points = tuple[list[int], list[float]]  # steps, and the value at each


def moving_average(values: Sequence[float]) -> np.ndarray:
    """The mean (n,) of each of n values and n // SMOOTHING_DIVISOR neighbours on either side; fewer at the ends."""
    x = np.asarray(values, dtype=float)
    reach = len(values) // SMOOTHING_DIVISOR
    return np.array([x[max(0, i - reach) : i + reach + 1].mean() for i in range(len(x))])


def page_charts(rows: Sequence[log.Row]) -> list[Chart]:
    """The charts of a run's page, from a log of two rows or more.

    Their order is: loss and learning rate by step, gradient norms, each part of the loss by step and time, validation,
    notes. A value that some rows lack is drawn from those that have it.
    """
    steps = [row["step"] for row in rows]
    first = rows[0]
    last = rows[-1]
    loss_alt = f"Curves: the loss is {first['loss']:.3g} at step {steps[0]} and {last['loss']:.3g} at step {steps[-1]}."
    rate_alt = f"A curve: the rate is {first['lr']:.3g} at step {steps[0]} and {last['lr']:.3g} at step {steps[-1]}."
    return [
        in_both_inks("Training loss", loss_alt, partial(_draw_loss, rows=rows, steps=steps)),
        in_both_inks("Learning rate", rate_alt, partial(_draw_rate, rows=rows, steps=steps)),
        *_norm_charts(rows),
        *_time_charts(rows, steps),
        *validation_charts(rows),
        *_note_charts(rows),
    ]


def _norm_charts(rows: Sequence[log.Row]) -> Iterator[Chart]:
    """One chart of the gradient norms by module; none of a log from before they were measured."""
    points_by_module: dict[str, Points] = {}
    for row in rows:
        for module, norm in _highest_norms(row).items():
            if norm:
                steps, norms = points_by_module.setdefault(module, ([], []))
                steps.append(row["step"])
                norms.append(norm)
    if not points_by_module:
        return
    peaks = {module: max(norms) for module, (_, norms) in points_by_module.items()}
    worst_module = max(peaks, key=peaks.__getitem__)
    peak = peaks[worst_module]
    steps, norms = points_by_module[worst_module]
    peak_step = steps[norms.index(peak)]
    alt = f"Curves, one for each module: the largest is {peak:.3g}, of {worst_module} at step {peak_step}."
    draw = partial(_draw_norms, points_by_module=points_by_module)
    yield in_both_inks("Gradient norms by module", alt, draw)


def _time_charts(rows: Sequence[log.Row], steps: Sequence[int]) -> Iterator[Chart]:
    """A heat map of each part of the loss by step and time. All have one scale of colours."""
    parts = list(rows[-1]["parts"]) or ["loss"]
    bins_by_part: dict[str, np.ndarray] = {}
    for part in parts:
        bins_by_row = [row["bins"][part] for row in rows]
        bins_by_part[part] = np.array(bins_by_row, dtype=float).T  # null is nan
    low = min(map(np.nanmin, bins_by_part.values()))
    high = max(map(np.nanmax, bins_by_part.values()))
    for part, bins in bins_by_part.items():
        title = "Loss by time" if part == "loss" else f"Loss of {part} by time"
        alt = f"A heat map of the part {part} of the loss: steps from left to right, data to noise upwards."
        yield in_both_inks(title, alt, partial(_draw_times, steps=steps, bins=bins, low=low, high=high))


def validation_charts(rows: Sequence[log.Row]) -> Iterator[Chart]:
    """A chart of each score of validation by step, with its error where it has one."""
    points_by_score: dict[str, dict[int, tuple[float, float]]] = {}  # value and error, by step
    for row in rows:
        scores = row.get("val", {})
        for name, value in scores.items():
            if value is not None and not score.is_error(name):
                error = score.error(scores, name) or 0.0
                points_by_score.setdefault(name, {})[row["step"]] = value, error
    for name, points in points_by_score.items():
        first = min(points)
        last = max(points)
        alt = f"Points: {name} is {points[first][0]:.3g} at step {first} and {points[last][0]:.3g} at step {last}."
        yield in_both_inks(f"Validation, {name}", alt, partial(_draw_validation, name=name, points=points))


def _note_charts(rows: Sequence[log.Row]) -> Iterator[Chart]:
    """A chart of each note of the objective, of the time embedding's slope, and of what probes measure.

    A probe measures the drift and the cosines between gradients. A value that only one row has is left out.
    """
    values_by_title: dict[str, dict[int, float]] = {}  # by step
    cosine_titles: set[str] = set()
    for row in rows:
        notes: dict[str, float | None] = dict(row.get("notes", {}))
        notes[TIME_SLOPE] = row.get("time_slope")
        probe: dict[str, Any] = row.get("probe") or {"cosines": {}, "drift": None}
        notes[DRIFT] = probe["drift"]
        for pair, cosine in probe["cosines"].items():
            title = f"cosine of {pair}"
            notes[title] = cosine
            cosine_titles.add(title)
        for title, value in notes.items():
            if value is not None:
                values_by_title.setdefault(title, {})[row["step"]] = value
    for title, values in sorted(values_by_title.items()):
        if len(values) == 1:
            continue
        first, *_, last = values
        alt = f"A curve: {title} is {values[first]:.3g} at step {first} and {values[last]:.3g} at step {last}."
        y_label = "mean over a batch"
        y_limits: tuple[float, float | None] = (0, None)
        if title in cosine_titles:
            y_label = "cosine"
            y_limits = (-1, 1)
        elif title == TIME_SLOPE:
            y_label = "relative to its length"
        draw = partial(_draw_note, title=title, values=values, y_label=y_label, y_limits=y_limits)
        yield in_both_inks(title, alt, draw)


def _draw_loss(axes: Axes, rows: Sequence[log.Row], steps: Sequence[int]) -> None:
    """Draw the parts of the loss in colour, and the loss in ink unless it equals one of them."""
    curves_by_part = {part: [row["parts"][part] for row in rows] for part in rows[-1]["parts"]}
    loss = [row["loss"] for row in rows]
    other_colours = cycle(OTHER_PART_COLOURS)
    for part, values in curves_by_part.items():
        colour = PART_COLOURS.get(part) or next(other_colours)
        _draw_curve(axes, steps, values, part, colour)
    if loss not in curves_by_part.values():
        _draw_curve(axes, steps, loss, "loss")
    axes.set(xlabel="step", xlim=(0, None), ylabel="mean over a batch")
    log_unless_narrow(axes.yaxis, axes.set_yscale)
    axes.legend(frameon=False, ncols=3, handlelength=1.2, columnspacing=1)


def _draw_curve(
    axes: Axes, steps: Sequence[int], values: Sequence[float], name: str, colour: str | None = None
) -> None:
    """Draw a curve as it was logged, pale, and its moving average on top. Without a colour it is in ink."""
    raw, *_ = axes.plot(steps, values, lw=0.8, alpha=RAW_OPACITY, color=colour)
    average = moving_average(values)
    axes.plot(steps, average, lw=1.5, label=name, color=raw.get_color(), marker=_marker(len(steps)))


def _marker(num_points: int) -> str | None:
    """The marker of a curve: a dot where it has one point, which a line would not show."""
    return "." if num_points == 1 else None


def _draw_norms(axes: Axes, points_by_module: Mapping[str, Points]) -> None:
    """Draw the gradient norms of each module."""
    colours = _colour_by_name(points_by_module)
    for module, (steps, norms) in points_by_module.items():
        axes.plot(steps, norms, lw=1.2, label=module, color=colours[module], marker=_marker(len(steps)))
    axes.set(xlabel="step", xlim=(0, None), ylabel="largest of the last steps")
    log_unless_narrow(axes.yaxis, axes.set_yscale)
    axes.legend(frameon=False, ncols=3, handlelength=1.2, columnspacing=1)


def _draw_rate(axes: Axes, rows: Sequence[log.Row], steps: Sequence[int]) -> None:
    """Draw the learning rate."""
    axes.plot(steps, [row["lr"] for row in rows], lw=1.4)
    axes.set(xlabel="step", xlim=(0, None), ylabel=LEARNING_RATE, ylim=(0, None))
    axes.ticklabel_format(axis="y", scilimits=(-2, 3), useMathText=True)


def _draw_note(
    axes: Axes, title: str, values: Mapping[int, float], y_label: str, y_limits: tuple[float, float | None]
) -> None:
    """Draw values by step, with a line at 0."""
    _draw_curve(axes, [*values], [*values.values()], title)
    axes.axhline(0, lw=0.6)
    axes.set(xlabel="step", xlim=(0, None), ylabel=y_label, ylim=y_limits)


def _draw_validation(axes: Axes, name: str, points: Mapping[int, tuple[float, float]]) -> None:
    """Draw the values and errors of a score by step, from 0 on where all bars end above it."""
    values, errors = zip(*points.values(), strict=True)
    axes.errorbar([*points], values, yerr=errors, lw=1.2, marker=".", capsize=2)
    axes.set(xlabel="step", xlim=(0, None), ylabel=name.replace("_", " "))
    if min(value - error for value, error in points.values()) > 0:
        axes.set_ylim(0, None)


def _draw_times(axes: Axes, steps: Sequence[int], bins: np.ndarray, low: float, high: float) -> None:
    """Draw `bins` (times, steps) as colours from `low` to `high`; a bin into which no sample fell, NaN, stays empty."""
    norm = LogNorm(low, high) if low > 0 else Normalize(low, high)
    num_bins = len(bins)
    middles = (np.arange(num_bins) + 0.5) / num_bins
    mesh = axes.pcolormesh(steps, middles, bins, norm=norm, cmap="magma", shading="nearest")
    axes.set(xlabel="step", ylabel="t, from data to noise", yticks=(0, 0.5, 1))
    bar = axes.figure.colorbar(mesh, ax=axes, label="mean over its rows", pad=0.02)
    bar.outline.set_visible(False)
    if isinstance(norm, LogNorm):
        log_ticks(bar.ax.yaxis, low, high)


def comparison_picture(rows_by_run: Mapping[str, Sequence[log.Row]]) -> Image.Image:
    """The logs of runs, by name, as a picture: a panel for each measured value, and in it a curve for each run."""
    return picture.from_figure(comparison_figure(rows_by_run))


def comparison_figure(rows_by_run: Mapping[str, Sequence[log.Row]]) -> Figure:
    """The figure of `comparison_picture`. The first panel marks the steps that were skipped."""
    points_by_run = {run: points_by_title(rows) for run, rows in rows_by_run.items()}
    colours = _colour_by_name(rows_by_run)
    titles: list[str] = []
    for run_points in points_by_run.values():
        titles += [title for title in run_points if title not in titles]
    num_columns = min(PANELS_TO_A_ROW, len(titles))
    num_rows = -(-len(titles) // PANELS_TO_A_ROW)
    width, height = PAGE_SIZE
    with rc_context(PAGE_STYLE):
        figure = Figure((num_columns * width, num_rows * height), dpi=PANEL_DPI, layout="constrained")
        panels = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
        for axes, title in zip(panels, titles, strict=False):  # the last row may have panels to spare
            for run, run_points in points_by_run.items():
                if title in run_points:
                    steps, values = run_points[title]
                    _draw_curve(axes, steps, values, run, colours[run])
            _finish_panel(axes, title)
        for axes in panels[len(titles) :]:
            axes.set_axis_off()
        for run, rows in rows_by_run.items():
            _mark_skipped_steps(panels[0], rows, colours[run])
        if len(rows_by_run) > 1:
            handles, labels = panels[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper left", frameon=False, ncols=PANELS_TO_A_ROW)
    return figure


def _colour_by_name(names: Iterable[str]) -> dict[str, str]:
    """A colour for each run or module; RUN_COLOURS begin again where there are more names."""
    return dict(zip(names, cycle(RUN_COLOURS), strict=False))


def _mark_skipped_steps(axes: Axes, rows: Sequence[log.Row], colour: str) -> None:
    """Mark the steps that a run skipped, by ticks at the foot of the axes."""
    skipped_steps = [row["step"] for row in rows if row.get("skipped")]
    foot = axes.get_xaxis_transform()
    axes.plot(skipped_steps, [0.02] * len(skipped_steps), "|", color=colour, ms=7, transform=foot)


def points_by_title(rows: Sequence[log.Row]) -> dict[str, Points]:
    """The measured values of a log, by the title of their panel, at the steps at which they are finite numbers."""
    points: dict[str, Points] = {}
    for row in rows:
        for title, value in _values_by_title(row).items():
            if isinstance(value, int | float) and isfinite(value):
                steps, values = points.setdefault(title, ([], []))
                steps.append(row["step"])
                values.append(value)
    return points


def _values_by_title(row: log.Row) -> dict[str, object]:
    """The values of a row of a log by the titles of their panels, in order. Some may be None, or not finite."""
    parts = row.get("parts", {})
    values: dict[str, object] = {"loss": row.get("loss")}
    if log.is_weighted(row.get("loss"), parts):  # else the loss is its only part
        values.update(parts)
    values["gradient norm"] = row.get("grad_norm")
    for module, norm in _highest_norms(row).items():
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


def _highest_norms(row: log.Row) -> dict[str, float | None]:
    """The gradient norm of each module, the largest of the last steps; {} of logs from before it was measured."""
    return row.get("grad_peaks") or row.get("grad_norms") or {}


def _finish_panel(axes: Axes, title: str) -> None:
    """Set the title of a panel, and a log scale where values are positive and span more than a factor MIN_LOG_RATIO."""
    axes.set(title=title, xlabel="step")
    low, high = axes.dataLim.intervaly
    if title != LEARNING_RATE and 0 < MIN_LOG_RATIO * low < high:
        log_unless_narrow(axes.yaxis, axes.set_yscale)
