"""What is written of images is the same from every store, whatever it is called there, and refused with a reason."""

import csv
import json
from collections.abc import Callable
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
    (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))


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
    for i, texts in enumerate(told[1:], 1):
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
    as_csv(tmp_path, TOLD)
    (file := tmp_path / file_of(3)).with_suffix(".caption").write_text("of a file")
    file.with_suffix(".txt").write_text("of a text")
    chosen = [spec(tmp_path, captions={"kind": "files", "name": name}) for name in ("auto", "txt", "caption")]
    assert [images.caption_texts() for images in chosen] == [TEXTS, ("of a text",), ("of a file",)]
    table = tmp_path / "metadata.csv"
    table.write_text(table.read_text("utf-8-sig").replace("text,score", "words,score", 1))
    assert spec(tmp_path, **FILES).caption_texts() == ("of a text",)
    file.with_suffix(".txt").unlink()
    file.with_suffix(".caption").unlink()
    assert "There are columns words, score: set captions.name to one" in refused(tmp_path, **FILES)


def test_a_run_knows_its_captions_again(tmp_path: Path) -> None:
    later = spec(tmp_path := tmp_path / "later", **FILES)
    assert (later.classes, later.names) == (0, None)  # nothing is there to be counted
    as_lines(tmp_path, TOLD)
    images = spec(tmp_path, **FILES)
    assert type(images).model_validate(later.model_dump(mode="json")).found().classes == len(TEXTS)
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
        ("csv", "file_name,text\nant/00.png,a, b\n", "line 2 has more fields than the first line"),
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
