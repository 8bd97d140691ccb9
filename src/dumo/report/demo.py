"""The demo: a page to play with a run, and its server, which listens at one address and ends at a signal.

An answer is HTML that holds its pictures: nothing is fetched from elsewhere. What a person typed is escaped in it, and
in what says that it was wrong. Gradio is imported in functions: it reads the environment as it is imported
(`gradio_alone`).
"""

import html
import logging
import os
import socket
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from ipaddress import ip_address
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import TYPE_CHECKING, Any, cast

import jinja2
import torch

from dumo.io.picture import READABLE
from dumo.report import answer
from dumo.report.answer import PASSES, Answer, Live
from dumo.report.figure import embed
from dumo.runtime import install, signals
from dumo.runtime.signals import Stopped
from dumo.types import UserError

if TYPE_CHECKING:
    import gradio as gr
    from gradio.components import Component

HERE = Path(__file__).parent
MENU = 1000  # classes that are listed; of more, one is typed: ours
WAITING = 64  # questions in the queue; more are refused: ours
FONT, MONO = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # the machine's own: no theme's is fetched
WAIT = 0.1  # seconds between two looks for a signal
GRACE = 1  # seconds that open connections have then: ours
Explain = Callable[[BaseException], tuple[str, int] | None]  # what to say of an error; None: it is a defect


def page(live: Live, name: str, about: str, explain: Explain) -> "gr.Blocks":
    """The page of a run of this name; `explain` says what a person reads of an error."""
    import gradio as gr

    numbers = sum(p.numel() for p in live.sampler.net.parameters())
    here = live.sampler.device
    device = torch.cuda.get_device_name(here) if here.type == "cuda" else "the processor"
    facts = f"{about}, {numbers:,} parameters, on {device}."
    ways = [(one.title, letter) for letter, one in live.readings.items()]
    seed = partial(gr.Textbox, max_lines=1)  # text: what is no number is answered in words
    reading = partial(gr.Radio, ways, value=ways[0][1], label="by", visible=len(ways) > 1)
    passes = partial(gr.Radio, [*PASSES], value=PASSES[0], label="passes")
    with gr.Blocks(title=f"{name} · dumo", analytics_enabled=False) as blocks:
        gr.HTML(f"<h1>{html.escape(name)}</h1><p>{html.escape(facts)}</p>")
        with gr.Row():
            given = [condition(live), seed("0", label="seed")]
        with gr.Tab("Passes"):
            button(partial(answer.passes, live), explain, *given)
        if live.sampler.is_image:
            with gr.Tab("Seeds"):
                button(partial(answer.seeds, live), explain, *given, reading())
            with gr.Tab("Between two seeds"):
                with gr.Row():
                    more = seed("1", label="other seed"), reading(), passes()
                button(partial(answer.interpolation, live), explain, *given, *more)
            with gr.Tab("Nearest images"):
                with gr.Row():
                    more = reading(), passes()
                button(partial(answer.neighbours, live), explain, *given, *more)
    return blocks.queue(max_size=WAITING)


def condition(live: Live) -> "gr.Dropdown | gr.Textbox":
    """What an image shows: a prompt where the run reads captions, else a class from a list.

    Where classes are too many for a list it is typed, by name or number; where there are none the field is hidden.
    """
    import gradio as gr

    conditions = live.sampler.conditions
    if conditions.captions:
        return gr.Textbox(conditions.name(0), label="prompt", lines=1, scale=3)
    if 0 < conditions.count <= MENU:
        names = [conditions.name(c) for c in range(conditions.count)]
        return gr.Dropdown(names, value=names[0], label="class")
    return gr.Textbox("0", label="class, by name or number", max_lines=1, visible=conditions.count > 0)


def button(answers: Callable[..., Iterator[Answer]], explain: Explain, *inputs: "Component") -> None:
    """A button, and below it the answers, each instead of the one before.

    All buttons share a device: one question is answered at a time, the others wait.
    """
    import gradio as gr

    pressed, place = gr.Button("Make", variant="primary"), gr.HTML()

    def work(*given: object) -> Iterator[str]:
        try:
            yield from map(render, answers(*given))
        except Exception as error:
            raise gr.Error(error_text(error, explain), print_exception=False) from None

    pressed.click(work, [*inputs], place, concurrency_id="device", concurrency_limit=1)


def render(shown: Answer) -> str:
    """An answer as HTML: the pictures row by row, small ones with their pixels as squares, and their words."""
    loader = jinja2.FileSystemLoader(HERE)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    cast(dict[str, Any], environment.filters)["embed"] = embed
    return environment.get_template("answer.html.j2").render(answer=shown, small=READABLE)


def error_text(error: Exception, explain: Explain) -> str:
    """What a person reads of an error; of a defect no more than that the terminal has its trace."""
    if isinstance(error, Stopped):
        return "this page is being closed"
    if (found := explain(error)) is None:
        logging.getLogger(__name__).error("a defect", exc_info=error)
        return "this failed by a defect of dumo: the terminal says where"
    return html.escape(found[0])


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
    """Gradio as it is used here: it reports nothing to its makers, and what it keeps in files goes at the end."""
    with TemporaryDirectory(prefix="dumo-demo-") as folder:
        os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=folder, HF_HUB_OFFLINE="1")
        try:
            import_module("gradio")  # it reads them as it is imported
        except ImportError as error:
            raise UserError(f"dumo demo needs Gradio ({error}): {install('demo')}") from error
        yield


def serve(blocks: "gr.Blocks", opened: socket.socket, tell: Callable[[str], None]) -> None:
    """Serve a page until a signal (`dumo.runtime.signals`); `tell` gets its address once it answers.

    Raises RuntimeError where the server does not start.
    """
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI
    from gradio.themes import Default

    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        blocks,
        path="/",
        theme=Default(font=FONT, font_mono=MONO),
        css=(HERE / "answer.css").read_text(encoding="utf-8"),
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
