"""A folder of shards, made one by one: by any number of ranks, and killed and started again at will.

    NAME.yaml                      what the shards are made of, and, once all are there, their sizes and checksums
    shard-00000.safetensors        rows

What is in a shard depends on its number alone. It is written beside its place, flushed and renamed; then so is a note
of its size and checksum, `shard-00000.json`. A shard without a note, or that differs from it, is made again. So it
never matters who made it, or how often that was interrupted. Rank k of n makes the shards k, k + n, k + 2 n ...; the
ranks need not run at once, nor know of each other. Whoever finds the last note in its place lists all in NAME.yaml.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar, runtime_checkable

import safetensors.torch
from pydantic import ValidationError
from torch import Tensor
from yaml import YAMLError

from dumo.io import digest, yaml
from dumo.io import file as files
from dumo.io.read import read_text
from dumo.io.table import REMAKE, Shard, Tick, sweep, write
from dumo.io.table import stem as name
from dumo.types import Spec, UserError


@runtime_checkable
class Contents(Protocol):
    """What NAME.yaml says: a spec."""

    word: ClassVar[str]  # what the folder is called

    @property
    def shards(self) -> tuple[Shard, ...]:
        """None until all are written."""
        ...

    @property
    def count(self) -> int:
        """How many shards there are, or will be."""
        ...

    def span(self, number: int) -> range:
        """The rows of the source that are in a shard."""
        ...

    def binding(self) -> dict[str, object]:
        """What must be the same to go on."""
        ...


C = TypeVar("C", bound=Spec)


def read(file: Path, kind: type[C]) -> C | None:
    """What NAME.yaml says, or None where there is none. Raises UserError if it is damaged."""
    if not file.is_file():
        return None
    try:
        return kind.model_validate(yaml.parse(read_text(file, "take another copy of it")))
    except (ValidationError, ValueError, YAMLError) as error:
        why = " ".join(str(error).split())
        raise UserError(
            f"{file} is damaged, or another version wrote it ({why}): encode into another folder"
        ) from error


def dump(contents: Spec) -> str:
    """As `read` reads it."""
    return yaml.dump(contents.model_dump(mode="json"))


def make(
    file: Path,
    contents: Contents,
    there: Callable[[], Contents | None],
    shard: Callable[[int, Callable[[int], None]], tuple[int, Mapping[str, Tensor]]],
    *,
    rank: int,
    world: int,
    tick: Tick,
) -> tuple[int, tuple[str, ...]]:
    """Make those of this rank's shards that are not there, or damaged: how many, and what was wrong with them.

    `there` reads `file` anew. `shard` gives, by a number, a shard's rows and tensors, and tells how many rows of the
    source are behind it. Raises UserError where the folder holds something else or the disk is full, OSError where
    nothing can be written, and as `shard`; the shards that stand are kept.
    """
    out = file.parent
    files.check_writable(out)
    claim(file, contents, there(), rank)
    sweep(out, rank, world)
    notes = noted(out, contents.count, there)
    made, done, damaged = 0, 0, list[str]()
    for number in range(rank, contents.count, world):
        note, title = notes.get(number), name(number)
        if note and (fault := note.fault(out, deep=True)):
            damaged.append(f"{note.file} {fault}")
            note, title = None, f"{damaged[-1]}, made again"
        if note is None:
            rows, tensors = shard(number, lambda behind, done=done, title=title: tick(done + behind, title))
            claim(file, contents, there(), rank)  # raises where another took the folder, as long as it was empty
            store(out, number, rows, tensors, rank)
            made += 1
        done += len(contents.span(number))
        tick(done, title)
    return made, tuple(damaged)


def claim(file: Path, contents: Contents, there: Contents | None, rank: int) -> None:
    """Take the folder, or go on in it. Raises UserError if it is taken."""
    out, new = file.parent, contents.binding()
    if there is not None and not there.shards and not any(out.glob("shard-*.json")) and there.binding() != new:
        there = None  # begun, and stopped before anything was made: that binds nobody
    if there is None:
        taken = out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir())
        if taken and not file.exists():  # not where another rank has begun meanwhile
            raise UserError(f"{out} is not empty and holds no {file.name}: give another folder")
        assert isinstance(contents, Spec)
        write(file, dump(contents).encode(), rank)
        return
    old = there.binding()
    if lines := [f"{key}: {old[key]} there, {new[key]} now" for key in new if old.get(key) != new[key]]:
        listed = "\n  ".join(lines)
        raise UserError(f"{out} holds another {contents.word}:\n  {listed}\nGive another folder, or remove this one")


def noted(out: Path, count: int, there: Callable[[], Contents | None]) -> dict[int, Shard]:
    """The shards that were written whole, by number: by their notes, else by what NAME.yaml says."""
    notes: dict[int, Shard] = {}
    for number in range(count):
        try:
            notes[number] = Shard.model_validate_json((out / f"{name(number)}.json").read_bytes())
        except (FileNotFoundError, ValidationError):
            continue
    known = there()  # after the notes: they are removed when it has them
    return dict(enumerate(known.shards if known else ())) | notes


def standing(out: Path, count: int, there: Callable[[], Contents | None]) -> tuple[Shard, ...]:
    """The shards that are there, by their notes and sizes."""
    notes = noted(out, count, there)
    return tuple(note for n in range(count) if (note := notes.get(n)) and not note.fault(out, deep=False))


def finish(file: Path, contents: Spec, count: int, rank: int) -> None:
    """Write NAME.yaml, which lists all shards now, and remove their notes."""
    write(file, dump(contents).encode(), rank)
    for number in range(count):
        (file.parent / f"{name(number)}.json").unlink(missing_ok=True)


def store(out: Path, number: int, rows: int, tensors: Mapping[str, Tensor], rank: int) -> None:
    """Write a shard, then its note."""
    data, file = safetensors.torch.save(dict(tensors)), f"{name(number)}.safetensors"
    note = Shard(file=file, rows=rows, size=len(data), sha256=digest.of_bytes(data))
    write(out / file, data, rank)
    write(out / f"{name(number)}.json", note.model_dump_json().encode(), rank)


def span(number: int, each: int, total: int) -> range:
    """The rows in a shard of `each` rows but the last, of `total`."""
    return range(number * each, min((number + 1) * each, total))


def require(folder: Path, shards: Sequence[Shard]) -> None:
    """Raise UserError where a shard is not there, or of another size."""
    if faults := [f"{shard.file} {fault}" for shard in shards if (fault := shard.fault(folder, deep=False))]:
        raise UserError(f"{folder}: {'; '.join(faults)}: {REMAKE}")
