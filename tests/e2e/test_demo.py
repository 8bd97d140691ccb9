"""`dumo demo` as a person meets it: fields and pictures in a browser, two runs, mistakes, other sites, Ctrl-C."""

import json
import signal
import socket
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from urllib.error import HTTPError

import pytest

import browser
from e2e.shell import finish, refused, start, wait
from forked import Program

# To import Gradio takes seconds, of every process that collects tests.
if find_spec("gradio") is None:
    pytest.skip("gradio is not installed", allow_module_level=True)


@contextmanager
def served(*words: object, cwd: Path) -> Generator[tuple[str, Program], None, None]:
    """The address of a page, and the program that serves it, once it answers."""
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        port = some.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    process = start("demo", *words, "--port", port, cwd=cwd)

    def answers() -> bool:
        try:
            return answer(url)[0] == 200
        except OSError:
            return False

    try:
        wait(process, answers)
        yield url, process
    finally:
        process.send_signal(signal.SIGINT)
        finish(process)


def answer(url: str, body: bytes | None = None, **headers: str) -> tuple[int, dict[str, str]]:
    """The status and headers with which a request is answered."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, names)) as response:
            return response.status, dict(response.headers)
    except HTTPError as error:
        with error:
            return error.code, dict(error.headers)


@pytest.mark.nightly
def test_other_sites_are_not_answered(here: Path) -> None:
    with served("digits-trained", cwd=here) as (url, _):
        for host, status in {
            "localhost": 200,
            "127.0.0.1:80": 200,
            "example.org": 400,
            "localhost.example.org": 400,
        }.items():
            assert answer(f"{url}/config", Host=host)[0] == status
        # A browser shows no answer to the page of another origin, and sends it no JSON without asking first.
        asked = {"Origin": "http://example.org"}
        assert "access-control-allow-origin" not in answer(f"{url}/config", **asked)[1]
        question = json.dumps({"data": ["", 1, 0, 1, "u", 1], "fn_index": 0, "session_hash": "a"}).encode()
        assert answer(f"{url}/gradio_api/queue/join", question, Content_Type="text/plain", **asked)[0] == 422
        form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\nhello\r\n--x--\r\n'
        assert answer(f"{url}/gradio_api/upload", form, Content_Type="multipart/form-data; boundary=x")[0] == 413
        assert answer(f"{url}/gradio_api/file=/etc/passwd")[0] == 403


@pytest.mark.nightly
@pytest.mark.browser
def test_a_person_makes_samples_of_two_runs(here: Path) -> None:
    with served("digits-trained", "dumo:digits-trained", cwd=here) as (url, process):
        with browser.page(browser.DESK) as page:
            errors: list[str] = []
            requested: list[str] = []
            page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
            page.on("request", lambda request: requested.append(request.url))
            page.goto(url, wait_until="networkidle")
            page.get_by_label("class").click()
            page.get_by_role("option", name="3").click()
            page.get_by_label("number input for images").fill("4")
            page.get_by_role("button", name="Make").click()
            pictures = page.locator("button.thumbnail-item img")
            pictures.nth(7).wait_for()
            assert pictures.count() == 8
            assert page.get_by_text("1 NFE, ").count() >= 2
            page.get_by_label("seed").fill("-1")
            assert all(address.startswith((url, "data:", "blob:")) for address in requested), requested
            assert not errors
        process.send_signal(signal.SIGINT)
        done = finish(process)
    assert done.code in (0, 130), done
    assert done.out.startswith(url)
    assert "ssh -L" in done.err
    assert not list(here.iterdir())


def test_what_cannot_be_served_is_refused(here: Path) -> None:
    refused("demo", "nothing", named=("nothing",))
