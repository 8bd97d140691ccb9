"""Cases of bad machines, by name: each does its harm, tries what a user would type, and notes what came of it."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from e2e.shell import ENVIRONMENT, TINY, sets
from reliability import process
from reliability.found import Found, Left, disk
from reliability.place import RICH

TRAIN = ("train", "digits", "--out", "run", *TINY, *RICH, *sets("train.steps=60", "train.save_every=10"))
LONG = (*TRAIN, *sets("train.steps=400"))
CACHE = sets("data.root=cache", "data.images.root=given/images", "data.images.split=null", "data.images.classes=0")
WEIGHTS = sets("data.codec.weights=given/taef2.safetensors")  # random ones
CACHE += [*WEIGHTS, *sets("data.memory=0")]
SMALL = sets("net.width=32", "net.depth=1", "train.batch=16", "train.log_every=1", "train.save_every=10")
LATENTS = ("train", "cifar10-latents", "--out", "run", *SMALL, *CACHE, *sets("train.steps=400"))
ENCODE = ("encode", "cifar10-latents", *CACHE, "--shard-rows", "8")
PHOTOS = ("train", "my-images", "--out", "run", *SMALL, *sets("train.steps=200", "data.memory=0", "data.side=32"))
PHOTOS += tuple(sets("data.root=images", "data.on_bad=raise", "net.patch=8", "net.attention=4"))
NOBODY = 54321  # a user whom the machine does not know


CASES: dict[str, Callable[[Path, Found], None]] = {}


def case(name: str) -> Callable[[Callable[[Path, Found], None]], Callable[[Path, Found], None]]:
    """A case of this name."""

    def kept(f: Callable[[Path, Found], None]) -> Callable[[Path, Found], None]:
        CASES[name] = f
        return f

    return kept


def begun(words: Sequence[str], cwd: Path, ranks: int = 1, **how: str) -> "subprocess.Popen[bytes]":
    """A training that has made its first checkpoints."""
    environment = {**ENVIRONMENT, **how}
    started, late = process.start(words, cwd, ranks, environment=environment), time.monotonic() + 300
    while not (cwd / "run/checkpoints/step-00000020").exists():
        if started.poll() is not None or time.monotonic() > late:
            process.kill([started.pid])
            raise RuntimeError(f"it did not begin: {process.said(cwd)}")
        time.sleep(0.005)
    return started


@case("full disk")
def full_disk(here: Path, found: Found) -> None:
    """A checkpoint does not fit."""
    many = (*TRAIN, *sets("train.keep=9"))
    with disk(here / "disk", "3m") as remount:
        at = here / "disk"
        (at / "given").symlink_to(here / "given")
        found.refused(many, at, names="free")
        with found.unharmed(at / "run/checkpoints"):
            found.refused(many, at, names="free")
        remount("size=100m")
        found.recovers(many, at)
        found.same(at, many)


OTHERS = (
    ("evaluate", "run", "--nfe", "1"),
    ("sample", "run", "--count", "300", "--nfe", "1", "--format", "npz"),
    ("report", "run"),
    ("encode", "given/images", "disk/cache", "--codec", "taef2", "--side", "32", "--shard-rows", "8", *WEIGHTS),
)


def moved(here: Path) -> None:
    """A trained run on the disk; the log of what is started stays beside it."""
    shutil.copytree(here / "given/digits", here / "disk/run")
    (here / "run").symlink_to(here / "disk/run")


@case("full disk elsewhere")
def full_elsewhere(here: Path, found: Found) -> None:
    """Not a byte is left for samples, scores, a report, a cache."""
    with disk(here / "disk", "10m") as remount:
        moved(here)
        subprocess.run(["dd", "if=/dev/zero", f"of={here}/disk/filler", "bs=4096"], capture_output=True, check=False)
        with found.unharmed(here / "disk"):
            for words in OTHERS:
                found.refused(words, here, names="space")
        remount("size=100m")
        for words in OTHERS:
            found.recovers(words, here)


@case("read-only disk")
def read_only(here: Path, found: Found) -> None:
    """Nothing may be written: said before the work."""
    more = ("train", "run", *sets("train.steps=40"))
    with disk(here / "disk", "50m") as remount:
        moved(here)
        remount("ro")
        with found.unharmed(here / "disk"):
            for words in (more, *OTHERS):
                found.refused(words, here, names="ead-only")
        remount("rw")
        found.recovers(more, here)


@case("no home")
def no_home(here: Path, found: Found) -> None:
    """A user whom the machine does not know, without HOME."""
    bare = {name: value for name, value in ENVIRONMENT.items() if name not in ("HOME", "USER", "LOGNAME")}
    os.chown(here, NOBODY, NOBODY)
    here.chmod(0o777)

    def nobody(*words: str) -> "subprocess.Popen[bytes]":
        command = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
        return process.start(words, here, environment=bare, through=command)

    if not shutil.which("setpriv") or os.geteuid():
        raise Left("no right to become another user")
    found.tried(nobody("train", "cifar10-latents", *CACHE, *sets("data.root=~/cache")), here, 2, names="~")
    found.tried(nobody(*TRAIN), here, 0)
    found.same(here, TRAIN)


@case("few descriptors")
def few_descriptors(here: Path, found: Found) -> None:
    """As few open files as a shell may allow: enough to train, or a line."""
    found.recovers(ENCODE, here)
    found.tried(process.start(LATENTS, here, before="ulimit -n 9"), here, 0, 1, 2)
    found.recovers(LATENTS, here)
    found.tried(process.start(("report", "run"), here, before="ulimit -n 9"), here, 0, 1, 2)
    two = ("train", "digits", "--out", "two", *TINY)
    found.tried(process.start(two, here, 2, before="ulimit -n 28"), here, 0, 1, 2)
    found.same(here, LATENTS)


@case("out of memory")
def out_of_memory(here: Path, found: Found) -> None:
    """A batch that no memory holds."""
    found.recovers(TRAIN, here)
    with found.unharmed(here / "run"):
        large = ("train", "digits", "--out", "large", *TINY, *sets("train.batch=200000"))
        found.refused(large, here, names="train.batch", before="ulimit -v 6000000")


@case("preempted")
def preempted(here: Path, found: Found) -> None:
    """SIGTERM: a checkpoint of that step, and on from there."""
    started = begun(LONG, here)
    started.send_signal(signal.SIGTERM)
    found.tried(started, here, 143)
    found.recovers(LONG, here)
    found.same(here, LONG)


@case("worker killed")
def worker_killed(here: Path, found: Found) -> None:
    """One of the processes that `--jobs` started is gone: a line, and none of the others stays."""
    words = ("reproduce", "sec43", "--scale", "smoke", "--jobs", "2", "--out", "plan")
    started, late = process.start(words, here), time.monotonic() + 300
    while not list(here.glob("plan/**/run.yaml")):
        if started.poll() is not None or time.monotonic() > late:
            raise RuntimeError(f"it did not begin: {process.said(here)}")
        time.sleep(0.01)
    them = process.descendants(started.pid)
    working = [pid for pid in them if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    process.kill(working[-1:])
    found.tried(started, here, 1, 2)
    if stayed := process.orphans(them):
        found.wrong.append(f"{len(stayed)} processes stayed")
    found.recovers(words, here)


@case("hanging rank")
def hanging_rank(here: Path, found: Found) -> None:
    """A rank is stopped, and does not answer: said within the time that is set."""
    words = (*TRAIN, *sets("train.steps=100"))
    started = begun(words, here, 2, DUMO_TIMEOUT="5")
    them = process.workers(started.pid, 2)
    os.kill(them[1], signal.SIGSTOP)
    found.tried(started, here, 1, names="rank 1")
    if stayed := process.orphans(them):
        found.wrong.append(f"{len(stayed)} processes stayed")
    found.recovers(words, here, 2)
    found.same(here, words, 2)


@case("checkpoint gone")
def checkpoint_gone(here: Path, found: Found) -> None:
    """The checkpoints vanish under a training, then a part of its last one before it is started again."""
    started, standing = begun(LONG, here), here / "run/checkpoints"
    for name in ("step-00000010", "step-00000020"):
        shutil.rmtree(standing / name)
    while not list(standing.glob("step-000000[4-9]0")) and started.poll() is None:
        time.sleep(0.005)
    process.kill([started.pid])
    process.ended(started)
    last = max(standing.glob("step-*"))
    (last / "optimizer.safetensors").unlink()
    found.tried(process.start(LONG, here), here, 0, 2)
    found.recovers(LONG, here)
    found.same(here, LONG)


def made_again(here: Path, found: Found) -> None:
    """The next start names the shard that broke; encoded again, the training comes to its end."""
    found.refused(("train", "run", *sets("train.steps=420")), here, names="shard-00003")
    found.recovers(ENCODE, here)
    found.recovers(LATENTS, here)
    found.same(here, LATENTS)


@case("shard gone")
def shard_gone(here: Path, found: Found) -> None:
    """A shard of latents vanishes under a training; then it is started again without it."""
    found.recovers(ENCODE, here)
    started = begun(LATENTS, here)
    (here / "cache/shard-00003.safetensors").unlink()
    found.tried(started, here, 0, 1, 2)
    made_again(here, found)


@case("shard cut short")
def shard_cut(here: Path, found: Found) -> None:
    """A mapped shard is cut short under a training: the system ends who reads on, and the next start names it."""
    found.recovers(ENCODE, here)
    started = begun(LATENTS, here)
    os.truncate(here / "cache/shard-00003.safetensors", 100)
    found.codes.append(code := process.ended(started))
    if code not in (1, 2, -signal.SIGBUS):
        found.wrong.append(f"train: exit code {code}")
    made_again(here, found)


@case("images gone")
def images_gone(here: Path, found: Found) -> None:
    """Half of the images vanish under a training, and come back."""
    shutil.copytree(here / "given/images", here / "images")
    started = begun(PHOTOS, here)
    for number in range(40, 90):
        (here / f"images/{number:03}.png").rename(here / f"{number:03}.png")
    found.tried(started, here, 1, 2, names="png")
    for number in range(40, 90):
        (here / f"{number:03}.png").rename(here / f"images/{number:03}.png")
    found.recovers(PHOTOS, here)
    found.same(here, PHOTOS)


@case("two trainings")
def two_trainings(here: Path, found: Found) -> None:
    """A second training in the folder of one that runs."""
    started = begun(LONG, here)
    (here / "run/second").mkdir()
    other = here / "other"
    other.mkdir()
    (other / "run").symlink_to(here / "run")
    found.refused(LONG, other, names="run")
    (here / "run/second").rmdir()
    if code := process.ended(started):
        found.wrong.append(f"the first ended with {code}")
    found.same(here, LONG)


@case("clock back")
def clock_back(here: Path, found: Found) -> None:
    """All files, and what a kill left, are ten years younger than the clock says."""
    found.recovers(ENCODE, here)
    started = begun(LATENTS, here)
    process.kill([started.pid])
    process.ended(started)
    (here / "run/checkpoints/.step-00000990.tmp").mkdir()
    later = time.time() + 10 * 365 * 86_400
    for path in (*here.glob("run/**/*"), *here.glob("cache/*"), here / "run/checkpoints/.step-00000990.tmp"):
        os.utime(path, (later, later))
    found.recovers(LATENTS, here)
    found.same(here, LATENTS)
    if list(here.glob("run/checkpoints/.*")):
        found.wrong.append("what the kill left is still there")
