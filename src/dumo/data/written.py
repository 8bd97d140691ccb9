"""What is written of the images of a store: captions as they stand beside them, in their table or their archive.

    folder   metadata.jsonl or captions.jsonl of {"file_name": "cats/1.jpg", "text": "a cat"}; or cats/1.txt
    parquet  a column of texts, or of lists of them
    tar      0001.txt or 0001.json beside 0001.jpg

In a table the captions stand under the first of NAMES that there is, or under a name that is asked for: one text, or a
list of several. In a file of text every line is a caption of its own.
"""

import json
import os
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from dumo.data.folder import Folder
from dumo.data.parquet import Parquet, columns
from dumo.data.store import Store, walk
from dumo.data.tar import Tar
from dumo.io.parquet import read_texts
from dumo.io.text import brief, read_text
from dumo.types import UserError

NAMES = ("text", "caption", "captions", "prompt")  # the hub's, webdataset's and ours
TABLES = ("metadata.jsonl", "captions.jsonl")
TEXT = "txt"  # in the place of a name: files of text
AUTO = "auto"
MEND = "mend it, or set captions.name"

Told = tuple[str, ...]  # captions of an image


def written(root: Path, store: Store, name: str) -> list[Told]:
    """The captions of each image of a store, in its order; () of one that has none.

    `name`: the column or key that they stand under, `txt` or `auto`. Raises UserError where no image has one, or what
    stands there is no text.
    """
    match store:
        case Folder():
            found = beside(root, store, name)
        case Parquet():
            found = in_tables(store, name)
        case Tar():
            found = in_archives(store, name)
        case _:
            raise TypeError(f"{type(store).__name__} is no store that captions are known of")
    if not any(text.strip() for told in found for text in told):
        sought = {
            Folder: f"{' or '.join(TABLES)} with file_name, or a .txt beside each image",
            Parquet: f"columns {', '.join(NAMES)}",
            Tar: ".txt or .json beside each image",
        }[type(store)]
        raise UserError(
            f"no captions found for the {len(store)} images of {root}: looked for {sought}; or leave out data.captions"
        )
    return found


def beside(root: Path, store: Folder, name: str) -> list[Told]:
    """Of files: by tables in the folder, else by a file of text for each."""
    files = walk(root if root.is_dir() else root.parent)
    tables = [file for file in files if os.path.basename(file) in TABLES and name != TEXT]
    if tables:
        rows = dict(chain.from_iterable(map(lines, tables)))
        key = chosen(name, rows.values(), ", ".join(tables)) or ""
        return [texts(rows[file].get(key), file) if file in rows else () for file in map(os.path.normpath, store.files)]
    if name not in (AUTO, TEXT):
        raise UserError(
            f"{root} has no {' or '.join(TABLES)} that '{brief(name)}' could stand in: set captions.name=txt"
        )
    texts_of = (f"{os.path.splitext(file)[0]}.txt" for file in store.files)
    return [split(read_text(Path(file), MEND)) if file in files else () for file in texts_of]


def lines(table: str) -> Iterable[tuple[str, dict[str, Any]]]:
    """The lines of a table of JSON, each with the file that it speaks of."""
    folder = os.path.dirname(table)
    with Path(table).open(encoding="utf-8", errors="replace") as opened:
        for number, line in enumerate(opened, 1):
            if not line.strip():
                continue
            row = parsed(line, f"{table} line {number}")
            if not isinstance(file := row.get("file_name"), str):
                raise UserError(f"{table} line {number} has no file_name: each line says it, and its text")
            yield os.path.normpath(os.path.join(folder, file)), row


def in_tables(store: Parquet, name: str) -> list[Told]:
    """Of rows of tables."""
    there = columns(store)
    key = chosen(name, [dict.fromkeys(there)], store.files[0])
    if key is None:
        return [()] * len(store)
    found = (read_texts(file, table, key) for file, table in zip(store.files, store.tables, strict=True))
    return [texts(value, f"column '{key}'") for value in chain.from_iterable(found)]


def in_archives(store: Tar, name: str) -> list[Told]:
    """Of members of archives: their text, else what their JSON says."""
    suffixes = {AUTO: (TEXT, "json"), TEXT: (TEXT,)}.get(name, ("json",))
    found = store.beside(suffixes)
    rows = [
        parsed(told["json"].decode(errors="replace"), store.path(i)) if "json" in told else {}
        for i, told in enumerate(found)
    ]
    key = chosen(name, rows, store.files[0]) or "" if any(rows) else ""
    return [
        split(told[TEXT].decode(errors="replace")) if TEXT in told else texts(row.get(key), store.path(i))
        for i, (told, row) in enumerate(zip(found, rows, strict=True))
    ]


def chosen(name: str, rows: Iterable[Mapping[str, Any]], where: str) -> str | None:
    """The key that captions stand under; None where `auto` finds none. Raises UserError for one that is not there."""
    there = dict.fromkeys(chain.from_iterable(rows))
    if name == AUTO:
        return next((key for key in NAMES if key in there), None)
    if name not in there:
        raise UserError(f"{where} has no '{brief(name)}' (it has {', '.join(there)}): set captions.name")
    return name


def texts(value: object, where: str) -> Told:
    """One text, a list of them, or none. Raises UserError for what is no text."""
    listed: Any = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(text, str) for text in listed):
        raise UserError(f"{where}: the caption {brief(repr(value))} is no text: {MEND}")
    return tuple(listed)


def split(text: str) -> Told:
    """A caption a line, blank ones left out."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def parsed(text: str, where: str) -> dict[str, Any]:
    """An object of JSON. Raises UserError for anything else."""
    try:
        if isinstance(row := json.loads(text), dict):
            return row
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}): {MEND}") from error
    raise UserError(f'{where} is no JSON object, as in {{"text": "a cat"}}: {MEND}')
