"""What was written of images, next to them, in their table or their archive.

    folder   metadata.csv, .jsonl or .parquet of file_name, cats/1.jpg, and text; or cats/1.txt or .caption
    parquet  a column of texts, or of lists of them
    tar      0001.txt, .caption or .json next to 0001.jpg

An image that is edited stands in a column of its own, as a path from the table's folder, outside of the images' root.

In a table the captions stand under the first of NAMES that there is, or under the names that are set, separated by
commas: one text each, or a list of several. An image may have several rows. In a file of text every line is a caption
of its own. With latents they stand in captions.jsonl, a JSON list of texts to a line in the images' order, so that
training, and encoding the texts, need no images.
"""

import csv
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, cast

from dumo.data.parquet import Parquet, columns, open_table, whole
from dumo.data.store import Folder, Store, walk
from dumo.data.tar import Tar
from dumo.encoders.caption import Captions, edit
from dumo.io import digest
from dumo.io.read import brief, read_text
from dumo.types import UserError

NAMES = ("text", "caption", "captions", "prompt")  # the hub's, webdataset's and ours
LINES = "captions.jsonl"
TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet", LINES)
TEXT = ("txt", "caption")  # in place of a name: files of text, by their endings. kohya's trainers write the second
AUTO = "auto"
MEND = "mend it, or set captions.name"
REWRITE = "remove it, and dumo encode writes it from the images"

Texts = tuple[str, ...]  # captions of an image


class NoCaptionsError(UserError):
    """The images have no captions."""


def dump_lines(captions: Captions) -> bytes:
    """As `read_lines` reads it."""
    texts, ids, ends = captions.texts, captions.ids.tolist(), [0, *captions.ends.tolist()]
    rows = ([texts[k] for k in ids[first:end] if k < len(texts)] for first, end in pairwise(ends))
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()


def read_lines(file: Path) -> Captions:
    """The captions by image. Raises UserError where there is no such file, or it is damaged."""
    if not file.is_file():
        raise UserError(f"{file} is not there, which has the images' captions: start the same dumo encode again")
    return Captions.of(_each(file))


def require_lines(file: Path, captions: Captions) -> None:
    """Raise UserError where a file is there that holds others."""
    if file.exists() and file.read_bytes() != dump_lines(captions):
        raise UserError(
            f"{file} holds other captions than the images have now: {REWRITE}; runs of the old ones need it"
        )


def _each(file: Path) -> Iterator[list[str]]:
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            yield read_line(line, f"{file} line {number}", "list of texts", are_texts, REWRITE)


def read_line(text: str, where: str, what: str, fits: Callable[[Any], bool], way_out: str) -> Any:  # noqa: ANN401
    """The value of a line of JSON. Raises UserError for what is not JSON, or does not fit: no `what`."""
    try:
        if fits(value := json.loads(text)):
            return value
        wrong = f"no {what}"
    except (ValueError, RecursionError) as error:
        wrong = f"not JSON ({error})"
    raise UserError(f"{where} is {wrong}: {way_out}")


def are_texts(value: object) -> bool:
    """Whether it is a list of them."""
    return isinstance(value, list) and all(isinstance(text, str) for text in cast(list[object], value))


def captions_of(root: Path, store: Store, name: str, source: str | None = None) -> list[Texts]:
    """The captions of each image of a store, in its order; () of one that has none.

    `name`: the columns or keys that they stand under, an ending in TEXT, or `auto`; `source`: the column of the image
    that they edit. Raises NoCaptionsError where no image has one, UserError where what stands there is no text, or
    edits no image.
    """
    if source:
        return [edits(rows, name, source, path) for path, rows in edited(root, store, source)]
    if isinstance(store, Folder):
        found, there = in_files(root, store, name)
        sought = f"{', '.join(TABLES)} with file_name, and a {' or '.join(f'.{end}' for end in TEXT)} for each image"
    elif isinstance(store, Parquet):
        found, there = in_tables(store, name)
        sought = f"columns {', '.join(NAMES)}"
    else:
        assert isinstance(store, Tar), "there is no fourth store"
        found, there = in_archives(store, name)
        sought = f"{', '.join(f'.{end}' for end in TEXT)} and .json next to each image"
    if not any(text.strip() for some in found for text in some):
        has = f" There are columns {', '.join(there)}: set captions.name to one," if there else ""
        raise NoCaptionsError(
            f"no captions found for the {len(store)} images of {root}: looked for {sought};{has}"
            " or leave out data.captions"
        )
    return found


def in_files(root: Path, store: Folder, name: str) -> tuple[list[Texts], Iterable[str]]:
    """Of files: by tables in the folder, else by a file of text for each; and the tables' columns."""
    files = walk(root if root.is_dir() else root.parent)
    tables = [file for file in files if os.path.basename(file) in TABLES]
    rows: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for file, row in chain.from_iterable(map(rows_of, tables if name != TEXT[0] else ())):
        rows[file].append(row)
    there = dict.fromkeys(chain.from_iterable(chain.from_iterable(rows.values())))
    keys = keys_of(name, there, ", ".join(tables)) if rows else ()
    if not keys and name not in (AUTO, *TEXT):
        raise UserError(
            f"{root} has no {' or '.join(TABLES)} that '{brief(name)}' could stand in: set captions.name=txt"
        )
    endings = TEXT if name == AUTO else (name,) if name in TEXT else ()

    def texts_of(file: str) -> Texts:
        if keys and (place := os.path.normpath(file)) in rows:
            return gathered(rows[place], keys, place)
        stem = os.path.splitext(file)[0]
        text = next((text for end in endings if (text := f"{stem}.{end}") in files), None)
        return split(read_text(Path(text), MEND)) if text else ()

    return [texts_of(file) for file in store.files], there


def edited(root: Path, store: Store, source: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """Each image's place and rows, `source` in them the place of what is edited. Raises UserError for none."""
    rows: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for table in (file for file in walk(root if root.is_dir() else root.parent) if os.path.basename(file) in TABLES):
        for file, row in rows_of(table):
            if isinstance(place := row.get(source), str):
                place = os.path.normpath(os.path.join(os.path.dirname(table), place))
                rows[file].append(row | {source: place})
    places = [os.path.normpath(file) for file in store.files] if isinstance(store, Folder) else []
    if missing := next((file for file in places or [str(root)] if not rows[file]), None):
        raise UserError(
            f"{missing} has no '{brief(source)}' in {' or '.join(TABLES)}, the image that its text edits: give one to "
            "each image of the folder, and keep those that are edited in another"
        )
    return [(file, rows[file]) for file in places]


def edits(rows: list[dict[str, Any]], name: str, source: str, where: str) -> Texts:
    """The captions of an image, each with the hash of what it edits. Raises UserError as `captions_of`."""
    found = [
        edit(text, hash_of(Path(row[source])))
        for row in rows
        for text in gathered([row], keys_of(name, row, where), where)
        if text.strip()
    ]
    if not found:
        raise UserError(f"{where} has no text: {MEND}")
    return tuple(found)


def hash_of(file: Path) -> str:
    """The SHA-256 of an image that is edited, read again where it has changed. Raises UserError where it is missing."""
    if not file.is_file():
        raise UserError(f"{file} is missing, an image to edit: put it there, or mend captions.source")
    return _hashed(file, (there := file.stat()).st_mtime_ns, there.st_size)


@lru_cache(None)
def _hashed(file: Path, changed: int, size: int) -> str:
    return digest.of_file(file)


def rows_of(table: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a table, each with the file that it speaks of."""
    folder = os.path.dirname(table)
    read = {".csv": csv_rows, ".parquet": parquet_rows}.get(os.path.splitext(table)[1], json_rows)
    for where, row in read(table):
        if not isinstance(file := row.pop("file_name", None), str):
            raise UserError(f"{where} has no file_name: each row says it, and its text")
        yield os.path.normpath(os.path.join(folder, file)), row


def json_rows(table: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a table of JSON, each with its place."""
    with Path(table).open(encoding="utf-8", errors="replace") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield (where := f"{table} line {number}"), read_object(line, where)


def csv_rows(table: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines below the first, which names the columns, each with its place."""
    with Path(table).open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        reader = csv.DictReader(stream, restkey="")
        try:
            for row in reader:
                where = f"{table} line {reader.line_num}"
                if "" in row:
                    raise UserError(f"{where} has more fields than the first line: put a text with commas into quotes")
                yield where, row
        except csv.Error as error:
            raise UserError(f"{table} line {reader.line_num} is no CSV ({error}): {MEND}") from error


def parquet_rows(table: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a table of parquet, each with its place."""
    with whole(table):
        rows = chain.from_iterable(part.to_pylist() for part in open_table(table).iter_batches(use_threads=False))
        yield from ((f"{table} row {number}", row) for number, row in enumerate(rows))


def in_tables(store: Parquet, name: str) -> tuple[list[Texts], Iterable[str]]:
    """Of rows of tables; and their columns."""
    there = columns(store)
    keys = keys_of(name, there, store.files[0])
    found = [[value for column in store.read_column(key) for value in column.to_pylist()] for key in keys]
    where = f"column '{', '.join(keys)}'"
    rows = [dict(zip(keys, values, strict=True)) for values in zip(*found, strict=True)] or [{}] * len(store)
    return [gathered([row], keys, where) for row in rows], there


def in_archives(store: Tar, name: str) -> tuple[list[Texts], Iterable[str]]:
    """Of members of archives: their text, else what their JSON says; and its keys."""
    endings = TEXT if name == AUTO else (name,) if name in TEXT else ()
    found = store.texts(endings if name == TEXT[0] else (*endings, "json"))
    rows = [
        read_object(members["json"].decode(errors="replace"), store.path(i)) if "json" in members else {}
        for i, members in enumerate(found)
    ]
    there = dict.fromkeys(chain.from_iterable(rows))
    keys = keys_of(name, there, store.files[0]) if there else ()
    of_texts = (next((members[end] for end in endings if end in members), None) for members in found)
    listed = [
        gathered([row], keys, store.path(i)) if text is None else split(text.decode(errors="replace"))
        for i, (text, row) in enumerate(zip(of_texts, rows, strict=True))
    ]
    return listed, there


def keys_of(name: str, there: Iterable[str], where: str) -> Texts:
    """The keys that captions stand under; () where `auto` finds none, or files of text are meant.

    Raises UserError for one that is not there.
    """
    if name == AUTO:
        return next(((key,) for key in NAMES if key in there), ())
    keys = () if name in TEXT and name not in there else tuple(name.split(","))
    for key in keys:
        if key not in there:
            raise UserError(f"{where} has no '{brief(key)}' (it has {', '.join(there)}): set captions.name")
    return keys


def gathered(rows: Iterable[Mapping[str, Any]], keys: Texts, where: str) -> Texts:
    """The captions of an image in its rows, of all keys. Raises UserError for what is no text."""
    return tuple(text for row in rows for key in keys for text in texts(row.get(key), where))


def texts(value: object, where: str) -> Texts:
    """One text, a list of them, or none. Raises UserError for what is no text."""
    listed: Any = value if isinstance(value, list) else [] if value is None else [value]
    if not are_texts(listed):
        raise UserError(f"{where}: the caption {brief(repr(value))} is no text: {MEND}")
    return tuple(listed)


def split(text: str) -> Texts:
    """A caption a line, blank ones left out."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def read_object(text: str, where: str) -> dict[str, Any]:
    """An object of JSON. Raises UserError for anything else."""
    return read_line(text, where, 'JSON object, as in {"text": "a cat"}', lambda row: isinstance(row, dict), MEND)
