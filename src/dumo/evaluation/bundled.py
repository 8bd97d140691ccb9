"""Named ways to judge samples by features that ship with the package, or by none: nothing is fetched.

`ShippedProtocol` is the spec, and the entrance; `MEASURES` has what each name fixes. The measures themselves are in
`dumo.evaluation.measures` and `dumo.evaluation.small_sets`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import field_validator

from dumo.evaluation.measures import MIN_CIFAR10, MIN_DIGITS, open_cifar10, open_digits, open_toy
from dumo.evaluation.protocol import Context, Evaluator, Protocol
from dumo.evaluation.small_sets import MIN_PHOTOS, open_photos

ShippedKind = Literal["cifar10-features", "digits", "photos", "toy"]
MIN_POINTS = 2  # that toy judges at least: MMD^2 is over pairs


@dataclass(frozen=True)
class Measure:
    """What the name of a protocol fixes."""

    standard_samples: int  # how many samples are judged, if the run does not say
    min_samples: int  # how many must be judged at least
    judged: str  # which samples can be judged, in words
    can_judge: Callable[[tuple[int, ...], int], bool]  # takes a decoded sample's shape and the number of classes
    open: Callable[[Protocol, Context], Evaluator]


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


MEASURES: dict[ShippedKind, Measure] = {
    "cifar10-features": Measure(
        standard_samples=5000,
        min_samples=MIN_CIFAR10,  # a covariance of 128 features needs 129 rows, the kernel a subset
        judged="images of shape (3, 32, 32) in 10 classes or none",
        can_judge=_is_cifar10_image,
        open=open_cifar10,
    ),
    "digits": Measure(
        standard_samples=2000,
        min_samples=MIN_DIGITS,
        judged="samples of shape (1, 8, 8) in 10 classes or none",
        can_judge=_is_digit,
        open=open_digits,
    ),
    "photos": Measure(
        standard_samples=500,
        min_samples=MIN_PHOTOS,
        judged="images of 1 or 3 channels",
        can_judge=_is_image,
        open=open_photos,
    ),
    "toy": Measure(
        standard_samples=10_000,
        min_samples=MIN_POINTS,
        judged="vectors, of shape (d,), in any classes",
        can_judge=_is_point,
        open=open_toy,
    ),
}


class ShippedProtocol(Protocol):
    """Judges samples by features that ship with the package, or by none."""

    kind: ShippedKind

    @property
    def measure(self) -> Measure:
        """What the name fixes."""
        return MEASURES[self.kind]

    @property
    def standard_samples(self) -> int:
        """How many samples the name fixes."""
        return self.measure.standard_samples

    @field_validator("samples")
    @classmethod
    def _require_enough(cls, samples: int | None, info: Any) -> int | None:  # noqa: ANN401, pydantic's own, which beartype refuses
        kind: ShippedKind = info.data["kind"]
        min_samples = MEASURES[kind].min_samples
        if samples is not None and samples < min_samples:
            raise ValueError(f"protocol {kind} judges {min_samples} samples or more")
        return samples

    def why_unfit(self, shape: tuple[int, ...], classes: int) -> str:
        """Why samples of this decoded shape, in this number of classes, are not judged; "" where they are."""
        if self.measure.can_judge(shape, classes):
            return ""
        return f"judges {self.measure.judged}, not samples of shape {shape} in {classes}: choose another protocol"

    def evaluator(self, context: Context) -> Evaluator:
        """An evaluator that compares with the data of the context. Raises `UserError` where they are too few."""
        return self.measure.open(self, context)
