"""Samples as pictures: the one place where numbers become colours, pictures, PNG and files. Sizes are in pixels.

1. Images in [-1, 1] become eight-bit colours (`to_uint8`, and `to_rows` with the channels last); `from_uint8` is the
   way back.
2. Colours become pictures of PIL: all in one (`sheet`), or each its own (`singles`). Points are scattered over the data
   (`scatter`), and a figure of matplotlib is drawn (`from_figure`).
3. Pictures are joined on a page, with texts: `labelled_grid`, `with_column_names`, `named_blocks`.
4. A picture becomes the bytes of a PNG (`png`), an address in a page (`embed`) or a file (`write_picture`,
   `write_singles`). Colours and points also become arrays in files, as evaluations read them (`write_adm`,
   `write_points`).
"""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dumo.io import file as files
from dumo.types import Sample, UserError

Pixels = UInt8[Tensor, "n 3 h w"]
PixelRows = UInt8[Tensor, "n h w 3"]  # as files hold them
Points = Float[Tensor, "_ d"]

SCATTER_POINTS = 2000  # samples of a scatter: ours

# In pixels, but for the last. All ours
MIN_READABLE_HEIGHT = 64  # a smaller image is enlarged to at least this height
TITLE_SIZE = 12  # of the font of a title above an image
_NAME_SIZES = (16, 14, 12, 10)  # of the font of names above a sheet: the first that fits
GAP = 6  # between the pictures of a grid
_BLOCK_GAP = 28  # between blocks that have their names above them
_MAX_EMBEDDED_WIDTH = 1600  # of a picture in a page: enough for a sheet at twice its size
_MAX_LINES = 3  # of a title above an image, or a note below several


def to_uint8(x: Sample) -> Pixels:
    """Images (n, 1 or 3, h, w) as colours 0 .. 255, grey in all three: -1 is 0 and 1 is 255, rounded and clamped.

    Raises UserError for other shapes, and where x is not finite, which has no colour.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise UserError(f"samples of shape {tuple(x.shape[1:])} are no images of 1 or 3 channels: decode them first")
    if not x.isfinite().all():
        raise UserError(
            "the samples are not finite numbers and have no colour: these weights have diverged, use others, or train "
            "again with a lower rate or a clipped gradient"
        )
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)


def from_uint8(pixels: UInt8[Tensor, "n c h w"]) -> Sample:
    """Images of colours 0 .. 255 as numbers -1 .. 1, in float32."""
    return pixels.float().div_(127.5).sub_(1)


def to_rows(x: Sample) -> PixelRows:
    """Images as colours (n, h, w, 3), as files hold them, on the CPU. Raises UserError for what has no colour."""
    return to_uint8(x).permute(0, 2, 3, 1).cpu().contiguous()


def singles(x: Sample) -> list[Image.Image]:
    """A picture of each image, not enlarged. Raises UserError for what has no colour."""
    return [Image.fromarray(pixels.numpy()) for pixels in to_rows(x)]


def sheet(
    pixels: PixelRows,
    columns: int,
    scale: int | None = None,
    gap: int = 2,
    titles: Sequence[str] = (),
    *,
    clear: bool = False,
) -> Image.Image:
    """All images in one picture, row after row, `columns` to a row, with white gaps between them.

    Each pixel becomes a square of side `scale`; None takes the least scale at which an image is readable. `titles` are
    written above the columns, or, where there are as many as images, above each image. With `clear`, and no titles,
    gaps and empty cells are transparent, for a page may be dark.
    """
    scale = scale or readable_scale(pixels.shape[1])
    cells = pixels.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    if clear:
        opaque = torch.full_like(cells[..., :1], 255)
        transparent_white = (255, 255, 255, 0)
        page = _tiled(torch.cat([cells, opaque], -1), columns, gap, blank=transparent_white)
    elif not titles:
        page = _tiled(cells, columns, gap)
    else:
        title_strips = _title_strips(titles, cells.shape[2])
        if len(title_strips) == len(cells):  # a title above each image
            page = _tiled(torch.cat([title_strips, cells], 1), columns, gap)
        else:  # a title above each column
            head = _tiled(title_strips, columns, gap)
            space = head.new_full((gap, *head.shape[1:]), 255)
            page = torch.cat([head, space, _tiled(cells, columns, gap)])
    return Image.fromarray(page.numpy())


def readable_scale(height: int) -> int:
    """The least scale at which an image of this height is readable."""
    return -(-MIN_READABLE_HEIGHT // height)


def _tiled(
    cells: UInt8[Tensor, "n h w d"], columns: int, gap: int, blank: Sequence[int] = (255, 255, 255)
) -> UInt8[Tensor, "height width d"]:
    """Cells of one size as one picture, row after row, with gaps between them.

    `blank`: the colour of gaps, and of cells in the last row without a picture.
    """
    n, height, width, _ = cells.shape
    rows = -(-n // columns)
    page = torch.tensor(blank, dtype=torch.uint8).repeat(rows * columns, height + gap, width + gap, 1)
    page[:n, :height, :width] = cells
    grid = page.unflatten(0, (rows, columns)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    return grid[: len(grid) - gap, : grid.shape[1] - gap].contiguous()


def _title_strips(texts: Sequence[str], width: int) -> UInt8[Tensor, "n height width 3"]:
    """Texts in black on white, as pictures of one height: that of the text with the most lines."""
    title_font = font(TITLE_SIZE)
    lines_of_each = [_wrapped(text, width, title_font) for text in texts]
    most_lines = max(map(len, lines_of_each))
    strips: list[Tensor] = []
    for lines in lines_of_each:
        strip = Image.new("RGB", (width, TITLE_SIZE * most_lines + 6), "white")
        pen = ImageDraw.Draw(strip)
        first_line = most_lines - len(lines)  # short titles stand low, next to their image
        for i, line in enumerate(lines, first_line):
            middle = (width / 2, TITLE_SIZE * i + TITLE_SIZE / 2 + 3)
            pen.text(middle, line, "black", title_font, anchor="mm")
        strips.append(torch.from_numpy(np.array(strip)))
    return torch.stack(strips)


def _wrapped(text: str, width: int, text_font: ImageFont.FreeTypeFont) -> list[str]:
    """The lines of a text that is broken at `width` pixels: _MAX_LINES at most, and longer ones cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and len(lines) < _MAX_LINES and text_font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return [_cut(line, width, text_font) for line in lines]


def _cut(line: str, width: float, text_font: ImageFont.FreeTypeFont) -> str:
    """A line; one that is longer than `width` pixels is cut, and ends with "…"."""
    while len(line) > 1 and text_font.getlength(line) > width:
        line = line.rstrip("…")[:-1] + "…"
    return line


def scatter(real: Points, samples: Mapping[str, Points], side: float = 3.0) -> Image.Image:
    """A panel of `side` inches for each title of `samples`: real points grey, samples red, as in the paper's Fig. 3.

    The frame is that of the real points with a tenth around it; samples farther off are not shown. Of points of more
    than two numbers the first two are drawn. Raises UserError for points of one number.
    """
    from matplotlib.figure import Figure  # slow to import

    if real.shape[1] < 2:
        raise UserError("points of one number have no scatter: write their samples as npz, or give points of two")
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
    """Draw a figure of matplotlib. The picture is transparent where the figure has no ground (facecolor "none")."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.array(canvas.buffer_rgba()))
    *_, opacity = figure.get_facecolor()
    return picture if opacity == 0 else picture.convert("RGB")


def font(size: int) -> ImageFont.FreeTypeFont:
    """The font of all texts, of this many pixels: matplotlib's own file, which has letters of many scripts."""
    from matplotlib.font_manager import findfont  # slow to import

    return ImageFont.truetype(findfont("DejaVu Sans"), size)


def labelled_grid(
    rows: Mapping[str, Sequence[Image.Image]] | Sequence[tuple[str, Sequence[Image.Image]]],
    columns: Sequence[str] = (),
    gap: int = GAP,
) -> Image.Image:
    """Pictures in a grid on white, with the rows' names on the left and the columns' names above.

    Cells have the size of the largest picture, and `gap` pixels between them.
    """
    named_rows = list(rows.items() if isinstance(rows, Mapping) else rows)
    sizes = [picture.size for _, pictures in named_rows for picture in pictures]
    width = max(w for w, _ in sizes)
    height = max(h for _, h in sizes)
    across = max(len(pictures) for _, pictures in named_rows)

    # room for the names
    font_size = max(14, height // 16 if columns else height // 4)
    name_font = font(font_size)
    longest_line = max(name_font.getlength(line) for name, _ in named_rows for line in name.split("\n"))
    left = int(longest_line) + 12 if longest_line else 0
    top = 0
    if columns:
        top = (1 + max(name.count("\n") + 1 for name in columns)) * font_size

    page_width = left + across * (width + gap) - gap
    page_height = top + len(named_rows) * (height + gap) - gap
    page = Image.new("RGB", (page_width, page_height), "white")
    pen = ImageDraw.Draw(page)
    for i, name in enumerate(columns):
        middle = left + i * (width + gap) + width / 2
        pen.text((middle, top / 2), name, "black", name_font, anchor="mm", align="center")
    for j, (name, pictures) in enumerate(named_rows):
        y = top + j * (height + gap)
        pen.text((left - 8, y + height / 2), name, "black", name_font, anchor="rm", align="right")
        for i, picture in enumerate(pictures):
            page.paste(picture, (left + i * (width + gap), y))
    return page


def with_column_names(picture: Image.Image, names: Sequence[str]) -> Image.Image:
    """A picture on white, with names above columns of equal width; long names are written smaller, or cut."""
    if not names:
        return picture
    width = picture.width / len(names)
    longest = max(names, key=font(_NAME_SIZES[0]).getlength)
    fitting_sizes = [size for size in _NAME_SIZES if font(size).getlength(longest) < width - 4]
    name_font = font(fitting_sizes[0] if fitting_sizes else _NAME_SIZES[-1])
    top = 2 * _NAME_SIZES[0]
    page = Image.new("RGB", (picture.width, picture.height + top), "white")
    opacity = picture if picture.mode == "RGBA" else None
    page.paste(picture, (0, top), opacity)
    pen = ImageDraw.Draw(page)
    for i, name in enumerate(names):
        pen.text(((i + 0.5) * width, top / 2), _cut(name, width, name_font), "black", name_font, anchor="mm")
    return page


def named_blocks(blocks: Mapping[str, Image.Image], across: int = 3, note: str = "") -> Image.Image:
    """Pictures on white, `across` to a row, the name of each above it; a note below them all.

    Each has room for the largest picture.
    """
    width = max(picture.width for picture in blocks.values())
    height = max(picture.height for picture in blocks.values())
    font_size = max(22, width // 30)
    name_font = font(font_size)
    top = font_size * (2 + max(name.count("\n") for name in blocks))
    block_height = top + height + _BLOCK_GAP
    across = min(across, len(blocks))
    rows = -(-len(blocks) // across)
    note_top = rows * block_height - _BLOCK_GAP
    page_width = across * (width + _BLOCK_GAP) - _BLOCK_GAP
    note_lines = _wrapped(note, page_width, name_font) if note else []
    page_height = note_top + 2 * font_size * len(note_lines)
    page = Image.new("RGB", (page_width, page_height), "white")
    pen = ImageDraw.Draw(page)
    for i, line in enumerate(note_lines):
        pen.text((0, note_top + font_size * (2 * i + 1)), line, "black", name_font, anchor="lm")
    for i, (name, picture) in enumerate(blocks.items()):
        row, column = divmod(i, across)
        x = column * (width + _BLOCK_GAP)
        y = row * block_height
        pen.text((x, y + top / 2), name, "black", name_font, anchor="lm")
        page.paste(picture, (x, y + top))
    return page


def png(picture: Image.Image, *, optimize: bool = False) -> bytes:
    """The bytes of a PNG; `optimize`: fewer bytes, for longer work."""
    buffer = BytesIO()
    picture.save(buffer, format="png", optimize=optimize)
    return buffer.getvalue()


def embed(picture: Image.Image) -> str:
    """A `data:` address that holds the picture itself, as a PNG of at most _MAX_EMBEDDED_WIDTH."""
    thumbnail = picture.copy()
    thumbnail.thumbnail((_MAX_EMBEDDED_WIDTH, 8 * _MAX_EMBEDDED_WIDTH))
    return "data:image/png;base64," + b64encode(png(thumbnail, optimize=True)).decode()


def write_picture(path: Path, picture: Image.Image) -> None:
    """Write a picture as PNG, whole or not at all. Raises OSError."""
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
    """Write arrays arr_0 and arr_1 to a .npz file, whole or not at all."""
    with files.atomic_write(path) as temp_path, temp_path.open("wb") as file:  # savez would add an ending to a path
        np.savez(file, x, c.astype(np.int64))
