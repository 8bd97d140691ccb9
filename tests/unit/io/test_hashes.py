"""Items are hashed once, by any number of threads and processes, and what is noted is what was read."""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from dumo.data.image import open_store
from dumo.data.store import FirstImages, store_hashes
from dumo.io import content, inventory, note
from dumo.io.content import Hashes
from dumo.io.inventory import NOTE_NAME
from dumo.run import datacheck
from dumo.runtime import dist
from dumo.types import UserError
from unit.data.animals import COUNT, STORES, as_folder, picture
from unit.data.spy import spied

processes = get_context("fork")


def opened(root: Path, split: str | None = None) -> Hashes:
    store = open_store(root, split=split)
    return Hashes(store.item_files, store.path, store.read, store.labels and store.labels.c)


def whole(root: Path) -> Hashes:
    """All hashed, and noted."""
    found = opened(root)
    found.hash(range(len(found)))
    return found


@pytest.mark.parametrize("form", STORES)
def test_hashes_are_of_the_bytes_and_come_again_with_the_next_start(form: str, tmp_path: Path) -> None:
    STORES[form](tmp_path)
    found = whole(tmp_path)
    for i in range(COUNT):
        assert found.sha256[i].tobytes() == hashlib.sha256(picture(i)).digest()
    again = opened(tmp_path)
    assert not any(again.pending)
    assert (again.sha256 == found.sha256).all()
    assert (again.names, again.fingerprint()) == (found.names, found.fingerprint())


def test_threads_hash_an_item_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_folder(tmp_path)
    found, items = opened(tmp_path), list(range(COUNT)) * 20
    hashed = spied(monkeypatch, Hashes, "_hash", lambda hashes, i, data: i)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: found.check_item(i, picture(i)), items))
    assert set(hashed) == set(range(COUNT))
    assert (found.sha256 == whole(tmp_path).sha256).all()
    before = len(hashed)
    found.check_item(3, b"not looked at again")
    assert len(hashed) == before


def share(root: Path, rank: int) -> None:
    found = opened(root)
    found.hash(range(rank, COUNT, 3))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("form", STORES)
def test_processes_share_a_note(form: str, tmp_path: Path) -> None:
    """What one adds, no other takes away."""
    STORES[form](tmp_path)
    started = [processes.Process(target=share, args=(tmp_path, rank)) for rank in range(3)]
    for process in started:
        process.start()
    for process in started:
        process.join()
        assert process.exitcode == 0
    assert not any(opened(tmp_path).pending)
    assert not list(tmp_path.rglob("*.lock"))


def test_splits_share_a_note(tmp_path: Path) -> None:
    """Where they lie in one folder; what is gone is forgotten."""
    STORES["tar"](tmp_path)
    for k in (0, 1):
        (tmp_path / f"animals-train-00000{k}.tar").rename(tmp_path / f"{('train', 'test')[k]}.tar")
    for split in ("train", "test", "train"):
        found = opened(tmp_path, split)
        found.hash(range(len(found)))
    assert not any(opened(tmp_path, "train").pending)
    assert not any(opened(tmp_path, "test").pending)
    kept = (tmp_path / "test.tar").rename(tmp_path.parent / "test.tar")
    (tmp_path / "train.tar").touch()
    found = opened(tmp_path, "train")
    found.hash(range(len(found)))
    kept.rename(tmp_path / "test.tar")
    assert all(opened(tmp_path, "test").pending)


@pytest.mark.parametrize("form", ["parquet", "tar"])
def test_the_first_items_and_all_share_a_note(form: str, tmp_path: Path) -> None:
    """What is hashed of a part is known of the whole, and a part takes nothing away."""

    def first(count: int) -> Hashes:
        return store_hashes(FirstImages(open_store(tmp_path), count))

    STORES[form](tmp_path)
    first(3).hash(range(3))
    found = opened(tmp_path)
    assert [i for i in range(COUNT) if not found.pending[i]] == [0, 1, 2]
    assert found.status.tolist()[0] == inventory.SAME
    sha256 = whole(tmp_path).sha256
    found = first(9)
    assert not any(found.pending)
    found.forget()
    found.hash(range(9))
    assert (opened(tmp_path).sha256 == sha256).all()


@pytest.mark.parametrize("form", ["parquet", "tar"])
def test_an_archive_that_changed_is_suspected_until_all_its_items_are_hashed(form: str, tmp_path: Path) -> None:
    STORES[form](tmp_path)
    before = whole(tmp_path)
    os.utime(before.files.paths[0])
    opened(tmp_path).hash([0])
    found = opened(tmp_path)
    assert found.status.tolist() == [inventory.CHANGED, inventory.SAME]
    found.expect(before.sha256, "is another")
    assert found.suspects().tolist() == list(range(before.files.counts[0]))
    found.hash(found.suspects())
    again = opened(tmp_path)
    assert again.status.tolist() == [inventory.SAME, inventory.SAME]
    assert not any(again.pending)


def test_what_changed_is_told_apart(tmp_path: Path) -> None:
    """Touched, copied, new; each is suspected as it deserves."""
    as_folder(tmp_path)
    before = whole(tmp_path).sha256.copy()
    pngs = sorted(tmp_path.rglob("*.png"))
    os.utime(pngs[0])
    was = pngs[1].stat().st_mtime_ns
    (other := tmp_path / "other").write_bytes(pngs[1].read_bytes())
    os.utime(other, ns=(was, was))
    other.replace(pngs[1])
    pngs[2].write_bytes(picture(7) + b"longer")
    found = opened(tmp_path)
    assert [i for i in range(COUNT) if found.pending[i]] == [0, 1, 2]
    found.expect(before, "is another")
    assert found.suspects().tolist() == [0, 2]
    assert found.suspects(copies=True).tolist() == [0, 1, 2]
    found.hash(found.suspects())
    assert found.mismatches().tolist() == [2]
    assert (found.expected_or_known_hashes() == before).all()
    found.check_item(1, pngs[1].read_bytes())
    again = opened(tmp_path)
    assert again.status[:4].tolist() == [inventory.SAME, inventory.COPIED, inventory.SAME, inventory.SAME]
    again.expect(before, "is another")
    assert again.mismatches().tolist() == [2]  # it was noted as it is


def test_a_broken_link_is_noted_as_any_file(tmp_path: Path) -> None:
    """Once it leads to an image, it has changed."""
    as_folder(root := tmp_path / "images")
    link = min(root.rglob("*.png"))
    image = link.rename(tmp_path / "image.png")
    link.symlink_to(tmp_path / "other.png")
    whole(root)
    assert opened(root).status[0] == inventory.SAME
    image.rename(tmp_path / "other.png")
    assert opened(root).status[0] == inventory.CHANGED


def test_another_content_is_refused_each_time_it_is_read(tmp_path: Path) -> None:
    as_folder(tmp_path)
    before = whole(tmp_path).sha256.copy()
    (tmp_path / NOTE_NAME).unlink()
    found = opened(tmp_path)
    found.expect(before, "is another")
    for _ in range(2):
        with pytest.raises(UserError, match=r"ant/01\.png is another"):
            found.check_item(1, b"other")
    found.check_item(0, picture(0))
    assert (found.expected_or_known_hashes() == before).all()


@pytest.mark.parametrize("damage", [b"", b"note", None])
def test_a_damaged_note_is_no_note(damage: bytes | None, tmp_path: Path) -> None:
    as_folder(tmp_path)
    whole(tmp_path)
    data = bytearray((tmp_path / NOTE_NAME).read_bytes())
    data[-3] ^= 1
    (tmp_path / NOTE_NAME).write_bytes(data if damage is None else damage)
    assert all(opened(tmp_path).pending)
    whole(tmp_path)
    assert not any(opened(tmp_path).pending)


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "DUMO_CACHE"])
def test_a_folder_that_may_not_be_written(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_folder(root := tmp_path / "images")
    monkeypatch.setenv(variable, str(tmp_path / "home"))
    writable = note.is_writable
    monkeypatch.setattr(note, "is_writable", lambda place: root not in place.parents and writable(place))
    whole(root)
    assert not (root / NOTE_NAME).exists()
    assert list((tmp_path / "home").rglob(NOTE_NAME.removeprefix(".")))
    assert not any(opened(root).pending)
    monkeypatch.setattr("dumo.io.note.is_writable", lambda place: False)
    os.utime(next(root.rglob("*.png")))
    assert sum(whole(root).pending) == 0
    assert sum(opened(root).pending) == 1


def test_a_user_without_a_home_has_the_note_next_to_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(user: int) -> NoReturn:
        raise KeyError(user)

    as_folder(tmp_path)
    for variable in ("DUMO_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    whole(tmp_path)
    assert not any(opened(tmp_path).pending)
    assert (tmp_path / NOTE_NAME).exists()


def test_names_of_any_bytes() -> None:
    names = ["/a\nb", "/c d", os.fsdecode(b"/\xff")]
    assert inventory.split_names(inventory.join_names(names)) == names
    assert (
        content.name_changes(inventory.join_names(names), inventory.join_names([*names[:2], "/e"]))
        == f"{names[2][1:]} gone, e new"
    )
    assert (
        content.name_changes(inventory.join_names(names), inventory.join_names(names[::-1]))
        == "they are in another order"
    )
    with pytest.raises(UserError, match="damaged"):
        content.unpack_names(b"no names")


def test_ranks_that_read_other_contents_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint has what any of them has read."""
    as_folder(tmp_path)
    found, there = opened(tmp_path), torch.from_numpy(whole(tmp_path).sha256)
    found.sha256[:] = 0
    found.check_item(0, picture(0))
    monkeypatch.setattr(dist, "world", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce_max", lambda x: torch.maximum(x, there))
    monkeypatch.setattr("dumo.training.agreement.gather_results", lambda work: [work()])
    assert torch.equal(datacheck.tensors_to_save(found)["hashes"], there)
    with pytest.raises(UserError, match="another on another rank"):
        found.check_item(1, b"other")
    found.expected = None
    with pytest.raises(UserError, match=r"01\.png is another on another rank"):
        datacheck.tensors_to_save(found)


def test_ranks_wait_for_one_that_hashes_images_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As --verify does, of the images of latents on one rank of a machine alone."""
    as_folder(tmp_path)
    waits: list[bool] = []

    def gather_results(work: Callable[[], object], *, is_long: bool = False) -> list[object]:
        waits.append(is_long)
        return [work()]

    class Source:
        hashes = opened(tmp_path)

        class Origin:
            def verify(self) -> None: ...

            def require(self, wait: float = 0.0) -> None: ...

        origin = Origin()

    monkeypatch.setattr("dumo.training.agreement.gather_results", gather_results)
    datacheck.verify_data(Source(), tmp_path, None, accept=False, verify=True)
    assert waits == [True, True]
