"""Latents with captions: those of the images, kept beside them, so that the images are no longer needed."""

import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from autoencoder import taef2
from dumo.data import Latents
from dumo.data.written import LINES as FILE
from dumo.run import encode
from dumo.types import UserError
from unit.data.animals import COUNT, SIDE, as_folder
from unit.data.test_written import FILES, TEXTS, TOLD, as_lines

WORDS = {"captions": {"kind": "templates", "templates": ["a {}", "{n}"], "held": ["one {}"]}}


def latents(root: Path, cache: Path, **fields: object) -> Latents:
    images = {"root": str(root), "side": SIDE, "crop": "none", **fields}
    weights = cache.parent / "taef2.safetensors"
    codec = {"kind": "taef2", "weights": str(weights if weights.exists() else taef2(weights))}
    return Latents.model_validate({"root": str(cache), "images": images, "codec": codec}).found()


def again(data: Latents) -> Latents:
    return Latents.model_validate(data.model_dump(mode="json")).found()


def test_latents_have_the_captions_of_the_images(tmp_path: Path) -> None:
    as_lines(root := tmp_path / "images", TOLD)
    data = latents(root, tmp_path / "cache", **FILES)
    encode.encode(data, dtype="float32", shard_rows=5)
    for step in range(3):
        (x, c), (y, d) = (of.open().batch(step, COUNT, 4) for of in (data, data.images))
        torch.testing.assert_close(x, data.codec.open().encode(y))
        assert torch.equal(c, d)
    assert not data.originals().reference(99, 0)[1].any()  # to judge by there are no classes
    shutil.rmtree(root)
    assert data.open().fingerprint() == latents(root, tmp_path / "cache", **FILES).open().fingerprint()
    assert again(data).caption_texts() == latents(root, tmp_path / "cache", **FILES).caption_texts() == TEXTS


def test_templates_are_drawn_over_a_cache_of_classes(tmp_path: Path) -> None:
    """One cache serves those who train by classes and by words."""
    as_folder(root := tmp_path / "images")
    plain, words = latents(root, tmp_path / "cache"), latents(root, tmp_path / "cache", **WORDS)
    encode.encode(plain, dtype="float32")
    encode.encode(words, dtype="float32")  # there is nothing to do
    (x, label), (y, c) = (of.open().batch(1, 64, 0) for of in (plain, words))
    assert torch.equal(x, y)
    assert torch.equal(c // 2, label)
    shutil.rmtree(root)
    assert latents(root, tmp_path / "cache", **WORDS) == again(words) == words
    assert words.caption_texts()[-3:] == ("one ant", "one bee", "one cow")


def test_other_captions_are_refused(tmp_path: Path) -> None:
    as_lines(root := tmp_path / "images", TOLD)
    data = latents(root, tmp_path / "cache", **FILES)
    encode.encode(data)
    as_lines(root, [*TOLD[:-1], ["another"]])
    other = latents(root, tmp_path / "new", **FILES)
    with pytest.raises(UserError, match="holds other captions than the images have now"):
        encode.encode(other.model_copy(update={"root": str(tmp_path / "cache")}))
    data.open()  # it knows its own
    file = tmp_path / "cache" / FILE
    lines = file.read_text().splitlines(keepends=True)
    for wrong, told in ((['["x"]\n'], "other captions"), (["{}\n"], "no list of texts"), (["[\n"], "not JSON")):
        file.write_text("".join(lines[:-1] + wrong))
        with pytest.raises(UserError, match=told):
            data.open()
    file.unlink()
    encode.encode(latents(root, tmp_path / "cache", **FILES))
    assert file.is_file()


def test_a_cache_of_classes_is_none_of_captions(tmp_path: Path) -> None:
    as_lines(root := tmp_path / "images", TOLD)
    encode.encode(latents(root, tmp_path / "classes"))
    encode.encode(latents(root, tmp_path / "captions", **FILES))
    with pytest.raises(UserError, match="captioned: False in the cache, True asked"):
        latents(root, tmp_path / "classes", **FILES).open()
    with pytest.raises((UserError, ValidationError), match="captioned: True in the cache, False asked"):
        latents(root, tmp_path / "captions").open()
