"""What was written of images, next to them, in their table or their archive.

    folder   metadata.jsonl or captions.jsonl of {"file_name": "cats/1.jpg", "text": "a cat"}; or cats/1.txt
    parquet  a column of texts, or of lists of them
    tar      0001.txt or 0001.json next to 0001.jpg

In a table the captions stand under the first of NAMES that there is, or under a name that is set: one text, or a list
of several. In a file of text every line is a caption of its own. With latents they stand in captions.jsonl, a JSON
list of texts to a line in the images' order, so that training, and encoding the texts, need no images.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, cast

from dumo.data.parquet import Parquet, columns
from dumo.data.store import Folder, Store, walk
from dumo.data.tar import Tar
from dumo.encoders.caption import Captions
from dumo.io.read import brief, read_text
from dumo.types import UserError

NAMES = ("text", "caption", "captions", "prompt")  # the hub's, webdataset's and ours
LINES = "captions.jsonl"
TABLES = ("metadata.jsonl", LINES)
TEXT = "txt"  # in place of a name: files of text
AUTO = "auto"
NO_CAPTIONS = "no captions found"
MEND = "mend it, or set captions.name"
REWRITE = "remove it, and dumo encode writes it from the images"

Texts = tuple[str, ...]  # captions of an image


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


def captions_of(root: Path, store: Store, name: str) -> list[Texts]:
    """The captions of each image of a store, in its order; () of one that has none.

    `name`: the column or key that they stand under, `txt` or `auto`. Raises UserError where no image has one, or what
    stands there is no text.
    """
    if isinstance(store, Folder):
        found = in_files(root, store, name)
        sought = f"{' or '.join(TABLES)} with file_name, or a .txt next to each image"
    elif isinstance(store, Parquet):
        found, sought = in_tables(store, name), f"columns {', '.join(NAMES)}"
    else:
        assert isinstance(store, Tar), "there is no fourth store"
        found, sought = in_archives(store, name), ".txt or .json next to each image"
    if not any(text.strip() for some in found for text in some):
        raise UserError(
            f"{NO_CAPTIONS} for the {len(store)} images of {root}: looked for {sought}; or leave out data.captions"
        )
    return found


def in_files(root: Path, store: Folder, name: str) -> list[Texts]:
    """Of files: by tables in the folder, else by a file of text for each."""
    files = walk(root if root.is_dir() else root.parent)
    tables = [file for file in files if os.path.basename(file) in TABLES and name != TEXT]
    if tables:
        rows = dict(chain.from_iterable(map(rows_of, tables)))
        key = key_of(name, rows.values(), ", ".join(tables)) or ""
        return [texts(rows[file].get(key), file) if file in rows else () for file in map(os.path.normpath, store.files)]
    if name not in (AUTO, TEXT):
        raise UserError(
            f"{root} has no {' or '.join(TABLES)} that '{brief(name)}' could stand in: set captions.name=txt"
        )
    texts_of = (f"{os.path.splitext(file)[0]}.txt" for file in store.files)
    return [split(read_text(Path(file), MEND)) if file in files else () for file in texts_of]


def rows_of(table: str) -> Iterable[tuple[str, dict[str, Any]]]:
    """The lines of a table of JSON, each with the file that it speaks of."""
    folder = os.path.dirname(table)
    with Path(table).open(encoding="utf-8", errors="replace") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            row = read_object(line, f"{table} line {number}")
            if not isinstance(file := row.get("file_name"), str):
                raise UserError(f"{table} line {number} has no file_name: each line says it, and its text")
            yield os.path.normpath(os.path.join(folder, file)), row


def in_tables(store: Parquet, name: str) -> list[Texts]:
    """Of rows of tables."""
    there = columns(store)
    key = key_of(name, [dict.fromkeys(there)], store.files[0])
    if key is None:
        return [()] * len(store)
    return [texts(value, f"column '{key}'") for column in store.read_column(key) for value in column.to_pylist()]


def in_archives(store: Tar, name: str) -> list[Texts]:
    """Of members of archives: their text, else what their JSON says."""
    suffixes = {AUTO: (TEXT, "json"), TEXT: (TEXT,)}.get(name, ("json",))
    found = store.texts(suffixes)
    rows = [
        read_object(members["json"].decode(errors="replace"), store.path(i)) if "json" in members else {}
        for i, members in enumerate(found)
    ]
    key = key_of(name, rows, store.files[0]) or "" if any(rows) else ""
    return [
        split(members[TEXT].decode(errors="replace")) if TEXT in members else texts(row.get(key), store.path(i))
        for i, (members, row) in enumerate(zip(found, rows, strict=True))
    ]


def key_of(name: str, rows: Iterable[Mapping[str, Any]], where: str) -> str | None:
    """The key that captions stand under; None where `auto` finds none. Raises UserError for one that is not there."""
    there = dict.fromkeys(chain.from_iterable(rows))
    if name == AUTO:
        return next((key for key in NAMES if key in there), None)
    if name not in there:
        raise UserError(f"{where} has no '{brief(name)}' (it has {', '.join(there)}): set captions.name")
    return name


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
