"""Pages as a browser shows them: headless Chromium, at the width of a desk or of a telephone."""

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DESK, TELEPHONE = 1280, 400  # pixels
READABLE = 10  # pixels of the smallest letters that are read
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")

LOOK = """() => {
  const shown = e => e.checkVisibility() && e.getClientRects().length;
  const letters = [...document.querySelectorAll("body *")].filter(e =>
    shown(e) && !e.closest("svg, math, sup, sub") &&
    [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim()));
  return {
    broken: [...document.images].filter(i => shown(i) && !i.naturalWidth).map(i => i.currentSrc.slice(0, 80) || i.alt),
    beyond: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    smallest: Math.min(...letters.map(e => parseFloat(getComputedStyle(e).fontSize))),
  };
}"""


@dataclass(frozen=True)
class Seen:
    """What a page shows: pictures that are missing, pixels that stick out on the right, the smallest letters' size."""

    broken: list[str]
    beyond: int
    smallest: float
    errors: tuple[str, ...]  # of the console, and of requests that failed


def found() -> str | None:
    """Where the browser is; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def page(width: int, *, dark: bool = False) -> "Generator[Page, None, None]":
    """An empty page of so many pixels."""
    from playwright.sync_api import sync_playwright  # only where a page is opened

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found(), args=QUIET)
        try:
            scheme = "dark" if dark else "light"
            yield browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
        finally:
            browser.close()


def look(file: Path, width: int, picture: Path | None = None, *, dark: bool = False) -> Seen:
    """What a file of HTML shows in a page of its own; `picture`: the file of a screenshot."""
    with page(width, dark=dark) as opened:
        return seen(opened, file, picture)


def seen(opened: "Page", file: Path, picture: Path | None = None) -> Seen:
    """Open a file of HTML in this page, which is empty, scroll through it, and say what is there."""
    errors: list[str] = []
    opened.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    opened.on("requestfailed", lambda request: errors.append(request.url))
    opened.goto(file.resolve().as_uri(), wait_until="load")
    for image in opened.locator("img[loading=lazy]").all():
        if image.is_visible():
            image.scroll_into_view_if_needed()
    opened.wait_for_load_state("networkidle")
    if picture:
        opened.screenshot(path=picture, full_page=True)
    return Seen(**opened.evaluate(LOOK), errors=tuple(errors))
