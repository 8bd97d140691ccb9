"""Charts: numbers as curves, points with errors, heat maps, dots on lines and bars.

The one place that sets style, colours and scales. A `Chart` of a page is drawn twice, in the ink of a light and of a
dark page, on no ground of its own; the page picks one. The others are pictures on white. What is drawn, and from which
numbers, say `dumo.report.figure` (the logs of runs) and `dumo.lab` (tables of many runs).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from math import isfinite
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator
from PIL import Image

from dumo.config.word import MERITS, word
from dumo.io import picture

INK = {"light": "#23262b", "dark": "#dedbd4"}
INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
STYLE: dict[Any, Any] = {  # of charts of logs
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "font.size": 8,
}
SIZE = (3.7, 2.4)  # inches, of a chart in a page
DPI = 200  # of a chart in a page: twice what a screen needs
TABLE_DPI = 150  # of a picture of its own
COLOURS = ("#3d9657", "#3f7fbf", "#d2603a", "#8b62b0", "#b08c2c", "#5b6470", "#c2577f")  # of arms, in turn
MARKS = "*osDv^P"  # DuMo, which comes first, as green stars, as the paper has it

Curve = Sequence[tuple[float, float, float | None]]  # x, y, the deviation of y
Dot = tuple[float, float | None]  # a number and its deviation


@dataclass(frozen=True)
class Chart:
    """A chart for light and for dark pages, its title, and the words for who cannot see it."""

    title: str
    alt: str
    light: Image.Image
    dark: Image.Image


def chart(title: str, alt: str, draw: Callable[[Axes], None]) -> Chart:
    """What `draw` puts into a pair of axes, in both inks."""
    return Chart(title, alt, light=_inked(INK["light"], draw), dark=_inked(INK["dark"], draw))


def _inked(ink: str, draw: Callable[[Axes], None]) -> Image.Image:
    """A figure of one pair of axes, on no ground."""
    style: dict[Any, Any] = dict.fromkeys(INKED, ink)
    style["axes.prop_cycle"] = f"cycler('color', ['{ink}'])"
    style["axes.facecolor"] = "none"
    with rc_context(STYLE | style):
        figure = Figure(SIZE, dpi=DPI, facecolor="none", layout="constrained")
        draw(figure.subplots())
        return picture.from_figure(figure)


def score_label(score: str) -> str:
    """The label of an axis of this score, whose errors are deviations over seeds."""
    merit = word(MERITS, score)
    return f"{merit.title} ({merit.better}), mean ± deviation over seeds"


def curves(
    title: str,
    x: str,
    y: str,
    points: Mapping[str, Curve],
    *,
    level: tuple[float, str] | None = None,
) -> Image.Image:
    """A curve per name, with error bars where a deviation is known; y on a log scale.

    With `level`, a height and its name, both axes are logarithms, and a dashed line shows that height.
    """
    figure = Figure((8.0 if level else 6.4, 4.2), dpi=TABLE_DPI, layout="constrained")
    axes = figure.subplots()
    for (name, curve), colour, mark in zip(points.items(), cycle(COLOURS), cycle(MARKS), strict=False):
        xs, ys, deviations = zip(*sorted(curve), strict=True)
        axes.errorbar(
            xs,
            ys,
            _error_bars(ys, deviations),
            color=colour,
            marker=mark,
            markersize=9 if mark == "*" else 5,
            linewidth=1.4,
            capsize=3,
            label=name,
        )
    if level:
        height, level_name = level
        axes.axhline(height, color="0.4", linewidth=1, linestyle="--", label=level_name)
        axes.set_xscale("log")
        places = sorted({place for curve in points.values() for place, _, _ in curve})
        axes.set_xticks(places, [f"{place:.2g}" for place in places])
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set(title=title, xlabel=x, ylabel=fill(y, 42))
    log_unless_narrow(axes.yaxis, axes.set_yscale)
    axes.grid(alpha=0.25, which="both")
    if level:
        figure.legend(frameon=False, loc="outside right upper")
    else:
        axes.legend(frameon=False)
    return picture.from_figure(figure)


def heat(title: str, x: str, y: str, values: Mapping[tuple[float, float], float], scale: str) -> Image.Image:
    """A cell per (x, y) with its number, x to the right, y upwards; `scale` says what the colours mean.

    The least number is bold.
    """
    xs = sorted({place for place, _ in values})
    ys = sorted({place for _, place in values})
    table = np.full((len(ys), len(xs)), np.nan)
    for (a, b), value in values.items():
        table[ys.index(b), xs.index(a)] = value
    figure = Figure((1.5 + 0.85 * len(xs), 1.3 + 0.7 * len(ys)), dpi=TABLE_DPI, layout="constrained")
    axes = figure.subplots()
    mesh = axes.imshow(table, origin="lower", cmap="RdYlBu_r", aspect="auto")
    low = np.nanmin(table)
    high = np.nanmax(table)
    for (j, i), value in np.ndenumerate(table):
        if isfinite(value):
            is_pale = high == low or 0.15 < (value - low) / (high - low) < 0.85
            axes.text(
                i,
                j,
                f"{value:.2f}",
                ha="center",
                va="center",
                color="black" if is_pale else "white",
                weight="bold" if value == low else "normal",
            )
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.set_xticks(range(len(xs)), [f"{place:g}" for place in xs])
    axes.set_yticks(range(len(ys)), [f"{place:g}" for place in ys])
    figure.colorbar(mesh, ax=axes, label=scale, pad=0.02)
    return picture.from_figure(figure)


def dots(title: str, x: str, lines: Mapping[str, Mapping[str, Dot]], names: Sequence[str] = ()) -> Image.Image:
    """A line per name, from the top, with a mark for each of `names`: a number and its deviation, on a log scale."""
    names = names or list(dict.fromkeys(name for line in lines.values() for name in line))
    width = max(7.6, 5 + 0.075 * max(map(len, lines)))  # half of it for the marks, however long the names
    figure = Figure((width, 1.7 + 0.3 * len(lines)), dpi=TABLE_DPI, layout="constrained")
    axes = figure.subplots()
    for y, line in enumerate(lines.values()):
        xs = [value for value, _ in line.values()]
        axes.plot([min(xs), max(xs)], [y, y], color="0.85", linewidth=3, zorder=1, solid_capstyle="round")
    for name, colour, mark in zip(names, cycle(COLOURS), cycle(MARKS), strict=False):
        marked = [(y, *line[name]) for y, line in enumerate(lines.values()) if name in line]
        ys, xs, deviations = zip(*marked, strict=True)
        axes.errorbar(
            xs,
            ys,
            xerr=_error_bars(xs, deviations),
            fmt=mark,
            color=colour,
            markersize=9 if mark == "*" else 6,
            elinewidth=1,
            capsize=2,
            label=name,
            zorder=2,
        )
    axes.set(ylim=(len(lines) - 0.5, -0.5))
    axes.set_yticks(range(len(lines)), list(lines))
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    log_unless_narrow(axes.xaxis, axes.set_xscale)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.suptitle(title, weight="bold")
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False, handletextpad=0.3, columnspacing=1.2
    )
    figure.supxlabel(x, fontsize="medium")
    return picture.from_figure(figure)


def bars(title: str, x: str, y: str, groups: Mapping[str, Mapping[str, float]]) -> Image.Image:
    """A group of bars per name, in it a bar per name of its own, with its number on top."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    width = 0.85 / len(names)
    figure = Figure((max(6.4, 1.5 + 0.4 * len(groups) * len(names)), 4.6), dpi=TABLE_DPI, layout="constrained")
    axes = figure.subplots()
    for k, (name, colour) in enumerate(zip(names, cycle(COLOURS), strict=False)):
        offset = (k - (len(names) - 1) / 2) * width
        heights = {i + offset: group[name] for i, group in enumerate(groups.values()) if name in group}
        drawn = axes.bar(list(heights), list(heights.values()), width * 0.9, color=colour, label=name)
        axes.bar_label(drawn, [f"{value:.3g}" for value in heights.values()], fontsize=6.5, padding=2)
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.margins(y=0.12)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return picture.from_figure(figure)


def _error_bars(values: Sequence[float], deviations: Sequence[float | None]) -> list[list[float]] | None:
    """How far error bars go down and up; never down to zero, which a log scale does not have."""
    if not any(deviations):
        return None
    up = [deviation or 0 for deviation in deviations]
    down = [min(length, 0.9 * value) for length, value in zip(up, values, strict=True)]
    return [down, up]


def log_unless_narrow(axis: Axis, set_scale: Callable[[str], None]) -> None:
    """A log scale with plain numbers; a linear one where the range is less than half, or not above zero."""
    low, high = axis.get_data_interval()
    if low > 0 and high >= 1.5 * low:
        set_scale("log")
        log_ticks(axis, low, high)


def log_ticks(axis: Axis, low: float, high: float) -> None:
    """Plain numbers on the log scale of numbers from `low` to `high`, closer where these are near one another."""
    if high < 5 * low:
        steps = (1, 1.5, 2, 3, 5, 7)
    elif high < 50 * low:
        steps = (1, 2, 5)
    else:
        steps = (1, 3)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
