"""Curves of logs show what was measured, run by run."""

import pytest
from matplotlib.figure import Figure

from dumo.report.figure import Curve, draw_logs, draw_panels, read_curves
from dumo.types import UserError

ROWS = [
    {"step": 10, "loss": 2.0, "parts": {"v": 1.0, "u": 3.0}, "notes": {"gap": 0.5}, "grad_norm": 9.0, "lr": 0.1},
    {"step": 15, "loss": None, "parts": {"v": None, "u": None}, "grad_norm": None, "skipped": {"count": 1}},
    {"step": 20, "loss": 1.0, "parts": {"v": 0.5, "u": 1.5}, "notes": {"gap": 0.25}, "grad_norm": 1.0, "lr": 0.0},
]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn."""
    drawn: list[Figure] = []
    subplots = Figure.subplots
    monkeypatch.setattr(Figure, "subplots", lambda self, *a, **k: drawn.append(self) or subplots(self, *a, **k))
    return drawn


def test_what_was_measured() -> None:
    found = read_curves(ROWS)
    assert list(found) == ["loss", "v", "u", "gradient norm", "learning rate", "gap"]
    assert found["u"] == Curve([10, 20], [3.0, 1.5])
    assert found["learning rate"] == Curve([10, 20], [0.1, 0.0])
    # A loss that equals its only part is drawn once.
    assert list(read_curves([{"step": 1, "loss": 1.0, "parts": {"v": 1.0}}])) == ["loss"]


def test_a_panel_for_each_value_and_a_curve_for_each_run(figures: list[Figure]) -> None:
    alone = [{"step": 5, "loss": 3.0, "speed": {"images_per_second": 7.0}}]
    shown = draw_logs({"one": ROWS, "two": alone})
    titles = {axes.get_title(): axes for axes in figures[0].axes if axes.get_title()}
    assert list(titles) == ["loss", "v", "u", "gradient norm", "learning rate", "gap", "images a second"]
    labels = [line.get_label() for line in titles["loss"].get_lines() if not str(line.get_label()).startswith("_")]
    assert labels == ["one", "two"]
    skipped = [line for line in titles["loss"].get_lines() if line.get_marker() == "|"]
    assert [list(line.get_xdata()) for line in skipped] == [[15], []]
    assert titles["loss"].get_yscale() == "linear"
    assert shown.size[0] > 1000


def test_validation_has_error_bars(figures: list[Figure]) -> None:
    scores = ({"mmd": 0.5, "mmd_sd": 0.125}, {"mmd": None}, {"mmd": 0.25, "mmd_sd": 0.0625})
    rows = [{"step": 10 * n, "val": one} for n, one in enumerate(scores, start=1)]
    (panel,) = draw_panels([*rows, {"step": 31}])
    assert panel.title == "validation, mmd"
    assert panel.alt == "Curve: validation, mmd is 0.5 at step 10 and 0.25 at step 30."
    (container,) = figures[0].axes[0].containers
    line, _, (bars,) = container
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([10, 30], [0.5, 0.25])
    assert [bar[:, 1].tolist() for bar in bars.get_segments()] == [[0.375, 0.625], [0.1875, 0.3125]]
    assert not draw_panels([{"step": 1, "loss": 1.0}])


def test_logs_of_skipped_steps_alone_are_refused() -> None:
    with pytest.raises(UserError, match="one, two"):
        draw_logs({"one": ROWS[1:2], "two": ROWS[1:2]})
