"""Write samples to files: one picture, a file for each sample, or an archive.

`write_samples` writes them in one of FORMS; `render_sheet` lays out images with titles, and `data_points` are the
points behind a scatter plot of samples.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from PIL import Image
from torch import Tensor

from dumo.config.conditions import Conditions, shown_data
from dumo.data import Data
from dumo.data.rows import CAPTION_COLUMNS, TABLES
from dumo.io import file as files
from dumo.io import picture
from dumo.io.picture import PixelRows, Points

# One picture, a file for each sample, or an archive.
FORMS = ("grid", "images", "npz")
# Points of the data behind a scatter plot of samples.
DATA_POINTS = 4000


@dataclass(frozen=True)
class _SheetLayout:
    """The layout of a sheet of images."""

    columns: int
    # Above the columns, or above each image.
    titles: Sequence[str] = ()


def _sheet_layout(c: Tensor, conditions: Conditions, names: Sequence[str] | None = None) -> _SheetLayout:
    """Return the layout of a sheet of images with conditions c (n,). `names` defaults to the names in the data.

    If there are few classes in a repeating order, each column shows one class; otherwise every image has a title.
    """
    if not conditions.count:
        return _SheetLayout(columns=8)
    names = names or [conditions.name(k) for k in c.tolist()]
    num_classes = len(set(names))
    is_small = shown_data(conditions.data).shape[-1] <= picture.MIN_READABLE_HEIGHT
    max_columns = 20 if is_small else 10
    columns = 10
    if num_classes <= max_columns:
        columns = num_classes * max(1, 8 // num_classes)
    columns = min(columns, len(names))
    in_turn = all(name == names[i % columns] for i, name in enumerate(names))
    return _SheetLayout(columns, names[:columns] if in_turn else names)


def render_sheet(
    pixels: PixelRows, c: Tensor, conditions: Conditions, names: Sequence[str] | None = None
) -> Image.Image:
    """Render images with conditions c (n,) as a sheet with titles."""
    layout = _sheet_layout(c, conditions, names)
    if not layout.titles:
        return picture.sheet(pixels, layout.columns)
    cells = [picture.sheet(image, 1) for image in pixels.split(1)]
    return picture.labelled_grid(cells, layout.columns, layout.titles, gap=2)


def data_points(data: Data, seed: int) -> picture.Points:
    """Return DATA_POINTS points (n, d) of the data, chosen by `seed`, as the background of a scatter plot."""
    points, _ = data.originals().reference(DATA_POINTS, seed)
    return points


def write_samples(
    rows: PixelRows | Points,
    c: Tensor,
    stem: Path,
    form: str,
    data: Data,
    seed: int,
    names: Sequence[str] | None = None,
) -> Path:
    """Write samples with conditions c (n,) to one file or folder, and return its path.

    `rows` are in the format of `TrainedRun.to_file_rows`. `stem` is the path without suffix, and `form` one of FORMS.
    `names` of the conditions default to the names in the data. With single images, captions are written to a table that
    `data.images.captions` can read. Points are plotted over data points chosen by `seed`.
    """
    are_points = len(shown_data(data).shape) == 1
    conditions = Conditions(data)
    match form:
        case "images":
            captions: list[str] = []
            if names and conditions.captions:
                captions = ["" if k == conditions.count else name for k, name in zip(c.tolist(), names, strict=True)]
            with files.atomic_write(stem) as folder:
                folder.mkdir()
                picture.write_singles(folder, rows)
                if captions:
                    _write_captions(folder, captions)
            return stem
        case "npz":
            path = stem.with_name(f"{stem.name}.npz")
            if are_points:
                picture.write_points(path, rows, c)
            else:
                picture.write_adm(path, rows, c)
            return path
        case _:
            path = stem.with_name(f"{stem.name}.png")
            if are_points:
                image = picture.scatter(data_points(data, seed), {stem.name: rows})
            else:
                image = render_sheet(rows, c, conditions, names)
            picture.write_picture(path, image)
            return path


def _write_captions(folder: Path, texts: Sequence[str]) -> None:
    """Write metadata.csv with the caption of each image in a folder, numbered as by `picture.write_singles`."""
    csv_text = StringIO()
    table = csv.writer(csv_text)
    table.writerow(("file_name", CAPTION_COLUMNS[0]))
    table.writerows((f"{i:06d}.png", text) for i, text in enumerate(texts))
    files.write(folder / TABLES[0], csv_text.getvalue().encode())
