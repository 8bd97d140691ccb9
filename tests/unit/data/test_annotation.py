"""What is written of images is the same from every store, whatever it is called there, and refused with a reason."""

import csv
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dumo.data.caption import Captioned
from dumo.types import UserError
from unit.data.animals import CLASSES, COUNT, archive, as_folder, as_parquet, label, picture, refused, spec, table

Told = list[list[str]]
TOLD: Told = [[], *([f"a {CLASSES[label(i)]}"] + [f"number {i}"] * (i % 2) for i in range(1, COUNT))]
TEXTS = ("a ant", "number 1", "number 3", "a bee", "number 5", "number 7", "a cow", "number 9", "number 11")
FILES = {"captions": {"kind": "files"}}


def file_of(i: int) -> str:
    return f"{CLASSES[label(i)]}/{i:02}.png"


def as_lines(root: Path, told: Told, name: str = "metadata.jsonl", key: str = "text") -> None:
    as_folder(root)
    rows = [{"file_name": file_of(i), key: texts[0] if len(texts) == 1 else texts} for i, texts in enumerate(told)]
    (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_csv(root: Path, told: Told) -> None:
    """A row for each caption, and an image that has none in a row that is empty."""
    as_folder(root)
    rows = [(file_of(i), text, i) for i, texts in enumerate(told) for text in texts or [""]]
    with (root / "metadata.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([("file_name", "text", "score"), *rows])


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
    for k, rows in enumerate((range(7), range(7, COUNT))):
        pq.write_table(table(rows, captions=[told[i] for i in rows]), root / f"train-{k:05}-of-00002.parquet")


def as_members(root: Path, told: Told, suffix: str = "txt") -> None:
    for k, rows in enumerate((range(5), range(5, COUNT))):
        members: dict[str, bytes] = {}
        for i in rows:
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


@pytest.mark.parametrize("way", WAYS)
def test_every_store_tells_the_same(way: str, tmp_path: Path) -> None:
    WAYS[way](tmp_path, TOLD)
    said = nullcontext()
    if way in ("txt", "caption", "tar", "tar caption"):
        said = pytest.warns(UserWarning, match="6 files of text with several lines, each of which is a caption: ")
    with said:
        images = spec(tmp_path, **FILES)
    assert (images.caption_texts(), images.classes, images.labels) == (TEXTS, len(TEXTS), 0)
    source = images.open()
    assert isinstance(source, Captioned)
    for step in range(4):
        x, c = source.batch(step, COUNT, 0)
        for i, k in zip((255 - ((x[:, 1, 5, 5] + 1) * 127.5).round().long()) // 20, c, strict=True):
            own = TOLD[int(i)]
            assert (TEXTS[k] in own) if own else k == len(TEXTS)  # no caption has the number behind the last


def test_a_column_by_its_name(tmp_path: Path) -> None:
    rows = range(COUNT)
    long, short = ([f"{word} {i}" for i in rows] for word in ("long", "short"))
    pq.write_table(table(rows, text=short, recaption=long), tmp_path / "all.parquet")
    assert spec(tmp_path, **FILES).caption_texts() == tuple(short)
    named = spec(tmp_path, captions={"kind": "files", "name": "recaption"})
    assert named.caption_texts() == tuple(long)
    both = spec(tmp_path, captions={"kind": "files", "name": "recaption,text"})
    assert both.caption_texts() == tuple(text for pair in zip(long, short, strict=True) for text in pair)
    assert set(both.all_captions().counts.tolist()) == {2}


def test_a_table_or_files_of_text_as_chosen(tmp_path: Path) -> None:
    """Of both, a table goes first, unless it says nothing of words or files are asked for by their ending."""
    for suffix in (".txt", ".caption"):
        as_texts(tmp_path, [[]] * COUNT, suffix)
    as_csv(tmp_path, TOLD)
    file = tmp_path / file_of(3)
    file.with_suffix(".caption").write_text("of a file")
    file.with_suffix(".txt").write_text("of a text")
    with pytest.warns(UserWarning, match="2 files of text not read.*'ant/03.txt', 'ant/03.caption'"):
        chosen = [spec(tmp_path, captions={"kind": "files", "name": name}) for name in ("auto", "txt", "caption")]
    assert [images.caption_texts() for images in chosen] == [TEXTS, ("of a text",), ("of a file",)]
    table = tmp_path / "metadata.csv"
    table.write_text(table.read_text("utf-8-sig").replace("text,score", "words,score", 1))
    with pytest.warns(UserWarning, match="1 file of text not read.*'ant/03.caption'"):
        assert spec(tmp_path, **FILES).caption_texts() == ("of a text",)
    file.with_suffix(".txt").unlink()
    file.with_suffix(".caption").unlink()
    assert "There are columns words, score: set captions.name to one" in refused(tmp_path, **FILES)


def test_a_run_knows_its_captions_again(tmp_path: Path) -> None:
    later = spec(tmp_path := tmp_path / "later", **FILES)
    assert (later.classes, later.names) == (0, None)  # nothing is there to be counted
    as_lines(tmp_path, TOLD)
    images = spec(tmp_path, **FILES)
    assert type(images).model_validate(later.model_dump(mode="json")).with_facts().classes == len(TEXTS)
    again = type(images).model_validate(images.model_dump(mode="json"))
    assert again == images
    as_lines(tmp_path, [*TOLD[:-1], ["another"]])
    with pytest.raises(UserError, match="other captions than the run was made with"):
        again.open()
    assert "has 9 captions, data.classes says 8" in refused(tmp_path, **FILES, classes=8)


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


def test_what_tells_nothing_is_refused(tmp_path: Path) -> None:
    for k, lines in enumerate(('{"text": "a"}', "[1]", "{", '{"file_name": "ant/00.png", "text": 7}')):
        as_folder(root := tmp_path / f"jsonl{k}")
        (root / "metadata.jsonl").write_text(lines + "\n")
        assert str(root) in refused(root, **FILES)
    tables = [
        ("csv", "text\na\n", "line 2 has no file_name"),
        ("csv", "file_name,text\nant/00.png,a, b\n", "line 2 has 3 fields, and the first line has 2"),
        (
            "csv",
            "file_name;text\nant/00.png;a; b\n",
            "line 2 has 3 fields, and the first line has 2: put a text that holds the separator ';' into double quotes",
        ),
        (
            "csv",
            "file_name\ttext\nant/00.png\ta\t b\n",
            r"line 2 has 3 fields, and the first line has 2: put a text that holds the separator '\t' into",
        ),
        ("jsonl", '{"file_name": 7, "text": "a"}\n', "line 1: file_name=7 is no text: give the image's path from"),
        ("jsonl", '{"file_name": null, "text": "a"}\n', "line 1: file_name=None is no text: give the image's path"),
        ("parquet", "no table", "is no whole parquet file"),
    ]
    for k, (name, text, says) in enumerate(tables):
        as_folder(root := tmp_path / f"table{k}")
        (root / f"metadata.{name}").write_text(text)
        assert f"{root / f'metadata.{name}'} {says}" in refused(root, **FILES)
    as_folder(tmp_path / "none")
    assert "no captions found for the 12 images" in refused(tmp_path / "none", **FILES)
    as_parquet(tmp_path / "columns")
    assert "no captions found" in refused(tmp_path / "columns", **FILES)
    named = {"captions": {"kind": "files", "name": "words"}}
    assert "has no 'words' (it has image, label)" in refused(tmp_path / "columns", **named)
    assert "captions.name=txt" in refused(tmp_path / "none", **named)
    words = {"captions": {"kind": "templates", "templates": ["a {}"]}}
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "1.png").write_bytes(picture(1))
    assert "name classes, and" in refused(tmp_path / "flat", **words)


def test_the_first_caption_that_is_not_blank_is_read(tmp_path: Path) -> None:
    """In each row; a blank text hides neither another column nor a file of text."""
    said = ["of text", "", None, " "]
    rows = [{"file_name": file_of(i), "text": said[i % 4], "caption": f"of caption {i}"} for i in range(COUNT)]
    expected = tuple(dict.fromkeys("of text" if i % 4 == 0 else f"of caption {i}" for i in range(COUNT)))
    as_folder(tmp_path / "table")
    (tmp_path / "table/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "parquet").mkdir()
    columns = {name: [row[name] for row in rows] for name in ("text", "caption")}
    pq.write_table(table(range(COUNT), **columns), tmp_path / "parquet/all.parquet")
    members: dict[str, bytes] = {}
    for i, row in enumerate(rows):
        members |= {f"{i:04}.png": picture(i), f"{i:04}.json": json.dumps(row).encode()}
        members |= {f"{i:04}.txt": b"  \n"} if i % 2 else {}
    archive(tmp_path / "tar/all.tar", members)
    for store in ("table", "parquet", "tar"):
        assert spec(tmp_path / store, **FILES).caption_texts() == expected
    as_texts(tmp_path / "files", [[f"of text {i}"] if i < 6 else [" "] for i in range(COUNT)])
    as_texts(tmp_path / "files", [[f"of caption {i}"] if i > 5 else [] for i in range(COUNT)], ".caption")
    (tmp_path / "files/metadata.csv").write_text(f"file_name,text\n{file_of(0)},\n{file_of(1)},of row\n")
    with pytest.warns(UserWarning, match=f"1 file of text not read.*'{Path(file_of(1)).with_suffix('.txt')}'"):
        found = spec(tmp_path / "files", **FILES).caption_texts()
    assert found == (
        "of text 0",
        "of row",
        *(f"of text {i}" for i in range(2, 6)),
        *(f"of caption {i}" for i in range(6, 12)),
    )


def encoded(root: Path, way: str, text: bytes) -> None:
    """Images whose fourth has a caption of these bytes."""
    as_folder(root)
    lines = [b"a %d" % i if i != 3 else text for i in range(COUNT)]
    files = [file_of(i).encode() for i in range(COUNT)]
    match way:
        case "csv":
            rows = [b"%s,%s\n" % pair for pair in zip(files, lines, strict=True)]
            (root / "metadata.csv").write_bytes(b"file_name,text\n" + b"".join(rows))
        case "jsonl":
            rows = [b'{"file_name": "%s", "text": "%s"}\n' % pair for pair in zip(files, lines, strict=True)]
            (root / "metadata.jsonl").write_bytes(b"".join(rows))
        case "txt":
            for file, line in zip(files, lines, strict=True):
                (root / file.decode()).with_suffix(".txt").write_bytes(line)
        case "metadata.parquet":
            column = pa.array(lines, pa.binary()).view(pa.string())
            pq.write_table(pa.table({"file_name": [file.decode() for file in files], "text": column}), root / way)
        case "parquet":
            for file in files:
                (root / file.decode()).unlink()
            column = pa.array(lines, pa.binary()).view(pa.string())
            pq.write_table(table(range(COUNT), text=column), root / "all.parquet")
        case _:
            for file in files:
                (root / file.decode()).unlink()
            texts = [b'{"caption": "%s"}' % line if way == "json" else line for line in lines]
            members = {f"{i:04}.{way.removeprefix('tar ')}": text for i, text in enumerate(texts)}
            archive(root / "all.tar", {f"{i:04}.png": picture(i) for i in range(COUNT)} | members)


@pytest.mark.parametrize(
    ("way", "place"),
    [
        ("csv", "metadata.csv"),
        ("jsonl", "metadata.jsonl"),
        ("txt", "03.txt"),
        ("metadata.parquet", "metadata.parquet row 3"),
        ("parquet", "all.parquet row 3"),
        ("json", "the .json of {root}/all.tar member 0003.png"),
        ("tar txt", "the .txt of {root}/all.tar member 0003.png"),
    ],
)
def test_what_is_not_utf8_is_refused_with_its_place(tmp_path: Path, way: str, place: str) -> None:
    encoded(tmp_path, way, "café".encode("latin1"))
    told = refused(tmp_path, **FILES)
    assert place.format(root=tmp_path) in told
    assert "not UTF-8" in told
    assert "byte 0xe9" in told


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path: Path) -> None:
    """Nor of a name of a column, in a table of whatever kind."""
    mark = "\ufeff".encode()
    encoded(tmp_path / "txt", "txt", mark + b"a 3")
    encoded(tmp_path / "tar", "tar txt", mark + b"a 3")
    for way in ("csv", "jsonl"):
        encoded(tmp_path / way, way, b"a 3")
        file = tmp_path / way / f"metadata.{way}"
        file.write_bytes(mark + file.read_bytes())
    for way in ("txt", "tar", "csv", "jsonl"):
        assert spec(tmp_path / way, **FILES).caption_texts() == tuple(f"a {i}" for i in range(COUNT))


def test_half_a_character_is_refused_with_its_place(tmp_path: Path) -> None:
    encoded(tmp_path / "jsonl", "jsonl", rb"a \ud800")
    assert r"metadata.jsonl line 4: the caption 'a \ud800' has half a character" in refused(tmp_path / "jsonl", **FILES)
    encoded(tmp_path / "tar", "json", rb"a \ud800")
    assert "the .json of" in (told := refused(tmp_path / "tar", **FILES))
    assert "member 0003.png: the caption 'a" in told


@pytest.mark.parametrize("way", ["txt", "tar txt"])
def test_a_caption_ends_with_a_newline_alone(tmp_path: Path, way: str) -> None:
    """Not with what Unicode or ASCII knows as other ends of lines."""
    encoded(tmp_path, way, "a\u2028b\x85c\x0cd\r\n".encode())
    assert spec(tmp_path, **FILES).caption_texts()[3] == "a\u2028b\x85c\x0cd"


def as_rows(root: Path, text: str) -> Path:
    as_folder(root)
    (root / "metadata.csv").write_bytes(text.encode())
    return root


@pytest.mark.parametrize(("delimiter", "end"), [(";", "\r\n"), ("\t", "\n"), (",", "\r\n")])
def test_csv_as_spreadsheets_write_it(tmp_path: Path, delimiter: str, end: str) -> None:
    rows = [("file_name", " text"), *((file_of(i), f'"an {i}{delimiter} ""x"""') for i in range(COUNT))]
    as_rows(tmp_path, "".join(delimiter.join(row) + end for row in rows))
    assert spec(tmp_path, **FILES).caption_texts() == tuple(f'an {i}{delimiter} "x"' for i in range(COUNT))


def test_csv_that_loses_rows_is_refused_with_the_line(tmp_path: Path) -> None:
    rows = [f"{file_of(i)},a {i}" for i in range(COUNT)]
    for k, (fourth, told) in enumerate(
        {
            f'{file_of(3)},"a 3': "line 5 is no CSV (unexpected end of data): close each quote",
            f'{file_of(3)},"a" 3': "line 5 is no CSV",
            f"{file_of(3)},a, 3": "line 5 has 3 fields, and the first line has 2: put a text that",
        }.items()
    ):
        changed = [*rows[:3], fourth, *rows[4:]]
        root = as_rows(tmp_path / str(k), "\n".join(["file_name,text", *changed]))
        assert f"{root}/metadata.csv {told}" in refused(root, **FILES)
    root = as_rows(tmp_path / "twice", "\n".join(["file_name,text,text", *rows]))
    assert "line 1 names a column twice" in refused(root, **FILES)
    root = as_rows(tmp_path / "image", "\n".join(["image,text", *rows]))
    assert "line 2 has no file_name (it has image, text)" in refused(root, **FILES)


def test_a_member_too_long_for_a_caption_is_refused(tmp_path: Path) -> None:
    archive(tmp_path / "all.tar", {"0.png": picture(0), "0.txt": b"a" * (2**20 + 1)})
    assert "all.tar member 0.txt has 1,048,577 bytes" in refused(tmp_path, **FILES)
