"""A run's checkpoints on disk: their lists `state.json`, whether their files are as listed, and which are kept.

- Writing: `training.checkpoint` writes all other files, makes their entries with `file_entries`, and calls `write`
  last. `state.json` so lists every other file with its size and SHA-256. Nothing else would tell that a shard is
  missing: a reader of shards takes those that exist.
- Reading: `Checkpoints` are those of one folder. `latest` and `of_step` check files (`Checkpoint.fault`) and return a
  sound `Checkpoint`, or raise. `fault_of_part` checks one file or folder in a checkpoint.
- Removing: `Checkpoints.drop` keeps the newest checkpoints, and the last one from before the loss diverged. `rewind`
  removes what comes after a step.

A `Checkpoint` reads its list once and remembers what it has hashed. Make a new `Checkpoints` where another process may
have written to the folder since.
"""

import os
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from dumo.io import digest
from dumo.io import file as files
from dumo.io.file import temp_path_for
from dumo.io.weights import title
from dumo.runtime import dist, shell_path
from dumo.training.agreement import gather_results
from dumo.training.duration import Timing
from dumo.training.state import FAR, Trend
from dumo.types import UserError

NAME = "state.json"  # the list, in a checkpoint
RUN = "spec.yaml"  # the run as YAML, in a checkpoint; another name than a run's folder has for it


class Unseen(UserError):  # noqa: N818, it says what cannot be seen
    """A place or a file that cannot be read: nothing is known of it, so it counts neither as missing nor as damaged."""

    @classmethod
    def of(cls, place: Path, error: OSError) -> "Unseen":
        """Make the error of a place: with the system's reason, or the file that is where a folder should be."""
        file = next((path for path in (place, *place.parents) if path.is_file()), None)
        if isinstance(error, NotADirectoryError) and file:
            fix = "put the folder back, or give another one"
            return cls(f"{place}: {file} is a file, and a folder is wanted there: {fix}")
        return cls(f"{place} cannot be read ({error.strerror}): mount its disk, or make it readable, and start again")


class Damaged(UserError):  # noqa: N818, as Unseen
    """A file of a checkpoint is missing or damaged: the message says which, and what is wrong."""


class FileEntry(BaseModel):
    """The entry of a file in a list: its size and SHA-256."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, file: Path) -> "FileEntry":
        """Make the entry of a file as it is now."""
        return cls(bytes=file.stat().st_size, sha256=digest.of_file(file))


class Manifest(BaseModel):
    """The content of a checkpoint's `state.json`."""

    step: int
    images: int
    skips: int = 0  # skipped steps in a row, up to this one
    trend: Trend = Trend()  # of the error up to this step
    ranks: int = 1  # that wrote it
    versions: dict[str, str] = {}
    frozen: str | None = None  # the digest of the frozen weights, which no file holds; None: there are none
    threads: int | None = None  # of torch on a CPU, which decide how sums round; None on a GPU
    timing: Timing | None = Field(default=None, exclude_if=lambda timing: timing is None)  # None: it ends by its steps
    log: FileEntry | None = None  # the rows of the run's log up to this step, from its beginning
    ledger: FileEntry | None = None  # what the images were that were read up to this step (`dumo.data.ledger`)
    files: dict[str, FileEntry]  # all but this one, by path inside the checkpoint
    sum: str | None = None  # of all other fields; None: of a checkpoint from before it was kept

    def checksum(self) -> str:
        """The value that `sum` must have: a digest of all other fields."""
        return digest.short(self.model_dump_json(exclude={"sum"}))


def file_entries(folder: Path, files: Iterable[Path]) -> dict[str, FileEntry]:
    """The entries of `files`, by path inside `folder`."""
    return {file.relative_to(folder).as_posix(): FileEntry.of(file) for file in files}


def write(checkpoint: Path, manifest: Manifest) -> None:
    """Write `state.json` with its checksum. Raises UserError if this rank does not see a file that it lists."""
    missing = [name for name in manifest.files if not (checkpoint / name).is_file()]
    if missing:
        raise UserError(
            f"{checkpoint.parent}: the first rank does not see what another wrote ({missing[0]}): train in a folder on "
            "a file system that all ranks share"
        )
    text = manifest.model_copy(update={"sum": manifest.checksum()}).model_dump_json(indent=2)
    (checkpoint / NAME).write_text(f"{text}\n", encoding="utf-8")


def read(checkpoint: Path) -> Manifest:
    """Read a checkpoint's `state.json`. Raises Damaged if it is missing or damaged, Unseen if it cannot be read."""
    file = checkpoint / NAME
    try:
        manifest = Manifest.model_validate_json(file.read_text(encoding="utf-8"))
        if manifest.sum not in (None, manifest.checksum()):
            raise ValueError("its own checksum is another")
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise Damaged(f"{file} is missing or damaged ({reason})") from error
    except OSError as error:
        raise Unseen.of(file, error) from error
    return manifest


class Checkpoint:
    """A checkpoint on disk. It reads its list and its run once, and remembers that its files were hashed."""

    def __init__(self, path: Path) -> None:
        """Take the folder `path`; nothing is read yet."""
        self.path = path
        self.is_verified = False  # whether this process wrote it, or has hashed all its files
        self.value_fault: str | None = None  # what is wrong with its values, though the files are as listed

    @cached_property
    def manifest(self) -> Manifest:
        """The content of `state.json`. Raises Damaged if it is missing or damaged, Unseen if it cannot be read."""
        return read(self.path)

    @cached_property
    def run_text(self) -> str:
        """The run as YAML.

        Raises Damaged if the file is missing or damaged, Unseen if it cannot be read.
        """
        entry = self.manifest.files.get(RUN)
        file = self.path / RUN
        if entry is None:
            raise Damaged(f"{file} is not listed in {NAME}")
        try:
            content = file.read_bytes()
        except FileNotFoundError as error:
            raise Damaged(f"{file} is missing") from error
        except OSError as error:
            raise Unseen.of(file, error) from error
        if len(content) != entry.bytes:
            raise Damaged(f"{file} has {len(content):,} bytes, not {entry.bytes:,}")
        if digest.of_bytes(content) != entry.sha256:
            raise Damaged(f"{file} is damaged: its SHA-256 is not the one in {NAME}")
        return content.decode()

    def fault(self, parts: Collection[str] | None = None, *, together: bool = False) -> str | None:
        """What is wrong, naming the file; None if exactly the listed files exist, unchanged.

        `parts` (net, ema-0.999; None: all) are hashed; of others only sizes are compared. `together`: all ranks call
        it, share the hashing and get one answer; else each rank hashes for itself. Raises Unseen for what cannot be
        read.
        """
        if not together:
            return self._fault(parts)
        answers = gather_results(lambda: self._fault(parts, slice(dist.rank(), None, dist.world())))
        return next((answer for answer in answers if answer), None)

    def is_sound(self) -> bool:
        """Whether all its files are as listed. They are hashed once; after that only sizes are compared."""
        if self._fault(parts=()):
            return False
        if not self.is_verified:
            self.is_verified = self.fault() is None
        return self.is_verified

    def is_good(self) -> bool:
        """Whether it is sound, and from before the loss diverged."""
        return self.is_sound() and self.manifest.trend.is_good

    def _fault(self, parts: Collection[str] | None, share: slice = slice(None)) -> str | None:
        """What is wrong, naming the file. Of the files of `parts`, only the `share` of their sorted names is hashed."""
        try:
            manifest = self.manifest
        except Damaged as error:
            return str(error)
        if self.value_fault:
            return self.value_fault
        if self.path.name != folder_of(manifest.step):
            return f"{self.path / NAME} is of step {manifest.step}, not of {self.path.name}"
        problem = _fault_of_sizes(self.path, manifest.files, _sizes(self.path))
        if problem:
            return problem
        names = sorted(manifest.files)
        if parts is not None:
            names = [name for name in names if _part(name) in parts or name == RUN]
        return _fault_of_contents(self, names[share])


def _fault_of_sizes(checkpoint: Path, entries: Mapping[str, FileEntry], sizes: Mapping[str, int]) -> str | None:
    """The first file that is not listed, missing, or of another size than its entry says; None if there is none."""
    for name in sorted(entries.keys() | sizes.keys()):
        file = checkpoint / name
        if name not in entries:
            return f"{file} is not listed in {NAME}"
        if name not in sizes:
            return f"{file} is missing"
        if sizes[name] != entries[name].bytes:
            return f"{file} has {sizes[name]:,} bytes, not {entries[name].bytes:,}"
    return None


def _fault_of_contents(checkpoint: Checkpoint, names: Iterable[str]) -> str | None:
    """The first file whose SHA-256 is not the listed one, or None. Raises Unseen for a file that cannot be read."""
    for name in names:
        if name == RUN:
            try:
                _ = checkpoint.run_text
            except Damaged as error:
                return str(error)
            continue
        file = checkpoint.path / name
        try:
            sha256 = digest.of_file(file)
        except FileNotFoundError:
            return f"{file} is missing"
        except OSError as error:
            raise Unseen.of(file, error) from error
        if sha256 != checkpoint.manifest.files[name].sha256:
            return f"{file} is damaged: its SHA-256 is not the one in {NAME}"
    return None


def fault_of_part(place: Path) -> str | None:
    """What is wrong with one part of a checkpoint, a file or a folder; None if nothing is, or if there is no list.

    Raises Unseen for what cannot be read.
    """
    folder = place.parent
    if not (folder / NAME).is_file():
        return None
    checkpoint = Checkpoint(folder)
    try:
        entries = checkpoint.manifest.files
    except Damaged as error:
        return str(error)
    part = title(place)
    entries = {name: entry for name, entry in entries.items() if _part(name) == part}
    sizes = {name: size for name, size in _sizes(folder).items() if _part(name) == part}
    return _fault_of_sizes(folder, entries, sizes) or _fault_of_contents(checkpoint, sorted(entries))


def _sizes(checkpoint: Path) -> dict[str, int]:
    """The bytes of each file of a checkpoint but its list and hidden files, by path inside the checkpoint."""

    def raise_unseen(error: OSError) -> None:
        raise Unseen.of(checkpoint, error) from error

    sizes: dict[str, int] = {}
    for directory, _, names in os.walk(checkpoint, onerror=raise_unseen):
        for name in names:
            path = Path(directory, name)
            if path.name.startswith(".") and path.suffix != ".safetensors":
                continue
            try:
                sizes[path.relative_to(checkpoint).as_posix()] = path.stat().st_size
            except OSError as error:
                if os.path.lexists(path):  # else it was removed meanwhile
                    raise Unseen.of(path, error) from error
    sizes.pop(NAME, None)
    return sizes


def _part(name: str) -> str:
    """The part of a checkpoint, such as net or ema-0.999, that a file belongs to."""
    return title(Path(Path(name).parts[0]))


class Checkpoints:
    """The checkpoints in a folder. Each call lists the folder anew; the list of a checkpoint is read once."""

    def __init__(self, folder: Path) -> None:
        """Take the folder of the checkpoints; nothing is read yet."""
        self.folder = folder
        self._checkpoints: dict[Path, Checkpoint] = {}

    def by_step(self) -> dict[int, Checkpoint]:
        """The checkpoints that exist now, damaged ones included, by step, in order. Raises as `paths_by_step`."""
        return {step: self.at(path) for step, path in paths_by_step(self.folder).items()}

    def at(self, path: Path) -> Checkpoint:
        """The checkpoint at a path: always the same object, which remembers what it has read."""
        if path not in self._checkpoints:
            self._checkpoints[path] = Checkpoint(path)
        return self._checkpoints[path]

    def note_written(self, path: Path) -> None:
        """Note that this process has written the whole checkpoint at `path`, so it need not be hashed."""
        checkpoint = Checkpoint(path)
        checkpoint.is_verified = True
        self._checkpoints[path] = checkpoint

    def latest(self, parts: Collection[str] | None = None, *, together: bool = False) -> Checkpoint | None:
        """The last checkpoint that is whole, or None if there is no checkpoint; warns of damaged ones.

        `parts` and `together` are as in `Checkpoint.fault`. Raises UserError if all are damaged.
        """
        damaged: list[str] = []
        for checkpoint in reversed(self.by_step().values()):
            problem = checkpoint.fault(parts, together=together)
            if problem:
                damaged.append(problem)
                continue
            if parts is None:
                checkpoint.is_verified = True
            if damaged and dist.is_main():
                warnings.warn(
                    f"{'; '.join(damaged)}: {checkpoint.path.name}, before it, is taken",
                    stacklevel=2,
                )
            return checkpoint
        if damaged:
            raise UserError(
                f"{'; '.join(damaged)}: {self.folder} has no whole checkpoint. Put back the files as they were, or "
                "give another folder with --out to train from the start"
            )
        return None

    def of_step(self, step: int) -> Checkpoint:
        """The checkpoint of a step that has one. Every rank must call it. Raises UserError if it is damaged."""
        checkpoint = self.by_step()[step]
        problem = checkpoint.fault(together=True)
        if problem:
            raise UserError(f"{problem}: go on from another step")
        return checkpoint

    def last_good(self, step: int) -> int | None:
        """The step of the last checkpoint up to `step` that is good (`Checkpoint.is_good`); None if there is none.

        One that is removed meanwhile, as by the thread that saves, is passed over.
        """
        for checkpoint_step, checkpoint in reversed(self.by_step().items()):
            if checkpoint_step > step:
                continue
            try:
                is_good = checkpoint.is_good()
            except Unseen:
                if os.path.lexists(checkpoint.path):
                    raise
                continue
            if is_good:
                return checkpoint_step
        return None

    def drop(self, step: int, keep: int) -> None:
        """Remove the checkpoints up to `step`, but for the last `keep` that are sound.

        If none of the last `keep` is good (`Trend.is_good`), the last good one before them stays too, with a warning.
        """
        still_to_keep = keep
        has_good = False
        for checkpoint_step, checkpoint in reversed(self.by_step().items()):
            if checkpoint_step > step:
                continue
            if still_to_keep:
                if checkpoint.is_sound():
                    still_to_keep -= 1
                    has_good = has_good or checkpoint.manifest.trend.is_good
            elif not has_good and checkpoint.is_good():
                has_good = True
                warnings.warn(
                    f"{self.folder}: the loss has risen to more than {FAR:g} times its lowest, so "
                    f"{checkpoint.path.name}, from before, is kept, too. To go on from it:  "
                    f"dumo train {shell_path(self.folder.parent)} --from {checkpoint_step}",
                    stacklevel=2,
                )
            else:
                remove(checkpoint.path)


def paths_by_step(folder: Path, suffix: str = "") -> dict[int, Path]:
    """The paths in `folder` that are named as checkpoints, or as files of this suffix, by step, in order.

    Raises Unseen for a folder that cannot be listed, and for a link to none: what cannot be seen may be there.
    """
    pattern = re.compile(rf"step-(\d+){re.escape(suffix)}")
    try:
        names = os.listdir(folder)
    except FileNotFoundError as error:
        if folder.is_symlink():
            raise Unseen.of(folder, error) from error
        return {}
    except OSError as error:
        raise Unseen.of(folder, error) from error
    paths: dict[int, Path] = {}
    for name in names:
        match = pattern.fullmatch(name)
        if match:
            paths[int(match[1])] = folder / name
    return dict(sorted(paths.items()))


def folder_of(step: int) -> str:
    """The name of the folder of a step's checkpoint."""
    return f"step-{step:08d}"


def weight_folders(run: Path) -> list[Path]:
    """The folders of a run that hold weights by step: checkpoints, milestones and the best weights."""
    return [run / "checkpoints", run / "milestones", run / "best"]


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; it is hidden first, so that half of one never looks like one.

    Of a file that some process has mapped, NFS keeps a part, and with it the hidden folder, until a later save.
    Of a symbolic link the link alone goes: the checkpoint that it leads to is kept elsewhere.
    """
    if checkpoint.is_symlink():
        checkpoint.unlink()
    else:
        files.remove(checkpoint.rename(temp_path_for(checkpoint)))


def rewind(folder: Path, step: int) -> list[int]:
    """Remove the checkpoints, or milestones, after a step; return their steps."""
    removed: list[int] = []
    for suffix in ("", ".safetensors"):
        for path_step, path in paths_by_step(folder, suffix).items():
            if path_step <= step:
                continue
            if path.is_dir():
                remove(path)
            else:
                path.unlink()
            removed.append(path_step)
    return removed
