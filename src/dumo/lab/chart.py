"""Charts: curves with error bars, a heat map with its numbers, dots on lines, bars; and samples of all arms."""

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from math import isfinite
from textwrap import fill

import numpy as np
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator
from PIL import Image

from dumo.config.word import MERITS, word
from dumo.io import picture
from dumo.lab.cell import Result, Row, by_arm, main_score
from dumo.report.score import figures
from dumo.runtime.progress import passes_text

COLOURS = ("#3d9657", "#3f7fbf", "#d2603a", "#8b62b0", "#b08c2c", "#5b6470", "#c2577f")
MARKS = "*osDv^P"  # DuMo, which comes first, as green stars, as the paper has it
Curve = Sequence[tuple[float, float, float | None]]  # x, y, the deviation of y


def axis(score: str) -> str:
    """The label of an axis of this score."""
    of = word(MERITS, score)
    return f"{of.title} ({of.better}), mean ± deviation over seeds"


def ranking(title: str, rows: Sequence[Row]) -> Image.Image:
    """The main score, a line per arm, the best in the fewest passes on top, a mark per number of passes."""
    score = main_score(rows[0])
    nfes = sorted({row["nfe"] for row in rows})
    points: dict[str, dict[str, tuple[float, float | None]]] = {}
    for row in sorted(rows, key=lambda row: (row["nfe"], row[score])):
        points.setdefault(str(next(iter(row.values()))), {})[passes_text(row["nfe"])] = (
            row[score],
            row.get(f"{score}_sd"),
        )
    return dots(title, axis(score), points, [passes_text(n) for n in nfes])


def samples(results: Sequence[Result]) -> Image.Image:
    """What the first seed of every arm makes in its fewest passes, two of a class, below its score: the best first."""
    score = figures(results[0].report["results"][0])[0]
    blocks: dict[str, tuple[float, Image.Image]] = {}
    for one, *_ in by_arm(results):
        run, value = one.trained.run, one.report["results"][0][score]
        across = max(run.data.labels, 10)
        c = run.conditions.in_turn(across)
        made = one.trained.sampler.sample(c.repeat(2), nfe=one.report["results"][0]["nfe"])
        names = [run.conditions.name(k) for k in c.tolist()[: run.data.labels]]
        sheet = picture.headed(picture.sheet(picture.to_rows(made.x), across), names)
        blocks[f"{next(iter(one.cell.labels.values()))}, {value:.3g}"] = value, sheet
    best = {name: sheet for name, (_, sheet) in sorted(blocks.items(), key=lambda of: of[1][0])}
    of = word(MERITS, score)
    note = f"One pass of each (its fewest), seed 0. The number: {of.title}; {of.better}."
    return picture.gathered(best, note=note)


def curves(
    title: str,
    x: str,
    y: str,
    rows: Mapping[str, Curve],
    *,
    level: tuple[float, str] | None = None,
) -> Image.Image:
    """A curve per name, with error bars where a deviation is known; y on a log scale.

    With `level`, a height and its name, both axes are logarithms, and a dashed line shows that height.
    """
    figure = Figure((8.0 if level else 6.4, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    for (name, points), colour, mark in zip(rows.items(), cycle(COLOURS), cycle(MARKS), strict=False):
        xs, ys, sds = zip(*sorted(points), strict=True)
        bars = _bars(ys, sds)
        size = 9 if mark == "*" else 5
        axes.errorbar(xs, ys, bars, color=colour, marker=mark, ms=size, lw=1.4, capsize=3, label=name)
    if level:
        axes.axhline(level[0], color="0.4", lw=1, ls="--", label=level[1])
        axes.set_xscale("log")
        places = sorted({place for points in rows.values() for place, _, _ in points})
        axes.set_xticks(places, [f"{place:.2g}" for place in places])
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set(title=title, xlabel=x, ylabel=fill(y, 42))
    _spread(axes.yaxis, axes.set_yscale)
    axes.grid(alpha=0.25, which="both")
    if level:
        figure.legend(frameon=False, loc="outside right upper")
    else:
        axes.legend(frameon=False)
    return picture.drawn(figure)


def heat(title: str, x: str, y: str, values: Mapping[tuple[float, float], float], scale: str) -> Image.Image:
    """A cell per (x, y) with its number, x to the right, y upwards; `scale` says what the colours mean."""
    xs, ys = (sorted({key[i] for key in values}) for i in (0, 1))
    table = np.array([[values.get((a, b), np.nan) for a in xs] for b in ys])
    figure = Figure((1.5 + 0.85 * len(xs), 1.3 + 0.7 * len(ys)), dpi=150, layout="constrained")
    axes = figure.subplots()
    mesh = axes.imshow(table, origin="lower", cmap="RdYlBu_r", aspect="auto")
    low, high = np.nanmin(table), np.nanmax(table)
    for (j, i), value in np.ndenumerate(table):
        if isfinite(value):
            middle = high == low or 0.15 < (value - low) / (high - low) < 0.85
            best = "bold" if value == low else "normal"
            axes.text(i, j, f"{value:.2f}", ha="center", va="center", color="black" if middle else "white", weight=best)
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.set_xticks(range(len(xs)), [f"{a:g}" for a in xs])
    axes.set_yticks(range(len(ys)), [f"{b:g}" for b in ys])
    figure.colorbar(mesh, ax=axes, label=scale, pad=0.02)
    return picture.drawn(figure)


def dots(
    title: str,
    x: str,
    rows: Mapping[str, Mapping[str, tuple[float, float | None]]],
    names: Sequence[str] = (),
) -> Image.Image:
    """A line per name, from the top, with a mark for each of `names`: a number and its deviation, on a log scale."""
    names = names or list(dict.fromkeys(name for row in rows.values() for name in row))
    wide = max(7.6, 5 + 0.075 * max(map(len, rows)))  # half of it for the marks, however long the names
    figure = Figure((wide, 1.7 + 0.3 * len(rows)), dpi=150, layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(rows.values()):
        xs = [value for value, _ in row.values()]
        axes.plot([min(xs), max(xs)], [y, y], color="0.85", lw=3, zorder=1, solid_capstyle="round")
    for name, colour, mark in zip(names, cycle(COLOURS), cycle(MARKS), strict=False):
        there = [(y, *row[name]) for y, row in enumerate(rows.values()) if name in row]
        ys, xs, sds = zip(*there, strict=True)
        bars, size = _bars(xs, sds), 9 if mark == "*" else 6
        axes.errorbar(xs, ys, xerr=bars, fmt=mark, color=colour, ms=size, elinewidth=1, capsize=2, label=name, zorder=2)
    axes.set(ylim=(len(rows) - 0.5, -0.5))
    axes.set_yticks(range(len(rows)), list(rows))
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    _spread(axes.xaxis, axes.set_xscale)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.suptitle(title, weight="bold")
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False, handletextpad=0.3, columnspacing=1.2
    )
    figure.supxlabel(x, fontsize="medium")
    return picture.drawn(figure)


def bars(title: str, x: str, y: str, rows: Mapping[str, Mapping[str, float]]) -> Image.Image:
    """A group of bars per name, in it a bar per name of its own, with its number on top."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    width = 0.85 / len(names)
    figure = Figure((max(6.4, 1.5 + 0.4 * len(rows) * len(names)), 4.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    for k, (name, colour) in enumerate(zip(names, cycle(COLOURS), strict=False)):
        there = [(i, row[name]) for i, row in enumerate(rows.values()) if name in row]
        at, values = [i + (k - (len(names) - 1) / 2) * width for i, _ in there], [value for _, value in there]
        drawn = axes.bar(at, values, width * 0.9, color=colour, label=name)
        axes.bar_label(drawn, [f"{value:.3g}" for value in values], fontsize=6.5, padding=2)
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.set_xticks(range(len(rows)), list(rows))
    axes.margins(y=0.12)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return picture.drawn(figure)


def _bars(values: Sequence[float], sds: Sequence[float | None]) -> list[list[float]] | None:
    """How far error bars go down and up; never down to zero, which a log scale does not have."""
    if not any(sds):
        return None
    return [[min(sd or 0, 0.9 * value) for value, sd in zip(values, sds, strict=True)], [sd or 0 for sd in sds]]


def _spread(axis: Axis, set_scale: Callable[[str], None]) -> None:
    """A log scale with plain numbers, closer where the range is narrow; a linear one where it is less than half."""
    low, high = axis.get_data_interval()
    if low <= 0 or high < 1.5 * low:
        return
    set_scale("log")
    axis.set_major_locator(
        LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if high < 5 * low else (1, 2, 5) if high < 50 * low else (1, 3))
    )
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
