"""Row groups are kept up to so many bytes; of a larger one a row is read with little memory; damage is named."""

import os
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Barrier

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dumo.data import parquet
from dumo.data.parquet import BATCH_ROWS, Parquet
from dumo.types import UserError
from unit.data.animals import refused, spec
from unit.data.spy import spied

ROWS, GROUP = 300, 150  # more rows to a group than are streamed at a time
assert GROUP > 2 * BATCH_ROWS


def image(i: int) -> bytes:
    """A thousand bytes."""
    return b"%04d" % i * 250


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Two tables of two groups each."""
    for k in range(2):
        rows = [{"bytes": image(i), "path": ""} for i in range(k * ROWS, (k + 1) * ROWS)]
        made = pa.table({"image": rows})
        settings = {"row_group_size": GROUP, "write_page_checksum": True, "data_page_size": 4096}
        pq.write_table(made, tmp_path / f"{k}.parquet", compression="none", use_dictionary=False, **settings)
    return sorted(map(str, tmp_path.iterdir()))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Which groups are read whole from here on."""
    return spied(monkeypatch, parquet, "_read_group", lambda table, group, *_: group)


@pytest.mark.parametrize("kept", [2**30, 1000])
def test_rows_are_the_same_however_they_are_read(files: list[str], read: list[int], kept: int) -> None:
    source = Parquet(files, label=None, cache_bytes=kept)
    for i in (0, 599, 149, 150, 64, 63, 299, 300):
        assert source.read(i) == image(i)
    assert bool(read) == (kept > 1000)


def test_groups_are_kept_up_to_so_many_bytes(files: list[str], read: list[int]) -> None:
    """The one not used for longest goes; going through the rows in order reads each group once."""
    one = GROUP * 1010
    source = Parquet(files, label=None, cache_bytes=one * 5 // 2)  # two and a half groups
    for i in range(2 * ROWS):
        source.read(i)
    assert read == [0, 1, 0, 1]
    assert len(source.group_cache) == 2
    read.clear()
    for i in (300, 450, 300, 0, 300, 450):  # the last but one stays
        source.read(i)
    assert read == [0, 1]


def test_threads_do_not_read_a_group_twice(files: list[str], read: list[int]) -> None:
    source, meet = Parquet(files, label=None), Barrier(4)

    def wrong(first: int) -> list[int]:
        meet.wait(60)
        return [i for i in range(first, 2 * ROWS, 4) if source.read(i) != image(i)]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(wrong, range(4))) == [[]] * 4
    assert len(read) == 4


def test_a_group_too_large_to_keep_is_read_once_in_order(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by threads that are a little behind; only a row further back starts again."""
    batches = 0
    real = pq.ParquetFile.iter_batches

    def counted(*given: object, **named: object) -> Iterator[object]:
        nonlocal batches
        for batch in real(*given, **named):  # pyright: ignore[reportArgumentType]
            batches += 1
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    source = Parquet(files, label=None, cache_bytes=1000)
    for i in range(2 * ROWS):
        late = max(i - BATCH_ROWS, i // GROUP * GROUP)
        assert source.read(i) == image(i)
        assert source.read(late) == image(late)
    per_group = -(-GROUP // BATCH_ROWS)
    assert batches == 4 * per_group
    assert source.read(2 * ROWS - GROUP) == image(2 * ROWS - GROUP)
    assert batches == 4 * per_group + 1


def test_tables_are_more_than_the_files_that_may_be_open(files: list[str], tmp_path: Path) -> None:
    many = [str(tmp_path / f"link-{k:03}.parquet") for k in range(300)]
    for file in many:
        os.link(files[0], file)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/dev/fd"))) + 200, hard))
        source = Parquet(many, label=None, cache_bytes=1)
        for k in range(300):
            assert source.read(k * ROWS + 7) == image(7)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_too_many_open_files_are_no_damage(files: list[str]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    Parquet(files, label=None)  # what it imports is loaded
    handles: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/dev/fd"))) + 2, hard))
        with suppress(OSError):
            while True:
                handles.append(os.open(files[0], os.O_RDONLY))
        with pytest.raises(OSError, match="Too many open files"):
            Parquet(files, label=None)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for handle in handles:
            os.close(handle)


@pytest.mark.parametrize("kept", [2**30, 1000])
def test_a_damaged_page_is_found_by_its_sum(files: list[str], kept: int) -> None:
    """A bit among the bytes of an image, which the image itself might not show."""
    data = bytearray(Path(files[0]).read_bytes())
    data[data.index(image(120)) + 500] ^= 1
    Path(files[0]).write_bytes(data)
    source = Parquet(files, label=None, cache_bytes=kept)
    with pytest.raises(OSError, match="CRC"):
        source.read(140)
    assert source.read(300) == image(300)


@pytest.mark.parametrize("at", range(4, 3000, 250))
def test_damage_anywhere_is_an_error_or_other_bytes(tmp_path: Path, at: int) -> None:
    """Pages without a sum: what pyarrow raises, of whatever kind, is said of the row; nothing else comes through."""
    pq.write_table(pa.table({"image": [image(i) for i in range(3)]}), tmp_path / "a.parquet", compression="none")
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[at : at + 8] = b"\xff" * 8
    (tmp_path / "a.parquet").write_bytes(data)
    try:
        text = refused(tmp_path)  # they are no images in any case
    except UserError as error:
        text = str(error)
    assert str(tmp_path / "a.parquet") in text
    assert spec(tmp_path, memory=0.0, on_bad="skip").classes == 0
