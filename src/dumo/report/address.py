"""Where the demo is served, and who may ask there: this machine, and beyond it who can log in.

A page of another site that is open in the same browser can send requests here, and by its own name, once that leads to
this machine (DNS rebinding), read the answers. So only requests to a name of this server are answered (Host), and of a
page's requests only those of its own pages (Origin).
"""

import socket
import stat
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dumo.io.read import brief, read_text
from dumo.types import UserError

LOCAL = ("localhost", "127.0.0.1", "::1")
WAY = "write USER:PASSWORD into it, a line for each person"
SMALL = 2**16  # bytes of such a file: ours
Sent = Mapping[str, Any]  # of ASGI
App = Callable[[Any, Any, Any], Awaitable[None]]


@contextmanager
def listening(host: str, port: int) -> Generator[socket.socket, None, None]:
    """A socket at an address; port 0: any that is free. Raises UserError where it is taken, or none of this machine."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(
            f"the page cannot stand at {host}, port {port} ({why}): give another --port, such as {port + 1}, or 0 for "
            "any that is free; or another --host"
        ) from error
    with opened:
        yield opened


def url(opened: socket.socket) -> str:
    """What to type in a browser on this machine."""
    host, port = opened.getsockname()[:2]
    host = "localhost" if ip_address(host).is_unspecified else f"[{host}]" if ":" in host else host
    return f"http://{host}:{port}"


def accounts(file: Path | None, opened: socket.socket) -> list[tuple[str, str]] | None:
    """Who may log in, each with the password; None: all, which only this machine can reach.

    They stand in a file, for a command line can be read by all users of a machine. Raises UserError where others reach
    the address and there is none, where others may read it, and for a line that is none.
    """
    if file is None:
        if not ip_address(opened.getsockname()[0]).is_loopback:
            raise UserError(
                f"others can reach --host {opened.getsockname()[0]}: give --auth FILE, and {WAY}; or leave out --host"
            )
        return None
    lines = [line for line in read_text(file, WAY, SMALL).splitlines() if line.strip()]
    if stat.S_IMODE(file.stat().st_mode) & 0o077:
        raise UserError(f"{file} has passwords, and others may read or change it: chmod 600 {file}")
    found = [(user, password) for user, _, password in (line.partition(":") for line in lines) if user and password]
    if not found or len(found) < len(lines):
        raise UserError(f"{file}: {'a line' if found else 'the file'} is not USER:PASSWORD: {WAY}")
    return found


def known(host: str, name: str) -> bool:
    """Whether a server at `host`, as --host has it, may be called so.

    At an address of all networks (0.0.0.0) any number is, and the machine's own name: a number leads nowhere else.
    """
    if name in (*LOCAL, host.lower()):
        return True
    with suppress(ValueError):
        if ip_address(host).is_unspecified:
            own = {socket.gethostname().lower(), socket.getfqdn().lower()}
            return name in own or bool(ip_address(name))
    return False


def guarded(app: App, host: str) -> App:
    """The app, for requests to a server at `host` by its name, of no page but its own; without a list of its calls."""

    async def answer(scope: Any, receive: Any, send: Callable[[Sent], Awaitable[None]]) -> None:  # noqa: ANN401
        if scope["type"] not in ("http", "websocket"):
            return await app(scope, receive, send)
        if why := refusal(host, {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}):
            code, said = 403, why
        elif scope["path"].endswith("/openapi.json"):
            code, said = 404, "not found"
        else:
            return await app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        await send({"type": "http.response.start", "status": code, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": said.encode()})

    return answer


def refusal(host: str, headers: Mapping[str, str]) -> str:
    """Why a request is not answered; empty where it is."""
    try:
        asked, origin = headers.get("host", ""), headers.get("origin")
        name = urlsplit(f"//{asked}").hostname or ""
    except ValueError:
        asked, origin, name = "", None, ""
    if not known(host, name):
        return f"this server is not called {brief(ascii(name))}"
    if origin is not None and origin.partition("://")[2] != asked:
        return "this page answers its own requests alone"
    return ""
