"""Protocols with bundled features or without features, which download nothing.

`BundledProtocol` is the spec, and `BUNDLED_STANDARDS` defines what each name fixes. The scores are computed in
`dumo.evaluation.measures` and `dumo.evaluation.small_sets`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import field_validator

from dumo.evaluation.measures import MIN_CIFAR10, MIN_DIGITS, open_cifar10, open_digits, open_toy
from dumo.evaluation.protocol import Context, Evaluator, Protocol
from dumo.evaluation.small_sets import MIN_PHOTOS, open_photos

BundledKind = Literal["cifar10-features", "digits", "photos", "toy"]
# MMD^2 averages over pairs.
MIN_POINTS = 2


@dataclass(frozen=True)
class BundledStandard:
    """The definition of a bundled protocol.

    supported: describes the samples that can be evaluated, for messages.
    is_supported: takes the shape of a decoded sample and the number of classes.
    """

    standard_samples: int
    min_samples: int
    supported: str
    is_supported: Callable[[tuple[int, ...], int], bool]
    open: Callable[[Protocol, Context], Evaluator]


def _is_cifar10_image(shape: tuple[int, ...], classes: int) -> bool:
    """Whether samples have the shape and classes of CIFAR-10."""
    return shape == (3, 32, 32) and classes in (0, 10)


def _is_digit(shape: tuple[int, ...], classes: int) -> bool:
    """Whether samples have the shape and classes of digits."""
    return shape == (1, 8, 8) and classes in (0, 10)


def _is_image(shape: tuple[int, ...], _: int) -> bool:
    """Whether samples are grey or colour images."""
    return len(shape) == 3 and shape[0] in (1, 3)


def _is_point(shape: tuple[int, ...], _: int) -> bool:
    """Whether samples are vectors."""
    return len(shape) == 1


BUNDLED_STANDARDS: dict[BundledKind, BundledStandard] = {
    "cifar10-features": BundledStandard(
        standard_samples=5000,
        # The covariance of 128 features needs 129 rows.
        min_samples=MIN_CIFAR10,
        supported="images of shape (3, 32, 32) in 10 classes or none",
        is_supported=_is_cifar10_image,
        open=open_cifar10,
    ),
    "digits": BundledStandard(
        standard_samples=2000,
        min_samples=MIN_DIGITS,
        supported="samples of shape (1, 8, 8) in 10 classes or none",
        is_supported=_is_digit,
        open=open_digits,
    ),
    "photos": BundledStandard(
        standard_samples=500,
        min_samples=MIN_PHOTOS,
        supported="images with 1 or 3 channels",
        is_supported=_is_image,
        open=open_photos,
    ),
    "toy": BundledStandard(
        standard_samples=10_000,
        min_samples=MIN_POINTS,
        supported="vectors of shape (d,) in any number of classes",
        is_supported=_is_point,
        open=open_toy,
    ),
}


class BundledProtocol(Protocol):
    """Evaluate samples with bundled features, or without features."""

    kind: BundledKind

    @property
    def standard(self) -> BundledStandard:
        """The definition of this kind."""
        return BUNDLED_STANDARDS[self.kind]

    @property
    def standard_samples(self) -> int:
        """The number of samples fixed by the kind."""
        return self.standard.standard_samples

    @field_validator("samples")
    @classmethod
    def _require_enough(cls, samples: int | None, info: Any) -> int | None:  # noqa: ANN401, pydantic's type, which beartype refuses
        kind: BundledKind = info.data["kind"]
        min_samples = BUNDLED_STANDARDS[kind].min_samples
        if samples is not None and samples < min_samples:
            raise ValueError(f"protocol {kind} needs {min_samples} samples or more")
        return samples

    def find_problem(self, shape: tuple[int, ...], classes: int) -> str:
        """Refuse samples with another shape or number of classes than the kind supports."""
        if self.standard.is_supported(shape, classes):
            return ""
        return (
            f"evaluates {self.standard.supported}, not samples of shape {shape} in {classes} classes: choose another "
            "protocol"
        )

    def evaluator(self, context: Context) -> Evaluator:
        """Return an evaluator that compares with the data of the context. Raises UserError if there are too few."""
        return self.standard.open(self, context)
