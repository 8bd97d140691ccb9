"""The server of a page: it listens where it was told to, asks nobody for anything, and ends when asked to."""

import os
import socket
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib import import_module
from ipaddress import ip_address
from tempfile import TemporaryDirectory
from threading import Thread
from typing import TYPE_CHECKING

from dumo.runtime import signals
from dumo.types import UserError

if TYPE_CHECKING:
    import gradio as gr

HOST, PORT = "127.0.0.1", 7860  # Gradio's own port
WAIT = 0.1  # seconds between two looks whether it is to end
GRACE = 1  # seconds that open connections have then: ours


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


def address(opened: socket.socket) -> str:
    """What to type in a browser on this machine."""
    host, port = opened.getsockname()[:2]
    host = "localhost" if ip_address(host).is_unspecified else f"[{host}]" if ":" in host else host
    return f"http://{host}:{port}"


def private(opened: socket.socket) -> bool:
    """Whether this machine alone can reach the address."""
    return ip_address(opened.getsockname()[0]).is_loopback


@contextmanager
def gradio_alone() -> Generator[None, None, None]:
    """Gradio as it is to be used: it reports nothing to its makers, and what it keeps in files goes at the end."""
    with TemporaryDirectory(prefix="dumo-demo-") as folder:
        os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=folder, HF_HUB_OFFLINE="1")
        try:
            import_module("gradio")  # it reads them as it is imported
        except ImportError as error:
            raise UserError(f"dumo demo needs Gradio ({error}): pip install 'dumo[demo]'") from error
        yield


def serve(blocks: "gr.Blocks", opened: socket.socket, tell: Callable[[str], None]) -> None:
    """Serve a page until a signal asks for its end (`dumo.runtime.signals`); `tell` gets its address once it answers.

    Raises RuntimeError where the server does not start.
    """
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI

    from dumo.report.demo import theme
    from dumo.report.markup import style

    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        blocks,
        path="/",
        theme=theme(),
        css=style(),
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=1,  # nothing is uploaded
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
    )
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE)
    server = uvicorn.Server(config)
    thread = Thread(target=server.run, kwargs={"sockets": [opened]}, name="server", daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(WAIT)
    if not server.started:
        raise RuntimeError("the server of the page did not start")
    tell(address(opened))
    while signals.poll() is None and thread.is_alive():
        time.sleep(WAIT)
    server.should_exit = True
    thread.join(GRACE + 2)
