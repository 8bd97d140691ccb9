"""`dumo demo` as a person meets it: a port, a browser, downloads, nonsense, many questions, two runs, Ctrl-C."""

import json
import re
import signal
import socket
import urllib.request
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.parse import quote, unquote
from zipfile import ZipFile

import numpy as np
import pytest
from PIL import Image

import browser
from e2e.shell import PATIENCE, TINY, call, finish, refused, sets, start, wait
from forked import Program, python

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

if find_spec("gradio") is None:  # to import it takes seconds, of every process that collects tests
    pytest.skip("gradio is not there", allow_module_level=True)

NONSENSE = [
    "abc",
    "9" * 5000,
    "-1",
    "<script>document.title='broken in'</script>",
    "<img src=x onerror=alert(1)>",
    "${1+1}{{2}}",
]
QUESTIONS = 100


def free_port() -> int:
    """A port that nobody listens at, for now."""
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return some.getsockname()[1]


def answered(url: str, number: int) -> str:
    """What is said to a question about seed `number`, of the tab Between two seeds."""
    data = ["3", str(number), 1, "7777", "u", 1]
    return ask(url, {"data": data, "fn_index": 2, "session_hash": f"seed{number}"})


def ask(url: str, question: Mapping[str, object]) -> str:
    """All that is said to a question; of one that is refused, why."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/gradio_api/queue/join", json.dumps(question).encode(), headers)
    data = f"{url}/gradio_api/queue/data?session_hash={question['session_hash']}"
    try:
        for sent in (request, data):
            with urllib.request.urlopen(sent, timeout=PATIENCE) as answer:
                text = answer.read().decode()
    except HTTPError as error:
        with error:
            return error.read().decode()
    return text


@contextmanager
def served(run: Path, *words: object, first: str = "") -> Generator[tuple[str, Program], None, None]:
    """The address of a page, and the program that serves it, once it answers."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = start("demo", run, "--port", port, *words, cwd=run.parent, first=first)

    def answers() -> bool:
        try:
            return status(url) == 200
        except OSError:
            return False

    try:
        wait(process, answers)
        yield url, process
    finally:
        process.send_signal(signal.SIGINT)
        finish(process)


def status(url: str, given: bytes | None = None, **headers: str) -> int:
    """What a request is answered with."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, given, headers)) as answer:
            return answer.status
    except HTTPError as error:
        error.close()
        return error.code


def number(page: "Page", label: str) -> "Locator":
    """The field of a slider's number."""
    return page.get_by_label(f"number input for {label}").locator("visible=true")


def kept(page: "Page", label: str, folder: Path) -> Path:
    """A file that a button downloads."""
    with page.expect_download() as download:
        page.get_by_label(label).or_(page.get_by_role("button", name=label)).first.click()
    file = folder / download.value.suggested_filename
    download.value.save_as(file)
    return file


def read(file: Path) -> np.ndarray:
    """A picture's pixels, grey in all three colours."""
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def reproduced(page: "Page", folder: Path) -> list[str]:
    """The names of the images in the archive, which the script makes again in a process of its own."""
    archive, script = kept(page, "Images (zip)", folder), kept(page, "Download", folder)
    there, again = folder / "there", folder / "again"
    again.mkdir()
    with ZipFile(archive) as files:
        files.extractall(there)
        found = files.namelist()
    assert script.suffix == ".py"
    assert finish(python(script.read_text(encoding="utf-8"), cwd=again)).code == 0
    assert sorted(file.name for file in again.iterdir()) == sorted(found)
    assert all((read(there / name) == read(again / name)).all() for name in found)
    return found


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that can be guided."""
    run = tmp_path_factory.mktemp("free") / "free"
    assert call("train", "digits", "--out", run, *TINY, *sets("objective.drop=0.1")).code == 0
    return run


@pytest.mark.nightly
def test_a_port_that_is_taken_is_refused(trained: dict[str, Path], here: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        refused("demo", trained["digits"], "--port", port, named=(f"port {port}", "--port"), run=trained["digits"])
    refused("demo", here / "nothing", "--port", 0, named=("no run's folder",))


@pytest.mark.nightly
def test_who_is_answered(trained: dict[str, Path], tmp_path: Path) -> None:
    """Requests by the server's own name, from its own page; and no file is given that the page did not make.

    Gradio copies a file that a question names to where it can be fetched. All inputs of all events are tried, as the
    page itself lists them.
    """
    secret, kept = secret_and_kept(tmp_path)
    with served(trained["digits"], first=keep_in(kept)) as (url, _):
        assert status(url, Host="evil.example:7860") == 403
        assert status(url, Origin="http://evil.example") == 403
        said = [ask(url, question) for question in questions_of_files(url, secret)]
        assert list(kept.rglob("secret.txt")) == []
        assert len(said) > 50
        assert set(said) == {"refused: a request to this page has at most 1 MiB of JSON, and only texts and numbers"}
        doors = ("openapi.json", "docs", *(f"gradio_api/{name}" for name in ("openapi.json", "info", "upload")))
        assert [status(f"{url}/{door}") for door in doors] == [404] * len(doors)
        for route in ("run/work", "api/work", "run/predict", "call/work", "upload"):
            assert status(f"{url}/gradio_api/{route}", b"{}") == 404
        (kept / "link").symlink_to(secret)
        for path in (secret, f"{kept}/../secret.txt", kept / "link", "/etc/passwd", url):
            assert status(f"{url}/gradio_api/file={quote(str(path))}") == 403
            assert status(f"{url}/gradio_api/proxy={quote(str(path))}") == 404


@pytest.mark.nightly
def test_gradio_itself_opens_no_file_that_a_question_names(trained: dict[str, Path], tmp_path: Path) -> None:
    """What dumo puts before it is off."""
    secret, kept = secret_and_kept(tmp_path)
    off = "import dumo.report.demo as demo; demo.guard = lambda app, *_: app"
    with served(trained["digits"], first=f"{off}; {keep_in(kept)}") as (url, _):
        for question in questions_of_files(url, secret):
            assert "secret.txt" not in ask(url, question)
        assert list(kept.rglob("secret.txt")) == []
        assert list(kept.glob("dumo-demo-*"))


def secret_and_kept(folder: Path) -> tuple[Path, Path]:
    """A file that nobody may see, and an empty folder."""
    secret = folder / "secret.txt"
    secret.write_text("not for you")
    kept = folder / "kept"
    kept.mkdir()
    return secret, kept


def keep_in(folder: Path) -> str:
    """What a page says first to keep its files in this folder; and Gradio's tracebacks would fill the pipe."""
    return f"import sys, tempfile; tempfile.tempdir = {str(folder)!r}; sys.stderr = open('/dev/null', 'w')"


def questions_of_files(url: str, file: Path) -> Generator[dict[str, object], None, None]:
    """Questions that name a file, or an address, in any input of any event of a page."""

    def named(path: object, **more: object) -> dict[str, object]:
        return {"path": str(path), "meta": {"_type": "gradio.FileData"}, **more}

    with urllib.request.urlopen(f"{url}/config") as answer:
        config: dict[str, Any] = json.loads(answer.read())
    values = {part["id"]: part["props"].get("value") for part in config["components"]}
    shapes = [named(file), [named(file)], {"value": [named(file)]}, named(file, is_stream=True), named(url)]
    shapes += [named(f"../../../../../../../..{file}"), named("x", url=file.as_uri())]
    for event in config["dependencies"]:
        for place in range(len(event["inputs"])):
            for number, shape in enumerate(shapes):
                data = [values[i] for i in event["inputs"]]
                data[place] = shape
                session = f"s{event['id']}-{place}-{number}"
                yield {"data": data, "fn_index": event["id"], "session_hash": session}


@pytest.mark.slow
def test_two_runs_that_do_not_fit_are_refused(trained: dict[str, Path], here: Path) -> None:
    digits = trained["digits"]
    for words, said in {
        (trained["moons"],): ("moons does not fit next to digits", "data: moons, not digits"),
        (digits,): ("both folders are the same run",),
        (here / "none",): ("no run's folder",),
        (trained["digits-meanflow"], "--weights", "a.safetensors"): ("--weights are of one run",),
    }.items():
        refused("demo", digits, *words, "--port", 0, named=said, run=digits)


def pressed(button: "Locator", shown: "Locator") -> None:
    """Press a button until something is shown: on a busy machine a click may come before what was typed."""
    from playwright.sync_api import TimeoutError as Late  # slow to import

    for _ in range(3):
        button.press("Enter")
        with suppress(Late):
            shown.wait_for()
            return
    raise AssertionError(f"{shown} is not shown")


@pytest.mark.nightly
@pytest.mark.browser
def test_a_person_makes_images_and_keeps_them(free: Path, tmp_path: Path) -> None:
    """Nine of a class, guided, by passes of their choice; the script makes the same, to the pixel."""
    with served(free) as (url, _), browser.page(browser.DESK) as page:
        page.goto(url)
        make = page.get_by_role("button", name="Make").locator("visible=true")
        make.wait_for()
        assert page.get_by_role("tab").all_inner_texts() == ["Make", "NFE", "Between two seeds", "Nearest images"]
        assert page.get_by_role("button", name="Images (zip)").is_disabled()
        page.get_by_label("class", exact=True).click()
        page.get_by_role("option", name="7", exact=True).click()
        number(page, "images").fill("9")
        made: list[str] = []
        for passes, guidance, said in (("1", "1", "1 NFE"), ("3", "1", "3 NFE"), ("3", "9.5", "6 NFE")):
            number(page, "NFE").fill(passes)
            number(page, "guidance").fill(guidance)
            number(page, "guidance").press("Tab")  # the page has it then
            pressed(make, page.get_by_text(f"9 images, {said} each"))
            made.append(page.locator(".answer").inner_html())
            assert page.locator(".answer img").count() == 9
        assert len({re.sub(r"<p>.*</p>", "", one) for one in made}) == 3
        code = page.locator(".cm-content").inner_text()
        assert "labels='7', count=9, nfe=3, seed=0, guidance=9.5" in code
        found = reproduced(page, tmp_path)
        assert found == [f"free-{i:06d}.png" for i in range(9)]
        assert read(kept(page, "Grid (png)", tmp_path)).shape[0] > 64
        seen = page.evaluate(browser.LOOK)
        assert (seen["broken"], seen["beyond"]) == ([], 0)
        with page.expect_download() as download:
            page.get_by_role("button", name="Grid (png)").click()
        place = Path(unquote(download.value.url.partition("file=")[2]))
        assert place.is_file()
    assert not place.parents[1].exists()  # the folder of the page


@pytest.mark.nightly
@pytest.mark.browser
def test_two_runs_stand_next_to_each_other(trained: dict[str, Path], tmp_path: Path) -> None:
    """Both in every answer, by their names; no guidance, for neither can be guided."""
    runs = trained["digits"], trained["digits-flow-matching"]
    with served(*runs) as (url, _), browser.page(browser.DESK) as page:
        page.goto(url)
        make = page.get_by_role("button", name="Make").locator("visible=true")
        make.wait_for()
        assert page.title() == "digits and digits-flow-matching · dumo"
        page.get_by_text("No guidance of digits: this model never learned without a label").wait_for()
        assert page.get_by_label("guidance").locator("visible=true").count() == 0
        names = page.locator(".answer h3").locator("visible=true")
        number(page, "images").fill("4")
        make.click()
        page.get_by_text("objective flow_matching teaches no jumps").wait_for()
        names.nth(1).wait_for()
        assert names.all_inner_texts() == ["digits", "digits-flow-matching"]
        assert page.locator(".answer img").count() == 4
        page.get_by_label("velocity: v").locator("visible=true").check()
        make.click()
        page.wait_for_function("document.querySelectorAll('.answer img').length == 8")
        left, right = (page.locator(".run").nth(k).bounding_box() for k in (0, 1))
        assert left["y"] == right["y"]
        assert len(reproduced(page, tmp_path)) == 8
        for tab, count in {"NFE": 12, "Between two seeds": 9, "Nearest images": 16}.items():
            page.get_by_role("tab", name=tab, exact=True).click()
            make.click()
            page.locator(".answer img").locator("visible=true").nth(count - 1).wait_for()
            names.nth(1).wait_for()
            assert names.all_inner_texts() == ["digits", "digits-flow-matching"]


@pytest.mark.slow
@pytest.mark.browser
def test_a_person_plays_with_a_run(trained: dict[str, Path]) -> None:
    """It opens, makes pictures, answers nonsense in a line, and a hundred questions, asks nobody else, and ends."""
    with served(trained["digits"]) as (url, process), browser.page(browser.DESK) as page:
        asked: list[str] = []
        wrong: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.goto(url)
        make = page.get_by_role("button", name="Make").locator("visible=true")
        pictures = page.locator(".answer img").locator("visible=true")

        page.get_by_role("tab", name="NFE", exact=True).click()
        make.click()
        page.wait_for_function("document.querySelectorAll('.answer img').length == 8")
        assert page.get_by_text(re.compile(r"^50 NFE, \d")).count() == 2
        seen = page.evaluate(browser.LOOK)
        assert (seen["broken"], seen["beyond"]) == ([], 0)

        for tab, count in {"Make": 16, "Between two seeds": 9, "Nearest images": 16}.items():
            page.get_by_role("tab", name=tab, exact=True).click()
            make.click()
            pictures.nth(count - 1).wait_for()
            assert pictures.count() == count
        page.get_by_text("among all 1,797 images").wait_for()

        page.get_by_role("tab", name="NFE", exact=True).click()
        seed = page.get_by_label("seed", exact=True)
        for text in NONSENSE:
            seed.fill(text)
            make.click()
            toast = page.get_by_test_id("toast-body")
            toast.wait_for()
            said = toast.inner_text()
            assert f"seed '{text[:40]}" in said
            assert "Traceback" not in said
            page.get_by_test_id("toast-close").click()
            toast.wait_for(state="detached")
        assert page.title() == "digits · dumo"

        with ThreadPoolExecutor(QUESTIONS) as threads:
            answers = threads.map(lambda number: answered(url, number), range(QUESTIONS))
            made = [text for text in answers if text.count("<img ") >= 9]
        assert 64 <= len(made) <= QUESTIONS  # so many wait in the queue; the others were told that it is full
        seed.fill("7")
        make.click()
        page.wait_for_function("document.querySelectorAll('.answer img').length >= 8")
        assert [request for request in asked if not request.startswith((url, "data:", "blob:"))] == []
        assert wrong == []
        process.send_signal(signal.SIGINT)
        done = finish(process)
    port = url.rpartition(":")[2]
    assert (done.code, done.out) == (0, f"{url}\n")
    assert done.err.startswith(f"on another machine:  ssh -L {port}:localhost:{port} ")
    assert done.err.count("\n") == 1


def test_of_points_there_is_a_scatter_alone(trained: dict[str, Path]) -> None:
    with served(trained["moons"]) as (url, _):
        parts = json.loads(urllib.request.urlopen(f"{url}/config").read())["components"]
    assert [part["props"]["label"] for part in parts if part["type"] == "tabitem"] == ["NFE"]
