"""Statistics of the data that samples are compared with: of ADM's file, or of all images of a run's own data, one by
one.

Images are read in pieces, every rank its share of them, and none is held. A hash of all their pixels says which data it
was; it takes a small part of the time that the network takes.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from dumo import dist
from dumo.data.source import Finite
from dumo.io import digest
from dumo.io.picture import Pixels, to_uint8
from dumo.metrics.statistics import Batch, Extractor, Statistics, gather, statistics_of
from dumo.protocols.adm import AdmReference, read_adm
from dumo.protocols.evaluator import Tick, ordered
from dumo.protocols.standard import TRAIN, Standard
from dumo.types import UserError

PIECE = 64  # images


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
    return {"reference": file.path.name, "reference_sha256": digest.of_file(file.path)}


def adm_statistics(extractor: Extractor, file: AdmReference, tick: Tick | None = None) -> Statistics:
    """Its images as the network sees them, its moments as they are published."""
    batches = enumerate(file.images(PIECE))
    mine = ((torch.arange(len(x)) + i * PIECE, x) for i, x in batches if i % dist.world() == dist.rank())
    return replace(
        gather(statistics_of(extractor, _told(mine, file.shape[0], tick))), pool=file.pool, spatial=file.spatial
    )


def album_facts(album: Finite, name: str, standard: Standard) -> dict[str, str]:
    """How many images there are, and the hash of their pixels in their order.

    Raises `UserError` where the protocol of this name says another number.
    """
    hashes, numbers = [torch.empty(0, 32, dtype=torch.uint8)], [torch.empty(0, dtype=torch.long)]
    for first, x in _pieces(album):
        told = "".join(digest.of_bytes(f"{tuple(one.shape)}".encode(), one.numpy().tobytes()) for one in x)
        hashes.append(torch.tensor(list(bytes.fromhex(told)), dtype=torch.uint8).view(-1, 32))
        numbers.append(torch.arange(first, first + len(x)))
    all_hashes, index = (torch.cat(dist.gathered(torch.cat(part))) for part in (hashes, numbers))
    total = len(index)
    if standard.real not in (None, total):
        raise UserError(f"protocol {name} compares with {standard.real} images, here are {total}: give them all, once")
    whole = digest.of_bytes(all_hashes[ordered(index)].numpy().tobytes())
    return {"reference": f"{total:,} images of the data", "reference_sha256": whole}


def album_statistics(extractor: Extractor, album: Finite, tick: Tick | None = None) -> Statistics:
    """All images, known by their rows."""
    mine = ((torch.arange(first, first + len(x)), x) for first, x in _pieces(album) if len(x))
    return gather(statistics_of(extractor, _told(mine, len(album), tick)))


def _pieces(album: Finite) -> Iterator[tuple[int, Pixels]]:
    """Of all pieces in turn this rank's: the row it begins with, and its images. Some may have none."""
    piece = min(PIECE, -(-len(album) // dist.world()))  # a share for each rank
    for first in range(dist.rank() * piece, len(album), dist.world() * piece):
        yield first, to_uint8(album.rows(slice(first, first + piece))[0])


def _told(batches: Iterator[Batch], total: int, tick: Tick | None) -> Iterator[Batch]:
    """The same, and how many images have come; of other ranks as many again."""
    done = 0
    for index, x in batches:
        yield index, x
        done += len(x) * dist.world()
        if tick:
            tick(min(done, total), total)
