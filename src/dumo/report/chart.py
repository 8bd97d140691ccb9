"""Charts: curves, points with errors, heat maps and bars, and the one place that sets their style and colours.

`in_both_inks` draws a chart of a page twice, for a light and a dark page, with a transparent background; the page picks
one. `curves`, `heat_map`, `dots` and `bars` are pictures of their own, on white; `score_label` names their axes.
`dumo.report.figure` (the logs of runs) and `dumo.lab` (tables of many runs) choose what is drawn, and draw in their own
axes with `log_unless_narrow` and `log_ticks`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from math import isfinite
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator
from PIL import Image

from dumo.config.word import MERITS, word
from dumo.io import picture

LIGHT_INK = "#23262b"  # on a light page
DARK_INK = "#dedbd4"  # on a dark page
INK_SETTINGS = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
PAGE_STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "font.size": 8,
}
PAGE_SIZE = (3.7, 2.4)  # inches
PAGE_DPI = 200  # twice what a screen needs
PICTURE_DPI = 150
COLOURS = ("#3d9657", "#3f7fbf", "#d2603a", "#8b62b0", "#b08c2c", "#5b6470", "#c2577f")  # of arms, in turn
MARKS = "*osDv^P"  # DuMo, which comes first, as green stars, as the paper has it


class CurvePoint(NamedTuple):
    """A point of a curve, and the standard deviation of y, if it is known."""

    x: float
    y: float
    deviation: float | None


class Dot(NamedTuple):
    """A value and its standard deviation, if that is known."""

    value: float
    deviation: float | None


class Level(NamedTuple):
    """A height that a dashed line shows, and the line's name in the legend."""

    height: float
    name: str


@dataclass(frozen=True)
class Chart:
    """A chart for light and for dark pages, its title, and a description for who cannot see it."""

    title: str
    alt: str
    light: Image.Image
    dark: Image.Image


def in_both_inks(title: str, alt: str, draw: Callable[[Axes], None]) -> Chart:
    """The chart that `draw` puts into a pair of axes, in the ink of a light and of a dark page."""
    return Chart(title, alt, light=_inked(LIGHT_INK, draw), dark=_inked(DARK_INK, draw))


def _inked(ink: str, draw: Callable[[Axes], None]) -> Image.Image:
    """A figure of one pair of axes in one ink, with a transparent background."""
    style: dict[Any, Any] = dict.fromkeys(INK_SETTINGS, ink)
    style["axes.prop_cycle"] = f"cycler('color', ['{ink}'])"
    style["axes.facecolor"] = "none"
    with rc_context(PAGE_STYLE | style):
        figure = Figure(PAGE_SIZE, dpi=PAGE_DPI, facecolor="none", layout="constrained")
        draw(figure.subplots())
        return picture.from_figure(figure)


def score_label(score: str) -> str:
    """The label of an axis of this score, whose errors are deviations over seeds."""
    merit = word(MERITS, score)
    return f"{merit.title} ({merit.better}), mean ± deviation over seeds"


def curves(
    title: str,
    x_label: str,
    y_label: str,
    points: Mapping[str, Sequence[CurvePoint]],
    *,
    log_x: bool = False,
    level: Level | None = None,
) -> Image.Image:
    """A curve per name, with error bars where a deviation is known.

    y has a log scale unless the values span less than a factor 1.5 or reach zero; x has one with `log_x`, and a tick
    at each point. `level` is a height to compare with; with it the legend stands above the axes.
    """
    figure = Figure((8.0 if level else 6.4, 4.2), dpi=PICTURE_DPI, layout="constrained")
    axes = figure.subplots()
    is_positive = all(point.y > 0 for curve in points.values() for point in curve)
    for (name, curve), colour, mark in zip(points.items(), cycle(COLOURS), cycle(MARKS), strict=False):
        ordered = sorted(curve, key=lambda point: (point.x, point.y))
        ys = [point.y for point in ordered]
        axes.errorbar(
            [point.x for point in ordered],
            ys,
            _error_bars(ys, [point.deviation for point in ordered], is_positive),
            color=colour,
            marker=mark,
            markersize=9 if mark == "*" else 5,
            linewidth=1.4,
            capsize=3,
            label=name,
        )
    if level:
        axes.axhline(level.height, color="0.4", linewidth=1, linestyle="--", label=level.name)
    if log_x:
        axes.set_xscale("log")
        ticks = sorted({point.x for curve in points.values() for point in curve})
        axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set(title=title, xlabel=x_label, ylabel=fill(y_label, 42))
    log_unless_narrow(axes.yaxis, axes.set_yscale)
    axes.grid(alpha=0.25, which="both")
    if level:
        figure.legend(frameon=False, loc="outside right upper")
    else:
        axes.legend(frameon=False)
    return picture.from_figure(figure)


def heat_map(
    title: str, x_label: str, y_label: str, values: Mapping[tuple[float, float], float], colour_label: str
) -> Image.Image:
    """A cell per (x, y) with its value, x to the right, y upwards; the least value is bold."""
    xs = sorted({x for x, _ in values})
    ys = sorted({y for _, y in values})
    table = np.full((len(ys), len(xs)), np.nan)
    for (x, y), value in values.items():
        table[ys.index(y), xs.index(x)] = value
    figure = Figure((1.5 + 0.85 * len(xs), 1.3 + 0.7 * len(ys)), dpi=PICTURE_DPI, layout="constrained")
    axes = figure.subplots()
    mesh = axes.imshow(table, origin="lower", cmap="RdYlBu_r", aspect="auto")
    low = np.nanmin(table)
    high = np.nanmax(table)
    for (row, column), value in np.ndenumerate(table):
        if isfinite(value):
            is_pale = high == low or 0.15 < (value - low) / (high - low) < 0.85
            axes.text(
                column,
                row,
                f"{value:.2f}",
                ha="center",
                va="center",
                color="black" if is_pale else "white",
                weight="bold" if value == low else "normal",
            )
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
    axes.set_yticks(range(len(ys)), [f"{y:g}" for y in ys])
    figure.colorbar(mesh, ax=axes, label=colour_label, pad=0.02)
    return picture.from_figure(figure)


def dots(title: str, x_label: str, lines: Mapping[str, Mapping[str, Dot]], names: Sequence[str] = ()) -> Image.Image:
    """A line per entry of `lines`, the first on top, with a mark for each of `names` that it has a value of.

    Marks have error bars where a deviation is known. x has a log scale unless the values span less than a factor 1.5
    or reach zero. `names` sets the order of colours; () is all names, as they come.
    """
    names = names or _all_names(lines)
    width = max(7.6, 5 + 0.075 * max(map(len, lines)))  # half of it for the marks, however long the names
    figure = Figure((width, 1.7 + 0.3 * len(lines)), dpi=PICTURE_DPI, layout="constrained")
    axes = figure.subplots()
    is_positive = all(dot.value > 0 for line in lines.values() for dot in line.values())
    for row, line in enumerate(lines.values()):
        values = [dot.value for dot in line.values()]
        axes.plot([min(values), max(values)], [row, row], color="0.85", linewidth=3, zorder=1, solid_capstyle="round")
    for name, colour, mark in zip(names, cycle(COLOURS), cycle(MARKS), strict=False):
        marked = {row: line[name] for row, line in enumerate(lines.values()) if name in line}
        if not marked:
            continue
        values = [dot.value for dot in marked.values()]
        axes.errorbar(
            values,
            list(marked),
            xerr=_error_bars(values, [dot.deviation for dot in marked.values()], is_positive),
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
    figure.supxlabel(x_label, fontsize="medium")
    return picture.from_figure(figure)


def bars(title: str, x_label: str, y_label: str, groups: Mapping[str, Mapping[str, float]]) -> Image.Image:
    """A group of bars per entry of `groups`, a bar per name in it, with its value on top."""
    names = _all_names(groups)
    width = 0.85 / len(names)
    figure = Figure((max(6.4, 1.5 + 0.4 * len(groups) * len(names)), 4.6), dpi=PICTURE_DPI, layout="constrained")
    axes = figure.subplots()
    for number, (name, colour) in enumerate(zip(names, cycle(COLOURS), strict=False)):
        offset = (number - (len(names) - 1) / 2) * width  # from the middle of the group
        heights = {place + offset: group[name] for place, group in enumerate(groups.values()) if name in group}
        drawn_bars = axes.bar(list(heights), list(heights.values()), width * 0.9, color=colour, label=name)
        axes.bar_label(drawn_bars, [f"{value:.3g}" for value in heights.values()], fontsize=6.5, padding=2)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.margins(y=0.12)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return picture.from_figure(figure)


def _all_names(groups: Mapping[str, Iterable[str]]) -> list[str]:
    """The names in any of the groups, each once, in the order in which they first come."""
    return list(dict.fromkeys(name for group in groups.values() for name in group))


def _error_bars(
    values: Sequence[float], deviations: Sequence[float | None], is_positive: bool
) -> list[list[float]] | None:
    """The lengths of error bars, downwards and upwards; None where no deviation is known.

    In a chart whose values are all positive (`is_positive`) no bar reaches down to zero, which a log scale does not
    have.
    """
    if not any(deviations):
        return None
    up = [deviation or 0 for deviation in deviations]
    if not is_positive:
        return [up, up]
    down = [min(length, 0.9 * value) for length, value in zip(up, values, strict=True)]
    return [down, up]


def log_unless_narrow(axis: Axis, set_scale: Callable[[str], None]) -> None:
    """Give an axis a log scale with plain numbers; linear where high < 1.5 low, or where low is not positive.

    `low` and `high` are the ends of what has been drawn; `set_scale` is the axes' setter of that axis' scale.
    """
    low, high = axis.get_data_interval()
    if low > 0 and high >= 1.5 * low:
        set_scale("log")
        log_ticks(axis, low, high)


def log_ticks(axis: Axis, low: float, high: float) -> None:
    """Plain numbers on a log scale from `low` to `high`: the nearer these, the closer the ticks."""
    if high < 5 * low:
        steps = (1, 1.5, 2, 3, 5, 7)
    elif high < 50 * low:
        steps = (1, 2, 5)
    else:
        steps = (1, 3)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
