"""Draw front.png again from two runs: `python docs/front.py RUN_OF_DIGITS RUN_OF_CIFAR`.

The picture that is there is of

    dumo train digits --out runs/digits
    dumo encode cifar10-latents
    dumo train cifar10-latents --out runs/cifar --set train.steps=6000
"""

import sys
from pathlib import Path

from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from dumo.flow.generate import labels
from dumo.io import picture
from dumo.run.folder import open_run
from dumo.run.sample import sample

CELL, GAP, LEFT, TOP, BETWEEN = 64, 4, 125, 84, 30  # pixels
DIGITS = tuple("0123456789")
CIFAR = ("airplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def letters(size: int, face: str = "") -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(findfont(f"DejaVu Sans{face}"), size)


def panel(run: str, title: str, names: tuple[str, ...], passes: tuple[int, ...], rows: int) -> Image.Image:
    """`rows` rows of samples, a column per class, for each number of passes: the first seeds, nothing picked."""
    opened, step = open_run(run), CELL + GAP
    high = rows * step + GAP  # of a block
    page = Image.new("RGB", (LEFT + 10 * step - GAP, TOP + len(passes) * high - 2 * GAP), "white")
    pen = ImageDraw.Draw(page)
    pen.text((LEFT, 18), title, "black", letters(23, ":bold"), anchor="lm")
    for i, name in enumerate(names):
        size = 20 if len(names[0]) == 1 else 14
        pen.text((LEFT + i * step + CELL / 2, 62), name, "dimgrey", letters(size), anchor="mm")
    for j, n in enumerate(passes):
        y = TOP + j * high
        pen.text(
            (LEFT - 12, y + (rows * step - GAP) / 2), f"{n} pass{'es' * (n > 1)}", "black", letters(20), anchor="rm"
        )
        for k, pixels in enumerate(picture.to_rows(sample(opened, nfe=n, c=labels(10 * rows, 10)).x)):
            cell = Image.fromarray(pixels.numpy()).resize((CELL, CELL), Image.Resampling.NEAREST)
            page.paste(cell, (LEFT + k % 10 * step, y + k // 10 * step))
    return page


def main(digits: str, cifar: str) -> None:
    """Both panels side by side, into docs/front.png."""
    left = panel(digits, "Digits, 8 × 8: 0.34 M weights, 5,000 steps", DIGITS, (1, 2, 4, 50), 1)
    right = panel(cifar, "CIFAR-10 in latents: 0.75 M weights, 6,000 steps", CIFAR, (1, 2), 2)
    page = Image.new("RGB", (left.width + BETWEEN + right.width, max(left.height, right.height)), "white")
    page.paste(left, (0, 0))
    page.paste(right, (left.width + BETWEEN, 0))
    picture.write_picture(Path(__file__).with_name("front.png"), page)


if __name__ == "__main__":
    main(*sys.argv[1:])
