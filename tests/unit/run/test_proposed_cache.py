"""The cache of a proposed run: filled once, in time, of the images it is named after, in no folder of the user's."""

import fcntl
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest
from PIL import Image

import dumo
from dumo.config.load import load
from dumo.config.source import PROPOSED_KEY, is_root_proposed
from dumo.config.spec import Run
from dumo.data import Latents, cache
from dumo.plan import photolatents
from dumo.run import encode, examination, proposedcache
from dumo.run.folder import write_run_file
from dumo.run.index import Index
from dumo.run.job import open_job
from dumo.run.resolve import with_absolute_paths
from dumo.runtime import dist, door, signals, stopwatch
from dumo.runtime.progress import Bar, Tick, no_bar
from dumo.training import deadline
from dumo.training.deadline import PreparationTime
from dumo.types import UserError

COUNT = 3
FOLDER = Path("runs/photos")


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
    return run.model_copy(update={"data": data, "resolved": {PROPOSED_KEY: {"data.root": root}}})


def fill(run: Run, folder: Path = FOLDER, time: PreparationTime | None = None, bar: Bar = no_bar) -> None:
    """Make the cache of a run that is trained in this folder, where it is the run's to make."""
    assert isinstance(run.data, Latents)
    if is_root_proposed(run.resolved, run.data.root):
        proposedcache.ensure_proposed_cache(run, run.data, Index.read(folder), time=time, device="cpu", bar=bar)


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
    threads = [Thread(target=fill, args=[run, Path(f"runs/{i}")], daemon=True) for i in range(2)]
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


def test_the_wait_for_another_process_ends_with_the_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """And with a signal, of which nothing else is told while a lock is waited for."""
    folder = run.data.folder
    folder.parent.mkdir(parents=True)
    clock = Clock()
    monkeypatch.setattr(signals, "received_signal", None)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as another process would
        clock.now = 50.0
        with pytest.raises(signals.Stopped) as stopped, door.command_line():
            fill(run, time=PreparationTime(0.0, 60.0, clock))
        assert (stopped.value.number, str(stopped.value)) == (
            signals.CLOCK,
            "stopped: another process still encodes these photos after 0:50, and the steps need the rest of the 1:00 "
            "that there were. Once it is done:  dumo train runs/photos --minutes 1",
        )
        signals.received_signal = signals.SIGNALS[0]
        with pytest.raises(signals.Stopped) as stopped:
            fill(run)
        assert stopped.value.number == signals.SIGNALS[0]
    assert not folder.exists()


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
    assert not FOLDER.exists(), "nothing is trained, so nothing is written"


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


class Clock:
    """Goes on by twenty seconds whenever a bar ticks."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    @contextmanager
    def bar(self, title: str, total: int, /) -> Generator[Tick, None, None]:
        def tick(done: int, note: str) -> None:
            self.now += 20

        yield tick


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard of each photo."""
    monkeypatch.setattr(proposedcache, "SHARD_ROWS", 1)


def files_of(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*.safetensors"))


@pytest.mark.usefixtures("small_shards")
def test_encoding_that_takes_too_long_stops_and_goes_on_from_what_is_kept(run: Run) -> None:
    clock = Clock()
    with pytest.raises(signals.Stopped) as stopped, door.command_line():
        fill(run, time=PreparationTime(0.0, 60.0, clock), bar=clock.bar)
    assert clock.now == 60, "three quarters of its time are over, at the second photo"
    assert str(stopped.value) == (
        "stopped: 1 of 3 photos are encoded after 1:00, and the others take 1:00, more than 75% in all of the 1:00 "
        "that there were. With enough time:  dumo train runs/photos --minutes 2"
    )
    assert files_of(run.data.folder) == ["shard-00000.safetensors"]
    kept = (run.data.folder / "shard-00000.safetensors").stat().st_mtime_ns

    # what is kept takes no time, and is left as it is
    clock = Clock()
    fill(run, time=PreparationTime(0.0, 120.0, clock), bar=clock.bar)
    assert cache.is_finished(run.data.folder)
    assert (run.data.folder / "shard-00000.safetensors").stat().st_mtime_ns == kept


@pytest.mark.usefixtures("small_shards")
def test_encoding_that_takes_too_long_is_told_in_python(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though a training that a callback stops ends without an error."""
    timed = run.model_copy(update={"train": run.train.model_copy(update={"minutes": 1.0})})
    monkeypatch.setattr(deadline, "MAX_PREPARATION_SHARE", 0.0)
    with pytest.raises(signals.Stopped, match=r'With enough time:  dumo\.train\("runs/photos", minutes=\d+\)$'):
        dumo.train(timed, out=FOLDER, device="cpu", bar=no_bar)


@pytest.mark.usefixtures("small_shards")
def test_what_is_left_to_encode_does_not_shorten_the_run(run: Run) -> None:
    """Though three minutes would do for it: the run was to take ten."""
    clock = Clock()
    clock.now = 420.0  # gone by before
    with pytest.raises(signals.Stopped, match="the others take 1:20,") as stopped, door.command_line():
        fill(run, time=PreparationTime(0.0, 600.0, clock), bar=clock.bar)
    assert str(stopped.value).endswith("dumo train runs/photos --minutes 10")


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_kept_shards_may_lie_after_those_that_are_missing(run: Run, damage: str) -> None:
    """As after a rank that was killed, or where one is damaged: what is encoded now is timed by what is encoded now."""
    encode.encode(run.data, device="cpu", rank=2, world=3, shard_rows=1)
    if damage == "changed":
        encode.encode(run.data, device="cpu", rank=0, world=3)
        file = run.data.folder / "shard-00000.safetensors"
        file.write_bytes(bytes(file.stat().st_size))
    clock = Clock()
    with pytest.raises(signals.Stopped, match="1 of 3 photos are encoded after 0:20, and the others take 0:40,"):
        fill(run, time=PreparationTime(0.0, 20.0, clock), bar=clock.bar)


@pytest.mark.usefixtures("small_shards")
def test_encoding_is_not_stopped_where_the_others_are_kept(run: Run) -> None:
    """Nothing is left to encode after the first one."""
    for part in (1, 2):
        encode.encode(run.data, device="cpu", rank=part, world=3, shard_rows=1)
    clock = Clock()
    fill(run, time=PreparationTime(0.0, 1.0, clock), bar=clock.bar)
    assert cache.is_finished(run.data.folder)


def test_encoding_is_not_stopped_once_it_is_done(run: Run) -> None:
    clock = Clock()
    fill(run, time=PreparationTime(0.0, 1.0, clock), bar=clock.bar)
    assert cache.is_finished(run.data.folder)


@pytest.mark.usefixtures("small_shards")
def test_a_cache_that_is_begun_keeps_the_size_of_its_shards(run: Run) -> None:
    """So `dumo encode` finishes what a training began."""
    clock = Clock()
    with pytest.raises(signals.Stopped):
        fill(run, time=PreparationTime(0.0, 60.0, clock), bar=clock.bar)
    encode.encode(run.data, device="cpu")
    assert len(files_of(run.data.folder)) == COUNT


@pytest.mark.usefixtures("small_shards")
def test_a_run_is_in_its_folder_before_its_photos_are_encoded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the same command finds it there after a stop; by the clock, too."""
    timed = run.model_copy(update={"train": run.train.model_copy(update={"minutes": 1.0})})
    late = stopwatch.wall_clock() - 100
    with pytest.raises(signals.Stopped, match="0 of 3 photos"), open_job(FOLDER, timed, device="cpu", began=late):
        pass
    written = Index.read(FOLDER).recorded_run
    assert written is not None
    assert written.run.data.codec == with_absolute_paths(run).data.codec.model_copy(
        update={"sha256": written.run.data.codec.sha256}
    )
    assert written.run.train.minutes == 1
    assert not (FOLDER / "checkpoints").exists()

    # as it resumes; then as a kill leaves it
    met: list[str] = []

    @contextmanager
    def join() -> Generator[None, None, None]:
        met.append("ranks")
        yield

    def stop(*given: object, **options: object) -> None:
        met.append("encoded")
        raise signals.Stopped(signals.CLOCK)

    monkeypatch.setattr(dist, "join", join)
    monkeypatch.setattr(encode, "ensure_cache", stop)
    with pytest.raises(signals.Stopped), open_job(FOLDER, device="cpu"):
        pass
    assert met == ["ranks", "encoded"], "no rank waits at the door for as long as that takes"
    assert (FOLDER / "run.yaml").is_file()


def refusal(words: str) -> Callable[..., None]:
    """What refuses a run that has been written into its folder."""

    def refuse(*given: object, **options: object) -> None:
        assert (FOLDER / "run.yaml").is_file()
        raise UserError(words)

    return refuse


def test_a_run_whose_photos_are_refused_leaves_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "ensure_cache", refusal("this one cannot be read"))
    with pytest.raises(UserError, match="cannot be read"), open_job(FOLDER, run, device="cpu"):
        pass
    assert not FOLDER.exists()


def test_a_run_that_is_refused_after_its_photos_are_encoded_leaves_its_folder_free(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the command may be typed again with another setting, and finds the latents."""

    monkeypatch.setattr(examination, "examine", refusal("the derivative is wrong"))
    with pytest.raises(UserError, match="derivative"), open_job(FOLDER, run, device="cpu"):
        pass
    assert not FOLDER.exists()
    assert cache.is_finished(run.data.folder)


@pytest.mark.parametrize("encoded_by", ["training, before", "dumo encode", "training"])
def test_a_moved_run_finds_its_cache_beside_it(run: Run, tmp_path: Path, encoded_by: str) -> None:
    """Whichever command reads it: those of a trained run, `dumo encode`, and training."""
    with pytest.raises(signals.Stopped), open_job(FOLDER, run, device="cpu", bar=stop_at_once):
        pass
    if encoded_by == "training, before":
        fill(load(FOLDER))
    old = Path("runs").absolute()
    big = old.rename(tmp_path / "big")
    moved = Index.read(big / "photos").run([])
    work = encode.encoding_work(str(big / "photos"), out=None, codec=None, side=None)
    assert moved.data == work.data
    if encoded_by == "dumo encode":
        encode.encode(work.data, device="cpu")
    if encoded_by == "training":
        fill(moved, big / "photos")
    assert moved.data.folder == big / "latents" / run.data.folder.name
    assert cache.is_finished(moved.data.folder)
    assert not old.exists(), "nothing is made where it was"


def test_a_run_of_anothers_settings_finds_its_cache_beside_it(run: Run, tmp_path: Path) -> None:
    """It is moved with the latents that were proposed with the other; lost ones are made again."""
    write_run_file(with_absolute_paths(run), FOLDER)
    shorter = with_absolute_paths(load(FOLDER / "run.yaml", ["train.steps=3"]))
    write_run_file(shorter, Path("runs/shorter"))
    Path("runs/latents").mkdir()
    Path("runs").rename("big")
    moved = load("big/shorter")
    assert moved.data.folder == tmp_path / "big/latents" / run.data.folder.name
    fill(moved, Path("big/shorter"))
    assert cache.is_finished(moved.data.folder)


def test_latents_that_the_user_named_stay_where_they_are(run: Run, tmp_path: Path) -> None:
    """A folder of the same name next to a moved run is another one."""
    mine = with_root(run, "mine/photos")
    write_run_file(with_absolute_paths(mine), FOLDER)
    Path("runs").rename("big")
    assert load("big/photos").data.folder == tmp_path / "mine/photos"


@contextmanager
def stop_at_once(title: str, total: int, /) -> Generator[Tick, None, None]:
    """A bar of one who presses Ctrl-C."""
    raise signals.Stopped(signals.SIGNALS[0])
    yield
