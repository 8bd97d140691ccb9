"""What a proposal says of texts next to images that are not read as captions, and of the time that images take."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from dumo.config.change import override
from dumo.data.annotation import NoCaptionsError
from dumo.data.image import Images
from dumo.data.pixel import ToSquare
from dumo.data.store import Folder, walk_files
from dumo.plan import photocaptions, photodraft
from dumo.plan.photolook import ImagesFound, look_at
from dumo.runtime import door
from dumo.runtime.progress import no_bar
from dumo.types import UserError


def test_a_table_of_another_name_keeps_its_kind() -> None:
    for table, name in {"labels.parquet": "metadata.parquet", "a/x.TSV": "metadata.csv"}.items():
        line = photocaptions.caption_hint(NoCaptionsError("", tables=[table]))
        assert line == f"none read; a table of captions is called {name}, and there is {table}"


def test_a_column_of_any_name_may_be_typed() -> None:
    for column in ("words", "no", "what it shows: text", "it's #1"):
        with door.command_line():
            line = photocaptions.caption_hint(NoCaptionsError("", columns=[column]))
        option, setting = shlex.split(line.partition("as by ")[2])
        tree: dict[str, Any] = {}
        override(tree, [setting])
        assert (option, tree) == ("--set", {"data": {"captions": {"kind": "files", "name": column}}})


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_images_that_do_not_fit_in_memory_are_decoded_at_each_visit(device: str) -> None:
    """So they take no time before the first step, and a step takes the time of its images."""

    def draft(count: int, *sets: str, memory: float = 2.0) -> photodraft.Draft:
        found = ImagesFound(count, headers=256, bad=0, side=300, image_seconds=0.004)
        images = Images(root="photos", side=300, memory=memory)
        return photodraft._pixels_draft(found, images, "photos", torch.device(device), sets)

    many = draft(2_000_000)
    assert many.prepare_seconds == 0
    assert many.load_seconds > 0
    few = draft(1000)
    assert few.prepare_seconds == pytest.approx(1000 * many.load_seconds)
    assert few.load_seconds == 0
    assert draft(2_000_000, memory=30.0).load_seconds == 0
    assert draft(10_000, "data.side=300").load_seconds > 0


def test_images_that_cannot_be_read_are_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "IMG_1.HEIC").write_bytes(b"ftypheic")
    store = Folder(tmp_path, walk_files(tmp_path), split=None, labelled=False)
    with pytest.raises(UserError, match=r"the first: .*IMG_1\.HEIC is no image of .*; convert it to JPEG or PNG"):
        look_at(store, ToSquare(32, "adm"), no_bar)


def test_images_that_cannot_be_read_are_not_counted_on() -> None:
    """They take no time, and no image is visited in their place."""
    all_looked_at = ImagesFound(count=240, headers=240, bad=200, side=64, image_seconds=0.1)
    assert all_looked_at.readable == 40
    assert all_looked_at.decode_seconds == pytest.approx(40 * all_looked_at.load_seconds)
    assert ImagesFound(count=1024, headers=256, bad=64, side=64).readable == 768
    assert ImagesFound(count=10, headers=0, bad=0, side=64).readable == 10


def test_attention_is_where_the_side_that_is_trained_on_has_it() -> None:
    found = ImagesFound(100, headers=100, bad=0, side=300)
    images = Images(root="photos", side=56)
    draft = photodraft._pixels_draft(found, images, "photos", torch.device("cpu"), ["data.side=56"])
    assert draft.fields["net"]["attend"] == [14]
