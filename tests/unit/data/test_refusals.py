"""What data refuse: one case per row, with the name that the message must contain."""

import io
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dumo.data import Digits, Latents, Memory
from dumo.data.augment import Edm
from dumo.data.bucket import Buckets
from dumo.data.cache import open_cache
from dumo.data.caption import CaptionFiles, Templates
from dumo.data.encoding import encode
from dumo.encoders import Codec, SdVae, Taef2
from dumo.encoders.caption_ids import Captions
from dumo.encoders.codec import Images, Moments
from dumo.types import UserError
from unit.data.animals import CLASSES, archive, as_folder, as_parquet, as_tar, label, picture, refused, spec
from unit.data.animals import COUNT as ALL
from unit.data.test_encode import Broken
from unit.encoders.toy import GAUSSIAN, PLAN, POINT, Pictures, Sampled

COUNT = 40

# What is asked of a cache of seven classes at 8 pixels, which GAUSSIAN has made.
CACHES: list[tuple[Codec, dict[str, Any], str]] = [
    (GAUSSIAN.codec, {"classes": 10}, "classes"),
    (GAUSSIAN.codec, {"resolution": 256}, "resolution"),
    (Taef2(), {}, "codec.kind"),
    (SdVae(weights="there"), {}, "codec.weights"),
]

# What is encoded into a folder that holds another cache.
PLANS: list[tuple[dict[str, Any], str]] = [
    ({"resolution": 16}, "resolution"),
    ({"classes": 10}, "classes"),
    ({"dtype": "float16"}, "dtype"),
    ({"shard_rows": 8}, "shard_rows"),
]

# Images and labels that are not as planned.
ZEROS = torch.zeros(2, 3, 8, 8)
LABELS = torch.tensor([6, 0])
IMAGES: list[tuple[Tensor, Tensor, str]] = [
    (ZEROS[:, :, :4], LABELS, "(3, 4, 8)"),
    (ZEROS, LABELS + 1, "label 7"),
    (ZEROS, LABELS - 1, "label -1"),
    (ZEROS + 255, LABELS, "255"),
    (ZEROS[:0], LABELS[:0], "no images"),
    (ZEROS * torch.nan, LABELS, "finite"),
]


@dataclass(frozen=True)
class Given:
    """The same batch, whatever rows are asked for."""

    x: Tensor
    c: Tensor

    def __len__(self) -> int:
        return len(self.c)

    def rows(self, i: slice, /) -> tuple[Tensor, Tensor]:
        """All."""
        return self.x, self.c


class Loud(Sampled):
    """Numbers that half precision does not hold."""

    def encode(self, images: Images) -> Moments:
        """A million times as large."""
        return super().encode(images) * 1e6


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("caches") / "gaussian"
    encode(Pictures(COUNT), GAUSSIAN, PLAN, folder)
    return folder


@pytest.mark.parametrize(("codec", "asked", "name"), CACHES)
def test_caches(cache: Path, codec: Codec, asked: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError) as caught:
        open_cache(cache, codec, asked)
    assert name in str(caught.value)


@pytest.mark.parametrize(("change", "name"), PLANS)
def test_plans(cache: Path, change: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError) as caught:
        encode(Pictures(COUNT), GAUSSIAN, PLAN.model_copy(update=change), cache)
    assert name in str(caught.value)


@pytest.mark.parametrize(("x", "c", "name"), IMAGES)
def test_images(tmp_path: Path, x: Tensor, c: Tensor, name: str) -> None:
    with pytest.raises(UserError) as caught:
        encode(Given(x, c), POINT, PLAN, tmp_path)
    assert name in str(caught.value)


def captioned_digits(**fields: object) -> object:
    return Digits.model_validate({"captions": {"kind": "templates", **fields}}).open()


def other_captions(_: Path) -> object:
    return CaptionFiles(digest="0" * 16).require(Captions.from_images([["a"], ["b"]]), "photos")


def latents(images: dict[str, Any], **fields: Any) -> Latents:  # noqa: ANN401, fields of latents
    images = {"kind": "images", "root": "b", "side": 64, **images}
    return Latents.model_validate({"root": "a", "images": images, "codec": {"kind": "taef2"}, **fields})


def augmented_latents(_: Path) -> object:
    return latents({"augment": {}})


def a_prior_of_buckets(_: Path) -> object:
    return latents({"buckets": {}}, prior=0.5)


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "another codec's weights": (
        lambda cache: encode(Pictures(COUNT), replace(GAUSSIAN, sha256="2" * 64), PLAN, cache),
        "weights",
    ),
    "another number of images": (lambda cache: encode(Pictures(17), GAUSSIAN, PLAN, cache), "17"),
    "latents too large for float16": (
        lambda _: encode(
            Pictures(3), replace(POINT, net=Loud()), PLAN.model_copy(update={"dtype": "float16"}), _ / "new"
        ),
        "float16",
    ),
    "images of which none can be read": (lambda cache: encode(Broken(40), POINT, PLAN, cache / "new"), "40"),
    "a template without a name": (lambda _: captioned_digits(templates=("a digit",)), "a digit"),
    "a template with other braces": (lambda _: captioned_digits(templates=("{x}",)), "{x}"),
    "names for fewer classes": (lambda _: captioned_digits(templates=("{}",), names=("a", "b")), "captions.names"),
    "one caption of two classes": (lambda _: captioned_digits(templates=("{}",), names=("a",) * 10), "'a'"),
    "held-out captions of which there are none": (
        lambda _: Templates(templates=("{}",)).captions_in_turn(torch.arange(3), 10, held_out=True),
        "captions.held",
    ),
    "captions that changed": (other_captions, "captions.digest"),
    "few held-out digits": (lambda _: Digits(held=64), "held"),
    "an area that is no multiple of the step": (lambda _: Buckets(step=8, smaller=(12,)).groups(32), "buckets.step"),
    "an area larger than the side": (lambda _: Buckets(step=8, smaller=(48,)).groups(32), "side"),
    "augmented images as latents": (augmented_latents, "data.images.augment"),
    "a prior of images in buckets": (a_prior_of_buckets, "data.prior"),
}


@pytest.mark.parametrize("case", CASES)
def test_others(case: str, cache: Path) -> None:
    act, name = CASES[case]
    with pytest.raises((UserError, ValidationError)) as caught:
        act(cache)
    assert name in str(caught.value)


# Folders, tables and archives of images, their classes and captions.

FILES = {"captions": {"kind": "files"}}
TEN = {"classes": 10}
TWO = [picture(0)] * 2
BLOCK = tarfile.BLOCKSIZE


def one_table(root: Path, **columns: object) -> None:
    """A table of these columns alone."""
    pq.write_table(pa.table(columns), root / "a.parquet")


def side_by_side(root: Path) -> None:
    as_folder(root)
    as_tar(root)


def outside(root: Path) -> None:
    as_folder(root)
    (root / "z.png").write_bytes(picture(0))


def linked(root: Path, to: str) -> None:
    """A link among the images."""
    as_folder(root)
    (root / "ant" / "link.png").symlink_to(root if to == "loop" else root / "ant" / to)


def overwritten(file: Path, first: int, data: bytes) -> None:
    """Other bytes in the middle of a file."""
    with file.open("r+b") as opened:
        opened.seek(first)
        opened.write(data)


def short_table(root: Path, keep: float) -> None:
    as_parquet(root)
    file = root / "train-00001-of-00002.parquet"
    os.truncate(file, int(keep * file.stat().st_size))


def holed_table(root: Path) -> None:
    as_parquet(root)
    overwritten(root / "train-00000-of-00002.parquet", 4, bytes(396))


def holed_tar(root: Path, first: int, last: int) -> None:
    as_tar(root)
    overwritten(root / "animals-train-000000.tar", first, bytes(last - first))


def cut_tar(root: Path) -> None:
    """Cut between two members, where a reader stops without a word."""
    as_tar(root)
    os.truncate(root / "animals-train-000001.tar", 3 * 6 * BLOCK)


def two_tars_in_one(root: Path) -> None:
    as_tar(root)
    first, second = sorted(root.glob("*.tar"))
    first.write_bytes(first.read_bytes() + second.read_bytes())


def special_file(root: Path, ending: str) -> None:
    as_folder(root)
    os.mkfifo(root / "bee" / f"odd.{ending}")


def file_of(i: int) -> str:
    return f"{CLASSES[label(i)]}/{i:02}.png"


def rows_of_metadata(root: Path, lines: list[dict[str, object]]) -> None:
    as_folder(root)
    (root / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def metadata(root: Path, name: str, text: str | bytes) -> None:
    as_folder(root)
    (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def texts(root: Path, count: int, content: bytes = b"a text") -> None:
    as_folder(root)
    for i in range(count):
        (root / file_of(i)).with_suffix(".txt").write_bytes(content)


def captioned(count: int) -> list[dict[str, object]]:
    return [{"file_name": file_of(i), "text": f"a {i}"} for i in range(count)]


def members_with(**members: bytes) -> Callable[[Path], None]:
    """An archive of an image, and of further members of the same sample."""
    return lambda root: archive(root / "a.tar", {"0.png": picture(0), **{f"0.{k}": v for k, v in members.items()}})


def twice(root: Path) -> None:
    """An archive to which a second image of the same name was appended."""
    archive(root / "a.tar", {"0.png": picture(0), "0.cls": b"0"})
    archive(root / "b.tar", {"0.png": picture(1), "0.cls": b"1"})
    end = 2 * 2 * BLOCK
    second = (root / "b.tar").read_bytes()
    (root / "a.tar").write_bytes((root / "a.tar").read_bytes()[:end] + second)
    (root / "b.tar").unlink()


def not_utf8(root: Path) -> None:
    as_folder(root)
    os.rename(os.fsencode(root) + b"/bee", os.fsencode(root) + b"/caf\xe9")


def odd_member(root: Path, **facts: object) -> None:
    """An image in an archive, and a second one with a header of its own."""
    with tarfile.open(root / "a.tar", "w") as out:
        for name, special in (("0.png", {}), ("9.png", facts)):
            info = tarfile.TarInfo(name)
            info.size = len(picture(0))
            for fact, value in special.items():
                setattr(info, fact, value)
            out.addfile(info, io.BytesIO(picture(0)))


Folder = tuple[Callable[[Path], object], dict[str, object], str]
NAMED_WORDS = {"captions": {"kind": "files", "name": "words"}}
FOLDERS: dict[str, Folder] = {
    "no folder": (Path.rmdir, {}, "data.root"),
    "no images": (lambda r: (r / "a.txt").touch(), {}, "*.parquet"),
    "two kinds of files": (side_by_side, {}, "folder and tar"),
    "a table of images beside images": (lambda r: (as_folder(r), one_table(r, image=TWO)), {}, "folder and parquet"),
    "an archive without images": (lambda r: archive(r / "a.tar", {"a.txt": b""}), {}, "tar"),
    "a name that is not UTF-8": (not_utf8, {}, "caf\\xe9"),
    "a link to a folder above": (partial(linked, to="loop"), {}, "ant/link.png"),
    "a link to itself": (partial(linked, to="link.png"), {}, "ant/link.png"),
    "a link to nowhere": (partial(linked, to="none.png"), {}, "ant/link.png"),
    "a pipe in place of an image": (partial(special_file, ending="png"), {}, "bee/odd.png"),
    "a pipe in place of an archive": (lambda r: (as_tar(r), os.mkfifo(r / "z-train.tar")), {}, "z-train.tar"),
    "another size": (as_folder, {"side": 16, "crop": "none"}, "ant/00.png"),
    "augmentation with classes": (as_folder, {"augment": Edm()}, "augment"),
    "fewer images than count": (as_folder, {"count": 99}, "count"),
    # classes
    "no labels": (lambda r: one_table(r, image=TWO), TEN, "label"),
    "no such column": (lambda r: one_table(r, image=TWO, fine=[0, 1]), {"label": "fime"}, "fime"),
    "labels unread": (lambda r: one_table(r, image=TWO), TEN | {"labelled": False}, "labelled"),
    "images outside of classes": (outside, {}, "outside"),
    "one name in two Unicode forms": (
        lambda r: (as_folder(r), (r / "bee").rename(r / "caf\u00e9"), (r / "cow").rename(r / "cafe\u0301")),
        {},
        "two Unicode forms",
    ),
    "another number of classes": (as_folder, {"classes": 2}, "data.classes=3"),
    "a negative label": (lambda r: one_table(r, image=TWO, label=[0, -1]), {}, "-1"),
    "a row without a label": (lambda r: one_table(r, image=TWO, label=[0, None]), {}, "row 1"),
    "a number with a fraction": (lambda r: one_table(r, image=TWO, label=[0.0, 0.5]), {}, "0.0"),
    "a label in one file alone": (
        lambda r: (one_table(r, image=TWO, label=[0, 1]), pq.write_table(pa.table({"image": TWO}), r / "b.parquet")),
        {},
        "b.parquet",
    ),
    "an image of an archive without a label": (
        lambda r: archive(r / "a.tar", {"0.png": b"", "1.png": b"", "0.cls": b"1"}), {}, "1.png"
    ),
    "a text as a label": (members_with(cls=b"x"), {}, "'x'"),
    "a long label": (members_with(cls=b"9" * 30), {}, "999"),
    "a million classes": (lambda r: one_table(r, image=TWO, label=[0, 2**62]), {}, str(2**62)),
    # damaged tables and archives
    **{
        f"{keep} of a table": (partial(short_table, keep=keep), {"on_bad": "skip"}, "00001-of-00002.parquet")
        for keep in (0.99, 0.5, 0.01)
    },
    "a hole in a table": (holed_table, {"classes": 3}, "train-00000-of-00002.parquet row 0"),
    "no column of images": (lambda r: one_table(r, pixels=[1], label=[0]), {}, "pixels: int64"),
    "several columns of bytes": (lambda r: one_table(r, a=[b""], b=[b""]), {}, "a, b"),
    "zeros in place of a header": (partial(holed_tar, first=2 * BLOCK, last=3 * BLOCK), {}, "byte 1024"),
    "zeros in place of half an archive": (partial(holed_tar, first=15 * BLOCK, last=30 * BLOCK), {}, "000000.tar"),
    "an archive that was cut": (cut_tar, {}, "animals-train-000001.tar"),
    "two archives in one": (two_tars_in_one, {}, "animals-train-000000.tar"),
    "a member twice": (twice, {}, "0.png"),
    "a member twice, by two paths": (lambda r: archive(r / "a.tar", {"0.png": b"", "./0.png": b""}), {}, "./0.png"),
    "a member twice, in two forms of Unicode": (
        lambda r: archive(r / "a.tar", {"\u00e9.png": b"", "e\u0301.png": b""}), {}, "e\u0301.png"
    ),
    "a hard link": (partial(odd_member, type=tarfile.LNKTYPE, linkname="0.png"), {}, "9.png"),
    "a link of an archive": (partial(odd_member, type=tarfile.SYMTYPE, linkname="0.png"), {}, "9.png"),
    **{
        f"a member of pax headers {headers}": (partial(odd_member, pax_headers=headers), {}, "a.tar")
        for headers in (
            {"size": "-1024"},
            {"size": str(2**70)},
            {"GNU.sparse.map": "0,10,20,5", "GNU.sparse.size": "4096"},
            {"GNU.sparse.map": "a,b", "GNU.sparse.size": "x"},
            {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9", "GNU.sparse.name": "a"},
        )
    },
    # captions
    "no captions": (as_folder, FILES, "captions.name"),
    "no captions in a table": (as_parquet, FILES, "label"),
    "no such column of captions": (as_parquet, NAMED_WORDS, "words"),
    "no table for a column": (as_folder, NAMED_WORDS, "words"),
    "rows without file_name": (lambda r: rows_of_metadata(r, [{"text": "a"}]), FILES, "metadata.jsonl line 1"),
    "a number as file_name": (lambda r: rows_of_metadata(r, [{"file_name": 7, "text": "a"}]), FILES, "line 1"),
    "no JSON object": (partial(metadata, name="metadata.jsonl", text="[1]\n"), FILES, "metadata.jsonl line 1"),
    "no JSON": (partial(metadata, name="metadata.jsonl", text="{\n"), FILES, "metadata.jsonl line 1"),
    "a number as a caption": (
        lambda r: rows_of_metadata(r, [{**line, "text": 7} for line in captioned(ALL)]), FILES, "ant/00.png"
    ),
    "half a character": (
        lambda r: rows_of_metadata(r, [{**line, "text": "\ud800"} for line in captioned(ALL)]), FILES, "ud800"
    ),
    "a comma in a caption": (
        partial(metadata, name="metadata.csv", text=f"file_name,text\n{file_of(0)},a, b\n"), FILES, "line 2"
    ),
    "a quote that stays open": (
        partial(metadata, name="metadata.csv", text=f'file_name,text\n{file_of(0)},"a\nb,b\n'), FILES, "quote"
    ),
    "a column twice": (partial(metadata, name="metadata.csv", text="file_name,text,text\na,b,c\n"), FILES, "twice"),
    "another encoding of a table": (
        partial(metadata, name="metadata.csv", text="file_name,text\na,é\n".encode("latin1")), FILES, "metadata.csv"
    ),
    "another encoding of a text": (partial(texts, count=ALL, content="é".encode("latin1")), FILES, "00.txt"),
    "a caption of a MB": (members_with(txt=b"a" * (2**20 + 1)), FILES, "0.txt"),
    "rows of images that are gone": (
        lambda r: rows_of_metadata(r, [*captioned(ALL), *({"file_name": f"x{i}", "text": "a"} for i in (1, 2))]),
        FILES,
        "x1",
    ),
    "a few captions alone": (partial(texts, count=ALL - 2), FILES, "cow/10.png"),
    "templates of images without classes": (
        lambda r: (r / "1.png").write_bytes(picture(1)), {"captions": {"kind": "templates", "templates": ["a {}"]}},
        "captions.kind",
    ),
    "captions of the first images": (partial(texts, count=ALL), FILES | {"count": 3}, "count"),
    "an edit of no image": (
        lambda r: rows_of_metadata(r, captioned(ALL)), {"captions": {"kind": "files", "source": "before"}}, "before"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_images_are_refused_with_a_name(name: str, tmp_path: Path) -> None:
    make, fields, named = FOLDERS[name]
    make(tmp_path)
    assert named in refused(tmp_path, **fields)


FLOATS = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
OF_PYTHON: dict[str, tuple[object, str]] = {
    "a number": (3, "int"),
    "nothing": ([], "list"),
    "a stream": (iter(FLOATS), "tuple_iterator"),
    "a loader": (torch.utils.data.DataLoader(torch.utils.data.TensorDataset(FLOATS)), "DataLoader"),
    "floats from 0 to 1": (torch.rand(4, 3, 8, 8), "2 * x - 1"),
    "floats beyond 1": (3 * FLOATS, "[-1, 1]"),
    "no numbers": (FLOATS * float("nan"), "finite"),
    "whole numbers": (torch.zeros(4, 3, 8, 8, dtype=torch.long), "uint8"),
    "five channels": (torch.randn(4, 5, 8, 8), "(4, 5, 8, 8)"),
    "no samples": (torch.randn(0, 2), "(0, 2)"),
    "too few labels": ((FLOATS, [0]), "labels"),
    "a negative label": ((FLOATS, [0, -1]), "labels"),
    "labels with fractions": ((FLOATS, [0.0, 1.0]), "labels"),
    "texts as labels": ((FLOATS, ["a", "b"]), "<U1"),
    "labels of several lengths": ((FLOATS, [[0], [1, 2]]), "labels"),
    "objects": (np.array([[1.0, "a"]], dtype=object), "object"),
    "rows of several lengths": ([[[1.0, 2.0], [3.0], [4.0]]], "row 0"),
    "images of several sizes": ([FLOATS[0], FLOATS[0, :, :4]], "row 1"),
    "a label in some rows": ([(FLOATS[0], 1), FLOATS[0]], "label"),
    "no image in a row": ([{"text": "a"}], "text"),
}


@pytest.mark.parametrize("name", OF_PYTHON)
def test_data_of_python_are_refused_with_a_name(name: str) -> None:
    data, named = OF_PYTHON[name]
    with pytest.raises(UserError) as caught:
        Memory.of(data)
    assert named in str(caught.value)


def test_a_run_is_refused_with_other_classes_or_captions(tmp_path: Path) -> None:
    texts(tmp_path, ALL)
    images = spec(tmp_path)
    with_captions = spec(tmp_path, **FILES)
    (tmp_path / "ant" / "00.txt").write_text("another text")
    with pytest.raises(UserError, match="digest"):
        with_captions.open()
    (tmp_path / "bee").rename(tmp_path / "wasp")
    with pytest.raises(UserError, match="without bee; with wasp"):
        images.open()
