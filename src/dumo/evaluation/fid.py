"""FID and its kin: images by the features of Inception.

`ImageProtocol` is the spec; its `evaluator` loads Inception, finds the reference's statistics, in the cache or by
counting them (`dumo.evaluation.reference`), and returns an `ImageEvaluator`. That extracts features batch by batch
(`statistics`), and compares them with the reference's (`compare`).

Which number a paper calls FID depends on the network, the resize before it, how colours are rounded, how many images,
of which classes, against which statistics. A name fixes all of it (`STANDARDS`); what may be changed shows in the name.
Fixed for all: the TF-2015 Inception, TensorFlow's resize without antialiasing, colours rounded to the nearest of 0 ..
255, classes in turn (i mod classes), Inception Score in full splits of 5000 by number and without the last layer's
bias, 3 neighbours. So `adm-*` are ADM's own definitions; ADM rounds distances of neighbours to half precision, we do
not.
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
from dumo.evaluation.reference import PIECE, STANDARDS, InceptionKind, Standard, load_or_compute
from dumo.evaluation.statistics import Batch, Extractor, Statistics, float64_device, gather, statistics_of
from dumo.io.data_source import Finite
from dumo.io.picture import to_uint8
from dumo.io.read import user_path
from dumo.runtime import limits, version
from dumo.runtime.random import stream
from dumo.types import PLACE, UserError

SUBSETS = 100  # of the kernel distance (Binkowski et al. 2018)
INCEPTION_PART_PAIRS = 6  # pairs of parts of the reference that are compared: few, for each takes seconds. Ours


class ImageProtocol(Protocol):
    """Images in colour, decoded, by the features of Inception, whose weights lie where $DUMO_INCEPTION says."""

    kind: InceptionKind
    samples: int | None = Field(default=None, ge=1, le=limits.SAMPLES)  # None: as many as the name says
    frechet: bool = True  # without it, FID and sFID are left out: for sets of 2048 images or fewer
    reference: str | None = Field(default=None, json_schema_extra=PLACE)  # ADM's file; None: the run's own data

    @property
    def deviations(self) -> list[str]:
        """What differs from what the name fixes, in words."""
        if self.frechet:
            return super().deviations
        return [*super().deviations, "no Fréchet distances"]

    @property
    def standard(self) -> Standard:
        """All that the name fixes."""
        return STANDARDS[self.kind]

    @property
    def standard_samples(self) -> int:
        """As many as the name says."""
        return self.standard.samples

    @property
    def reads_data(self) -> bool:
        """Whether samples are compared with images of the data; else with ADM's file."""
        return not self.standard.url

    @property
    def missing(self) -> str | None:
        """What must be fetched before anything can be judged here; None: nothing."""
        return self.missing_files("in evaluate.protocol.reference")

    def missing_files(self, reference_option: str) -> str | None:
        """What must be fetched before anything can be judged here; None: nothing.

        `reference_option` says where the user may name ADM's file.
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
        except UserError:  # a variable in it is not set
            has_reference = False
        return None if has_reference else f"ADM's reference, {self.reference}: see docs/data.md"

    def why_unfit(self, shape: tuple[int, ...], classes: int) -> str:
        """Why samples of this shape, in this number of classes, are not judged: "" where they are.

        They must be colour images of the name's size and classes, and enough. 0 classes fit any name.
        """
        side = self.standard.size
        is_colour_image = len(shape) == 3 and shape[0] == 3
        if not is_colour_image or (side is not None and shape[1:] != (side, side)):
            pixels = "any size" if side is None else f"{side}x{side}"
            return (
                f"judges colour images of {pixels}, not samples of shape {shape}: decode latents first, or choose "
                "another protocol"
            )
        protocol_classes = self.standard.classes
        if classes and protocol_classes not in (None, classes):
            return f"is of {protocol_classes} classes, not {classes}: choose another protocol"
        if self.frechet and self.total <= WIDTH:
            return (
                f"takes a Fréchet distance of {WIDTH} features, of more than {WIDTH} samples, here are {self.total}: "
                "give more, or set frechet to false and go by kid"
            )
        return ""

    def evaluator(self, context: Context) -> Evaluator:
        """The evaluator that compares samples with ADM's file where the name says so, else with all images of the data.

        The reference's statistics are cached (`load_or_compute`). Every rank must call this. Raises `UserError` for
        missing or wrong weights, a file that is not the reference meant, for more or fewer images than the name says,
        and for too few.
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
        facts["kid"] = kid_text(standard.subset)
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
        """Raise `UserError` where the data are too few for the scores, or the samples for KID."""
        num_features = len(real.pool.mean)
        if self.frechet and real.pool.count <= num_features:
            raise UserError(
                f"the data have {real.pool.count:,} images, and a Fréchet distance needs more than {num_features:,}: "
                "set evaluate.protocol.frechet=false, and go by kid"
            )
        subset_size = self.standard.subset
        num_real = len(real.features)
        if not self.frechet and min(self.total, num_real) < subset_size:
            raise UserError(
                f"kid is over subsets of {subset_size:,} images, here are {self.total:,} samples and {num_real:,} "
                "images of the data: give more, or choose protocol photos"
            )

    def _adm_reference(self, extractor: Extractor, context: Context) -> tuple[dict[str, str], Callable[[], Statistics]]:
        """What a report says of ADM's file, and a function that computes its statistics.

        Raises `UserError` where the file is not named, or is not the reference of this protocol.
        """
        if self.reference is None:
            raise UserError(
                f"protocol {self.kind} compares with ADM's file {self.standard.url}: fetch it, and set "
                "evaluate.protocol.reference to where it is"
            )
        path = user_path(self.reference, "evaluate.protocol.reference")
        file = reference.open_adm_file(path, self.kind, self.standard)
        return reference.adm_facts(file), partial(reference.adm_statistics, extractor, file, context.tick)

    def _data_reference(
        self, extractor: Extractor, context: Context
    ) -> tuple[dict[str, str], Callable[[], Statistics]]:
        """What a report says of the data, and a function that computes their statistics. Every rank must call it.

        Raises `UserError` where the data are endless, or have another number of images than the name says.
        """
        data = context.data()
        if not isinstance(data, Finite):
            raise UserError(f"protocol {self.kind} goes through all images of a data set, and this has none")
        facts = reference.data_facts(data, self.kind, self.standard, context.split)
        return facts, partial(reference.data_statistics, extractor, data, context.tick)

    @model_validator(mode="after")
    def _refuse_needless_reference(self) -> "ImageProtocol":
        if self.reference and not self.standard.url:
            raise UserError(f"protocol {self.kind} compares with the images of the data: leave out its reference")
        return self


@dataclass(frozen=True)
class ImageEvaluator:
    """Compares samples, batch by batch, with statistics of the data."""

    name: str  # of the protocol's kind; its draws are keyed by it
    standard: Standard
    total: int  # samples
    frechet: bool  # whether FID and sFID are among the scores
    extractor: Extractor
    real: Statistics  # of the reference
    facts: dict[str, str] = field(default_factory=dict[str, str])  # for the report's card
    device: torch.device | str = "cpu"  # where kernels are summed and neighbours looked up

    def score(self, samples: NumberedSamples) -> Scores:
        """`fid`, `sfid` (squared, as is the custom), `kid`, `is`, both with `_sd`, `precision` and `recall`.

        Of one split `is` has no `_sd`. Raises `UserError` where samples are missing, come twice, or are no images, and
        where they are too few.
        """
        return self.compare(self.statistics(samples))

    def statistics(self, samples: NumberedSamples) -> Statistics:
        """The statistics of all samples, in [-1, 1], of all ranks. Every rank must call it."""
        return gather(statistics_of(self.extractor, split_batches(samples), self.total), self.total)

    def compare(self, fake: Statistics) -> Scores:
        """The scores of samples with these statistics. On a CPU core 50,000 against 50,000 take some ten minutes."""
        scores: Scores = {}
        if self.frechet:  # first, because it refuses too few samples
            try:
                scores["fid"] = frechet_distance(fake.pool, self.real.pool)
                scores["sfid"] = frechet_distance(fake.spatial, self.real.spatial)
            except UserError as error:
                raise UserError(f"{error}, or set frechet to false and go by kid") from error
        fake_rows = fake.features.to(self.device)
        real_rows = self.real.features.to(self.device)
        scores["kid"], scores["kid_sd"] = kid(
            fake_rows,
            real_rows,
            subsets=SUBSETS,
            subset_size=self.standard.subset,
            generator=stream(self.name, "kid"),
        )
        scores["is"], spread = fake.inception_score.value()
        if spread is not None:
            scores["is_sd"] = spread
        scores["precision"], scores["recall"] = precision_recall(real_rows, fake_rows)
        return scores

    def baselines(self) -> dict[str, Scores]:
        """`perfect`: the first score of a perfect sampler, of new real images; {} where there are too few images."""
        rows = self.real.features.to(self.device)
        if self.frechet:

            def frechet_of_rows(a: Tensor, b: Tensor) -> float:
                return frechet_distance(Moments.of(rows[a]), Moments.of(rows[b]))

            null_frechet = self._measure_null_distance(frechet_of_rows, MIN_ROWS_PER_FEATURE * rows.shape[1])
            if null_frechet is None:
                return {}
            mean, sd = null_frechet.scaled_to(self.total, self.real.pool.count)
            return {"perfect": {"mean": mean, "sd": sd}}
        subset_size = self.standard.subset

        def kid_of_rows(a: Tensor, b: Tensor) -> float:
            draws = stream(self.name, "kid", int(a[0]), int(b[0]))
            mean, _ = kid(rows[a], rows[b], subsets=SUBSETS, subset_size=subset_size, generator=draws)
            return mean

        scale = subset_scale(SUBSETS, subset_size)
        null_kid = self._measure_null_distance(kid_of_rows, float(subset_size), scale)
        if null_kid is None:
            return {}
        _, sd = null_kid.scaled_to(self.total, len(rows), scale)
        return {"perfect": {"mean": 0.0, "sd": sd}}  # a kernel distance has no bias

    def _measure_null_distance(
        self, distance: Callable[[Tensor, Tensor], float], min_part_rows: float, scale: Scale = full_scale
    ) -> NullDistance | None:
        """Compare parts of the reference. Classes do not count, because they weigh little among 2,048 features."""
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
    """What a report says of `kid` and `kid_sd`."""
    return f"mean and spread over {SUBSETS} subsets of {subset_size} images"


def split_batches(samples: NumberedSamples) -> Iterator[Batch]:
    """The samples, in [-1, 1], as batches of numbers (n,) and colours of 0 to 255, of PIECE images at most."""
    for index, x in samples:
        yield from zip(index.split(PIECE), to_uint8(x).split(PIECE), strict=True)
