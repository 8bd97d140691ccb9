"""What logs measured, as figures: charts of one run for its page, and curves of several runs in one picture.

`charts` gives a run's page a chart for each thing that is measured. `curves` has a panel for each of them, a colour for
each run, and marks where steps were skipped. How a chart is drawn says `dumo.report.chart`.
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
OTHER_PART_COLOURS = ("#7d8a3c", "#8b62b0", "#2f9a94")  # in turn
RUN_COLOURS = ("#3f7fbf", "#d2603a", "#7d8a3c", "#8b62b0", "#2f9a94", "#b0823c")  # in turn
PANELS_TO_A_ROW = 3
PANEL_DPI = 130
RAW_OPACITY = 0.25  # of a curve as logged, behind itself smoothed
TIME_SLOPE = "slope of the time embedding"
Points = tuple[list[int], list[float]]  # steps, values


def smoothed(values: Sequence[float]) -> np.ndarray:
    """Each value's mean with its neighbours, a fifteenth of all on either side; fewer at the ends."""
    x = np.asarray(values, dtype=float)
    reach = len(values) // 15
    return np.array([x[max(0, i - reach) : i + reach + 1].mean() for i in range(len(x))])


def charts(rows: Sequence[log.Row]) -> list[Chart]:
    """The log as charts: loss and rate by step, every part of the loss by step and time, validation, then notes.

    Needs two rows at least. What older rows lack, notes and gradients of the parts, is drawn from those that have it.
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
    """Gradient norms by module, in one chart; none of a log from before they were measured."""
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
    """A heat map of each part of the loss, all in the same colours."""
    parts = list(rows[-1]["parts"]) or ["loss"]
    by_part = {part: np.array([row["bins"][part] for row in rows], dtype=float).T for part in parts}  # null is nan
    low = min(map(np.nanmin, by_part.values()))
    high = max(map(np.nanmax, by_part.values()))
    for part, bins in by_part.items():
        title = "Loss by time" if part == "loss" else f"Loss of {part} by time"
        alt = f"A heat map of the part {part} of the loss: steps from left to right, data to noise upwards."
        yield in_both_inks(title, alt, partial(_draw_times, steps=steps, bins=bins, low=low, high=high))


def validation_charts(rows: Sequence[log.Row]) -> Iterator[Chart]:
    """What validation found, a chart for each score: by step, with its error where it has one."""
    by_score: dict[str, dict[int, tuple[float, float]]] = {}
    for row in rows:
        scores = row.get("val", {})
        for name, value in scores.items():
            if value is not None and not score.is_error(name):
                by_score.setdefault(name, {})[row["step"]] = value, score.error(scores, name) or 0.0
    for name, points in by_score.items():
        first = min(points)
        last = max(points)
        alt = f"Points: {name} is {points[first][0]:.3g} at step {first} and {points[last][0]:.3g} at step {last}."
        yield in_both_inks(f"Validation, {name}", alt, partial(_draw_validation, name=name, points=points))


def _note_charts(rows: Sequence[log.Row]) -> Iterator[Chart]:
    """What else is watched, a curve each: notes of the objective; drift, and cosines of gradients, of probes."""
    by_name: dict[str, dict[int, float]] = {}
    for row in rows:
        probe: dict[str, Any] = row.get("probe") or {"cosines": {}, "drift": None}
        watched: dict[str, float | None] = {**row.get("notes", {}), TIME_SLOPE: row.get("time_slope")}
        watched["drift"] = probe["drift"]
        for pair, value in probe["cosines"].items():
            watched[f"cosine of {pair}"] = value
        for name, value in watched.items():
            if value is not None:
                by_name.setdefault(name, {})[row["step"]] = value
    for name, values in sorted(by_name.items()):
        if len(values) > 1:
            first, *_, last = values
            alt = f"A curve: {name} is {values[first]:.3g} at step {first} and {values[last]:.3g} at step {last}."
            yield in_both_inks(name, alt, partial(_draw_note, name=name, values=values))


def _draw_loss(axes: Axes, rows: Sequence[log.Row], steps: Sequence[int]) -> None:
    """The loss in ink, unless it is its only part, and its parts in colour."""
    curves = {part: [row["parts"][part] for row in rows] for part in rows[-1]["parts"]}
    loss = [row["loss"] for row in rows]
    other_colours = cycle(OTHER_PART_COLOURS)
    for part, values in curves.items():
        _draw_curve(axes, steps, values, part, color=PART_COLOURS.get(part) or next(other_colours))
    if loss not in curves.values():
        _draw_curve(axes, steps, loss, "loss")
    axes.set(xlabel="step", xlim=(0, None), ylabel="mean over a batch")
    log_unless_narrow(axes.yaxis, axes.set_yscale)
    axes.legend(frameon=False, ncols=3, handlelength=1.2, columnspacing=1)


def _draw_curve(axes: Axes, steps: Sequence[int], values: Sequence[float], name: str, color: str | None = None) -> None:
    """As logged, pale, and smoothed before it; in ink unless in a colour."""
    raw, *_ = axes.plot(steps, values, lw=0.8, alpha=RAW_OPACITY, color=color)
    mark = "." if len(steps) == 1 else None
    axes.plot(steps, smoothed(values), lw=1.5, label=name, color=raw.get_color(), marker=mark)


def _draw_norms(axes: Axes, curves: Mapping[str, Points]) -> None:
    for (name, (steps, values)), colour in zip(curves.items(), cycle(RUN_COLOURS), strict=False):
        axes.plot(steps, values, lw=1.2, label=name, color=colour, marker="." if len(steps) == 1 else None)
    axes.set(xlabel="step", xlim=(0, None), ylabel="largest of the last steps")
    log_unless_narrow(axes.yaxis, axes.set_yscale)
    axes.legend(frameon=False, ncols=3, handlelength=1.2, columnspacing=1)


def _draw_rate(axes: Axes, rows: Sequence[log.Row], steps: Sequence[int]) -> None:
    axes.plot(steps, [row["lr"] for row in rows], lw=1.4)
    axes.set(xlabel="step", xlim=(0, None), ylabel="learning rate", ylim=(0, None))
    axes.ticklabel_format(axis="y", scilimits=(-2, 3), useMathText=True)


def _draw_note(axes: Axes, name: str, values: Mapping[int, float]) -> None:
    """A cosine between -1 and 1, the others from 0 on."""
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
    """Each score with its error, from 0 on where none is below."""
    values, errors = zip(*points.values(), strict=True)
    axes.errorbar([*points], values, yerr=errors, lw=1.2, marker=".", capsize=2)
    axes.set(xlabel="step", xlim=(0, None), ylabel=name.replace("_", " "))
    if min(value - error for value, error in points.values()) > 0:
        axes.set_ylim(0, None)


def _draw_times(axes: Axes, steps: Sequence[int], bins: np.ndarray, low: float, high: float) -> None:
    """(bins, steps) as colours; a bin that no row of the batch fell into stays empty."""
    norm = LogNorm(low, high) if low > 0 else Normalize(low, high)
    count = len(bins)
    middles = (np.arange(count) + 0.5) / count
    mesh = axes.pcolormesh(steps, middles, bins, norm=norm, cmap="magma", shading="nearest")
    axes.set(xlabel="step", ylabel="t, from data to noise", yticks=(0, 0.5, 1))
    bar = axes.figure.colorbar(mesh, ax=axes, label="mean over its rows", pad=0.02)
    bar.outline.set_visible(False)
    if isinstance(norm, LogNorm):
        log_ticks(bar.ax.yaxis, low, high)


def curves(runs: Mapping[str, Sequence[log.Row]]) -> Image.Image:
    """All panels: loss, its parts, the gradient norm, the rate, validation, notes, drift, images a second."""
    return picture.from_figure(panels(runs))


def panels(runs: Mapping[str, Sequence[log.Row]]) -> Figure:
    """The figure of these runs, by name."""
    measured = {name: series(rows) for name, rows in runs.items()}
    titles = list(dict.fromkeys(title for curves in measured.values() for title in curves))
    across = min(PANELS_TO_A_ROW, len(titles))
    down = -(-len(titles) // PANELS_TO_A_ROW)
    width, height = PAGE_SIZE
    with rc_context(PAGE_STYLE):
        figure = Figure((across * width, down * height), dpi=PANEL_DPI, layout="constrained")
        grid = figure.subplots(down, across, squeeze=False).ravel()
        for axes, title in zip(grid, titles, strict=False):
            for (name, curves), colour in zip(measured.items(), cycle(RUN_COLOURS), strict=False):
                if title in curves:
                    steps, values = curves[title]
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
    """Ticks at the foot of the axes."""
    skipped = [row["step"] for row in rows if row.get("skipped")]
    foot = axes.get_xaxis_transform()
    axes.plot(skipped, [0.02] * len(skipped), "|", color=colour, ms=7, transform=foot)


def series(rows: Sequence[log.Row]) -> dict[str, Points]:
    """What the rows measured, by name, each at the steps at which it is a finite number."""
    points: dict[str, Points] = {}
    for row in rows:
        for name, value in _measured(row).items():
            if isinstance(value, int | float) and isfinite(value):
                steps, values = points.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    return points


def _measured(row: log.Row) -> dict[str, object]:
    """The numbers of a row by the titles of their panels, in the order of these."""
    parts = row.get("parts", {})
    numbers: dict[str, object] = {"loss": row.get("loss")}
    if log.is_weighted(row.get("loss"), parts):  # else the loss is its only part
        numbers.update(parts)
    numbers["gradient norm"] = row.get("grad_norm")
    for module, norm in _highest_norms(row).items():
        numbers[f"gradient norm, {module}"] = norm
    numbers[TIME_SLOPE] = row.get("time_slope")
    numbers["learning rate"] = row.get("lr")
    for name, value in row.get("val", {}).items():
        if not score.is_error(name):
            numbers[f"validation, {name}"] = value
    numbers.update(row.get("notes", {}))
    numbers["drift"] = (row.get("probe") or {}).get("drift")
    numbers["images a second"] = row.get("speed", {}).get("images_per_second")
    return numbers


def _highest_norms(row: log.Row) -> dict[str, float | None]:
    """The gradient norm of each module, the largest of the last steps; none in logs from before it was measured."""
    return row.get("grad_peaks") or row.get("grad_norms") or {}


def _finish_panel(axes: Axes, title: str) -> None:
    """Title and scale: by powers of ten where all is positive and some of it far from the rest."""
    axes.set(title=title, xlabel="step")
    low, high = axes.dataLim.intervaly
    if title != "learning rate" and 0 < 10 * low < high:
        log_unless_narrow(axes.yaxis, axes.set_yscale)
