"""What the demo's server answers: this machine, by its own name, and of that what its page asks."""

import asyncio
import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from dumo.report import address
from dumo.report.address import guard, open_listener
from dumo.types import UserError

QUESTION = {"data": ["", "0", 1, True, None], "fn_index": 0, "trigger_id": 14, "session_hash": "x"}
FILE = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}


@dataclass
class Asked:
    """What a request came to: its status or the code that closes a websocket; its text; what the app received of it."""

    status: int = 0
    text: str = ""
    received: list[bytes] = field(default_factory=list[bytes])
    lengths: list[int] = field(default_factory=list[int])  # that headers tell


def ask(
    path: str = "/", method: str = "GET", body: bytes = b"", kind: str = "http", host: str = "localhost", **headers: str
) -> Asked:
    """A request to an app behind the guard; the body comes in two parts."""
    asked = Asked()
    parts = [body[: len(body) // 2], body[len(body) // 2 :]]
    headers.setdefault("content-length", str(len(body)))

    async def app(scope: Any, receive: Any, send: Any) -> None:  # noqa: ANN401
        if method == "POST":
            asked.lengths += [int(value) for key, value in scope["headers"] if key == b"content-length"]
            asked.received.append((await receive())["body"])
            assert dict(scope["headers"])[b"content-length"] == str(len(asked.received[0])).encode()
        await send({"status": 200})

    async def receive() -> Mapping[str, object]:
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message: Mapping[str, Any]) -> None:
        asked.status = asked.status or message.get("status") or message["code"]
        asked.text += message.get("body", b"").decode()

    sent = {"host": host, **headers}
    scope = {"type": kind, "path": path, "headers": [(k.encode(), v.encode("latin-1")) for k, v in sent.items()]}
    asyncio.run(guard(app)(scope | {"method": method}, receive, send))
    return asked


@pytest.mark.parametrize(
    ("name", "code"),
    [
        *((name, 200) for name in ("localhost:7860", "127.0.0.1", "[::1]:7860", "LocalHost:1")),
        *((name, 403) for name in ("evil.example:1", "10.0.0.7:7860", "", "[", "localhost.x", "\xff", "0.0.0.0:1")),
        (socket.gethostname() + ":7860", 403),
    ],
)
def test_names(name: str, code: int) -> None:
    assert ask(host=name).status == code


def test_a_refusal_says_what_to_do() -> None:
    wrong_name = ask(host="10.0.0.7:7860").text
    assert "not served under the name '10.0.0.7': open it as localhost or 127.0.0.1;" in wrong_name
    assert "through the ssh command that dumo demo printed" in wrong_name
    assert "at most 1 MiB of JSON, and only texts and numbers" in ask(address.POST_PATH, "POST", b"{").text


@pytest.mark.parametrize(
    ("origin", "code"),
    [("http://localhost:7860", 200), *((text, 403) for text in ("http://localhost:1", "null", "http://evil", ""))],
)
def test_pages(origin: str, code: int) -> None:
    assert ask(host="localhost:7860", origin=origin).status == code


def test_what_the_page_does_not_ask_is_not_there() -> None:
    for path in ("/", "/config", "/assets/index.js", "/static/a.svg", "/gradio_api/file=/tmp/x", address.GET_PATHS[-1]):
        assert ask(path).status == 200
        assert ask(path, "POST").status == 404
    doors = ("upload", "run/work", "call/work", "api/work", "proxy=http://a", "file/etc/passwd", "stream/x", "info")
    for path in ("/openapi.json", "/docs", "/login", "/queue/join", *(f"/gradio_api/{door}" for door in doors)):
        assert ask(path).status == ask(path, "POST").status == 404
    assert ask(kind="websocket").status == 1008


def test_a_question_holds_plain_values_alone() -> None:
    asked = ask(address.POST_PATH, "POST", json.dumps(QUESTION).encode())
    assert asked.status == 200
    assert json.loads(asked.received[0]) == QUESTION
    spaced = ask(address.POST_PATH, "POST", json.dumps(QUESTION, indent=8).encode())
    assert spaced.lengths == [len(spaced.received[0])]
    for value in (FILE, [FILE], {"a": [[FILE]]}, [], {}):
        for question in (QUESTION | {"data": ["", value]}, QUESTION | {"event_data": value}, [value], value):
            assert ask(address.POST_PATH, "POST", json.dumps(question).encode()).status == 400
    for inputs in (FILE, "", None, 1):
        assert ask(address.POST_PATH, "POST", json.dumps(QUESTION | {"data": inputs}).encode()).status == 400
    for body in (b"", b"{", b"\xff", b"[" * 100_000, b'{"data": ["' + b"x" * 2**20 + b'"]}'):
        assert ask(address.POST_PATH, "POST", body).status == 400
    twice = json.dumps(QUESTION).replace("{", f'{{"data": [{json.dumps(FILE)}], ', 1)  # the last of two counts
    assert b"FileData" not in ask(address.POST_PATH, "POST", twice.encode()).received[0]


def test_a_browser_that_is_gone_is_not_answered() -> None:
    sent: list[object] = []

    async def app(scope: object, receive: object, send: object) -> None:
        raise AssertionError("half a question came to the app")

    async def receive() -> Mapping[str, object]:
        return {"type": "http.disconnect"}

    async def send(message: object) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": address.POST_PATH, "headers": [(b"host", b"localhost")]}
    asyncio.run(guard(app)(scope, receive, send))
    assert sent == []


def test_this_machine_alone_is_listened_to() -> None:
    with open_listener(0) as listener:
        host, port = listener.getsockname()
        assert host == "127.0.0.1"
        assert address.url(listener) == f"http://127.0.0.1:{port}"
        assert f"ssh -L {port}:localhost:{port} " in address.tunnel_text(listener)
        with pytest.raises(UserError, match=f"port {port} .*--port"), open_listener(port):
            pass
