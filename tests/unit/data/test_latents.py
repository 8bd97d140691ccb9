"""Laws of latents as data: rows of the cache as the codec has them, and no cache but the one that was meant."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from autoencoder import taef2
from dumo.data import Latents
from dumo.run import encode
from dumo.types import UserError

SIDE, COUNT = 8, 22


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 random images in two classes."""
    root = tmp_path_factory.mktemp("images")
    for i in range(COUNT):
        pixels = torch.randint(256, (SIDE, SIDE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        (root / f"class{i % 2}").mkdir(exist_ok=True)
        Image.fromarray(pixels.numpy()).save(root / f"class{i % 2}" / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A codec's."""
    return str(taef2(tmp_path_factory.mktemp("codec") / "taef2.safetensors"))


@pytest.fixture(scope="module")
def latents(images: Path, weights: str) -> Callable[..., Latents]:
    """Makes the spec of those images through the codec, in a cache at `root`."""

    def of(root: Path, **changes: Any) -> Latents:  # noqa: ANN401, parts of a spec
        codec = {"kind": "taef2", "weights": weights} | changes.pop("codec", {})
        shown = {"root": str(images), "side": SIDE, "crop": "none"} | changes.pop("images", {})
        return Latents.model_validate({"root": str(root), "images": shown, "codec": codec} | changes).found()

    return of


def unmirrored(data: Latents) -> Latents:
    """The same without flips."""
    return data.model_copy(update={"images": data.images.model_copy(update={"flip": False})})


@pytest.fixture(scope="module")
def cached(latents: Callable[..., Latents], tmp_path_factory: pytest.TempPathFactory) -> Latents:
    """Their cache, of three shards, with both flips."""
    data = latents(tmp_path_factory.mktemp("cache") / "here", images={"flip": True})
    encode.encode(data, shard_rows=10, dtype="float32")
    return data


def test_rows_are_those_of_the_images(cached: Latents) -> None:
    """Without flips a batch is the batch of images through the codec."""
    still = unmirrored(cached)
    x, c = still.open().batch(3, 16, seed=5)
    pixels, labels = still.images.open().batch(3, 16, seed=5)
    torch.testing.assert_close(x, cached.codec.open().encode(pixels))
    assert torch.equal(c, labels)
    assert still.open().size == COUNT


def test_half_of_a_batch_is_mirrored_as_the_images_are(cached: Latents) -> None:
    """The same rows are mirrored, before the codec."""
    x, _ = cached.open().batch(1, 64, seed=0)
    pixels, _ = cached.images.open().batch(1, 64, seed=0)
    torch.testing.assert_close(x, cached.codec.open().encode(pixels))
    share = (x != unmirrored(cached).open().batch(1, 64, 0)[0]).flatten(1).any(1).float().mean().item()
    assert 0.25 < share < 0.75


def test_mapped_and_read_rows_are_equal(cached: Latents) -> None:
    """`memory` chooses how the cache is held, never what is in it."""
    mapped = cached.model_copy(update={"memory": 0.0})
    for step in range(3):
        for one, other in zip(cached.open().batch(step, 16, 0), mapped.open().batch(step, 16, 0), strict=True):
            assert torch.equal(one, other)


def test_reference_is_of_distinct_rows(cached: Latents) -> None:
    """As many as asked, all when more are, another choice by number."""
    source = cached.open()
    x, c = source.reference(9, seed=0)
    assert len(x) == len(c) == len(x.flatten(1).unique(dim=0)) == 9
    assert len(source.reference(1000, seed=0)[0]) == COUNT
    assert not torch.equal(x, source.reference(9, seed=0, i=1)[0])


def test_another_cache_than_meant_is_refused_by_its_field(cached: Latents) -> None:
    other = cached.model_copy(update={"images": cached.images.model_copy(update={"crop": "adm", "classes": 17})})
    with pytest.raises(UserError, match=r"data\.root: [\s\S]*crop: none in the cache, adm asked\n  classes: 2 in the"):
        other.open()


def test_parts_made_apart_are_the_whole(latents: Callable[..., Latents], cached: Latents, tmp_path: Path) -> None:
    """Part 1 of 2, then 0 of 2: the same files, to the last bit."""
    data = latents(tmp_path / "cache", images={"flip": True})
    assert encode.encode(data, shard_rows=10, dtype="float32", part=(1, 2)).contents is None
    made = encode.encode(data, shard_rows=10, dtype="float32", part=(0, 2))
    assert made.contents is not None
    assert made.done.made == 2
    files, others = (
        sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        for folder in (data.folder, cached.folder)
    )
    assert files == others
    assert all((data.folder / name).read_bytes() == (cached.folder / name).read_bytes() for name in files)


@pytest.mark.parametrize("text", ["2/2", "1", "-1/2", "a/b", "0/0"])
def test_a_part_that_is_none_is_refused(text: str) -> None:
    """K counts from 0 to N - 1."""
    with pytest.raises(UserError, match="write K/N"):
        encode.part_of(text)


def test_images_without_options_are_refused(images: Path) -> None:
    """A folder of images says nothing of a codec."""
    with pytest.raises(UserError, match="--codec"):
        encode.work_of(str(images), out=None, codec="taef2", side=8)


def test_a_folder_of_images_with_options_is_enough(images: Path, tmp_path: Path) -> None:
    """The classes are looked up, and flips are kept."""
    sets = ["data.images.on_bad=skip"]
    data = encode.work_of(str(images), sets, out=str(tmp_path / "out"), codec="taef2", side=SIDE).data
    assert (data.classes, data.shape, data.images.flip, data.images.on_bad) == (2, (32, 1, 1), True, "skip")
