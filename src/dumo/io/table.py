"""Tables on disk: named columns of tensors in shards, which several processes can write, interrupt and resume.

A table is a folder:

    index.json                     the columns, the inputs of the rows with their hash, and finally the shards' hashes
    shard-00000.safetensors        a tensor (rows, *shape) per column, or (entries, *shape) if rows have lengths
    shard-00000.json               the shard's entry of index.json, until all shards are written

`make_shards` writes it. Each rank

1. claims the folder: it writes index.json to an empty folder, or compares its inputs with the existing index.json;
2. writes those of its shards that are missing or damaged, or that omitted rows whose source has changed. Rank k of n
   writes the shards k, k + n, ...; the ranks need not run at the same time;
3. if the shards of all ranks exist, lists them in index.json and removes their .json files.

The content of a shard depends only on the inputs and its number, and files are written atomically, so interruptions and
the number of ranks have no effect. All shards except the last contain the same number of source rows, less those that
the source omitted.

`read_finished_index` reads the index of a finished table, and `read_index` the index of any table. `require_intact`
compares the files with the index. `ShardTable` reads rows or whole shards. They are memory-mapped, so a table may be
larger than the memory.

The fields of `TableIndex`, `Column` and `Shard` are the keys of the JSON files: renaming a field changes the format.
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
# The number of shards that are memory-mapped at a time (our choice; Linux allows 65,530 maps).
MAX_MAPPED = 2**14
# Instructions at the end of error messages.
REMAKE = "run the same dumo encode again, which re-creates damaged files"
ELSEWHERE = "encode into another folder, or remove this one"

Tick = Callable[[int, str], None]  # (source rows that this rank has read, note)
ColumnBytes = NDArray[np.uint8]  # (entries, bytes of an entry): numpy has no bfloat16
Tensors = Mapping[str, Tensor]  # columns of a shard by name
MakeShard = Callable[[int, Callable[[int], None]], Tensors]  # (number, callback for the rows read so far) -> columns


class Column(Spec):
    """A column of a table: in each shard a tensor (entries, *shape), with entries in the order of the rows."""

    dtype: str  # a name that torch and numpy share
    shape: tuple[int, ...] = ()  # of an entry
    # The column that contains the number of entries of each row. "" means that each row has one entry.
    lengths: str = Field(default="", exclude_if=not_)

    def fits(self, tensors: Tensors, name: str, rows: int) -> bool:
        """Return whether `tensors`, a shard of `rows` rows, contain this column as `name` with its dtype and shape."""
        x = tensors.get(name)
        if x is None:
            return False
        lengths = tensors.get(self.lengths)
        entries = rows if lengths is None else int(lengths.sum())
        return x.shape == (entries, *self.shape) and x.dtype == self.torch_dtype

    @property
    def torch_dtype(self) -> torch.dtype:
        """Return the torch dtype."""
        return getattr(torch, self.dtype)


class Shard(Spec):
    """The entry of a shard in index.json."""

    file: str
    rows: int
    size: int  # bytes
    sha256: str
    # A digest of the sizes and times of the source files. "" means unknown.
    source: str = ""

    def fault(self, folder: Path, *, deep: bool) -> str | None:
        """Return a description of the damage, or None if the file is intact. `deep` compares the checksum."""
        file = folder / self.file
        if not file.is_file():
            return "is missing"
        size = file.stat().st_size
        if size != self.size:
            return f"has {size} of {self.size} bytes"
        if deep and digest.of_file(file) != self.sha256:
            return "has changed (different SHA-256)"
        return None


class TableIndex(Spec):
    """The content of index.json. Subclasses add the inputs of the rows as fields."""

    # The name of the folder's content in messages.
    noun: ClassVar[str] = "table"
    # The instruction in messages about a damaged shard.
    remake_hint: ClassVar[str] = REMAKE
    # Whether `make_shards` writes a changed shard again. If False, it raises UserError.
    is_repairable: ClassVar[bool] = True
    format: Literal[2] = 2
    columns: dict[str, Column]
    rows: int = Field(ge=0)  # in the source
    shard_rows: int = Field(default=1024, gt=0, le=ROWS)  # source rows per shard
    inputs: str = ""  # SHA-256 of `binding`
    shards: tuple[Shard, ...] = ()  # empty until all are written

    @property
    def num_shards(self) -> int:
        """Return the number of shards of the finished table."""
        return -(-self.rows // self.shard_rows)

    def span(self, number: int) -> range:
        """Return the source rows of a shard."""
        return range(number * self.shard_rows, min((number + 1) * self.shard_rows, self.rows))

    def summary(self) -> str:
        """Describe the content of a finished table."""
        return f"{self.rows:,} rows"

    def binding(self) -> dict[str, Any]:
        """Return the inputs of the rows, as plain values."""
        return self.model_dump(mode="json", exclude={"inputs": True, "shards": True})

    def compared_inputs(self) -> dict[str, Any]:
        """Return the inputs that must be equal for a table to be resumed."""
        return self.binding()

    def inputs_digest(self) -> str:
        """Return the SHA-256 of `binding`."""
        return digest.of_bytes(json.dumps(self.binding(), sort_keys=True).encode())


K = TypeVar("K", bound=TableIndex)


@dataclass(frozen=True)
class MakeResult:
    """The result of `make_shards` on a rank."""

    # The number of shards that this rank wrote.
    made: int
    # The name and damage of each shard that was written again.
    damaged: tuple[str, ...]
    # The number of shards that other ranks still have to write. 0 means that the table is finished.
    missing: int


@dataclass(frozen=True)
class ShardTable:
    """Reads rows (`take`) or whole shards (`tensors`) of a finished table."""

    folder: Path
    index: TableIndex
    # Tables of at most this size in bytes are read into memory; larger tables are memory-mapped.
    memory: float = 0.0

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

        Both columns have the same shape and `lengths`. In a column with lengths, each of the rows must have one entry.
        Raises IndexError for a row outside of the table, UserError for a damaged shard.
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
        """Return the index of a row's first entry, the number of entries of all previous rows in the shard."""
        lengths = columns[lengths_column].view(self.index.columns[lengths_column].dtype)
        return int(lengths[:row].sum())

    def fingerprint(self) -> str:
        """Return a digest of all shards' rows and checksums."""
        return digest.short(*(f"{shard.rows} {shard.sha256}" for shard in self.index.shards))

    def locate(self, row: int) -> tuple[int, int]:
        """Return the number of the shard that contains a row, and the row's index in the shard."""
        number = bisect_right(self.first_rows, row) - 1
        return number, row - self.first_rows[number]

    @cached_property
    def first_rows(self) -> list[int]:
        """Return the index of the first row of each shard, followed by the number of all rows."""
        return list(accumulate((shard.rows for shard in self.index.shards), initial=0))

    @cached_property
    def _bytes_loader(self) -> Callable[[int], dict[str, ColumnBytes]]:
        """Return a cached function from a shard's number to its columns."""
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
        """Return the memory-mapped columns of a shard. Raises UserError if they differ from the index."""
        shard = self.index.shards[number]
        columns = self.index.columns
        tensors = tensor_files.load(self.folder / shard.file)
        for name, column in columns.items():
            if not column.fits(tensors, name, shard.rows):
                raise UserError(
                    f"{self.folder}: the tensors in {shard.file} differ from {FILE}: {self.index.remake_hint}"
                )
        return {name: tensors[name] for name in columns}


def read_index(folder: Path, kind: type[K]) -> K | None:
    """Return the index of a table, or None if there is no index. Raises UserError if the index is damaged."""
    file = folder / FILE
    if not file.is_file():
        return None
    tree = read_json(file)
    try:
        index = kind.model_validate(tree)
    except ValidationError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file} is damaged or was written by another version ({reason}): {ELSEWHERE}") from error
    if index.inputs != index.inputs_digest():
        raise UserError(f"{file} is damaged or was written by another version (wrong hash of the inputs): {ELSEWHERE}")
    return index


def read_finished_index(folder: Path, kind: type[K], missing: UserError) -> K:
    """Return the index of a finished table.

    Raises `missing` if there is no table, and UserError if the table is unfinished, or a shard is missing or has the
    wrong size.
    """
    index = read_index(folder, kind)
    if index is None:
        raise missing
    if not index.shards:
        raise UserError(f"{folder} is unfinished: run the same dumo encode again to resume it")
    require_intact(folder, index)
    return index


def require_intact(folder: Path, index: TableIndex, *, deep: bool = False) -> None:
    """Raise UserError if a shard is missing or has the wrong size, or with `deep`, the wrong checksum."""
    faults: list[str] = []
    for shard in index.shards:
        fault = shard.fault(folder, deep=deep)
        if fault:
            faults.append(f"{shard.file} {fault}")
    if faults:
        raise UserError(f"{folder}: {'; '.join(faults)}: {index.remake_hint}")


def concatenate(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate the columns of one or more batches."""
    joined: dict[str, Tensor] = {}
    for name in batches[0]:
        joined[name] = torch.cat([columns[name] for columns in batches])
    return joined


def rows_of_rank(rows: int, shard_rows: int, rank: int, world: int) -> int:
    """Return the number of source rows in the shards of a rank."""
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
    """Write this rank's shards that are missing or damaged, or that omitted rows whose source has changed.

    make_shard: returns the columns of the shard of a number. The first column has one entry per row. It calls the
        callback with the number of source rows read so far.
    source_digest: returns a digest of the sizes and times of the source files of the shard of a number.
    extra_files: contents of further files in the folder, by name.
    tick: is called with the number of source rows that this rank has read, and a note.

    Raises UserError if the folder contains something else, or if a shard has changed and is not repairable, and OSError
    if writing fails. Finished shards are kept.
    """
    _claim(folder, index, rank)
    _sweep(folder, rank, world)
    written = written_shards(folder, index)
    num_made = 0
    rows_done = 0
    damaged: list[str] = []
    for number in range(rank, index.num_shards, world):
        note = _stem(number)
        shard = written.get(number)
        fault = None
        if shard is not None:
            fault = shard.fault(folder, deep=True)
            if fault is None and shard.rows < len(index.span(number)) and shard.source != source_digest(number):
                fault = "omitted rows whose source has changed"
        if shard is not None and fault is not None:
            if not index.is_repairable and (folder / shard.file).exists():
                raise UserError(f"{folder}: {shard.file} {fault}: {index.remake_hint}")
            damaged.append(f"{shard.file} {fault}")
            note = f"{shard.file} {fault}, writing it again"
        if shard is None or fault is not None:
            tensors = make_shard(number, _progress_of_shard(tick, rows_done, note))
            # Claim the folder again, because it may have been claimed for other inputs in the meantime.
            _claim(folder, index, rank)
            _store_shard(folder, number, tensors, rank, source_digest(number))
            num_made += 1
        rows_done += len(index.span(number))
        tick(rows_done, note)
    for name, data in (extra_files or {}).items():
        files.write(folder / name, data, writer=rank, durable=True)
    missing = _finish(folder, index, rank)
    return MakeResult(num_made, tuple(damaged), missing)


def _progress_of_shard(tick: Tick, rows_before: int, note: str) -> Callable[[int], None]:
    """Return the callback of `make_shard`, which adds the rows of earlier shards to the rows read."""

    def report(rows_read: int) -> None:
        tick(rows_before + rows_read, note)

    return report


def _claim(folder: Path, index: TableIndex, rank: int) -> None:
    """Write an index to an empty folder, or accept a table with equal inputs. Raises UserError for other folders."""
    existing = read_index(folder, type(index))
    if existing is not None:
        has_shards = bool(existing.shards) or any(folder.glob("shard-*.json"))
        # The index of a table without any shard is replaced, whatever its inputs are.
        if has_shards or existing.compared_inputs() == index.compared_inputs():
            _require_same_inputs(folder, index, existing)
            return
    is_in_use = folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
    # Another rank may have written the index in the meantime.
    if is_in_use and not (folder / FILE).exists():
        raise UserError(
            f"{folder} is not empty and has no {FILE}, so it is not a {index.noun}: use a new folder (data.root, for "
            "texts net.texts.root); images are read from data.images.root"
        )
    claimed = index.model_copy(update={"inputs": index.inputs_digest()})
    files.write(folder / FILE, _dump(claimed), writer=rank, durable=True)


def _require_same_inputs(folder: Path, index: TableIndex, existing: TableIndex) -> None:
    """Raise UserError that lists the differences if the inputs of the existing table differ."""
    there = existing.compared_inputs()
    now = index.compared_inputs()
    # Entries with default values may be missing in one of them.
    differences: list[str] = []
    for key in {**now, **there}:
        if there.get(key) != now.get(key):
            differences.append(f"{key}: {there.get(key)} in the folder, {now.get(key)} now")
    if differences:
        listed = "\n  ".join(differences)
        raise UserError(
            f"{folder} contains a different {index.noun}:\n  {listed}\nUse another folder (data.root, for texts "
            "net.texts.root), or remove this one"
        )


def written_shards(folder: Path, index: TableIndex) -> dict[int, Shard]:
    """Return the written shards by number, from their .json files or index.json."""
    unlisted: dict[int, Shard] = {}
    for number in range(index.num_shards):
        try:
            unlisted[number] = Shard.model_validate_json((folder / f"{_stem(number)}.json").read_bytes())
        except (FileNotFoundError, ValidationError):
            continue
    # Read index.json last, because the .json files are removed once it lists the shards.
    existing = read_index(folder, type(index))
    listed = dict(enumerate(existing.shards)) if existing else {}
    return listed | unlisted


def _finish(folder: Path, index: TableIndex, rank: int) -> int:
    """List all shards in index.json and remove their .json files if none is missing. Return the number missing."""
    shards = written_shards(folder, index)
    intact: list[Shard] = []
    for number in range(index.num_shards):
        shard = shards.get(number)
        if shard and not shard.fault(folder, deep=False):
            intact.append(shard)
    if len(intact) == index.num_shards:
        # Keep the index that another rank may have written with another path of the weights.
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
    """Write a shard, then its .json file, which marks it as complete. The first tensor has one entry per row."""
    data = safetensors.torch.save(dict(tensors))
    file = f"{_stem(number)}.safetensors"
    rows = len(next(iter(tensors.values())))
    shard = Shard(file=file, rows=rows, size=len(data), sha256=digest.of_bytes(data), source=source)
    files.write(folder / file, data, writer=rank, durable=True)
    files.write(folder / f"{_stem(number)}.json", shard.model_dump_json().encode(), writer=rank, durable=True)


def _sweep(folder: Path, rank: int, world: int) -> None:
    """Remove temporary files of killed ranks whose shards belong to this rank now."""
    for temp_path in folder.glob(".*.tmp"):
        writer = temp_path.suffixes[-2][1:] if len(temp_path.suffixes) > 1 else ""
        if writer.isdecimal() and int(writer) % world == rank:
            files.remove(temp_path)


def _stem(number: int) -> str:
    """Return the file name of a shard without extension."""
    return f"shard-{number:05d}"
