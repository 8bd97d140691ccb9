"""Captions find their images by name; what lacks its other half is named, and too much of it is refused."""

import json
import unicodedata
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unit.data.animals import COUNT, archive, as_folder, picture, refused, spec, table

FILES = {"captions": {"kind": "files"}}
NAMES = [f"é {i:02}.png" for i in range(COUNT)]  # composed: form C


def images(root: Path, names: Iterable[str] = NAMES) -> Path:
    root.mkdir(parents=True)
    for i, name in enumerate(names):
        (root / name).write_bytes(picture(i))
    return root


def rows(root: Path, names: Iterable[str], texts: Iterable[str | None] | None = None) -> None:
    lines = [{"file_name": name, "text": f"a {i}"} for i, name in enumerate(names)]
    for line, text in zip(lines, texts or (), strict=False):
        line["text"] = text
    (root / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def texts(root: Path, names: Iterable[str], suffix: str = ".txt") -> None:
    for i, name in enumerate(names):
        (root / name).with_suffix(suffix).write_text(f"a {i}")


@pytest.mark.parametrize(("of_image", "of_caption"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_name_is_the_same_in_both_forms_of_unicode(tmp_path: Path, of_image: str, of_caption: str) -> None:
    """Also of the images that are edited; the caption's own text stays as it is."""
    written = [unicodedata.normalize(of_caption, name) for name in NAMES]
    there = [unicodedata.normalize(of_image, name) for name in NAMES]
    assert written != there
    rows(images(tmp_path / "table", there), written, [unicodedata.normalize(of_caption, "é")] * COUNT)
    assert spec(tmp_path / "table", **FILES).caption_texts() == (unicodedata.normalize(of_caption, "é"),)
    texts(images(tmp_path / "texts", there), written)
    assert spec(tmp_path / "texts", **FILES).classes == COUNT
    images(tmp_path / "before", there)
    lines = [{"file_name": name, "text": "so", "of": f"../before/{name}"} for name in written]
    (tmp_path / "table/metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert spec(tmp_path / "table", captions={"kind": "files", "source": "of"}).classes == COUNT


def test_other_paths_to_an_image_are_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_folder(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    found = [str(file.relative_to("images")) for file in sorted(Path("images").rglob("*.png"))]
    ways = [f"./{found[0]}", str(Path("images", found[1]).absolute()), found[2].replace("/", "\\"), f"x/../{found[3]}"]
    rows(Path("images"), [*ways, *found[4:]])
    assert spec(Path("images"), **FILES).caption_texts() == tuple(f"a {i}" for i in range(COUNT))


@pytest.mark.parametrize(
    ("change", "pair"),
    [
        (str.upper, "'É 00.PNG' in metadata.jsonl line 1 and the image 'é 00.png'"),
        (lambda name: name.replace(" ", ""), "'é00.png' in metadata.jsonl line 1 and the image 'é 00.png'"),
        (lambda name: f"photos/{name}", "'photos/é 00.png' in metadata.jsonl line 1 and the image 'é 00.png'"),
        (lambda name: name.removesuffix(".png"), "'é 00' in metadata.jsonl line 1 and the image 'é 00.png'"),
    ],
)
def test_a_name_that_is_nearly_the_same_is_another_and_is_said(
    tmp_path: Path, change: Callable[[str], str], pair: str
) -> None:
    rows(images(tmp_path / "images"), [*map(change, NAMES[:2]), *NAMES[2:]])
    told = refused(tmp_path / "images", **FILES)
    assert f"2 of {COUNT} rows without an image" in told
    assert f"nearly the same are {pair}" in told


def test_of_a_name_with_dots_only_the_endings_of_images_and_texts_are_left_out(tmp_path: Path) -> None:
    texts(images(tmp_path / "images"), NAMES)
    (tmp_path / "images/Mr. Smith.jpg").write_bytes(picture(0))
    (tmp_path / "images/Mr. Jones.txt").write_text("a man")
    with pytest.warns(UserWarning, match="without") as caught:
        spec(tmp_path / "images", **FILES)
    assert [str(warned.message).removeprefix(f"{tmp_path}/images: ") for warned in caught] == [
        f"1 of {COUNT + 1} files of text without an image: 'Mr. Jones.txt'",
        f"1 of {COUNT + 1} images without a caption: 'Mr. Smith.jpg'",
    ]


@pytest.mark.parametrize("ending", [".txt", ".caption", ".json"])
def test_a_member_of_nearly_the_same_name_is_said(tmp_path: Path, ending: str) -> None:
    text = b'{"caption": "a"}' if ending == ".json" else b"a"
    members = {f"{name}_{i:02}.png": picture(i) for name in ("a", "B") for i in range(COUNT)}
    members |= {f"{name}_{i:02}{ending}": text for name in ("a", "b") for i in range(COUNT)}
    archive(tmp_path / "all.tar", members)
    place = f"{tmp_path}/all.tar member"
    assert f"nearly the same are '{place} b_00{ending}' and the image '{place} B_00.png'" in refused(tmp_path, **FILES)


@pytest.mark.parametrize(
    ("named", "suffix"), [("É 00.txt", ".txt"), ("é 00.TXT", ".TXT"), ("é 00.png.txt", ".png.txt")]
)
def test_a_text_of_nearly_the_same_name_is_not_read_and_is_said(tmp_path: Path, named: str, suffix: str) -> None:
    """Where no image at all has a caption, too: such a folder is not taken for one without captions."""
    folder = images(tmp_path / "images")
    for name in NAMES:
        changed = name.upper() if named.startswith("É") else name
        (folder / changed).with_suffix(suffix).write_text("a text")
    told = refused(folder, **FILES)
    assert f"{COUNT} of {COUNT} files of text without an image" in told
    assert f"nearly the same are '{named}' and the image 'é 00.png'" in told
    for file in folder.iterdir():
        if "00" not in file.name:
            file.unlink()
    told = refused(folder, **FILES)
    assert f"1 of 1 image without a caption: 'é 00.png'; nearly the same are '{named}'" in told


def test_a_few_that_lack_their_other_half_are_named(tmp_path: Path) -> None:
    rows(images(tmp_path / "table"), [*NAMES[1:], "gone.png"])
    with pytest.warns(UserWarning, match="without") as caught:
        assert spec(tmp_path / "table", **FILES).all_captions().counts.tolist() == [1] * COUNT
    assert [str(warned.message).removeprefix(f"{tmp_path}/table: ") for warned in caught] == [
        f"1 of {COUNT} rows without an image: 'gone.png' in metadata.jsonl line 12",
        f"1 of {COUNT} images without a caption: 'é 00.png'",
    ]
    texts(images(tmp_path / "texts"), [*NAMES, "README", "LICENSE", "more"])
    with pytest.warns(UserWarning, match="3 of 15 files of text without an image: 'LICENSE.txt', 'README.txt', 'more"):
        assert spec(tmp_path / "texts", **FILES).classes == COUNT


def test_more_than_a_tenth_is_refused(tmp_path: Path) -> None:
    rows(images(tmp_path / "rows"), [*NAMES, "gone.png", "lost.png"])
    told = refused(tmp_path / "rows", **FILES)
    assert "2 of 14 rows without an image: 'gone.png' in metadata.jsonl line 13, 'lost.png' in" in told
    assert "More than 10% are refused: mend the names, bring the images, or remove these rows" in told
    texts(images(tmp_path / "texts"), [*NAMES, *(f"gone {i}.png" for i in range(4))])
    told = refused(tmp_path / "texts", **FILES)
    assert "4 of 16 files of text without an image: 'gone 0.txt', 'gone 1.txt', 'gone 2.txt' and 1 more" in told
    rows(images(tmp_path / "images"), NAMES[2:])
    told = refused(tmp_path / "images", **FILES)
    assert f"2 of {COUNT} images without a caption: 'é 00.png', 'é 01.png'. More than 10% are refused" in told
    assert "by a row with an empty text" in told
    members = {f"{i:04}.png": picture(i) for i in range(COUNT)} | {f"{i:04}.txt": b"a" for i in range(2, COUNT)}
    archive(tmp_path / "tar/all.tar", members)
    told = refused(tmp_path / "tar", **FILES)
    assert f"2 of {COUNT} images without a caption: '{tmp_path}/tar/all.tar member 0000.png'" in told
    assert "by an empty .txt" in told


def test_an_image_may_have_no_caption_on_purpose(tmp_path: Path) -> None:
    """By a blank text in whatever store, without a word."""
    rows(images(tmp_path / "rows"), NAMES, ["", None, " \n"])
    texts(images(tmp_path / "texts"), NAMES)
    for name in NAMES[:3]:
        (tmp_path / "texts" / name).with_suffix(".txt").write_text(" \n")
    members = {f"{i:04}.png": picture(i) for i in range(COUNT)}
    members |= {f"{i:04}.json": json.dumps({"caption": f"a {i}" if i > 2 else None}).encode() for i in range(COUNT)}
    archive(tmp_path / "tar/all.tar", members)
    (tmp_path / "parquet").mkdir()
    said = [None, "", " ", *(f"a {i}" for i in range(3, COUNT))]
    pq.write_table(table(range(COUNT), text=pa.array(said)), tmp_path / "parquet/all.parquet")
    for store in ("rows", "texts", "tar", "parquet"):
        assert spec(tmp_path / store, **FILES).caption_texts() == tuple(f"a {i}" for i in range(3, COUNT))


def test_a_run_that_has_begun_is_not_asked_again(tmp_path: Path) -> None:
    """Its digest says what its captions are."""
    rows(images(tmp_path / "images"), NAMES, [""] * 6)
    begun = spec(tmp_path / "images", **FILES)
    lines = (tmp_path / "images/metadata.jsonl").read_text().splitlines()[6:]
    (tmp_path / "images/metadata.jsonl").write_text("\n".join(lines))
    assert "6 of 12 images without a caption" in refused(tmp_path / "images", **FILES)
    begun.open()


def test_images_of_other_splits_lose_nothing(tmp_path: Path) -> None:
    for part in ("train", "test"):
        images(tmp_path / "texts" / part)
        texts(tmp_path / "texts" / part, NAMES)
        images(tmp_path / "rows" / part)
    rows(tmp_path / "rows", [f"{part}/{name}" for part in ("train", "test") for name in NAMES])
    for store in ("texts", "rows"):
        assert spec(tmp_path / store, **FILES, split="train").classes == COUNT


def test_texts_that_are_shared_or_not_read_are_said(tmp_path: Path) -> None:
    texts(images(tmp_path / "shared", [*NAMES[:3], "é 00.jpg"]), NAMES[:3])
    with pytest.warns(
        UserWarning, match=r"1 file of text with several images of one name.*'é 00.txt' of .*jpg', .*png"
    ):
        assert spec(tmp_path / "shared", **FILES).classes == 3
    texts(images(tmp_path / "both"), NAMES)
    texts(tmp_path / "both", NAMES[:4], ".caption")
    with pytest.warns(UserWarning, match=r"4 files of text not read.*'é 00.caption', .* and 1 more"):
        assert spec(tmp_path / "both", **FILES).classes == COUNT


def test_a_folder_of_other_texts_has_no_captions(tmp_path: Path) -> None:
    (images(tmp_path / "images") / "README.txt").write_text("read me")
    assert "no captions found" in refused(tmp_path / "images", **FILES)
    (tmp_path / "images/captions.csv").write_text("file_name,text\n")
    assert "There is captions.csv: call it metadata.csv," in refused(tmp_path / "images", **FILES)
    (tmp_path / "images/metadata.jsonl").write_text('{"file_name": "gone.png", "boxes": [[1, 2]]}\n')
    assert "no captions found" in refused(tmp_path / "images", **FILES)
    with warnings.catch_warnings(record=True) as caught:
        refused(tmp_path / "images", **FILES)
    assert not caught


@pytest.mark.parametrize(
    ("ending", "named"),
    [(".csv", "metadata.csv"), (".tsv", "metadata.csv"), (".JSONL", "metadata.jsonl")],
)
def test_a_table_of_another_name_keeps_its_kind(tmp_path: Path, ending: str, named: str) -> None:
    (images(tmp_path / "images") / f"labels{ending}").write_text("")
    assert f"There is labels{ending}: call it {named}, or leave out" in refused(tmp_path / "images", **FILES)
    (tmp_path / "images/more.csv").write_text("")
    names = " or ".join(dict.fromkeys([named, "metadata.csv"]))
    assert f"labels{ending}, more.csv: call it {names}, or" in refused(tmp_path / "images", **FILES)


def test_an_archive_whose_json_has_no_captions_has_none(tmp_path: Path) -> None:
    """Whatever other texts are in it."""
    members = {f"{i:04}.png": picture(i) for i in range(COUNT)}
    members |= {f"{i:04}.json": b'{"width": 8}' for i in range(COUNT)}
    members |= {f"{i:04}.jpg": picture(i) for i in range(2)}  # nor are captions shared
    members |= {f"{name}.txt": b"read me" for name in ("README", "LICENSE", "a", "b")}
    archive(tmp_path / "all.tar", members)
    with warnings.catch_warnings(record=True) as caught:
        assert f"no captions found for the {COUNT + 2} images" in refused(tmp_path, **FILES)
    assert not caught
