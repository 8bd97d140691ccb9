"""The table of protocols: what the name of each fixes."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from pydantic import field_validator

from dumo.evaluation.cifar10 import CIFAR10
from dumo.evaluation.digits import DIGITS
from dumo.evaluation.photos import PHOTOS
from dumo.evaluation.protocol import Context, Evaluator, Measure, Protocol
from dumo.evaluation.toy import TOY
from dumo.types import UserError

Inception = Literal["adm-imagenet256-50k", "adm-imagenet512-50k", "cifar10-train50k", "folder"]

ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
TRAIN = 1_281_167  # images of ImageNet-1k's training set, of which ADM's moments are


class Standard(NamedTuple):
    """What a name fixes of distances in Inception's features; None where the data decides."""

    samples: int
    size: int | None  # pixels a side
    classes: int | None
    real: int | None  # images of the reference
    subset: int  # rows per subset of the kernel distance
    url: str | None = None  # of ADM's file, which then is the reference; None: images are


STANDARDS: dict[Inception, Standard] = {
    "adm-imagenet256-50k": Standard(50_000, 256, 1000, 10_000, 1000, f"{ADM}/256/VIRTUAL_imagenet256_labeled.npz"),
    "adm-imagenet512-50k": Standard(50_000, 512, 1000, 10_000, 1000, f"{ADM}/512/VIRTUAL_imagenet512.npz"),
    "cifar10-train50k": Standard(50_000, 32, 10, 50_000, 1000),
    "folder": Standard(10_000, None, None, None, 100),
}

Shipped = Literal["cifar10-features", "digits", "photos", "toy"]
MEASURES: dict[Shipped, Measure] = {"cifar10-features": CIFAR10, "digits": DIGITS, "photos": PHOTOS, "toy": TOY}


class ShippedProtocol(Protocol):
    """By features that ship with the package, or none: nothing is fetched, and no number is an FID."""

    kind: Shipped

    @property
    def measure(self) -> Measure:
        """What the name fixes."""
        return MEASURES[self.kind]

    @property
    def standard_samples(self) -> int:
        """As many as the name says."""
        return self.measure.samples

    @field_validator("samples")
    @classmethod
    def _has_enough(cls, samples: int | None, known: Any) -> int | None:  # noqa: ANN401, pydantic's own, which beartype refuses
        kind: Shipped = known.data["kind"]
        if samples is not None and samples < MEASURES[kind].fewest:
            raise ValueError(f"protocol {kind} judges {MEASURES[kind].fewest} samples or more")
        return samples

    def check(self, shape: Sequence[int], classes: int = 0) -> None:
        """Refuse other data with a `UserError`."""
        if not self.measure.fits(tuple(shape), classes):
            raise UserError(
                f"protocol {self.kind} judges {self.measure.judges}, not samples of shape {tuple(shape)} in {classes}: "
                "choose another protocol"
            )

    def evaluator(self, context: Context) -> Evaluator:
        """An evaluator of this data. Raises `UserError` where they are too few."""
        return self.measure.open(self, context)
