"""Convert samples to colours, pictures, PNG and files. Sizes are in pixels.

1. Images in [-1, 1] become 8-bit colours (`to_uint8`, and `to_rows` with channels last); `from_uint8` is the inverse.
2. Colours become pictures of PIL: all in one (`sheet`), or each its own (`singles`). Points are scattered over the data
   (`scatter`), and a figure of matplotlib is drawn (`from_figure`).
3. Pictures are joined on a page, with texts: `labelled_grid`.
4. A picture becomes the bytes of a PNG (`png`), an address in a page (`embed`) or a file (`write_picture`,
   `write_singles`). Colours and points also become arrays in files, as evaluations read them (`write_adm`,
   `write_points`).
"""

import warnings
from base64 import b64encode
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from dumo.io import file as files
from dumo.types import Sample, UserError

Pixels = UInt8[Tensor, "n 3 h w"]
PixelRows = UInt8[Tensor, "n h w 3"]  # as in files
Points = Float[Tensor, "_ d"]

SCATTER_POINTS = 2000  # samples in a scatter plot

MIN_READABLE_HEIGHT = 64  # pixels; a smaller image is enlarged to at least this height
GAP = 6  # pixels between the pictures of a grid
_FONT_SIZE = 12  # pixels; texts next to large pictures are larger
_MAX_LINES = 3  # of a title; a longer one is cut
_DPI = 64  # a power of two, so that a size in inches is a whole number of pixels again
_MAX_EMBEDDED_WIDTH = 1600  # pixels of a picture in a page: enough for a sheet at twice its size


def to_uint8(x: Sample) -> Pixels:
    """Convert images (n, 1 or 3, h, w) in [-1, 1] to RGB colours 0 .. 255, rounded and clamped.

    Raises UserError if x is not finite.
    """
    if not x.isfinite().all():
        raise UserError(
            "the samples are not finite because these weights have diverged: use other weights, or train again with "
            "a lower learning rate or gradient clipping"
        )
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)


def from_uint8(pixels: UInt8[Tensor, "n c h w"]) -> Sample:
    """Convert colours 0 .. 255 to float32 in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1)


def to_rows(x: Sample) -> PixelRows:
    """Convert images to colours (n, h, w, 3) on the CPU. Raises UserError if they are not finite."""
    return to_uint8(x).permute(0, 2, 3, 1).cpu().contiguous()


def singles(x: Sample) -> list[Image.Image]:
    """Return a picture of each image, not enlarged. Raises UserError if they are not finite."""
    return [Image.fromarray(pixels.numpy()) for pixels in to_rows(x)]


def sheet(
    pixels: PixelRows, columns: int, scale: int | None = None, gap: int = 2, *, clear: bool = False
) -> Image.Image:
    """Draw all images in one grid with `columns` columns and white gaps.

    Each pixel becomes a square of side `scale`; None means the smallest readable scale. With `clear`, gaps and empty
    cells are transparent, because a page may be dark.
    """
    scale = scale or readable_scale(pixels.shape[1])
    cells = pixels.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    blank = [255, 255, 255]
    if clear:
        cells = torch.cat([cells, torch.full_like(cells[..., :1], 255)], -1)
        blank = [255, 255, 255, 0]
    n, height, width, _ = cells.shape
    rows = -(-n // columns)
    page = torch.tensor(blank, dtype=torch.uint8).repeat(rows * columns, height + gap, width + gap, 1)
    page[:n, :height, :width] = cells
    grid = page.unflatten(0, (rows, columns)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    return Image.fromarray(grid[: len(grid) - gap, : grid.shape[1] - gap].contiguous().numpy())


def readable_scale(height: int) -> int:
    """Return the smallest scale at which an image of this height is readable."""
    return -(-MIN_READABLE_HEIGHT // height)


def labelled_grid(
    pictures: Sequence[Image.Image],
    columns: int,
    titles: Sequence[str] = (),
    row_names: Sequence[str] = (),
    gap: int = GAP,
) -> Image.Image:
    """Draw pictures in a white grid with `columns` columns and cells of the size of the largest picture.

    `titles` are written above the columns, or above each picture if there are more titles than columns. `row_names` are
    written on the left.
    """
    from matplotlib.figure import Figure  # slow to import

    width = max(picture.width for picture in pictures)
    height = max(picture.height for picture in pictures)
    rows = -(-len(pictures) // columns)

    # Break the titles to the width of a cell, and make room for the texts.
    font_size = max(_FONT_SIZE, height // 16)
    letter_width = 0.53 * font_size
    letters = max(1, int(width / letter_width))
    wrapped: list[str] = []
    for title in titles:
        lines = [fill(line, letters, max_lines=_MAX_LINES, placeholder="…") for line in title.split("\n")]
        wrapped.append("\n".join(lines))
    title_lines = max((title.count("\n") + 1 for title in wrapped), default=0)
    head = int(1.3 * font_size * title_lines) + gap if titles else 0
    has_title_each = len(titles) > columns
    row_letters = max((len(line) for name in row_names for line in name.split("\n")), default=0)
    left = int(row_letters * letter_width) + gap if row_letters else 0
    row_height = height + gap + (head if has_title_each else 0)
    page_width = left + columns * (width + gap) - gap
    page_height = rows * row_height - gap + (0 if has_title_each else head)

    # Draw, each pixel of a picture as one pixel of the page. matplotlib counts pixels from below.
    figure = Figure(figsize=(page_width / _DPI, page_height / _DPI), dpi=_DPI, facecolor="white")
    points = font_size * 72 / _DPI
    for i, picture in enumerate(pictures):
        row, column = divmod(i, columns)
        x = left + column * (width + gap)
        y = head + row * row_height
        figure.figimage(np.asarray(picture.convert("RGB")), x, page_height - y - picture.height)
        if i < len(wrapped):
            position = ((x + width / 2) / page_width, 1 - (y - gap / 2) / page_height)
            figure.text(*position, wrapped[i], ha="center", va="bottom", size=points, parse_math=False)
    for row, name in enumerate(row_names):
        middle = head + row * row_height + height / 2
        position = ((left - gap) / page_width, 1 - middle / page_height)
        figure.text(*position, name, ha="right", va="center", size=points, parse_math=False)
    return from_figure(figure)


def scatter(real: Points, samples: Mapping[str, Points], side: float = 3.0) -> Image.Image:
    """Draw a panel of `side` inches for each title of `samples`: real points grey, samples red (paper, Fig. 3).

    The axes are limited to the real points plus a tenth on each side; samples outside are not shown. Only the first two
    coordinates are drawn.
    """
    from matplotlib.figure import Figure  # slow to import

    real = real[:, :2]
    title_lines = 1 + max(title.count("\n") for title in samples)
    size = (side * len(samples), side + 0.3 * title_lines)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    low = real.amin(0)
    high = real.amax(0)
    margin = (high - low) / 10
    left, bottom = (low - margin).tolist()
    right, top = (high + margin).tolist()
    panels = figure.subplots(1, len(samples), squeeze=False)[0]
    for axes, (title, x) in zip(panels, samples.items(), strict=True):
        axes.scatter(*real.T.numpy(), s=6, color="0.8", linewidths=0)
        axes.scatter(*x[:, :2].T.numpy(), s=2, color="red", linewidths=0)
        axes.set(title=title, xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[], aspect="equal")
    return from_figure(figure)


def from_figure(figure: Any) -> Image.Image:  # noqa: ANN401, matplotlib's Figure is slow to import
    """Render a matplotlib figure. The picture is transparent where the figure has no background (facecolor "none")."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import

    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        # Letters of a prompt that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", r"Glyph \d+")
        canvas.draw()
    picture = Image.fromarray(np.array(canvas.buffer_rgba()))
    *_, opacity = figure.get_facecolor()
    return picture if opacity == 0 else picture.convert("RGB")


def png(picture: Image.Image, *, optimize: bool = False) -> bytes:
    """Return the bytes of a PNG. `optimize` compresses better but more slowly."""
    buffer = BytesIO()
    picture.save(buffer, format="png", optimize=optimize)
    return buffer.getvalue()


def embed(picture: Image.Image) -> str:
    """Return a `data:` URL with the picture as a PNG of at most _MAX_EMBEDDED_WIDTH."""
    thumbnail = picture.copy()
    thumbnail.thumbnail((_MAX_EMBEDDED_WIDTH, 8 * _MAX_EMBEDDED_WIDTH))
    return "data:image/png;base64," + b64encode(png(thumbnail, optimize=True)).decode()


def write_picture(path: Path, picture: Image.Image) -> None:
    """Write a picture as PNG, atomically. Raises OSError."""
    files.write(path, png(picture))


def write_singles(folder: Path, pixels: PixelRows, first: int = 0) -> None:
    """Write each image to a file, 000000.png and so on, counted from `first`. Raises OSError."""
    for i, image in enumerate(pixels.numpy(), start=first):
        write_picture(folder / f"{i:06d}.png", Image.fromarray(image))


def write_adm(path: Path, pixels: PixelRows, c: Int[Tensor, " n"]) -> None:
    """Write images as ADM's evaluation reads them: arr_0 uint8 (n, h, w, 3), arr_1 int64 labels (n,).

    Raises OSError.
    """
    _write_arrays(path, pixels.numpy(), c.numpy())


def write_points(path: Path, points: Float[Tensor, "n d"], c: Int[Tensor, " n"]) -> None:
    """Write points: arr_0 float (n, d), arr_1 int64 labels (n,). Raises OSError."""
    _write_arrays(path, points.numpy(), c.numpy())


def _write_arrays(path: Path, x: np.ndarray, c: np.ndarray) -> None:
    """Write arrays arr_0 and arr_1 to a .npz file, atomically."""
    with files.atomic_write(path) as temp_path, temp_path.open("wb") as file:  # savez would add an ending to a path
        np.savez(file, x, c.astype(np.int64))
