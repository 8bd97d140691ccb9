"""`dumo demo` as a person meets it: a port, a browser, nonsense, many questions, Ctrl-C."""

import json
import re
import signal
import socket
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

import browser
from e2e.shell import PATIENCE, Done, finish, refused, start, wait
from forked import Program

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


def free() -> int:
    """A port that nobody listens at, for now."""
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return some.getsockname()[1]


def answers(url: str) -> Generator[str, None, None]:
    """What is said to many questions that come at once."""
    from gradio_client import Client

    client = Client(url, verbose=False, analytics_enabled=False)
    for job in [client.submit("3", str(k), "7777", "u", 1, fn_index=2) for k in range(QUESTIONS)]:
        try:
            yield str(job.result(timeout=PATIENCE))
        except Exception as error:
            yield str(error)


@contextmanager
def served(run: Path, *words: object) -> Generator[tuple[str, Program], None, None]:
    """The address of a page, and the program that serves it, once it answers."""
    port = free()
    process, url = start("demo", run, "--port", port, *words, cwd=run.parent), f"http://127.0.0.1:{port}"

    def answers() -> bool:
        try:
            return urllib.request.urlopen(url).status == 200
        except OSError:
            return False

    try:
        wait(process, answers)
        yield url, process
    finally:
        process.send_signal(signal.SIGINT)
        finish(process)


def test_a_port_that_is_taken_is_refused(trained: dict[str, Path], here: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        refused("demo", trained["digits"], "--port", port, named=(f"port {port}", "--port"), run=trained["digits"])
    refused("demo", trained["digits"], "--host", "no.such.host.invalid", "--port", 0, named=("--host",))
    refused("demo", here / "nothing", "--port", 0, named=("no run's folder",))


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

        make.click()
        page.wait_for_function("document.querySelectorAll('.answer img').length == 8")
        assert page.get_by_text(re.compile(r"^50 passes, \d")).count() == 2
        seen = page.evaluate(browser.LOOK)
        assert (seen["broken"], seen["beyond"]) == ([], 0)

        for tab, count in {"Seeds": 16, "Between two seeds": 9, "Nearest images": 16}.items():
            page.get_by_role("tab", name=tab, exact=True).click()
            make.click()
            pictures.nth(count - 1).wait_for()
            assert pictures.count() == count
        page.get_by_text("among all 1,797 images").wait_for()

        page.get_by_role("tab", name="Passes", exact=True).click()
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

        answered = [text for text in answers(url) if text.count("<img ") == 9]
        assert 64 <= len(answered) <= QUESTIONS  # so many wait in the queue; the others were told that it is full
        seed.fill("7")
        make.click()
        page.wait_for_function("document.querySelectorAll('.answer img').length >= 8")
        assert [request for request in asked if not request.startswith((url, "data:", "blob:"))] == []
        assert wrong == []
        process.send_signal(signal.SIGINT)
        done = finish(process)
    assert done == Done(0, f"{url}\n", "")


@pytest.mark.slow
def test_of_points_there_is_a_scatter_alone(trained: dict[str, Path]) -> None:
    with served(trained["moons"]) as (url, _):
        parts = json.loads(urllib.request.urlopen(f"{url}/config").read())["components"]
    assert [part["props"]["label"] for part in parts if part["type"] == "tabitem"] == ["Passes"]
