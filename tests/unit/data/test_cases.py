"""Inputs that people have: each is read as one looks at it, or refused by name."""

import base64
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, PngImagePlugin

from dumo.config.load import dump, load
from dumo.config.source import parse_text
from dumo.data import Memory, rows
from dumo.data.images import Source
from dumo.data.pixel import ToSquare, upright_size
from dumo.run.resolve import resolve
from dumo.runtime.progress import bar
from dumo.types import UserError
from unit.data.animals import COUNT, SIDE, archive, as_folder, bytes_of, picture, refused, spec

FILES = {"captions": {"kind": "files"}}


@pytest.fixture(autouse=True)
def warned_anew() -> None:
    rows.warn_once.cache_clear()


@pytest.mark.parametrize("name", ["wait\x85", "ça va", "a\nb", "yes", "1e3"])
def test_class_names_come_back_from_run_yaml(name: str, tmp_path: Path) -> None:
    as_folder(tmp_path)
    (tmp_path / "bee").rename(tmp_path / name)
    run = resolve(load("my-images", [f"data.root={tmp_path}", f"data.side={SIDE}", "evaluate.protocol={kind: photos}"]))
    again = load(parse_text(dump(run), Path("run.yaml")))
    assert name in again.data.names
    assert again.data == run.data


@pytest.mark.slow
def test_names_that_a_locale_cannot_read_are_refused(tmp_path: Path) -> None:
    as_folder(tmp_path)
    (tmp_path / "bee").rename(tmp_path / "é")
    code = f"from dumo.data.rows import open_rows; open_rows({str(tmp_path)!r})"
    environment = os.environ | {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "PYTHONUTF8=1" in done.stderr


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP"])
def test_pngs_with_large_texts_are_read(kind: str) -> None:
    image = Image.open(io.BytesIO(picture(3)))
    info = PngImagePlugin.PngInfo()
    text = "n" * 3_000_000
    if kind == "zTXt":
        info.add_text("workflow", text, zip=True)
    elif kind == "iTXt":
        info.add_itxt("workflow", text, zip=True)
    else:
        info.add(b"iCCP", b"profile\0\0" + zlib.compress(text.encode()))
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=info)
    to_pixels = ToSquare(SIDE, "none")
    assert torch.equal(to_pixels(file.getvalue()), to_pixels(picture(3)))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_images_with_broken_exif_are_read_as_they_are_stored(kind: str) -> None:
    image = Image.open(io.BytesIO(picture(3)))
    plain, broken = io.BytesIO(), io.BytesIO()
    image.save(plain, kind)
    image.save(broken, kind, exif=b"Exif\0\0no tags")
    to_pixels = ToSquare(SIDE, "adm")
    assert torch.equal(to_pixels(broken.getvalue()), to_pixels(plain.getvalue()))
    assert upright_size(broken.getvalue()) == upright_size(plain.getvalue())


def test_the_clear_level_of_grey_of_16_bits_is_white() -> None:
    grey = np.full((16, 16), 20000, ">u2")
    grey[:8] = 0
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in grey)))
    png = b"\x89PNG\r\n\x1a\n" + header + chunk(b"tRNS", b"\0\0") + pixels + chunk(b"IEND", b"")
    x = ToSquare(16, "none")(png)
    assert x[:, :8].unique().tolist() == [255]
    assert x[:, 8:].unique().tolist() == [78]


SYSTEM_FOLDERS = [
    *("@eaDir", "#recycle", "#snapshot", "@Recycle", "@Recently-Snapshot", ".@__thumb", "@__thumb", "_gsdata_"),
    *(
        "$RECYCLE.BIN",
        "RECYCLER",
        "$Extend",
        "$Recycle.Bin",
        "System Volume Information",
        "lost+found",
        ".Trash-1000",
        "~snapshot",
    ),
    *("__MACOSX", "Network Trash Folder", "Temporary Items", ".AppleDouble"),
]


def test_folders_of_the_system_are_left_out(tmp_path: Path) -> None:
    as_folder(tmp_path)
    for folder in (*SYSTEM_FOLDERS, "ant/@eaDir"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "thumbnail.png").write_bytes(picture(0))
    with pytest.warns(UserWarning, match="system folders are skipped") as caught:
        images = spec(tmp_path)
    assert (images.classes, images.open().size) == (3, COUNT)
    assert len(caught) == 1


def test_members_of_the_system_are_left_out(tmp_path: Path) -> None:
    members = {f"{folder}/{i}.png": picture(0) for i, folder in enumerate(SYSTEM_FOLDERS)}
    archive(tmp_path / "a.tar", {"a/0.png": picture(0), **members, "a/.0.png": picture(0), "../1.png": picture(1)})
    assert rows.open_rows(tmp_path).names == ["a.tar member a/0.png", "a.tar member ../1.png"]


def test_an_error_of_the_system_names_the_archive(tmp_path: Path) -> None:
    """The next header would lie where no file reaches, so the system refuses to seek there."""
    archive(tmp_path / "a.tar", {"0.png": picture(0)})
    info = tarfile.TarInfo("0.png")
    info.size = 2**63 - 1000
    with (tmp_path / "a.tar").open("r+b") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(OSError, match="cannot be read") as raised:
        rows.open_rows(tmp_path)
    assert raised.value.filename == str(tmp_path / "a.tar")


@pytest.mark.parametrize("place", ["folder", "tar"])
def test_lines_end_as_on_any_system(place: str, tmp_path: Path) -> None:
    text = b"a cat\ron a mat\r\nin a hat\nat bat"
    if place == "tar":
        archive(tmp_path / "a.tar", {"0.png": picture(0), "0.txt": text})
    else:
        (tmp_path / "0.png").write_bytes(picture(0))
        (tmp_path / "0.txt").write_bytes(text)
    assert spec(tmp_path, **FILES).caption_texts() == ("a cat", "on a mat", "in a hat", "at bat")


class Numbered:
    """A data set whose `classes` is their number, as many write it."""

    classes = 2

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(3, 8, 8) - i / 10, i % 2


def test_a_data_set_may_say_how_many_classes_it_has() -> None:
    assert (Memory.of(Numbered()).classes, Memory.of(Numbered()).names) == (2, ())


def test_a_table_of_pandas_is_refused_with_what_is_taken() -> None:
    pandas = pytest.importorskip("pandas")
    with pytest.raises(UserError, match="DataFrame, whose rows cannot be indexed: give a folder, an array"):
        Memory.of(pandas.DataFrame({"image": [1, 2], "label": [0, 1]}))


def test_a_message_says_from_where_file_name_counts(tmp_path: Path) -> None:
    (folder := tmp_path / "train").mkdir()
    for i in range(4):
        (folder / f"{i}.png").write_bytes(picture(i))
    lines = [json.dumps({"file_name": f"train/{i}.png", "text": f"text {i}"}) for i in range(4)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    assert "file_name is relative to the table's folder): 'train/0.png'" in refused(folder, **FILES)


def test_a_field_of_csv_may_be_long(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n0.png,a cat\n1.png,{'x' * 200_000}\n")
    assert spec(tmp_path, **FILES).caption_texts() == ("a cat", "x" * 200_000)


def test_tables_say_what_their_columns_hold(tmp_path: Path) -> None:
    def table(name: str, column: object) -> Path:
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({"image": column}), tmp_path / name / "0.parquet")
        return tmp_path / name

    images = [picture(i) for i in range(3)]
    assert "image: string" in refused(table("base64", [base64.b64encode(data).decode() for data in images]))
    assert "image: list<" in refused(table("list", [[data] for data in images]))
    views = spec(table("view", pa.array(images, pa.binary()).cast(pa.binary_view()))).open()
    assert bytes_of(views.reference(3, 0)[0])[:, 0, 5, 5].tolist() == [0, 20, 40]


def test_floats_may_be_rounded_beyond_1() -> None:
    x = torch.linspace(-1, 1, 4 * 3 * 8 * 8).view(4, 3, 8, 8)
    assert Memory.of(x * 1.0000001).shape == (3, 8, 8)
    with pytest.raises(UserError, match="must be in"):
        Memory.of(x * 1.001)


def test_classes_without_images_are_said_before_training(tmp_path: Path) -> None:
    images = pa.array([picture(i) for i in range(3)])
    for name, labels in {"from 1": [1, 2, 3], "ids": [5, 9, 199_999]}.items():
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({"image": images, "label": labels}), tmp_path / name / "0.parquet")
        with pytest.warns(UserWarning, match="no image: number them from 0 without gaps"):
            spec(tmp_path / name)
    with pytest.warns(UserWarning, match="number them from 0"):
        Memory.of((torch.zeros(2, 3, 8, 8) - 0.5, [1, 2]))


@pytest.mark.parametrize("name", ["a$b", "~x", "$HOME"])
def test_folders_are_opened_as_they_are_called(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    as_folder(tmp_path / name)
    for root in (Path(name), tmp_path / name):
        assert spec(root).open().size == COUNT


def dataset(**columns: object) -> object:
    datasets = pytest.importorskip("datasets")
    images = [{"bytes": picture(i), "path": None} for i in range(COUNT)]
    features = {"image": datasets.Image()}
    for name, values in columns.items():
        is_class = isinstance(values[0], int)  # pyright: ignore[reportIndexIssue]
        features[name] = datasets.ClassLabel(names=["x", "y", "z"]) if is_class else datasets.Value("string")
    return datasets.Dataset.from_dict({"image": images, **columns}, features=datasets.Features(features))


def test_a_dataset_of_hugging_face_is_read_by_rows(capfd: pytest.CaptureFixture[str]) -> None:
    """A class column under another name is used, a text is said to be left out; other columns of classes are said."""
    labels = [i % 3 for i in range(COUNT)]
    spec_of = Memory.of(dataset(species=labels, text=["a"] * COUNT), bar)
    assert "text" in capfd.readouterr().err
    assert (spec_of.shape, spec_of.classes, spec_of.names) == ((3, SIDE, SIDE), 3, ("x", "y", "z"))
    source = spec_of.open()
    assert isinstance(source, Source)
    _, c = source.rows(slice(None))
    assert c.tolist() == labels
    as_array = Memory.of((np.stack([np.asarray(Image.open(io.BytesIO(picture(i)))) for i in range(COUNT)]), labels))
    for step in (0, 1, 7):
        for one, other in zip(source.batch(step, 5, 0), as_array.open().batch(step, 5, 0), strict=True):
            assert torch.equal(one, other)
    assert Memory.of(dataset(species=labels)).digest == spec_of.digest
    Memory.of(dataset(label=labels, second=labels), bar)
    assert "second" in capfd.readouterr().err


def test_of_a_dataset_dict_a_split_is_asked_for() -> None:
    datasets = pytest.importorskip("datasets")
    both = datasets.DatasetDict({"train": dataset(), "test": dataset()})
    with pytest.raises(UserError, match=r"splits train, test: .*data\['train'\]"):
        Memory.of(both)
    assert Memory.of(datasets.DatasetDict({"train": dataset()})).shape == (3, SIDE, SIDE)


@pytest.mark.parametrize("on_bad", ["raise", "skip"])
def test_an_image_that_is_swapped_while_a_run_trains_is_refused_when_it_is_read(on_bad: str, tmp_path: Path) -> None:
    as_folder(tmp_path)
    source = spec(tmp_path, memory=0.0, on_bad=on_bad).open()
    source.batch(0, COUNT, 0)
    (tmp_path / "bee/05.png").write_bytes(picture(7))
    with pytest.raises(UserError, match=r"bee/05\.png has changed"):
        source.batch(1, COUNT, 0)
    (tmp_path / "bee/05.png").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"bee/05\.png has changed"):
        source.batch(1, COUNT, 0)


def test_an_image_that_becomes_unreadable_while_a_run_trains_is_refused(tmp_path: Path) -> None:
    as_folder(tmp_path)
    source = spec(tmp_path, memory=0.0).open()
    source.batch(0, COUNT, 0)
    (tmp_path / "bee/05.png").unlink()
    with pytest.raises(UserError, match=r"bee/05\.png cannot be read"):
        source.batch(1, COUNT, 0)
