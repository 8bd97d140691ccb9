"""Training makes the latents that are missing: once, from the images that are here, and over no finished cache."""

import fcntl
import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest
from PIL import Image

from dumo.config.load import load
from dumo.config.spec import Run
from dumo.data import Latents, cache
from dumo.plan.preflight import data_findings
from dumo.run import examination, fill_caches
from dumo.run.folder import RunFolder
from dumo.run.resolve import resolve, with_absolute_paths
from dumo.run.trainer import open_trainer
from dumo.runtime import signals, stopwatch
from dumo.runtime.progress import Bar, Tick, no_bar
from dumo.types import UserError

COUNT = 3
FOLDER = Path("runs/photos")
LATENTS = Path("runs/latents/photos")


def draw(photos: Path, i: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(photos / f"{i}.png")


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (photos := tmp_path / "photos").mkdir()
    for i in range(COUNT):
        draw(photos, i, seed=i)
    return photos


@pytest.fixture
def run(photos: Path) -> Run:
    return resolve(
        load("my-images-64", [f"data.images.root={photos.name}", "data.images.side=48", f"data.root={LATENTS}"])
    )


def latents(run: Run) -> Latents:
    assert isinstance(run.data, Latents)
    return run.data


def fill(run: Run, bar: Bar = no_bar) -> None:
    fill_caches.ensure_cache(latents(run), device="cpu", bar=bar)


def files() -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in LATENTS.iterdir()}


def test_two_trainings_make_a_cache_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes second waits for the first, and finds the cache whole."""
    real: Callable[..., fill_caches.EncodeResult] = fill_caches.encode
    calls: list[str] = []
    is_in, may_go = Event(), Event()

    def slow_encode(*words: object, **options: object) -> fill_caches.EncodeResult:
        calls.append("encode")
        is_in.set()
        assert may_go.wait(60)
        return real(*words, **options)

    monkeypatch.setattr(fill_caches, "encode", slow_encode)
    threads = [Thread(target=fill, args=[run], daemon=True) for _ in range(2)]
    threads[0].start()
    assert is_in.wait(60)
    threads[1].start()
    time.sleep(0.3)
    may_go.set()
    for thread in threads:
        thread.join(60)
    assert calls == ["encode"]
    index = cache.read_index(LATENTS)
    assert index is not None
    assert (index.rows, bool(index.shards)) == (COUNT, True)
    assert not list(LATENTS.parent.glob(".*.lock"))


def test_a_signal_ends_the_wait_for_another_process(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    LATENTS.parent.mkdir(parents=True)
    monkeypatch.setattr(signals, "received_signal", signals.SIGNALS[0])
    with LATENTS.with_name(f".{LATENTS.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as another process would
        with pytest.raises(signals.Stopped) as stopped:
            fill(run)
    assert stopped.value.number == signals.SIGNALS[0]
    assert not LATENTS.exists()


@pytest.mark.parametrize("i", [0, COUNT])  # another image, one more
def test_a_finished_cache_stays_as_it_is(run: Run, photos: Path, i: int) -> None:
    """Also if the images have changed since, which training refuses."""
    fill(run)
    before = files()
    draw(photos, i, seed=99)
    fill(run)
    assert files() == before
    with pytest.raises(UserError, match=r"restore them, .*start a new run"):
        fill_caches.encode(latents(run), device="cpu")
    assert files() == before


def test_an_edited_image_is_found_without_the_notes_beside_the_shards(run: Run, photos: Path) -> None:
    """The hashes of the images are in the shards themselves."""
    fill(run)
    for note in (*LATENTS.glob("names*"), *LATENTS.glob(".*")):
        note.unlink()
    draw(photos, 1, seed=99)
    with pytest.raises(UserError, match=r"made from different images, .*1\.png"):
        latents(run).compare_images()


@pytest.mark.parametrize("offset", [-1, -1000])
def test_a_flipped_bit_of_a_shard_is_found_by_the_full_check(run: Run, offset: int) -> None:
    """Also if the file keeps its time and was verified before, as after a fault of the disk."""
    fill(run)
    latents(run).open()
    assert [finding.state for finding in data_findings(run.data, None)] == ["ok"]
    (shard,) = LATENTS.glob("*.safetensors")
    state, data = shard.stat(), bytearray(shard.read_bytes())
    data[offset] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(state.st_atime_ns, state.st_mtime_ns))
    (finding,) = data_findings(run.data, None)
    assert (finding.state, shard.name in finding.way) == ("failing", True)


def test_a_cache_of_other_images_is_not_finished(run: Run, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill_caches, "_SHARD_ROWS", 1)
    fill_caches.encode(latents(run), device="cpu", rank=1, world=3)
    draw(photos, 1, seed=99)
    with pytest.raises(UserError, match=r"1\.png"):
        fill(run)
    assert len([*LATENTS.glob("*.safetensors")]) == 1


def test_encoding_that_is_stopped_goes_on_from_what_is_kept(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill_caches, "_SHARD_ROWS", 1)

    @contextmanager
    def stopping_bar(title: str, total: int, /) -> Generator[Tick, None, None]:
        def tick(done: int, note: str) -> None:
            if done == 2:
                raise signals.Stopped(signals.SIGNALS[0])

        yield tick

    with pytest.raises(signals.Stopped), open_trainer(FOLDER, run, device="cpu", bar=stopping_bar):
        pass
    assert not FOLDER.exists(), "the same command begins the run"
    kept = files()
    assert "shard-00000.safetensors" in kept
    with open_trainer(FOLDER, run, device="cpu"):
        pass
    assert cache.is_finished(LATENTS)
    assert files()["shard-00000.safetensors"] == kept["shard-00000.safetensors"]


def test_without_the_images_the_command_is_named(run: Run, photos: Path) -> None:
    photos.rename(photos.with_name("elsewhere"))
    with pytest.raises(UserError, match="dumo encode"), open_trainer(FOLDER, run, device="cpu"):
        pass
    assert not FOLDER.exists()
    assert not LATENTS.exists()


def test_a_refused_run_leaves_its_folder_free_and_its_latents(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise UserError("the derivative is wrong")

    monkeypatch.setattr(examination, "examine", refuse)
    with pytest.raises(UserError, match="derivative"), open_trainer(FOLDER, run, device="cpu"):
        pass
    assert not FOLDER.exists()
    assert cache.is_finished(LATENTS)


def test_encoding_takes_no_time_of_the_training(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = run.model_copy(update={"train": run.train.model_copy(update={"minutes": 1.0})})
    monkeypatch.setattr(fill_caches, "ensure_cache", lambda *_, **__: time.sleep(0.5))
    fill_caches.encode(latents(run), device="cpu")
    began = stopwatch.wall_clock()
    with open_trainer(FOLDER, timed, device="cpu", began=began) as trainer:
        assert trainer.clock
        assert 0.5 <= trainer.clock.origin - began < 0.6


def test_a_moved_run_finds_its_latents_beside_it(run: Run, tmp_path: Path) -> None:
    """Those that the user put elsewhere stay there."""
    mine = run.model_copy(update={"data": latents(run).model_copy(update={"root": "mine/photos"})})
    RunFolder(FOLDER).write_run(with_absolute_paths(run))
    RunFolder(Path("runs/mine")).write_run(with_absolute_paths(mine))
    fill(run)
    Path("runs").rename("big")
    assert latents(load("big/photos")).folder == tmp_path / "big/latents/photos"
    assert latents(load("big/mine")).folder == tmp_path / "mine/photos"
