"""Charts show every value that there is: negative ones, too, and names that no line has a value of."""

import numpy as np
import pytest
from matplotlib.axes import Axes

from dumo.report.chart import CurvePoint, Dot, Level, curves, dots


def errors_of(monkeypatch: pytest.MonkeyPatch) -> list[list[list[float]]]:
    """The lengths of error bars, down and up, of each call of `Axes.errorbar` from now on."""
    seen: list[list[list[float]]] = []
    draw = Axes.errorbar

    def watched(axes: Axes, x: list[float], y: list[float], yerr: object = None, **options: object) -> object:
        seen.append(options.get("xerr") or yerr)  # pyright: ignore[reportArgumentType]
        return draw(axes, x, y, yerr, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Axes, "errorbar", watched)
    return seen


def test_a_negative_mean_has_error_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unbiased scores fall below zero: their axis is linear, and no bar is cut."""
    seen = errors_of(monkeypatch)
    points = [CurvePoint(1, 0.5, 0.7), CurvePoint(2, -0.1, 0.2)]
    curves("T", "budget", "distance", {"a": points}, log_x=True, level=Level(0.3, "a at 1"))
    dots("T", "distance", {"a": {"1 NFE": Dot(0.5, 0.7)}, "b": {"1 NFE": Dot(-0.1, None)}})
    assert seen == [[[0.7, 0.2], [0.7, 0.2]], [[0.7, 0], [0.7, 0]]]


def test_error_bars_of_positive_values_stay_above_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = errors_of(monkeypatch)
    curves("T", "x", "y", {"a": [CurvePoint(2, 8, 1), CurvePoint(1, 0.5, 0.7)]})
    assert seen == [[[pytest.approx(0.45), 1], [0.7, 1]]]


def test_a_name_without_a_value_has_no_mark() -> None:
    assert min(dots("T", "x", {"a": {"1 NFE": Dot(3, 0.1)}}, ["2 NFE", "1 NFE"]).size) > 100


def test_long_words_of_dots_stay_within_the_picture() -> None:
    """A title and a label of a hundred letters are broken into lines: the edges of the picture stay blank."""
    words = "as many letters of a title as a plan may give it, and then some, " * 2
    edges = np.asarray(dots(words, words, {"a": {"1 NFE": Dot(3, 0.1), "2 NFE": Dot(300, 1)}}))[:, [0, 1, -2, -1]]
    assert (edges == 255).all()
