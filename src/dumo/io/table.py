"""Tables on disk: named columns of tensors, in shards that any number of processes make, stopped and resumed at will.

    index.json                     columns, the inputs of the rows and their hash, and at last the hash of each shard
    shard-00000.safetensors        a tensor (rows, *shape) for each column; (entries, *shape) where rows have lengths
    shard-00000.json               what index.json will say of a shard, until it does

What is in a shard depends on the inputs and its number alone, and every file is written whole or not at all: so it does
not matter who made a shard, or how often that was interrupted. Rank k of n makes the shards k, k + n, k + 2 n ...; the
ranks need not run at once. A shard that is missing, cut short or changed is refused, or made again. Shards are mapped
into memory, so a table may be larger than it. All but the last hold as many rows of the source, less those that it left
out.
"""

import json
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from math import prod
from operator import not_
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Bool, Int64
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from torch import Tensor

from dumo.io import digest
from dumo.io import file as files
from dumo.io.read import read_json
from dumo.io.weights import load
from dumo.runtime import threads
from dumo.runtime.bound import ROWS
from dumo.types import Spec, UserError

FILE = "index.json"
MAPPED = 2**14  # shards mapped at a time; Linux allows 65,530 maps. Ours
REMAKE = "start the same dumo encode again, which re-makes what is damaged"
ELSEWHERE = "encode into another folder, or remove this one"

Tick = Callable[[int, str], None]  # (rows that this rank has read, a note)
Tensors = Mapping[str, Tensor]


class Column(Spec):
    """A tensor of each shard."""

    dtype: str
    shape: tuple[int, ...] = ()  # of a row, or of each of its entries
    lengths: str = Field(default="", exclude_if=not_)  # the column with the entries per row; "": one

    def fits(self, tensors: Tensors, name: str, rows: int) -> bool:
        """Whether the tensor of this name is the column of a shard of this many rows."""
        x, lengths = tensors.get(name), tensors.get(self.lengths)
        n = rows if lengths is None else int(lengths.sum())
        return x is not None and x.shape == (n, *self.shape) and x.dtype == self.torch_dtype

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype."""
        return getattr(torch, self.dtype)


class Shard(Spec):
    """A file of the folder, as it was written."""

    file: str
    rows: int
    size: int  # bytes
    sha256: str
    of: str = ""  # a hash of what its rows were made of, where that is known

    def fault(self, folder: Path, *, deep: bool) -> str | None:
        """What is wrong with the file, if anything is; its checksum is compared only if `deep`."""
        file = folder / self.file
        if not file.is_file():
            return "is not there"
        if (size := file.stat().st_size) != self.size:
            return f"has {size} of {self.size} bytes"
        return "has changed: its SHA-256 is another" if deep and digest.of_file(file) != self.sha256 else None


class Index(Spec):
    """What index.json says. The fields of a subclass are the inputs of the rows."""

    word: ClassVar[str] = "table"  # what the folder is called
    remake: ClassVar[str] = REMAKE  # what to do about a damaged shard
    repaired: ClassVar[bool] = True  # whether `make` makes a changed shard again, else refuses it
    format: Literal[2] = 2
    columns: dict[str, Column]
    rows: int = Field(ge=0)  # of the source
    shard_rows: int = Field(default=1024, gt=0, le=ROWS)  # of the source, to a shard
    inputs: str = ""  # SHA-256 of `binding`
    shards: tuple[Shard, ...] = ()  # none until all are written

    @property
    def count(self) -> int:
        """How many shards there are, or will be."""
        return -(-self.rows // self.shard_rows)

    def span(self, number: int) -> range:
        """The rows of the source in a shard."""
        return range(number * self.shard_rows, min((number + 1) * self.shard_rows, self.rows))

    def summary(self) -> str:
        """What a whole table holds, in words."""
        return f"{self.rows:,} rows"

    def binding(self) -> dict[str, Any]:
        """The inputs of the rows: these must be the same to go on."""
        return self.model_dump(mode="json", exclude={"inputs": True, "shards": True})

    def inputs_digest(self) -> str:
        """The SHA-256 of `binding`."""
        return digest.of_bytes(json.dumps(self.binding(), sort_keys=True).encode())


K = TypeVar("K", bound=Index)


@dataclass(frozen=True)
class Done:
    """What a rank did."""

    made: int  # shards
    damaged: tuple[str, ...]  # files that were made again, and what was wrong with them
    missing: int  # shards that other ranks have yet to make; 0: the table is whole


@dataclass(frozen=True)
class Table:
    """A table to read."""

    folder: Path
    index: Index
    memory: float = 0.0  # bytes, of shards that are read rather than mapped

    def __len__(self) -> int:
        return self.ends[-1]

    def take(
        self, rows: Int64[Tensor, " b"], column: str, other: str = "", where: Bool[Tensor, " b"] | None = None
    ) -> Tensor:
        """A column of these rows; where `where` is true, the column `other`, of the same shape.

        Of a column with lengths the rows must have one entry. Raises IndexError for a row that is not there, UserError
        for a damaged shard.
        """
        if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= len(self)):
            raise IndexError(f"rows are numbered from 0 to {len(self) - 1}")
        kind, names = self.index.columns[column], (column, other)
        found = np.empty((len(rows), prod(kind.shape) * kind.torch_dtype.itemsize), np.uint8)
        turned = [False] * len(rows) if where is None else where.tolist()
        for i, (row, turn) in enumerate(zip(rows.tolist(), turned, strict=True)):
            number = bisect_right(self.ends, row)
            shard, place = self.shard(number), row - self.ends[number]  # counted from the end
            found[i] = shard[names[turn]][int(shard[kind.lengths][:place].sum()) if kind.lengths else place]
        return torch.from_numpy(found).view(kind.torch_dtype).view(-1, *kind.shape)

    def fingerprint(self) -> str:
        """Of all shards' checksums."""
        return digest.short(*(f"{shard.rows} {shard.sha256}" for shard in self.index.shards))

    @cached_property
    def ends(self) -> list[int]:
        """Behind the last row of each shard."""
        return list(accumulate(shard.rows for shard in self.index.shards))

    @cached_property
    def shard(self) -> Callable[[int], dict[str, NDArray[np.uint8]]]:
        """A shard's rows as bytes, by column: mapped into memory where all take more than `memory` bytes, else read."""
        mapped = sum(shard.size for shard in self.index.shards) > self.memory

        @lru_cache(MAPPED if mapped else None)
        def loaded(number: int) -> dict[str, NDArray[np.uint8]]:
            tensors = self.tensors(number)
            flat = {name: x.reshape(len(x), prod(x.shape[1:])) for name, x in tensors.items()}
            found = {name: x.view(torch.uint8).numpy() for name, x in flat.items()}
            return found if mapped else {name: rows.copy() for name, rows in found.items()}

        return loaded

    def tensors(self, number: int) -> dict[str, Tensor]:
        """A shard's columns, mapped. Raises UserError where they are not as the index says."""
        shard, columns = self.index.shards[number], self.index.columns
        found = load(self.folder / shard.file)
        if not all(column.fits(found, name, shard.rows) for name, column in columns.items()):
            raise UserError(f"{self.folder}: {shard.file} holds other tensors than {FILE} says: {self.index.remake}")
        return {name: found[name] for name in columns}


def read(folder: Path, kind: type[K]) -> K | None:
    """What index.json says, or None where there is none. Raises UserError if it is damaged."""
    file = folder / FILE
    tree = read_json(file, ELSEWHERE) if file.is_file() else None
    try:
        found = None if tree is None else kind.model_validate(tree)
        why = "its inputs have another hash" if found and found.inputs != found.inputs_digest() else ""
    except ValidationError as error:
        found, why = None, " ".join(str(error).split())
    if why:
        raise UserError(f"{file} is damaged, or another version wrote it ({why}): {ELSEWHERE}")
    return found


def read_whole(folder: Path, kind: type[K], missing: str) -> K:
    """What index.json says of a whole table.

    Raises UserError where there is none, with the words `missing`; it is unfinished; or a shard is not there, or of
    another size.
    """
    found = read(folder, kind)
    if not found or not found.shards:
        unfinished = "is unfinished: start the same dumo encode again, and it goes on where it stopped"
        raise UserError(f"{folder} {unfinished if found else missing}")
    require(folder, found)
    return found


def require(folder: Path, index: Index, *, deep: bool = False) -> None:
    """Raise UserError where a shard is not there, or of another size; `deep`: or has another checksum."""
    if faults := [f"{shard.file} {fault}" for shard in index.shards if (fault := shard.fault(folder, deep=deep))]:
        raise UserError(f"{folder}: {'; '.join(faults)}: {index.remake}")


def share(rows: int, shard_rows: int, rank: int, world: int) -> int:
    """How many rows of a source are in the shards that a rank makes."""
    return sum(min(shard_rows, rows - first) for first in range(rank * shard_rows, rows, world * shard_rows))


def make(
    folder: Path,
    index: Index,
    shard: Callable[[int, Callable[[int], None]], Tensors],
    *,
    rank: int = 0,
    world: int = 1,
    of: Callable[[int], str] = lambda number: "",
    others: Mapping[str, bytes] | None = None,
    tick: Tick = lambda done, note: None,
) -> Done:
    """Make those of this rank's shards that are not there, or damaged.

    `shard` gives the tensors of a number, and calls back with the number of rows of the source that it has read; `of`
    then gives a hash of what they were made of. `others` are other files of the folder, by name. Raises UserError where
    the folder holds something else, or a shard has changed and is not to be repaired; OSError where the disk is full,
    or nothing can be written; and as `shard`. Finished shards are kept.
    """
    files.check_writable(folder)
    claim(folder, index, rank)
    sweep(folder, rank, world)
    notes = noted(folder, index)
    made, done, damaged = 0, 0, list[str]()
    for number in range(rank, index.count, world):
        note, title = notes.get(number), stem(number)
        if note and (fault := note.fault(folder, deep=True)):
            if not index.repaired and (folder / note.file).exists():
                raise UserError(f"{folder}: {note.file} {fault}: {index.remake}")
            damaged.append(f"{note.file} {fault}")
            note, title = None, f"{damaged[-1]}, made again"
        if note is None:

            def progress(behind: int, done: int = done, title: str = title) -> None:
                threads.check()
                tick(done + behind, title)

            tensors = shard(number, progress)
            claim(folder, index, rank)  # raises where another took the folder, as long as it was empty
            store(folder, number, tensors, rank, of(number))
            made += 1
        done += len(index.span(number))
        tick(done, title)
    for name, data in (others or {}).items():
        files.write(folder / name, data, writer=rank, durable=True)
    return Done(made, tuple(damaged), finish(folder, index, rank))


def claim(folder: Path, index: Index, rank: int) -> None:
    """Take the folder, or go on in it. Raises UserError if it is taken."""
    there, new = read(folder, type(index)), index.binding()
    if there is not None and not there.shards and not any(folder.glob("shard-*.json")) and there.binding() != new:
        there = None  # begun, and stopped before anything was made: that binds nobody
    if there is None:
        taken = folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
        if taken and not (folder / FILE).exists():  # not where another rank has begun meanwhile
            raise UserError(f"{folder} is not empty and holds no {FILE}: give another folder, or remove this one")
        index = index.model_copy(update={"inputs": index.inputs_digest()})
        files.write(folder / FILE, dump(index), writer=rank, durable=True)
        return
    old = there.binding()
    if lines := [f"{key}: {old[key]} there, {new[key]} now" for key in new if old.get(key) != new[key]]:
        listed = "\n  ".join(lines)
        way = "Give another folder (data.root, of texts net.texts.root), or remove this one"
        raise UserError(f"{folder} holds another {index.word}:\n  {listed}\n{way}")


def noted(folder: Path, index: Index) -> dict[int, Shard]:
    """The shards that were written whole, by number: by their notes, else by what index.json says."""
    notes: dict[int, Shard] = {}
    for number in range(index.count):
        try:
            notes[number] = Shard.model_validate_json((folder / f"{stem(number)}.json").read_bytes())
        except (FileNotFoundError, ValidationError):
            continue
    known = read(folder, type(index))  # after the notes: they are removed when it has them
    return dict(enumerate(known.shards if known else ())) | notes


def finish(folder: Path, index: Index, rank: int) -> int:
    """List all shards in index.json if they are there, and remove their notes. Returns how many are not there."""
    notes = noted(folder, index)
    whole = [note for n in range(index.count) if (note := notes.get(n)) and not note.fault(folder, deep=False)]
    if len(whole) == index.count:
        begun = read(folder, type(index)) or index  # by another rank, which may name another place of the weights
        listed = dump(begun.model_copy(update={"shards": tuple(whole)}))
        files.write(folder / FILE, listed, writer=rank, durable=True)
        for number in range(index.count):
            (folder / f"{stem(number)}.json").unlink(missing_ok=True)
    return index.count - len(whole)


def dump(index: Index) -> bytes:
    """As `read` reads it."""
    return (index.model_dump_json(indent=1) + "\n").encode()


def store(folder: Path, number: int, tensors: Tensors, rank: int, of: str) -> None:
    """Write a shard, then its note."""
    data, file = safetensors.torch.save(dict(tensors)), f"{stem(number)}.safetensors"
    rows = len(next(iter(tensors.values())))
    note = Shard(file=file, rows=rows, size=len(data), sha256=digest.of_bytes(data), of=of)
    files.write(folder / file, data, writer=rank, durable=True)
    files.write(folder / f"{stem(number)}.json", note.model_dump_json().encode(), writer=rank, durable=True)


def sweep(folder: Path, rank: int, world: int) -> None:
    """Remove what a killed rank left half-written: one of this number, or of one that no rank has now."""
    for half in folder.glob(".*.tmp"):
        writer = half.suffixes[-2][1:] if len(half.suffixes) > 1 else ""
        if writer.isdecimal() and int(writer) % world == rank:
            files.remove(half)


def stem(number: int) -> str:
    """A shard's name, without its ending."""
    return f"shard-{number:05d}"
