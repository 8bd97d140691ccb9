"""Encoded images and what is written of them are the same from every kind of place."""

import csv
import json
import os
import resource
import shutil
import socket
import tarfile
import unicodedata
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dumo.data import Digits, Moons, rows
from dumo.data.cache import open_cache
from dumo.data.caption import Captioned
from dumo.data.encoding import encode
from dumo.data.rows import ParquetRows, TarRows, open_rows
from dumo.io.data_source import Endless, TensorData
from dumo.types import UserError
from unit.data.animals import CLASSES, COUNT, STORES, archive, as_folder, label, picture, refused, spec, table
from unit.data.spy import spied
from unit.encoders.toy import PLAN, POINT, Pictures

Told = list[list[str]]
TOLD: Told = [[], *([f"a {CLASSES[label(i)]}"] + [f"number {i}"] * (i % 2) for i in range(1, COUNT))]
TEXTS = ("a ant", "number 1", "number 3", "a bee", "number 5", "number 7", "a cow", "number 9", "number 11")
FILES = {"captions": {"kind": "files"}}
BLOCK = tarfile.BLOCKSIZE


@pytest.fixture(autouse=True)
def warned_anew() -> None:
    rows.warn_once.cache_clear()


def file_of(i: int) -> str:
    return f"{CLASSES[label(i)]}/{i:02}.png"


def as_lines(root: Path, told: Told, name: str = "metadata.jsonl", key: str = "text") -> None:
    as_folder(root)
    lines = [{"file_name": file_of(i), key: texts[0] if len(texts) == 1 else texts} for i, texts in enumerate(told)]
    (root / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def as_csv(root: Path, told: Told) -> None:
    """A row for each caption, and an image that has none in a row that is empty."""
    as_folder(root)
    lines = [(file_of(i), text, i) for i, texts in enumerate(told) for text in texts or [""]]
    with (root / "metadata.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([("file_name", "text", "score"), *lines])


def as_table(root: Path, told: Told) -> None:
    as_folder(root)
    columns = {"file_name": [file_of(i) for i in range(COUNT)], "caption": told}
    pq.write_table(pa.table(columns), root / "metadata.parquet")


def as_texts(root: Path, told: Told, suffix: str = ".txt") -> None:
    as_folder(root)
    for i, texts in enumerate(told):
        (root / file_of(i)).with_suffix(suffix).write_text("\n".join(texts) + "\n\n")


def as_columns(root: Path, told: Told) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for k, numbers in enumerate((range(7), range(7, COUNT))):
        pq.write_table(table(numbers, captions=[told[i] for i in numbers]), root / f"train-{k:05}-of-00002.parquet")


def as_members(root: Path, told: Told, suffix: str = "txt") -> None:
    for k, numbers in enumerate((range(5), range(5, COUNT))):
        members: dict[str, bytes] = {}
        for i in numbers:
            text = json.dumps({"caption": told[i], "width": 8}) if suffix == "json" else "\n".join(told[i])
            members |= {f"{i:06}.{suffix}": text.encode(), f"{i:06}.png": picture(i)}
        archive(root / f"animals-{k:06}.tar", members)


WAYS: dict[str, Callable[[Path, Told], None]] = {
    "jsonl": as_lines,
    "captions.jsonl": lambda root, told: as_lines(root, told, "captions.jsonl", "prompt"),
    "csv": as_csv,
    "metadata.parquet": as_table,
    "txt": as_texts,
    "caption": lambda root, told: as_texts(root, told, ".caption"),
    "parquet": as_columns,
    "tar": as_members,
    "tar caption": lambda root, told: as_members(root, told, "caption"),
    "tar json": lambda root, told: as_members(root, told, "json"),
}


# --- captions


@pytest.mark.parametrize("way", WAYS)
def test_every_place_has_the_same_captions(way: str, tmp_path: Path) -> None:
    WAYS[way](tmp_path, TOLD)
    images = spec(tmp_path, **FILES)
    assert (images.caption_texts(), images.classes, images.labels) == (TEXTS, len(TEXTS), 0)
    source = images.open()
    assert isinstance(source, Captioned)
    for step in range(4):
        x, c = source.batch(step, COUNT, 0)
        for i, k in zip((255 - ((x[:, 1, 5, 5] + 1) * 127.5).round().long()) // 20, c, strict=True):
            own = TOLD[int(i)]
            assert (TEXTS[k] in own) if own else k == len(TEXTS)  # no caption has the number after the last


def test_columns_are_chosen_by_name(tmp_path: Path) -> None:
    numbers = range(COUNT)
    long, short = ([f"{word} {i}" for i in numbers] for word in ("long", "short"))
    pq.write_table(table(numbers, text=short, recaption=long), tmp_path / "all.parquet")
    assert spec(tmp_path, **FILES).caption_texts() == tuple(short)
    named = spec(tmp_path, captions={"kind": "files", "name": "recaption"})
    assert named.caption_texts() == tuple(long)
    both = spec(tmp_path, captions={"kind": "files", "name": "recaption,text"})
    assert both.caption_texts() == tuple(text for pair in zip(long, short, strict=True) for text in pair)
    assert set(both.all_captions().counts.tolist()) == {2}


def test_a_table_comes_before_text_files_unless_these_are_asked_for(tmp_path: Path) -> None:
    for suffix in (".txt", ".caption"):
        as_texts(tmp_path, [[]] * COUNT, suffix)
    as_csv(tmp_path, TOLD)
    file = tmp_path / file_of(3)
    file.with_suffix(".caption").write_text("of a caption")
    file.with_suffix(".txt").write_text("of a text")
    chosen = [spec(tmp_path, captions={"kind": "files", "name": name}) for name in ("auto", "txt", "caption")]
    assert [images.caption_texts() for images in chosen] == [TEXTS, ("of a text",), ("of a caption",)]
    metadata = tmp_path / "metadata.csv"
    metadata.write_text(metadata.read_text("utf-8-sig").replace("text,score", "words,score", 1))
    assert spec(tmp_path, **FILES).caption_texts() == ("of a text",)


def test_the_first_caption_that_is_not_blank_is_read(tmp_path: Path) -> None:
    """In each row; a blank text hides neither another column nor a text file."""
    said = ["of text", "", None, " "]
    lines = [{"file_name": file_of(i), "text": said[i % 4], "caption": f"of caption {i}"} for i in range(COUNT)]
    expected = tuple(dict.fromkeys("of text" if i % 4 == 0 else f"of caption {i}" for i in range(COUNT)))
    as_folder(tmp_path / "table")
    (tmp_path / "table/metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "parquet").mkdir()
    columns = {name: [line[name] for line in lines] for name in ("text", "caption")}
    pq.write_table(table(range(COUNT), **columns), tmp_path / "parquet/all.parquet")
    members: dict[str, bytes] = {}
    for i, line in enumerate(lines):
        members |= {f"{i:04}.png": picture(i), f"{i:04}.json": json.dumps(line).encode()}
        members |= {f"{i:04}.txt": b"  \n"} if i % 2 else {}
    archive(tmp_path / "tar/all.tar", members)
    for place in ("table", "parquet", "tar"):
        assert spec(tmp_path / place, **FILES).caption_texts() == expected
    as_texts(tmp_path / "files", [[f"of text {i}"] if i < 6 else [" "] for i in range(COUNT)])
    as_texts(tmp_path / "files", [[f"of caption {i}"] if i > 5 else [] for i in range(COUNT)], ".caption")
    (tmp_path / "files/metadata.csv").write_text(f"file_name,text\n{file_of(0)},\n{file_of(1)},of row\n")
    found = spec(tmp_path / "files", **FILES).caption_texts()
    of_files = [f"of text {i}" if i < 6 else f"of caption {i}" for i in range(COUNT)]
    assert found == ("of text 0", "of row", *of_files[2:])


def test_a_run_knows_its_captions_again(tmp_path: Path) -> None:
    later = spec(tmp_path := tmp_path / "later", **FILES)
    assert (later.classes, later.names) == (0, None)  # nothing is there to be counted
    as_lines(tmp_path, TOLD)
    images = spec(tmp_path, **FILES)
    assert type(images).model_validate(later.model_dump(mode="json")).with_facts().classes == len(TEXTS)
    again = type(images).model_validate(images.model_dump(mode="json"))
    assert again == images
    again.open()


def test_templates_of_folders(tmp_path: Path) -> None:
    as_folder(tmp_path)
    words = {"kind": "templates", "templates": ["a {}", "{n}"], "held": ["one {}"]}
    images = spec(tmp_path, captions=words)
    assert (images.classes, images.labels, images.names) == (9, 3, CLASSES)
    assert images.caption_texts()[-3:] == ("one ant", "one bee", "one cow")
    c = images.open().batch(0, COUNT, 0)[1]
    assert torch.equal(c // 2, spec(tmp_path).open().batch(0, COUNT, 0)[1])
    assert torch.equal(images.originals().reference(99, 0)[1], spec(tmp_path).open().reference(99, 0)[1])
    assert "set data.classes=9" in refused(tmp_path, captions=words, classes=10)


def written(root: Path, way: str, text: bytes) -> None:
    """Images whose fourth has a caption of these bytes."""
    lines = [b"a %d" % i if i != 3 else text for i in range(COUNT)]
    if way == "tar":
        archive(root / "all.tar", {f"{i:04}.png": picture(i) for i in range(COUNT)})
        members = {f"{i:04}.txt": line for i, line in enumerate(lines)}
        archive(root / "all.tar", {f"{i:04}.png": picture(i) for i in range(COUNT)} | members)
        return
    as_folder(root)
    if way == "txt":
        for i, line in enumerate(lines):
            (root / file_of(i)).with_suffix(".txt").write_bytes(line)
    elif way == "csv":
        content = b"".join(b"%s,%s\n" % (file_of(i).encode(), line) for i, line in enumerate(lines))
        (root / "metadata.csv").write_bytes(b"file_name,text\n" + content)
    else:
        content = b"".join(
            b'{"file_name": "%s", "text": "%s"}\n' % (file_of(i).encode(), line) for i, line in enumerate(lines)
        )
        (root / "metadata.jsonl").write_bytes(content)


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path: Path) -> None:
    """Nor of the name of a column, in a table of whatever kind."""
    mark = "\ufeff".encode()
    for way in ("txt", "tar"):
        written(tmp_path / way, way, mark + b"a 3")
    for way in ("csv", "jsonl"):
        written(tmp_path / way, way, b"a 3")
        file = tmp_path / way / f"metadata.{way}"
        file.write_bytes(mark + file.read_bytes())
    for way in ("txt", "tar", "csv", "jsonl"):
        assert spec(tmp_path / way, **FILES).caption_texts() == tuple(f"a {i}" for i in range(COUNT))


@pytest.mark.parametrize("way", ["txt", "tar"])
def test_a_caption_ends_with_the_end_of_a_line_alone(tmp_path: Path, way: str) -> None:
    """Not with what Unicode or ASCII know as other ends of lines."""
    written(tmp_path, way, "a\u2028b\x85c\x0cd\r\n".encode())
    assert spec(tmp_path, **FILES).caption_texts()[3] == "a\u2028b\x85c\x0cd"


@pytest.mark.parametrize(("delimiter", "end"), [(";", "\r\n"), ("\t", "\n"), (",", "\r\n")])
def test_csv_as_spreadsheets_write_it(tmp_path: Path, delimiter: str, end: str) -> None:
    lines = [("file_name", " text"), *((file_of(i), f'"an {i}{delimiter} ""x"""') for i in range(COUNT))]
    as_folder(tmp_path)
    (tmp_path / "metadata.csv").write_bytes("".join(delimiter.join(line) + end for line in lines).encode())
    assert spec(tmp_path, **FILES).caption_texts() == tuple(f'an {i}{delimiter} "x"' for i in range(COUNT))


# --- names


NAMES = [f"é {i:02}.png" for i in range(COUNT)]  # composed: form C


def images(root: Path, names: Iterable[str] = NAMES) -> Path:
    root.mkdir(parents=True)
    for i, name in enumerate(names):
        (root / name).write_bytes(picture(i))
    return root


def metadata(root: Path, names: Iterable[str], **columns: Iterable[object]) -> None:
    lines: list[dict[str, object]] = [{"file_name": name, "text": f"a {i}"} for i, name in enumerate(names)]
    for column, values in columns.items():
        for line, value in zip(lines, values, strict=False):
            line[column] = value
    (root / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def texts(root: Path, names: Iterable[str], suffix: str = ".txt") -> None:
    for i, name in enumerate(names):
        (root / name).with_suffix(suffix).write_text(f"a {i}")


@pytest.mark.parametrize(("of_image", "of_caption"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_name_is_the_same_in_both_forms_of_unicode(tmp_path: Path, of_image: str, of_caption: str) -> None:
    """Also of the images that are edited; the caption's own text stays as it is."""
    named = [unicodedata.normalize(of_caption, name) for name in NAMES]
    there = [unicodedata.normalize(of_image, name) for name in NAMES]
    assert named != there
    own_text = unicodedata.normalize(of_caption, "é")
    metadata(images(tmp_path / "table", there), named, text=[own_text] * COUNT)
    assert spec(tmp_path / "table", **FILES).caption_texts() == (own_text,)
    texts(images(tmp_path / "texts", there), named)
    assert spec(tmp_path / "texts", **FILES).classes == COUNT
    images(tmp_path / "before", there)
    metadata(tmp_path / "table", named, text=["so"] * COUNT, of=[f"../before/{name}" for name in named])
    assert spec(tmp_path / "table", captions={"kind": "files", "source": "of"}).classes == COUNT


def test_other_paths_to_an_image_are_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_folder(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    found = [str(file.relative_to("images")) for file in sorted(Path("images").rglob("*.png"))]
    ways = [f"./{found[0]}", str(Path("images", found[1]).absolute()), found[2].replace("/", "\\"), f"x/../{found[3]}"]
    metadata(Path("images"), [*ways, *found[4:]])
    assert spec(Path("images"), **FILES).caption_texts() == tuple(f"a {i}" for i in range(COUNT))


def test_a_few_that_lack_their_other_half_are_named(tmp_path: Path) -> None:
    metadata(images(tmp_path / "table"), [*NAMES[1:], "gone.png"])
    with pytest.warns(UserWarning, match="1 of 12") as caught:
        assert spec(tmp_path / "table", **FILES).all_captions().counts.tolist() == [1] * COUNT
    said = [str(warned.message) for warned in caught]
    assert any("gone.png" in line for line in said)
    assert any("é 00.png" in line for line in said)


def test_an_image_may_have_no_caption_on_purpose(tmp_path: Path) -> None:
    """By a blank text in whatever place, without a word."""
    metadata(images(tmp_path / "table"), NAMES, text=["", None, " \n"])
    texts(images(tmp_path / "texts"), NAMES)
    for name in NAMES[:3]:
        (tmp_path / "texts" / name).with_suffix(".txt").write_text(" \n")
    members = {f"{i:04}.png": picture(i) for i in range(COUNT)}
    members |= {f"{i:04}.json": json.dumps({"caption": f"a {i}" if i > 2 else None}).encode() for i in range(COUNT)}
    archive(tmp_path / "tar/all.tar", members)
    (tmp_path / "parquet").mkdir()
    said = [None, "", " ", *(f"a {i}" for i in range(3, COUNT))]
    pq.write_table(table(range(COUNT), text=pa.array(said)), tmp_path / "parquet/all.parquet")
    for place in ("table", "texts", "tar", "parquet"):
        assert spec(tmp_path / place, **FILES).caption_texts() == tuple(f"a {i}" for i in range(3, COUNT))


def test_a_run_that_has_begun_is_not_asked_again(tmp_path: Path) -> None:
    """Its digest says what its captions are."""
    metadata(images(tmp_path / "images"), NAMES, text=[""] * 6)
    begun = spec(tmp_path / "images", **FILES)
    lines = (tmp_path / "images/metadata.jsonl").read_text().splitlines()[6:]
    (tmp_path / "images/metadata.jsonl").write_text("\n".join(lines))
    refused(tmp_path / "images", **FILES)
    begun.open()


def test_images_of_other_splits_lack_nothing(tmp_path: Path) -> None:
    for part in ("train", "test"):
        images(tmp_path / "texts" / part)
        texts(tmp_path / "texts" / part, NAMES)
        images(tmp_path / "table" / part)
    metadata(tmp_path / "table", [f"{part}/{name}" for part in ("train", "test") for name in NAMES])
    for place in ("texts", "table"):
        assert spec(tmp_path / place, **FILES, split="train").classes == COUNT


def test_an_archive_whose_json_has_no_captions_has_none(tmp_path: Path) -> None:
    """Whatever other texts are in it."""
    members = {f"{i:04}.png": picture(i) for i in range(COUNT)}
    members |= {f"{i:04}.json": b'{"width": 8}' for i in range(COUNT)}
    members |= {f"{name}.txt": b"read me" for name in ("README", "LICENSE")}
    archive(tmp_path / "all.tar", members)
    with warnings.catch_warnings(record=True) as caught:
        assert "no captions found" in refused(tmp_path, **FILES)
    assert not caught


# --- files that are no images


def hole(file: Path) -> None:
    file.touch()
    os.truncate(file, 2**40)


def listener(file: Path) -> None:
    here = os.getcwd()
    os.chdir(file.parent)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(file.name)
    os.chdir(here)


ODD: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "device": lambda file: file.symlink_to("/dev/zero"),
    "hole": hole,
    "socket": listener,
    "empty": Path.touch,
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("memory", [2.0, 0.0])
def test_what_is_only_called_like_an_image_is_named_and_not_waited_for(
    kind: str, memory: float, tmp_path: Path
) -> None:
    as_folder(tmp_path)
    ODD[kind](file := tmp_path / "bee" / "odd.png")
    with pytest.raises(UserError, match=f"{file}.*data.on_bad=skip"):
        spec(tmp_path, memory=memory).open().rows(slice(None))
    with pytest.warns(UserWarning, match=f"1 of 13 images .*{file}"):
        x, _ = spec(tmp_path, memory=memory, on_bad="skip").open().rows(slice(None))
    assert len(x) == COUNT


@pytest.mark.parametrize("memory", [2.0, 0.0])
def test_images_that_come_or_go_after_opening(memory: float, tmp_path: Path) -> None:
    """What came is not there before the next start; what went is named, or left out, unless it was in memory."""
    as_folder(tmp_path)
    strict, lax = (spec(tmp_path, memory=memory, on_bad=way).open() for way in ("raise", "skip"))
    (tmp_path / "ant" / "new.png").write_bytes(picture(0))
    (tmp_path / "bee" / "05.png").unlink()
    if memory:
        assert len(strict.rows(slice(None))[0]) == len(lax.rows(slice(None))[0]) == COUNT
        return
    with pytest.raises(UserError, match=r"bee/05.png cannot be read: No such file"):
        strict.batch(0, COUNT, 0)
    with pytest.warns(UserWarning, match="1 of 12 images"):
        assert len(lax.rows(slice(None))[0]) == COUNT - 1
    assert lax.batch(0, COUNT, 0)[0].shape[0] == COUNT


# --- fingerprints


def first(root: Path) -> Path:
    """The first file of images."""
    return min(path for path in root.rglob("*") if path.suffix in (".png", ".tar", ".parquet"))


def add(form: str, root: Path) -> None:
    """One image more, or some."""
    if form == "folder":
        (root / "ant" / "new.png").write_bytes(picture(0))
    else:
        shutil.copy(first(root), root / f"zz-train.{form}")


def rename(form: str, root: Path) -> None:
    file = first(root)
    file.rename(file.with_stem(f"{file.stem}0"))


def remove(form: str, root: Path) -> None:
    first(root).unlink()


def enlarge(form: str, root: Path) -> None:
    """Another image, of another size, in the place of one."""
    if form == "folder":
        (root / "ant" / "00.png").write_bytes(picture(0) + b"0")
    elif form == "parquet":
        lines = pq.read_table(file := first(root)).to_pylist()
        lines[0]["image"]["bytes"] += b"0" * 1000
        pq.write_table(pa.Table.from_pylist(lines, schema=pq.read_schema(file)), file, row_group_size=3)
    else:
        with tarfile.open(file := first(root)) as there:
            members = {info.name: there.extractfile(info) for info in there}
            whole = {name: found.read() for name, found in members.items() if found}
        archive(file, whole | {"000001.png": picture(1) + b"0"})


@pytest.mark.parametrize("form", STORES)
@pytest.mark.parametrize("change", [add, rename, remove, enlarge])
def test_a_fingerprint_is_of_the_images_and_not_of_where_they_lie(
    form: str, change: Callable[[str, Path], None], tmp_path: Path
) -> None:
    """The same for a copy, with other times, decoded or not; another for other images."""
    STORES[form](one := tmp_path / "one")
    print_of = spec(one, labelled=False).open().fingerprint()
    shutil.copytree(one, two := tmp_path / "elsewhere" / "two")
    for file in two.rglob("*"):
        os.utime(file, ns=(5, 5))
    assert spec(two, labelled=False, memory=0.0).open().fingerprint() == print_of
    change(form, two)
    assert spec(two, labelled=False).open().fingerprint() != print_of


def test_fingerprints_of_what_is_no_file() -> None:
    """Digits are known by their numbers; what never ends, by nothing."""
    digits = Digits().open()
    assert isinstance(digits, TensorData)
    assert digits.fingerprint() == Digits().open().fingerprint()
    assert TensorData(digits.x + 1, digits.c).fingerprint() != digits.fingerprint()
    assert TensorData(digits.x, digits.c.flip(0)).fingerprint() != digits.fingerprint()
    moons = Moons().open()
    assert isinstance(moons, Endless)
    assert moons.fingerprint() is None


def test_a_cache_s_fingerprint_is_of_its_numbers(tmp_path: Path) -> None:
    prints: list[str] = []
    for k, (count, change) in enumerate([(20, {}), (20, {}), (21, {}), (20, {"dtype": "float16"})]):
        encode(Pictures(count), POINT, PLAN.model_copy(update=change), tmp_path / str(k))
        prints.append(open_cache(tmp_path / str(k), POINT.codec).fingerprint())
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


# --- parquet


ROWS, GROUP = 300, 150


def image(i: int) -> bytes:
    """A thousand bytes."""
    return b"%04d" % i * 250


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """Two tables of two groups each."""
    for k in range(2):
        made = pa.table({"image": [{"bytes": image(i), "path": ""} for i in range(k * ROWS, (k + 1) * ROWS)]})
        settings = {"row_group_size": GROUP, "write_page_checksum": True, "data_page_size": 4096}
        pq.write_table(made, tmp_path / f"{k}.parquet", compression="none", use_dictionary=False, **settings)
    return tmp_path


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The row groups that are read from here on."""
    return spied(monkeypatch, pq.ParquetFile, "read_row_group", lambda table, group, *_: group)


def test_row_groups_stay_up_to_so_many_bytes(tables: Path, read: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The one not used for longest leaves; a pass over the rows in order reads each group once."""
    monkeypatch.setattr(rows, "_CACHE_BYTES", GROUP * 1010 * 5 // 2)  # two and a half groups
    source = open_rows(tables)
    assert [source.read(i) for i in range(2 * ROWS)] == [image(i) for i in range(2 * ROWS)]
    assert read == [0, 1, 0, 1]
    read.clear()
    for i in (300, 450, 300, 0, 300, 450):  # the last but one stays
        assert source.read(i) == image(i)
    assert read == [0, 1]


def test_threads_do_not_read_a_group_twice(tables: Path, read: list[int]) -> None:
    source = open_rows(tables)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(source.read, range(2 * ROWS))) == [image(i) for i in range(2 * ROWS)]
    assert len(read) == 4


def test_tables_are_more_than_the_files_that_may_be_open(tables: Path) -> None:
    for k in range(300):
        os.link(tables / "0.parquet", tables / f"link-{k:03}.parquet")
    (tables / "1.parquet").unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/dev/fd"))) + 200, hard))
        source = open_rows(tables)
        assert isinstance(source, ParquetRows)
        for k in range(300):
            assert source.read(k * ROWS + 7) == image(7)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_damaged_page_is_found_by_its_sum(tables: Path) -> None:
    """A bit among the bytes of an image, which the image itself might not show."""
    data = bytearray((tables / "0.parquet").read_bytes())
    data[data.index(image(120)) + 500] ^= 1
    (tables / "0.parquet").write_bytes(data)
    source = open_rows(tables)
    with pytest.raises(OSError, match="CRC"):
        source.read(140)
    assert source.read(300) == image(300)


@pytest.mark.parametrize("at", range(4, 3000, 250))
def test_damage_anywhere_is_an_error_of_the_table(tmp_path: Path, at: int) -> None:
    """Pages without a sum: what pyarrow raises, of whatever kind, is said of the row; nothing else comes through."""
    pq.write_table(pa.table({"image": [image(i) for i in range(3)]}), tmp_path / "a.parquet", compression="none")
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[at : at + 8] = b"\xff" * 8
    (tmp_path / "a.parquet").write_bytes(data)
    assert str(tmp_path / "a.parquet") in refused(tmp_path)  # they are no images in any case


# --- archives


EACH = 10  # images to an archive


def tar_file(root: Path, name: str, first_image: int, count: int = EACH) -> Path:
    """An archive of images, which are their numbers, each with its number mod 7 as its class."""
    members: dict[str, bytes] = {}
    for i in range(first_image, first_image + count):
        members |= {f"{name}/{i:04}.png": b"%04d" % i, f"{name}/{i:04}.cls": b"%d" % (i % 7)}
        members |= {f"{name}/{i:04}.txt": b"text %d" % i}
    archive(file := root / f"{name}.tar", members)
    return file


def numbers(source: object) -> list[int]:
    """The images, in order; each with its own class, text and name."""
    assert isinstance(source, TarRows)
    found = [int(source.read(i)) for i in range(len(source))]
    assert source.column("cls") == [i % 7 for i in found]
    assert source.column("txt") == [[f"text {i}"] for i in found]
    assert all(f"/{i:04}.png" in source.path(row) for row, i in enumerate(found))
    return found


def test_a_large_archive_is_scanned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in it is noted in runs/tars; an archive that changed, and a damaged note, are made anew."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rows, "INDEX_BYTES", 1)
    scanned: list[str] = []
    scan_of = rows.TarScan.of
    monkeypatch.setattr(rows.TarScan, "of", lambda file: (scanned.append(Path(file).stem), scan_of(file))[1])
    for k, name in enumerate("abc"):
        tar_file(tmp_path / "set", name, EACH * k)
    for _ in range(2):
        assert numbers(open_rows("set")) == list(range(30))
    assert scanned == [*"abc"]
    assert {file.name for file in Path("set").iterdir()} == {"a.tar", "b.tar", "c.tar"}
    tar_file(tmp_path / "set", "a", 200, 3)
    os.utime("set/b.tar", ns=(1, 1))
    assert numbers(open_rows("set")) == [200, 201, 202, *range(10, 30)]
    assert scanned == [*"abcab"]
    for note in Path(rows.INDEX_FOLDER).iterdir():
        note.write_bytes(note.read_bytes()[:-9])
    assert numbers(open_rows("set")) == [200, 201, 202, *range(10, 30)]
    assert scanned == [*"abcababc"]


def test_a_note_that_cannot_be_written_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "INDEX_BYTES", 1)
    monkeypatch.setattr(rows, "INDEX_FOLDER", tar_file(tmp_path, "a", 0) / "no folder")
    with pytest.warns(UserWarning, match="cannot be written"):
        assert numbers(open_rows(tmp_path)) == list(range(10))


def test_members_that_end_like_images_are_not_left_out_silently(tmp_path: Path) -> None:
    """A mask that goes with an image is not missed."""
    members = {"a/1.png": b"1", "a/Shot at 10.30.12.png": b"2", "a/1.seg.PNG": b"3", "a/2.seg.png": b"4"}
    archive(tmp_path / "a.tar", members)
    with pytest.warns(UserWarning, match=r"2 members .*a/Shot at 10\.30\.12\.png"):
        assert len(open_rows(tmp_path)) == 1


@pytest.mark.parametrize("zeros", [1, 2, 20, 512])
def test_ends_that_writers_make_are_whole(tmp_path: Path, zeros: int) -> None:
    """A block of zeros, two as POSIX asks, or as many as fill a record of a size that is asked for."""
    file = tar_file(tmp_path, "a", 0)
    end = EACH * 6 * BLOCK
    os.truncate(file, end)
    os.truncate(file, end + zeros * BLOCK if zeros < 512 else 512 * BLOCK)
    assert numbers(open_rows(file)) == list(range(10))


@pytest.mark.parametrize("at", [0, 30 * BLOCK, 30 * BLOCK + 148])
def test_zeros_in_an_archive_are_named(tmp_path: Path, at: int) -> None:
    """Whoever reads to the first block of zeros has some of the images, and no word of the others."""
    file = tar_file(tmp_path, "a", 0)
    data = bytearray(file.read_bytes())
    data[at : at + BLOCK] = bytes(BLOCK)
    file.write_bytes(data)
    with pytest.raises(UserError, match=str(file)):
        open_rows(file)


def test_an_archive_that_became_shorter_is_said_of_the_image(tmp_path: Path) -> None:
    file = tar_file(tmp_path, "a", 0)
    source = open_rows(file)
    os.truncate(file, BLOCK + 2)
    with pytest.raises(ValueError, match="truncated"):
        source.read(0)
