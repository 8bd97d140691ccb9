"""What logs measured, as figures: charts of one run for its page, and curves of several runs in one picture.

`charts` gives a run's page a chart for each thing that is measured; `validation_charts` are those of the demo. `curves`
has a panel for each thing, a colour for each run, and marks where steps were skipped; `panels` is its figure before it
becomes a picture. How a chart is drawn says `dumo.report.chart`.
"""

from collections.abc import Iterator, Mapping, Sequence
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
SMOOTHING_SHARE = 15  # one in this many values is averaged with a value, on either side: ours
RAW_OPACITY = 0.25  # of a curve as it was logged, behind its moving average
TIME_SLOPE = "slope of the time embedding"  # the title of its panel
Points = tuple[list[int], list[float]]  # steps, and the value at each


def moving_average(values: Sequence[float]) -> np.ndarray:
    """The mean (n,) of each of n values and its neighbours, a fifteenth of all on either side; fewer at the ends."""
    x = np.asarray(values, dtype=float)
    reach = len(values) // SMOOTHING_SHARE
    return np.array([x[max(0, i - reach) : i + reach + 1].mean() for i in range(len(x))])


def charts(rows: Sequence[log.Row]) -> list[Chart]:
    """A log of two rows or more as charts.

    In this order: the loss and the rate by step, gradient norms, each part of the loss by step and time, validation,
    notes. What some rows lack is drawn from those that have it.
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
    curves: dict[str, Points] = {}
    for row in rows:
        for name, value in _highest_norms(row).items():
            if value:
                steps, values = curves.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    if not curves:
        return
    worst = max(curves, key=lambda name: max(curves[name][1]))
    steps, values = curves[worst]
    peak = max(values)
    alt = f"Curves, one for each module: the largest is {peak:.3g}, of {worst} at step {steps[values.index(peak)]}."
    yield in_both_inks("Gradient norms by module", alt, partial(_draw_norms, curves=curves))


def _time_charts(rows: Sequence[log.Row], steps: Sequence[int]) -> Iterator[Chart]:
    """A heat map of each part of the loss by step and time; one scale of colours for all."""
    parts = list(rows[-1]["parts"]) or ["loss"]
    by_part = {part: np.array([row["bins"][part] for row in rows], dtype=float).T for part in parts}  # null is nan
    low = min(map(np.nanmin, by_part.values()))
    high = max(map(np.nanmax, by_part.values()))
    for part, bins in by_part.items():
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
    """A curve of each note of the objective, and of what probes measure: drift, and cosines between gradients.

    Left out is what was measured once.
    """
    values_by_name: dict[str, dict[int, float]] = {}  # values by step
    for row in rows:
        probe: dict[str, Any] = row.get("probe") or {"cosines": {}, "drift": None}
        notes: dict[str, float | None] = {**row.get("notes", {}), TIME_SLOPE: row.get("time_slope")}
        notes["drift"] = probe["drift"]
        for pair, value in probe["cosines"].items():
            notes[f"cosine of {pair}"] = value
        for name, value in notes.items():
            if value is not None:
                values_by_name.setdefault(name, {})[row["step"]] = value
    for name, values in sorted(values_by_name.items()):
        if len(values) > 1:
            first, *_, last = values
            alt = f"A curve: {name} is {values[first]:.3g} at step {first} and {values[last]:.3g} at step {last}."
            yield in_both_inks(name, alt, partial(_draw_note, name=name, values=values))


def _draw_loss(axes: Axes, rows: Sequence[log.Row], steps: Sequence[int]) -> None:
    """Draw the parts of the loss in colour, and the loss in ink unless it has one part alone, and is that."""
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
    """Draw a curve as it was logged, pale, and its moving average before it; in ink if no colour is given."""
    raw, *_ = axes.plot(steps, values, lw=0.8, alpha=RAW_OPACITY, color=colour)
    average = moving_average(values)
    axes.plot(steps, average, lw=1.5, label=name, color=raw.get_color(), marker=_marker(len(steps)))


def _marker(num_points: int) -> str | None:
    """The marker of a curve: a dot where it has one point, which a line would not show."""
    return "." if num_points == 1 else None


def _draw_norms(axes: Axes, curves: Mapping[str, Points]) -> None:
    """Draw the gradient norms of each module."""
    for (name, (steps, values)), colour in zip(curves.items(), cycle(RUN_COLOURS), strict=False):
        axes.plot(steps, values, lw=1.2, label=name, color=colour, marker=_marker(len(steps)))
    axes.set(xlabel="step", xlim=(0, None), ylabel="largest of the last steps")
    log_unless_narrow(axes.yaxis, axes.set_yscale)
    axes.legend(frameon=False, ncols=3, handlelength=1.2, columnspacing=1)


def _draw_rate(axes: Axes, rows: Sequence[log.Row], steps: Sequence[int]) -> None:
    """Draw the learning rate."""
    axes.plot(steps, [row["lr"] for row in rows], lw=1.4)
    axes.set(xlabel="step", xlim=(0, None), ylabel="learning rate", ylim=(0, None))
    axes.ticklabel_format(axis="y", scilimits=(-2, 3), useMathText=True)


def _draw_note(axes: Axes, name: str, values: Mapping[int, float]) -> None:
    """Draw a note by step: a cosine between -1 and 1, any other from 0 on."""
    label = "mean over a batch"
    limits = (0, None)
    if name.startswith("cosine"):
        label = "cosine"
        limits = (-1, 1)
    elif name == TIME_SLOPE:
        label = "relative to its length"
    _draw_curve(axes, [*values], [*values.values()], name)
    axes.axhline(0, lw=0.6)
    axes.set(xlabel="step", xlim=(0, None), ylabel=label, ylim=limits)


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


def curves(runs: Mapping[str, Sequence[log.Row]]) -> Image.Image:
    """The logs of runs, by name, as a picture: a panel for each thing that is measured, a curve for each run."""
    return picture.from_figure(panels(runs))


def panels(runs: Mapping[str, Sequence[log.Row]]) -> Figure:
    """The figure of the logs of runs, by name."""
    points_by_run = {name: series(rows) for name, rows in runs.items()}
    titles = list(dict.fromkeys(title for points_by_title in points_by_run.values() for title in points_by_title))
    across = min(PANELS_TO_A_ROW, len(titles))
    down = -(-len(titles) // PANELS_TO_A_ROW)
    width, height = PAGE_SIZE
    with rc_context(PAGE_STYLE):
        figure = Figure((across * width, down * height), dpi=PANEL_DPI, layout="constrained")
        grid = figure.subplots(down, across, squeeze=False).ravel()
        for axes, title in zip(grid, titles, strict=False):
            for (name, points_by_title), colour in zip(points_by_run.items(), cycle(RUN_COLOURS), strict=False):
                if title in points_by_title:
                    steps, values = points_by_title[title]
                    _draw_curve(axes, steps, values, name, colour)
            _finish_panel(axes, title)
        for axes in grid[len(titles) :]:
            axes.set_axis_off()
        for rows, colour in zip(runs.values(), cycle(RUN_COLOURS), strict=False):
            _mark_skipped_steps(grid[0], rows, colour)
        if len(runs) > 1:
            handles, labels = grid[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper left", frameon=False, ncols=PANELS_TO_A_ROW)
    return figure


def _mark_skipped_steps(axes: Axes, rows: Sequence[log.Row], colour: str) -> None:
    """Mark the steps that a run skipped, by ticks at the foot of the axes."""
    skipped = [row["step"] for row in rows if row.get("skipped")]
    foot = axes.get_xaxis_transform()
    axes.plot(skipped, [0.02] * len(skipped), "|", color=colour, ms=7, transform=foot)


def series(rows: Sequence[log.Row]) -> dict[str, Points]:
    """What a log measured, by the title of its panel, at the steps at which it is a finite number."""
    points: dict[str, Points] = {}
    for row in rows:
        for title, value in _row_values(row).items():
            if isinstance(value, int | float) and isfinite(value):
                steps, values = points.setdefault(title, ([], []))
                steps.append(row["step"])
                values.append(value)
    return points


def _row_values(row: log.Row) -> dict[str, object]:
    """The values of a row of the log by the titles of their panels, in order; some may be None, or not finite."""
    parts = row.get("parts", {})
    values: dict[str, object] = {"loss": row.get("loss")}
    if log.is_weighted(row.get("loss"), parts):  # else the loss is its only part
        values.update(parts)
    values["gradient norm"] = row.get("grad_norm")
    for module, norm in _highest_norms(row).items():
        values[f"gradient norm, {module}"] = norm
    values[TIME_SLOPE] = row.get("time_slope")
    values["learning rate"] = row.get("lr")
    for name, value in row.get("val", {}).items():
        if not score.is_error(name):
            values[f"validation, {name}"] = value
    values.update(row.get("notes", {}))
    probe = row.get("probe") or {}
    values["drift"] = probe.get("drift")
    values["images a second"] = row.get("speed", {}).get("images_per_second")
    return values


def _highest_norms(row: log.Row) -> dict[str, float | None]:
    """The gradient norm of each module, the largest of the last steps; {} of logs from before it was measured."""
    return row.get("grad_peaks") or row.get("grad_norms") or {}


def _finish_panel(axes: Axes, title: str) -> None:
    """Set the title of a panel, and a log scale where all values are positive and span more than a factor of ten."""
    axes.set(title=title, xlabel="step")
    low, high = axes.dataLim.intervaly
    if title != "learning rate" and 0 < 10 * low < high:
        log_unless_narrow(axes.yaxis, axes.set_yscale)
