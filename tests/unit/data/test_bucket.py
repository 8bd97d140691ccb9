"""Buckets: an image loses the least, and what is said; a batch has one shape, and every image its turn."""

import math
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch import Tensor

from autoencoder import taef2
from dumo.data import Images, Latents
from dumo.data.bucket import Buckets, cropped_share, nearest_size
from dumo.data.cache import open_cache
from dumo.data.pixel import Size, ToRectangle, crop_middle, upright_size
from dumo.io.data_source import Bucketed, TensorData
from dumo.run import fill_caches
from dumo.runtime.random import stream
from dumo.types import UserError

SHAPES: list[Size] = [(24, 40), (40, 24), (32, 32), (50, 31), (31, 45), (70, 68), (30, 90), (9, 8)]


def test_sizes_are_those_of_sdxl() -> None:
    """Its App. I, as far as a side is at most 1.75 times the other."""
    known = {(1024, 1024), (960, 1088), (896, 1152), (832, 1216), (768, 1344)}
    assert set(Buckets().sizes(1024)) == known | {(width, height) for height, width in known}


@pytest.mark.parametrize(("side", "step", "ratio"), [(32, 8, 2.0), (256, 32, 3.0), (512, 64, 1.0), (96, 96, 9.0)])
def test_sizes_fill_the_area_and_no_more(side: int, step: int, ratio: float) -> None:
    sizes = Buckets(step=step, ratio=ratio).sizes(side)
    assert (side, side) in sizes
    for height, width in sizes:
        assert height % step == width % step == 0
        assert max(height, width) <= ratio * min(height, width)
        assert height * width <= side**2 < (max(height, width) + step) * min(height, width)
        assert (width, height) in sizes


def test_an_image_goes_where_it_loses_the_least() -> None:
    """But for what is rounded to whole pixels."""
    groups = Buckets(step=32).groups(256)
    for image in product(range(200, 900, 37), range(200, 900, 37)):
        best = min(cropped_share(image, size) for size in groups[0])
        assert cropped_share(image, nearest_size(image, groups)) == pytest.approx(best, abs=0.02)


def test_no_image_is_enlarged_where_a_smaller_area_is_there() -> None:
    groups = Buckets(step=8, smaller=(16,)).groups(32)
    assert len(groups) == 2
    assert nearest_size((24, 40), groups) == (24, 40)
    assert nearest_size((23, 40), groups) in groups[1]
    assert nearest_size((8, 8), groups) == (16, 16)  # none is small enough


@pytest.mark.parametrize("size", [(24, 40), (40, 24), (32, 32)])
def test_what_is_lost_is_what_is_said(size: Size) -> None:
    """Of an image whose colours say where a pixel was, as far as these reach."""
    for height, width in ((100, 240), (240, 100), (64, 65), (333, 200)):
        rows, columns = (torch.linspace(0, 255, n).round().to(torch.uint8) for n in (height, width))
        pixels = torch.stack([rows[:, None].expand(height, width), columns.expand(height, width)], -1)
        image = Image.fromarray(torch.cat([pixels, pixels[..., :1]], -1).numpy())
        x = torch.from_numpy(np.array(crop_middle(image, size, "adm"))).float()
        assert x.shape[:2] == size
        seen = [(x[..., k].amax() - x[..., k].amin() + 255 / n) / 255 for k, n in ((0, size[0]), (1, size[1]))]
        assert 1 - math.prod(map(float, seen)) == pytest.approx(cropped_share((height, width), size), abs=0.04)


def test_a_photo_is_measured_upright(tmp_path: Path) -> None:
    for turn, size in ((1, (20, 30)), (6, (30, 20)), (8, (30, 20))):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = turn
        for ending in ("jpg", "png", "tiff"):
            Image.new("RGB", (30, 20)).save(file := tmp_path / f"{turn}.{ending}", exif=exif)
            assert upright_size(data := file.read_bytes()) == size
            assert ToRectangle(*size, "none")(data).shape == (3, *size)


# --- whose turn it is


def parts(*counts: int) -> Bucketed:
    """A part of each size, whose samples say their number among all."""
    firsts = [sum(counts[:k]) for k in range(len(counts))]
    made = [
        TensorData(torch.arange(a, a + n)[:, None].float(), torch.arange(a, a + n))
        for a, n in zip(firsts, counts, strict=True)
    ]
    return Bucketed(made, [(k,) for k in range(len(counts))])


def by_queues(counts: tuple[int, ...], batch: int, epochs: int) -> Iterator[list[int]]:
    """The parts that make a batch in each epoch, by filling a queue of each."""
    queued = [0] * len(counts)
    for _ in range(epochs):
        queued = [waiting + n for waiting, n in zip(queued, counts, strict=True)]
        yield sorted(k for k, waiting in enumerate(queued) for _ in range(waiting // batch))
        queued = [waiting % batch for waiting in queued]


@pytest.mark.parametrize(("counts", "batch"), [((30, 50, 4), 8), ((5, 3, 1), 16), ((7, 7), 7), ((64,), 8)])
def test_every_row_has_its_turn_and_none_is_lost(counts: tuple[int, ...], batch: int) -> None:
    """Epoch by epoch the batches are those of queues; those of a part are epochs of its own, end to end."""
    source, epochs, first = parts(*counts), 3 * batch, 0
    seen = [dict[int, Tensor]() for _ in counts]
    for turns in by_queues(counts, batch, epochs):
        steps = range(first, first + len(turns))
        first = steps.stop
        whose = [source.part_of_step(step, batch, 0) for step in steps]
        assert sorted(k for k, _ in whose) == turns
        for step, (k, number) in zip(steps, whose, strict=True):
            seen[k][number] = source.batch(step, batch, 0)[1]
    for k, n in enumerate(counts):
        assert sorted(seen[k]) == [*range(epochs * n // batch)]
        rows = torch.cat([seen[k][number] for number in sorted(seen[k])]).view(epochs, n)
        assert torch.equal(rows.sort(1).values, torch.arange(n).expand(epochs, n) + sum(counts[:k]))


def test_turns_and_rows_are_keyed_by_the_seed() -> None:
    """And parts of one size are not in one order."""
    source = parts(40, 40)
    turns = [[source.part_of_step(step, 4, seed) for step in range(20)] for seed in (0, 0, 1)]
    assert turns[0] == turns[1] != turns[2]
    assert len(Counter(k for k, _ in turns[0])) == 2
    firsts = {
        source.part_of_step(step, 4, 0)[0]: source.batch(step, 4, 0)[1] for step in range(20) if turns[0][step][1] == 0
    }
    assert not torch.equal(firsts[0], firsts[1] - 40)


# --- images and their latents


def photos(root: Path, count: int = 16) -> Path:
    """Noise in several sizes, in two classes."""
    for i in range(count):
        (root / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        height, width = SHAPES[i % len(SHAPES)]
        pixels = torch.randint(256, (height, width, 3), generator=stream("photo", i), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(root / "ab"[i % 2] / f"{i:02}.png")
    return root


def spec(root: Path, **fields: object) -> Images:
    buckets = {"step": 8, "smaller": [16]}
    return Images.model_validate(
        {"root": str(root), "side": 32, "buckets": buckets, "flip": True, **fields}
    ).with_facts()


def by_number(source: Bucketed, steps: int, batch: int) -> dict[int, set[tuple[int, ...]]]:
    """The shapes that each image was seen in."""
    seen: dict[int, set[tuple[int, ...]]] = {}
    for step in range(steps):
        x, _ = source.batch(step, batch, 0)
        assert x.shape[1:] in source.shapes
        for i in source.numbers(step, batch, 0).tolist():
            seen.setdefault(i, set()).add(tuple(x.shape[1:]))
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("memory", [2.0, 0.0])
def test_images_come_in_their_bucket(tmp_path: Path, memory: float) -> None:
    images = spec(photos(tmp_path), memory=memory)
    source, store = images.open(), images.open_rows()
    assert isinstance(source, Bucketed)
    groups = Buckets(step=8, smaller=(16,)).groups(32)
    expected = {i: {(3, *nearest_size(upright_size(store.read(i)), groups))} for i in range(len(store))}
    assert by_number(source, 40, 4) == expected
    assert "in 16 of" not in source.about
    crops = images.crops()
    assert crops is not None
    assert str(crops) == source.about
    assert sum(crops.counts.values()) == source.size == 16
    shares = [cropped_share(upright_size(store.read(i)), next(iter(shape))[1:]) for i, shape in expected.items()]
    assert (crops.mean_cropped, crops.max_cropped) == (pytest.approx(sum(shares) / 16), pytest.approx(max(shares)))
    assert images.originals().reference(99, 0)[0].shape == (16, 3, 32, 32)  # what is judged by are squares


def test_an_image_that_cannot_be_read_is_in_no_bucket(tmp_path: Path) -> None:
    """Nor one whose header alone is whole: another of its own bucket replaces it."""
    root = photos(tmp_path)
    (root / "a/00.png").write_bytes(b"no image")
    with Image.open(root / "b/01.png") as image:
        image.save(half := root / "b/01.jpg")
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    (root / "b/01.png").unlink()
    with pytest.raises(UserError, match=r"00\.png is not an image in a supported format"):
        spec(root).open()
    with pytest.warns(UserWarning, match="1 of 16 images cannot be read and are in no bucket"):
        source = spec(root, on_bad="skip", memory=0.0).open()
    assert isinstance(source, Bucketed)
    with pytest.warns(UserWarning, match="01.jpg"):
        seen = by_number(source, 40, 4)
    assert all(len(shapes) == 1 for shapes in seen.values())
    assert 0 not in seen


@pytest.mark.parametrize("memory", [2.0, 0.0])
def test_a_bucket_of_which_no_image_can_be_decoded_is_left_out(memory: float, tmp_path: Path) -> None:
    """Its only one has a whole header; without a bucket that is left, it says why."""
    Image.new("RGB", (32, 32)).save(tmp_path / "whole.png")
    Image.effect_noise((64, 32), 90).save(half := tmp_path / "half.jpg")
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    images = Images(root=str(tmp_path), side=32, buckets=Buckets(step=8), on_bad="skip", memory=memory, classes=0)
    with pytest.warns(UserWarning, match=r"bucket 40 x 24 is left out: none of the 1 images can be read.*half\.jpg"):
        source = images.open()
    assert source.batch(0, 4, 0)[0].shape == (4, 3, 32, 32)
    (tmp_path / "whole.png").unlink()
    with (
        pytest.warns(UserWarning, match="is left out"),
        pytest.raises(UserError, match=r"none of the 1 images can be read; .*half\.jpg cannot"),
    ):
        images.open()


def latents(root: Path, cache: Path, **fields: object) -> Latents:
    images = spec(root, **fields).model_dump(mode="json")
    weights = cache.parent / "taef2.safetensors"
    codec = {"kind": "taef2", "weights": str(weights if weights.exists() else taef2(weights))}
    return Latents.model_validate({"root": str(cache), "images": images, "codec": codec}).with_facts()


@pytest.mark.nightly
def test_latents_are_those_of_the_images_bucket_by_bucket(tmp_path: Path) -> None:
    """Mirrored and captioned as they are, however many were encoded at a time."""
    root = photos(tmp_path / "photos")
    for i, file in enumerate(sorted(root.rglob("*.png"))):
        file.with_suffix(".caption").write_text(f"number {i}")
    data = latents(root, tmp_path / "one", captions={"kind": "files"})
    made = fill_caches.encode(data, dtype="float32", shard_rows=5, batch=2)
    source, images = data.open(), data.images.open()
    assert isinstance(source, Bucketed)
    assert isinstance(images, Bucketed)
    assert source.about == images.about in "\n".join(made.lines())
    opened = data.codec.open()
    for step in range(12):
        (x, c), (pixels, d) = (of.batch(step, 4, 3) for of in (source, images))
        assert torch.equal(c, d)
        assert x.shape[1:] in source.shapes
        torch.testing.assert_close(x, opened.encode(pixels), rtol=1e-4, atol=1e-4)
    other = latents(root, tmp_path / "two", captions={"kind": "files"})
    fill_caches.encode(other, dtype="float32", shard_rows=5, batch=32)
    one, two = (open_cache(of.folder, of.codec) for of in (data, other))
    for name in ("labels", "image", "cropped"):
        assert torch.equal(one.take(torch.arange(16), name), two.take(torch.arange(16), name))


def test_a_cache_of_other_buckets_or_images_is_refused(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos")
    data = latents(root, tmp_path / "cache")
    fill_caches.encode(data)
    with pytest.raises(UserError, match=r"data\.root: [\s\S]*sizes: "):
        latents(root, tmp_path / "cache", buckets={"step": 16}).open()
    with pytest.raises(UserError, match=r"data\.root: [\s\S]*sizes: "):
        latents(root, tmp_path / "cache", buckets=None).open()
    Image.new("RGB", (40, 24)).save(root / "b/01.png")
    with pytest.raises(UserError, match=r"was made from different images, .*01\.png changed"):
        fill_caches.encode(data)


def test_fields_that_know_one_size_are_refused(tmp_path: Path) -> None:
    for fields, says in (
        ({"crop": "none"}, "set crop=adm"),
        ({"augment": {"kind": "edm"}, "labelled": False}, "set augment=null"),
    ):
        with pytest.raises(ValueError, match=says):
            spec(tmp_path, **fields)
