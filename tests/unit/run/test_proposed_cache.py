"""The cache of a proposed run: filled once, of the images it is named after, and in no folder of the user's."""

import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest
from PIL import Image

from dumo.config.load import load
from dumo.config.source import PROPOSED
from dumo.config.spec import Run
from dumo.data import Latents, cache
from dumo.plan import photolatents
from dumo.run import encode
from dumo.run.resolve import with_absolute_paths
from dumo.runtime import door
from dumo.types import UserError

COUNT = 3


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
    """As `dumo.plan.proposal` proposes it."""
    run = load("my-images-64", ["data.images.root=photos", "data.images.side=48"])
    assert isinstance(run.data, Latents)
    root = photolatents.cache_folder("photos", run.data.images.with_facts(), run.data.codec.open("cpu"))
    data = run.data.with_facts().model_copy(update={"root": root})
    return run.model_copy(update={"data": data, "resolved": {PROPOSED: {"data.root": root}}})


def fill(run: Run) -> None:
    encode.ensure_proposed_cache(run, device="cpu")


def with_root(run: Run, root: str) -> Run:
    return run.model_copy(update={"data": run.data.model_copy(update={"root": root})})


def test_two_runs_on_one_folder_fill_their_cache_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes second waits for the first, and finds the cache whole."""
    real: Callable[..., encode.EncodeResult] = encode.encode
    calls: list[str] = []
    is_in, may_go = Event(), Event()

    def slow_encode(*words: object, **options: object) -> encode.EncodeResult:
        calls.append("encode")
        is_in.set()
        assert may_go.wait(60)
        return real(*words, **options)

    monkeypatch.setattr(encode, "encode", slow_encode)
    threads = [Thread(target=fill, args=[run], daemon=True) for _ in range(2)]
    threads[0].start()
    assert is_in.wait(60)
    threads[1].start()
    time.sleep(0.3)
    may_go.set()
    for thread in threads:
        thread.join(60)
    assert calls == ["encode"]
    index = cache.read_index(run.data.folder)
    assert index is not None
    assert index.rows == COUNT
    assert index.shards
    assert not list(run.data.folder.parent.glob(".*.lock"))


def test_the_name_is_that_of_the_images_wherever_they_are_named_from(run: Run) -> None:
    """A resumed run has absolute paths."""
    fill(with_absolute_paths(run))
    assert cache.read_index(run.data.folder)


@pytest.mark.parametrize("i", [0, COUNT])  # another one, one more
def test_photos_that_changed_since_the_plan_are_not_encoded(run: Run, photos: Path, i: int) -> None:
    draw(photos, i, seed=99)
    with door.command_line(), pytest.raises(UserError, match=r"changed since this run was planned.*--out DIR"):
        fill(run)
    with pytest.raises(UserError, match=r'begin a new run .*out="DIR"'):
        fill(run)
    assert not run.data.folder.exists()


@pytest.mark.parametrize("i", [0, COUNT])
def test_changed_photos_want_a_new_run_and_no_other_folder(run: Run, photos: Path, i: int) -> None:
    fill(run)
    draw(photos, i, seed=99)
    with pytest.raises(UserError, match=r'put the images back .*begin a new run .*out="DIR"') as raised:
        encode.encode(run.data, device="cpu")
    assert "encode into" not in str(raised.value)

    # a cache that the user named is the user's to make
    (mine := run.data.folder.with_name("mine")).mkdir()
    for file in run.data.folder.iterdir():
        file.rename(mine / file.name)
    with pytest.raises(UserError, match="encode into another folder"):
        encode.encode(with_root(run, str(mine)).data, device="cpu")


def test_a_folder_of_the_users_is_not_filled(run: Run) -> None:
    """Though the run was proposed with one of its own; before and after it was resumed."""
    begun = with_absolute_paths(run)
    for root in ("mine", str(Path("mine").absolute())):
        changed = with_absolute_paths(with_root(begun, root), begun)
        fill(changed)
        fill(with_absolute_paths(changed, changed))
        assert not Path("mine").exists()
    fill(with_absolute_paths(begun, begun))
    assert run.data.folder.is_dir()
