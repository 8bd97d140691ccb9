"""Encoded images by number, with captions, classes and other columns.

`open_rows` detects the format of a data set and returns its `Rows` without decoding images:

    FolderRows     image files; columns from metadata.{csv,jsonl,parquet} and from .txt or .caption next to an image
    ParquetRows    a column of {bytes, path} or of bytes, as on the Hugging Face Hub
    TarRows        webdataset shards: 0001.jpg with 0001.cls, .txt, .caption or .json
    DatasetRows    a `datasets.Dataset`, or a Hub data set by its name, read from its Arrow files

Files are sorted by path, so that batches are deterministic. Columns are read on demand.
"""

import csv
import io
import json
import os
import re
import stat
import sys
import tarfile
import unicodedata
import warnings
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dumo.data.pixel import Unreadable
from dumo.io import digest, hub
from dumo.io import file as files
from dumo.io.read import brief, decode_utf8, first_few, parse_json, read_text, text_lines
from dumo.io.run_places import RUNS_FOLDER, holds_own_images
from dumo.io.suffix import IMAGE_SUFFIXES
from dumo.runtime import signals
from dumo.runtime.formatting import escape_line
from dumo.runtime.progress import bar
from dumo.types import UserError

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

SPLITS = frozenset(("train", "training", "val", "valid", "validation", "dev", "test"))
# Tables of metadata in a folder of images, with their paths in the column `file_name`.
TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet", "captions.jsonl")
# Default columns of captions, and suffixes of text files next to an image.
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")
CAPTION_ENDINGS = ("txt", "caption")
# Folders of operating systems, network drives and backup programs, in lower case. They contain thumbnails, deleted
# files and earlier states. Names that begin with a dot are skipped without being listed here.
SYSTEM_FOLDERS = frozenset(
    (
        *("$recycle.bin", "recycler", "$extend", "system volume information", "found.000"),  # Windows
        *("__macosx", "network trash folder", "temporary items", "thevolumesettingsfolder"),  # macOS
        "lost+found",  # Linux
        *("@eadir", "#recycle", "#snapshot", "@tmp", "@sharebin"),  # Synology
        *("@recycle", "@recently-snapshot", "@__thumb"),  # QNAP
        *("~snapshot", "_gsdata_", "_vti_cnf"),  # NetApp, GoodSync, FrontPage
    )
)
# Preferred image columns if a table has several.
IMAGE_COLUMNS = ("image", "img", "jpg", "png", "pixel_values")
# A larger share of rows without images is refused.
MAX_UNPAIRED = 0.1

_MAX_IMAGE_BYTES = 2**30
_MAX_TEXT_BYTES = 2**20
_MAX_CLASS_BYTES = 100
_CACHE_BYTES = 2**30
_MAX_OPEN_TABLES = 64
# The index of an archive of at least this size is cached in runs/tars.
INDEX_BYTES = 2**26
INDEX_FOLDER = Path(RUNS_FOLDER) / "tars"
# The number of images in the fingerprint of a `datasets.Dataset`.
_FINGERPRINT_IMAGES = 64


class Rows(ABC):
    """Encoded images in a fixed order. Thread-safe.

    root: the deepest folder with all files, or a name of the data.
    names: the path of each image below the root.
    states: (n, 2), the size in bytes and the modification time in ns of each image's file; zeros if unknown.
    class_names: the names of class numbers, by column, if known.
    content_digest: a digest of the content if names and sizes do not identify it.
    """

    # Whether captions are in separate files, so that an image may lack one by mistake.
    has_caption_files = False

    def __init__(self, root: str, names: Sequence[str], states: NDArray[np.int64]) -> None:
        self.root = root
        self.names = names
        self.states = states
        self.class_names: dict[str, tuple[str, ...]] = {}
        self.content_digest = ""

    def __len__(self) -> int:
        return len(self.names)

    def path(self, i: int) -> str:
        """Return the path or name of image i for messages."""
        return escape_line(os.path.join(self.root, self.names[i]))

    @abstractmethod
    def read(self, i: int) -> bytes:
        """Read the bytes of image i. Raises OSError, or Unreadable if there is no image."""

    @abstractmethod
    def columns(self) -> list[str]:
        """Return the names of all columns except the images."""

    @abstractmethod
    def column(self, name: str) -> list[Any]:
        """Return the value of a column for each image, or None if an image has none."""

    def caption_columns(self) -> list[str]:
        """Return the columns that may have captions, the preferred one first."""
        available = self.columns()
        return [name for name in CAPTION_COLUMNS if name in available]

    def integer_columns(self) -> list[str]:
        """Return the columns of integers, which may be classes."""
        return []


def open_rows(place: Any, split: str | None = None, column: str | None = None) -> Rows:  # noqa: ANN401, path or data set
    """Open the images at a place: a folder, a file, a Hub name, or a `datasets.Dataset`.

    split: selects files by a word in their names or folders, or the split of a DatasetDict.
    column: the column of images.

    Raises UserError if there are no images, or if the choice is ambiguous.
    """
    if not isinstance(place, str | Path):
        return DatasetRows(place, split, column)
    if isinstance(place, str) and hub.is_hub_name(place):
        return DatasetRows(hub.load_dataset(place), split, column, hub.repository_of(place))
    root = os.path.normpath(place)
    # Paths of files must include a folder.
    if root == os.curdir or not (os.path.dirname(root) or os.path.isdir(root)):
        root = os.path.abspath(root)
    if not os.path.lexists(root):
        raise UserError(f"there is no folder or file {root}: set data.root to the path of the images")
    states = _walk(root)

    # Group the files by format. Next to images or archives, parquet files without images are tables of texts.
    by_kind: dict[str, list[str]] = {"folder": [], "parquet": [], "tar": []}
    for file in states:
        suffix = suffix_of(file)
        if suffix in IMAGE_SUFFIXES:
            by_kind["folder"].append(file)
        elif suffix in (".parquet", ".tar"):
            by_kind[suffix[1:]].append(file)
    if by_kind["folder"] or by_kind["tar"]:
        tables = [file for file in by_kind["parquet"] if os.path.basename(file) not in TABLES]
        by_kind["parquet"] = [file for file in tables if _image_columns(_open_table(file).schema_arrow)]
    kinds = [kind for kind, files_of_kind in by_kind.items() if files_of_kind]
    if not kinds:
        raise NoImagesError(
            f"no images in {root} with {len(states)} files: looked for image files (.jpg, .png, .webp ...), *.parquet "
            "and *.tar at any depth"
        )
    if len(kinds) > 1:
        raise UserError(
            f"{root} has both {' and '.join(kinds)} data: set data.root to a folder with one of them, or move the rest"
        )

    # Select the split, and open its files.
    chosen = _files_of_split(root, by_kind[kinds[0]], split, is_folder=kinds[0] == "folder")
    chosen_states = {file: states[file] for file in chosen}
    rows: Rows
    if kinds[0] == "folder":
        rows = FolderRows(chosen_states, list(states))
    elif kinds[0] == "parquet":
        rows = ParquetRows(chosen_states, column)
    else:
        rows = TarRows(chosen_states)
    if not len(rows):
        raise UserError(f"no images in the {kinds[0]} files of {root}")
    return rows


class NoImagesError(UserError):
    """A place has no files with images."""


class FolderRows(Rows):
    """Image files, with tables in their folder and text files next to them."""

    has_caption_files = True

    def __init__(self, states: dict[str, tuple[int, int]], all_files: Sequence[str]) -> None:
        """Open image files, given by their states. `all_files` are the files of all splits."""
        self.files = list(states)
        root = _common_folder(self.files)
        super().__init__(root, [_below(root, file) for file in self.files], np.array(list(states.values()), np.int64))
        self.all_files = all_files

    def read(self, i: int) -> bytes:
        """Read the bytes of image i. Raises OSError, and Unreadable for a pipe, a device, or more than a GB."""
        # Open without blocking, since a pipe may never have data.
        with open(os.open(self.files[i], os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as opened:
            file_stat = os.fstat(opened.fileno())
            if not stat.S_ISREG(file_stat.st_mode):
                raise Unreadable("is not a regular file")
            _require_image_size(file_stat.st_size)
            return opened.read(file_stat.st_size)

    def columns(self) -> list[str]:
        """Return the columns of the tables."""
        return list(dict.fromkeys(name for rows in self.table_rows for row in rows for name in row.values))

    def column(self, name: str) -> list[Any]:
        """Return a column of the tables, or the captions in text files with the suffix `name`.

        The value of an image in several rows is a list. It is [] if a row of the image has no value.
        """
        if name in CAPTION_ENDINGS and name not in self.columns():
            return self._text_files(name)
        values: list[Any] = []
        for rows in self.table_rows:
            in_rows = [row.values[name] for row in rows if name in row.values]
            known = [value for value in in_rows if value is not None]
            values.append((known[0] if len(known) == 1 else known) if in_rows else None)
        return values

    def caption_columns(self) -> list[str]:
        """Return caption columns of the tables, then the suffixes of text files."""
        columns = super().caption_columns()
        return [*columns, *(ending for ending in CAPTION_ENDINGS if ending not in columns)]

    @cached_property
    def class_folders(self) -> list[str]:
        """The folder of each image directly below the root; "" for an image in the root."""
        return [name.partition(os.sep)[0] if os.sep in name else "" for name in self.names]

    @cached_property
    def table_rows(self) -> list[list["TableRow"]]:
        """The table rows of each image. Raises UserError if many rows have no image."""
        rows_by_image: list[list[TableRow]] = [[] for _ in self.files]
        tables = [file for file in self.all_files if os.path.basename(file) in TABLES]
        if not tables:
            return rows_by_image
        number_of = {_composed(os.path.abspath(file)): i for i, file in enumerate(self.files)}
        images = [file for file in self.all_files if suffix_of(file) in IMAGE_SUFFIXES]
        of_all_splits = {_composed(os.path.abspath(file)) for file in images}
        unpaired: list[str] = []
        num_rows = 0
        for table in tables:
            folder = os.path.dirname(table)
            for where, values in _table_rows(table):
                num_rows += 1
                file_name = values.pop("file_name", None)
                if not isinstance(file_name, str):
                    raise UserError(
                        f"{where} has no text in file_name (it has {', '.join(values)}): give the path of the image "
                        f"relative to {folder}"
                    )
                path = _composed(os.path.abspath(os.path.join(folder, file_name)))
                # Accept Windows paths.
                if path not in of_all_splits:
                    path = path.replace("\\", "/")
                if path not in of_all_splits:
                    unpaired.append(f"'{file_name}' in {where}")
                elif path in number_of:
                    rows_by_image[number_of[path]].append(TableRow(folder, values))
        require_paired(
            self.root, "rows have no image (file_name is relative to the table's folder)", unpaired, num_rows
        )
        return rows_by_image

    def _text_files(self, ending: str) -> list[Any]:
        """Return the lines of the text file with the same name for each image, or None if there is none."""
        texts = {_composed(file): file for file in self.all_files if file.endswith(f".{ending}")}
        values: list[Any] = []
        for file in self.files:
            text_file = texts.get(_composed(f"{os.path.splitext(file)[0]}.{ending}"))
            values.append(None if text_file is None else caption_lines(read_text(Path(text_file))))
        return values


@dataclass(frozen=True)
class TableRow:
    """A row of a table of metadata.

    folder: the table's folder, to which paths are relative.
    values: by column, without file_name.
    """

    folder: str
    values: dict[str, Any]


class ParquetRows(Rows):
    """Rows of parquet files, one file after the other. The most recently used row groups are cached."""

    def __init__(self, states: dict[str, tuple[int, int]], column: str | None = None) -> None:
        """Open tables, given by their states. Raises UserError if a file is damaged or has no images."""
        self.files = list(states)
        root = _common_folder(self.files)
        self.metadata: list[Any] = []
        self.schemas: list[Any] = []
        self.image_columns: list[str] = []
        names: list[str] = []
        groups: list[tuple[int, int]] = []
        group_rows: list[int] = []
        for k, file in enumerate(self.files):
            table = _open_table(file)
            self.metadata.append(table.metadata)
            self.schemas.append(table.schema_arrow)
            self.image_columns.append(_choose_image_column(file, table.schema_arrow, column))
            names += [f"{_below(root, file)} row {i}" for i in range(table.metadata.num_rows)]
            for group in range(table.num_row_groups):
                groups.append((k, group))
                group_rows.append(table.metadata.row_group(group).num_rows)
        counts = [metadata.num_rows for metadata in self.metadata]
        super().__init__(root, names, np.repeat(np.array(list(states.values()), np.int64), counts, axis=0))
        if self.schemas:
            self.class_names = _class_names_of(self.schemas[0])
        self._groups = groups
        self._group_starts = [0, *accumulate(group_rows)]
        self._table = lru_cache(_MAX_OPEN_TABLES)(self._open)
        self._cache: OrderedDict[int, Any] = OrderedDict()
        self._cached_bytes = 0
        self._lock = Lock()

    def read(self, i: int) -> bytes:
        """Read the bytes in row i. Raises OSError if its row group is damaged, Unreadable if it has no bytes."""
        from pyarrow import ArrowException  # slow to import

        group = bisect_right(self._group_starts, i) - 1
        try:
            with self._lock:
                images = self._read_group(group)
        except ArrowException as error:
            raise OSError(f"row group {self._groups[group][1]} is damaged: {error}") from error
        row = i - self._group_starts[group]
        if row >= len(images):
            raise Unreadable("is missing: its file is damaged")
        data = images[row].as_py()
        if data is None:
            raise Unreadable("has no bytes of an image")
        return data

    def columns(self) -> list[str]:
        """Return the columns of all files, except images."""
        names = dict.fromkeys(name for schema in self.schemas for name in schema.names)
        return [name for name in names if name not in self.image_columns]

    def column(self, name: str) -> list[Any]:
        """Return a column of all files. Raises UserError if a file lacks it."""
        values: list[Any] = []
        for k, file in enumerate(self.files):
            if name not in self.schemas[k].names:
                raise UserError(f"{file} has no column '{name}', but other files have: remove it from data.root")
            with _readable(file):
                column = self._table(k).read(columns=[name], use_threads=False).column(0)
            values += _to_python(column, file)
        return values

    def caption_columns(self) -> list[str]:
        """Return the caption columns that all files have."""
        return [name for name in super().caption_columns() if all(name in schema.names for schema in self.schemas)]

    def integer_columns(self) -> list[str]:
        """Return the columns of integers."""
        from pyarrow import types  # slow to import

        return [field.name for field in self.schemas[0] if types.is_integer(field.type)]

    def _open(self, k: int) -> "ParquetFile":
        """Open file k with its known footer."""
        return _open_table(self.files[k], self.metadata[k])

    def _read_group(self, group: int) -> Any:  # noqa: ANN401, an untyped array
        """Return the images of a row group, from an LRU cache."""
        from pyarrow import types  # slow to import

        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        k, number = self._groups[group]
        images = self._table(k).read_row_group(number, [self.image_columns[k]], use_threads=False).column(0)
        images = images.combine_chunks()
        if types.is_struct(images.type):
            images = images.field("bytes")
        self._cache[group] = images
        self._cached_bytes += images.nbytes
        while len(self._cache) > 1 and self._cached_bytes > _CACHE_BYTES:
            _, dropped = self._cache.popitem(last=False)
            self._cached_bytes -= dropped.nbytes
        return images


class TarRows(Rows):
    """Images in webdataset archives, in the order of the archives.

    Members belong to one sample if their names are equal up to the first dot of the file name. The index of an archive
    of at least INDEX_BYTES is cached in INDEX_FOLDER, by the archive's path, size and time.
    """

    has_caption_files = True

    def __init__(self, states: dict[str, tuple[int, int]]) -> None:
        """Scan archives, given by their states. Raises UserError if an archive is damaged."""
        self.files = list(states)
        root = _common_folder(self.files)
        self.scans: list[TarScan] = []
        with bar("scanning tar archives", len(states)) as tick:
            for done, (file, state) in enumerate(states.items(), 1):
                signals.check()
                self.scans.append(_cached_scan(file, state))
                tick(done, "")
        left_out = [name for scan in self.scans for name in scan.left_out]
        if left_out:
            warnings.warn(
                f"{len(left_out):,} members of tar archives are left out, such as {left_out[0]}: in webdataset the "
                "suffix begins at the first dot of a name, and these suffixes are not image formats; rename them",
                stacklevel=3,
            )
        names: list[str] = []
        image_states: list[tuple[int, int]] = []
        for file, scan in zip(self.files, self.scans, strict=True):
            time = states[file][1]
            names += [f"{_below(root, file)} member {name}" for name, _, _ in scan.images]
            image_states += [(size, time) for _, _, size in scan.images]
        super().__init__(root, names, np.array(image_states, np.int64).reshape(-1, 2))
        self._ends = list(accumulate(len(scan.images) for scan in self.scans))

    def read(self, i: int) -> bytes:
        """Read the bytes of image i. Raises OSError, and Unreadable if the archive was truncated."""
        k = bisect_right(self._ends, i)
        _, start, size = self.scans[k].images[i - (self._ends[k - 1] if k else 0)]
        _require_image_size(size)
        data = _read_span(self.files[k], start, size)
        if len(data) < size:
            raise Unreadable("is truncated: its archive has become shorter")
        return data

    def columns(self) -> list[str]:
        """Return `cls`, `txt` and `caption`, if there are such members, and the keys of .json members."""
        names = ["cls"] if any(scan.classes for scan in self.scans) else []
        names += self._text_endings
        keys = dict.fromkeys(key for values in self._json for key in values or ())
        return [*names, *(key for key in keys if key not in names)]

    def column(self, name: str) -> list[Any]:
        """Return class numbers, the lines of text members, or the values of a key of .json members."""
        if name == "cls":
            return self._by_image(lambda k, key: self.scans[k].classes.get(key))
        if name in self._text_endings:
            return self._by_image(lambda k, key: self._text_lines(k, key, name))
        # A null value means that the image deliberately has no caption.
        return [None if values is None or name not in values else values[name] or [] for values in self._json]

    def caption_columns(self) -> list[str]:
        """Return the suffixes of text members, then the keys of .json members."""
        columns = super().caption_columns()
        return [*self._text_endings, *(name for name in columns if name not in self._text_endings)]

    @cached_property
    def _text_endings(self) -> list[str]:
        """The suffixes of existing text members."""
        endings = {name.rpartition(".")[2] for scan in self.scans for name in scan.texts}
        return [ending for ending in CAPTION_ENDINGS if ending in endings]

    @cached_property
    def _json(self) -> list[dict[str, Any] | None]:
        """The object in the .json member of each image, or None."""

        def read(k: int, key: str) -> dict[str, Any] | None:
            text = self._text(k, key, "json")
            return None if text is None else _parse_object(text, f"the .json of {self.files[k]} member {key}")

        return self._by_image(read)

    def _text_lines(self, k: int, key: str, ending: str) -> list[str] | None:
        """Return the captions in a text member; None if there is none."""
        text = self._text(k, key, ending)
        return None if text is None else caption_lines(text)

    def _text(self, k: int, key: str, ending: str) -> str | None:
        """Return the text of a member of archive k; None if there is none."""
        span = self.scans[k].texts.get(f"{key}.{ending}")
        if span is None:
            return None
        where = f"{self.files[k]} member {key}.{ending}"
        start, size = span
        if size > _MAX_TEXT_BYTES:
            raise UserError(f"{where} has {size:,} bytes, but a text may have at most {_MAX_TEXT_BYTES:,}: shorten it")
        return decode_utf8(_read_span(self.files[k], start, size), where)

    def _by_image(self, value_of: Callable[[int, str], Any]) -> list[Any]:
        """Return a value for each image, computed from the number of its archive and the key of its sample."""
        values: list[Any] = []
        for k, scan in enumerate(self.scans):
            signals.check()
            values += [value_of(k, _sample_key(name)) for name, _, _ in scan.images]
        return values


@dataclass(frozen=True)
class TarScan:
    """The index of an archive, as JSON values.

    images: the name, offset and size of each image.
    classes: by sample; a number, or the text if it is not a number.
    texts: the offset and size of .txt, .caption and .json members, by SAMPLE.SUFFIX.
    left_out: names with several dots in their suffix, such as 1.seg.png, if their sample has no image.
    """

    images: list[tuple[str, int, int]]
    classes: dict[str, int | str]
    texts: dict[str, tuple[int, int]]
    left_out: list[str]

    @classmethod
    def of(cls, file: str) -> "TarScan":
        """Scan the members of an archive.

        Raises UserError if the archive is damaged or truncated, or if a member occurs twice, since images and captions
        could then not be matched.
        """
        images: list[tuple[str, int, int]] = []
        classes: dict[str, int | str] = {}
        texts: dict[str, tuple[int, int]] = {}
        seen: set[str] = set()
        two_dots: list[str] = []
        try:
            with files.named_in_errors(file), tarfile.open(file, "r:") as archive:
                while info := archive.next():
                    # Drop tarfile's list of members, which takes a kilobyte each.
                    setattr(archive, "members", [])  # noqa: B010, the attribute is not typed
                    if info.size < 0 or info.issparse():
                        raise UserError(f"{file} is damaged, or sparse, at byte {info.offset}: download it again")
                    path = PurePosixPath(info.name)
                    if info.isdir() or _is_hidden(path):
                        continue
                    ending = path.name.partition(".")[2]
                    key = _sample_key(info.name)
                    is_image = f".{ending.lower()}" in IMAGE_SUFFIXES
                    if not is_image and ending not in ("cls", "json", *CAPTION_ENDINGS):
                        if path.suffix.lower() in IMAGE_SUFFIXES:
                            two_dots.append(info.name)
                        continue
                    if not info.isfile():
                        raise UserError(
                            f"{file} has {info.name}, which is a link or not a regular file: write the archive again "
                            "with tar --dereference --hard-dereference"
                        )
                    # The same file may be written as a.png or ./a.png, and é as one or two characters.
                    same_name = f"{key}.{ending}"
                    if same_name in seen:
                        raise UserError(
                            f"{file} has the member {info.name} twice, so captions and classes are ambiguous: write "
                            "the archive again with unique names"
                        )
                    seen.add(same_name)
                    if is_image:
                        images.append((info.name, info.offset_data, info.size))
                    elif ending == "cls":
                        content = archive.extractfile(info)
                        assert content is not None
                        text = content.read(_MAX_CLASS_BYTES).decode(errors="replace").strip()
                        classes[key] = int(text) if re.fullmatch("-?[0-9]{1,18}", text) else text
                    else:
                        texts[f"{key}.{ending}"] = (info.offset_data, info.size)
                end = archive.offset
        except UserError:
            raise
        except (tarfile.TarError, ValueError) as error:
            # tarfile does not validate the numbers in headers.
            raise UserError(f"{file} is a damaged tar archive: {error}; download it again, or remove it") from error
        _require_whole_end(file, end)
        samples = {_sample_key(name) for name, _, _ in images}
        return cls(images, classes, texts, [name for name in two_dots if _sample_key(name) not in samples])


class DatasetRows(Rows):
    """A `datasets.Dataset`, or one split of a DatasetDict. Rows are read from the Arrow files without decoding."""

    def __init__(
        self,
        data: Any,  # noqa: ANN401
        split: str | None = None,
        column: str | None = None,
        root: str = "data",
    ) -> None:
        """Open a data set, called `root` in messages. Raises UserError for other objects, or without images."""
        if isinstance(data, dict):
            if (split is None and len(data) > 1) or (split is not None and split not in data):
                raise UserError(
                    f"{root} has the splits {', '.join(data)}: set data.split={next(iter(data))}, or in Python pass "
                    f"one of them, such as data['{next(iter(data))}']"
                )
            data = data[split or next(iter(data))]
        if not is_dataset(data):
            raise UserError(f"data is a {type(data).__name__}: pass a `datasets.Dataset`")
        os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
        from datasets import ClassLabel, Image, Value

        self.data = data
        images = [name for name, feature in data.features.items() if isinstance(feature, Image)]
        images += [name for name, feature in data.features.items() if feature == Value("binary")]
        self.image_column = _choose_column(root, column, images, _describe(data.features))
        self._images = data.select_columns([self.image_column]).cast_column(self.image_column, Image(decode=False))
        self._images = self._images.with_format(None)
        super().__init__(root, [f"row {i}" for i in range(len(data))], np.zeros((len(data), 2), np.int64))
        for name, feature in data.features.items():
            if isinstance(feature, ClassLabel):
                self.class_names[name] = tuple(feature.names)

        # Without names and sizes, hash some of the images.
        sampled = sorted({k * len(data) // _FINGERPRINT_IMAGES for k in range(_FINGERPRINT_IMAGES)})
        self.content_digest = digest.of_bytes(*(self._bytes_or_nothing(i) for i in sampled if i < len(data)))

    def read(self, i: int) -> bytes:
        """Read the bytes of image i. Raises OSError, and Unreadable if it has none."""
        row = self._images[i][self.image_column]
        if not row or (row["bytes"] is None and not row["path"]):
            raise Unreadable("has no bytes of an image")
        return row["bytes"] if row["bytes"] is not None else Path(row["path"]).read_bytes()

    def columns(self) -> list[str]:
        """Return all columns except images."""
        return [name for name in self.data.column_names if name != self.image_column]

    def column(self, name: str) -> list[Any]:
        """Return a column as Python values."""
        return self.data.select_columns([name]).with_format(None)[name][:]

    def integer_columns(self) -> list[str]:
        """Return the columns of integers and classes."""
        return [name for name in self.columns() if "int" in getattr(self.data.features[name], "dtype", "")]

    def _bytes_or_nothing(self, i: int) -> bytes:
        """Read the bytes of image i; b"" if it is unreadable."""
        try:
            return self.read(i)
        except (OSError, Unreadable):
            return b""


def is_dataset(data: object) -> bool:
    """Whether an object is a Dataset or DatasetDict of Hugging Face `datasets`, without importing it."""
    return type(data).__module__.partition(".")[0] == "datasets" and (
        isinstance(data, dict) or (hasattr(data, "cast_column") and hasattr(data, "data"))
    )


def require_paired(where: str, what: str, unpaired: Sequence[str], total: int) -> None:
    """Warn about captions without images, or images without captions. Raises UserError if there are many."""
    if not unpaired:
        return
    text = f"{where}: {len(unpaired):,} of {total:,} {what}: {first_few(unpaired)}"
    if len(unpaired) > MAX_UNPAIRED * total:
        raise UserError(f"{text}. At most {MAX_UNPAIRED:.0%} may be unpaired: complete or remove them")
    warn_once(text)


@lru_cache(None)
def warn_once(text: str) -> None:
    """Warn once in this process, since a run opens its images several times."""
    warnings.warn(text, stacklevel=3)


def caption_lines(text: str) -> list[str]:
    """Return a caption for each line that is not blank. Unix, Windows and old Mac line endings are accepted."""
    lines = [line.strip() for line in re.split("\r\n|\r|\n", text)]
    return [line for line in lines if line]


def suffix_of(file: str) -> str:
    """Return a file's suffix in lower case, with its dot: `.txt`."""
    return os.path.splitext(file)[1].lower()


def _walk(root: str) -> dict[str, tuple[int, int]]:
    """Return all files under a folder, or the file `root`, sorted by path, with size in bytes and time in ns.

    Hidden files, SYSTEM_FOLDERS, and folders below `root` with dumo's own images are skipped. Links are followed. A
    broken link has size -1, and reading it raises the error. Raises UserError if a link points to a folder that
    contains it, or if a name is not UTF-8, which run.yaml cannot contain.
    """
    states: dict[str, tuple[int, int]] = {}
    system_folders: list[str] = []

    def walk(folder: str, above: frozenset[tuple[int, int]]) -> None:
        signals.check()
        folder_stat = os.stat(folder)
        identity = (folder_stat.st_dev, folder_stat.st_ino)
        if identity in above:
            raise UserError(f"{folder} is a link to a folder that contains it: remove the link")
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
        if above and holds_own_images(folder, {entry.name for entry in visible}):
            return
        for entry in sorted(visible, key=lambda entry: entry.name):
            if not entry.name.isascii():
                _require_utf8(folder, entry.name)
            try:
                entry_stat = entry.stat()
            except OSError:
                states[entry.path] = (-1, 0)
                continue
            if not stat.S_ISDIR(entry_stat.st_mode):
                states[entry.path] = (entry_stat.st_size, entry_stat.st_mtime_ns)
            elif entry.name.lower() in SYSTEM_FOLDERS:
                system_folders.append(entry.path)
            else:
                walk(entry.path, above | {identity})

    if not os.path.isdir(root):
        root_stat = os.stat(root)
        return {root: (root_stat.st_size, root_stat.st_mtime_ns)}
    walk(root, frozenset())
    if system_folders:
        warn_once(f"system folders are skipped: {first_few(system_folders)}")
    return states


def _require_utf8(folder: str, name: str) -> None:
    """Raise UserError if a name is not UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{folder} has a file or folder whose name is not UTF-8, {os.fsencode(name)!r}: rename it, or set "
            "PYTHONUTF8=1"
        ) from error


def _files_of_split(root: str, paths: Sequence[str], split: str | None, *, is_folder: bool) -> list[str]:
    """Return the files of a split, which is a folder name or, for tables and archives, a word in the file name.

    If `split` is None, all files are returned if they belong to one split. Raises UserError if the split is missing or
    must be chosen, or if a table or archive is not a regular file, since opening a pipe would wait forever.
    """

    def words(file: str) -> list[str]:
        *folders, name = (os.path.basename(root) if file == root else _below(root, file)).split(os.sep)
        return folders if is_folder else [*folders, *re.split(r"[-_.]", os.path.splitext(name)[0])]

    if split is not None:
        paths = [file for file in paths if split in words(file)]
        if not paths:
            raise UserError(
                f"{root} has no split '{split}', a folder or file with this name: set data.split=null to read all data"
            )
    elif is_folder:
        # Splits are folders at the level of class folders.
        common = _common_folder(paths)
        tops = {_below(common, file).partition(os.sep)[0] for file in paths}
        if len(tops) > 1 and tops <= SPLITS:
            raise UserError(f"{common} has the splits {first_few(sorted(tops))}: choose one with data.split")
    else:
        found = {next((word for word in words(file) if word in SPLITS), "(no split)") for file in paths}
        if len(found) > 1:
            raise UserError(f"{root} has the splits {', '.join(sorted(found))}: choose one with data.split")
    if not is_folder:
        for file in paths:
            if os.path.exists(file) and not os.path.isfile(file):
                raise UserError(f"{file} is not a regular file, but a pipe, a device or a folder: remove it")
    return list(paths)


def _common_folder(paths: Sequence[str]) -> str:
    """Return the deepest folder that contains all files."""
    return os.path.commonpath({path.rpartition(os.sep)[0] or os.sep for path in paths})


def _below(folder: str, file: str) -> str:
    """Return a file's path relative to a folder that contains it. `os.path.relpath` is slow."""
    return file[len(folder.rstrip(os.sep)) + 1 :]


def _require_image_size(size: int) -> None:
    """Raise Unreadable if a file is too large for an image, since a sparse file would fill the memory."""
    if size > _MAX_IMAGE_BYTES:
        raise Unreadable(f"has {size} bytes, too many for an image")


def _composed(name: str) -> str:
    """Normalize a name to NFC for comparisons, since macOS writes "é" as two characters."""
    return unicodedata.normalize("NFC", name)


# Tables of metadata


def _table_rows(table: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row of a table of metadata: its location for messages, and its values by column."""
    match suffix_of(table):
        case ".parquet":
            with _readable(table):
                columns = _open_table(table).read(use_threads=False)
            values = {name: _to_python(columns.column(name), table) for name in columns.column_names}
            for i in range(columns.num_rows):
                yield f"{table} row {i}", {name: of_column[i] for name, of_column in values.items()}
        case ".jsonl":
            for number, line in enumerate(read_text(Path(table)).split("\n"), 1):
                if line.strip():
                    yield f"{table} line {number}", _parse_object(line, f"{table} line {number}")
        case _:
            yield from _csv_rows(table)


def _csv_rows(table: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row of a CSV file with commas, semicolons or tabs as separators.

    Raises UserError for errors that the csv module ignores: an unclosed quote, which swallows all following rows, an
    unquoted separator, which truncates a caption, and duplicate columns, which overwrite each other.
    """
    text = "".join(text_lines(Path(table)))
    first_line = text.partition("\n")[0]
    delimiters = [d for d in ",;\t" if "file_name" in (name.strip().strip('"') for name in first_line.split(d))]
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=[*delimiters, ","][0], strict=True)
    line = 1
    try:
        header = [name.strip() for name in next(reader, [])]
        if len(set(header)) < len(header):
            raise UserError(f"{table} line 1 has a column twice ({', '.join(header)}): rename one")
        line = reader.line_num + 1
        for fields in reader:
            if len(fields) > len(header):
                raise UserError(
                    f"{table} line {line} has {len(fields)} fields, but the first line has {len(header)}: enclose "
                    "texts with separators in double quotes"
                )
            if fields:
                yield f"{table} line {line}", dict(zip(header, fields, strict=False))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{table} line {line} is not valid CSV ({error}): close all quotes") from error


def _parse_object(text: str, where: str) -> dict[str, Any]:
    """Parse a JSON object. Raises UserError for other values."""
    value = parse_json(text, where)
    if not isinstance(value, dict):
        raise UserError(f'{where} must be a JSON object, such as {{"text": "a cat"}}')
    return value


# Parquet


def _open_table(file: str, metadata: Any = None) -> "ParquetFile":  # noqa: ANN401, untyped
    """Open a parquet file without reading rows. `metadata` is its footer, if known. Raises UserError for damage."""
    from pyarrow.parquet import ParquetFile  # slow to import

    with _readable(file):
        return ParquetFile(file, metadata=metadata, memory_map=True, page_checksum_verification=True)


@contextmanager
def _readable(file: str) -> Generator[None]:
    """Convert pyarrow's errors in the context to a UserError with the file's name."""
    from pyarrow import ArrowException  # slow to import

    try:
        with files.named_in_errors(file):
            yield
    except (ArrowException, OSError) as error:
        # System errors, such as too many open files, do not mean damage.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{file} is a damaged parquet file: {error}; download it again, or remove it") from error


def _to_python(column: Any, file: str) -> list[Any]:  # noqa: ANN401, an untyped column
    """Convert a column to Python values. Raises UserError if a text is not UTF-8."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} has a text that is not UTF-8 ({error})") from error


def _image_columns(schema: Any) -> list[str]:  # noqa: ANN401, an untyped schema
    """Return the columns of bytes, or of structs with bytes."""
    from pyarrow import types  # slow to import

    def has_bytes(kind: Any) -> bool:  # noqa: ANN401, an untyped type
        if types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)

    return [field.name for field in schema if has_bytes(field.type)]


def _choose_image_column(file: str, schema: Any, column: str | None) -> str:  # noqa: ANN401, an untyped schema
    """Return the column of images in a parquet file. Raises UserError if there is none, or several."""
    return _choose_column(file, column, _image_columns(schema), {field.name: str(field.type) for field in schema})


def _choose_column(where: str, column: str | None, candidates: Sequence[str], types: dict[str, str]) -> str:
    """Return `column`, or else the first of IMAGE_COLUMNS, or else the only candidate.

    `types` are the types of all columns, for the error message.
    """
    wanted = [column] if column else [*IMAGE_COLUMNS, *(candidates if len(candidates) == 1 else ())]
    for name in wanted:
        if name in candidates:
            return name
    listed = ", ".join(f"{name}: {kind}" for name, kind in types.items())
    if len(candidates) > 1:
        raise UserError(
            f"{where} has several columns of bytes ({', '.join(candidates)}): name the column of images 'image'"
        )
    raise UserError(
        f"{where} has no column of images (it has {brief(listed)}): store images as bytes, or structs of bytes and path"
    )


def _class_names_of(schema: Any) -> dict[str, tuple[str, ...]]:  # noqa: ANN401, an untyped schema
    """Return the class names by column from Hugging Face's metadata of a table."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: tuple(feature["names"]) for name, feature in features.items() if "names" in feature}
    except (KeyError, TypeError, ValueError):
        return {}


def _describe(features: Any) -> dict[str, str]:  # noqa: ANN401, Features
    """Describe the types of a data set's columns."""
    return {name: getattr(feature, "dtype", "") or type(feature).__name__ for name, feature in features.items()}


# Tar


def _cached_scan(file: str, state: tuple[int, int]) -> TarScan:
    """Scan an archive. The scan of a large archive is cached by its size and time."""
    if state[0] < INDEX_BYTES:
        return TarScan.of(file)
    cache_file = INDEX_FOLDER / f"{os.path.basename(file)}-{digest.short(os.path.abspath(file))}.json"
    try:
        content = json.loads(cache_file.read_bytes())
        if content["state"] == list(state):
            return TarScan(**content["scan"])
    except (OSError, ValueError, KeyError, TypeError):
        # The cached scan is missing or damaged.
        pass
    scan = TarScan.of(file)
    try:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        files.write(cache_file, json.dumps({"state": state, "scan": asdict(scan)}).encode())
    except OSError as error:
        warn_once(f"{cache_file.parent} cannot be written ({error.strerror}): {file} will be scanned again next time")
    return scan


def _sample_key(name: str) -> str:
    """Return a member's path without suffixes, which all members of a sample share (webdataset)."""
    path = PurePosixPath(name)
    return _composed(str(path.with_name(path.name.partition(".")[0])))


def _is_hidden(path: PurePosixPath) -> bool:
    """Whether a member, or one of its folders, is hidden or in SYSTEM_FOLDERS. `..` is not hidden."""
    return any((part.startswith(".") and part != "..") or part.lower() in SYSTEM_FOLDERS for part in path.parts)


def _read_span(file: str, start: int, size: int) -> bytes:
    """Read `size` bytes of a file from `start`."""
    with files.named_in_errors(file), open(file, "rb") as opened:
        opened.seek(start)
        return opened.read(size)


def _require_whole_end(file: str, end: int) -> None:
    """Raise UserError unless an archive has a valid end after its members, at byte `end`.

    tarfile silently stops at the first block that is not a header. A valid end is a block of zeros, followed only by
    zeros that fill the archive's last record of up to a MiB.
    """
    size = os.stat(file).st_size
    with files.named_in_errors(file), open(file, "rb") as archive:
        archive.seek(end)
        block = archive.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE or any(block):
            raise UserError(f"{file} is truncated or damaged at byte {end}: download it again, or remove it")
        while chunk := archive.read(2**20):
            if any(chunk):
                raise UserError(
                    f"{file} has data after its end at byte {end}: it is damaged, or consists of several archives"
                )
    record_sizes = (tarfile.RECORDSIZE, *(tarfile.BLOCKSIZE << k for k in range(12)))
    if not any(size % record == 0 and size - end <= record + 2 * tarfile.BLOCKSIZE for record in record_sizes):
        raise UserError(
            f"{file} has {size - end} zeros after byte {end}, more than tar writes at its end: a part is missing, "
            "download it again"
        )
