"""Tables on disk: named columns of tensors in shards, which any number of processes can write, stop and resume.

A table is a folder:

    index.json                     columns, the inputs of the rows and their hash, and at last the hash of each shard
    shard-00000.safetensors        a tensor (rows, *shape) for each column; (entries, *shape) where rows have lengths
    shard-00000.json               what index.json will say of a shard, until it does

`make_shards` writes it. Each rank

1. claims the folder: it writes index.json into an empty one, or compares its inputs with those there;
2. makes its shards that are missing or damaged, or that left out rows of a source that is another now, each with its
   .json. Rank k of n makes the shards k, k + n, ...; the ranks need not run at once;
3. if all ranks' shards are there, lists them in index.json and removes their .json files.

What is in a shard depends on the inputs and its number alone, and every file is written whole or not at all: so it does
not matter who made a shard, or how often that was interrupted. All shards but the last hold as many rows of the source,
less those that the source left out.

To read a table: `read_finished_index` reads the index of a finished one, and `read_index` that of any. `require_intact`
compares the files with the index. `ShardTable` then reads rows, or whole shards, which are mapped into memory, so a
table may be larger than it.

For who makes a table: `written_shards` says which shards are there, `rows_of_rank` how much a rank has to read, and
`concatenate` joins the rows of several batches.

The fields of `TableIndex`, `Column` and `Shard` are the keys of the JSON files: a new name there is a new format.
"""

import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
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

from dumo.io import digest, tensor_files
from dumo.io import file as files
from dumo.io.read import read_json
from dumo.runtime.limits import ROWS
from dumo.types import Spec, UserError

FILE = "index.json"
MAX_MAPPED = 2**14  # shards mapped at a time; Linux allows 65,530 maps. Ours
# The fixes that messages end with.
REMAKE = "run the same dumo encode again, which re-creates damaged files"
ELSEWHERE = "encode into another folder, or remove this one"

Tick = Callable[[int, str], None]  # is called with the rows of the source that this rank has read, and a note
ColumnBytes = NDArray[np.uint8]  # (entries, bytes of an entry): numpy has no bfloat16
Tensors = Mapping[str, Tensor]  # the columns of a shard, by name
MakeShard = Callable[[int, Callable[[int], None]], Tensors]  # (number, callback with the rows read so far) -> columns


class Column(Spec):
    """A column of a table. In each shard it is a tensor (entries, *shape), with the entries of the first row first."""

    dtype: str  # as torch and numpy both name it
    shape: tuple[int, ...] = ()  # of an entry
    # The name of the column with the number of entries of each row; "": each row has one entry.
    lengths: str = Field(default="", exclude_if=not_)

    def fits(self, tensors: Tensors, name: str, rows: int) -> bool:
        """Whether the tensors of a shard of this many rows have this column, `name`, with its dtype and shape."""
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
    source: str = ""  # a digest of the sizes and times of what its rows were made of; "": unknown

    def fault(self, folder: Path, *, deep: bool) -> str | None:
        """Return a description of what is wrong with the file, or None. `deep` compares its checksum."""
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
    """The contents of index.json. A subclass adds the inputs that its rows were made of as fields."""

    noun: ClassVar[str] = "table"  # what messages call the folder
    remake_hint: ClassVar[str] = REMAKE  # the fix that messages about a damaged shard end with
    is_repairable: ClassVar[bool] = True  # whether `make_shards` makes a changed shard again; else it raises UserError
    format: Literal[2] = 2
    columns: dict[str, Column]
    rows: int = Field(ge=0)  # of the source
    shard_rows: int = Field(default=1024, gt=0, le=ROWS)  # of the source, to a shard
    inputs: str = ""  # SHA-256 of `binding`
    shards: tuple[Shard, ...] = ()  # none until all are written

    @property
    def num_shards(self) -> int:
        """The number of shards that the table has once it is finished."""
        return -(-self.rows // self.shard_rows)

    def span(self, number: int) -> range:
        """Return the numbers of the source's rows that the shard of this number is made of."""
        return range(number * self.shard_rows, min((number + 1) * self.shard_rows, self.rows))

    def summary(self) -> str:
        """What a finished table holds, in words."""
        return f"{self.rows:,} rows"

    def binding(self) -> dict[str, Any]:
        """Return the inputs of the rows, as plain values."""
        return self.model_dump(mode="json", exclude={"inputs": True, "shards": True})

    def compared_inputs(self) -> dict[str, Any]:
        """Return the inputs by which two indices are compared: a table is resumed only where they are equal."""
        return self.binding()

    def inputs_digest(self) -> str:
        """Return the SHA-256 of `binding`."""
        return digest.of_bytes(json.dumps(self.binding(), sort_keys=True).encode())


K = TypeVar("K", bound=TableIndex)


@dataclass(frozen=True)
class MakeResult:
    """What `make_shards` did on a rank."""

    made: int  # the number of shards that this rank made
    damaged: tuple[str, ...]  # a line for each file that was made again: its name, and what was wrong with it
    missing: int  # shards that other ranks have yet to make; 0: the table is finished


@dataclass(frozen=True)
class ShardTable:
    """A finished table, to read rows (`take`) or whole shards (`tensors`) of."""

    folder: Path
    index: TableIndex
    memory: float = 0.0  # bytes; a table of at most this size is read into memory, a larger one is mapped

    def __len__(self) -> int:
        return self.first_rows[-1]

    def take(
        self,
        rows: Int64[Tensor, " b"],
        column: str,
        other_column: str = "",
        takes_other: Bool[Tensor, " b"] | None = None,
    ) -> Tensor:
        """Return the entries (b, *shape) of rows, from `column`, or from `other_column` where `takes_other` is true.

        Both columns have one shape and one `lengths`. In a column with lengths each of the rows must have one entry.
        Raises IndexError for a row that the table does not have, UserError for a damaged shard.
        """
        if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= len(self)):
            raise IndexError(f"rows are numbered from 0 to {len(self) - 1}")
        load_bytes = self._bytes_loader
        layout = self.index.columns[column]
        entry_bytes = np.empty((len(rows), prod(layout.shape) * layout.torch_dtype.itemsize), np.uint8)
        from_other = [False] * len(rows) if takes_other is None else takes_other.tolist()
        for i, (row, is_other) in enumerate(zip(rows.tolist(), from_other, strict=True)):
            number, row_in_shard = self.locate(row)
            columns = load_bytes(number)
            entry = self._first_entry(columns, layout.lengths, row_in_shard) if layout.lengths else row_in_shard
            name = other_column if is_other else column
            entry_bytes[i] = columns[name][entry]
        return torch.from_numpy(entry_bytes).view(layout.torch_dtype).view(-1, *layout.shape)

    def _first_entry(self, columns: Mapping[str, ColumnBytes], lengths_column: str, row: int) -> int:
        """Return the place of a row's first entry: the number of entries of all rows before it in its shard."""
        lengths = columns[lengths_column].view(self.index.columns[lengths_column].dtype)
        return int(lengths[:row].sum())

    def fingerprint(self) -> str:
        """Return a digest of all shards' rows and checksums."""
        return digest.short(*(f"{shard.rows} {shard.sha256}" for shard in self.index.shards))

    def locate(self, row: int) -> tuple[int, int]:
        """Return the number of the shard that has a row, and the number of the row in it."""
        number = bisect_right(self.first_rows, row) - 1
        return number, row - self.first_rows[number]

    @cached_property
    def first_rows(self) -> list[int]:
        """By shard, the number of its first row; at the end, the number of all rows."""
        return list(accumulate((shard.rows for shard in self.index.shards), initial=0))

    @cached_property
    def _bytes_loader(self) -> Callable[[int], dict[str, ColumnBytes]]:
        """A function from a shard's number to its columns. It keeps what it loaded."""
        is_mapped = sum(shard.size for shard in self.index.shards) > self.memory

        @lru_cache(MAX_MAPPED if is_mapped else None)
        def load_bytes(number: int) -> dict[str, ColumnBytes]:
            columns: dict[str, ColumnBytes] = {}
            for name, x in self.tensors(number).items():
                column_bytes = x.reshape(len(x), prod(x.shape[1:])).view(torch.uint8).numpy()
                columns[name] = column_bytes if is_mapped else column_bytes.copy()
            return columns

        return load_bytes

    def tensors(self, number: int) -> dict[str, Tensor]:
        """Return the columns of a shard, mapped into memory. Raises UserError if they are not as the index says."""
        shard = self.index.shards[number]
        columns = self.index.columns
        tensors = tensor_files.load(self.folder / shard.file)
        for name, column in columns.items():
            if not column.fits(tensors, name, shard.rows):
                raise UserError(
                    f"{self.folder}: {shard.file} has other tensors than {FILE} lists: {self.index.remake_hint}"
                )
        return {name: tensors[name] for name in columns}


def read_index(folder: Path, kind: type[K]) -> K | None:
    """Return the index of a table, finished or not, or None. Raises UserError if it is damaged."""
    file = folder / FILE
    if not file.is_file():
        return None
    tree = read_json(file)
    try:
        index = kind.model_validate(tree)
    except ValidationError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file} is damaged, or another version wrote it ({reason}): {ELSEWHERE}") from error
    if index.inputs != index.inputs_digest():
        raise UserError(f"{file} is damaged, or another version wrote it (its inputs have another hash): {ELSEWHERE}")
    return index


def read_finished_index(folder: Path, kind: type[K], missing: UserError) -> K:
    """Return the index of a finished table.

    Raises `missing` where there is no table, and UserError where it is unfinished, or a shard is missing or has another
    size.
    """
    index = read_index(folder, kind)
    if index is None:
        raise missing
    if not index.shards:
        raise UserError(f"{folder} is unfinished: run the same dumo encode again to resume it")
    require_intact(folder, index)
    return index


def require_intact(folder: Path, index: TableIndex, *, deep: bool = False) -> None:
    """Raise UserError if a shard is missing or has another size; `deep`: or has another checksum."""
    faults: list[str] = []
    for shard in index.shards:
        fault = shard.fault(folder, deep=deep)
        if fault:
            faults.append(f"{shard.file} {fault}")
    if faults:
        raise UserError(f"{folder}: {'; '.join(faults)}: {index.remake_hint}")


def concatenate(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the columns of one or more batches, by name, with the rows of one batch after those of the other."""
    joined: dict[str, Tensor] = {}
    for name in batches[0]:
        joined[name] = torch.cat([columns[name] for columns in batches])
    return joined


def rows_of_rank(rows: int, shard_rows: int, rank: int, world: int) -> int:
    """Return the number of rows of a source that are in the shards of a rank."""
    return sum(min(shard_rows, rows - first) for first in range(rank * shard_rows, rows, world * shard_rows))


def make_shards(
    folder: Path,
    index: TableIndex,
    make_shard: MakeShard,
    *,
    rank: int = 0,
    world: int = 1,
    source_digest: Callable[[int], str] = lambda number: "",
    extra_files: Mapping[str, bytes] | None = None,
    tick: Tick = lambda done, note: None,
) -> MakeResult:
    """Make this rank's shards that are missing or damaged, and those that left out rows of a source that has changed.

    make_shard: takes the number of a shard and a callback, and returns the shard's columns, first one with an entry for
        each row. It calls back with the number of rows of the source that it has read so far.
    source_digest: is called with the number of a shard, and returns a digest of the sizes and times of its source.
    extra_files: more files of the folder, their bytes by name.
    tick: is called with the number of the source's rows that this rank has read, and a note.

    Raises UserError if the folder holds something else, or a shard has changed and is not to be repaired; OSError
    where the disk is full, or nothing can be written; and as `make_shard`. Finished shards are kept.
    """
    _claim(folder, index, rank)
    _sweep(folder, rank, world)
    written = written_shards(folder, index)
    num_made = 0
    rows_done = 0  # of the source
    damaged: list[str] = []  # a line for each file that is made again
    for number in range(rank, index.num_shards, world):
        note = _stem(number)
        shard = written.get(number)
        fault = None
        if shard is not None:
            fault = shard.fault(folder, deep=True)
            if fault is None and shard.rows < len(index.span(number)) and shard.source != source_digest(number):
                fault = "left out rows whose source has changed"
        if shard is not None and fault is not None:
            if not index.is_repairable and (folder / shard.file).exists():
                raise UserError(f"{folder}: {shard.file} {fault}: {index.remake_hint}")
            damaged.append(f"{shard.file} {fault}")
            note = f"{shard.file} {fault}, made again"
        if shard is None or fault is not None:
            tensors = make_shard(number, _progress_of_shard(tick, rows_done, note))
            _claim(folder, index, rank)  # again: an empty folder may have been claimed for other inputs meanwhile
            _store_shard(folder, number, tensors, rank, source_digest(number))
            num_made += 1
        rows_done += len(index.span(number))
        tick(rows_done, note)
    for name, data in (extra_files or {}).items():
        files.write(folder / name, data, writer=rank, durable=True)
    missing = _finish(folder, index, rank)
    return MakeResult(num_made, tuple(damaged), missing)


def _progress_of_shard(tick: Tick, rows_before: int, note: str) -> Callable[[int], None]:
    """The callback of `make_shard`: it adds the rows of the shards before, `rows_before`, to those that were read."""

    def report(rows_read: int) -> None:
        tick(rows_before + rows_read, note)

    return report


def _claim(folder: Path, index: TableIndex, rank: int) -> None:
    """Write an index into an empty folder, or resume a table of equal inputs. Raises UserError for other folders."""
    existing = read_index(folder, type(index))
    if existing is not None:
        has_shards = bool(existing.shards) or any(folder.glob("shard-*.json"))
        # a table that was stopped before a shard was made may have any inputs: its index is written anew
        if has_shards or existing.compared_inputs() == index.compared_inputs():
            _require_same_inputs(folder, index, existing)
            return
    is_in_use = folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
    if is_in_use and not (folder / FILE).exists():  # not where another rank has begun meanwhile
        raise UserError(
            f"{folder} is not empty and has no {FILE}, so it is not a {index.noun}: give a new folder "
            "(data.root, of texts net.texts.root); images are read from data.images.root"
        )
    claimed = index.model_copy(update={"inputs": index.inputs_digest()})
    files.write(folder / FILE, _dump(claimed), writer=rank, durable=True)


def _require_same_inputs(folder: Path, index: TableIndex, existing: TableIndex) -> None:
    """Raise UserError, with all inputs that differ, if the rows of the existing table were made of others."""
    there = existing.compared_inputs()
    now = index.compared_inputs()
    # an entry that is left out at its default may be in one of them alone
    differences: list[str] = []
    for key in {**now, **there}:
        if there.get(key) != now.get(key):
            differences.append(f"{key}: {there.get(key)} there, {now.get(key)} now")
    if differences:
        listed = "\n  ".join(differences)
        raise UserError(
            f"{folder} holds another {index.noun}:\n  {listed}\nGive another folder (data.root, of texts "
            "net.texts.root), or remove this one"
        )


def written_shards(folder: Path, index: TableIndex) -> dict[int, Shard]:
    """Return the shards that were written, by number: from their .json files, else from index.json."""
    unlisted: dict[int, Shard] = {}
    for number in range(index.num_shards):
        try:
            unlisted[number] = Shard.model_validate_json((folder / f"{_stem(number)}.json").read_bytes())
        except (FileNotFoundError, ValidationError):
            continue
    existing = read_index(folder, type(index))  # after the .json files, which are removed once it lists the shards
    listed = dict(enumerate(existing.shards)) if existing else {}
    return listed | unlisted


def _finish(folder: Path, index: TableIndex, rank: int) -> int:
    """List all shards in index.json if all are there, and remove their .json files. Returns the number missing."""
    shards = written_shards(folder, index)
    intact: list[Shard] = []
    for number in range(index.num_shards):
        shard = shards.get(number)
        if shard and not shard.fault(folder, deep=False):
            intact.append(shard)
    if len(intact) == index.num_shards:
        # another rank may have written it, and name another place of the weights
        existing = read_index(folder, type(index)) or index
        finished = _dump(existing.model_copy(update={"shards": tuple(intact)}))
        files.write(folder / FILE, finished, writer=rank, durable=True)
        for number in range(index.num_shards):
            (folder / f"{_stem(number)}.json").unlink(missing_ok=True)
    return index.num_shards - len(intact)


def _dump(index: TableIndex) -> bytes:
    """Return the bytes of index.json."""
    return (index.model_dump_json(indent=1) + "\n").encode()


def _store_shard(folder: Path, number: int, tensors: Tensors, rank: int, source: str) -> None:
    """Write a shard, then its .json file, which says that it is whole. The first tensor has an entry for each row."""
    data = safetensors.torch.save(dict(tensors))
    file = f"{_stem(number)}.safetensors"
    rows = len(next(iter(tensors.values())))
    shard = Shard(file=file, rows=rows, size=len(data), sha256=digest.of_bytes(data), source=source)
    files.write(folder / file, data, writer=rank, durable=True)
    files.write(folder / f"{_stem(number)}.json", shard.model_dump_json().encode(), writer=rank, durable=True)


def _sweep(folder: Path, rank: int, world: int) -> None:
    """Remove the temporary files of ranks that were killed, where their shards are this rank's now."""
    for temp_path in folder.glob(".*.tmp"):
        writer = temp_path.suffixes[-2][1:] if len(temp_path.suffixes) > 1 else ""
        if writer.isdecimal() and int(writer) % world == rank:
            files.remove(temp_path)


def _stem(number: int) -> str:
    """Return the name of a shard's files, without their endings."""
    return f"shard-{number:05d}"
