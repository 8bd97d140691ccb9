"""A cache is the same, bit for bit, whoever makes it and however often that is interrupted."""

import errno
import os
import shutil
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dumo.data.cache import open_cache
from dumo.data.encoding import encode
from dumo.io import table
from dumo.types import UserError
from unit.encoders.toy import CLASSES, PLAN, POINT, Pictures, contents, picture, work

COUNT = 300
processes = get_context("fork")
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache made in one go."""
    out = tmp_path_factory.mktemp("caches") / "whole"
    assert encode(Pictures(COUNT), POINT, PLAN, out, batch=4).missing == 0
    return out


class Stopped(BaseException):
    """Stands for the end of the process: nothing in the code catches it."""


def watched(patch: pytest.MonkeyPatch, at: int = 0) -> list[str]:
    """List the system's calls by which a folder changes; before the one numbered `at`, from 1, the process stops."""
    seen: list[str] = []

    def watch(owner: object, call: str) -> None:
        real = getattr(owner, call)

        def counted(*args: object, **rest: object) -> object:
            seen.append(call)
            if 0 < at <= len(seen):  # a process that is gone cleans nothing up
                raise Stopped
            return real(*args, **rest)

        patch.setattr(owner, call, counted)

    for owner, call in ((os, "fsync"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir")):
        watch(owner, call)
    return seen


def test_stopped_at_any_step_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once before each flush, rename and removal."""

    def run(out: Path) -> int:
        return encode(Pictures(20), POINT, PLAN, out, batch=8).missing

    run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        seen = watched(patch)
        run(tmp_path / "counted")
    assert seen == [*["mkdir", "fsync", "replace", "fsync"] * 6, *["unlink"] * 2]  # index.json, 2 shards and notes, it
    for at in range(1, len(seen) + 1):
        out = tmp_path / str(at)
        with monkeypatch.context() as patch:
            watched(patch, at)
            with pytest.raises(Stopped):
                run(out)
        assert run(out) == 0
        assert contents(out) == contents(tmp_path / "whole"), f"stopped before step {at}"


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path, whole: Path) -> None:
    """At once, in two processes; and one after the other, where only the last finds all there."""
    out = tmp_path / "both"
    both = [processes.Process(target=work, args=(out, COUNT, rank, 2)) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert contents(out) == contents(whole)
    missing = [encode(Pictures(COUNT), POINT, PLAN, tmp_path / "turns", batch=4, rank=k, world=3).missing
               for k in (2, 0, 1)]  # fmt: skip
    assert missing == [13, 6, 0]
    assert contents(tmp_path / "turns") == contents(whole)


def test_ranks_may_begin_at_the_same_moment(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One looks before the other has begun, and goes on after that has written."""
    encode(Pictures(COUNT), POINT, PLAN, tmp_path, batch=4, rank=0, world=2)
    answers, read = iter([None]), table.read_index
    monkeypatch.setattr(table, "read_index", lambda out, kind: next(answers, read(out, kind)))
    assert encode(Pictures(COUNT), POINT, PLAN, tmp_path, batch=4, rank=1, world=2).missing == 0
    assert contents(tmp_path) == contents(whole)


@pytest.mark.parametrize("damage", ["truncated", "a bit", "gone"])
def test_damaged_shard_is_found_and_made_again(tmp_path: Path, whole: Path, damage: str) -> None:
    """And what ranks that are gone had half written is swept."""
    out, name = tmp_path / "out", "shard-00003.safetensors"
    shutil.copytree(whole, out)
    for left in (".shard-00001.safetensors.1.tmp", ".shard-00002.json.2.tmp", ".index.json.3.tmp"):
        (out / left).write_bytes(b"half")
    data = bytearray((out / name).read_bytes())
    if damage == "gone":
        (out / name).unlink()
    else:
        data[len(data) // 2] ^= 1
        (out / name).write_bytes(data[:-100] if damage == "truncated" else data)
    if damage != "a bit":  # a reader looks at sizes only
        with pytest.raises(UserError, match=rf"{name} (has \d+ of \d+ bytes|is missing): run the same dumo encode"):
            open_cache(out, POINT.codec)
    source = Pictures(COUNT)
    done = encode(source, POINT, PLAN, out, batch=4)
    assert done.made == 1
    assert source.reads == PLAN.shard_rows / 4
    assert len(done.damaged) == 1
    assert done.damaged[0].startswith(name)
    assert contents(out) == contents(whole)


def test_ticks_rise_to_the_ranks_share(tmp_path: Path) -> None:
    ticks: list[int] = []
    for _ in range(2):  # made, then found there
        encode(Pictures(40), POINT, PLAN, tmp_path, batch=8, rank=1, world=2, tick=lambda n, note: ticks.append(n))
    assert ticks == [8, 16, 16, 16]


def test_folder_of_another_cache_stays_as_it_is(whole: Path) -> None:
    before = contents(whole)
    with pytest.raises(UserError):
        encode(Pictures(COUNT), POINT, PLAN.model_copy(update={"classes": 10}), whole, batch=4)
    assert contents(whole) == before


def test_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    fix = r"use a new folder \(data.root, .*\); images are read from data.images.root$"
    with pytest.raises(UserError, match=f"not empty and has no index.json, so it is not a cache: {fix}"):
        encode(Pictures(3), POINT, PLAN, tmp_path)
    assert contents(tmp_path) == {"thesis.tex": b""}


@dataclass
class Holey(Pictures):
    """Leaves out every third image."""

    def rows(self, i: slice, /) -> tuple[Tensor, Tensor]:
        """The rest."""
        x, c = super().rows(i)
        kept = torch.tensor([k % 3 > 0 for k in range(*i.indices(self.count))])
        return x[kept], c[kept]


def test_images_the_source_leaves_out_are_not_there(tmp_path: Path) -> None:
    encode(Holey(40), POINT, PLAN, tmp_path, batch=1)  # a batch may be empty
    cache = open_cache(tmp_path, POINT.codec)
    kept = [k for k in range(40) if k % 3]
    every = torch.arange(len(cache))
    assert torch.equal(cache.take(every, "x"), POINT.encode(torch.stack([picture(k) for k in kept]) / 127.5 - 1))
    assert cache.take(every, "labels").tolist() == [k % CLASSES for k in kept]


@dataclass
class Broken(Pictures):
    """Leaves out all images but the first `readable`."""

    readable: int = 0

    def rows(self, i: slice, /) -> tuple[Tensor, Tensor]:
        """The first ones."""
        x, c = super().rows(i)
        kept = torch.tensor([k < self.readable for k in range(*i.indices(self.count))])
        return x[kept], c[kept]


def test_a_shard_of_images_that_are_left_out_has_no_rows(tmp_path: Path) -> None:
    """The last two of three."""
    result = encode(Broken(40, readable=3), POINT, PLAN, tmp_path)
    assert (result.made, result.missing) == (3, 0)
    cache = open_cache(tmp_path, POINT.codec)
    assert [shard.rows for shard in cache.index.shards] == [3, 0, 0]
    assert cache.take(torch.arange(3), "labels").tolist() == [0, 1, 2]
    assert len(cache.tensors(2)["x"]) == 0


def test_images_of_which_none_can_be_read_are_refused(tmp_path: Path) -> None:
    plan = PLAN.model_copy(update={"source": "photos"})
    with pytest.raises(UserError, match="40 images in photos"):
        encode(Broken(40), POINT, plan, tmp_path)
    assert not list(tmp_path.glob("shard-*"))


def test_full_disk_keeps_what_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = 0

    def fsync(handle: int) -> None:
        nonlocal flushed
        flushed += 1
        if flushed == 9:  # index.json, shard, note, shard, each with its name, and the bytes of a note
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match=r"No space left.*shard-00001.json"):
            encode(Pictures(40), POINT, PLAN, tmp_path)
    assert not list(tmp_path.glob(".*"))
    assert encode(Pictures(40), POINT, PLAN, tmp_path).made == 2
