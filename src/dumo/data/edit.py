"""Captions that edit images: each row of a table has an image, a text, and the image that the text edits.

The edited image stands in the column `captions.source`, as a path from the table's folder, outside of the images' root.

`edit_rows` finds the rows of each image. `edit_captions` makes its captions of them: texts with the hash of the edited
image, which `source_hash` gives.
"""

import os
from functools import lru_cache
from pathlib import Path

from dumo.data.column import CAPTION_FIX, TableRow, caption_columns
from dumo.data.metadata import TABLES, image_folder, read_tables
from dumo.data.pairing import ImageCaptions, Pairing
from dumo.data.store import Folder, Store, walk_files
from dumo.encoders.caption import edit_caption
from dumo.io import digest
from dumo.io.read import brief
from dumo.types import UserError


def edit_captions(root: Path, store: Store, name: str, source: str, *, require_pairs: bool) -> list[ImageCaptions]:
    """The captions of each image of a store, in its order, each with the hash of the image that it edits.

    `name` is captions.name, `source` the column of the edited image. Raises UserError as `edit_rows`, for an image
    without a text, and for an edited image that is missing.
    """
    rows_by_image = edit_rows(root, store, source, require_pairs=require_pairs)
    return [_captions_in(rows, name, source, image) for image, rows in rows_by_image]


def edit_rows(
    root: Path, store: Store, source: str, *, require_pairs: bool = False
) -> list[tuple[str, list[TableRow]]]:
    """Each image's file, with the rows that name an edited image in the column `source`: its path.

    Raises UserError where an image has no such row. `require_pairs`: raise it also for too many rows without an image,
    and warn of a few.
    """
    folder = image_folder(root)
    tables = read_tables(folder, walk_files(folder), source)
    image_paths = store.files if isinstance(store, Folder) else ()
    rows_by_image: list[tuple[str, list[TableRow]]] = []
    for image in image_paths:
        rows = tables.by_image.get(os.path.abspath(image), [])
        edits = [row for row in rows if isinstance(row.values.get(source), str)]
        rows_by_image.append((os.path.normpath(image), edits))
    pairing = Pairing(
        captions=[() if rows else None for _, rows in rows_by_image],
        name_of=lambda i: os.path.relpath(rows_by_image[i][0], folder),
        blank="",  # an image cannot be without a caption: each edits another
        num_rows=tables.num_rows,
        orphan_rows=tables.orphans,
    )
    if require_pairs:
        pairing.refuse_orphans(root)
    without_rows = [image for image, rows in rows_by_image if not rows]
    if without_rows or not rows_by_image:
        place = without_rows[0] if without_rows else root
        raise UserError(
            f"{place} has no row with '{brief(source)}' in {' or '.join(TABLES)}: "
            "give each image in data.root a row that names the image it was edited from; keep the originals outside "
            "data.root"
        )
    if require_pairs:
        pairing.warn(root)
    return rows_by_image


def source_hash(file: Path) -> str:
    """The SHA-256 of an image that is edited, read again where it has changed. Raises UserError where it is missing."""
    if not file.is_file():
        raise UserError(f"{file} is missing, an image to edit: put it there, or mend captions.source")
    file_stat = file.stat()
    return _hash_of_state(file, file_stat.st_mtime_ns, file_stat.st_size)


@lru_cache(None)
def _hash_of_state(file: Path, changed: int, size: int) -> str:
    """The SHA-256 of a file that was last changed at a time, in ns, and has a size in bytes."""
    return digest.of_file(file)


def _captions_in(rows: list[TableRow], name: str, source: str, image: str) -> ImageCaptions:
    """The captions in the rows of an image. Raises UserError where there is none."""
    captions: list[str] = []
    for row in rows:
        columns = caption_columns(name, row.values, image)
        if columns is None:
            continue
        for text in columns.of_row(row):
            if text.strip():
                captions.append(edit_caption(text, source_hash(Path(row.values[source]))))
    if not captions:
        raise UserError(f"{image} has no text: {CAPTION_FIX}")
    return tuple(captions)
