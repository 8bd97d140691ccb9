"""Tables on disk: named columns of tensors, in shards that any number of processes make, stopped and resumed at will.

A table is a folder:

    index.json                     columns, the inputs of the rows and their hash, and at last the hash of each shard
    shard-00000.safetensors        a tensor (rows, *shape) for each column; (entries, *shape) where rows have lengths
    shard-00000.json               what index.json will say of a shard, until it does

`make` writes it. Each rank

1. claims the folder: it writes index.json into an empty one, or compares its inputs with those there;
2. makes its shards that are missing or damaged, each with its .json. Rank k of n makes the shards k, k + n, ...; the
   ranks need not run at once;
3. if all ranks' shards are there, lists them in index.json and removes their .json files.

What is in a shard depends on the inputs and its number alone, and every file is written whole or not at all: so it does
not matter who made a shard, or how often that was interrupted. All shards but the last hold as many rows of the source,
less those that the source left out.

`read_finished` reads the index of a finished table, `read` of any. `require` compares its files with it. `ShardTable`
then reads rows; shards are mapped into memory, so a table may be larger than it.
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

from dumo.io import digest, weights
from dumo.io import file as files
from dumo.io.read import read_json
from dumo.runtime import threads
from dumo.runtime.bound import ROWS
from dumo.types import Spec, UserError

FILE = "index.json"
MAX_MAPPED = 2**14  # shards mapped at a time; Linux allows 65,530 maps. Ours
REMAKE = "start the same dumo encode again, which re-makes what is damaged"
ELSEWHERE = "encode into another folder, or remove this one"

Tick = Callable[[int, str], None]  # is called with the rows of the source that this rank has read, and a note
Tensors = Mapping[str, Tensor]


class Column(Spec):
    """A column of a table: in each shard, a tensor of one entry for each row, or of as many as `lengths` says."""

    dtype: str
    shape: tuple[int, ...] = ()  # of an entry
    lengths: str = Field(default="", exclude_if=not_)  # the column that has the number of entries of each row; "": one

    def fits(self, tensors: Tensors, name: str, rows: int) -> bool:
        """Whether the tensor of this name is the column of a shard of this many rows."""
        x = tensors.get(name)
        if x is None:
            return False
        lengths = tensors.get(self.lengths)
        entries = rows if lengths is None else int(lengths.sum())
        return x.shape == (entries, *self.shape) and x.dtype == self.torch_dtype

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch has it."""
        return getattr(torch, self.dtype)


class Shard(Spec):
    """A shard's file, as it was written."""

    file: str  # its name
    rows: int
    size: int  # bytes
    sha256: str
    of: str = ""  # a hash of what its rows were made of, where that is known

    def fault(self, folder: Path, *, deep: bool) -> str | None:
        """What is wrong with the file, for a message; None: nothing. `deep`: its checksum is compared, too."""
        file = folder / self.file
        if not file.is_file():
            return "is not there"
        size = file.stat().st_size
        if size != self.size:
            return f"has {size} of {self.size} bytes"
        if deep and digest.of_file(file) != self.sha256:
            return "has changed: its SHA-256 is another"
        return None


class TableIndex(Spec):
    """The contents of index.json. The fields of a subclass are the inputs of the rows."""

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
        """The number of shards of the finished table."""
        return -(-self.rows // self.shard_rows)

    def span(self, number: int) -> range:
        """The rows of the source in a shard."""
        return range(number * self.shard_rows, min((number + 1) * self.shard_rows, self.rows))

    def summary(self) -> str:
        """What a finished table holds, in words."""
        return f"{self.rows:,} rows"

    def binding(self) -> dict[str, Any]:
        """The inputs of the rows: where they are others, a table is not continued."""
        return self.model_dump(mode="json", exclude={"inputs": True, "shards": True})

    def inputs_digest(self) -> str:
        """The SHA-256 of `binding`."""
        return digest.of_bytes(json.dumps(self.binding(), sort_keys=True).encode())


K = TypeVar("K", bound=TableIndex)


@dataclass(frozen=True)
class MakeResult:
    """What `make` did on a rank."""

    made: int  # shards
    damaged: tuple[str, ...]  # files that were made again, and what was wrong with them
    missing: int  # shards that other ranks have yet to make; 0: the table is finished


@dataclass(frozen=True)
class ShardTable:
    """The rows of a finished table."""

    folder: Path
    index: TableIndex
    memory: float = 0.0  # bytes; shards of no more in all are read into memory, not mapped

    def __len__(self) -> int:
        return self.ends[-1]

    def take(
        self, rows: Int64[Tensor, " b"], column: str, other: str = "", where: Bool[Tensor, " b"] | None = None
    ) -> Tensor:
        """The entries of some rows in a column, (b, *shape); where `where` is true, in the column `other`.

        Both columns have one shape. In a column with lengths each row must have one entry. Raises IndexError for a row
        that the table does not have, UserError for a damaged shard.
        """
        if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= len(self)):
            raise IndexError(f"rows are numbered from 0 to {len(self) - 1}")
        layout = self.index.columns[column]
        taken = np.empty((len(rows), prod(layout.shape) * layout.torch_dtype.itemsize), np.uint8)
        takes_other = [False] * len(rows) if where is None else where.tolist()
        for i, (row, is_other) in enumerate(zip(rows.tolist(), takes_other, strict=True)):
            number = bisect_right(self.ends, row)
            shard = self.shard(number)
            entry = row - self.ends[number]  # negative: counted from the shard's end
            if layout.lengths:
                entry = int(shard[layout.lengths][:entry].sum())
            name = other if is_other else column
            taken[i] = shard[name][entry]
        return torch.from_numpy(taken).view(layout.torch_dtype).view(-1, *layout.shape)

    def fingerprint(self) -> str:
        """A digest of all shards' rows and checksums."""
        return digest.short(*(f"{shard.rows} {shard.sha256}" for shard in self.index.shards))

    @cached_property
    def ends(self) -> list[int]:
        """By shard, the number of the first row after it."""
        return list(accumulate(shard.rows for shard in self.index.shards))

    @cached_property
    def shard(self) -> Callable[[int], dict[str, NDArray[np.uint8]]]:
        """A function that loads a shard by its number: the entries of each column, as bytes.

        Shards are mapped into memory where all of them take more than `memory` bytes, else read.
        """
        is_mapped = sum(shard.size for shard in self.index.shards) > self.memory

        @lru_cache(MAX_MAPPED if is_mapped else None)
        def loaded(number: int) -> dict[str, NDArray[np.uint8]]:
            columns: dict[str, NDArray[np.uint8]] = {}
            for name, x in self.tensors(number).items():
                row_bytes = x.reshape(len(x), prod(x.shape[1:])).view(torch.uint8).numpy()
                columns[name] = row_bytes if is_mapped else row_bytes.copy()
            return columns

        return loaded

    def tensors(self, number: int) -> dict[str, Tensor]:
        """The columns of a shard, mapped into memory. Raises UserError where they are not as the index says."""
        shard = self.index.shards[number]
        columns = self.index.columns
        tensors = weights.load(self.folder / shard.file)
        for name, column in columns.items():
            if not column.fits(tensors, name, shard.rows):
                raise UserError(
                    f"{self.folder}: {shard.file} holds other tensors than {FILE} says: {self.index.remake}"
                )
        return {name: tensors[name] for name in columns}


def read(folder: Path, kind: type[K]) -> K | None:
    """The index of a table, finished or not; None where there is none. Raises UserError if it is damaged."""
    file = folder / FILE
    if not file.is_file():
        return None
    tree = read_json(file, ELSEWHERE)
    try:
        index = kind.model_validate(tree)
    except ValidationError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file} is damaged, or another version wrote it ({reason}): {ELSEWHERE}") from error
    if index.inputs != index.inputs_digest():
        raise UserError(f"{file} is damaged, or another version wrote it (its inputs have another hash): {ELSEWHERE}")
    return index


def read_finished(folder: Path, kind: type[K], missing: str) -> K:
    """The index of a finished table.

    Raises UserError where there is no table, in the words of `missing`; where it is unfinished; and where a shard is
    missing or has another size.
    """
    index = read(folder, kind)
    if index is None:
        raise UserError(f"{folder} {missing}")
    if not index.shards:
        raise UserError(f"{folder} is unfinished: start the same dumo encode again, and it resumes where it stopped")
    require(folder, index)
    return index


def require(folder: Path, index: TableIndex, *, deep: bool = False) -> None:
    """Raise UserError where a shard is missing or has another size; `deep`: or has another checksum."""
    faults: list[str] = []
    for shard in index.shards:
        fault = shard.fault(folder, deep=deep)
        if fault:
            faults.append(f"{shard.file} {fault}")
    if faults:
        raise UserError(f"{folder}: {'; '.join(faults)}: {index.remake}")


def rows_of_rank(rows: int, shard_rows: int, rank: int, world: int) -> int:
    """The number of rows of a source that are in the shards of a rank."""
    return sum(min(shard_rows, rows - first) for first in range(rank * shard_rows, rows, world * shard_rows))


def make(
    folder: Path,
    index: TableIndex,
    shard: Callable[[int, Callable[[int], None]], Tensors],
    *,
    rank: int = 0,
    world: int = 1,
    of: Callable[[int], str] = lambda number: "",
    others: Mapping[str, bytes] | None = None,
    tick: Tick = lambda done, note: None,
) -> MakeResult:
    """Make this rank's shards that are missing or damaged.

    `shard` returns the tensors of a shard by its number, and calls back with the number of rows of the source that it
    has read; `of` then returns a hash of what these rows were made of, by the shard's number. `others` are other files
    of the folder, by name. `tick` is called with the rows that this rank has read, and a note.

    Raises UserError where the folder holds something else, or a shard has changed and is not to be repaired; OSError
    where the disk is full, or nothing can be written; and as `shard`. Finished shards are kept.
    """
    files.check_writable(folder)
    _claim(folder, index, rank)
    _sweep(folder, rank, world)
    shards = written_shards(folder, index)
    made = 0
    rows_done = 0
    damaged: list[str] = []
    for number in range(rank, index.count, world):
        written = shards.get(number)
        title = _stem(number)
        fault = written.fault(folder, deep=True) if written else None
        if written and fault:
            if not index.repaired and (folder / written.file).exists():
                raise UserError(f"{folder}: {written.file} {fault}: {index.remake}")
            damaged.append(f"{written.file} {fault}")
            title = f"{written.file} {fault}, made again"
            written = None
        if written is None:

            def progress(rows_read: int, rows_done: int = rows_done, title: str = title) -> None:
                threads.check()
                tick(rows_done + rows_read, title)

            tensors = shard(number, progress)
            _claim(folder, index, rank)  # raises where another took the folder, as long as it was empty
            _store_shard(folder, number, tensors, rank, of(number))
            made += 1
        rows_done += len(index.span(number))
        tick(rows_done, title)
    for name, data in (others or {}).items():
        files.write(folder / name, data, writer=rank, durable=True)
    missing = _finish(folder, index, rank)
    return MakeResult(made, tuple(damaged), missing)


def _claim(folder: Path, index: TableIndex, rank: int) -> None:
    """Write an index into an empty folder, or resume a table of equal inputs. Raises UserError for other folders."""
    existing = read(folder, type(index))
    inputs = index.binding()
    is_empty = existing is not None and not existing.shards and not any(folder.glob("shard-*.json"))
    if existing is not None and is_empty and existing.binding() != inputs:
        existing = None  # it was begun, and stopped before a shard was made: its inputs do not matter
    if existing is None:
        is_in_use = folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
        if is_in_use and not (folder / FILE).exists():  # not where another rank has begun meanwhile
            raise UserError(f"{folder} is not empty and holds no {FILE}: give another folder, or remove this one")
        index = index.model_copy(update={"inputs": index.inputs_digest()})
        files.write(folder / FILE, _dump(index), writer=rank, durable=True)
        return
    existing_inputs = existing.binding()
    differences: list[str] = []
    for key, value in inputs.items():
        if existing_inputs.get(key) != value:
            differences.append(f"{key}: {existing_inputs[key]} there, {value} now")
    if differences:
        listed = "\n  ".join(differences)
        raise UserError(
            f"{folder} holds another {index.word}:\n  {listed}\nGive another folder (data.root, of texts "
            "net.texts.root), or remove this one"
        )


def written_shards(folder: Path, index: TableIndex) -> dict[int, Shard]:
    """The shards that were written, by number: from their .json files, else from index.json."""
    notes: dict[int, Shard] = {}
    for number in range(index.count):
        try:
            notes[number] = Shard.model_validate_json((folder / f"{_stem(number)}.json").read_bytes())
        except (FileNotFoundError, ValidationError):
            continue
    existing = read(folder, type(index))  # after the notes: they are removed once it lists them
    listed = dict(enumerate(existing.shards)) if existing else {}
    return listed | notes


def _finish(folder: Path, index: TableIndex, rank: int) -> int:
    """List all shards in index.json once all are there, and remove their .json files. Returns how many are missing."""
    shards = written_shards(folder, index)
    intact: list[Shard] = []
    for number in range(index.count):
        shard = shards.get(number)
        if shard and not shard.fault(folder, deep=False):
            intact.append(shard)
    if len(intact) == index.count:
        existing = read(folder, type(index)) or index  # by another rank, which may name another place of the weights
        finished = _dump(existing.model_copy(update={"shards": tuple(intact)}))
        files.write(folder / FILE, finished, writer=rank, durable=True)
        for number in range(index.count):
            (folder / f"{_stem(number)}.json").unlink(missing_ok=True)
    return index.count - len(intact)


def _dump(index: TableIndex) -> bytes:
    """The bytes of index.json."""
    return (index.model_dump_json(indent=1) + "\n").encode()


def _store_shard(folder: Path, number: int, tensors: Tensors, rank: int, of: str) -> None:
    """Write a shard, then its .json file; `of` is a hash of what its rows were made of."""
    data = safetensors.torch.save(dict(tensors))
    file = f"{_stem(number)}.safetensors"
    rows = len(next(iter(tensors.values())))
    note = Shard(file=file, rows=rows, size=len(data), sha256=digest.of_bytes(data), of=of)
    files.write(folder / file, data, writer=rank, durable=True)
    files.write(folder / f"{_stem(number)}.json", note.model_dump_json().encode(), writer=rank, durable=True)


def _sweep(folder: Path, rank: int, world: int) -> None:
    """Remove the temporary files of killed ranks whose shards are this rank's now."""
    for temp_path in folder.glob(".*.tmp"):
        writer = temp_path.suffixes[-2][1:] if len(temp_path.suffixes) > 1 else ""
        if writer.isdecimal() and int(writer) % world == rank:
            files.remove(temp_path)


def _stem(number: int) -> str:
    """The name of a shard's files, without their endings."""
    return f"shard-{number:05d}"
