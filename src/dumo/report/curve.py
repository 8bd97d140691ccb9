"""Curves of a run's log: what the charts of one run and the comparison of several draw alike.

`dumo.report.runchart` and `dumo.report.figure` call these. A page puts several values into one chart and describes it;
a comparison has one value a panel. So each reads rows of a log by itself: a new value in the log is added to both.

The keys of a row (`dumo.training.log.Row`) that they read; a row may lack any but `step`:

    step                    the step
    loss, parts             the mean loss of a batch, and its terms by name
    bins                    each term by interval of t, from data to noise; None where no sample fell
    lr                      the learning rate
    grad_norm               the norm of the whole gradient
    grad_peaks, grad_norms  the norm by module: the largest of the last steps, or (older logs) that of the step
    time_slope              how quickly the embedding of time changes (`dumo.nets.embed.Scalars.slope`)
    notes                   the objective's own values, by name
    probe                   `drift`, and `cosines` between gradients by pair; None at most steps
    val                     scores of validation, and their errors
    speed, skipped          images a second; whether the step was skipped
"""

from collections.abc import Iterable, Sequence
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes

from dumo.training import log

# of runs, or modules, in turn
RUN_COLOURS = ("#3f7fbf", "#d2603a", "#7d8a3c", "#8b62b0", "#2f9a94", "#b0823c")
SMOOTHING_DIVISOR = 15  # the mean around a value reaches over n / 15 of n values on either side: ours
RAW_OPACITY = 0.25  # of a curve as it was logged, behind its moving average
# titles of charts and panels
TIME_SLOPE = "slope of the time embedding"
LEARNING_RATE = "learning rate"
DRIFT = "drift"
Curve = tuple[list[int], list[float]]  # steps, and the value at each


def moving_average(values: Sequence[float]) -> np.ndarray:
    """The mean (n,) of each of n values and n // SMOOTHING_DIVISOR neighbours on either side; fewer at the ends."""
    x = np.asarray(values, dtype=float)
    reach = len(values) // SMOOTHING_DIVISOR
    return np.array([x[max(0, i - reach) : i + reach + 1].mean() for i in range(len(x))])


def draw_curve(axes: Axes, steps: Sequence[int], values: Sequence[float], name: str, colour: str | None = None) -> None:
    """Draw a curve as it was logged, pale, and its moving average on top. Without a colour it is in ink."""
    raw, *_ = axes.plot(steps, values, lw=0.8, alpha=RAW_OPACITY, color=colour)
    average = moving_average(values)
    axes.plot(steps, average, lw=1.5, label=name, color=raw.get_color(), marker=marker(len(steps)))


def marker(num_points: int) -> str | None:
    """The marker of a curve: a dot where it has one point, which a line would not show."""
    return "." if num_points == 1 else None


def colour_by_name(names: Iterable[str]) -> dict[str, str]:
    """A colour for each run or module; RUN_COLOURS begin again where there are more names."""
    return dict(zip(names, cycle(RUN_COLOURS), strict=False))


def highest_norms(row: log.Row) -> dict[str, float | None]:
    """The gradient norm of each module, the largest of the last steps; {} of logs from before it was measured."""
    return row.get("grad_peaks") or row.get("grad_norms") or {}
