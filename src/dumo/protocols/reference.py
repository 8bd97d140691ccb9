"""Statistics of the data that samples are compared with: of ADM's file, or of all images of a run's own data, one by
one.

Images are read in pieces, every rank its share of them, and none is held. A hash of all their pixels says which data it
was; it takes a small part of the time that the network takes.
"""

from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dumo import dist
from dumo.io.picture import Pixels, to_uint8
from dumo.io.weights import digest
from dumo.metrics.statistics import Batch, Extractor, Statistics, gather, statistics_of
from dumo.protocols.adm import AdmReference, read_adm
from dumo.protocols.evaluator import Tick, ordered
from dumo.protocols.standard import TRAIN, Standard
from dumo.types import UserError

PIECE = 64  # images


@runtime_checkable
class Album(Protocol):
    """Images that can be gone through."""

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def rows(self, rows: slice) -> tuple[Tensor, Tensor]:
        """A stretch of them in [-1, 1], with their classes; fewer where some cannot be read."""
        ...


def adm_file(path: Path, name: str, standard: Standard) -> AdmReference:
    """ADM's file. Raises `UserError` where it is none, or is of other images than the protocol of this name says."""
    file = read_adm(path, count=TRAIN)
    if file.shape[:3] != (standard.real, standard.size, standard.size):
        raise UserError(
            f"{path} has images of shape {file.shape}, protocol {name} compares with {standard.real} of"
            f" {standard.size}x{standard.size}: give the file {standard.url}"
        )
    return file


def adm_facts(file: AdmReference) -> dict[str, str]:
    """What a report says of the file."""
    return {"reference": file.path.name, "reference_sha256": digest(file.path)}


def adm_statistics(extractor: Extractor, file: AdmReference, tick: Tick | None = None) -> Statistics:
    """Its images as the network sees them, its moments as they are published."""
    batches = enumerate(file.images(PIECE))
    mine = ((torch.arange(len(x)) + i * PIECE, x) for i, x in batches if i % dist.world() == dist.rank())
    return replace(
        gather(statistics_of(extractor, _told(mine, file.shape[0], tick))), pool=file.pool, spatial=file.spatial
    )


def album_facts(album: Album, name: str, standard: Standard) -> dict[str, str]:
    """How many images there are, and the hash of their pixels in their order.

    Raises `UserError` where the protocol of this name says another number.
    """
    hashes, numbers = [torch.empty(0, 32, dtype=torch.uint8)], [torch.empty(0, dtype=torch.long)]
    for first, x in _pieces(album):
        told = b"".join(sha256(f"{tuple(one.shape)}".encode() + one.numpy().tobytes()).digest() for one in x)
        hashes.append(torch.tensor(list(told), dtype=torch.uint8).view(-1, 32))
        numbers.append(torch.arange(first, first + len(x)))
    all_hashes, index = (torch.cat(dist.gathered(torch.cat(part))) for part in (hashes, numbers))
    total = len(index)
    if standard.real not in (None, total):
        raise UserError(f"protocol {name} compares with {standard.real} images, here are {total}: give them all, once")
    whole = sha256(all_hashes[ordered(index)].numpy().tobytes()).hexdigest()
    return {"reference": f"{total:,} images of the data", "reference_sha256": whole}


def album_statistics(extractor: Extractor, album: Album, tick: Tick | None = None) -> Statistics:
    """All images, known by their rows."""
    mine = ((torch.arange(first, first + len(x)), x) for first, x in _pieces(album) if len(x))
    return gather(statistics_of(extractor, _told(mine, album.size, tick)))


def _pieces(album: Album) -> Iterator[tuple[int, Pixels]]:
    """Of all pieces in turn this rank's: the row it begins with, and its images. Some may have none."""
    piece = min(PIECE, -(-album.size // dist.world()))  # a share for each rank
    for first in range(dist.rank() * piece, album.size, dist.world() * piece):
        yield first, to_uint8(album.rows(slice(first, first + piece))[0])


def _told(batches: Iterator[Batch], total: int, tick: Tick | None) -> Iterator[Batch]:
    """The same, and how many images have come; of other ranks as many again."""
    done = 0
    for index, x in batches:
        yield index, x
        done += len(x) * dist.world()
        if tick:
            tick(min(done, total), total)
