"""Draw the pictures of the pages again: `make pictures`, with $DUMO_DATA/cifar10 and Chromium.

    python docs/pictures.py [NAME ...]    # front, demo, charts; none: all

1. `draw_front` writes front.png: samples of the trained models that come with dumo.
2. `draw_demo` writes demo.png: the page of `dumo demo` of one of these models, as a browser shows it.
3. `draw_charts` writes the charts of what was measured, which is in docs/results and in src/dumo/recipes/results.

Pictures of nets that are not kept are as `dumo reproduce` wrote them.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dumo.flow.generate import labels_in_turn
from dumo.io import picture
from dumo.lab.plan import read_plan
from dumo.lab.reproduce import VIEWS, View
from dumo.lab.table import from_cells
from dumo.run.judge import reference_data
from dumo.run.weights import RunFolder, open_run
from dumo.runtime.text import nfe_text

DOCS = Path(__file__).parent
RESULTS = (DOCS / "results", DOCS.parent / "src/dumo/recipes/results")
CHARTED = ("best", "best-latents", "fair", "scaling", "stages", "zoo")  # the older fig4a and fig4c score otherwise
DEMO_RUN = "digits-trained"
DEMO_WIDTH, DEMO_HEIGHT = 900, 1000  # pixels of the browser's window
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 300_000  # milliseconds that the page of the demo may take
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


def draw_front() -> None:
    """Both models side by side, into front.png."""
    digits, cifar = (open_run(name, device="cpu") for name in ("digits-trained", "cifar10-trained"))
    left = panel("Digits, 8 × 8", DIGITS, samples(digits, 1, 2, 4, 50))
    right = panel("CIFAR-10, 32 × 32", CIFAR, {"real": real(cifar), **samples(cifar, 1, 2, 4)})
    page = Image.new("RGB", (left.width + BETWEEN + right.width, max(left.height, right.height)), "white")
    page.paste(left, (0, 0))
    page.paste(right, (left.width + BETWEEN, 0))
    picture.write_picture(DOCS / "front.png", page)


def draw_demo() -> None:
    """The page of `dumo demo` after one press of its button, into demo.png."""
    from playwright.sync_api import sync_playwright  # of the extra dev

    program = next(path for name in BROWSERS if (path := shutil.which(name)))
    command = [sys.executable, "-m", "dumo", "demo", DEMO_RUN, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout
        address = server.stdout.readline().strip()
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
            window = {"width": DEMO_WIDTH, "height": DEMO_HEIGHT}
            page = browser.new_context(viewport=window, color_scheme="light").new_page()
            page.set_default_timeout(PATIENCE)
            page.goto(address)
            page.get_by_role("button", name="Make").locator("visible=true").click()
            page.locator(".answer img").nth(15).wait_for()
            page.locator(".cm-content").wait_for()
            page.mouse.move(0, 0)
            page.screenshot(path=DOCS / "demo.png", full_page=True, animations="disabled")
            browser.close()
    finally:
        server.terminate()
        server.wait()


def draw_charts() -> None:
    """The charts that pages show, from the tables of measured numbers."""
    for plan in CHARTED:
        file = next(folder / f"{plan}.json" for folder in RESULTS if (folder / f"{plan}.json").exists())
        results = json.loads(file.read_text(encoding="utf-8"))
        # the table of `fair` was written before tables had deviations: its cells have them
        table = from_cells(results) if plan == "fair" else results["table"]
        for name, chart in VIEWS.get(plan, View()).make_charts(read_plan(plan), table).items():
            path = DOCS / f"{name}.png"
            if path.exists():  # a page shows it
                picture.write_picture(path, chart)


DRAWN = {"front": draw_front, "demo": draw_demo, "charts": draw_charts}


def main(names: list[str]) -> None:
    """Draw what is named, else all."""
    for name in names or DRAWN:
        DRAWN[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
