"""Draw the pictures of the pages again: `make pictures`, with $DUMO_DATA/cifar10 and Chromium.

    python docs/pictures.py [NAME ...]    # front, demo, charts; none: all

1. `draw_front` writes front.png: samples of the trained models that come with dumo.
2. `draw_demo` writes demo.png: the page of `dumo demo` of one of these models, as a browser shows it.
3. `draw_charts` writes the charts of what was measured, which is in docs/results and in src/dumo/recipes/results.

Pictures that are not named here are of nets that are not kept: they stay as `dumo reproduce` wrote them.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dumo.flow.generate import labels_in_turn
from dumo.io import picture
from dumo.lab.plan import read_plan
from dumo.lab.reproduce import VIEWS, View
from dumo.run.judge import reference_data
from dumo.run.weights import RunFolder, open_run
from dumo.runtime.text import nfe_text

DOCS = Path(__file__).parent
RESULTS = (DOCS / "results", DOCS.parent / "src/dumo/recipes/results")
CHARTED = ("best", "fair", "fig4a", "fig4c", "scaling", "stages", "stages-latents", "zoo")
NUM_CLASSES = 10  # of digits and of CIFAR-10
DIGITS = tuple("0123456789")
CIFAR = ("airplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NUM_TEST_IMAGES = 1000  # among which the first of each class is shown

DEMO_RUN = "digits-trained"
NUM_DEMO_IMAGES = 16  # that the page makes at one press of its button
DEMO_WIDTH, DEMO_HEIGHT = 900, 1000  # pixels of the browser's window
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PAGE_TIMEOUT = 300_000  # milliseconds that each part of the demo's page may take

# the layout of front.png, in pixels
CELL = 64  # the side of an image
GAP = 4  # between images
LEFT = 125  # of the first image: the names of rows stand before it
TOP = 84  # of the first image: title and names of classes stand above it
TITLE_Y = 18
CLASS_NAME_Y = 62
PANEL_GAP = 30  # between the two models
ROW_NAME_GAP = 12  # between the name of a row and its first image
TITLE_SIZE = 23  # of letters
NAME_SIZE = 20
LONG_NAME_SIZE = 14  # of the names of classes that are words


def font(size: int, style: str = "") -> ImageFont.FreeTypeFont:
    """DejaVu Sans in this size, in pixels, and in a style of fontconfig's, such as ":bold"."""
    return ImageFont.truetype(findfont(f"DejaVu Sans{style}"), size)


def sample_each_class(opened: RunFolder, *passes: int) -> dict[str, Tensor]:
    """Samples by each number of passes, one of each class, from the first seeds: nothing is picked."""
    labels = labels_in_turn(NUM_CLASSES, NUM_CLASSES)
    return {nfe_text(n): opened.sampler.sample(labels, nfe=n).x for n in passes}


def first_of_each_class(opened: RunFolder) -> Tensor:
    """The first real image of each class among some of the test images."""
    x, c = reference_data(opened.run.data, "test").reference(NUM_TEST_IMAGES, seed=0)
    first_rows: list[int] = []
    for label in range(NUM_CLASSES):
        rows_of_class = (c == label).nonzero()
        first_rows.append(int(rows_of_class[0]))
    return x[torch.tensor(first_rows)]


def draw_panel(title: str, class_names: tuple[str, ...], images_by_row: dict[str, Tensor]) -> Image.Image:
    """A row of images for each name of `images_by_row`, in a column for each class."""
    step = CELL + GAP
    width = LEFT + NUM_CLASSES * step - GAP
    height = TOP + len(images_by_row) * step - GAP
    page = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(page)
    pen.text((LEFT, TITLE_Y), title, "black", font(TITLE_SIZE, ":bold"), anchor="lm")
    class_name_size = NAME_SIZE if len(class_names[0]) == 1 else LONG_NAME_SIZE
    for i, name in enumerate(class_names):
        pen.text((LEFT + i * step + CELL / 2, CLASS_NAME_Y), name, "dimgrey", font(class_name_size), anchor="mm")
    for j, (name, images) in enumerate(images_by_row.items()):
        y = TOP + j * step
        pen.text((LEFT - ROW_NAME_GAP, y + CELL / 2), name, "black", font(NAME_SIZE), anchor="rm")
        for k, pixels in enumerate(picture.to_rows(images)):
            cell = Image.fromarray(pixels.numpy()).resize((CELL, CELL), Image.Resampling.NEAREST)
            page.paste(cell, (LEFT + k * step, y))
    return page


def draw_front() -> None:
    """Both models side by side, into front.png."""
    digits = open_run("digits-trained", device="cpu")
    cifar = open_run("cifar10-trained", device="cpu")
    left = draw_panel("Digits, 8 × 8", DIGITS, sample_each_class(digits, 1, 2, 4, 50))
    cifar_images = {"real": first_of_each_class(cifar), **sample_each_class(cifar, 1, 2, 4)}
    right = draw_panel("CIFAR-10, 32 × 32", CIFAR, cifar_images)
    size = (left.width + PANEL_GAP + right.width, max(left.height, right.height))
    page = Image.new("RGB", size, "white")
    page.paste(left, (0, 0))
    page.paste(right, (left.width + PANEL_GAP, 0))
    picture.write_picture(DOCS / "front.png", page)


def find_browser() -> str:
    """The program of a Chromium. Raises SystemExit where there is none."""
    for name in BROWSERS:
        program = shutil.which(name)
        if program:
            return program
    raise SystemExit(f"demo.png needs a browser: install one of {', '.join(BROWSERS)}")


def draw_demo() -> None:
    """The page of `dumo demo` after one press of its button, into demo.png."""
    from playwright.sync_api import sync_playwright  # of the extra dev

    program = find_browser()
    command = [sys.executable, "-m", "dumo", "demo", DEMO_RUN, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout
        address = server.stdout.readline().strip()
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
            window = {"width": DEMO_WIDTH, "height": DEMO_HEIGHT}
            page = browser.new_context(viewport=window, color_scheme="light").new_page()
            page.set_default_timeout(PAGE_TIMEOUT)
            page.goto(address)
            page.get_by_role("button", name="Make").locator("visible=true").click()
            page.locator(".answer img").nth(NUM_DEMO_IMAGES - 1).wait_for()
            page.locator(".cm-content").wait_for()  # the field of code, which loads by itself
            page.mouse.move(0, 0)
            page.screenshot(path=DOCS / "demo.png", full_page=True, animations="disabled")
            browser.close()
    finally:
        server.terminate()
        server.wait()


def draw_charts() -> None:
    """The charts that pages show, from the tables of measured numbers.

    A plan has more charts than pages show. Those whose picture is in docs are drawn again: to add one, put an empty
    file NAME.png there.
    """
    for plan in CHARTED:
        results = read_results(plan)
        view = VIEWS.get(plan, View())
        charts = view.make_charts(read_plan(plan), results["table"])
        for name, chart in charts.items():
            path = DOCS / f"{name}.png"
            if path.exists():
                picture.write_picture(path, chart)


def read_results(plan: str) -> dict[str, Any]:
    """The measured numbers of a plan. Raises SystemExit where none are kept."""
    for folder in RESULTS:
        file = folder / f"{plan}.json"
        if file.exists():
            return json.loads(file.read_text(encoding="utf-8"))
    raise SystemExit(f"there are no results of {plan} in {' or '.join(map(str, RESULTS))}")


DRAWERS = {"front": draw_front, "demo": draw_demo, "charts": draw_charts}


def main(names: list[str]) -> None:
    """Draw what is named, else all."""
    for name in names or DRAWERS:
        DRAWERS[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
