"""Curves of logs show what was measured, run by run."""

import pytest
from matplotlib.figure import Figure

from dumo.report.figure import comparison_figure, comparison_picture, curves_by_title
from dumo.report.runchart import page_charts, validation_charts
from dumo.types import UserError

ROWS = [
    {"step": 10, "loss": 2.0, "parts": {"v": 1.0, "u": 3.0}, "notes": {"gap": 0.5}, "grad_norm": 9.0, "lr": 0.1},
    {"step": 15, "loss": None, "parts": {"v": None, "u": None}, "grad_norm": None, "skipped": {"count": 1}},
    {"step": 20, "loss": 1.0, "parts": {"v": 0.5, "u": 1.5}, "notes": {"gap": 0.25}, "grad_norm": 1.0, "lr": 0.0},
]


def test_what_was_measured() -> None:
    found = curves_by_title(ROWS)
    assert list(found) == ["loss", "v", "u", "gradient norm", "learning rate", "gap"]
    assert found["u"] == ([10, 20], [3.0, 1.5])
    assert found["learning rate"] == ([10, 20], [0.1, 0.0])
    assert list(curves_by_title([{"step": 1, "loss": 1.0, "parts": {"v": 1.0}}])) == ["loss"]  # the same once


@pytest.mark.nightly
def test_norms_by_module_and_the_slope_of_time() -> None:
    """And the only part of a loss that is weighted by itself. Logs from before lack all of these (`ROWS`)."""
    rows = [
        {
            "step": step,
            "loss": 1.0,
            "parts": {"u": 2.0 * step},
            "bins": {"u": [1.0] * 10},
            "lr": 0.1,
            "grad_norms": {"scalars": 0.1, "blocks": 0.2},
            "grad_peaks": {"scalars": 0.1 * step, "blocks": 0.2},
            "time_slope": 0.5,
        }
        for step in (10, 20, 30)
    ]
    found = curves_by_title(rows)
    assert found["u"] == ([10, 20, 30], [20.0, 40.0, 60.0])
    assert found["gradient norm, scalars"] == ([10, 20, 30], [1.0, 2.0, pytest.approx(3.0)])
    assert found["slope of the time embedding"] == ([10, 20, 30], [0.5] * 3)
    titles = {chart.title: chart.alt for chart in page_charts(rows)}
    assert titles["Gradient norms by module"].endswith("the largest is 3, of scalars at step 30.")
    assert "slope of the time embedding" in titles
    old = [{"step": 1, "loss": 1.0, "parts": {"v": 1.0}, "bins": {"v": [1.0] * 10}, "lr": 0.1}]
    assert "Gradient norms by module" not in [chart.title for chart in page_charts(old)]


def test_a_panel_for_each_thing_and_a_curve_for_each_run() -> None:
    alone = [{"step": 5, "loss": 3.0, "speed": {"images_per_second": 7.0}}]
    figure = comparison_figure({"one": ROWS, "two": alone})
    titles = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert list(titles) == ["loss", "v", "u", "gradient norm", "learning rate", "gap", "images a second"]
    labels = [line.get_label() for line in titles["loss"].get_lines() if not str(line.get_label()).startswith("_")]
    assert labels == ["one", "two"]
    skipped = [line for line in titles["loss"].get_lines() if line.get_marker() == "|"]
    assert [list(line.get_xdata()) for line in skipped] == [[15], []]
    assert titles["loss"].get_yscale() == "linear"
    shown = comparison_picture({"one": ROWS, "two": alone})
    assert shown.size[0] > 1000
    assert len(shown.getcolors(10**6)) > 10


def test_what_validation_found_is_a_chart_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    paint = Figure.subplots
    monkeypatch.setattr(Figure, "subplots", lambda self: drawn.append(self) or paint(self))
    scores = ({"mmd": 0.5, "mmd_sd": 0.125}, {"mmd": None}, {"mmd": 0.25, "mmd_sd": 0.0625})
    rows = [{"step": 10 * n, "loss": 1.0, "val": one} for n, one in enumerate(scores, start=1)]
    (chart,) = validation_charts([*rows, {"step": 31, "loss": 1.0}])
    assert chart.title == "Validation, mmd"
    assert chart.alt == "Points: mmd is 0.5 at step 10 and 0.25 at step 30."
    (container,) = drawn[0].axes[0].containers
    line, _, (bars,) = container
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([10, 30], [0.5, 0.25])
    assert [bar[:, 1].tolist() for bar in bars.get_segments()] == [[0.375, 0.625], [0.1875, 0.3125]]
    assert curves_by_title(rows)["validation, mmd"] == ([10, 30], [0.5, 0.25])
    assert not [*validation_charts([{"step": 1, "loss": 1.0}])]


def test_logs_of_skipped_steps_alone_are_refused() -> None:
    with pytest.raises(UserError, match=r"^one, two: no step .* nothing to draw"):
        comparison_figure({"one": ROWS[1:2], "two": ROWS[1:2]})
