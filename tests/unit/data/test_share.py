"""Parts of a batch are the batch, to the bit, and who asks for a part reads and draws for its rows alone."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import pytest
import torch
from PIL import Image
from torch import Tensor

from contract.drawn import counting
from dumo.data import Digits, Images, Moons
from dumo.data.augment import Edm
from dumo.data.cache import open_cache
from dumo.data.encoding import encode
from dumo.data.images import Source
from dumo.data.latents import LatentSource, PriorRows
from dumo.io.data_source import Bucketed, rows_of
from dumo.io.table import ShardTable
from dumo.run.teacher import TeacherPairs
from dumo.runtime.random import stream
from unit.data.spy import spied
from unit.encoders.toy import GAUSSIAN, PLAN, Pictures

BATCH, COUNT, SIDE = 64, 50, 9  # more rows than images: a batch crosses epochs. An odd side, no whole vectors of floats
WORLDS = [1, 2, 8, 64]


class Batches(Protocol):
    """A source of two tensors, or three."""

    def batch(self, step: int, batch_size: int, seed: int, rows: slice = ...) -> tuple[Tensor, ...]: ...


def album(root: Path, **fields: object) -> Source:
    """Random grey images in two classes, opened."""
    for i in range(COUNT):
        (root / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (SIDE, SIDE), generator=stream("share", i), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(root / f"{i % 2}" / f"{i:02}.png")
    return Images.model_validate({"root": str(root), "side": SIDE, "crop": "none", **fields}).with_facts().open()


def bucketed(root: Path, **fields: object) -> Bucketed:
    """The same, but that every third image is an oblong."""
    album(root)
    for i in range(0, COUNT, 3):
        with Image.open(file := root / f"{i % 2}" / f"{i:02}.png") as image:
            image.resize((12, 6)).save(file)
    return (
        Images.model_validate({"root": str(root), "side": SIDE, "buckets": {"step": 3}, **fields}).with_facts().open()
    )


def latents(root: Path) -> LatentSource:
    """A cache of moments, with both flips."""
    encode(Pictures(COUNT), GAUSSIAN, PLAN, root)
    return LatentSource(open_cache(root, GAUSSIAN.codec), GAUSSIAN.codec, flip=True)


def with_prior(root: Path) -> LatentSource:
    """The same, of which the first seven make up three tenths of a batch."""
    found = latents(root)
    found.prior = PriorRows(0.3, found.cache_rows[:7], found.cache_rows[7:])
    return found


SOURCES: dict[str, Callable[[Path], Batches]] = {
    "table": lambda root: Digits().open(),
    "moons": lambda root: Moons(labelled=True).open(),
    "kept": lambda root: album(root, flip=True),
    "read": lambda root: album(root, flip=True, memory=0.0),
    "buckets kept": lambda root: bucketed(root, flip=True),
    "buckets read": lambda root: bucketed(root, flip=True, memory=0.0),
    "augmented": lambda root: album(root, labelled=False, augment=Edm()),
    "latents": latents,
    "prior": with_prior,
    "coupled": lambda root: TeacherPairs(x := torch.arange(COUNT)[:, None].float(), -x, torch.arange(COUNT)),
}


@pytest.mark.slow
@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_parts_of_a_batch_are_the_batch(make: Callable[[Path], Batches], tmp_path: Path) -> None:
    """Of as many ranks as there are, and cut unevenly: the same bits, whatever else is asked for."""
    source = make(tmp_path / "data")
    for step in (0, 3):
        whole = source.batch(step, BATCH, 1)
        assert {len(part) for part in whole} == {BATCH}
        for sizes in (*([BATCH // world] * world for world in WORLDS), [1, 7, 13, 43]):
            ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
            cuts = [slice(start, end) for start, end in pairwise(ends)]
            parts = zip(*(source.batch(step, BATCH, 1, rows) for rows in cuts), strict=True)
            for part, one in zip(parts, whole, strict=True):
                assert torch.equal(torch.cat(part), one)


@pytest.mark.slow
def test_parts_of_many_points_are_the_whole() -> None:
    """Their law has no rounding that depends on the place of a row in what is computed at one time."""
    whole, _ = Moons().open().reference(2**17, 0)
    law = Moons().open()
    for n in (1, 3, 17, 1001):
        assert torch.equal(law.reference(n, 0)[0], whole[:n])


@pytest.mark.parametrize("world", WORLDS)
def test_a_rank_decodes_its_own_images_only(tmp_path: Path, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step's once, and none of another step."""
    source, last = album(tmp_path, memory=0.0), slice(BATCH - BATCH // world, BATCH)
    seen = spied(monkeypatch, source.encoded, "read", lambda i: i)
    for step in range(3):
        source.batch(step, BATCH, 1, last)
    asked = [rows_of(step, BATCH, size=COUNT, seed=1, rows=last) for step in range(3)]
    assert sorted(seen) == torch.cat(asked).sort().values.tolist()


@pytest.mark.parametrize("world", WORLDS)
def test_a_rank_reads_and_draws_its_own_latents_only(
    tmp_path: Path, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which are mirrored is drawn for the whole batch."""
    source, share = latents(tmp_path), BATCH // world
    read = spied(monkeypatch, ShardTable, "take", lambda cache, rows, *_: rows)
    for first in range(0, BATCH, share):
        mine = slice(first, first + share)
        wanted = rows_of(2, BATCH, size=COUNT, seed=1, rows=mine)
        with counting() as drawn:
            x, _ = source.batch(2, BATCH, 1, mine)
        assert all(torch.equal(read.pop(), wanted) for _ in ("x", "labels"))
        assert not read
        assert (drawn.rows, drawn.shaped, drawn.scalars) == (list(range(BATCH)[mine]), x.numel(), BATCH)


@pytest.mark.parametrize("world", WORLDS)
def test_a_rank_draws_its_own_points_only(world: int) -> None:
    share = BATCH // world
    for first in range(0, BATCH, share):
        with counting() as drawn:
            Moons().open().batch(2, BATCH, 1, slice(first, first + share))
        assert (drawn.rows, drawn.shaped, drawn.scalars) == (list(range(first, first + share)), 4 * share, 0)


def test_what_is_done_to_images_is_drawn_for_the_whole_batch() -> None:
    """A few numbers each, so that neither their law nor their rounding knows of ranks."""
    with counting() as drawn:
        change = Edm().draw(BATCH, stream("share"))
    assert drawn.scalars == 13 * BATCH
    assert not drawn.rows
    assert torch.equal(change[5:9].augment_labels, change.augment_labels[5:9])
