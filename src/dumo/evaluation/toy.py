"""Points of a law that can be drawn from without end, by MMD^2 in the points' own space."""

from dumo.evaluation.distance import mmd2, null_spread
from dumo.evaluation.protocol import Measure, Reference, Scores, whole_set
from dumo.types import Cond, Sample, UserError

WIDTHS = (0.05, 0.1, 0.2, 0.5, 1.0)  # of the kernels, in sd of the data
FEATURES = f"none: Gaussian kernels on the points, of {WIDTHS} sd of the data"


def score(x: Sample, c: Cond, reference: Reference) -> Scores:
    """`mmd2`, unbiased, of the mean of Gaussian kernels of `WIDTHS` sd of the data; c is not read.

    Raises `UserError` if the data are not as many.
    """
    if len(reference.x) != len(x):  # the null is of as many points on both sides
        raise UserError(
            f"protocol toy compares {len(x)} points with as many, here are {len(reference.x)}: draw as many"
        )
    return {"mmd2": mmd2(x.cpu(), reference.x.cpu(), _widths(reference.x))}


def baselines(reference: Reference, samples: int) -> dict[str, Scores]:
    """`null`: mean and sd of `mmd2` between independent draws of the data. Raises `UserError` without `redraw`."""
    if reference.redraw is None:
        raise UserError("protocol toy needs a data set that can be drawn anew: choose another protocol")
    mean, sd = null_spread(reference.redraw, _widths(reference.x), samples)
    return {"null": {"mean": mean, "sd": sd}}


def _widths(x: Sample) -> list[float]:
    """`WIDTHS` times the data's sd, the root of the mean variance of its coordinates."""
    sd = x.double().var(0).mean().sqrt().item()
    return [w * sd for w in WIDTHS]


TOY = Measure(
    samples=10_000,
    fewest=2,
    judges="vectors, of shape (d,), in any classes",
    fits=lambda shape, classes: len(shape) == 1,
    open=whole_set(lambda: {"features": FEATURES}, score, baselines),
)
