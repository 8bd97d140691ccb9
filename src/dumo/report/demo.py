"""The demo: a page to play with runs, and its server, which this machine alone reaches, and which ends at a signal.

An answer is HTML that holds its pictures: nothing is fetched from elsewhere. What a person typed is escaped in it, and
in what says that it was wrong. Only what is downloaded lies in files, for a while, in a folder that goes at the end.
Gradio is imported in functions: it reads the environment as it is imported (`gradio_alone`).
"""

import html
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import TYPE_CHECKING, Any, cast
from zipfile import ZipFile

import jinja2
import torch

from dumo.io import picture
from dumo.report import answer
from dumo.report.address import guard, url
from dumo.report.answer import Answer, Answers, answer_runs
from dumo.report.chart import Chart
from dumo.report.figure import validation_charts
from dumo.report.gallery import TAUGHT_BY_LETTER
from dumo.report.live import InteractiveRun
from dumo.runtime import install, signals
from dumo.runtime.signals import Stopped
from dumo.training.log import read_log
from dumo.types import UserError

if TYPE_CHECKING:
    import gradio as gr
    from gradio.components import Component

HERE = Path(__file__).parent
MENU = 1000  # classes that are listed; of more, one is typed: ours
IMAGES, COUNT = 64, 16  # to make: at most, and at first: ours
MOST = 100  # passes: ours
STRONGEST, STEP = 10, 0.1  # of the scale of guidance, where the run's own is not above: ours
KEPT = 3600  # seconds that files can be downloaded: ours
WAITING = 64  # questions in the queue; more are refused: ours
FONT, MONO = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # the machine's own: no theme's is fetched
INK = "*body_text_color"  # of what stands below a label: why guidance is grey must be readable
HALF = re.compile("[\ud800-\udfff]")
WAIT = 0.1  # seconds between two looks for a signal
GRACE = 1  # seconds that open connections have then: ours
Explain = Callable[[BaseException], tuple[str, int] | None]  # what to say of an error; None: it is a defect


def page(lives: Sequence[InteractiveRun], explain: Explain) -> "gr.Blocks":
    """The page of one run, or of several that fit; `explain` says what a person reads of an error."""
    import gradio as gr

    first = lives[0]
    names = " and ".join(live.name for live in lives)
    ways: list[tuple[str, str]] = []
    for letter, taught in TAUGHT_BY_LETTER.items():
        if any(letter in live.modes for live in lives):
            ways.append((f"{taught}: {letter}", letter))
    nfe = max(1, min(first.sampler.spec.nfe[0], MOST))
    seed = partial(gr.Textbox, max_lines=1)  # text: what is no number is answered in words
    reading = partial(gr.Radio, ways, value=ways[0][1], label="by", visible=len(ways) > 1)
    passes = partial(gr.Slider, 1, MOST, nfe, step=1, precision=0, label="passes")
    tab = partial(_add_button, lives, explain)
    with gr.Blocks(title=f"{names} · dumo", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as blocks:
        with gr.Row():
            for live in lives:
                gr.HTML(f"<h1>{html.escape(live.name)}</h1><p>{html.escape(_run_line(live))}</p>{validation(live)}")
        with gr.Row():
            given = [_condition_field(first), seed(f"{first.sampler.spec.seed}", label="seed"), _guidance_field(lives)]
        if first.sampler.is_image:
            with gr.Tab("Make"):
                with gr.Row():
                    count = gr.Slider(1, IMAGES, COUNT, step=1, precision=0, label="images")
                    more = count, passes(), reading()
                tab(answer.make, *given, *more, keeps=True)
        with gr.Tab("Passes"):
            tab(answer.passes, *given)
        if first.sampler.is_image:
            with gr.Tab("Between two seeds"):
                with gr.Row():
                    more = seed("1", label="other seed"), reading(), passes()
                tab(answer.interpolation, *given, *more)
            with gr.Tab("Nearest images"):
                with gr.Row():
                    more = reading(), passes()
                tab(answer.neighbours, *given, *more)
    return blocks.queue(max_size=WAITING)


def _run_line(live: InteractiveRun) -> str:
    """A run in a line."""
    numbers, here = sum(p.numel() for p in live.opened.net.parameters()), live.opened.device
    device = torch.cuda.get_device_name(here) if here.type == "cuda" else "the processor"
    return f"{live.opened.run.about}. Step {live.opened.step:,}, {numbers:,} parameters, on {device}."


def validation(live: InteractiveRun) -> str:
    """How far a run was from its data as it trained, folded away; empty where it was not judged then."""
    charts: list[Chart] = []
    with suppress(UserError):  # a damaged log is no reason not to play
        charts += validation_charts(read_log(live.opened.folder / "metrics.jsonl"))
    if not charts:
        return ""
    pictures = "".join(
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{picture.embed(chart.dark)}">'
        f'<img src="{picture.embed(chart.light)}" alt="{html.escape(chart.alt)}" width="370"></picture>'
        for chart in charts
    )
    return f"<details><summary>as it trained</summary>{pictures}</details>"


def _condition_field(live: InteractiveRun) -> "gr.Dropdown | gr.Textbox":
    """What an image shows: a prompt where the run reads captions, else a class from a list, or all of them in turn.

    Where classes are too many for a list it is typed, by name or number; where there are none the field is hidden.
    """
    import gradio as gr

    conditions = live.sampler.conditions
    if conditions.captions:
        return gr.Textbox(conditions.name(0), label="prompt", lines=1, scale=3)
    if 0 < conditions.count <= MENU:
        names = [conditions.name(c) for c in range(conditions.count)]
        return gr.Dropdown([("all, in turn", ""), *names], value="", label="class")
    label = "class, by name or number; none: all, in turn"
    return gr.Textbox("", label=label, max_lines=1, visible=conditions.count > 0)


def _guidance_field(lives: Sequence[InteractiveRun]) -> "gr.Slider":
    """The scale of guidance; grey, with the reason, where no run can be guided."""
    import gradio as gr

    own, reasons = lives[0].sampler.spec.guide.scale, dict.fromkeys(live.unguided for live in lives)
    free = "" in reasons
    why = "1: none; else every pass is two" if free else html.escape("; ".join(reasons))
    low, high = min(own, 1), max(own, STRONGEST)
    return gr.Slider(low, high, own, step=STEP, label="guidance scale", info=why, interactive=free, min_width=280)


def _add_button(
    lives: Sequence[InteractiveRun], explain: Explain, answers: Answers, *inputs: "Component", keeps: bool = False
) -> None:
    """A button, and below it the answers, each instead of the one before; `keeps`: with downloads.

    All buttons share a device: one question is answered at a time, the others wait.
    """
    import gradio as gr

    pressed, place = gr.Button("Make", variant="primary"), gr.HTML()
    outputs, fill = _add_downloads() if keeps else ((), lambda shown, folder: {})

    def work(*given: object) -> Iterator[dict["Component", object]]:
        try:
            if HALF.search("".join(text for text in given if isinstance(text, str))):
                raise UserError("a text has half a character, which cannot be read: type it anew")
            with TemporaryDirectory(prefix="dumo-demo-") as folder:  # Gradio copies what it needs at every yield
                for shown in answer_runs(lives, answers, *given):
                    yield {place: render(shown), **fill(shown, Path(folder))}
        except Exception as error:
            raise gr.Error(error_text(error, explain), print_exception=False) from None

    pressed.click(work, [*inputs], [place, *outputs], concurrency_id="device", concurrency_limit=1)


def _add_downloads() -> "tuple[Sequence[Component], Callable[[Mapping[str, Answer], Path], dict[Component, object]]]":
    """Pictures in files and Python to copy, none yet; and what makes them of an answer, by way of a folder."""
    import gradio as gr

    with gr.Row():
        images, grid = (gr.DownloadButton(label, interactive=False) for label in ("Images (zip)", "Grid (png)"))
    label = "the Python that makes them"
    code = gr.Code(language="python", label=label, interactive=False, show_line_numbers=False, visible=False)

    def fill(shown: Mapping[str, Answer], folder: Path) -> dict["Component", object]:
        archive, sheet = write(shown, folder)
        return {
            images: gr.DownloadButton(value=archive, interactive=True),
            grid: gr.DownloadButton(value=sheet, interactive=True),
            code: gr.Code("\n".join(["import dumo\n", *(one.script for one in shown.values())]), visible=True),
        }

    return (images, grid, code), fill


def write(shown: Mapping[str, Answer], folder: Path) -> tuple[Path, Path]:
    """The pictures of answers, by the runs' names, as an archive of files, and their sheets as one picture."""
    archive = folder / "images.zip"
    with ZipFile(archive, "w") as files:
        for name, one in shown.items():
            cells = [cell for row in one.rows for cell in row.cells]
            for i, cell in enumerate(cells):
                if cell.picture:
                    files.writestr(f"{name}-{i:06d}.png", picture.png(cell.picture))
    sheets = {name: one.sheet for name, one in shown.items() if one.sheet}
    names = list(sheets) if len(shown) > 1 else ()
    grid = folder / "grid.png"
    picture.write_picture(grid, picture.labelled_grid([("", list(sheets.values()))], names))
    return archive, grid


def render(shown: Mapping[str, Answer]) -> str:
    """Answers by the runs' names as HTML: pictures row by row, small ones with their pixels as squares, and words."""
    loader = jinja2.FileSystemLoader(HERE)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    cast(dict[str, Any], environment.filters)["embed"] = picture.embed
    return environment.get_template("answer.html.j2").render(shown=shown, small=picture.MIN_READABLE_HEIGHT)


def error_text(error: Exception, explain: Explain) -> str:
    """What a person reads of an error; of a defect no more than that the terminal has its trace."""
    if isinstance(error, Stopped):
        return "this page is being closed"
    if (found := explain(error)) is None:
        logging.getLogger(__name__).error("a defect", exc_info=error)
        return "this failed by a defect of dumo: the terminal says where"
    return html.escape(found[0])


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


def serve(blocks: "gr.Blocks", listener: socket.socket, tell: Callable[[str], None]) -> None:
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
        app_kwargs={"openapi_url": None, "docs_url": None, "redoc_url": None},
        theme=Default(font=FONT, font_mono=MONO).set(block_info_text_color=INK, block_info_text_color_dark=INK),
        css=(HERE / "answer.css").read_text(encoding="utf-8"),
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=1,  # nothing is uploaded
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
    )
    blocks.has_launched = True  # mounting leaves it unset, and then Gradio checks no path that a question names
    config = uvicorn.Config(guard(app), log_level="warning", timeout_graceful_shutdown=GRACE)
    server = uvicorn.Server(config)
    thread = Thread(target=server.run, kwargs={"sockets": [listener]}, name="server", daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(WAIT)
    if not server.started:
        raise RuntimeError("the server of the page did not start")
    tell(url(listener))
    while signals.poll() is None and thread.is_alive():
        time.sleep(WAIT)
    server.should_exit = True
    thread.join(GRACE + 2)
