"""Statistics of the data that samples are compared with: of ADM's file, or of all images of a run's own data.

A protocol of images gets its reference in three steps:

1. The facts: `adm_facts` of a file that `open_adm_file` opens, or `data_facts` of a run's data. They hold a hash of the
   file or of all pixels, so they say which reference it is. Hashing takes a small part of the network's time.
2. `load_or_compute` looks in the cache for the statistics that belong to these facts.
3. Where there are none, it calls `adm_statistics` or `data_statistics`, and writes what they return to the cache.

The cache (`dumo.io.read.cache_folder`) may be emptied at any time. A file's name is a hash of its key (the data's
pixels, the network's weights, the protocol), which the file itself repeats. So statistics of changed data, and damaged
files, are computed anew. Images are read batch by batch, every rank its share of them, and none is held in memory.

ADM's file (Dhariwal & Nichol 2021), an .npz, is read as it is published (`read_adm`): mean and covariance of the
features of a whole training set, `mu`, `sigma` for the FID and `mu_s`, `sigma_s` for the sFID, and some of its images,
`arr_0`, for precision and recall (`dumo.evaluation.npz`). It does not say how many images the moments are of; the
protocol does.

Others also use `STANDARDS`, which says what each protocol's name fixes, `hash_images` and `with_progress`, which take
batches of any images, and `PIECE`.
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

PIECE = 64  # images that are read, and put through the network, at a time: ours
IMAGENET_TRAIN_IMAGES = 1_281_167  # in the training set of ImageNet-1k, of which ADM's files have the moments

_ADM_URL = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"


class Standard(NamedTuple):
    """What a protocol's name fixes; None where the data decides."""

    samples: int
    size: int | None  # pixels a side
    classes: int | None
    reference_images: int | None  # their number, in ADM's file or in the data
    subset: int  # rows per subset of the kernel distance
    url: str | None = None  # of ADM's file, which then is the reference; None: the run's data is


STANDARDS: dict[InceptionKind, Standard] = {
    "adm-imagenet256-50k": Standard(
        samples=50_000,
        size=256,
        classes=1000,
        reference_images=10_000,
        subset=1000,
        url=f"{_ADM_URL}/256/VIRTUAL_imagenet256_labeled.npz",
    ),
    "adm-imagenet512-50k": Standard(
        samples=50_000,
        size=512,
        classes=1000,
        reference_images=10_000,
        subset=1000,
        url=f"{_ADM_URL}/512/VIRTUAL_imagenet512.npz",
    ),
    "cifar10-train50k": Standard(samples=50_000, size=32, classes=10, reference_images=50_000, subset=1000),
    "folder": Standard(samples=10_000, size=None, classes=None, reference_images=None, subset=100),
}


@dataclass(frozen=True)
class AdmReference:
    """A reference file of ADM: the moments are in memory, the images stay on disk."""

    path: Path
    pool: Moments  # of the FID's features, over the whole training set
    spatial: Moments  # of the sFID's features, over the whole training set
    image_file: NpzImages  # the images that the file holds, a part of the training set

    def images(self, batch: int = PIECE) -> Iterator[UInt8[Tensor, "n 3 h w"]]:
        """Yield the images in their order, `batch` at a time. Raises `UserError` where the file ends early."""
        for first in range(0, len(self.image_file), batch):
            yield self.image_file.pixels(first, min(first + batch, len(self.image_file)))


def load_or_compute(key: Mapping[str, str], compute: Callable[[], Statistics]) -> Statistics:
    """The statistics of what `key` describes: from the cache if every rank can read them there, else computed.

    Computed statistics are written to the cache. Every rank must call this, since `compute` needs them all. Warns where
    the cache cannot be written.
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
    except (OSError, SafetensorError) as error:  # the statistics are good all the same
        warnings.warn(f"{path} cannot be written ({error}), so the data is counted again next time", stacklevel=2)
    return statistics


def open_adm_file(path: Path, name: str, standard: Standard) -> AdmReference:
    """Open ADM's file for the protocol called `name`, which fixes `standard`.

    Raises `UserError` where the file is damaged, or holds images of another number or size than the standard says.
    """
    file = read_adm(path, count=IMAGENET_TRAIN_IMAGES)
    if file.image_file.shape[:3] != (standard.reference_images, standard.size, standard.size):
        raise UserError(
            f"{path} has images of shape {file.image_file.shape}, protocol {name} compares with"
            f" {standard.reference_images} of {standard.size}x{standard.size}: give the file {standard.url}"
        )
    return file


def adm_facts(file: AdmReference) -> dict[str, str]:
    """What a report says of ADM's file: its name and its hash."""
    return {"reference": file.path.name, "reference_sha256": digest.of_file(file.path)}


def adm_statistics(extractor: Extractor, file: AdmReference, tick: ImageTick | None = None) -> Statistics:
    """Features of the file's images as the extractor sees them, with the moments that the file publishes.

    Every rank must call it. `tick` is called with how many images are done, of how many.
    """
    batches = with_progress(_adm_batches(file), len(file.image_file), tick)
    image_statistics = gather(statistics_of(extractor, batches))
    return replace(image_statistics, pool=file.pool, spatial=file.spatial)


def _adm_batches(file: AdmReference) -> Iterator[Batch]:
    """This rank's share of the file's images, in batches of numbers (n,) and images (n, 3, height, width)."""
    for piece, x in enumerate(file.images(PIECE)):
        if piece % dist.world() == dist.rank():
            yield piece * PIECE + torch.arange(len(x)), x


def data_facts(data: Finite, name: str, standard: Standard, split: str | None = None) -> dict[str, str]:
    """What a report says of a run's data: how many images there are, and a hash of their pixels in their order.

    `split` is the one that they are of; None: that of the training. Every rank must call it. Raises `UserError` where
    the protocol called `name` compares with another number of images.
    """
    total, sha256 = hash_images(_data_batches(data))
    if standard.reference_images not in (None, total):
        problem = f"protocol {name} compares with {standard.reference_images} images, here are {total}"
        if split is not None:
            raise UserError(f"{problem} of split {split}: compare with those of the training by evaluate.split=null")
        raise UserError(f"{problem}: give them all, once")
    return {"reference": f"{total:,} images of {name_of_data(split)}", "reference_sha256": sha256}


def data_statistics(extractor: Extractor, data: Finite, tick: ImageTick | None = None) -> Statistics:
    """The statistics of all images of a run's data, each known by its row.

    Every rank must call it. `tick` is called with how many images are done, of how many.
    """
    batches = ((rows, x) for rows, x in _data_batches(data) if len(x))
    return gather(statistics_of(extractor, with_progress(batches, len(data), tick)))


def _data_batches(data: Finite) -> Iterator[Batch]:
    """This rank's share of the images, in batches of rows (n,) and pixels (n, 3, height, width). Some may be empty."""
    images_per_rank = -(-len(data) // dist.world())
    batch_size = min(PIECE, images_per_rank)  # so every rank has a share of few images
    for first in range(dist.rank() * batch_size, len(data), dist.world() * batch_size):
        x, _ = data.rows(slice(first, first + batch_size))
        if x.dtype != torch.uint8:
            x = to_uint8(x)
        pixels = x.expand(-1, 3, -1, -1)  # grey in all three
        yield torch.arange(first, first + len(pixels)), pixels


def hash_images(batches: Iterable[Batch]) -> tuple[int, str]:
    """How many images all ranks have, and the SHA-256 of their pixels in the order of their numbers.

    `batches` are this rank's share, as numbers and images. Every rank must call it.
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
    """The batches unchanged. After each one, `tick` is called with how many images are done, of `total`.

    The other ranks are taken to be as far as this one.
    """
    done = 0
    for index, x in batches:
        yield index, x
        done += len(x) * dist.world()
        if tick:
            tick(min(done, total), total)


def read_adm(path: Path | str, *, count: int) -> AdmReference:
    """Read and check a file of ADM whose moments are of `count` images. Raises `UserError` for any other file."""
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
    """The file's array `key` in float64.

    Raises `UserError` unless its values are finite floats of this shape, and a matrix is symmetric.
    """
    array = read_array(path, key, "f", shape, "finite floats")
    if len(shape) == 2 and not np.allclose(array, array.T, rtol=1e-4, atol=1e-6):
        raise UserError(f"{path}: {key} is no covariance, it is not symmetric: fetch the file again")
    return torch.from_numpy(array.astype(np.float64))
