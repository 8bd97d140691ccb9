"""Statistics of the reference that samples are compared with: ADM's file, or all images of a run's data.

1. `adm_facts` (after `open_adm_file`) or `data_facts` returns card entries that identify the reference by a hash of the
   file or of all pixels. Hashing takes little time compared with the network.
2. `load_or_compute` looks up the statistics for these entries in the cache.
3. If they are missing, it calls `adm_statistics` or `data_statistics` and caches the result.

The cache (`dumo.io.read.cache_folder`) may be deleted at any time. A file name is the hash of a key (the data's pixels,
the network's weights, the protocol), which the file repeats, so statistics of changed data or in damaged files are
recomputed. Images are read batch by batch, each rank its share, without keeping them in memory.

ADM's .npz files (Dhariwal & Nichol 2021) are read as published (`read_adm`). They contain mean and covariance of the
features of a whole training set, `mu`, `sigma` for the FID and `mu_s`, `sigma_s` for the sFID, and some of its images,
`arr_0`, for precision and recall (`dumo.evaluation.npz`). They do not contain the number of images of the moments.
"""

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from safetensors import SafetensorError
from torch import Tensor

from dumo.encoders.inception import SPATIAL_WIDTH, WIDTH
from dumo.evaluation.frechet import Moments
from dumo.evaluation.npz import NpzImages, read_array
from dumo.evaluation.protocol import ImageTick, name_of_data
from dumo.evaluation.statistics import (
    Batch,
    Extractor,
    Statistics,
    gather,
    load_statistics,
    order_of,
    save_statistics,
    statistics_of,
)
from dumo.io import digest
from dumo.io import file as files
from dumo.io.data_source import Finite
from dumo.io.picture import to_uint8
from dumo.io.read import cache_folder
from dumo.runtime import dist
from dumo.types import UserError

InceptionKind = Literal["adm-imagenet256-50k", "adm-imagenet512-50k", "cifar10-train50k", "folder"]

BATCH_SIZE = 64
# The size of the training set of ImageNet-1k. ADM's files have its moments.
IMAGENET_TRAIN_IMAGES = 1_281_167

_ADM_URL = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"


class Standard(NamedTuple):
    """The definition of a protocol. A property that is None depends on the data.

    size: the side of images in pixels.
    reference_images: the number of images in ADM's file or in the data.
    url: the address of ADM's reference file. None means that the data are the reference.
    """

    samples: int
    size: int | None
    classes: int | None
    reference_images: int | None
    kid_subset_size: int
    url: str | None = None


STANDARDS: dict[InceptionKind, Standard] = {
    "adm-imagenet256-50k": Standard(
        samples=50_000,
        size=256,
        classes=1000,
        reference_images=10_000,
        kid_subset_size=1000,
        url=f"{_ADM_URL}/256/VIRTUAL_imagenet256_labeled.npz",
    ),
    "adm-imagenet512-50k": Standard(
        samples=50_000,
        size=512,
        classes=1000,
        reference_images=10_000,
        kid_subset_size=1000,
        url=f"{_ADM_URL}/512/VIRTUAL_imagenet512.npz",
    ),
    "cifar10-train50k": Standard(samples=50_000, size=32, classes=10, reference_images=50_000, kid_subset_size=1000),
    "folder": Standard(samples=10_000, size=None, classes=None, reference_images=None, kid_subset_size=100),
}


@dataclass(frozen=True)
class AdmReference:
    """A reference file of ADM, whose images stay on disk.

    pool, spatial: moments of the features of FID and sFID over the whole training set.
    image_file: some images of the training set.
    """

    path: Path
    pool: Moments
    spatial: Moments
    image_file: NpzImages

    def images(self, batch: int = BATCH_SIZE) -> Iterator[UInt8[Tensor, "n 3 h w"]]:
        """Yield the images in order, `batch` at a time. Raises UserError if the file is truncated."""
        for first in range(0, len(self.image_file), batch):
            yield self.image_file.pixels(first, min(first + batch, len(self.image_file)))


def load_or_compute(key: Mapping[str, str], compute: Callable[[], Statistics]) -> Statistics:
    """Load the statistics for `key` from the cache if every rank can read them; otherwise compute and cache them.

    Every rank must call this, since `compute` is collective. Warns if the cache cannot be written.
    """
    key_hash = digest.of_bytes(json.dumps(dict(key), sort_keys=True).encode())[:16]
    path = cache_folder() / f"statistics-{key_hash}.safetensors"
    loaded_statistics = load_statistics(path, key)
    rank_flags = dist.all_gather(torch.tensor([loaded_statistics is not None]))
    is_loaded_on_all = all(bool(flag) for flag in rank_flags)
    if loaded_statistics is not None and is_loaded_on_all:
        return loaded_statistics

    statistics = compute()
    try:
        if dist.is_main():
            with files.atomic_write(path) as temp_path:
                save_statistics(temp_path, statistics, key)
    except (OSError, SafetensorError) as error:
        # The computed statistics are valid without the cache.
        warnings.warn(f"{path} cannot be written ({error}): statistics will be recomputed next time", stacklevel=2)
    return statistics


def open_adm_file(path: Path, name: str, standard: Standard) -> AdmReference:
    """Open ADM's file for the protocol `name`.

    Raises UserError if the file is damaged, or if the number or size of its images differs from the standard.
    """
    file = read_adm(path, count=IMAGENET_TRAIN_IMAGES)
    if file.image_file.shape[:3] != (standard.reference_images, standard.size, standard.size):
        raise UserError(
            f"{path} has images of shape {file.image_file.shape}, but protocol {name} needs "
            f"{standard.reference_images} of {standard.size}x{standard.size}: give the file {standard.url}"
        )
    return file


def adm_facts(file: AdmReference) -> dict[str, str]:
    """Return the card entries of ADM's file: its name and hash."""
    return {"reference": file.path.name, "reference_sha256": digest.of_file(file.path)}


def adm_statistics(extractor: Extractor, file: AdmReference, tick: ImageTick | None = None) -> Statistics:
    """Compute the features of the file's images, and combine them with the moments in the file.

    Every rank must call this. `tick` is called with the number of images done and in total.
    """
    batches = with_progress(_adm_batches(file), len(file.image_file), tick)
    image_statistics = gather(statistics_of(extractor, batches))
    return replace(image_statistics, pool=file.pool, spatial=file.spatial)


def _adm_batches(file: AdmReference) -> Iterator[Batch]:
    """Yield this rank's share of the file's images, in batches of numbers (n,) and images (n, 3, height, width)."""
    for batch, x in enumerate(file.images(BATCH_SIZE)):
        if batch % dist.world() == dist.rank():
            yield batch * BATCH_SIZE + torch.arange(len(x)), x


def data_facts(data: Finite, name: str, standard: Standard, split: str | None = None) -> dict[str, str]:
    """Return the card entries of a run's data: the number of images and a hash of their pixels in order.

    `split` is the name of the split; None means the training split. Every rank must call this. Raises UserError if the
    protocol `name` needs another number of images.
    """
    total, sha256 = hash_images(_data_batches(data))
    if standard.reference_images not in (None, total):
        problem = f"protocol {name} needs {standard.reference_images} images, got {total}"
        if split is not None:
            raise UserError(f"{problem} in split {split}: set evaluate.split=null to compare with the training split")
        raise UserError(f"{problem}: use the whole data set once")
    return {"reference": f"{total:,} images of {name_of_data(split)}", "reference_sha256": sha256}


def data_statistics(extractor: Extractor, data: Finite, tick: ImageTick | None = None) -> Statistics:
    """Compute the statistics of all images of a run's data, numbered by row.

    Every rank must call this. `tick` is called with the number of images done and in total.
    """
    batches = ((rows, x) for rows, x in _data_batches(data) if len(x))
    return gather(statistics_of(extractor, with_progress(batches, len(data), tick)))


def _data_batches(data: Finite) -> Iterator[Batch]:
    """Yield this rank's share of the images, in batches of rows (n,) and pixels (n, 3, height, width), maybe empty."""
    images_per_rank = -(-len(data) // dist.world())
    # With few images, use smaller batches so that every rank gets some.
    batch_size = min(BATCH_SIZE, images_per_rank)
    for first in range(dist.rank() * batch_size, len(data), dist.world() * batch_size):
        x, _ = data.rows(slice(first, first + batch_size))
        if x.dtype != torch.uint8:
            x = to_uint8(x)
        # Grey images get three equal channels.
        pixels = x.expand(-1, 3, -1, -1)
        yield torch.arange(first, first + len(pixels)), pixels


def hash_images(batches: Iterable[Batch]) -> tuple[int, str]:
    """Return the number of images on all ranks, and the SHA-256 of their pixels in the order of their numbers.

    `batches` is this rank's share of numbers and images. Every rank must call this.
    """
    hashes = [torch.empty(0, 32, dtype=torch.uint8)]
    numbers = [torch.empty(0, dtype=torch.long)]
    for index, images in batches:
        image_hashes = bytearray()
        for image in images:
            sha256 = digest.of_bytes(f"{tuple(image.shape)}".encode(), image.numpy().tobytes())
            image_hashes += bytes.fromhex(sha256)
        hashes.append(torch.tensor(list(image_hashes), dtype=torch.uint8).view(-1, 32))
        numbers.append(index)
    all_hashes = torch.cat(dist.all_gather(torch.cat(hashes)))
    all_numbers = torch.cat(dist.all_gather(torch.cat(numbers)))
    return len(all_numbers), digest.of_bytes(all_hashes[order_of(all_numbers)].numpy().tobytes())


def with_progress(
    batches: Iterable[tuple[Tensor, Tensor]], total: int, tick: ImageTick | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches, and after each call `tick` with the number of images done and in total.

    All ranks are assumed to progress equally.
    """
    done = 0
    for index, x in batches:
        yield index, x
        done += len(x) * dist.world()
        if tick:
            tick(min(done, total), total)


def read_adm(path: Path | str, *, count: int) -> AdmReference:
    """Read ADM's file, whose moments are over `count` images. Raises UserError if it has another layout."""
    path = Path(path)

    def read_moments(suffix: str, width: int) -> Moments:
        mean = _read_floats(path, f"mu{suffix}", width)
        covariance = _read_floats(path, f"sigma{suffix}", width, width)
        return Moments(count, mean, covariance * (count - 1))

    return AdmReference(
        path=path,
        pool=read_moments("", WIDTH),
        spatial=read_moments("_s", SPATIAL_WIDTH),
        image_file=NpzImages(path),
    )


def _read_floats(path: Path, key: str, *shape: int) -> Tensor:
    """Read the array `key` as float64. Raises UserError if it is not finite, or a matrix is not symmetric."""
    array = read_array(path, key, "f", shape, "finite floats")
    if len(shape) == 2 and not np.allclose(array, array.T, rtol=1e-4, atol=1e-6):
        raise UserError(f"{path}: {key} must be a symmetric covariance: download the file again")
    return torch.from_numpy(array.astype(np.float64))
