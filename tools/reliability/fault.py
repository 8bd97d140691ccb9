"""The faults of a machine, by name: `FAULTS`, at the end of this file, which `machine.py` goes through.

Each case is a function of a folder, in which INPUTS lies (`workload.write_inputs`), and of the `CaseResult` that it
fills. It makes the fault, runs the commands that a user would type, ends the fault, and runs them again.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from e2e.shell import ENVIRONMENT, TINY, sets
from reliability import process
from reliability.result import CaseResult, CaseSkipped
from reliability.workload import INPUTS, TRAINING_FIELDS

UNKNOWN_USER = 54321  # an id that no user of the machine has
START_SECONDS = 300  # until a command must have begun its work: ours
SECONDS_PER_YEAR = 365 * 86_400

# -------------------------------------------------------------------------------------------- the commands of the cases

# a training of digits, and a longer one, which a fault can hit while it runs
TRAIN = ("train", "digits", "--out", "run", *TINY, *TRAINING_FIELDS, *sets("train.steps=60", "train.save_every=10"))
TRAIN_LONG = (*TRAIN, *sets("train.steps=400"))

# latents: make a cache of them, train on it
CODEC_WEIGHTS = sets(f"data.codec.weights={INPUTS}/taef2.safetensors")  # random ones
CACHE_FIELDS = [
    *sets("data.root=cache", f"data.images.root={INPUTS}/images", "data.images.split=null", "data.images.classes=0"),
    *CODEC_WEIGHTS,
    *sets("data.memory=0"),  # so that a training reads from the disk
]
SMALL_NET = sets("net.width=32", "net.depth=1", "train.batch=16", "train.log_every=1", "train.save_every=10")
ENCODE = ("encode", "cifar10-latents", *CACHE_FIELDS)
TRAIN_ON_LATENTS = (
    *("train", "cifar10-latents", "--out", "run", *SMALL_NET, *CACHE_FIELDS),
    *sets("train.steps=400"),
)

# images of a folder
TRAIN_ON_IMAGES = (
    *("train", "my-images", "--out", "run", *SMALL_NET),
    *sets("train.steps=200", "data.memory=0", "data.side=32"),
    *sets("data.root=images", "data.on_bad=raise", "net.patch=8", "net.attention=4"),
)

# every other command that writes, where `_put_run_on_disk` has put a run
WRITING_COMMANDS = (
    ("evaluate", "run", "--nfe", "1"),
    ("sample", "run", "--count", "300", "--nfe", "1", "--format", "npz"),
    ("report", "run"),
    (
        *("encode", f"{INPUTS}/images", "disk/cache", "--codec", "taef2"),
        *("--side", "32", *CODEC_WEIGHTS),
    ),
)


# ---------------------------------------------------------------------------------------------------------------- disks


def _full_disk(folder: Path, result: CaseResult) -> None:
    """A checkpoint does not fit."""
    train = (*TRAIN, *sets("train.keep=9"))
    disk = folder / "disk"
    with _mounted_disk(disk, "3m") as remount:
        (disk / INPUTS).symlink_to(folder / INPUTS)
        result.check_refusal(train, disk, subject="free")
        with result.check_unchanged(disk / "run/checkpoints"):
            result.check_refusal(train, disk, subject="free")
        remount("size=100m")
        result.check_recovery(train, disk)
        result.compare_with_undisturbed(disk, train)


def _full_disk_elsewhere(folder: Path, result: CaseResult) -> None:
    """Not a byte is left for samples, scores, a report and a cache."""
    disk = folder / "disk"
    with _mounted_disk(disk, "10m") as remount:
        _put_run_on_disk(folder)
        fill_disk = ["dd", "if=/dev/zero", f"of={disk}/filler", "bs=4096"]
        subprocess.run(fill_disk, capture_output=True, check=False)  # it fails when the disk is full
        with result.check_unchanged(disk):
            for words in WRITING_COMMANDS:
                result.check_refusal(words, folder, subject="space")
        remount("size=100m")
        for words in WRITING_COMMANDS:
            result.check_recovery(words, folder)


def _read_only_disk(folder: Path, result: CaseResult) -> None:
    """Nothing may be written, and commands say so before their work."""
    train_on = ("train", "run", *sets("train.steps=40"))
    disk = folder / "disk"
    with _mounted_disk(disk, "50m") as remount:
        _put_run_on_disk(folder)
        remount("ro")
        with result.check_unchanged(disk):
            for words in (train_on, *WRITING_COMMANDS):
                result.check_refusal(words, folder, subject="ead-only")  # with a capital or not
        remount("rw")
        result.check_recovery(train_on, folder)


def _put_run_on_disk(folder: Path) -> None:
    """Copy a trained run to folder/disk, and link folder/run to it: so the logs of commands are not on the disk."""
    shutil.copytree(folder / INPUTS / "digits", folder / "disk/run")
    (folder / "run").symlink_to(folder / "disk/run")


@contextmanager
def _mounted_disk(folder: Path, size: str) -> Generator[Callable[[str], None], None, None]:
    """Mount a disk of this size at a new folder; yield a function that mounts it again with other options.

    Raises CaseSkipped where this process may not mount.
    """
    if not _can_mount():
        raise CaseSkipped("no right to mount a disk")
    folder.mkdir()

    def mount(options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "dumo", str(folder)], check=True)

    def remount(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)

    mount(f"size={size}")
    try:
        yield remount
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@cache
def _can_mount() -> bool:
    """Whether this process may mount a disk: try it."""
    with TemporaryDirectory() as folder:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "dumo", folder], capture_output=True, check=False)
        if mounted.returncode == 0:
            subprocess.run(["umount", folder], check=True)
    return mounted.returncode == 0


# ------------------------------------------------------------------------------------------------ limits of the machine


def _no_home(folder: Path, result: CaseResult) -> None:
    """A user whom the machine does not know, without HOME."""
    if not shutil.which("setpriv") or os.geteuid() != 0:
        raise CaseSkipped("no right to become another user")
    os.chown(folder, UNKNOWN_USER, UNKNOWN_USER)
    folder.chmod(0o777)
    environment = dict(ENVIRONMENT)
    for name in ("HOME", "USER", "LOGNAME"):
        environment.pop(name, None)
    become_user = ("setpriv", f"--reuid={UNKNOWN_USER}", f"--regid={UNKNOWN_USER}", "--clear-groups")

    needs_home = ("train", "cifar10-latents", *CACHE_FIELDS, *sets("data.root=~/cache"))
    command = process.start(needs_home, folder, environment=environment, wrapper=become_user)
    result.check_exit(command, folder, 2, subject="~")
    command = process.start(TRAIN, folder, environment=environment, wrapper=become_user)
    result.check_exit(command, folder, 0)
    result.compare_with_undisturbed(folder, TRAIN)


def _few_descriptors(folder: Path, result: CaseResult) -> None:
    """As few open files as a shell may allow: a command works, or says what it lacks."""
    result.check_recovery(ENCODE, folder)
    command = process.start(TRAIN_ON_LATENTS, folder, shell_setup="ulimit -n 9")
    result.check_exit(command, folder, 0, 1, 2)
    result.check_recovery(TRAIN_ON_LATENTS, folder)

    command = process.start(("report", "run"), folder, shell_setup="ulimit -n 9")
    result.check_exit(command, folder, 0, 1, 2)

    train_on_two_ranks = ("train", "digits", "--out", "two", *TINY)
    command = process.start(train_on_two_ranks, folder, 2, shell_setup="ulimit -n 28")
    result.check_exit(command, folder, 0, 1, 2)
    result.compare_with_undisturbed(folder, TRAIN_ON_LATENTS)


def _out_of_memory(folder: Path, result: CaseResult) -> None:
    """A batch that no memory holds."""
    result.check_recovery(TRAIN, folder)
    train_large = ("train", "digits", "--out", "large", *TINY, *sets("train.batch=200000"))
    with result.check_unchanged(folder / "run"):
        result.check_refusal(train_large, folder, subject="train.batch", shell_setup="ulimit -v 6000000")


def _clock_back(folder: Path, result: CaseResult) -> None:
    """All files, and what a kill left, are ten years younger than the clock says."""
    result.check_recovery(ENCODE, folder)
    training = _start_training(TRAIN_ON_LATENTS, folder)
    process.kill([training.pid])
    process.wait_for_exit(training)

    left_by_kill = folder / "run/checkpoints/.step-00000990.tmp"
    left_by_kill.mkdir()
    later = time.time() + 10 * SECONDS_PER_YEAR
    for path in (*folder.glob("run/**/*"), *folder.glob("cache/*"), left_by_kill):
        os.utime(path, (later, later))

    result.check_recovery(TRAIN_ON_LATENTS, folder)
    result.compare_with_undisturbed(folder, TRAIN_ON_LATENTS)
    if list(folder.glob("run/checkpoints/.*")):
        result.problems.append("what the kill left is still there")


# ------------------------------------------------------------------------------------------- processes that end or hang


def _preempted(folder: Path, result: CaseResult) -> None:
    """SIGTERM: the training saves a checkpoint of its step, and resumes from there."""
    training = _start_training(TRAIN_LONG, folder)
    training.send_signal(signal.SIGTERM)
    result.check_exit(training, folder, 128 + signal.SIGTERM)
    result.check_recovery(TRAIN_LONG, folder)
    result.compare_with_undisturbed(folder, TRAIN_LONG)


def _worker_killed(folder: Path, result: CaseResult) -> None:
    """One of the processes that `--jobs` started is killed: the command says so, and none of the others stays."""
    words = ("reproduce", "sec43", "--scale", "smoke", "--jobs", "2", "--out", "plan")
    command = process.start(words, folder)
    deadline = time.monotonic() + START_SECONDS
    while not list(folder.glob("plan/**/run.yaml")):
        if command.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"it did not begin: {process.read_log(folder)}")
        time.sleep(0.01)

    pids = process.descendants(command.pid)
    workers = [pid for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    process.kill(workers[-1:])
    result.check_exit(command, folder, 1, 2)
    _check_no_orphans(pids, result)
    result.check_recovery(words, folder)


def _hanging_rank(folder: Path, result: CaseResult) -> None:
    """A rank is stopped and does not answer: the others say so within the time that is set."""
    train = (*TRAIN, *sets("train.steps=100"))
    training = _start_training(train, folder, 2, DUMO_TIMEOUT="5")
    workers = process.worker_pids(training.pid, 2)
    os.kill(workers[1], signal.SIGSTOP)
    result.check_exit(training, folder, 1, subject="rank 1")
    _check_no_orphans(workers, result)
    result.check_recovery(train, folder, 2)
    result.compare_with_undisturbed(folder, train, 2)


def _two_trainings(folder: Path, result: CaseResult) -> None:
    """A second training is started in the folder of one that runs."""
    training = _start_training(TRAIN_LONG, folder)
    (folder / "run/second").mkdir()
    second_folder = folder / "other"
    second_folder.mkdir()
    (second_folder / "run").symlink_to(folder / "run")
    result.check_refusal(TRAIN_LONG, second_folder, subject="run")
    (folder / "run/second").rmdir()
    exit_code = process.wait_for_exit(training)
    if exit_code:
        result.problems.append(f"the first ended with {exit_code}")
    result.compare_with_undisturbed(folder, TRAIN_LONG)


def _start_training(words: Sequence[str], folder: Path, ranks: int = 1, **variables: str) -> "subprocess.Popen[bytes]":
    """Start a training and wait for its checkpoint of step 20; `variables` are added to its environment.

    Raises RuntimeError where that does not come.
    """
    training = process.start(words, folder, ranks, environment={**ENVIRONMENT, **variables})
    deadline = time.monotonic() + START_SECONDS
    while not (folder / "run/checkpoints/step-00000020").exists():
        if training.poll() is not None or time.monotonic() > deadline:
            process.kill([training.pid])
            raise RuntimeError(f"it did not begin: {process.read_log(folder)}")
        time.sleep(0.005)
    return training


def _check_no_orphans(pids: Sequence[int], result: CaseResult) -> None:
    """These processes must end by themselves."""
    orphans = process.kill_orphans(pids)
    if orphans:
        result.problems.append(f"{len(orphans)} processes stayed")


# ------------------------------------------------------------------------------------------- files that vanish or break


def _checkpoint_gone(folder: Path, result: CaseResult) -> None:
    """Checkpoints vanish while a training runs; before it is started again, so does a file of its last one."""
    training = _start_training(TRAIN_LONG, folder)
    checkpoints = folder / "run/checkpoints"
    for name in ("step-00000010", "step-00000020"):
        shutil.rmtree(checkpoints / name)
    while not list(checkpoints.glob("step-000000[4-9]0")) and training.poll() is None:
        time.sleep(0.005)
    process.kill([training.pid])
    process.wait_for_exit(training)

    last_checkpoint = max(checkpoints.glob("step-*"))
    (last_checkpoint / "optimizer.safetensors").unlink()
    command = process.start(TRAIN_LONG, folder)
    result.check_exit(command, folder, 0, 2)
    result.check_recovery(TRAIN_LONG, folder)
    result.compare_with_undisturbed(folder, TRAIN_LONG)


def _shard_gone(folder: Path, result: CaseResult) -> None:
    """A shard of latents vanishes while a training runs; then it is started again without the shard."""
    result.check_recovery(ENCODE, folder)
    training = _start_training(TRAIN_ON_LATENTS, folder)
    (folder / "cache/shard-00000.safetensors").unlink()
    result.check_exit(training, folder, 0, 1, 2)
    _encode_broken_shard(folder, result)


def _shard_cut_short(folder: Path, result: CaseResult) -> None:
    """A mapped shard is cut short while a training runs: reading on ends the process by SIGBUS."""
    result.check_recovery(ENCODE, folder)
    training = _start_training(TRAIN_ON_LATENTS, folder)
    os.truncate(folder / "cache/shard-00000.safetensors", 100)
    exit_code = process.wait_for_exit(training)
    result.exit_codes.append(exit_code)
    if exit_code not in (1, 2, -signal.SIGBUS):
        result.problems.append(f"train: exit code {exit_code}")
    _encode_broken_shard(folder, result)


def _encode_broken_shard(folder: Path, result: CaseResult) -> None:
    """The next training names the shard that broke; once that is encoded again, the training comes to its end."""
    train_on = ("train", "run", *sets("train.steps=420"))
    result.check_refusal(train_on, folder, subject="shard-00000")
    result.check_recovery(ENCODE, folder)
    result.check_recovery(TRAIN_ON_LATENTS, folder)
    result.compare_with_undisturbed(folder, TRAIN_ON_LATENTS)


def _images_gone(folder: Path, result: CaseResult) -> None:
    """Half of the images vanish while a training runs, and come back."""
    images = folder / "images"
    shutil.copytree(folder / INPUTS / "images", images)
    names = [f"{number:03}.png" for number in range(40, 90)]
    training = _start_training(TRAIN_ON_IMAGES, folder)
    for name in names:
        (images / name).rename(folder / name)
    result.check_exit(training, folder, 1, 2, subject="png")
    for name in names:
        (folder / name).rename(images / name)
    result.check_recovery(TRAIN_ON_IMAGES, folder)
    result.compare_with_undisturbed(folder, TRAIN_ON_IMAGES)


FAULTS: dict[str, Callable[[Path, CaseResult], None]] = {  # in the order in which they are tried
    "full disk": _full_disk,
    "full disk elsewhere": _full_disk_elsewhere,
    "read-only disk": _read_only_disk,
    "no home": _no_home,
    "few descriptors": _few_descriptors,
    "out of memory": _out_of_memory,
    "preempted": _preempted,
    "worker killed": _worker_killed,
    "hanging rank": _hanging_rank,
    "checkpoint gone": _checkpoint_gone,
    "shard gone": _shard_gone,
    "shard cut short": _shard_cut_short,
    "images gone": _images_gone,
    "two trainings": _two_trainings,
    "clock back": _clock_back,
}
