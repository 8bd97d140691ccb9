"""Who is answered by the demo's server: requests by its name, of its own pages; beyond this machine who logs in."""

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest

from dumo.report.address import accounts, guarded, listening
from dumo.types import UserError


def asked(server: str, path: str = "/", kind: str = "http", **headers: str) -> object:
    """The status of an answer by a server at a host; of a websocket what it is closed with."""
    sent = list[Any]()

    async def app(scope: object, receive: object, send: Any) -> None:  # noqa: ANN401
        await send({"status": 200})

    async def send(message: object) -> None:
        sent.append(message)

    scope = {"type": kind, "path": path, "headers": [(k.encode(), v.encode("latin-1")) for k, v in headers.items()]}
    asyncio.run(guarded(app, server)(scope, None, send))
    return sent[0].get("status") or sent[0]["code"]


@pytest.mark.parametrize(
    ("host", "name", "code"),
    [
        *(("127.0.0.1", name, 200) for name in ("localhost:7860", "127.0.0.1", "[::1]:7860", "LocalHost:1")),
        *(("127.0.0.1", name, 403) for name in ("evil.example:1", "10.0.0.7:7860", "", "[", "localhost.x", "\xff")),
        *(("box.lab", name, code) for name, code in (("Box.lab:7860", 200), ("localhost", 200), ("other.lab", 403))),
        *(("0.0.0.0", name, 200) for name in ("10.0.0.7:7860", "[fe80::1]:7860", socket.gethostname())),
        ("0.0.0.0", "evil.example:7860", 403),
    ],
)
def test_names(host: str, name: str, code: int) -> None:
    assert asked(host, host=name) == code
    assert asked(host, kind="websocket", host=name) == (200 if code == 200 else 1008)


@pytest.mark.parametrize(
    ("origin", "code"),
    [("http://localhost:7860", 200), *((text, 403) for text in ("http://localhost:1", "null", "http://evil", ""))],
)
def test_pages(origin: str, code: int) -> None:
    assert asked("127.0.0.1", host="localhost:7860", origin=origin) == code
    assert asked("127.0.0.1", "/openapi.json", host="localhost", origin="http://localhost") == 404


def test_who_may_log_in(tmp_path: Path) -> None:
    file = tmp_path / "people"
    with listening("127.0.0.1", 0) as own, listening("0.0.0.0", 0) as everywhere:
        assert accounts(None, own) is None
        with pytest.raises(UserError, match="--auth FILE"):
            accounts(None, everywhere)
        file.write_text("me:a:b c\n\nyou:x\n")
        file.chmod(0o640)
        with pytest.raises(UserError, match="chmod 600"):
            accounts(file, everywhere)
        file.chmod(0o600)
        assert accounts(file, everywhere) == accounts(file, own) == [("me", "a:b c"), ("you", "x")]
        for text in ("", "me\n", ":x\n", "me:\n", "me:x\nyou"):
            file.write_text(text)
            with pytest.raises(UserError, match="USER:PASSWORD"):
                accounts(file, own)
        with pytest.raises(UserError, match="is not there"):
            accounts(tmp_path / "none", own)
