"""A checkpoint's `state.json`, whether its files are as listed there, and which checkpoints of a run are kept.

`state.json` is written last and lists every other file with its size and SHA-256. Nothing else would tell that a shard
is missing: a reader of shards takes those that are there. A run keeps its newest checkpoints, and the last one from
before the loss diverged.
"""

import os
import re
import shutil
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path

from pydantic import BaseModel, ValidationError

from dumo.io import digest
from dumo.io.file import hidden
from dumo.io.weights import title
from dumo.runtime import dist, typed
from dumo.training.agreement import agreed
from dumo.training.burst import Gradients
from dumo.training.state import FAR, Trend
from dumo.types import UserError

NAME = "state.json"
RUN = "spec.yaml"  # the run, in a checkpoint; no folder of a checkpoint is a run's
_whole: set[tuple[Path, str]] = set()  # checkpoints that this process wrote, or read to the end, by their lists
_broken: dict[tuple[Path, str], str] = {}  # those with numbers that are not finite, and which


class Unseen(UserError):  # noqa: N818, it says what cannot be seen
    """A place or a file that cannot be read: nothing is known of it, so it counts neither as missing nor as damaged."""

    @classmethod
    def of(cls, place: Path, error: OSError) -> "Unseen":
        """With the system's reason, or the file that stands where a folder is wanted."""
        file = next((above for above in (place, *place.parents) if above.is_file()), None)
        if isinstance(error, NotADirectoryError) and file:
            fix = "put the folder back, or give another one"
            return cls(f"{place}: {file} is a file, and a folder is wanted there: {fix}")
        return cls(f"{place} cannot be read ({error.strerror}): mount its disk, or make it readable, and start again")


class Listed(BaseModel):
    """A file that a checkpoint lists."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, file: Path) -> "Listed":
        """As it is now."""
        return cls(bytes=file.stat().st_size, sha256=digest.of_file(file))


class Manifest(BaseModel):
    """A checkpoint's `state.json`."""

    step: int
    images: int
    skips: int = 0  # skipped steps in a row, up to this one
    trend: Trend = Trend()  # of the error up to this step
    gradients: Gradients = Gradients()  # their norms by module, of the last steps up to this one
    ranks: int = 1  # that wrote it
    versions: dict[str, str] = {}
    frozen: str | None = None  # the digest of the frozen weights, which no file holds; None: there are none
    threads: int | None = None  # of the next step on a CPU; None: of a GPU, not chosen yet, or from before it was kept
    cores: int | None = None  # that these threads were chosen on
    log: Listed | None = None  # the rows of the run's log up to this step, from its beginning
    files: dict[str, Listed]  # all but this one, by path inside the checkpoint
    sum: str | None = None  # of all above; None: of a checkpoint from before it was kept

    def summed(self) -> str:
        """The checksum of all other fields."""
        without = {"sum"}
        if self.threads is None:  # so that of a checkpoint from before threads were kept stays
            without |= {"threads", "cores"}
        if not self.gradients.norms:  # likewise
            without |= {"gradients"}
        return digest.short(self.model_dump_json(exclude=without))


def listed(folder: Path, files: Iterable[Path]) -> dict[str, Listed]:
    """The entries of these files of a folder."""
    return {file.relative_to(folder).as_posix(): Listed.of(file) for file in files}


def write(checkpoint: Path, about: Manifest) -> None:
    """Write `state.json`. Raises UserError if this rank does not see a file that it lists."""
    if lacking := [name for name in about.files if not (checkpoint / name).is_file()]:
        raise UserError(
            f"{checkpoint.parent}: the first rank does not see what another wrote ({lacking[0]}): train in a folder on "
            "a file system that all ranks share"
        )
    text = about.model_copy(update={"sum": about.summed()}).model_dump_json(indent=2)
    (checkpoint / NAME).write_text(f"{text}\n", encoding="utf-8")


def read(checkpoint: Path) -> Manifest:
    """Read a checkpoint's `state.json`. Raises UserError if it is missing or damaged, Unseen if it cannot be read."""
    file = checkpoint / NAME
    try:
        about = Manifest.model_validate_json(file.read_text(encoding="utf-8"))
        if about.sum not in (None, about.summed()):
            raise ValueError("its own checksum is another")
        return about
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise UserError(f"{file} is missing or damaged ({what})") from error
    except OSError as error:
        raise Unseen.of(file, error) from error


def fault(checkpoint: Path, parts: Collection[str] | None = None, *, together: bool = False) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if the listed files are there, unchanged, and no others.

    `parts` (net, ema-0.999; None: all) are hashed; of others only sizes are compared. `together`: all ranks call it,
    share the hashing and get one answer; else each rank hashes for itself. Raises Unseen for what cannot be read.
    """
    if not together:
        return _fault(checkpoint, parts)
    answers = agreed(lambda: _fault(checkpoint, parts, slice(dist.rank(), None, dist.world())))
    return next((answer for answer in answers if answer), None)


def run_of(checkpoint: Path) -> Path | None:
    """The file of a checkpoint that says which run it is of; None: it is from before there was one.

    Raises UserError if it is damaged, or `state.json` is.
    """
    listed = read(checkpoint).files.get(RUN)
    if listed and (wrong := _fault(checkpoint, {RUN}, only=True)):
        raise UserError(wrong)
    return checkpoint / RUN if listed else None


def fault_of(place: Path) -> str | None:
    """What is wrong with one part of a checkpoint, a file or a folder; None if nothing, or if there is no list."""
    listed = (place.parent / NAME).is_file()
    return _fault(place.parent, {title(place)}, only=True) if listed else None


def remember(checkpoint: Path) -> None:
    """Remember that this checkpoint is whole, as long as its list is the same."""
    _whole.add(_key(checkpoint))


def condemn(checkpoint: Path, why: str) -> None:
    """Remember that something is wrong with this checkpoint, though its files are as listed."""
    _broken[_key(checkpoint)] = why


def sound(checkpoint: Path) -> bool:
    """Whether a checkpoint is whole; it is hashed once, after that only sizes are compared."""
    if _fault(checkpoint, ()):
        return False
    if _key(checkpoint) not in _whole and not fault(checkpoint):
        remember(checkpoint)
    return _key(checkpoint) in _whole


def _fault(
    checkpoint: Path, parts: Collection[str] | None, hashed: slice = slice(None), *, only: bool = False
) -> str | None:
    """As `fault`, hashing only some of the files of `parts`; `only`: as if the checkpoint had no other parts."""
    try:
        about = read(checkpoint)
    except Unseen:
        raise
    except UserError as error:
        return str(error)
    if found := _broken.get(_key(checkpoint)):
        return found
    wanted, sizes = about.files, _sizes(checkpoint)
    if not only and checkpoint.name != folder_of(about.step):
        return f"{checkpoint / NAME} is of step {about.step}, not of {checkpoint.name}"
    full = [name for name in sorted(wanted) if parts is None or _part(name) in parts or (name == RUN and not only)]
    for name in sorted(wanted.keys() | sizes.keys()):
        if only and parts is not None and _part(name) not in parts:
            continue
        if name not in wanted:
            return f"{checkpoint / name} is not listed in {NAME}"
        if name not in sizes:
            return f"{checkpoint / name} is missing"
        if sizes[name] != wanted[name].bytes:
            return f"{checkpoint / name} has {sizes[name]:,} bytes, not {wanted[name].bytes:,}"
    for name in full[hashed]:
        try:
            if digest.of_file(checkpoint / name) != wanted[name].sha256:
                return f"{checkpoint / name} is damaged: its SHA-256 is not the one in {NAME}"
        except FileNotFoundError:
            return f"{checkpoint / name} is missing"
        except OSError as error:
            raise Unseen.of(checkpoint / name, error) from error
    return None


def _sizes(checkpoint: Path) -> dict[str, int]:
    """Bytes of each file that belongs in a list, by path inside the checkpoint; hidden files do not."""

    def unseen(error: OSError) -> None:
        raise Unseen.of(checkpoint, error) from error

    found: dict[str, int] = {}
    for path in [Path(above, name) for above, _, names in os.walk(checkpoint, onerror=unseen) for name in names]:
        if path.name.startswith(".") and path.suffix != ".safetensors":
            continue
        try:
            found[path.relative_to(checkpoint).as_posix()] = path.stat().st_size
        except OSError as error:
            if os.path.lexists(path):  # else it was removed meanwhile
                raise Unseen.of(path, error) from error
    found.pop(NAME, None)
    return found


def _key(checkpoint: Path) -> tuple[Path, str]:
    """A checkpoint's path and its list."""
    return checkpoint.absolute(), (checkpoint / NAME).read_text(encoding="utf-8")


def _part(name: str) -> str:
    """The part of a checkpoint that a file is of."""
    return title(Path(Path(name).parts[0]))


def standing(folder: Path, suffix: str = "") -> dict[int, Path]:
    """The checkpoints in `folder`, damaged ones included, or its files of this suffix, by step, in order.

    Raises Unseen for a folder that cannot be listed, and for a link to none: what cannot be seen may be there.
    """
    name = re.compile(rf"step-(\d+){re.escape(suffix)}")
    try:
        names = os.listdir(folder)
    except FileNotFoundError as error:
        if folder.is_symlink():
            raise Unseen.of(folder, error) from error
        return {}
    except OSError as error:
        raise Unseen.of(folder, error) from error
    found = {int(match[1]): folder / match[0] for match in map(name.fullmatch, names) if match}
    return dict(sorted(found.items()))


def folder_of(step: int) -> str:
    """What a checkpoint of a step is called."""
    return f"step-{step:08d}"


def places(run: Path) -> list[Path]:
    """The folders of a run that hold weights by step: checkpoints, milestones, the best, snapshots of each average."""
    return [*(run / name for name in ("checkpoints", "milestones", "best")), *sorted((run / "snapshots").glob("*"))]


def drop(folder: Path, step: int, keep: int) -> None:
    """Remove the checkpoints up to a step that come before the last `keep` whole ones.

    If none of those is good (`Trend.good`), the last good one before them stays, with a warning.
    """
    good = False
    for n, path in [found for found in reversed(standing(folder).items()) if found[0] <= step]:
        if keep:
            if sound(path):
                keep, good = keep - 1, good or read(path).trend.good
        elif not good and sound(path) and read(path).trend.good:
            good = True
            warnings.warn(
                f"{folder}: the loss has risen to more than {FAR:g} times its lowest, so {path.name}, from before, "
                f"is kept, too. To go on from it:  dumo train {typed(folder.parent)} --from {n}",
                stacklevel=2,
            )
        else:
            remove(path)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; it is hidden first, so that half of one never looks like one.

    Of a symbolic link the link alone goes: the checkpoint that it leads to is kept elsewhere.
    """
    if checkpoint.is_symlink():
        checkpoint.unlink()
    else:
        shutil.rmtree(checkpoint.rename(hidden(checkpoint)))


def rewind(folder: Path, step: int) -> list[int]:
    """Remove the checkpoints, or milestones, after a step; return their steps."""
    found = [one for suffix in ("", ".safetensors") for one in standing(folder, suffix).items()]
    later = {path: n for n, path in found if n > step}
    for path in later:
        remove(path) if path.is_dir() else path.unlink()
    return [*later.values()]
