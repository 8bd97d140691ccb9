"""Statistics of a set of images, of the features that a network extracts: moments, sums and features.

`statistics_of` counts a rank's batches, `gather` merges those of all ranks; `save_statistics` and `load_statistics`
write and read them. `order_of` sorts images that came in any order by their numbers.

Images are known by number, so it does not matter in which batch or on which rank an image came. Moments
(`dumo.evaluation.frechet`) and sums (`dumo.evaluation.inception_score`) are in float64 and can be merged. The features
themselves are kept too, in float32, for kernels and neighbours: 50,000 of 2048 take 400 MB.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Protocol as Interface  # in these files a protocol is a measurement

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
Batch = tuple[Int64[Tensor, " _"], UInt8[Tensor, "_ 3 _ _"]]  # numbers and images; batches differ in size

SPLIT_SIZE = 5000  # images per split of the Inception Score, as ADM's evaluation has them
CHECKSUM = "sha256"  # the name, in a file of statistics, of the hash of all its tensors


class ExtractedFeatures(Interface):
    """What a network extracts from n images, in n rows each; `spatial` and `logits` may have no columns."""

    @property
    def pool(self) -> Tensor:
        """The features of the FID, named after Inception's last pooling layer."""
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
    """The statistics of n images: moments of both kinds of features, sums of the Inception Score, and features."""

    pool: Moments  # of the FID's features
    spatial: Moments  # of the sFID's features
    inception_score: InceptionScore  # of the logits
    features: Float32[Tensor, "n d"]  # the FID's features, in row i those of image `image_numbers[i]`
    image_numbers: ImageNumbers

    def __add__(self, other: "Statistics") -> "Statistics":
        """The statistics of both sets of images together; no image may be in both."""
        return Statistics(
            pool=self.pool + other.pool,
            spatial=self.spatial + other.spatial,
            inception_score=self.inception_score + other.inception_score,
            features=torch.cat([self.features, other.features]),
            image_numbers=torch.cat([self.image_numbers, other.image_numbers]),
        )


def statistics_of(extractor: Extractor, batches: Iterable[Batch], total: int | None = None) -> Statistics:
    """The statistics of this rank's share of `total` images, in batches of their numbers in [0, total) and pixels.

    Where the total is not known, the Inception Score has one split. Raises `UserError` where there is no image.
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
        raise UserError("there are no images to judge: give some, at least one batch to each rank")
    return _to_cpu(Statistics(*sums, torch.cat(features), torch.cat(image_numbers)))


def float64_device(device: torch.device | str) -> torch.device:
    """The device itself if it is a GPU of CUDA, which has float64; the CPU for any other."""
    device = torch.device(device)
    return device if device.type == "cuda" else torch.device("cpu")


def _to_cpu(statistics: Statistics) -> Statistics:
    """The statistics with all tensors on the CPU, from where ranks exchange them and files take them."""
    return _unpack({name: x.cpu() for name, x in _pack(statistics).items()})


def gather(rank_statistics: Statistics, total: int | None = None) -> Statistics:
    """Merge the statistics of all ranks, on every rank, with the images in the order of their numbers.

    Every rank must call it. Raises `UserError` unless each of the numbers 0 .. total - 1 came once. Without a total the
    numbers may have gaps, which are closed: the images are numbered anew.
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
    """Write statistics as safetensors. `key` says what they are of: the data, the sha256 of the network."""
    parts = {name: x.contiguous() for name, x in _pack(statistics).items()}
    save_file(parts, path, {**key, CHECKSUM: digest.of_tensors(parts)})


def load_statistics(path: Path, key: Mapping[str, str]) -> Statistics | None:
    """Read statistics from a file; None where it is missing, damaged, or has another `key`."""
    try:
        parts, notes = tensor_files.read(path)
        if notes != {**key, CHECKSUM: digest.of_tensors(parts)}:
            return None
        return _unpack(parts)
    except (UserError, OSError, KeyError):
        return None


def _pack(statistics: Statistics) -> dict[str, Tensor]:
    """Statistics as tensors by the names that they have in files."""
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


def _unpack(parts: Mapping[str, Tensor]) -> Statistics:
    """The inverse of `_pack`."""

    def moments(name: str) -> Moments:
        return Moments(int(parts[f"{name}.count"]), parts[f"{name}.mean"], parts[f"{name}.scatter"])

    return Statistics(
        pool=moments("pool"),
        spatial=moments("spatial"),
        inception_score=InceptionScore(parts["score.count"], parts["score.entropy"], parts["score.mass"]),
        features=parts["rows"],
        image_numbers=parts["index"],
    )


def order_of(image_numbers: ImageNumbers, total: int | None = None) -> Int64[Tensor, " n"]:
    """The permutation (n,) that sorts the numbers of n images, as `argsort` has it.

    Raises UserError unless each of 0 .. total - 1 came once; without a total, if a number came twice.
    """
    order = image_numbers.argsort()
    sorted_numbers = image_numbers[order]
    num_distinct = len(sorted_numbers.unique())
    if total is None and num_distinct != len(order):
        raise UserError(
            f"{len(order)} images came, {num_distinct} different numbers among them, where none may come twice: give "
            "each image a number of its own"
        )
    if total is not None and not torch.equal(sorted_numbers, torch.arange(total)):
        raise UserError(
            f"{len(order)} images came, {num_distinct} different numbers among them, where each of 0 to {total - 1} "
            "must come once: give as many as the protocol judges"
        )
    return order
