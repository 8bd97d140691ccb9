"""FID and its kin: images by the features of Inception.

Which number a paper calls FID depends on the network, the resize before it, how colours are rounded, how many images,
of which classes, against which statistics. A name fixes all of it (`STANDARDS`); what may be changed shows in the name.
Fixed for all: the TF-2015 Inception, TensorFlow's resize without antialiasing, colours rounded to the nearest of 0 ..
255, classes in turn (i mod classes), Inception Score in splits of 5000 by number and without the last layer's bias,
3 neighbours. So `adm-*` are ADM's own definitions; ADM rounds distances of neighbours to half precision, we do not.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dumo.encoders import inception
from dumo.encoders.inception import SIZE, WIDTH
from dumo.evaluation import reference
from dumo.evaluation.distance import Moments, frechet_distance, kid
from dumo.evaluation.neighbours import precision_recall
from dumo.evaluation.protocol import LEAST, Context, Evaluator, Made, Protocol, Scores, unit
from dumo.evaluation.reference import PIECE, STANDARDS, Inception, Standard, cached
from dumo.evaluation.statistics import Batch, Extractor, Statistics, gather, statistics_of
from dumo.io.picture import to_uint8
from dumo.io.read import user_path
from dumo.io.source import Finite
from dumo.runtime import bound, version
from dumo.runtime.random import stream
from dumo.types import PLACE, UserError

SUBSETS = 100  # of the kernel distance (Binkowski et al. 2018)
NEIGHBOURS = 3  # of precision and recall (Kynkäänniemi et al. 2019)
PAIRS = 6  # pairs of parts of the reference: few, for each takes seconds


class ImageProtocol(Protocol):
    """Images in colour, decoded, by the features of Inception, whose weights lie where $DUMO_INCEPTION says."""

    kind: Inception
    samples: int | None = Field(default=None, ge=1, le=bound.SAMPLES)  # None: as many as the name says
    frechet: bool = True  # without it, FID and sFID are left out: for sets of 2048 images or fewer
    reference: str | None = Field(default=None, json_schema_extra=PLACE)  # ADM's file; None: the run's own data

    @property
    def odd(self) -> list[str]:
        """Whatever is not as the name says."""
        return [*super().odd, *([] if self.frechet else ["no Fréchet distances"])]

    @property
    def standard(self) -> Standard:
        """What the name fixes."""
        return STANDARDS[self.kind]

    @property
    def standard_samples(self) -> int:
        """As many as the name says."""
        return self.standard.samples

    @property
    def missing(self) -> str | None:
        """What must be fetched before anything can be judged here; None: nothing."""
        file = inception.place()
        if not file or not file.is_file():
            return "the weights of Inception: dumo data inception says how to get them"
        named = self.reference is not None or not self.standard.url
        return None if named else "ADM's reference, named in evaluate.protocol.reference: see dumo data adm"

    def unfit(self, shape: tuple[int, ...], classes: int) -> str:
        """Samples must be colour images, enough of them; those of 0 classes may be judged by any protocol."""
        size, wanted = self.standard.size, self.standard.classes
        if len(shape) != 3 or shape[0] != 3 or size not in (None, shape[1]) or size not in (None, shape[2]):
            pixels = "any size" if size is None else f"{size}x{size}"
            return (
                f"judges colour images of {pixels}, not samples of shape {shape}: decode latents first, or choose "
                "another protocol"
            )
        if classes and wanted not in (None, classes):
            return f"is of {wanted} classes, not {classes}: choose another protocol"
        if self.frechet and self.total <= WIDTH:
            few = f"takes a Fréchet distance of {WIDTH} features, of more than {WIDTH} samples, here are {self.total}"
            return f"{few}: give more, or set frechet to false and go by kid"
        return ""

    def evaluator(self, context: Context) -> Evaluator:
        """Compares samples with ADM's file where the name says so, else with all images of the data, then opened.

        What the reference comes to is kept for the next time (`cached`). With several ranks every one asks the same.
        Raises `UserError` for missing or wrong weights, a file that is not the reference meant, and for more or fewer
        images than the name says.
        """
        standard, device, tick = self.standard, context.device, context.tick
        extractor = inception.load(None, device)
        if standard.url:
            if self.reference is None:
                raise UserError(
                    f"protocol {self.kind} compares with ADM's file {standard.url}: fetch it, and set "
                    "evaluate.protocol.reference to where it is"
                )
            path = user_path(self.reference, "evaluate.protocol.reference")
            file = reference.adm_file(path, self.kind, standard)
            found, make = reference.adm_facts(file), partial(reference.adm_statistics, extractor, file, tick)
        elif isinstance(data := context.data(), Finite):
            found = reference.album_facts(data, self.kind, standard)
            make = partial(reference.album_statistics, extractor, data, tick)
        else:
            raise UserError(f"protocol {self.kind} goes through all images of a data set, and this has none")
        facts = {
            **inception.facts(extractor),
            **found,
            "resize": f"TensorFlow 1, bilinear, to {SIZE}",
            "rounding": "0 to 255",
        }
        real = cached({"protocol": self.kind, "dumo": version(), **facts}, make)
        return ImageEvaluator(self.kind, standard, self.total, self.frechet, extractor, real, facts, device)

    @model_validator(mode="after")
    def _needs_a_file_or_not(self) -> "ImageProtocol":
        if self.reference and not self.standard.url:
            raise UserError(f"protocol {self.kind} compares with the images of the data: leave out its reference")
        return self


@dataclass(frozen=True)
class ImageEvaluator:
    """Compares samples, batch by batch, with statistics of the data. `device` is where neighbours are looked up."""

    name: str  # of the protocol's kind: keys its draws
    standard: Standard
    total: int  # samples
    frechet: bool
    extractor: Extractor
    real: Statistics
    facts: dict[str, str] = field(default_factory=dict[str, str])
    device: torch.device | str = "cpu"

    def score(self, made: Made) -> Scores:
        """`fid`, `sfid` (squared, as is the custom), `kid`, `is`, both with `_sd`, `precision` and `recall`.

        Raises `UserError` where samples are missing, come twice, or are no images, and where they are too few.
        """
        return self.compare(self.statistics(made))

    def statistics(self, made: Made) -> Statistics:
        """What the samples, in [-1, 1], come to."""
        return gather(statistics_of(self.extractor, in_pieces(made), self.total), self.total)

    def compare(self, fake: Statistics) -> Scores:
        """The scores of samples, by their statistics. On a CPU core 50,000 against 50,000 take some ten minutes."""
        real, distances = self.real, Scores()
        if self.frechet:  # the first to refuse
            distances["fid"] = frechet_distance(fake.pool, real.pool)
            distances["sfid"] = frechet_distance(fake.spatial, real.spatial)
        rows, data = fake.rows.to(self.device), real.rows.to(self.device)
        draws = stream(self.name, "kid")
        mean, sd = kid(rows, data, subsets=SUBSETS, subset_size=self.standard.subset, generator=draws)
        score, score_sd = fake.score.value()
        precision, recall = precision_recall(data, rows, NEIGHBOURS)
        return distances | {
            "kid": mean,
            "kid_sd": sd,
            "is": score,
            "is_sd": score_sd,
            "precision": precision,
            "recall": recall,
        }

    def baselines(self) -> dict[str, Scores]:
        """`perfect`: what a perfect sampler, of new real images, would have of the first score; none of too few.

        Without regard to classes, which weigh little among 2,048 features.
        """
        rows, size = self.real.rows.to(self.device), self.standard.subset

        def distance(a: Tensor, b: Tensor) -> float:
            if self.frechet:
                return frechet_distance(Moments.of(rows[a]), Moments.of(rows[b]))
            draws = stream(self.name, "kid", int(a[0]), int(b[0]))
            return kid(rows[a], rows[b], subsets=SUBSETS, subset_size=size, generator=draws)[0]

        alike = torch.zeros(len(rows), dtype=torch.long)
        found = unit(alike, distance, self.name, LEAST * rows.shape[1] if self.frechet else float(size), PAIRS)
        if not found:
            return {}
        whole = self.real.pool.count if self.frechet else len(rows)
        return {"perfect": found.at(self.total, whole, subsets=None if self.frechet else (SUBSETS, size))}


def in_pieces(made: Made) -> Iterator[Batch]:
    """Batches that a network takes at a time, as colours."""
    for index, x in made:
        yield from zip(index.split(PIECE), to_uint8(x).split(PIECE), strict=True)
