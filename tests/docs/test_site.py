"""The site builds without a warning and without a network, and its pages can be read at a desk and on a telephone."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from browser import DESK, READABLE, TELEPHONE, page, seen

ROOT = Path(__file__).parents[2]
LOADED = re.compile(r"""<(?:script|img|link|iframe)\b[^>]*?\b(?:src|href)=["']?(https?:[^"' >]+)""")
PAGES = [
    "index.html",
    "photos.html",
    "reproduce.html",
    "objectives/index.html",
    "objectives/details.html",
    "mathematics.html",
    "notebooks/own-objective.html",
    "reference/flow.html",
]

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built once, by the command of `make docs`; what asked for the network would fail."""
    folder = tmp_path_factory.mktemp("site")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # a port at which nobody listens
        proxy = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
            cwd=ROOT,
            env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "HTTP_PROXY": proxy, "HTTPS_PROXY": proxy},
            capture_output=True,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, "")
    return folder


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 35
    for file in pages:
        text = file.read_text(encoding="utf-8")
        assert [url for url in LOADED.findall(text) if "://www.w3.org" not in url] == [], file


def test_formulas_are_drawn_by_the_browser(site: Path) -> None:
    text = (site / "mathematics.html").read_text(encoding="utf-8")
    assert text.count("<math ") > 20
    for file in site.rglob("*.html"):
        assert 'class="arithmatex"' not in file.read_text(encoding="utf-8"), file


@pytest.mark.browser
@pytest.mark.parametrize("width", [DESK, TELEPHONE])
def test_pages_can_be_read(width: int, site: Path) -> None:
    with page(width) as first:
        for name in PAGES:
            shown = seen(first.context.new_page(), site / name)
            assert (shown.broken, shown.beyond, shown.errors) == ([], 0, ()), name
            assert shown.smallest >= READABLE, name
