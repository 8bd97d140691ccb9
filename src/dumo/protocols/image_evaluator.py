"""Images compared by the features that Inception extracts: FID and its kin."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from dumo.io.picture import to_uint8
from dumo.metrics.frechet import frechet_distance
from dumo.metrics.mmd import kid
from dumo.metrics.moments import Moments
from dumo.metrics.neighbours import precision_recall
from dumo.metrics.statistics import Batch, Extractor, Statistics, gather, statistics_of
from dumo.protocols.evaluator import Made, Scores, summary
from dumo.protocols.reference import PIECE
from dumo.protocols.standard import Standard
from dumo.random import stream
from dumo.types import UserError

SUBSETS = 100  # of the kernel distance (Binkowski et al. 2018)
NEIGHBOURS = 3  # of precision and recall (Kynkäänniemi et al. 2019)
HALVES, HALF = 3, 25_000  # random halves of the reference, and the most images in one


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
        return gather(statistics_of(self.extractor, _pixels(made), self.total), self.total)

    def compare(self, fake: Statistics) -> Scores:
        """The scores of samples, by their statistics. On a CPU core 50,000 against 50,000 take some ten minutes."""
        distances = self._distances(fake)  # the first to refuse
        rows, data = fake.rows.to(self.device), self.real.rows.to(self.device)
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
        """`halves`: the first of the scores between random halves of the reference's images; none of too few."""
        rows, values = self.real.rows.to(self.device), list[float]()
        half = min(len(rows) // 2, HALF)
        if half < self.standard.subset or (self.frechet and half <= rows.shape[1]):
            return {}
        for i in range(HALVES):
            order = torch.randperm(len(rows), generator=(draws := stream(self.name, "halves", i)))
            a, b = rows[order[:half]], rows[order[half : 2 * half]]
            if self.frechet:
                values.append(frechet_distance(Moments.of(a), Moments.of(b)))
            else:
                values.append(kid(a, b, subsets=SUBSETS, subset_size=self.standard.subset, generator=draws)[0])
        return {"halves": summary(values)}

    def _distances(self, fake: Statistics) -> Scores:
        """FID and sFID, where they are wanted."""
        if not self.frechet:
            return {}
        real = self.real
        if min(real.pool.count, fake.pool.count) <= len(real.pool.mean):
            raise UserError(
                f"{fake.pool.count} samples and {real.pool.count} images of the data give no Fréchet distance of"
                f" {len(real.pool.mean)} features: give more of both, or set frechet to false and go by kid"
            )
        return {
            "fid": frechet_distance(fake.pool, real.pool),
            "sfid": frechet_distance(fake.spatial, real.spatial),
        }


def _pixels(made: Made) -> Iterator[Batch]:
    """Batches that a network at 299 x 299 takes at a time, as colours."""
    for index, x in made:
        yield from zip(index.split(PIECE), to_uint8(x).split(PIECE), strict=True)
