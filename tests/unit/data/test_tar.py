"""Archives are looked through once, and a hole in one is not taken for its end."""

import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dumo.data import tar
from dumo.data.tar import Tar
from dumo.types import UserError
from unit.data.animals import archive
from unit.data.spy import spied

BLOCK = tarfile.BLOCKSIZE
EACH = 10  # images to an archive
NAMES = ["a", "b", "c"]


def written(root: Path, name: str, first: int, count: int = EACH) -> Path:
    """An archive of images, which are their numbers, each with its number mod 7 as its class."""
    members: dict[str, bytes] = {}
    for i in range(first, first + count):
        members |= {f"{name}/{i:04}.png": b"%04d" % i, f"{name}/{i:04}.cls": b"%d" % (i % 7)}
    archive(file := root / f"{name}.tar", members)
    return file


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    return [str(written(tmp_path / "set", name, EACH * k)) for k, name in enumerate(NAMES)]


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The archives that are looked through from here on."""
    return spied(monkeypatch, tar, "scan_archive", lambda file: Path(file).stem)


def numbers(source: Tar) -> list[int]:
    """What is read, in order; each with its own class and name."""
    assert source.labels is not None
    found = [int(source.read(i)) for i in range(len(source))]
    assert source.labels.c.tolist() == [i % 7 for i in found]
    assert all(f"/{i:04}.png" in source.path(row) for row, i in enumerate(found))
    return found


def test_an_index_stands_for_the_archives(files: list[str], looked: list[str]) -> None:
    """They are looked through once; then what was found is mapped, however many images there are."""
    assert numbers(Tar(files, labelled=True)) == list(range(30))
    assert looked == NAMES
    again = Tar(files, labelled=True)
    assert numbers(again) == list(range(30))
    assert Tar(files, labelled=False).labels is None
    assert looked == NAMES
    mapped = Path("/proc/self/maps").read_text()
    assert all(str(note) in mapped for note in Path(files[0]).with_name(tar.NOTE_FOLDER).iterdir())
    assert len(again) == 3 * EACH


def test_what_was_found_stays_though_a_later_archive_is_damaged(files: list[str], looked: list[str]) -> None:
    os.truncate(files[2], 3 * BLOCK)
    with pytest.raises(UserError, match=r"c\.tar"):
        Tar(files, labelled=True)
    written(Path(files[2]).parent, "c", 20)
    Tar(files, labelled=True)
    assert looked == [*NAMES, "c"]


def test_only_what_changed_is_looked_through_again(files: list[str], looked: list[str]) -> None:
    """A part of the set, another order, one more, one less, one replaced or touched: the images are always theirs."""
    Tar(files, labelled=True)
    looked.clear()
    assert numbers(Tar(files[1:2], labelled=True)) == list(range(10, 20))
    assert numbers(Tar([files[2], files[0]], labelled=True)) == [*range(20, 30), *range(10)]
    assert not looked
    more = str(written(Path(files[0]).parent, "aa", 100, 3))
    assert numbers(Tar([files[0], more, *files[1:]], labelled=True)) == [*range(10), 100, 101, 102, *range(10, 30)]
    assert looked == ["aa"]
    written(Path(files[0]).parent, "a", 200)
    os.utime(files[1], ns=(1, 1))
    assert numbers(Tar(files, labelled=True)) == [*range(200, 210), *range(10, 30)]
    assert looked == ["aa", "a", "b"]


def spoilt(place: Path) -> Iterator[str]:
    """The index in one damaged way after the other, and the archive that this note is of."""
    for file in sorted(place.iterdir()):
        data = file.read_bytes()
        for other in (data[:-1], data[: len(data) // 2], b"", data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]):
            file.write_bytes(other)
            yield file.name.partition(".")[0]
            assert file.read_bytes() == data  # made again
        file.unlink()
        yield file.name.partition(".")[0]


def test_a_damaged_index_is_made_again(files: list[str], looked: list[str]) -> None:
    """Any file cut, emptied, gone, or with another number in it."""
    Tar(files, labelled=True)
    for count, name in enumerate(spoilt(Path(files[0]).parent / tar.NOTE_FOLDER), len(NAMES) + 1):
        assert numbers(Tar(files, labelled=True)) == list(range(30))
        assert looked[-1] == name
        assert len(looked) == count


def test_where_archives_may_not_be_written_beside_the_index_lies_elsewhere(
    files: list[str], looked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the user's cache; where that may not be written either, nowhere."""
    root, home = Path(files[0]).parent, tmp_path / "home"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    monkeypatch.setattr("dumo.io.note.is_writable", lambda place: root not in place.parents)
    for _ in range(2):
        assert numbers(Tar(files, labelled=True)) == list(range(30))
    assert looked == NAMES
    assert not (root / tar.NOTE_FOLDER).exists()
    assert list(home.glob("dumo/*/dumo-index/c.tar.safetensors"))
    shutil.rmtree(home)
    monkeypatch.setattr("dumo.io.note.is_writable", lambda place: False)
    assert numbers(Tar(files, labelled=True)) == list(range(30))
    assert looked == NAMES * 2


def test_an_index_that_cannot_be_written_stops_nothing(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(note: Path, found: tar.Scan, state: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tar, "_write_note", full)
    with pytest.warns(UserWarning, match="cannot be written"):
        assert numbers(Tar(files, labelled=True)) == list(range(30))


def test_members_that_end_like_images_are_not_left_out_silently(tmp_path: Path) -> None:
    """Also where the archive was looked through before. A mask that goes with an image is not missed."""
    archive(
        tmp_path / "a.tar", {"a/1.png": b"1", "a/Shot at 10.30.12.png": b"2", "a/1.seg.PNG": b"3", "a/2.seg.png": b"4"}
    )
    for _ in range(2):
        with pytest.warns(
            UserWarning, match=r"2 members of tar archives are left out, such as a/Shot at 10\.30\.12\.png"
        ):
            source = Tar([str(tmp_path / "a.tar")], labelled=True)
        assert len(source) == 1


END = EACH * 4 * BLOCK  # ten images and ten labels, each a header and a block


@pytest.mark.parametrize(
    ("first", "last"),
    [
        (0, BLOCK),  # the first header
        (20 * BLOCK, 21 * BLOCK),  # one in the middle
        (20 * BLOCK, 24 * BLOCK),  # an image and its label, whole
        (END // 2, END),  # the other half: as a download that was not finished
        (END - 4 * BLOCK, END - 3 * BLOCK),  # the last image's
        (20 * BLOCK + 148, 20 * BLOCK + 156),  # a header's own checksum
    ],
)
def test_zeros_in_an_archive_are_named(tmp_path: Path, first: int, last: int) -> None:
    """Whoever reads to the first block of zeros has some of the images, and no word of the others."""
    file = written(tmp_path, "a", 0)
    data = bytearray(file.read_bytes())
    data[first:last] = bytes(last - first)
    file.write_bytes(data)
    with pytest.raises(UserError, match=rf"{file} "):
        Tar([str(file)], labelled=True)


def test_more_zeros_than_any_record_takes_and_what_lies_behind_an_end_are_named(tmp_path: Path) -> None:
    file = written(tmp_path, "c", 0, 200)
    half, data = 200 * 2 * BLOCK, file.read_bytes()
    file.write_bytes(data[:half] + bytes(len(data) - half))
    with pytest.raises(UserError, match=r"zeros from byte .*a part of it is missing"):
        Tar([str(file)], labelled=True)
    one, other = written(tmp_path, "a", 0), written(tmp_path, "b", 10)
    one.write_bytes(one.read_bytes() + other.read_bytes())
    with pytest.raises(UserError, match="goes on after its end"):
        Tar([str(one)], labelled=True)


@pytest.mark.parametrize("zeros", [1, 2, 20, 512])
def test_ends_that_writers_make_are_whole(tmp_path: Path, zeros: int) -> None:
    """A block of zeros, two as POSIX asks, or as many as fill a record of a size that is asked for."""
    file = written(tmp_path, "a", 0)
    os.truncate(file, END)
    os.truncate(file, END + zeros * BLOCK if zeros < 512 else 512 * BLOCK)
    assert numbers(Tar([str(file)], labelled=True)) == list(range(10))


def test_an_archive_that_became_shorter_is_said_of_the_image(files: list[str]) -> None:
    source = Tar(files, labelled=True)
    os.truncate(files[0], BLOCK + 2)
    with pytest.raises(ValueError, match="cut off"):
        source.read(0)
    assert int(source.read(10)) == 10
