"""FID, sFID, KID, Inception Score, precision and recall with the features of Inception.

`ImageProtocol` is the spec. Its `evaluator` loads Inception, computes the statistics of the reference or loads them
from the cache (`dumo.evaluation.reference`), and returns an `ImageEvaluator`. It extracts features batch by batch
(`statistics`) and compares them with the reference (`compare`).

FIDs depend on the network, image resizing, rounding, the number of images, their classes, and the reference statistics.
A protocol's name fixes all of these (`STANDARDS`), and deviations show in the name. All protocols use the TF-2015
Inception, TensorFlow's resize without antialiasing, pixels rounded to 0 .. 255, class i mod classes for sample i, the
Inception Score of full splits of 5000 consecutive samples without the last layer's bias, and 3 neighbours. So `adm-*`
are ADM's definitions, except that ADM rounds distances between neighbours to half precision.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dumo.encoders import inception
from dumo.encoders.inception import SIZE, WIDTH
from dumo.evaluation import reference
from dumo.evaluation.frechet import Moments, frechet_distance
from dumo.evaluation.mmd import (
    MIN_ROWS_PER_FEATURE,
    NullDistance,
    Scale,
    full_scale,
    kid,
    measure_null_distance,
    subset_scale,
)
from dumo.evaluation.neighbours import precision_recall
from dumo.evaluation.protocol import Context, Evaluator, NumberedSamples, Protocol, Scores
from dumo.evaluation.reference import BATCH_SIZE, STANDARDS, InceptionKind, Standard, load_or_compute
from dumo.evaluation.statistics import Batch, Extractor, Statistics, float64_device, gather, statistics_of
from dumo.io.data_source import Finite
from dumo.io.picture import to_uint8
from dumo.io.read import user_path
from dumo.runtime import limits, version
from dumo.runtime.random import stream
from dumo.types import PLACE, UserError

# The number of subsets of KID (Binkowski et al. 2018).
KID_SUBSETS = 100
# The number of pairs of parts of the reference that are compared for baselines. Each takes seconds (our choice).
INCEPTION_PART_PAIRS = 6


class ImageProtocol(Protocol):
    """Evaluate decoded colour images with the features of Inception, whose weights are at $DUMO_INCEPTION."""

    kind: InceptionKind
    # None means the number fixed by the kind.
    samples: int | None = Field(default=None, ge=1, le=limits.SAMPLES)
    # False leaves out FID and sFID, for sets of 2048 images or fewer.
    frechet: bool = True
    # ADM's reference file. None means the run's data.
    reference: str | None = Field(default=None, json_schema_extra=PLACE)

    @property
    def deviations(self) -> list[str]:
        """Descriptions of all settings that deviate from the kind."""
        if self.frechet:
            return super().deviations
        return [*super().deviations, "no Fréchet distances"]

    @property
    def standard(self) -> Standard:
        """The definition of this kind."""
        return STANDARDS[self.kind]

    @property
    def standard_samples(self) -> int:
        """The number of samples fixed by the kind."""
        return self.standard.samples

    @property
    def reads_data(self) -> bool:
        """Whether samples are compared with images of the data instead of ADM's file."""
        return not self.standard.url

    @property
    def missing(self) -> str | None:
        """Files that must be downloaded before evaluation; None if there are none."""
        return self.missing_files("in evaluate.protocol.reference")

    def missing_files(self, reference_option: str) -> str | None:
        """Describe the files that must be downloaded before evaluation; None if there are none.

        `reference_option` is the option or field for the path of ADM's file.
        """
        file = inception.weights_path()
        if not file or not file.is_file():
            return "the weights of Inception: see docs/data.md"
        if self.reads_data:
            return None
        if self.reference is None:
            return f"ADM's reference, named {reference_option}: see docs/data.md"
        try:
            has_reference = user_path(self.reference, "evaluate.protocol.reference").is_file()
        except UserError:
            # The path contains an unset environment variable.
            has_reference = False
        return None if has_reference else f"ADM's reference, {self.reference}: see docs/data.md"

    def find_problem(self, shape: tuple[int, ...], classes: int) -> str:
        """Refuse images of another size, colour or number of classes, and too few. 0 classes fit any protocol."""
        side = self.standard.size
        is_colour_image = len(shape) == 3 and shape[0] == 3
        if not is_colour_image or (side is not None and shape[1:] != (side, side)):
            pixels = "any size" if side is None else f"{side}x{side}"
            return (
                f"evaluates colour images of {pixels}, not samples of shape {shape}: decode latents first, or choose "
                "another protocol"
            )
        protocol_classes = self.standard.classes
        if classes and protocol_classes not in (None, classes):
            return f"has {protocol_classes} classes, not {classes}: choose another protocol"
        if self.frechet and self.total <= WIDTH:
            return (
                f"needs more than {WIDTH} samples for Fréchet distances of {WIDTH} features, got {self.total}: give "
                "more, or set frechet to false and use kid"
            )
        return ""

    def evaluator(self, context: Context) -> Evaluator:
        """Return an evaluator that compares samples with ADM's file or with all images of the data.

        The reference's statistics are cached (`load_or_compute`). Every rank must call this. Raises UserError if
        weights are missing or wrong, if the file is not the protocol's reference, or if the number of images differs
        from the standard or is too small.
        """
        standard = self.standard
        extractor = inception.load(None, context.device)
        if self.reads_data:
            reference_facts, count_reference = self._data_reference(extractor, context)
        else:
            reference_facts, count_reference = self._adm_reference(extractor, context)
        facts = {
            **inception.facts(extractor.state_dict(), extractor.origin),
            **reference_facts,
            "resize": f"TensorFlow 1, bilinear, to {SIZE}",
            "rounding": "0 to 255",
        }
        real = load_or_compute({"protocol": self.kind, "dumo": version(), **facts}, count_reference)
        facts["kid"] = kid_text(standard.kid_subset_size)
        self._require_enough_images(real)
        return ImageEvaluator(
            name=self.kind,
            standard=standard,
            total=self.total,
            frechet=self.frechet,
            extractor=extractor,
            real=real,
            facts=facts,
            device=float64_device(context.device),
        )

    def _require_enough_images(self, real: Statistics) -> None:
        """Raise UserError if there are too few data for the scores, or too few samples for KID."""
        num_features = len(real.pool.mean)
        if self.frechet and real.pool.count <= num_features:
            raise UserError(
                f"the data have {real.pool.count:,} images, and a Fréchet distance needs more than {num_features:,}: "
                "set evaluate.protocol.frechet=false to use kid"
            )
        subset_size = self.standard.kid_subset_size
        num_real = len(real.features)
        if not self.frechet and min(self.total, num_real) < subset_size:
            raise UserError(
                f"kid needs {subset_size:,} images on both sides, got {self.total:,} samples and {num_real:,} images "
                "of the data: give more, or choose protocol photos"
            )

    def _adm_reference(self, extractor: Extractor, context: Context) -> tuple[dict[str, str], Callable[[], Statistics]]:
        """Return the card entries of ADM's file, and a function that computes its statistics.

        Raises UserError if no file is set, or if it is not the reference of this protocol.
        """
        if self.reference is None:
            raise UserError(
                f"protocol {self.kind} compares with ADM's file {self.standard.url}: download it, and set "
                "evaluate.protocol.reference to its path"
            )
        path = user_path(self.reference, "evaluate.protocol.reference")
        file = reference.open_adm_file(path, self.kind, self.standard)
        return reference.adm_facts(file), partial(reference.adm_statistics, extractor, file, context.tick)

    def _data_reference(
        self, extractor: Extractor, context: Context
    ) -> tuple[dict[str, str], Callable[[], Statistics]]:
        """Return the card entries of the data, and a function that computes their statistics.

        Every rank must call this. Raises UserError if the data are infinite, or if their number of images differs from
        the standard.
        """
        data = context.data()
        if not isinstance(data, Finite):
            raise UserError(f"protocol {self.kind} needs a finite data set of images: choose another protocol")
        facts = reference.data_facts(data, self.kind, self.standard, context.split)
        return facts, partial(reference.data_statistics, extractor, data, context.tick)

    @model_validator(mode="after")
    def _refuse_needless_reference(self) -> "ImageProtocol":
        if self.reference and not self.standard.url:
            raise UserError(f"protocol {self.kind} compares with the images of the data: remove its reference")
        return self


@dataclass(frozen=True)
class ImageEvaluator:
    """Compares samples with the statistics of the reference.

    name: the protocol's kind, which keys random draws.
    total: the number of samples.
    frechet: whether to compute FID and sFID.
    real: the statistics of the reference.
    facts: entries of the report's card.
    device: computes kernels and nearest neighbours.
    """

    name: str
    standard: Standard
    total: int
    frechet: bool
    extractor: Extractor
    real: Statistics
    facts: dict[str, str] = field(default_factory=dict[str, str])
    device: torch.device | str = "cpu"

    def score(self, samples: NumberedSamples) -> Scores:
        """Return `fid` and `sfid` (squared distances), `kid` and `is` with `_sd`, `precision` and `recall`.

        `is_sd` is missing if there is only one split. Raises UserError if samples are missing, duplicated, too few, or
        not images.
        """
        return self.compare(self.statistics(samples))

    def statistics(self, samples: NumberedSamples) -> Statistics:
        """Compute the statistics of samples in [-1, 1] from all ranks. Every rank must call this."""
        return gather(statistics_of(self.extractor, split_batches(samples), self.total), self.total)

    def compare(self, fake: Statistics) -> Scores:
        """Return the scores of samples with these statistics. 50,000 samples and images take ten minutes on a core."""
        scores: Scores = {}
        # Compute Fréchet distances first, since they refuse too few samples.
        if self.frechet:
            try:
                scores["fid"] = frechet_distance(fake.pool, self.real.pool)
                scores["sfid"] = frechet_distance(fake.spatial, self.real.spatial)
            except UserError as error:
                raise UserError(f"{error}, or set frechet to false and use kid") from error
        fake_rows = fake.features.to(self.device)
        real_rows = self.real.features.to(self.device)
        scores["kid"], scores["kid_sd"] = kid(
            fake_rows,
            real_rows,
            subsets=KID_SUBSETS,
            subset_size=self.standard.kid_subset_size,
            generator=stream(self.name, "kid"),
        )
        scores["is"], spread = fake.inception_score.value()
        if spread is not None:
            scores["is_sd"] = spread
        scores["precision"], scores["recall"] = precision_recall(real_rows, fake_rows)
        return scores

    def baselines(self) -> dict[str, Scores]:
        """Return `perfect`: the first score of a perfect sampler; {} if there are too few real images."""
        rows = self.real.features.to(self.device)
        if self.frechet:

            def frechet_of_rows(a: Tensor, b: Tensor) -> float:
                return frechet_distance(Moments.of(rows[a]), Moments.of(rows[b]))

            null_frechet = self._measure_null_distance(frechet_of_rows, MIN_ROWS_PER_FEATURE * rows.shape[1])
            if null_frechet is None:
                return {}
            mean, sd = null_frechet.scaled_to(self.total, self.real.pool.count)
            return {"perfect": {"mean": mean, "sd": sd}}
        subset_size = self.standard.kid_subset_size

        def kid_of_rows(a: Tensor, b: Tensor) -> float:
            draws = stream(self.name, "kid", int(a[0]), int(b[0]))
            mean, _ = kid(rows[a], rows[b], subsets=KID_SUBSETS, subset_size=subset_size, generator=draws)
            return mean

        scale = subset_scale(KID_SUBSETS, subset_size)
        null_kid = self._measure_null_distance(kid_of_rows, float(subset_size), scale)
        if null_kid is None:
            return {}
        _, sd = null_kid.scaled_to(self.total, len(rows), scale)
        # A kernel distance is unbiased.
        return {"perfect": {"mean": 0.0, "sd": sd}}

    def _measure_null_distance(
        self, distance: Callable[[Tensor, Tensor], float], min_part_rows: float, scale: Scale = full_scale
    ) -> NullDistance | None:
        """Compare parts of the reference, ignoring classes, since their effect on 2,048 features is small."""
        same_class = torch.zeros(len(self.real.features), dtype=torch.long)
        return measure_null_distance(
            same_class,
            distance,
            kind=self.name,
            min_part_rows=min_part_rows,
            pairs=INCEPTION_PART_PAIRS,
            scale=scale,
        )


def kid_text(subset_size: int) -> str:
    """Describe `kid` and `kid_sd` for a report's card."""
    return f"mean and spread over {KID_SUBSETS} subsets of {subset_size} images"


def split_batches(samples: NumberedSamples) -> Iterator[Batch]:
    """Yield samples in [-1, 1] as batches of numbers (n,) and uint8 pixels, of at most BATCH_SIZE images."""
    for index, x in samples:
        yield from zip(index.split(BATCH_SIZE), to_uint8(x).split(BATCH_SIZE), strict=True)
