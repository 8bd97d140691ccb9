"""A changed image is refused by name: what images were is kept in the run's folder, to which it only appends."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dumo.data import ledger as module
from dumo.data.images import labels_of
from dumo.data.ledger import FILE, HASH_BYTES, Ledger
from dumo.data.rows import open_rows
from dumo.run import data as run_data
from dumo.training import agreement
from dumo.types import UserError
from unit.data.animals import COUNT, STORES, as_folder, picture


def opened(root: Path) -> Ledger:
    rows = open_rows(root)
    labels = labels_of(rows)
    return Ledger(rows, labels.c if labels else None)


def hashed(root: Path) -> Ledger:
    ledger = opened(root)
    ledger.hash(range(len(ledger)))
    return ledger


@pytest.mark.parametrize("form", STORES)
def test_records_are_of_the_bytes_and_come_back(form: str, tmp_path: Path) -> None:
    STORES[form](tmp_path / "images")
    ledger = hashed(tmp_path / "images")
    for i in range(COUNT):
        assert ledger.records["sha256"][i].tobytes() == hashlib.sha256(picture(i)).digest()[:HASH_BYTES]
    file = tmp_path / FILE
    module.start(file, ledger)
    module.append(file, ledger.take_new())
    recorded = module.read(file, file.stat().st_size)
    assert (recorded.records == ledger.records).all()
    assert opened(tmp_path / "images").difference(recorded) == ""
    assert len(ledger.take_new()) == 0


def test_threads_hash_an_image_once(tmp_path: Path) -> None:
    as_folder(tmp_path)
    ledger = opened(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: ledger.check(i, picture(i)), [*range(COUNT)] * 20))
    assert sorted(ledger.take_new()["image"].tolist()) == [*range(COUNT)]


def test_what_changed_is_told_apart(tmp_path: Path) -> None:
    """Touched, of another size, and swapped with size and time kept: each is noticed when it can be."""
    as_folder(tmp_path)
    before = hashed(tmp_path).recorded()
    pngs = sorted(tmp_path.rglob("*.png"))
    os.utime(pngs[0], ns=(5, 5))
    pngs[2].write_bytes(picture(7) + b"longer")
    time = pngs[1].stat().st_mtime_ns
    content = bytearray(picture(1))
    content[-1] ^= 1
    pngs[1].write_bytes(content)
    os.utime(pngs[1], ns=(time, time))
    ledger = opened(tmp_path)
    ledger.expect(before.records, "is another")
    assert ledger.suspects().tolist() == [0, 2]
    ledger.hash(ledger.suspects())
    assert ledger.changed().tolist() == [2]
    for _ in range(2):
        with pytest.raises(UserError, match=r"ant/01\.png is another"):
            ledger.check(1, bytes(content))
    ledger.check(3, picture(3))
    assert sorted(ledger.take_new()["image"].tolist()) == [0, 2, 3]


def test_an_image_of_another_size_is_known_without_reading_it(tmp_path: Path) -> None:
    """Though the run had not read it before."""
    as_folder(tmp_path / "images")
    module.start(tmp_path / FILE, opened(tmp_path / "images"))
    (tmp_path / "images/bee/05.png").write_bytes(b"longer" * 99)
    ledger = opened(tmp_path / "images")
    ledger.expect(module.read(tmp_path / FILE, (tmp_path / FILE).stat().st_size).records, "is another")
    assert ledger.changed_text(ledger.changed()) == str(tmp_path / "images/bee/05.png")


@pytest.mark.parametrize("change", ["add", "remove", "rename", "class"])
def test_names_and_classes_are_compared(change: str, tmp_path: Path) -> None:
    as_folder(tmp_path)
    before = opened(tmp_path).recorded()
    file = tmp_path / "ant/00.png"
    said = {"add": "ant/new.png new", "remove": "ant/00.png gone", "rename": "ant/00.png gone, ant/new.png new"}
    if change == "add":
        file.with_name("new.png").write_bytes(picture(0))
    elif change == "remove":
        file.unlink()
    elif change == "rename":
        file.rename(file.with_name("new.png"))
    ledger = opened(tmp_path)
    if change == "class":
        ledger = Ledger(open_rows(tmp_path))
    assert ledger.difference(before) == said.get(change, "with different classes")


def test_the_file_is_only_appended_to_and_cut_back(tmp_path: Path) -> None:
    """A checkpoint's length says what it was; a block of names begins the records anew."""
    as_folder(tmp_path / "images")
    ledger = opened(tmp_path / "images")
    file = tmp_path / FILE
    module.start(file, ledger)
    ledger.hash([0, 1])
    module.append(file, ledger.take_new())
    length = file.stat().st_size
    content = file.read_bytes()
    ledger.hash([2])
    module.append(file, ledger.take_new())
    assert file.read_bytes()[:length] == content
    assert module.read(file, length).records["sha256"].any(1).nonzero()[0].tolist() == [0, 1]
    assert module.read(file, file.stat().st_size).records["sha256"].any(1).nonzero()[0].tolist() == [0, 1, 2]
    module.truncate(file, length)
    assert file.read_bytes() == content
    module.start(file, ledger)
    assert not module.read(file, file.stat().st_size).records["sha256"].any()


@pytest.mark.parametrize("damage", ["gone", "short", "a bit", "no blocks"])
def test_a_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    as_folder(tmp_path / "images")
    file = tmp_path / FILE
    module.start(file, hashed(tmp_path / "images"))
    data = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    elif damage == "no blocks":
        file.write_bytes(b"x" * len(data))
    else:
        data[60] ^= 1  # in the compressed names
        file.write_bytes(data[:-5] if damage == "short" else data)
    with pytest.raises(UserError, match=FILE):
        module.read(file, len(data))


def test_ranks_that_read_other_contents_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint has what any of them has read, and each rank expects it from then on."""
    as_folder(tmp_path / "images")
    here = opened(tmp_path / "images")
    there = opened(tmp_path / "images")
    module.start(tmp_path / FILE, here)

    def gather_results(work: object, *, is_long: bool = False) -> list[object]:
        return [here.take_new(), there.take_new()] if work == here.take_new else [work()]  # pyright: ignore

    monkeypatch.setattr(agreement, "gather_results", gather_results)
    here.check(0, picture(0))
    there.check(0, picture(0))
    there.check(1, picture(1))
    entry = run_data.save_ledger(tmp_path, here)
    assert entry is not None
    recorded = module.read(tmp_path / FILE, entry.bytes)
    assert recorded.records["sha256"].any(1).nonzero()[0].tolist() == [0, 1]
    with pytest.raises(UserError, match=r"ant/01\.png"):
        here.check(1, b"other")
    here.check(2, picture(2))
    there.check(2, b"other")
    with pytest.raises(UserError, match=r"ant/02\.png differs between ranks"):
        run_data.save_ledger(tmp_path, here)
