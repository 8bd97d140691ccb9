"""The page of a run as a browser shows it, on a desk and on a telephone, by day and by night."""

import shutil
from pathlib import Path

import pytest

import browser
from dumo.io import picture
from dumo.report import page as report
from e2e.shell import call

pytestmark = pytest.mark.browser
RUNS = ("digits", "digits-flow-matching", "moons")  # judged; with a velocity alone; points


@pytest.fixture(scope="module")
def pages(trained: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The report of each."""
    folder, found = tmp_path_factory.mktemp("pages"), dict[str, Path]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "PASSES", (1, 2, 4))
        patch.setattr(report, "MAX_DATA_ROWS", 200)
        patch.setattr(picture, "SCATTER_POINTS", 200)
        for name in RUNS:
            shutil.copytree(trained[name], folder / name)
            if name == "digits":
                assert call("evaluate", folder / name, "--json").code == 0
            assert call("report", folder / name).code == 0
            found[name] = folder / name / "report.html"
    return found


@pytest.mark.nightly
@pytest.mark.parametrize("width", [browser.DESK, browser.TELEPHONE])
@pytest.mark.parametrize("name", RUNS)
def test_it_is_readable(name: str, width: int, pages: dict[str, Path]) -> None:
    """The folded part is open; light on a desk and dark on a telephone, for ink changes no size."""
    text = pages[name].read_text()
    shown = pages[name].with_name("open.html")
    shown.write_text(text.replace("<details>", "<details open>"))
    seen = browser.look(shown, width, dark=width == browser.TELEPHONE)
    assert (seen.broken, seen.beyond, seen.errors) == ([], 0, ())
    assert seen.smallest >= browser.READABLE


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("old", "new", "of"),
    [
        (".scroll { overflow-x: auto;", ".scroll { overflow-x: visible;", "beyond"),
        ('src="data:image/png;base64,', 'src="data:image/png;base64,x', "broken"),
        ("font: 0.75rem/1.3", "font: 0.4rem/1.3", "smallest"),
        ("</main>", '<script src="https://example.org/x.js"></script></main>', "errors"),
    ],
)
def test_a_fault_is_seen(old: str, new: str, of: str, pages: dict[str, Path]) -> None:
    text = pages["digits"].read_text()
    assert old in text
    spoilt = pages["digits"].with_name("spoilt.html")
    spoilt.write_text(text.replace(old, new))
    seen = browser.look(spoilt, browser.TELEPHONE)
    wrong = {
        "beyond": seen.beyond > 0,
        "broken": bool(seen.broken),
        "smallest": seen.smallest < browser.READABLE,
        "errors": bool(seen.errors),
    }
    found = {name for name, there in wrong.items() if there}
    assert found == {of, "errors"} if of == "broken" else found == {of}  # a picture that fails is an error, too
