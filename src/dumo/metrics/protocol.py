"""Named ways to judge samples, so that two numbers under one name were measured in one way.

A protocol fixes the features, the number of samples, their labels, rounding, splits and seeds; only the number of
samples may be set, for a quick look, and then the name says so. Distances are measured against a `Reference`, and
`baselines` tells how large they are where there is no difference: two halves of a finite data set, a bootstrap of it,
or two independent draws. Its own draws are keyed by its name: the same samples and data have the same score.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Int64
from pydantic import Field
from torch import Tensor

from dumo.flow.draw import stream
from dumo.metrics import classifier
from dumo.metrics.frechet import frechet_distance
from dumo.metrics.kernel import kid, mmd2, null_spread
from dumo.metrics.moments import Moments
from dumo.metrics.neighbours import precision_recall
from dumo.types import Cond, Sample, Spec, UserError

SPLITS = 20  # random halves, and bootstrap resamples
SUBSETS, SUBSET = 50, 500  # of the kernel distance
NEIGHBOURS = 3  # of precision and recall (Kynkäänniemi et al. 2019)
WIDTHS = (0.05, 0.1, 0.2, 0.5, 1.0)  # of the kernels of MMD^2, in sd of the data


@dataclass(frozen=True)
class Reference:
    """The data that samples are compared with."""

    x: Sample
    c: Cond
    redraw: Callable[[int], Sample] | None = None  # the i-th fresh draw of as many rows; None: `x` is all there is


class DigitsProtocol(Spec):
    """Samples of the 8x8 digits in [-1, 1], by the features of the shipped classifier."""

    kind: Literal["digits"] = "digits"
    samples: int = Field(default=2000, ge=SUBSET)

    @property
    def name(self) -> str:
        """`kind`, with the number of samples if it is not the standard one."""
        return _name(self)

    def check(self, shape: Sequence[int], classes: int = 10) -> None:
        """Refuse data that is not 8x8 digits of 10 classes with a `UserError`, before any work."""
        if tuple(shape) != (1, 8, 8) or classes != 10:
            raise UserError(
                "protocol digits judges samples of shape (1, 8, 8) in 10 classes,"
                f" not of shape {tuple(shape)} in {classes}: choose another protocol"
            )

    def labels(self, classes: int = 10) -> Int64[Tensor, " n"]:
        """The class of sample i: i mod `classes`."""
        return torch.arange(self.samples) % classes

    def score(self, x: Sample, c: Cond, reference: Reference) -> dict[str, float]:
        """`fd`, `fd_grey`, `kid` with `kid_sd`, `precision`, `recall`, and `accuracy`: the share read as c.

        All but one judge samples as the net makes them; `fd_grey` is `fd` after they are clamped to [-1, 1] and
        rounded to the 17 levels of the data, as an image file would hold them: the stricter of the two, for half of
        the pixels of a digit are at the end of the range, where clamped noise is no longer noise but a shift.
        Raises `UserError` if x is not `samples` finite images of 8x8.
        """
        _fit(self, x, reference)
        fake, real = classifier.features(x), classifier.features(reference.x)
        grey = classifier.features(_grey(x))
        mean, sd = kid(fake, real, subsets=SUBSETS, subset_size=SUBSET, generator=stream("digits", "kid"))
        precision, recall = precision_recall(real, fake, NEIGHBOURS)
        return {
            "fd": frechet_distance(Moments.of(fake), Moments.of(real)),
            "fd_grey": frechet_distance(Moments.of(grey), Moments.of(real)),
            "kid": mean,
            "kid_sd": sd,
            "precision": precision,
            "recall": recall,
            "accuracy": (classifier.predict(x) == c.cpu()).double().mean().item(),
        }

    def baselines(self, reference: Reference) -> dict[str, dict[str, float]]:
        """The Fréchet distance where nothing is wrong: mean and sd over `SPLITS` draws.

        `halves`: between random halves of the data. `bootstrap`: from `samples` of its rows, drawn with replacement,
        to the data: the floor of `score`.
        """
        real = classifier.features(reference.x)
        n, whole, halves, floors = len(real), Moments.of(real), list[float](), list[float]()
        for i in range(SPLITS):
            order = torch.randperm(n, generator=stream("digits", "halves", i))
            again = torch.randint(n, (self.samples,), generator=stream("digits", "bootstrap", i))
            halves.append(frechet_distance(Moments.of(real[order[: n // 2]]), Moments.of(real[order[n // 2 :]])))
            floors.append(frechet_distance(Moments.of(real[again]), whole))
        return {"halves": _summary(halves), "bootstrap": _summary(floors)}


class ToyProtocol(Spec):
    """Points of a law that can be drawn from without end, by MMD^2 in the points' own space."""

    kind: Literal["toy"] = "toy"
    samples: int = Field(default=10_000, ge=2)

    @property
    def name(self) -> str:
        """`kind`, with the number of samples if it is not the standard one."""
        return _name(self)

    def check(self, shape: Sequence[int], classes: int = 0) -> None:
        """Refuse data that is not vectors with a `UserError`, before any work; any number of classes serves."""
        if len(shape) != 1:
            raise UserError(
                f"protocol toy judges vectors, of shape (d,), not samples of shape {tuple(shape)}:"
                " choose another protocol"
            )

    def labels(self, classes: int = 0) -> Int64[Tensor, " n"]:
        """The class of sample i: i mod `classes`, all 0 where there are none."""
        return torch.arange(self.samples) % max(classes, 1)

    def score(self, x: Sample, c: Cond, reference: Reference) -> dict[str, float]:
        """`mmd2`, unbiased, of the mean of Gaussian kernels of `WIDTHS` sd of the data; c is not read.

        Raises `UserError` if x is not `samples` finite vectors like the data, or if the data are not as many.
        """
        _fit(self, x, reference)
        if len(reference.x) != self.samples:  # the null is of as many points on both sides
            raise UserError(
                f"protocol {self.name} compares with {self.samples} points, here are {len(reference.x)}: draw as many"
            )
        return {"mmd2": mmd2(x.cpu(), reference.x.cpu(), _widths(reference.x))}

    def baselines(self, reference: Reference) -> dict[str, dict[str, float]]:
        """`null`: mean and sd of `mmd2` between independent draws of the data. Raises `UserError` without `redraw`."""
        if reference.redraw is None:
            raise UserError("protocol toy needs a data set that can be drawn anew: choose another protocol")
        mean, sd = null_spread(reference.redraw, _widths(reference.x), self.samples)
        return {"null": {"mean": mean, "sd": sd}}


MetricProtocol = Annotated[DigitsProtocol | ToyProtocol, Field(discriminator="kind")]


def _name(protocol: DigitsProtocol | ToyProtocol) -> str:
    """With a number of samples of one's own it is another protocol, and must not pass for the named one."""
    standard = type(protocol).model_fields["samples"].default
    return protocol.kind if protocol.samples == standard else f"{protocol.kind} ({protocol.samples} samples)"


def _fit(protocol: DigitsProtocol | ToyProtocol, x: Sample, reference: Reference) -> None:
    """Refuse samples that this protocol cannot judge, or not against this data, with a `UserError`."""
    protocol.check(reference.x.shape[1:])
    if x.shape[1:] != reference.x.shape[1:]:
        raise UserError(
            f"protocol {protocol.name} compares like with like: the samples have shape {tuple(x.shape[1:])}, the data"
            f" {tuple(reference.x.shape[1:])}: give the data that the net was trained on"
        )
    if len(x) != protocol.samples:
        raise UserError(f"protocol {protocol.name} judges {protocol.samples} samples, here are {len(x)}: give as many")
    if not x.isfinite().all():
        raise UserError("some samples are not finite numbers: train again with a lower rate, or clip the gradient")


def _grey(x: Sample) -> Sample:
    """The nearest of the 17 grey levels 0..16 that the data has, as -1..1."""
    return ((x.clamp(-1, 1) + 1) * 8).round() / 8 - 1


def _widths(x: Sample) -> list[float]:
    """`WIDTHS` times the data's sd, the root of the mean variance of its coordinates."""
    sd = x.double().var(0).mean().sqrt().item()
    return [w * sd for w in WIDTHS]


def _summary(values: Sequence[float]) -> dict[str, float]:
    """Mean, unbiased sd and number of some distances."""
    v = torch.tensor(values, dtype=torch.float64)
    return {"mean": v.mean().item(), "sd": v.std().item(), "splits": float(len(values))}
