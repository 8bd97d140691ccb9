"""Pictures put together on white, with their names: grids, headed sheets, panels."""

from collections.abc import Mapping, Sequence

from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

LETTERS = (16, 14, 12, 10)  # pixels of the names above a sheet: the first that fits


def labelled(
    rows: Mapping[str, Sequence[Image.Image]] | Sequence[tuple[str, Sequence[Image.Image]]],
    columns: Sequence[str] = (),
    gap: int = 6,
) -> Image.Image:
    """Pictures in a grid on white, in cells of the largest's size, the rows' names on the left, the columns' above."""
    rows = list(rows.items() if isinstance(rows, Mapping) else rows)
    w, h = (max(sides) for sides in zip(*(one.size for _, pictures in rows for one in pictures), strict=True))
    size = max(14, h // 16 if columns else h // 4)
    font = ImageFont.truetype(findfont("DejaVu Sans"), size)  # matplotlib's own file: PIL's font has no Greek
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
    width, path = sheet.width / len(names), findfont("DejaVu Sans")
    longest = max(names, key=lambda name: ImageFont.truetype(path, LETTERS[0]).getlength(name))
    size = next((n for n in LETTERS if ImageFont.truetype(path, n).getlength(longest) < width - 4), LETTERS[-1])
    font, top = ImageFont.truetype(path, size), 2 * LETTERS[0]
    page = Image.new("RGB", (sheet.width, sheet.height + top), "white")
    page.paste(sheet, (0, top), sheet if sheet.mode == "RGBA" else None)
    for i, name in enumerate(names):
        cut = next((name[:n] + "…" for n in range(len(name), 0, -1) if font.getlength(name[:n] + "…") < width), "…")
        shown = name if font.getlength(name) < width else cut
        ImageDraw.Draw(page).text(((i + 0.5) * width, top / 2), shown, "black", font, anchor="mm")
    return page


def gathered(blocks: Mapping[str, Image.Image], across: int = 3, note: str = "", gap: int = 28) -> Image.Image:
    """Pictures of one size on white, `across` to a row, the name of each above it; a note below them all."""
    w, h = next(iter(blocks.values())).size
    font = ImageFont.truetype(findfont("DejaVu Sans"), size := max(22, w // 30))
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
