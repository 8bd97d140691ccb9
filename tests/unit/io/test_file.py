"""Nothing stands under a name until all of it is written; what stood before stands until then."""

import errno
import fcntl
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dumo.io import file, guard
from dumo.types import UserError


def interrupted(half: Path, *inside: str) -> None:
    """Half of a file, or of a folder."""
    half.joinpath(*inside).parent.mkdir(exist_ok=True)
    half.joinpath(*inside).write_bytes(b"other")
    raise KeyboardInterrupt


def test_nothing_stands_in_place_until_all_is_written(tmp_path: Path) -> None:
    """A file, and a folder."""
    path, folder = tmp_path / "new" / "file", tmp_path / "new" / "folder"
    with file.atomic_write(path) as half:
        half.write_bytes(b"half")
        assert not path.exists()
    assert path.read_bytes() == b"half"
    with pytest.raises(KeyboardInterrupt), file.atomic_write(path) as half:
        interrupted(half)
    with pytest.raises(KeyboardInterrupt), file.atomic_write(folder) as half:
        interrupted(half, "a")
    assert path.read_bytes() == b"half"
    assert list(path.parent.iterdir()) == [path]
    with file.atomic_write(folder) as half:
        half.mkdir()
        (half / "a").write_bytes(b"a")
    assert sorted(part.name for part in tmp_path.rglob("*")) == ["a", "file", "folder", "new"]


def test_a_file_never_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    kept = tmp_path / "results" / "kept"
    kept.parent.mkdir()
    kept.write_text("old")
    with pytest.raises(IsADirectoryError):
        file.write(kept.parent, b"new")
    assert kept.read_text() == "old"
    assert [*tmp_path.iterdir()] == [kept.parent]


def test_writers_have_places_of_their_own(tmp_path: Path) -> None:
    with file.atomic_write(tmp_path / "a") as first, file.atomic_write(tmp_path / "a") as second:
        assert first != second
        for half in (first, second):
            half.write_bytes(half.name.encode())
    assert (tmp_path / "a").read_bytes() == first.name.encode()  # the last to be moved there
    assert file.temp_path_for(tmp_path / "a", 0) == tmp_path / ".a.0.tmp"


def test_a_folder_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for content in ("old", "new"):
        with file.atomic_write(path) as temp_path:
            temp_path.mkdir()
            (temp_path / content).touch()
    assert [*tmp_path.iterdir()] == [path]
    assert [*path.iterdir()] == [path / "new"]


def test_what_is_durable_is_flushed_before_it_is_named_and_then_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[tuple[str, bool]] = []
    monkeypatch.setattr(file, "flush", lambda path: flushed.append((path.name, (tmp_path / "a").exists())))
    file.write(tmp_path / "a", b"a", writer="")
    assert not flushed
    (tmp_path / "a").unlink()
    file.write(tmp_path / "a", b"a", writer="", durable=True)
    assert flushed == [(".a.tmp", False), (tmp_path.name, True)]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EACCES])
def test_a_full_disk_is_known_by_its_number_also_where_it_is_text(number: int) -> None:
    for error in (OSError(number, "said"), SafetensorError(f"I/O error: said (os error {number})")):
        assert file.is_disk_full(error) == (number != errno.EACCES)
    assert not file.is_disk_full(SafetensorError("InvalidHeader"))
    assert not file.is_disk_full(ValueError(number))


def test_all_files_are_as_the_umask_wants(tmp_path: Path) -> None:
    """Also those that a library makes for its own eyes."""
    before = os.umask(0o027)
    try:
        file.write(tmp_path / "bytes", b"a")
        with file.atomic_write(tmp_path / "tensors") as half:
            save_file({"x": torch.zeros(1)}, half)
        with file.atomic_write(tmp_path / "folder") as half:
            half.mkdir()
            save_file({"x": torch.zeros(1)}, half / "part")
    finally:
        assert os.umask(before) == 0o027
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"bytes": 0o640, "tensors": 0o640, "folder": 0o750, "part": 0o640}


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space") as raised, file.atomic_write(tmp_path / "a"):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path / "a"))


def test_a_folder_whose_path_is_guarded_is_written_to_where_it_was_alone(tmp_path: Path) -> None:
    """Another one in its place is not, though it has its name."""
    folder, beside = tmp_path / "a", tmp_path / "b"
    folder.mkdir()
    with guard.guard_path(folder):
        file.write(folder / "c/d", b"d")
        folder.rename(tmp_path / "moved")
        for _ in range(2):
            with pytest.raises(UserError, match=r"a was removed, renamed or unmounted"):
                file.write(folder / "c/d", b"e")
            assert not folder.exists() or [*folder.iterdir()] == []
            folder.mkdir(exist_ok=True)
        file.write(beside / "d", b"d")
    file.write(folder / "c/d", b"e")
    assert (tmp_path / "moved/c/d").read_bytes() == b"d"


def test_the_lock_of_another_process_stays(tmp_path: Path) -> None:
    """Where the folder was moved away, and another process holds one of that name."""
    folder = tmp_path / "a"
    folder.mkdir()
    with guard.locked(folder / "lock"):
        folder.rename(tmp_path / "moved")
        folder.mkdir()
        (folder / "lock").touch()
    assert (folder / "lock").exists()


def test_a_lock_on_a_disk_that_is_gone_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what the disk's loss was called stays."""
    lock = tmp_path / "lock"

    def stat(path: Path, **more: bool) -> os.stat_result:
        if path == lock:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return os.stat(path, **more)

    def lose_disk() -> None:
        monkeypatch.setattr(Path, "stat", stat)
        raise UserError("it was unmounted")

    with pytest.raises(UserError, match="was unmounted"), guard.locked(lock):
        lose_disk()
    monkeypatch.undo()
    with guard.locked(lock, busy="it is held still"):
        pass


def test_a_lock_whose_file_cannot_be_looked_at_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "lock"

    def stat(path: Path, **more: bool) -> os.stat_result:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", stat)
        with pytest.raises(OSError, match="lock") as raised, guard.locked(lock):  # which keeps the frames of `locked`
            pass
    with guard.locked(lock, busy="it is held still"):
        assert raised.value.errno == errno.ESTALE


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_folder_without_locks_is_named(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="cannot be locked") as raised, guard.locked(tmp_path / "lock"):
        pass
    assert raised.value.filename == str(tmp_path)
    assert not list(tmp_path.iterdir())


def test_of_a_link_the_link_is_removed(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/a").touch()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    file.remove(tmp_path / "link")
    assert [*tmp_path.iterdir()] == [tmp_path / "kept"]
    assert (tmp_path / "kept/a").exists()
