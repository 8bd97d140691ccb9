"""The charts of one run's log: `page_charts` for its page, `validation_charts` for the demo.

A chart has a title and a text for those who cannot see it (`dumo.report.chart`), and may hold several curves.
`in_both_inks` draws each of them twice, for light and for dark pages. `dumo.report.curve` lists the keys of a row.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize

from dumo.report import score
from dumo.report.chart import Chart, in_both_inks, log_ticks, log_unless_narrow
from dumo.report.curve import (
    DRIFT,
    LEARNING_RATE,
    TIME_SLOPE,
    Curve,
    colour_by_name,
    draw_curve,
    highest_norms,
    marker,
)
from dumo.training import log

PART_COLOURS = {"v": "#3f7fbf", "u": "#d2603a"}  # of the loss; readable on either page
OTHER_PART_COLOURS = ("#7d8a3c", "#8b62b0", "#2f9a94")  # of other parts of the loss, in turn
Limits = tuple[float, float | None]  # of an axis; None: as the values have it


def page_charts(rows: Sequence[log.Row]) -> list[Chart]:
    """The charts of a run's page, from a log of two rows or more.

    Their order is: loss and learning rate by step, gradient norms, each part of the loss by step and t, validation,
    notes. Gradient norms, validation and notes that some rows lack are drawn from those that have them.
    """
    steps = [row["step"] for row in rows]
    first = rows[0]
    last = rows[-1]
    loss_alt = f"Curves: the loss is {first['loss']:.3g} at step {steps[0]} and {last['loss']:.3g} at step {steps[-1]}."
    lr_alt = f"A curve: the rate is {first['lr']:.3g} at step {steps[0]} and {last['lr']:.3g} at step {steps[-1]}."
    return [
        in_both_inks("Training loss", loss_alt, partial(_draw_loss, rows=rows, steps=steps)),
        in_both_inks("Learning rate", lr_alt, partial(_draw_learning_rate, rows=rows, steps=steps)),
        *_norm_charts(rows),
        *_loss_by_time_charts(rows, steps),
        *validation_charts(rows),
        *_note_charts(rows),
    ]


def _norm_charts(rows: Sequence[log.Row]) -> Iterator[Chart]:
    """One chart of the gradient norms by module; none of a log from before they were measured."""
    curves_by_module: dict[str, Curve] = {}
    for row in rows:
        for module, norm in highest_norms(row).items():
            if norm:
                steps, norms = curves_by_module.setdefault(module, ([], []))
                steps.append(row["step"])
                norms.append(norm)
    if not curves_by_module:
        return
    peaks = {module: max(norms) for module, (_, norms) in curves_by_module.items()}
    worst_module = max(peaks, key=peaks.__getitem__)
    peak = peaks[worst_module]
    steps, norms = curves_by_module[worst_module]
    peak_step = steps[norms.index(peak)]
    alt = f"Curves, one for each module: the largest is {peak:.3g}, of {worst_module} at step {peak_step}."
    draw = partial(_draw_norms, curves_by_module=curves_by_module)
    yield in_both_inks("Gradient norms by module", alt, draw)


def _loss_by_time_charts(rows: Sequence[log.Row], steps: Sequence[int]) -> Iterator[Chart]:
    """A heat map of each part of the loss by step and the flow's time t. All have one scale of colours."""
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
        yield in_both_inks(title, alt, partial(_draw_heat_map, steps=steps, bins=bins, low=low, high=high))


def validation_charts(rows: Sequence[log.Row]) -> Iterator[Chart]:
    """A chart of each score of validation by step, with its error where it has one."""
    scores_by_name: dict[str, dict[int, tuple[float, float]]] = {}  # each value and its error, by step
    for row in rows:
        scores = row.get("val", {})
        for name, value in scores.items():
            if value is not None and not score.is_error(name):
                error = score.error(scores, name) or 0.0
                scores_by_step = scores_by_name.setdefault(name, {})
                scores_by_step[row["step"]] = (value, error)
    for name, scores_by_step in scores_by_name.items():
        first = min(scores_by_step)
        last = max(scores_by_step)
        first_value, _ = scores_by_step[first]
        last_value, _ = scores_by_step[last]
        alt = f"Points: {name} is {first_value:.3g} at step {first} and {last_value:.3g} at step {last}."
        draw = partial(_draw_validation, name=name, scores_by_step=scores_by_step)
        yield in_both_inks(f"Validation, {name}", alt, draw)


def _note_charts(rows: Sequence[log.Row]) -> Iterator[Chart]:
    """A chart of each note of the objective, of the time embedding's slope, and of what probes measure.

    A probe measures the drift and the cosines between gradients. A value that only one row has is left out.
    """
    notes_by_title: dict[str, _Note] = {}
    for row in rows:
        for title, label, limits, value in _row_notes(row):
            if value is not None:
                note = notes_by_title.setdefault(title, _Note(label, limits))
                note.value_by_step[row["step"]] = value
    for title, note in sorted(notes_by_title.items()):
        values = note.value_by_step
        if len(values) == 1:
            continue
        first, *_, last = values
        alt = f"A curve: {title} is {values[first]:.3g} at step {first} and {values[last]:.3g} at step {last}."
        yield in_both_inks(title, alt, partial(_draw_note, title=title, note=note))


@dataclass(frozen=True)
class _Note:
    """A value of a chart of its own: what its axis says, the axis' limits, and the values by step."""

    label: str
    limits: Limits
    value_by_step: dict[int, float] = field(default_factory=dict[int, float])


def _row_notes(row: log.Row) -> Iterator[tuple[str, str, Limits, float | None]]:
    """The notes of a row: the title of each, the label and the limits of its axis, and the value; None: it has none."""
    above_zero: Limits = (0, None)
    for title, value in row.get("notes", {}).items():
        yield title, "mean over a batch", above_zero, value
    yield TIME_SLOPE, "relative to its length", above_zero, row.get("time_slope")
    probe = row.get("probe")
    if probe:
        yield DRIFT, "mean over a batch", above_zero, probe["drift"]
        for pair, cosine in probe["cosines"].items():
            yield f"cosine of {pair}", "cosine", (-1, 1), cosine


def _draw_loss(axes: Axes, rows: Sequence[log.Row], steps: Sequence[int]) -> None:
    """Draw the parts of the loss in colour, and the loss in ink unless it equals one of them."""
    curves_by_part = {part: [row["parts"][part] for row in rows] for part in rows[-1]["parts"]}
    loss = [row["loss"] for row in rows]
    other_colours = cycle(OTHER_PART_COLOURS)
    for part, values in curves_by_part.items():
        colour = PART_COLOURS.get(part) or next(other_colours)
        draw_curve(axes, steps, values, part, colour)
    if loss not in curves_by_part.values():
        draw_curve(axes, steps, loss, "loss")
    axes.set(xlabel="step", xlim=(0, None), ylabel="mean over a batch")
    log_unless_narrow(axes.yaxis, axes.set_yscale)
    axes.legend(frameon=False, ncols=3, handlelength=1.2, columnspacing=1)


def _draw_norms(axes: Axes, curves_by_module: Mapping[str, Curve]) -> None:
    """Draw the gradient norms of each module."""
    colours = colour_by_name(curves_by_module)
    for module, (steps, norms) in curves_by_module.items():
        axes.plot(steps, norms, lw=1.2, label=module, color=colours[module], marker=marker(len(steps)))
    axes.set(xlabel="step", xlim=(0, None), ylabel="largest of the last steps")
    log_unless_narrow(axes.yaxis, axes.set_yscale)
    axes.legend(frameon=False, ncols=3, handlelength=1.2, columnspacing=1)


def _draw_learning_rate(axes: Axes, rows: Sequence[log.Row], steps: Sequence[int]) -> None:
    """Draw the learning rate."""
    axes.plot(steps, [row["lr"] for row in rows], lw=1.4)
    axes.set(xlabel="step", xlim=(0, None), ylabel=LEARNING_RATE, ylim=(0, None))
    axes.ticklabel_format(axis="y", scilimits=(-2, 3), useMathText=True)


def _draw_note(axes: Axes, title: str, note: _Note) -> None:
    """Draw the values of a note by step, with a line at 0."""
    draw_curve(axes, [*note.value_by_step], [*note.value_by_step.values()], title)
    axes.axhline(0, lw=0.6)
    axes.set(xlabel="step", xlim=(0, None), ylabel=note.label, ylim=note.limits)


def _draw_validation(axes: Axes, name: str, scores_by_step: Mapping[int, tuple[float, float]]) -> None:
    """Draw the values and errors of a score by step, from 0 on where all bars end above it."""
    values, errors = zip(*scores_by_step.values(), strict=True)
    axes.errorbar([*scores_by_step], values, yerr=errors, lw=1.2, marker=".", capsize=2)
    axes.set(xlabel="step", xlim=(0, None), ylabel=name.replace("_", " "))
    if min(value - error for value, error in scores_by_step.values()) > 0:
        axes.set_ylim(0, None)


def _draw_heat_map(axes: Axes, steps: Sequence[int], bins: np.ndarray, low: float, high: float) -> None:
    """Draw `bins` (intervals of t, steps) as colours from `low` to `high`.

    A bin into which no sample fell, NaN, stays empty.
    """
    colour_scale = LogNorm(low, high) if low > 0 else Normalize(low, high)
    num_bins = len(bins)
    t_of_bin = (np.arange(num_bins) + 0.5) / num_bins
    mesh = axes.pcolormesh(steps, t_of_bin, bins, norm=colour_scale, cmap="magma", shading="nearest")
    axes.set(xlabel="step", ylabel="t, from data to noise", yticks=(0, 0.5, 1))
    bar = axes.figure.colorbar(mesh, ax=axes, label="mean over its rows", pad=0.02)
    bar.outline.set_visible(False)
    if isinstance(colour_scale, LogNorm):
        log_ticks(bar.ax.yaxis, low, high)
