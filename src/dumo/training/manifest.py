"""What a checkpoint says of itself in `state.json`, and whether its files are as it says.

It is written last, and lists every other file with its size and SHA-256. Nothing else would tell that a shard is gone:
whoever reads shards takes those that are there. Checkpoints from before there were lists are taken as they are.
"""

from collections.abc import Collection, Iterable
from pathlib import Path

from pydantic import BaseModel, ValidationError

from dumo import dist
from dumo.io import digest
from dumo.io.weights import title
from dumo.training.agreement import agreed
from dumo.training.trend import Trend
from dumo.types import UserError

NAME = "state.json"
_whole: set[tuple[Path, str]] = set()  # checkpoints that this process has written, or read to the end, by their lists
_broken: dict[tuple[Path, str], str] = {}  # those whose numbers it has found to be none, and what it found


class Listed(BaseModel):
    """A file that a checkpoint lists."""

    bytes: int
    sha256: str


class Manifest(BaseModel):
    """A checkpoint's `state.json`."""

    step: int
    images: int
    skips: int = 0  # the last steps in a row that were not applied
    trend: Trend = Trend()  # of the error up to this step
    ranks: int = 1  # that wrote it
    versions: dict[str, str] = {}
    frozen: str | None = None  # the digest of the weights that are not trained, which no file holds; None: all are
    files: dict[str, Listed] | None = None  # by path inside the checkpoint, all but this one; None: none were listed


def listed(folder: Path, files: Iterable[Path]) -> dict[str, Listed]:
    """These files of a folder as its list has them."""
    return {
        file.relative_to(folder).as_posix(): Listed(bytes=file.stat().st_size, sha256=digest.of_file(file))
        for file in files
    }


def write(checkpoint: Path, about: Manifest) -> None:
    """Write `state.json`. Raises UserError where files that it lists are not to be seen from here."""
    if lacking := [name for name in about.files or () if not (checkpoint / name).is_file()]:
        raise UserError(
            f"{checkpoint.parent}: the first rank does not see what another wrote ({lacking[0]}): train in a folder on "
            "a file system that all ranks share"
        )
    (checkpoint / NAME).write_text(about.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read(checkpoint: Path) -> Manifest:
    """What a checkpoint says of itself. Raises UserError where that is missing or damaged."""
    file = checkpoint / NAME
    try:
        return Manifest.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise UserError(f"{file} is missing or damaged ({what}): remove that checkpoint to resume earlier") from error


def fault(checkpoint: Path, parts: Collection[str] | None = None, *, together: bool = False) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if each that it lists is there, as it was, and no other.

    `parts` are those that will be read (net, ema-0.999): of others, their sizes must do; None: all. Files are hashed by
    all ranks `together`, which all must then ask, and get one answer; else each rank hashes them for itself.
    """
    if not together:
        return _fault(checkpoint, parts)
    answers = agreed(lambda: _fault(checkpoint, parts, slice(dist.rank(), None, dist.world())))
    return next((answer for answer in answers if answer), None)


def fault_of(place: Path) -> str | None:
    """What is wrong with one part of a checkpoint, a file or a folder; None if nothing, or where no list tells."""
    listed = (place.parent / NAME).is_file()
    return _fault(place.parent, {title(place)}, only=True) if listed else None


def remember(checkpoint: Path) -> None:
    """Take it from now on that this checkpoint is whole, until its list is another."""
    _whole.add(_key(checkpoint))


def condemn(checkpoint: Path, why: str) -> None:
    """Take it from now on that something is wrong with this checkpoint, though its files are as listed."""
    _broken[_key(checkpoint)] = why


def sound(checkpoint: Path) -> bool:
    """Whether a checkpoint is whole; each is read to the end once, after that its sizes must do."""
    if _fault(checkpoint, ()):
        return False
    if _key(checkpoint) not in _whole and not fault(checkpoint):
        remember(checkpoint)
    return _key(checkpoint) in _whole


def _fault(
    checkpoint: Path, parts: Collection[str] | None, hashed: slice = slice(None), *, only: bool = False
) -> str | None:
    """As `fault`, where of the files to be read these are `hashed`; `only`: as if the checkpoint had no others."""
    try:
        wanted = read(checkpoint).files
    except UserError as error:
        return str(error)
    if found := _broken.get(_key(checkpoint)):
        return found
    if wanted is None:
        return None
    sizes = _sizes(checkpoint)
    full = [name for name in sorted(wanted) if parts is None or _part(name) in parts]
    for name in sorted(wanted.keys() | sizes.keys()):
        if only and parts is not None and _part(name) not in parts:
            continue
        if name not in wanted:
            return f"{checkpoint / name} is none of the files that {NAME} lists"
        if name not in sizes:
            return f"{checkpoint / name} is missing"
        if sizes[name] != wanted[name].bytes:
            return f"{checkpoint / name} has {sizes[name]:,} bytes, not {wanted[name].bytes:,}"
    for name in full[hashed]:
        try:
            if digest.of_file(checkpoint / name) != wanted[name].sha256:
                return f"{checkpoint / name} is damaged: its SHA-256 is not the one in {NAME}"
        except OSError as error:  # the disk itself gives up
            return f"{checkpoint / name} cannot be read ({error})"
    return None


def _sizes(checkpoint: Path) -> dict[str, int]:
    """Bytes of each file that a list should name, by path inside the checkpoint; not what a file system hides there."""
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    seen = [path for path in files if path.suffix == ".safetensors" or not path.name.startswith(".")]
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in seen}
    return {name: size for name, size in sizes.items() if name != NAME}


def _key(checkpoint: Path) -> tuple[Path, str]:
    """A checkpoint and its list."""
    return checkpoint.absolute(), (checkpoint / NAME).read_text(encoding="utf-8")


def _part(name: str) -> str:
    """The part of a checkpoint that a file belongs to."""
    return title(Path(Path(name).parts[0]))
