"""Latents as data: rows as the codec has them, captions that outlive the images, and no cache but the one meant."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from autoencoder import taef2
from dumo.data import Latents
from dumo.data.cache import CAPTIONS as FILE
from dumo.data.latents import LatentSource
from dumo.run import fill_caches
from dumo.run.summary import empty_classes_line
from dumo.types import UserError
from unit.data.animals import COUNT, SIDE, archive, as_folder, picture
from unit.data.test_rows import FILES, TEXTS, TOLD, as_lines
from unit.encoders.toy import contents

SD3 = "stabilityai/stable-diffusion-3-medium-diffusers"

WORDS = {"captions": {"kind": "templates", "templates": ["a {}", "{n}"], "held": ["one {}"]}}
Maker = Callable[..., Latents]


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Makes the spec of the images of a folder through a codec, in a cache."""
    weights = str(taef2(tmp_path_factory.mktemp("codec") / "taef2.safetensors"))

    def of(root: Path, cache: Path, **fields: object) -> Latents:
        images = {"root": str(root), "side": SIDE, "crop": "none", **fields}
        codec = {"kind": "taef2", "weights": weights}
        return Latents.model_validate({"root": str(cache), "images": images, "codec": codec}).with_facts()

    return of


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    as_folder(root := tmp_path_factory.mktemp("images"))
    return root


@pytest.fixture(scope="module")
def cached(latents: Maker, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Latents:
    """Their cache, of three shards, with both flips."""
    data = latents(images, tmp_path_factory.mktemp("cache") / "here", flip=True)
    fill_caches.encode(data, shard_rows=5, dtype="float32")
    return data


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_what_a_teacher_made_is_known_by_its_folder(latents: Maker, tmp_path: Path, form: str) -> None:
    """On disk, or in an archive."""
    root = tmp_path / "images"
    pictures = {f"{'prior' if i < 3 else 'mine'}/{i:02}.png": picture(i) for i in range(COUNT)}
    if form == "tar":
        archive(root / "all.tar", pictures)
    else:
        for name, data in pictures.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
    made = latents(root, tmp_path / "cache", labelled=False)
    fill_caches.encode(made, dtype="float32")
    source = made.model_copy(update={"prior": 0.5}).open()
    assert isinstance(source, LatentSource)
    assert source.prior is not None
    assert (len(source.prior.prior), len(source.prior.other)) == (3, COUNT - 3)


def unmirrored(data: Latents) -> Latents:
    """The same without flips."""
    return data.model_copy(update={"images": data.images.model_copy(update={"flip": False})})


@pytest.mark.slow
@pytest.mark.parametrize("memory", [2.0, 0.0])
def test_rows_are_those_of_the_images(cached: Latents, memory: float) -> None:
    """A batch is that of the images through the codec, also in which are mirrored: half of them, before the codec."""
    for data in (cached, unmirrored(cached)):
        x, c = data.model_copy(update={"memory": memory}).open().batch(3, 64, seed=5)
        pixels, labels = data.images.open().batch(3, 64, seed=5)
        torch.testing.assert_close(x, data.codec.open().encode(pixels))
        assert torch.equal(c, labels)
    share = (x != cached.open().batch(3, 64, 5)[0]).flatten(1).any(1).float().mean().item()
    assert 0.25 < share < 0.75


def test_reference_is_of_distinct_rows(cached: Latents) -> None:
    """As many as asked, all when more are, another choice by number."""
    source = cached.open()
    x, c = source.reference(9, seed=0)
    assert len(x) == len(c) == len(x.flatten(1).unique(dim=0)) == 9
    assert len(source.reference(1000, seed=0)[0]) == source.size == COUNT
    assert not torch.equal(x, source.reference(9, seed=0, i=1)[0])


def test_another_cache_than_meant_is_refused_by_its_field(cached: Latents) -> None:
    other = cached.model_copy(update={"images": cached.images.model_copy(update={"crop": "adm", "classes": 17})})
    with pytest.raises(UserError, match=r"data\.root: [\s\S]*crop: none in the cache, adm in the run\n  classes: 3"):
        other.open()


def test_parts_made_apart_are_the_whole(latents: Maker, images: Path, cached: Latents, tmp_path: Path) -> None:
    """Part 1 of 2, then 0 of 2: the same files, to the last bit."""
    data = latents(images, tmp_path / "cache", flip=True)
    assert fill_caches.encode(data, shard_rows=5, dtype="float32", rank=1, world=2).read_index() is None
    made = fill_caches.encode(data, shard_rows=5, dtype="float32", rank=0, world=2)
    assert made.read_index() is not None
    assert made.make_result.made == 2
    files, others = (
        {name: file for name, file in contents(of.folder).items() if name[0] != "."} for of in (data, cached)
    )
    assert files == others


def test_a_folder_of_images_with_options_is_enough(images: Path, tmp_path: Path) -> None:
    """The classes are looked up, and flips are kept; without options it says nothing of a codec."""
    sets = ["data.images.on_bad=skip"]
    data = fill_caches.encoding_work(str(images), sets, out=str(tmp_path / "out"), codec="taef2", side=SIDE).data
    assert (data.classes, data.shape, data.images.flip, data.images.on_bad) == (3, (32, 1, 1), True, "skip")


def test_fields_of_the_images_are_named_where_latents_have_them(images: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        shutil.copytree(images, tmp_path / "d" / split)
    root = str(tmp_path / "d")
    with pytest.raises(UserError, match=r"choose one with data\.images\.split"):
        fill_caches.encoding_work(root, out=str(tmp_path / "out"), codec="taef2", side=SIDE)
    with pytest.raises(UserError, match=r"choose one with data\.images\.split"):
        fill_caches.encoding_work("my-images-256", [f"data.images.root={root}"], out=None, codec=None, side=None)


@pytest.mark.parametrize("buckets", [None, {"step": 8}])
def test_images_of_which_none_can_be_read_are_refused_with_the_reason(
    latents: Maker, buckets: object, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/IMG_1.heic").write_bytes(b"ftypheic")
    data = latents(tmp_path / "photos", tmp_path / "out", on_bad="skip", buckets=buckets, crop="adm")
    with (
        pytest.warns(UserWarning, match="cannot be read"),
        pytest.raises(UserError, match=r"the first: .*1\.heic is not an image .*; convert it to"),
    ):
        fill_caches.encode(data)


def test_a_class_of_which_no_image_could_be_encoded_is_named(
    latents: Maker, images: Path, cached: Latents, tmp_path: Path
) -> None:
    shutil.copytree(images, tmp_path / "photos")
    for file in (tmp_path / "photos/cow").iterdir():
        file.write_bytes(b"no image")
    data = latents(tmp_path / "photos", tmp_path / "cache", on_bad="skip")
    with pytest.warns(UserWarning, match="cannot be read and are left out"):
        fill_caches.encode(data)
    assert "no image can be read of class cow, " in empty_classes_line(data, data.open())
    assert empty_classes_line(cached, cached.open()) == ""


@pytest.mark.parametrize("buckets", [None, {"step": 8}])
def test_an_image_that_is_mended_gets_into_the_cache(latents: Maker, buckets: object, tmp_path: Path) -> None:
    """What is left out as before is not encoded again."""
    as_folder(tmp_path / "photos")
    mended, stays = tmp_path / "photos/ant/02.png", tmp_path / "photos/cow/11.png"
    whole = mended.read_bytes()
    for file in (mended, stays):
        file.write_bytes(b"no image")

    def encoded() -> tuple[int, int]:
        data = latents(tmp_path / "photos", tmp_path / "out", on_bad="skip", buckets=buckets, crop="adm")
        result = fill_caches.encode(data, shard_rows=5, dtype="float32")
        index = result.read_index()
        assert index
        return result.make_result.made, sum(shard.rows for shard in index.shards)

    with pytest.warns(UserWarning, match="cannot be read"):
        assert encoded() == (3, COUNT - 2)
    assert encoded() == (0, COUNT - 2)
    mended.write_bytes(whole)
    assert encoded() == (1, COUNT - 1)
    assert encoded() == (0, COUNT - 1)


def test_a_folder_of_images_is_encoded_by_a_pipelines_codec(images: Path, tmp_path: Path) -> None:
    """Which a setting names."""
    options: dict[str, Any] = {"out": str(tmp_path / "out"), "codec": "pipeline", "side": 64}
    with pytest.raises(UserError, match="pipeline is missing: pipeline="):
        _ = fill_caches.encoding_work(str(images), **options).data.shape
    assert fill_caches.encoding_work(str(images), [f"pipeline={SD3}"], **options).data.shape == (16, 8, 8)


# --- captions: those of the images, kept beside them


def again(data: Latents) -> Latents:
    return Latents.model_validate(data.model_dump(mode="json")).with_facts()


def test_latents_have_the_captions_of_the_images(latents: Maker, tmp_path: Path) -> None:
    """So that the images are no longer needed."""
    as_lines(root := tmp_path / "images", TOLD)
    data = latents(root, tmp_path / "cache", **FILES)
    fill_caches.encode(data, dtype="float32", shard_rows=5)
    for step in range(3):
        (x, c), (y, d) = (of.open().batch(step, COUNT, 4) for of in (data, data.images))
        torch.testing.assert_close(x, data.codec.open().encode(y))
        assert torch.equal(c, d)
    assert not data.originals().reference(99, 0)[1].any()  # to judge by there are no classes
    shutil.rmtree(root)
    assert data.open().fingerprint() == latents(root, tmp_path / "cache", **FILES).open().fingerprint()
    assert again(data).caption_texts() == latents(root, tmp_path / "cache", **FILES).caption_texts() == TEXTS


def test_templates_are_drawn_over_a_cache_of_classes(latents: Maker, tmp_path: Path) -> None:
    """One cache serves those who train by classes and by words."""
    as_folder(root := tmp_path / "images")
    plain, words = latents(root, tmp_path / "cache"), latents(root, tmp_path / "cache", **WORDS)
    fill_caches.encode(plain, dtype="float32")
    fill_caches.encode(words, dtype="float32")  # there is nothing to do
    (x, label), (y, c) = (of.open().batch(1, 64, 0) for of in (plain, words))
    assert torch.equal(x, y)
    assert torch.equal(c // 2, label)
    shutil.rmtree(root)
    assert latents(root, tmp_path / "cache", **WORDS) == again(words) == words
    assert words.caption_texts()[-3:] == ("one ant", "one bee", "one cow")


@pytest.mark.slow
def test_other_captions_are_refused(latents: Maker, tmp_path: Path) -> None:
    as_lines(root := tmp_path / "images", TOLD)
    data = latents(root, tmp_path / "cache", **FILES)
    fill_caches.encode(data)
    as_lines(root, [*TOLD[:-1], ["another"]])
    other = latents(root, tmp_path / "new", **FILES)
    with pytest.raises(UserError, match="differs from the images' current captions"):
        fill_caches.encode(other.model_copy(update={"root": str(tmp_path / "cache")}))
    data.open()  # it knows its own
    file = tmp_path / "cache" / FILE
    lines = file.read_text().splitlines(keepends=True)
    for wrong, told in ((['["x"]\n'], "different captions"), (["{}\n"], "a list of texts"), (["[\n"], "not JSON")):
        file.write_text("".join(lines[:-1] + wrong))
        with pytest.raises(UserError, match=told):
            data.open()
    file.unlink()
    fill_caches.encode(latents(root, tmp_path / "cache", **FILES))
    assert file.is_file()


def test_a_cache_of_classes_is_none_of_captions(latents: Maker, tmp_path: Path) -> None:
    as_lines(root := tmp_path / "images", TOLD)
    fill_caches.encode(latents(root, tmp_path / "classes"))
    fill_caches.encode(latents(root, tmp_path / "captions", **FILES))
    with pytest.raises(UserError, match="captioned: False in the cache, True in the run"):
        latents(root, tmp_path / "classes", **FILES).open()
    with pytest.raises((UserError, ValidationError), match="captioned: True in the cache, False in the run"):
        latents(root, tmp_path / "captions").open()


def test_the_first_images_alone(latents: Maker, images: Path, cached: Latents, tmp_path: Path) -> None:
    """Their latents are those of the whole; each cache is refused where the other is meant."""
    first = latents(images, tmp_path / "first", count=3)
    assert len(first.originals()) == 3
    fill_caches.encode(first, dtype="float32")
    rows = torch.arange(3)
    torch.testing.assert_close(first.cache().take(rows, "x"), cached.cache().take(rows, "x"), rtol=0, atol=1e-2)
    first.compare_images(hash_all=True)
    whole = latents(images, tmp_path / "first")
    with pytest.raises(UserError, match="first_images: 3 in the cache, 0 in the run"):
        whole.cache()
    with pytest.raises(UserError, match="first_images: 3 in the folder, None now"):
        fill_caches.encode(whole)
    with pytest.raises(UserError, match="first_images: 0 in the cache, 3 in the run"):
        latents(images, Path(cached.root), count=3).cache()
    with pytest.raises(UserError, match=rf"has {COUNT} images, but count is {COUNT + 1}"):
        latents(images, tmp_path / "more", count=COUNT + 1).rows()


@pytest.mark.parametrize("fields", [{}, {"crop": "adm", "buckets": {"step": 8}}])
def test_images_that_cannot_be_read_may_fill_a_shard(
    fields: dict[str, object], latents: Maker, images: Path, tmp_path: Path
) -> None:
    shutil.copytree(images, tmp_path / "images")
    for i in range(8, COUNT):
        (tmp_path / "images" / "cow" / f"{i:02}.png").write_bytes(b"no image")
    data = latents(tmp_path / "images", tmp_path / "cache", on_bad="skip", **fields)
    with pytest.warns(UserWarning, match="images cannot be read"):
        fill_caches.encode(data, shard_rows=4, dtype="float32")
    assert [shard.rows for shard in data.cache().index.shards] == [4, 4, 0]
    x, c = data.open().batch(0, 8, 0)
    assert (len(x), sorted(c.tolist())) == (8, [0] * 4 + [1] * 4)
    data.compare_images(hash_all=True)


def test_a_cache_is_repaired_from_where_the_images_are_now_as_it_was_made(
    latents: Maker, images: Path, tmp_path: Path
) -> None:
    """The words that were typed for their place do not bind it, nor need its store and dtype be typed again."""
    shutil.copytree(images, tmp_path / "photos")
    data = latents(tmp_path / "photos", tmp_path / "cache")
    fill_caches.encode(data, shard_rows=5, store="samples", dtype="float32")
    files = contents(data.folder)
    (tmp_path / "photos").rename(tmp_path / "moved")
    (data.folder / "shard-00001.safetensors").write_bytes(b"")
    moved = latents(tmp_path / "moved", tmp_path / "cache")
    assert fill_caches.encode(moved).make_result.made == 1
    assert contents(data.folder) == files
    with pytest.raises(UserError, match="dtype: float32 in the folder, float16 now"):
        fill_caches.encode(moved, dtype="float16")


def test_images_that_cannot_be_opened_any_more_are_refused(images: Path, cached: Latents, tmp_path: Path) -> None:
    """As with one that is in no class; a folder without images is where a disk is not mounted."""
    shutil.copytree(images, tmp_path / "images")
    copied = cached.images.model_copy(update={"root": str(tmp_path / "images")})
    cached.model_copy(update={"images": copied}).compare_images(hash_all=True)
    shutil.copy(tmp_path / "images/ant/00.png", tmp_path / "images/new.png")
    with pytest.raises(UserError, match=r"outside of them, .*: set data\.images\.labelled=false, or move them"):
        cached.model_copy(update={"images": copied}).compare_images()
    (tmp_path / "empty").mkdir()
    elsewhere = copied.model_copy(update={"root": str(tmp_path / "empty")})
    cached.model_copy(update={"images": elsewhere}).compare_images()


def test_a_missing_cache_names_the_command(latents: Maker, images: Path, tmp_path: Path) -> None:
    missing = latents(images, tmp_path / "none")
    with pytest.raises(UserError, match="dumo encode"):
        missing.cache()
