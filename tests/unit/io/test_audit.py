"""A number that has changed in a cache stops whoever trains on it; what was found whole is not read again."""

import os
import shutil
from pathlib import Path
from threading import Event

import pytest
import torch

from dumo.data.cache import open_cache
from dumo.data.encoding import encode
from dumo.data.latents import LatentSource
from dumo.io import audit
from dumo.io.audit import FILE, Audit, verify
from dumo.types import UserError
from unit.data.spy import spied
from unit.encoders.toy import PLAN, POINT, Pictures

COUNT = 50  # images, in four shards
SHARDS = [f"shard-{k:05}.safetensors" for k in range(4)]
SAID = r"shard-00002\.safetensors has changed.*dumo encode"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    encode(Pictures(COUNT), POINT, PLAN, tmp_path)
    return tmp_path


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that are read through from here on."""
    return spied(monkeypatch, audit, "_sha256", lambda file, end: file.name)


def opened(folder: Path) -> LatentSource:
    """The cache as a source."""
    return LatentSource(open_cache(folder, POINT.codec), POINT.codec, flip=True)


def change(folder: Path, byte: int = -3) -> None:
    """Another number in the third shard, its size the same."""
    file = folder / SHARDS[2]
    data = bytearray(file.read_bytes())
    data[byte] ^= 1
    file.write_bytes(data)


def test_each_shard_is_read_through_once(folder: Path, read: list[str]) -> None:
    """Also by who opens it the next time; a file that was touched, and it alone, again."""
    opened(folder)
    assert read == SHARDS
    opened(folder).batch(0, 8, 0)
    assert read == SHARDS
    os.utime(folder / SHARDS[1])
    opened(folder)
    assert read == [*SHARDS, SHARDS[1]]


def test_a_copied_cache_is_not_read_again(
    folder: Path, read: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Its files have the same sizes and times, and their note came along."""
    opened(folder)
    copy = shutil.copytree(folder, tmp_path_factory.mktemp("copy") / "cache")
    opened(copy)
    assert read == SHARDS


def test_a_changed_number_is_refused_with_the_way_out(folder: Path) -> None:
    """Before the first time, and after it was found whole; then the same `encode` mends it."""
    for _ in range(2):
        change(folder)
        for _ in range(2):
            with pytest.raises(UserError, match=SAID):
                opened(folder)
        assert encode(Pictures(COUNT), POINT, PLAN, folder).damaged
        opened(folder)


def test_a_large_cache_is_read_through_while_training_begins(
    folder: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is found comes with the next batch, and stays; what was whole is noted all the same."""

    def late() -> LatentSource:
        source = opened(folder)
        assert source.audit.thread is not None
        source.audit.thread.join(60)
        return source

    monkeypatch.setattr(audit, "AT_ONCE_BYTES", 0)
    change(folder)
    source = late()
    for _ in range(2):
        with pytest.raises(UserError, match=SAID):
            source.batch(0, 8, 0)
    assert read == SHARDS[:3]
    change(folder)
    late().batch(0, 8, 0)
    assert read == [*SHARDS[:3], *SHARDS[2:]]


def test_a_dropped_cache_is_not_read_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread ends with it."""
    begun, go = Event(), Event()
    ended: list[bool] = []

    def slow(file: Path, end: Event) -> str:
        begun.set()
        go.wait(60)
        ended.append(end.is_set())
        return ""

    monkeypatch.setattr(audit, "_sha256", slow)
    monkeypatch.setattr(audit, "AT_ONCE_BYTES", 0)
    found = Audit(folder, open_cache(folder, POINT.codec).index.shards)
    thread = found.thread
    assert thread is not None
    begun.wait(60)
    del found
    go.set()
    thread.join(60)
    assert ended == [True]
    assert not thread.is_alive()


def test_ranks_of_a_machine_share_the_reading(folder: Path, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reads its own, and all know what was found."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        opened(folder)
    assert read == [SHARDS[1], SHARDS[3], SHARDS[0], SHARDS[2]]
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.delenv("LOCAL_RANK")
    opened(folder)
    assert len(read) == 4


@pytest.mark.parametrize("text", ["", "[1]", '{"shard-00000.safetensors": 3}', "{"])
def test_a_damaged_note_is_no_note(folder: Path, read: list[str], text: str) -> None:
    opened(folder)
    (folder / FILE).write_text(text)
    opened(folder)
    assert read[4] == SHARDS[0]
    assert opened(folder).batch(0, 4, 0)[0].shape[0] == 4


def test_nothing_is_noted_where_that_is_not_allowed(
    folder: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:

    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("dumo.io.audit.files.write", refuse)
    for _ in range(2):
        assert torch.equal(opened(folder).batch(0, 4, 0)[0], opened(folder).batch(0, 4, 0)[0])
    assert read == SHARDS * 4
    assert not (folder / FILE).exists()


def test_a_change_that_keeps_the_time_is_found_by_verify_alone(folder: Path) -> None:
    opened(folder)
    file = folder / SHARDS[2]
    time = file.stat().st_mtime_ns
    change(folder)
    os.utime(file, ns=(time, time))
    opened(folder)
    with pytest.raises(UserError, match=SAID):
        verify(folder, open_cache(folder, POINT.codec).index.shards)
