"""Serve the demo to this machine alone, and answer only the requests that its own page makes.

`open_listener` opens the port, `url` and `tunnel_text` say how to reach it, and `guard` wraps the app that answers.
`guard` asks of each request, in this order:

1. Is it HTTP? Else the websocket is closed.
2. Does it come to this machine by its own name, and from the page (`_refusal_reason`)? Else the answer is 403.
3. Does it run the demo (POST_PATH), or get a file of the page (GET_PATHS, GET_PREFIXES)? Else the answer is 404.
4. Does the body of a POST hold only texts and numbers (`_read_body`, `_checked_json`)? Else the answer is 400.

2. is because a page of another site that is open in the same browser can send requests here, and by its own name, once
that leads to this machine (DNS rebinding), read the answers. So the header Host must name this machine, and the header
Origin this page.

3. and 4. are because Gradio does more than the page needs: it takes uploads, and opens files and addresses that a body
names.
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

POST_PATH = "/gradio_api/queue/join"  # runs the demo: its inputs are the body
GET_PATHS = ("/", "/config", "/theme.css", "/favicon.ico", "/gradio_api/queue/data")  # of the page
GET_PREFIXES = ("/assets/", "/static/", "/gradio_api/file=")  # Gradio's files, and those it made to be downloaded
_HOST = "127.0.0.1"  # which no other machine can reach
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")  # names by which a machine can call only itself
_MAX_BODY_BYTES = 2**20  # a prompt of 10,000 letters, each escaped, and as much again: ours

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
        listener = socket.create_server((_HOST, port))
    except OSError as error:
        reason = os.strerror(error.errno or 0)  # error.strerror has the address once more
        raise UserError(
            f"the page cannot be served at port {port} ({reason}): give another --port, or 0 for any that is free"
        ) from error
    with listener:
        yield listener


def url(listener: socket.socket) -> str:
    """The address of the page, to be opened in a browser on this machine."""
    return f"http://{_HOST}:{listener.getsockname()[1]}"


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
        refusal = _refusal_reason(headers)
        if refusal:
            return await _reply(send, 403, refusal)
        method = scope["method"]
        path = scope["path"]
        if method in ("GET", "HEAD") and (path in GET_PATHS or path.startswith(GET_PREFIXES)):
            return await app(scope, receive, send)
        if method != "POST" or path != POST_PATH:
            return await _reply(send, 404, "not found")
        body = _checked_json(await _read_body(receive))
        if not body:
            return await _reply(
                send, 400, "refused: a request to this page has at most 1 MiB of JSON, and only texts and numbers"
            )
        return await app(_with_length(scope, len(body)), _replay(body, receive), send)

    return guarded_app


async def _reply(send: Send, status: int, text: str) -> None:
    """Send an answer that is a line of text."""
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": text.encode()})


def _refusal_reason(headers: Mapping[str, str]) -> str:
    """Why a request with these headers is not answered, for the browser; "": it is answered."""
    host = headers.get("host", "")
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        name = ""
    if name not in _LOCAL_NAMES:
        return (
            f"this page is not served under the name {brief(ascii(name))}: open it as localhost or 127.0.0.1; from "
            "another machine, through the ssh command that dumo demo printed"
        )
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != host:
        return "this page answers its own requests alone"
    return ""


async def _read_body(receive: Receive) -> bytes:
    """The body of a request; empty where it is too long, or the browser is gone, which no answer reaches."""
    body = b""
    has_more = True
    while has_more:
        message = await receive()
        body += message.get("body", b"")
        if message["type"] != "http.request" or len(body) > _MAX_BODY_BYTES:
            return b""
        has_more = message.get("more_body", False)
    return body


def _checked_json(body: bytes) -> bytes:
    """The JSON of a body, written anew, so that Gradio reads what was checked; empty where it is refused."""
    try:
        inputs = json.loads(body)
    except (ValueError, RecursionError):
        return b""
    if not _is_flat(inputs):
        return b""
    return json.dumps(inputs).encode()


def _is_flat(inputs: object) -> bool:
    """Whether the inputs are an object of texts and numbers, and its field `data` a list of them.

    A nested object could name a file, which Gradio would copy.
    """
    if not isinstance(inputs, dict):
        return False
    fields = dict(cast(dict[str, object], inputs))
    data = fields.pop("data", None)
    if not isinstance(data, list):
        return False
    values = [*cast(list[object], data), *fields.values()]
    return all(value is None or isinstance(value, str | int | float) for value in values)


def _with_length(scope: Mapping[str, Any], length: int) -> dict[str, Any]:
    """The scope of a request whose body was written anew, in `length` bytes."""
    headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
    return {**scope, "headers": [*headers, (b"content-length", str(length).encode())]}


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives this body first, and then calls the original one."""
    bodies = [body]

    async def receive_again() -> Message:
        if bodies:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}
        return await receive()

    return receive_again
