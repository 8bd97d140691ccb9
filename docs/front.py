"""Draw front.png again from the trained models that come with dumo: `python docs/front.py`, with $DUMO_DATA/cifar10."""

from pathlib import Path

import torch
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dumo.flow.generate import labels_in_turn
from dumo.io import picture
from dumo.run.judge import reference_data
from dumo.run.weights import RunFolder, open_run
from dumo.runtime.progress import nfe_text

CELL, GAP, LEFT, TOP, BETWEEN = 64, 4, 125, 84, 30  # pixels
DIGITS = tuple("0123456789")
CIFAR = ("airplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def letters(size: int, face: str = "") -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(findfont(f"DejaVu Sans{face}"), size)


def samples(opened: RunFolder, *passes: int) -> dict[str, Tensor]:
    """One per class by each number of passes: the first seeds, nothing picked."""
    return {nfe_text(n): opened.sampler.sample(labels_in_turn(10, 10), nfe=n).x for n in passes}


def real(opened: RunFolder) -> Tensor:
    """The first of each class among the test images."""
    x, c = reference_data(opened.run.data, "test").reference(1000, seed=0)
    return x[torch.tensor([int((c == k).nonzero()[0]) for k in range(10)])]


def panel(title: str, names: tuple[str, ...], rows: dict[str, Tensor]) -> Image.Image:
    """A row per name, a column per class."""
    step = CELL + GAP
    page = Image.new("RGB", (LEFT + 10 * step - GAP, TOP + len(rows) * step - GAP), "white")
    pen = ImageDraw.Draw(page)
    pen.text((LEFT, 18), title, "black", letters(23, ":bold"), anchor="lm")
    for i, name in enumerate(names):
        size = 20 if len(names[0]) == 1 else 14
        pen.text((LEFT + i * step + CELL / 2, 62), name, "dimgrey", letters(size), anchor="mm")
    for j, (name, images) in enumerate(rows.items()):
        y = TOP + j * step
        pen.text((LEFT - 12, y + CELL / 2), name, "black", letters(20), anchor="rm")
        for k, pixels in enumerate(picture.to_rows(images)):
            cell = Image.fromarray(pixels.numpy()).resize((CELL, CELL), Image.Resampling.NEAREST)
            page.paste(cell, (LEFT + k * step, y))
    return page


def main() -> None:
    """Both panels side by side, into docs/front.png."""
    digits, cifar = (open_run(name, device="cpu") for name in ("digits-trained", "cifar10-trained"))
    left = panel("Digits, 8 × 8", DIGITS, samples(digits, 1, 2, 4, 50))
    right = panel("CIFAR-10, 32 × 32", CIFAR, {"real": real(cifar), **samples(cifar, 1, 2, 4)})
    page = Image.new("RGB", (left.width + BETWEEN + right.width, max(left.height, right.height)), "white")
    page.paste(left, (0, 0))
    page.paste(right, (left.width + BETWEEN, 0))
    picture.write_picture(Path(__file__).with_name("front.png"), page)


if __name__ == "__main__":
    main()
