"""Statistics of the features of a set of images: moments, sums of the Inception Score, and the features themselves.

`statistics_of` computes the statistics of a rank's batches, and `gather` merges all ranks. `save_statistics` and
`load_statistics` write and read them.

Images are identified by number, so the split over batches and ranks does not matter. Moments
(`dumo.evaluation.frechet`) and sums (`dumo.evaluation.inception_score`) are in float64 and can be merged. Features are
kept in float32 for kernels and neighbours: 50,000 rows of 2048 take 400 MB.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Protocol as Interface

import torch
from jaxtyping import Float32, Int64, UInt8
from safetensors.torch import save_file
from torch import Tensor

from dumo.evaluation.frechet import Moments
from dumo.evaluation.inception_score import InceptionScore
from dumo.io import digest, tensor_files
from dumo.io.picture import Pixels
from dumo.runtime import dist
from dumo.types import UserError

ImageNumbers = Int64[Tensor, " n"]
# Numbers and images.
Batch = tuple[Int64[Tensor, " _"], UInt8[Tensor, "_ 3 _ _"]]

# Images per split of the Inception Score in ADM's evaluation.
SPLIT_SIZE = 5000
# The metadata key of the hash of all tensors.
CHECKSUM = "sha256"


class ExtractedFeatures(Interface):
    """The features of n images, n rows each. `spatial` and `logits` may have no columns."""

    @property
    def pool(self) -> Tensor:
        """The features of the FID, the output of Inception's last pooling layer."""
        ...

    @property
    def spatial(self) -> Tensor:
        """The features of the sFID."""
        ...

    @property
    def logits(self) -> Tensor:
        """The logits of the Inception Score."""
        ...


Extractor = Callable[[Pixels], ExtractedFeatures]


@dataclass(frozen=True)
class Statistics:
    """The statistics of n images.

    pool, spatial: moments of the features of FID and sFID.
    features: the FID's features; row i belongs to image `image_numbers[i]`.
    """

    pool: Moments
    spatial: Moments
    inception_score: InceptionScore
    features: Float32[Tensor, "n d"]
    image_numbers: ImageNumbers

    def __add__(self, other: "Statistics") -> "Statistics":
        """Return the statistics of the union of two disjoint sets of images."""
        return Statistics(
            pool=self.pool + other.pool,
            spatial=self.spatial + other.spatial,
            inception_score=self.inception_score + other.inception_score,
            features=torch.cat([self.features, other.features]),
            image_numbers=torch.cat([self.image_numbers, other.image_numbers]),
        )


def statistics_of(extractor: Extractor, batches: Iterable[Batch], total: int | None = None) -> Statistics:
    """Compute the statistics of this rank's share of `total` images, in batches of numbers in [0, total) and pixels.

    If `total` is None, the Inception Score has one split. Raises UserError if there are no images.
    """
    if total:
        split_size = SPLIT_SIZE
        num_splits = -(-total // SPLIT_SIZE)
    else:
        split_size = sys.maxsize
        num_splits = 1
    sums: tuple[Moments, Moments, InceptionScore] | None = None
    features: list[Tensor] = []
    image_numbers: list[Tensor] = []
    for batch_numbers, pixels in batches:
        extracted = extractor(pixels)
        device = float64_device(extracted.pool.device)
        pool = extracted.pool.to(device)
        logits = extracted.logits.to(device)
        spatial_moments = Moments.of(extracted.spatial.to(device))
        pool_moments = Moments.of(pool)
        inception_score = InceptionScore.of(logits, batch_numbers, size=split_size, splits=num_splits)
        if sums is None:
            sums = pool_moments, spatial_moments, inception_score
        else:
            pool_sum, spatial_sum, score_sum = sums
            sums = pool_sum + pool_moments, spatial_sum + spatial_moments, score_sum + inception_score
        features.append(pool.float().cpu())
        image_numbers.append(batch_numbers.cpu())
    if sums is None:
        raise UserError("a rank has no images: give at least one batch to each rank")
    return _to_cpu(Statistics(*sums, torch.cat(features), torch.cat(image_numbers)))


def float64_device(device: torch.device | str) -> torch.device:
    """Return the device if it is a CUDA GPU, which supports float64, else the CPU."""
    device = torch.device(device)
    return device if device.type == "cuda" else torch.device("cpu")


def _to_cpu(statistics: Statistics) -> Statistics:
    """Move all tensors to the CPU, to exchange them between ranks and write them to files."""
    return _unpack({name: x.cpu() for name, x in _pack(statistics).items()})


def gather(rank_statistics: Statistics, total: int | None = None) -> Statistics:
    """Merge the statistics of all ranks, with the images in the order of their numbers.

    Every rank must call this. Raises UserError unless each number in 0 .. total - 1 occurs once. If `total` is None,
    the numbers may have gaps, and the images are renumbered.
    """
    merged = rank_statistics
    if dist.world() > 1:
        tensors_by_name = {name: dist.all_gather(x) for name, x in _pack(rank_statistics).items()}
        statistics_by_rank: list[Statistics] = []
        for rank in range(dist.world()):
            statistics_by_rank.append(_unpack({name: tensors[rank] for name, tensors in tensors_by_name.items()}))
        merged = reduce(add, statistics_by_rank)
    order = order_of(merged.image_numbers, total)
    return replace(merged, features=merged.features[order], image_numbers=torch.arange(len(order)))


def save_statistics(path: Path, statistics: Statistics, key: Mapping[str, str]) -> None:
    """Write statistics as safetensors. `key` identifies the data, the network and the protocol."""
    tensors = {name: x.contiguous() for name, x in _pack(statistics).items()}
    save_file(tensors, path, {**key, CHECKSUM: digest.of_tensors(tensors)})


def load_statistics(path: Path, key: Mapping[str, str]) -> Statistics | None:
    """Read statistics from a file; None if it is missing, damaged, or has another `key`."""
    try:
        tensors, metadata = tensor_files.read(path)
        if metadata != {**key, CHECKSUM: digest.of_tensors(tensors)}:
            return None
        return _unpack(tensors)
    except (UserError, OSError, KeyError):
        return None


def _pack(statistics: Statistics) -> dict[str, Tensor]:
    """Convert statistics to tensors by their names in files."""
    pool = statistics.pool
    spatial = statistics.spatial
    inception_score = statistics.inception_score
    return {
        "pool.count": torch.tensor([pool.count]),
        "pool.mean": pool.mean,
        "pool.scatter": pool.scatter,
        "spatial.count": torch.tensor([spatial.count]),
        "spatial.mean": spatial.mean,
        "spatial.scatter": spatial.scatter,
        "score.count": inception_score.count,
        "score.entropy": inception_score.entropy,
        "score.mass": inception_score.mass,
        "rows": statistics.features,
        "index": statistics.image_numbers,
    }


def _unpack(tensors: Mapping[str, Tensor]) -> Statistics:
    """Invert `_pack`."""

    def moments(name: str) -> Moments:
        return Moments(int(tensors[f"{name}.count"]), tensors[f"{name}.mean"], tensors[f"{name}.scatter"])

    return Statistics(
        pool=moments("pool"),
        spatial=moments("spatial"),
        inception_score=InceptionScore(tensors["score.count"], tensors["score.entropy"], tensors["score.mass"]),
        features=tensors["rows"],
        image_numbers=tensors["index"],
    )


def order_of(image_numbers: ImageNumbers, total: int | None = None) -> Int64[Tensor, " n"]:
    """Return the permutation (n,) that sorts the numbers of n images, as `argsort`.

    Raises UserError unless each number in 0 .. total - 1 occurs once or, if `total` is None, if a number occurs twice.
    """
    order = image_numbers.argsort()
    sorted_numbers = image_numbers[order]
    num_distinct = len(sorted_numbers.unique())
    if total is None and num_distinct != len(order):
        raise UserError(
            f"{len(order)} images have only {num_distinct} different numbers: give each image a different number"
        )
    if total is not None and not torch.equal(sorted_numbers, torch.arange(total)):
        raise UserError(
            f"{len(order)} images with {num_distinct} different numbers were given, but each number from 0 to "
            f"{total - 1} must occur once: give as many as the protocol needs"
        )
    return order
