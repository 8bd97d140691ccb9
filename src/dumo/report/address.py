"""Where the demo is served, and what is answered there: what its own page asks, on this machine.

`open_listener` opens the port, `url` and `tunnel_text` say how to reach it, and `guard` wraps the app that answers.
For each request `guard` decides in this order:

1. A websocket is closed.
2. What is for another machine, or from another page (`_reason_to_refuse`), is answered 403.
3. A question of the page (`_read_question`) goes to the app with its body written anew (`_with_body`), or is answered
   400. A question is JSON with the values of the page's fields, which are posted when a button is pressed.
4. A file of the page goes to the app.
5. All else is answered 404.

A page of another site that is open in the same browser can send requests here, and by its own name, once that leads to
this machine (DNS rebinding), read the answers. So only requests to a name of this machine are answered (Host), and of a
page's requests only those of its own pages (Origin).

Gradio answers more than the page asks: it takes uploads, and opens files and addresses that a question names. So what
the page does not ask is not found, and a question holds texts and numbers alone.
"""

import json
import os
import socket
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast
from urllib.parse import urlsplit

from dumo.io.read import brief
from dumo.types import UserError

HOST = "127.0.0.1"  # which no other machine can reach
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")  # names by which a machine can call only itself
POST_PATH = "/gradio_api/queue/join"  # of questions, which are posted
GET_PATHS = ("/", "/config", "/theme.css", "/favicon.ico", "/gradio_api/queue/data")  # of the page
GET_PREFIXES = ("/assets/", "/static/", "/gradio_api/file=")  # Gradio's own files, and those to be downloaded
MAX_QUESTION_BYTES = 2**20  # a prompt of 10,000 letters, each escaped, and as much again: ours
BAD_QUESTION = "refused: a request to this page has at most 1 MiB of JSON, and only texts and numbers"

# as ASGI has them
Message = Mapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Any, Any], Awaitable[None]]


@contextmanager
def open_listener(port: int) -> Generator[socket.socket, None, None]:
    """Open a socket that this machine alone can reach. Port 0 is any that is free.

    Raises UserError where the port is taken, or may not be used.
    """
    try:
        listener = socket.create_server((HOST, port))
    except OSError as error:
        reason = os.strerror(error.errno or 0)  # error.strerror has the address once more
        raise UserError(
            f"the page cannot be served at port {port} ({reason}): give another --port, or 0 for any that is free"
        ) from error
    with listener:
        yield listener


def url(listener: socket.socket) -> str:
    """The address of the page, to be opened in a browser on this machine."""
    return f"http://{HOST}:{listener.getsockname()[1]}"


def tunnel_text(listener: socket.socket) -> str:
    """A line on how to open the page on another machine."""
    port = listener.getsockname()[1]
    return f"on another machine:  ssh -L {port}:localhost:{port} {socket.gethostname()}    then open http://localhost:{port}"


def guard(app: App) -> App:
    """Wrap an ASGI app, so that it answers what its own page asks of this machine, and nothing else."""

    async def guarded_app(scope: Any, receive: Receive, send: Send) -> None:  # noqa: ANN401
        if scope["type"] == "lifespan":
            return await app(scope, receive, send)
        if scope["type"] != "http":  # the page opens no websocket
            return await send({"type": "websocket.close", "code": 1008})
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        reason = _reason_to_refuse(headers)
        if reason:
            return await _reply(send, 403, reason)
        path = scope["path"]
        if scope["method"] == "POST" and path == POST_PATH:
            try:
                question = await _read_question(receive)
            except _DisconnectedError:
                return None
            if question is None:
                return await _reply(send, 400, BAD_QUESTION)
            return await app(_with_body(scope, question), _replay(question, receive), send)
        if scope["method"] in ("GET", "HEAD") and (path in GET_PATHS or path.startswith(GET_PREFIXES)):
            return await app(scope, receive, send)
        return await _reply(send, 404, "not found")

    return guarded_app


async def _reply(send: Send, status: int, text: str) -> None:
    """Send an answer that is a line of text."""
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": text.encode()})


def _reason_to_refuse(headers: Mapping[str, str]) -> str:
    """Why a request with these headers is not answered, in a sentence; "" where it is answered."""
    host = headers.get("host", "")
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        name = ""
    if name not in LOCAL_NAMES:
        return (
            f"this page is not served under the name {brief(ascii(name))}: open it as localhost or 127.0.0.1; from "
            "another machine, through the ssh command that dumo demo printed"
        )
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != host:
        return "this page answers its own requests alone"
    return ""


class _DisconnectedError(Exception):
    """The browser closed the connection before the request had come."""


async def _read_question(receive: Receive) -> bytes | None:
    """The body of a question, as JSON that is written anew, so that Gradio reads what was checked.

    None where it is too long, no JSON, or holds other than texts and numbers. Raises _DisconnectedError.
    """
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise _DisconnectedError
        body += message.get("body", b"")
        if len(body) > MAX_QUESTION_BYTES:
            return None
        if not message.get("more_body", False):
            break
    try:
        question = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return json.dumps(question).encode() if _holds_texts_and_numbers(question) else None


def _holds_texts_and_numbers(question: object) -> bool:
    """Whether a question is an object of texts and numbers, and `data` a list of them.

    A nested object could name a file, which Gradio would copy.
    """
    if not isinstance(question, dict):
        return False
    fields = cast(dict[str, object], question)
    inputs = fields.get("data")
    if not isinstance(inputs, list):
        return False
    other_values = [value for name, value in fields.items() if name != "data"]
    values = [*cast(list[object], inputs), *other_values]
    return all(value is None or isinstance(value, str | int | float) for value in values)


def _with_body(scope: Mapping[str, Any], body: bytes) -> Mapping[str, Any]:
    """The scope of a request, with the length of this body among its headers."""
    other_headers = [(key, value) for key, value in scope["headers"] if key.lower() != b"content-length"]
    return {**scope, "headers": [*other_headers, (b"content-length", str(len(body)).encode())]}


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives this body first, and then calls the original one."""
    bodies = [body]

    async def receive_again() -> Message:
        if bodies:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}
        return await receive()

    return receive_again
