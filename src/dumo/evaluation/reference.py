"""Statistics of the data that samples are compared with: of ADM's file, or of all images of a run's own data.

Images are read in pieces, every rank its share of them, and none is held. A hash of all their pixels says which data it
was; it takes a small part of the time that the network takes. What was counted once is kept, in a folder that may be
emptied at any time: the name of a file is a hash of what it is of, which the file itself repeats (the data's pixels,
the network's weights, the protocol), so what has changed or is damaged is counted anew.

ADM's file (Dhariwal & Nichol 2021), an .npz, is read as it is published: mean and covariance of the features of a whole
training set, `mu`, `sigma` for the FID and `mu_s`, `sigma_s` for the sFID, and some of its images, `arr_0`, for
precision and recall (`dumo.evaluation.npz`). How many images the moments are of it does not say; the protocol does.

`cached` returns statistics that are kept, or has them counted: by `adm_statistics` or `album_statistics`.
"""

import json
import os
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
from dumo.evaluation import npz
from dumo.evaluation.distance import Moments
from dumo.evaluation.npz import NpzImages
from dumo.evaluation.protocol import Tick
from dumo.evaluation.statistics import (
    Batch,
    Extractor,
    Statistics,
    gather,
    load_statistics,
    ordered,
    save_statistics,
    statistics_of,
)
from dumo.io import digest
from dumo.io import file as files
from dumo.io.picture import to_uint8
from dumo.io.read import user_path
from dumo.io.source import Finite
from dumo.runtime import dist
from dumo.types import UserError

Inception = Literal["adm-imagenet256-50k", "adm-imagenet512-50k", "cifar10-train50k", "folder"]

ADM_URL = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
PIECE = 64  # images
TRAIN = 1_281_167  # images of ImageNet-1k's training set, of which ADM's moments are

VARIABLE = "DUMO_CACHE"  # of the environment: the folder where statistics are kept


class Standard(NamedTuple):
    """What a name fixes of distances in Inception's features; None where the data decides."""

    samples: int
    size: int | None  # pixels a side
    classes: int | None
    real: int | None  # images of the reference
    subset: int  # rows per subset of the kernel distance
    url: str | None = None  # of ADM's file, which then is the reference; None: images are


STANDARDS: dict[Inception, Standard] = {
    "adm-imagenet256-50k": Standard(50_000, 256, 1000, 10_000, 1000, f"{ADM_URL}/256/VIRTUAL_imagenet256_labeled.npz"),
    "adm-imagenet512-50k": Standard(50_000, 512, 1000, 10_000, 1000, f"{ADM_URL}/512/VIRTUAL_imagenet512.npz"),
    "cifar10-train50k": Standard(50_000, 32, 10, 50_000, 1000),
    "folder": Standard(10_000, None, None, None, 100),
}


@dataclass(frozen=True)
class AdmReference:
    """A reference file: the moments are in memory, the images on disk."""

    path: Path
    pool: Moments  # of the FID's features
    spatial: Moments  # of the sFID's
    kept: NpzImages  # some of those that the moments are of

    def images(self, batch: int = 64) -> Iterator[UInt8[Tensor, "n 3 h w"]]:
        """The images in their order, colours 0 .. 255, channels first. Raises `UserError` where the file ends early."""
        for first in range(0, len(self.kept), batch):
            yield self.kept.pixels(first, min(first + batch, len(self.kept)))


def folder() -> Path:
    """Where `VARIABLE` says, else ~/.cache/dumo."""
    return user_path(os.environ.get(VARIABLE) or "~/.cache/dumo", VARIABLE)


def cached(of: Mapping[str, str], count: Callable[[], Statistics]) -> Statistics:
    """The statistics of what `of` says: as they were kept if every rank can read them, else counted and kept.

    Every rank must call it. Warns where they cannot be written.
    """
    key = digest.of_bytes(json.dumps(dict(of), sort_keys=True).encode())[:16]
    path = folder() / f"statistics-{key}.safetensors"
    kept_statistics = load_statistics(path, of)
    is_kept = dist.gathered(torch.tensor([kept_statistics is not None]))
    if kept_statistics is not None and all(bool(of_rank) for of_rank in is_kept):
        return kept_statistics
    statistics = count()
    try:
        if dist.is_main():
            with files.atomic_write(path) as temp_path:
                save_statistics(temp_path, statistics, of)
    except (OSError, SafetensorError) as error:  # the statistics are good, if not kept
        warnings.warn(f"{path} cannot be written ({error}), so the data is counted again next time", stacklevel=2)
    return statistics


def adm_file(path: Path, name: str, standard: Standard) -> AdmReference:
    """ADM's file. Raises `UserError` where it is none, or is of other images than the protocol of this name says."""
    file = read_adm(path, count=TRAIN)
    if file.kept.shape[:3] != (standard.real, standard.size, standard.size):
        raise UserError(
            f"{path} has images of shape {file.kept.shape}, protocol {name} compares with {standard.real} of"
            f" {standard.size}x{standard.size}: give the file {standard.url}"
        )
    return file


def adm_facts(file: AdmReference) -> dict[str, str]:
    """What a report says of the file."""
    return {"reference": file.path.name, "reference_sha256": digest.of_file(file.path)}


def adm_statistics(extractor: Extractor, file: AdmReference, tick: Tick | None = None) -> Statistics:
    """Its images as the network sees them, its moments as they are published."""
    batches = _counted(_rank_images(file), len(file.kept), tick)
    of_images = gather(statistics_of(extractor, batches))
    return replace(of_images, pool=file.pool, spatial=file.spatial)


def _rank_images(file: AdmReference) -> Iterator[Batch]:
    """This rank's share of the file's images, with their numbers."""
    for piece, x in enumerate(file.images(PIECE)):
        if piece % dist.world() == dist.rank():
            yield piece * PIECE + torch.arange(len(x)), x


def album_facts(album: Finite, name: str, standard: Standard) -> dict[str, str]:
    """How many images there are, and the hash of their pixels in their order.

    Raises `UserError` where the protocol of this name says another number.
    """
    total, sha256 = hash_images(_pieces(album))
    if standard.real not in (None, total):
        raise UserError(f"protocol {name} compares with {standard.real} images, here are {total}: give them all, once")
    return {"reference": f"{total:,} images of the data", "reference_sha256": sha256}


def hash_images(mine: Iterable[Batch]) -> tuple[int, str]:
    """How many images all ranks have, each its share, and the SHA-256 of their pixels in the order of their numbers."""
    hashes = [torch.empty(0, 32, dtype=torch.uint8)]
    numbers = [torch.empty(0, dtype=torch.long)]
    for index, images in mine:
        image_hashes = bytearray()
        for image in images:
            sha256 = digest.of_bytes(f"{tuple(image.shape)}".encode(), image.numpy().tobytes())
            image_hashes += bytes.fromhex(sha256)
        hashes.append(torch.tensor(list(image_hashes), dtype=torch.uint8).view(-1, 32))
        numbers.append(index)
    all_hashes = torch.cat(dist.gathered(torch.cat(hashes)))
    all_numbers = torch.cat(dist.gathered(torch.cat(numbers)))
    return len(all_numbers), digest.of_bytes(all_hashes[ordered(all_numbers)].numpy().tobytes())


def album_statistics(extractor: Extractor, album: Finite, tick: Tick | None = None) -> Statistics:
    """The statistics of all images, known by their rows."""
    batches = ((index, x) for index, x in _pieces(album) if len(x))
    return gather(statistics_of(extractor, _counted(batches, len(album), tick)))


def _pieces(album: Finite) -> Iterator[Batch]:
    """Of all pieces in turn this rank's: the numbers of its images, and the images. Some may have none."""
    piece = min(PIECE, -(-len(album) // dist.world()))  # a share for each rank
    for first in range(dist.rank() * piece, len(album), dist.world() * piece):
        x, _ = album.rows(slice(first, first + piece))
        pixels = to_uint8(x)
        yield torch.arange(first, first + len(pixels)), pixels


def _counted(batches: Iterator[Batch], total: int, tick: Tick | None) -> Iterator[Batch]:
    """The same batches; `tick` is called with how many images have come, of other ranks as many again."""
    done = 0
    for index, x in batches:
        yield index, x
        done += len(x) * dist.world()
        if tick:
            tick(min(done, total), total)


def read_adm(path: Path | str, *, count: int) -> AdmReference:
    """Read and check a reference whose moments are of `count` images. Raises `UserError` for any other file."""
    path = Path(path)

    def moments(suffix: str, width: int) -> Moments:
        mean = _floats(path, f"mu{suffix}", width)
        covariance = _floats(path, f"sigma{suffix}", width, width)
        return Moments(count, mean, covariance * (count - 1))

    return AdmReference(path, moments("", WIDTH), moments("_s", SPATIAL_WIDTH), NpzImages(path))


def _floats(path: Path, key: str, *shape: int) -> Tensor:
    """An array of finite floats of this shape, symmetric if it is a matrix, in float64."""
    array = npz.array(path, key, "f", shape, "finite floats")
    if len(shape) == 2 and not np.allclose(array, array.T, rtol=1e-4, atol=1e-6):
        raise UserError(f"{path}: {key} is no covariance, it is not symmetric: fetch the file again")
    return torch.from_numpy(array.astype(np.float64))
