"""Draw charts of the results of plans: curves, points with error bars, heat maps and bars.

`score_label` names their axes, and `log_unless_narrow` chooses between a linear and a logarithmic scale.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from math import isfinite
from textwrap import fill
from typing import NamedTuple

import numpy as np
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator
from PIL import Image

from dumo.config.word import MERITS, word
from dumo.io import picture

PICTURE_DPI = 150
# Colours of names, in order. DuMo, which comes first, has green stars as in the paper.
COLOURS = ("#3d9657", "#3f7fbf", "#d2603a", "#8b62b0", "#b08c2c", "#5b6470", "#c2577f", "#2a9d9d")
MARKS = "*osDv^PX"
# Letters per inch of a bold title and of an axis label.
TITLE_LETTERS_PER_INCH = 8
LABEL_LETTERS_PER_INCH = 11
# An axis whose ends have this ratio or more gets a logarithmic scale.
MAX_LINEAR_RATIO = 1.5


class CurvePoint(NamedTuple):
    """A point of a curve."""

    x: float
    y: float
    deviation: float | None  # the standard deviation of y, if known


class Dot(NamedTuple):
    """A value that is drawn as a mark."""

    value: float
    deviation: float | None  # its standard deviation, if known


class Level(NamedTuple):
    """A dashed line at a height."""

    height: float
    name: str  # in the legend


def score_label(score: str) -> str:
    """Return the axis label for means and standard deviations of this score over seeds."""
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
    """Draw a curve per name, with error bars if standard deviations are known.

    y has a log scale unless the values span less than a factor of MAX_LINEAR_RATIO or reach zero. With `log_x`, x has a
    log scale and a tick at each point. With a `level`, the legend is above the axes.
    """
    figure = Figure((8.0 if level else 6.4, 4.2), dpi=PICTURE_DPI, layout="constrained")
    axes = figure.subplots()
    is_positive = all(point.y > 0 for curve in points.values() for point in curve)
    for (name, curve), colour, mark in zip(points.items(), cycle(COLOURS), cycle(MARKS), strict=False):
        sorted_points = sorted(curve, key=lambda point: (point.x, point.y))
        ys = [point.y for point in sorted_points]
        deviations = [point.deviation for point in sorted_points]
        axes.errorbar(
            [point.x for point in sorted_points],
            ys,
            _error_bars(ys, deviations, is_positive=is_positive),
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
    """Draw a heat map of the value of each (x, y), with the values as text; the minimum is bold."""
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
    """Draw a row per entry of `lines`, the first on top, with a mark for each value.

    Marks have error bars if standard deviations are known. x has a log scale unless the values span less than a factor
    of MAX_LINEAR_RATIO or reach zero. `names` sets the order of colours; () means the order of appearance.
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
        dots_by_row = {row: line[name] for row, line in enumerate(lines.values()) if name in line}
        if not dots_by_row:
            continue
        values = [dot.value for dot in dots_by_row.values()]
        deviations = [dot.deviation for dot in dots_by_row.values()]
        axes.errorbar(
            values,
            list(dots_by_row),
            xerr=_error_bars(values, deviations, is_positive=is_positive),
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
    figure.suptitle(fill(title, int(width * TITLE_LETTERS_PER_INCH)), weight="bold")
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False, handletextpad=0.3, columnspacing=1.2
    )
    figure.supxlabel(fill(x_label, int(width * LABEL_LETTERS_PER_INCH)), fontsize="medium")
    return picture.from_figure(figure)


def bars(title: str, x_label: str, y_label: str, groups: Mapping[str, Mapping[str, float]]) -> Image.Image:
    """Draw a group of bars per entry of `groups`, with the values on top."""
    names = _all_names(groups)
    width = 0.85 / len(names)
    figure = Figure((max(6.4, 1.5 + 0.4 * len(groups) * len(names)), 4.6), dpi=PICTURE_DPI, layout="constrained")
    axes = figure.subplots()
    for number, (name, colour) in enumerate(zip(names, cycle(COLOURS), strict=False)):
        offset = (number - (len(names) - 1) / 2) * width  # from the middle of the group
        heights = {x + offset: group[name] for x, group in enumerate(groups.values()) if name in group}
        drawn_bars = axes.bar(list(heights), list(heights.values()), width * 0.9, color=colour, label=name)
        axes.bar_label(drawn_bars, [f"{value:.3g}" for value in heights.values()], fontsize=6.5, padding=2)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.margins(y=0.12)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return picture.from_figure(figure)


def _all_names(groups: Mapping[str, Iterable[str]]) -> list[str]:
    """Return the distinct names in all groups, in order of first appearance."""
    return list(dict.fromkeys(name for group in groups.values() for name in group))


def _error_bars(
    values: Sequence[float], deviations: Sequence[float | None], *, is_positive: bool
) -> list[list[float]] | None:
    """Return the lengths of error bars, downwards and upwards, or None if there are no standard deviations.

    If `is_positive`, all values of the chart are positive, and bars are clipped above zero for a log scale.
    """
    if not any(deviations):
        return None
    up = [deviation or 0 for deviation in deviations]
    if not is_positive:
        return [up, up]
    down = [min(length, 0.9 * value) for length, value in zip(up, values, strict=True)]
    return [down, up]


def log_unless_narrow(axis: Axis, set_scale: Callable[[str], None]) -> None:
    """Give an axis a log scale with plain numbers, unless the values span little or reach zero.

    `set_scale` is the setter of the axis' scale, `axes.set_xscale` or `axes.set_yscale`.
    """
    low, high = axis.get_data_interval()
    if low > 0 and high >= MAX_LINEAR_RATIO * low:
        set_scale("log")
        log_ticks(axis, low, high)


def log_ticks(axis: Axis, low: float, high: float) -> None:
    """Put plain numbers on a log scale from `low` to `high`. A narrower range gets denser ticks."""
    if high < 5 * low:
        steps = (1, 1.5, 2, 3, 5, 7)
    elif high < 50 * low:
        steps = (1, 2, 5)
    else:
        steps = (1, 3)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
