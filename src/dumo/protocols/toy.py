"""Points of a law that can be drawn from without end, by MMD^2 in the points' own space."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Int64
from pydantic import Field
from torch import Tensor

from dumo import bound
from dumo.data.source import Data
from dumo.metrics.mmd import mmd2, null_spread
from dumo.protocols.evaluator import Evaluator, Reference, Scores, Tick, WholeSetEvaluator, fit, in_turn, named
from dumo.types import Cond, Sample, Spec, UserError

SAMPLES = 10_000  # samples
WIDTHS = (0.05, 0.1, 0.2, 0.5, 1.0)  # of the kernels, in sd of the data


class ToyProtocol(Spec):
    """Points, by MMD^2 to as many fresh ones."""

    kind: Literal["toy"] = "toy"
    samples: int = Field(default=SAMPLES, ge=2, le=bound.SAMPLES)

    @property
    def name(self) -> str:
        """`kind`, with the number of samples if it is not the standard one."""
        return named(self.kind, self.samples, SAMPLES)

    def check(self, shape: Sequence[int], classes: int = 0) -> None:
        """Refuse data that is not vectors with a `UserError`, before any work; any number of classes serves."""
        if len(shape) != 1:
            raise UserError(
                f"protocol toy judges vectors, of shape (d,), not samples of shape {tuple(shape)}:"
                " choose another protocol"
            )

    def labels(self, classes: int = 0) -> Int64[Tensor, " n"]:
        """The class of sample i: i mod `classes`, all 0 where there are none."""
        return in_turn(self.samples, classes)

    def evaluator(
        self,
        open_data: Callable[[], Data],
        *,
        classes: int = 0,
        seed: int = 0,
        device: torch.device | str = "cpu",
        tick: Tick | None = None,
    ) -> Evaluator:
        """Who compares samples with as many draws of the data. There are no features: device and tick are not used."""
        reference = Reference.of(open_data(), self.samples, seed)
        features = {"features": f"none: Gaussian kernels on the points, of {WIDTHS} sd of the data"}
        return WholeSetEvaluator(self, self.labels(classes), reference, features | reference.facts(seed))

    def score(self, x: Sample, c: Cond, reference: Reference) -> Scores:
        """`mmd2`, unbiased, of the mean of Gaussian kernels of `WIDTHS` sd of the data; c is not read.

        Raises `UserError` if x is not `samples` finite vectors like the data, or if the data are not as many.
        """
        self.check(reference.x.shape[1:])
        fit(self.name, self.samples, x, reference)
        if len(reference.x) != self.samples:  # the null is of as many points on both sides
            raise UserError(
                f"protocol {self.name} compares with {self.samples} points, here are {len(reference.x)}: draw as many"
            )
        return {"mmd2": mmd2(x.cpu(), reference.x.cpu(), _widths(reference.x))}

    def baselines(self, reference: Reference) -> dict[str, Scores]:
        """`null`: mean and sd of `mmd2` between independent draws of the data. Raises `UserError` without `redraw`."""
        if reference.redraw is None:
            raise UserError("protocol toy needs a data set that can be drawn anew: choose another protocol")
        mean, sd = null_spread(reference.redraw, _widths(reference.x), self.samples)
        return {"null": {"mean": mean, "sd": sd}}


def _widths(x: Sample) -> list[float]:
    """`WIDTHS` times the data's sd, the root of the mean variance of its coordinates."""
    sd = x.double().var(0).mean().sqrt().item()
    return [w * sd for w in WIDTHS]
