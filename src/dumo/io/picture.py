"""Samples to look at: eight-bit colours, sheets of images, scatters of points, pictures with names; files of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import pad

from dumo.io.file import whole
from dumo.types import Sample, UserError

Pixels = UInt8[Tensor, "n 3 h w"]
PixelRows = UInt8[Tensor, "n h w 3"]  # as files hold them
Points = Float[Tensor, "_ 2"]
READABLE = 64  # pixels; a smaller image is enlarged to at least this height. Ours
TITLE = 12  # pixels of its letters
LINES = 3  # of a title: ours
LETTERS = (16, 14, 12, 10)  # pixels of the names above a sheet: the first that fits


def to_uint8(x: Sample) -> Pixels:
    """Images (n, 1 or 3, h, w) as colours 0 .. 255, grey in all three: -1 is 0 and 1 is 255, rounded and clamped.

    Raises UserError for other shapes, and where x is not finite, which has no colour.
    """
    if not (image := x.ndim == 4 and x.shape[1] in (1, 3)) or not x.isfinite().all():
        shape = f"samples of shape {tuple(x.shape[1:])} are no images of 1 or 3 channels: decode them first"
        diverged = (
            "the samples are not finite numbers and have no colour: these weights have diverged, use others, or train "
            "again with a lower rate or a clipped gradient"
        )
        raise UserError(diverged if image else shape)
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)


def from_uint8(pixels: UInt8[Tensor, "n c h w"]) -> Sample:
    """Colours 0 .. 255 as numbers -1 .. 1."""
    return pixels.float().div_(127.5).sub_(1)


def to_rows(x: Sample) -> PixelRows:
    """The same colours as files hold them, channels last, on the CPU. Raises as `to_uint8`."""
    return to_uint8(x).permute(0, 2, 3, 1).cpu().contiguous()


def sheet(
    pixels: PixelRows, columns: int, scale: int | None = None, gap: int = 2, titles: Sequence[str] = ()
) -> Image.Image:
    """All images, row after row, `columns` to a row, with white gaps between them.

    Each pixel becomes a square of side `scale`; None takes the least scale at which an image is readable. `titles` are
    written above the columns, or, where there are as many as images, above each image.
    """
    scale = scale or -(-READABLE // pixels.shape[1])
    cells = pixels.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    heads = _titles(titles, cells.shape[2]) if titles else None
    if heads is not None and len(heads) == len(cells):
        cells, heads = torch.cat([heads, cells], 1), None
    whole = _tiled(cells, columns, gap)
    if heads is not None:
        whole = torch.cat([_tiled(heads, columns, gap), whole])
    return Image.fromarray(whole[: len(whole) - gap, : whole.shape[1] - gap].numpy())


def _tiled(cells: PixelRows, columns: int, gap: int) -> UInt8[Tensor, "height width 3"]:
    """Pictures of one size as one, a gap below and to the right of each; white where the last row is not full."""
    cells = pad(cells, (0, 0, 0, gap, 0, gap), value=255)
    missing = -len(cells) % columns
    cells = torch.cat([cells, cells.new_full((missing, *cells.shape[1:]), 255)])
    n, h, w, _ = cells.shape
    return cells.view(n // columns, columns, h, w, 3).transpose(1, 2).reshape(n // columns * h, columns * w, 3)


def _titles(texts: Sequence[str], width: int) -> UInt8[Tensor, "n height width 3"]:
    """Texts in black on white, each on as many lines as the longest needs, `LINES` at most, and cut to fit."""
    font = letters(TITLE)
    wrapped = [_lines(text, width, font) for text in texts]
    many, strips = max(map(len, wrapped)), list[Tensor]()
    for lines in wrapped:
        strip = Image.new("RGB", (width, TITLE * many + 6), "white")
        for i, line in enumerate(lines, many - len(lines)):
            ImageDraw.Draw(strip).text((width / 2, TITLE * i + TITLE / 2 + 3), line, "black", font, anchor="mm")
        strips.append(torch.from_numpy(np.array(strip)))
    return torch.stack(strips)


def _lines(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """A text word by word on lines of `width` pixels, the last of them cut where there are too many."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and len(lines) < LINES and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return [_cut(line, width, font) for line in lines]


def _cut(line: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    while len(line) > 1 and font.getlength(line) > width:
        line = line.rstrip("…")[:-1] + "…"
    return line


def scatter(real: Points, samples: Mapping[str, Points], side: float = 3.0) -> Image.Image:
    """A panel per title, of `side` inches: the truth in grey, the samples in red (look of the paper's Fig. 3).

    The frame is the truth's with a tenth around it; samples that fly farther fall outside of it.
    """
    from matplotlib.figure import Figure

    lines = 1 + max(title.count("\n") for title in samples)
    figure = Figure(figsize=(side * len(samples), side + 0.3 * lines), dpi=150, layout="constrained")
    low, high = real.amin(0), real.amax(0)
    (left, right), (bottom, top) = torch.stack([low - (high - low) / 10, high + (high - low) / 10], 1).tolist()
    for axes, (title, x) in zip(figure.subplots(1, len(samples), squeeze=False)[0], samples.items(), strict=True):
        axes.scatter(*real.T.numpy(), s=6, color="0.8", linewidths=0)
        axes.scatter(*x.T.numpy(), s=2, color="red", linewidths=0)
        axes.set(title=title, xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[], aspect="equal")
    return drawn(figure)


def drawn(figure: Any) -> Image.Image:  # noqa: ANN401, its Figure is slow to import
    """A figure of matplotlib as a picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def letters(size: int) -> ImageFont.FreeTypeFont:
    """A font of this many pixels: matplotlib's own file, which has Greek and the letters of many scripts."""
    from matplotlib.font_manager import findfont

    return ImageFont.truetype(findfont("DejaVu Sans"), size)


def labelled(
    rows: Mapping[str, Sequence[Image.Image]] | Sequence[tuple[str, Sequence[Image.Image]]],
    columns: Sequence[str] = (),
    gap: int = 6,
) -> Image.Image:
    """Pictures in a grid on white, in cells of the largest's size, the rows' names on the left, the columns' above."""
    rows = list(rows.items() if isinstance(rows, Mapping) else rows)
    w, h = (max(sides) for sides in zip(*(one.size for _, pictures in rows for one in pictures), strict=True))
    size = max(14, h // 16 if columns else h // 4)
    font = letters(size)
    names = max(font.getlength(line) for name, _ in rows for line in name.split("\n"))
    left = int(names) + 12 if names else 0
    top = (1 + max(name.count("\n") + 1 for name in columns)) * size if columns else 0
    across = max(len(pictures) for _, pictures in rows)
    page = Image.new("RGB", (left + across * (w + gap) - gap, top + len(rows) * (h + gap) - gap), "white")
    pen = ImageDraw.Draw(page)
    for i, name in enumerate(columns):
        pen.text((left + i * (w + gap) + w / 2, top / 2), name, "black", font, anchor="mm", align="center")
    for j, (name, pictures) in enumerate(rows):
        y = top + j * (h + gap)
        pen.text((left - 8, y + h / 2), name, "black", font, anchor="rm", align="right")
        for i, picture in enumerate(pictures):
            page.paste(picture, (left + i * (w + gap), y))
    return page


def headed(sheet: Image.Image, names: Sequence[str]) -> Image.Image:
    """The sheet on white, names above columns of equal width: one that is too long is written smaller, or cut."""
    if not names:
        return sheet
    width = sheet.width / len(names)
    longest = max(names, key=letters(LETTERS[0]).getlength)
    size = next((n for n in LETTERS if letters(n).getlength(longest) < width - 4), LETTERS[-1])
    font, top = letters(size), 2 * LETTERS[0]
    page = Image.new("RGB", (sheet.width, sheet.height + top), "white")
    page.paste(sheet, (0, top), sheet if sheet.mode == "RGBA" else None)
    for i, name in enumerate(names):
        cut = next((name[:n] + "…" for n in range(len(name), 0, -1) if font.getlength(name[:n] + "…") < width), "…")
        shown = name if font.getlength(name) < width else cut
        ImageDraw.Draw(page).text(((i + 0.5) * width, top / 2), shown, "black", font, anchor="mm")
    return page


def gathered(blocks: Mapping[str, Image.Image], across: int = 3, note: str = "") -> Image.Image:
    """Pictures of one size on white, `across` to a row, the name of each above it; a note below them all."""
    (w, h), gap = next(iter(blocks.values())).size, 28
    font = letters(size := max(22, w // 30))
    top = size * (2 + max(name.count("\n") for name in blocks))
    high, across = h + top + gap, min(across, len(blocks))
    whole = -(-len(blocks) // across) * high - gap
    page = Image.new("RGB", (across * (w + gap) - gap, whole + (2 * size if note else 0)), "white")
    ImageDraw.Draw(page).text((0, whole + size), note, "black", font, anchor="lm")
    for i, (name, picture) in enumerate(blocks.items()):
        x, y = i % across * (w + gap), i // across * high
        ImageDraw.Draw(page).text((x, y + top / 2), name, "black", font, anchor="lm")
        page.paste(picture, (x, y + top))
    return page


def write_picture(path: Path, picture: Image.Image) -> None:
    """One picture as PNG, whole or not at all; raises as `dumo.io.file.whole`, as the others do."""
    with whole(path) as half:
        picture.save(half, format="png")


def write_singles(folder: Path, pixels: PixelRows, first: int = 0) -> None:
    """An image a file: 000000.png and so on, counted from `first`."""
    for i, image in enumerate(pixels.numpy(), start=first):
        write_picture(folder / f"{i:06d}.png", Image.fromarray(image))


def write_adm(path: Path, pixels: PixelRows, c: Int[Tensor, " n"]) -> None:
    """ADM's layout, which its evaluation reads: arr_0 uint8 (n, h, w, 3), arr_1 int64 labels (n,)."""
    _write_arrays(path, pixels.numpy(), c.numpy())


def write_points(path: Path, points: Float[Tensor, "n 2"], c: Int[Tensor, " n"]) -> None:
    """Points in the same layout: arr_0 float (n, 2), arr_1 int64 labels (n,)."""
    _write_arrays(path, points.numpy(), c.numpy())


def _write_arrays(path: Path, x: np.ndarray, c: np.ndarray) -> None:
    with whole(path) as half, half.open("wb") as file:  # savez would add an ending to a path
        np.savez(file, x, c.astype(np.int64))
