"""Nothing stands under a name until all of it is written; what stood before stands until then."""

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from dumo.io import file


def _interrupt(half: Path) -> None:
    half.write_bytes(b"other")
    raise KeyboardInterrupt


def _interrupt_in(half: Path) -> None:
    half.mkdir()
    _interrupt(half / "a")


def test_nothing_stands_in_place_until_all_is_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with file.whole(path) as half:
        half.write_bytes(b"half")
        assert not path.exists()
    assert path.read_bytes() == b"half"
    with pytest.raises(KeyboardInterrupt), file.whole(path) as half:
        _interrupt(half)
    assert path.read_bytes() == b"half"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with pytest.raises(KeyboardInterrupt), file.whole(path) as half:
        _interrupt_in(half)
    assert not list(tmp_path.iterdir())
    with file.whole(path) as half:
        half.mkdir()
        (half / "a").write_bytes(b"a")
    assert [part.name for part in tmp_path.rglob("*")] == ["folder", "a"]


def test_writers_have_places_of_their_own(tmp_path: Path) -> None:
    with file.whole(tmp_path / "a") as first, file.whole(tmp_path / "a", writer=0) as second:
        assert str(os.getpid()) in first.name
        assert second == tmp_path / ".a.0.tmp"
        for half in (first, second):
            half.write_bytes(half.name.encode())
    assert (tmp_path / "a").read_bytes() == first.name.encode()  # the last to be moved there
    assert file.hidden(tmp_path / "a") == tmp_path / ".a.tmp"


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
        assert file.full(error) == (number != errno.EACCES)
    assert not file.full(SafetensorError("InvalidHeader"))
    assert not file.full(ValueError(number))
