"""Named ways to judge samples by features that ship with the package, or by none: nothing is fetched.

`ShippedProtocol` is the spec, and the entrance; `MEASURES` has what each name fixes. What measures is imported when
samples are judged: `dumo.evaluation.measures`, and `dumo.evaluation.photos`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import field_validator

from dumo.evaluation.protocol import Context, Evaluator, Protocol
from dumo.types.family import import_name

Shipped = Literal["cifar10-features", "digits", "photos", "toy"]
MIN_CIFAR10 = 1000  # images that cifar10-features judges at least, and compares with
MIN_DIGITS = 500  # images that digits judges at least
MIN_PHOTOS = 20  # images of the data, and samples, that photos judges at least: ours
MIN_POINTS = 2  # that toy judges at least: MMD^2 is over pairs


@dataclass(frozen=True)
class Measure:
    """What the name of a protocol fixes whose features ship with the package."""

    samples: int  # how many are judged
    fewest: int  # samples that may be judged at least
    judges: str  # which samples, in words
    fits: Callable[[tuple[int, ...], int], bool]  # takes a decoded sample's shape and the number of classes
    opener: str  # module:function, which makes the evaluator of a protocol and its context


def _is_cifar10_image(shape: tuple[int, ...], classes: int) -> bool:
    """Whether samples are like images of CIFAR-10."""
    return shape == (3, 32, 32) and classes in (0, 10)


def _is_digit(shape: tuple[int, ...], classes: int) -> bool:
    """Whether samples are like digits."""
    return shape == (1, 8, 8) and classes in (0, 10)


def _is_image(shape: tuple[int, ...], _: int) -> bool:
    """Whether samples are images in grey or colour."""
    return len(shape) == 3 and shape[0] in (1, 3)


def _is_point(shape: tuple[int, ...], _: int) -> bool:
    """Whether samples are vectors."""
    return len(shape) == 1


MEASURES: dict[Shipped, Measure] = {
    "cifar10-features": Measure(
        samples=5000,
        fewest=MIN_CIFAR10,  # a covariance of 128 features needs 129 rows, the kernel a subset
        judges="images of shape (3, 32, 32) in 10 classes or none",
        fits=_is_cifar10_image,
        opener="dumo.evaluation.measures:open_cifar10",
    ),
    "digits": Measure(
        samples=2000,
        fewest=MIN_DIGITS,
        judges="samples of shape (1, 8, 8) in 10 classes or none",
        fits=_is_digit,
        opener="dumo.evaluation.measures:open_digits",
    ),
    "photos": Measure(
        samples=500,
        fewest=MIN_PHOTOS,
        judges="images of 1 or 3 channels",
        fits=_is_image,
        opener="dumo.evaluation.photos:open_photos",
    ),
    "toy": Measure(
        samples=10_000,
        fewest=MIN_POINTS,
        judges="vectors, of shape (d,), in any classes",
        fits=_is_point,
        opener="dumo.evaluation.measures:open_toy",
    ),
}


class ShippedProtocol(Protocol):
    """Judges samples by features that ship with the package, or by none."""

    kind: Shipped

    @property
    def measure(self) -> Measure:
        """What the name fixes."""
        return MEASURES[self.kind]

    @property
    def standard_samples(self) -> int:
        """How many samples the name fixes."""
        return self.measure.samples

    @field_validator("samples")
    @classmethod
    def _has_enough(cls, samples: int | None, info: Any) -> int | None:  # noqa: ANN401, pydantic's own, which beartype refuses
        kind: Shipped = info.data["kind"]
        if samples is not None and samples < MEASURES[kind].fewest:
            raise ValueError(f"protocol {kind} judges {MEASURES[kind].fewest} samples or more")
        return samples

    def why_unfit(self, shape: tuple[int, ...], classes: int) -> str:
        """Samples must be like the data that the measure knows."""
        if self.measure.fits(shape, classes):
            return ""
        return f"judges {self.measure.judges}, not samples of shape {shape} in {classes}: choose another protocol"

    def evaluator(self, context: Context) -> Evaluator:
        """An evaluator of this data. Raises `UserError` where they are too few."""
        return import_name(self.measure.opener)(self, context)
