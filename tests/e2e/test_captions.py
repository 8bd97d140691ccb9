"""Captions that are lost end a command before it writes anything, and a few that are lost are named."""

from pathlib import Path

import pytest
from PIL import Image

from dumo.data.rows import warn_once
from e2e.shell import call, refused

RECIPE = ["data.images.root=photos", "data.images.flip=false"]


@pytest.fixture
def photos(here: Path) -> Path:
    """Twelve, without captions."""
    folder = here / "photos"
    folder.mkdir()
    for i in range(12):
        Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(folder / f"img_{i:02}.png")
    return folder


def captioned(photos: Path, change: str, encoding: str = "utf-8") -> None:
    rows = [f"img_{i:02}.png,café {i}" for i in range(12)]
    rows[0] = change
    (photos / "metadata.csv").write_text("\n".join(["file_name,text", *rows]), encoding=encoding)


COMMANDS = [
    ("train", "photos", "--yes"),
    *((verb, "text-256", *RECIPE) for verb in ("show", "encode", "train")),
]


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS, ids=[" ".join(words[:2]) for words in COMMANDS])
def test_a_table_that_is_not_of_these_images_ends_a_command(photos: Path, words: tuple[str, ...]) -> None:
    captioned(photos, 'img_00.png,"a cat')
    refused(*words, named=("metadata.csv line 2 is not valid CSV", "close all quotes"))
    captioned(photos, "img_00.png,a cat", "latin1")
    refused(*words, named=("metadata.csv is not UTF-8", "iconv"))
    captioned(photos, "img_00.png,a cat")
    for file in photos.glob("*.png"):
        file.rename(file.with_name(file.name.upper()))
    refused(*words, named=("12 of 12 rows have no image", "'img_00.png' in"))


@pytest.mark.slow
@pytest.mark.filterwarnings("default:.* of 12 :UserWarning")
def test_a_caption_without_an_image_is_named(photos: Path) -> None:
    captioned(photos, "img_99.png,a cat")
    warn_once.cache_clear()
    done = call("show", "text-256", *RECIPE)
    assert done.code == 0
    assert "11 different captions for 12 images, one each; 1 image has none" in done.out
    assert done.err.count("'img_99.png' in photos/metadata.csv line 2") == 1
    assert done.err.count("1 of 12 images have no caption, nor a blank one: img_00.png") == 1
