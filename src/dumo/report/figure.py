"""Figures of logs: charts of one run for its page, which holds them without another file, and curves of several runs.

A chart is drawn twice, in the ink of a light and of a dark page, on no ground of its own; the page picks one. Curves
have a panel for each thing that is measured, a colour for each run, and marks where steps were skipped.
"""

from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import cycle
from math import isfinite
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image

from dumo.io.picture import drawn
from dumo.training import log

INK = {"light": "#23262b", "dark": "#dedbd4"}
COLOUR = {"v": "#3f7fbf", "u": "#d2603a"}  # readable on either page
OTHERS = ("#7d8a3c", "#8b62b0", "#2f9a94")  # of other parts, in turn
COLOURS = ("#3f7fbf", "#d2603a", "#7d8a3c", "#8b62b0", "#2f9a94", "#b0823c")  # of runs, in turn
SIZE, DPI = (3.7, 2.4), 200  # inches; twice what a screen needs
ACROSS, COARSE = 3, 130  # panels to a row, and their dots an inch
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "font.size": 8,
}
PALE = 0.25  # of a curve as logged, behind itself smoothed
WIDEST = 1600  # pixels of a picture in the page: enough for a sheet at twice its size
SLOPE = "slope of the time embedding"
Points = tuple[list[int], list[float]]  # steps, values


@dataclass(frozen=True)
class Chart:
    """A chart for light and for dark pages, its title, and the words for who cannot see it."""

    title: str
    alt: str
    light: str  # a data: address
    dark: str


def embed(picture: Image.Image) -> str:
    """The picture as an address that is the picture itself, a PNG."""
    shown = picture.copy()
    shown.thumbnail((WIDEST, 8 * WIDEST))
    return _address(lambda file: shown.save(file, format="png", optimize=True))


def smoothed(values: Sequence[float]) -> np.ndarray:
    """Each value's mean with its neighbours, a fifteenth of all on either side; fewer at the ends."""
    x, reach = np.asarray(values, dtype=float), len(values) // 15
    return np.array([x[max(0, i - reach) : i + reach + 1].mean() for i in range(len(x))])


def charts(rows: Sequence[log.Row]) -> list[Chart]:
    """The log as charts: loss and rate by step, every part of the loss by step and time, validation, then notes.

    Needs two rows at least. What older rows lack, notes and gradients of the parts, is drawn from those that have it.
    """
    steps = [row["step"] for row in rows]
    first, last = rows[0], rows[-1]
    parts = list(last["parts"]) or ["loss"]
    cells = {part: np.array([row["bins"][part] for row in rows], dtype=float).T for part in parts}  # null is nan
    low, high = min(map(np.nanmin, cells.values())), max(map(np.nanmax, cells.values()))
    norm = LogNorm(low, high) if low > 0 else Normalize(low, high)
    return [
        _chart(
            "Training loss",
            f"Curves: the loss is {first['loss']:.3g} at step {steps[0]} and {last['loss']:.3g} at step {steps[-1]}.",
            lambda axes: _draw_loss(axes, rows, steps),
        ),
        _chart(
            "Learning rate",
            f"A curve: the rate is {first['lr']:.3g} at step {steps[0]} and {last['lr']:.3g} at step {steps[-1]}.",
            lambda axes: _draw_rate(axes, rows, steps),
        ),
        *_norms(rows),
        *(
            _chart(
                f"Loss of {part} by time" if part != "loss" else "Loss by time",
                f"A heat map of the part {part} of the loss: steps from left to right, data to noise upwards.",
                lambda axes, part=part: _draw_times(axes, steps, cells[part], norm),
            )
            for part in parts
        ),
        *judged(rows),
        *_watched(rows),
    ]


def _norms(rows: Sequence[log.Row]) -> Iterator[Chart]:
    """Gradient norms by module, in one chart; none of a log from before they were measured."""
    curves: dict[str, Points] = {}
    for row in rows:
        for name, value in highest_norms(row).items():
            if value:
                steps, values = curves.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    if curves:
        worst = max(curves, key=lambda name: max(curves[name][1]))
        steps, values = curves[worst]
        peak = max(values)
        alt = f"Curves, one for each module: the largest is {peak:.3g}, of {worst} at step {steps[values.index(peak)]}."
        yield _chart("Gradient norms by module", alt, partial(_draw_norms, curves=curves))


def judged(rows: Sequence[log.Row]) -> Iterator[Chart]:
    """What validation found, a chart for each score: by step, with its error where it has one."""
    found: dict[str, dict[int, tuple[float, float]]] = {}  # by name, then by step
    for row in rows:
        scores = {name: value for name, value in row.get("val", {}).items() if value is not None}
        for name in scores.keys() - {f"{name}_sd" for name in scores}:
            found.setdefault(name, {})[row["step"]] = scores[name], scores.get(f"{name}_sd", 0.0)
    for name, points in found.items():
        first, last = min(points), max(points)
        alt = f"Points: {name} is {points[first][0]:.3g} at step {first} and {points[last][0]:.3g} at step {last}."
        yield _chart(f"Validation, {name}", alt, partial(_draw_judged, name=name, points=points))


def _watched(rows: Sequence[log.Row]) -> Iterator[Chart]:
    """What else is watched, a curve each: notes of the objective; drift, and cosines of gradients, of probes."""
    found: dict[str, dict[int, float]] = {}  # by name, then by step
    for row in rows:
        probe: dict[str, Any] = row.get("probe") or {"cosines": {}, "drift": None}
        cosines = {f"cosine of {pair}": value for pair, value in probe["cosines"].items()}
        slope = {SLOPE: row.get("time_slope")}
        for name, value in {**row.get("notes", {}), **slope, "drift": probe["drift"], **cosines}.items():
            if value is not None:
                found.setdefault(name, {})[row["step"]] = value
    for name, values in sorted(found.items()):
        if len(values) > 1:
            first, *_, last = values
            alt = f"A curve: {name} is {values[first]:.3g} at step {first} and {values[last]:.3g} at step {last}."
            yield _chart(name, alt, partial(_draw_watched, name=name, values=values))


def _draw_loss(axes: Axes, rows: Sequence[log.Row], steps: Sequence[int]) -> None:
    """The loss in ink, unless it is its only part, and its parts in colour."""
    curves = {part: [row["parts"][part] for row in rows] for part in rows[-1]["parts"]}
    loss = [row["loss"] for row in rows]
    others = cycle(OTHERS)
    for part, values in curves.items():
        _draw_curve(axes, steps, values, part, color=COLOUR.get(part) or next(others))
    if loss not in curves.values():
        _draw_curve(axes, steps, loss, "loss")
    axes.set(xlabel="step", xlim=(0, None), ylabel="mean over a batch")
    if min(map(min, [loss, *curves.values()])) > 0:
        axes.set_yscale("log")
        _tick(axes.yaxis)
    axes.legend(frameon=False, ncols=3, handlelength=1.2, columnspacing=1)


def _draw_curve(axes: Axes, steps: Sequence[int], values: Sequence[float], name: str, color: str | None = None) -> None:
    """As logged, pale, and smoothed before it; in ink unless in a colour."""
    raw, *_ = axes.plot(steps, values, lw=0.8, alpha=PALE, color=color)
    mark = "." if len(steps) == 1 else None
    axes.plot(steps, smoothed(values), lw=1.5, label=name, color=raw.get_color(), marker=mark)


def _draw_norms(axes: Axes, curves: Mapping[str, Points]) -> None:
    for (name, (steps, values)), colour in zip(curves.items(), cycle(COLOURS), strict=False):
        axes.plot(steps, values, lw=1.2, label=name, color=colour, marker="." if len(steps) == 1 else None)
    axes.set(xlabel="step", xlim=(0, None), ylabel="largest of the last steps", yscale="log")
    _tick(axes.yaxis)
    axes.legend(frameon=False, ncols=3, handlelength=1.2, columnspacing=1)


def _draw_rate(axes: Axes, rows: Sequence[log.Row], steps: Sequence[int]) -> None:
    axes.plot(steps, [row["lr"] for row in rows], lw=1.4)
    axes.set(xlabel="step", xlim=(0, None), ylabel="learning rate", ylim=(0, None))
    axes.ticklabel_format(axis="y", scilimits=(-2, 3), useMathText=True)


def _draw_watched(axes: Axes, name: str, values: Mapping[int, float]) -> None:
    """A cosine between -1 and 1, the others from 0 on."""
    low, high, unit = 0, None, "mean over a batch"
    if name.startswith("cosine"):
        low, high, unit = -1, 1, "cosine"
    elif name == SLOPE:
        unit = "relative to its length"
    _draw_curve(axes, [*values], [*values.values()], name)
    axes.axhline(0, lw=0.6)
    axes.set(xlabel="step", xlim=(0, None), ylabel=unit, ylim=(low, high))


def _draw_judged(axes: Axes, name: str, points: Mapping[int, tuple[float, float]]) -> None:
    """Each score with its error, from 0 on where none is below."""
    values, errors = zip(*points.values(), strict=True)
    axes.errorbar([*points], values, yerr=errors, lw=1.2, marker=".", capsize=2)
    axes.set(xlabel="step", xlim=(0, None), ylabel=name.replace("_", " "))
    if min(value - error for value, error in points.values()) > 0:
        axes.set_ylim(0, None)


def _draw_times(axes: Axes, steps: Sequence[int], cells: np.ndarray, norm: Normalize) -> None:
    """(bins, steps) as colours; a bin that no row of the batch fell into stays empty."""
    bins = len(cells)
    mesh = axes.pcolormesh(steps, (np.arange(bins) + 0.5) / bins, cells, norm=norm, cmap="magma", shading="nearest")
    axes.set(xlabel="step", ylabel="t, from data to noise", yticks=(0, 0.5, 1))
    bar = axes.figure.colorbar(mesh, ax=axes, label="mean over its rows", pad=0.02)
    bar.outline.set_visible(False)
    if isinstance(norm, LogNorm):
        _tick(bar.ax.yaxis)


def _tick(axis: Axis) -> None:
    """1, 2 and 5 of every power of ten, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def _chart(title: str, alt: str, draw: Callable[[Axes], None]) -> Chart:
    """Draw in both inks."""
    return Chart(title, alt, *(_paint(ink, draw) for ink in INK.values()))


def _paint(ink: str, draw: Callable[[Axes], None]) -> str:
    """A figure of one pair of axes, on no ground."""
    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = dict.fromkeys(names, ink) | {"axes.prop_cycle": f"cycler('color', ['{ink}'])"}
    with rc_context(STYLE | style):
        figure = Figure(SIZE, layout="constrained")
        draw(figure.subplots())
        return _address(lambda file: figure.savefig(file, format="png", dpi=DPI, transparent=True))


def _address(save: Callable[[BytesIO], object]) -> str:
    """What `save` writes, a PNG, as an address that is the picture itself."""
    file = BytesIO()
    save(file)
    return "data:image/png;base64," + b64encode(file.getvalue()).decode()


def curves(runs: Mapping[str, Sequence[log.Row]]) -> Image.Image:
    """All panels: loss, its parts, the gradient norm, the rate, validation, notes, drift, images a second."""
    return drawn(panels(runs))


def panels(runs: Mapping[str, Sequence[log.Row]]) -> Figure:
    """The figure of these runs, by name."""
    found = {name: series(rows) for name, rows in runs.items()}
    titles = list(dict.fromkeys(title for one in found.values() for title in one))
    down, across = -(-len(titles) // ACROSS), min(ACROSS, len(titles))
    with rc_context(STYLE):
        figure = Figure((across * SIZE[0], down * SIZE[1]), dpi=COARSE, layout="constrained")
        grid = figure.subplots(down, across, squeeze=False).ravel()
        for axes, title in zip(grid, titles, strict=False):
            for (name, one), colour in zip(found.items(), cycle(COLOURS), strict=False):
                if title in one:
                    _draw_curve(axes, *one[title], name, colour)
            _finish(axes, title)
        for axes in grid[len(titles) :]:
            axes.set_axis_off()
        for rows, colour in zip(runs.values(), cycle(COLOURS), strict=False):
            skipped = [row["step"] for row in rows if row.get("skipped")]  # ticks at the foot of the loss
            foot = grid[0].get_xaxis_transform()
            grid[0].plot(skipped, [0.02] * len(skipped), "|", color=colour, ms=7, transform=foot)
        if len(runs) > 1:
            figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper left", frameon=False, ncols=ACROSS)
    return figure


def series(rows: Sequence[log.Row]) -> dict[str, Points]:
    """What the rows measured, by name, each at the steps at which it is a finite number."""
    found: dict[str, Points] = {}
    for row in rows:
        parts, probe = row.get("parts", {}), row.get("probe") or {}
        numbers = {
            "loss": row.get("loss"),
            **(parts if log.weighted(row.get("loss"), parts) else {}),
            "gradient norm": row.get("grad_norm"),
            **{f"gradient norm, {name}": value for name, value in highest_norms(row).items()},
            SLOPE: row.get("time_slope"),
            "learning rate": row.get("lr"),
            **{f"validation, {name}": value for name, value in row.get("val", {}).items() if not name.endswith("_sd")},
            **row.get("notes", {}),
            "drift": probe.get("drift"),
            "images a second": row.get("speed", {}).get("images_per_second"),
        }
        for name, value in numbers.items():
            if isinstance(value, int | float) and isfinite(value):
                steps, values = found.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    return found


def highest_norms(row: log.Row) -> dict[str, float | None]:
    """The gradient norm of each module, the largest of the last steps; none in logs from before it was measured."""
    return row.get("grad_peaks") or row.get("grad_norms") or {}


def _finish(axes: Axes, title: str) -> None:
    """Title and scale: by powers of ten where all is positive and some of it far from the rest."""
    axes.set(title=title, xlabel="step")
    low, high = axes.dataLim.intervaly
    if title != "learning rate" and 0 < 10 * low < high:
        axes.set_yscale("log")
