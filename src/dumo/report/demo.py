"""The demo: a page to play with runs, and its server, which this machine alone reaches, and which ends at a signal.

`gradio_alone` imports Gradio, `page` lays out the page of some runs, and `serve` serves it. When a person presses a
button, `answer_runs` asks each run in turn (`dumo.report.answer`), and `render` makes HTML of what there is so far.

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
from dataclasses import dataclass
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
MAX_IMAGES = 64  # to make at once: ours
COUNT = 16  # images to make, unless another number is chosen: ours
MAX_PASSES = 100  # ours
MAX_GUIDANCE = 10  # of the scale of guidance, where the run's own is not above: ours
GUIDANCE_STEP = 0.1  # ours
DOWNLOAD_SECONDS = 3600  # that files can be downloaded: ours
MAX_QUESTIONS = 64  # in the queue; more are refused: ours
FONT = ["system-ui", "sans-serif"]  # the machine's own: no theme's is fetched
MONO = ["ui-monospace", "monospace"]
INK = "*body_text_color"  # of what stands below a label: why guidance is grey must be readable
HALF_CHARACTER = re.compile("[\ud800-\udfff]")
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
    nfe = max(1, min(first.sampler.spec.nfe[0], MAX_PASSES))
    seed = partial(gr.Textbox, max_lines=1)  # text: what is no number is answered in words
    reading = partial(gr.Radio, ways, value=ways[0][1], label="by", visible=len(ways) > 1)
    passes = partial(gr.Slider, 1, MAX_PASSES, nfe, step=1, precision=0, label="passes")
    tab = partial(_add_button, lives, explain)
    with gr.Blocks(
        title=f"{names} · dumo", analytics_enabled=False, delete_cache=(DOWNLOAD_SECONDS, DOWNLOAD_SECONDS)
    ) as blocks:
        with gr.Row():
            for live in lives:
                gr.HTML(f"<h1>{html.escape(live.name)}</h1><p>{html.escape(_run_line(live))}</p>{validation(live)}")
        with gr.Row():
            given = [_condition_field(first), seed(f"{first.sampler.spec.seed}", label="seed"), _guidance_field(lives)]
        if first.sampler.is_image:
            with gr.Tab("Make"):
                with gr.Row():
                    count = gr.Slider(1, MAX_IMAGES, COUNT, step=1, precision=0, label="images")
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
    return blocks.queue(max_size=MAX_QUESTIONS)


def _run_line(live: InteractiveRun) -> str:
    """A run in a line: what it is about, its step, parameters and device."""
    opened = live.opened
    parameters = sum(p.numel() for p in opened.net.parameters())
    device_name = "the processor"
    if opened.device.type == "cuda":
        device_name = torch.cuda.get_device_name(opened.device)
    return f"{opened.run.about}. Step {opened.step:,}, {parameters:,} parameters, on {device_name}."


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

    scale = lives[0].sampler.spec.guide.scale
    refusals = dict.fromkeys(live.unguided for live in lives)  # "" of a run that can be guided
    can_guide = "" in refusals
    hint = "1: none; else every pass is two"
    if not can_guide:
        hint = html.escape("; ".join(refusals))
    return gr.Slider(
        min(scale, 1),
        max(scale, MAX_GUIDANCE),
        scale,
        step=GUIDANCE_STEP,
        label="guidance scale",
        info=hint,
        interactive=can_guide,
        min_width=280,
    )


def _add_button(
    lives: Sequence[InteractiveRun], explain: Explain, answers: Answers, *inputs: "Component", keeps: bool = False
) -> None:
    """A button, and below it the answers, each instead of the one before; `keeps`: with downloads.

    All buttons share a device: one question is answered at a time, the others wait.
    """
    import gradio as gr

    pressed = gr.Button("Make", variant="primary")
    place = gr.HTML()
    downloads = _add_downloads() if keeps else None

    def work(*chosen: object) -> Iterator[dict["Component", object]]:
        try:
            texts = [text for text in chosen if isinstance(text, str)]
            if HALF_CHARACTER.search("".join(texts)):
                raise UserError("a text has half a character, which cannot be read: type it anew")
            with TemporaryDirectory(prefix="dumo-demo-") as folder:  # Gradio copies what it needs at every yield
                for shown in answer_runs(lives, answers, *chosen):
                    updates: dict[Component, object] = {place: render(shown)}
                    if downloads:
                        updates |= downloads.fill(shown, Path(folder))
                    yield updates
        except Exception as error:
            raise gr.Error(error_text(error, explain), print_exception=False) from None

    outputs = downloads.components if downloads else ()
    pressed.click(work, [*inputs], [place, *outputs], concurrency_id="device", concurrency_limit=1)


@dataclass(frozen=True)
class _Downloads:
    """Components to download pictures from and to copy Python from; `fill` updates them, by files in a folder."""

    components: "Sequence[Component]"
    fill: "Callable[[Mapping[str, Answer], Path], dict[Component, object]]"


def _add_downloads() -> _Downloads:
    """Add buttons for pictures in files, and a field of Python to copy, without any yet."""
    import gradio as gr

    with gr.Row():
        images = gr.DownloadButton("Images (zip)", interactive=False)
        grid = gr.DownloadButton("Grid (png)", interactive=False)
    code = gr.Code(
        language="python",
        label="the Python that makes them",
        interactive=False,
        show_line_numbers=False,
        visible=False,
    )

    def fill(shown: Mapping[str, Answer], folder: Path) -> dict["Component", object]:
        archive, sheet = write(shown, folder)
        scripts = [answered.script for answered in shown.values()]
        return {
            images: gr.DownloadButton(value=archive, interactive=True),
            grid: gr.DownloadButton(value=sheet, interactive=True),
            code: gr.Code("\n".join(["import dumo\n", *scripts]), visible=True),
        }

    return _Downloads((images, grid, code), fill)


def write(shown: Mapping[str, Answer], folder: Path) -> tuple[Path, Path]:
    """The pictures of answers, by the runs' names, as an archive of files, and their sheets as one picture."""
    archive = folder / "images.zip"
    with ZipFile(archive, "w") as files:
        for name, answered in shown.items():
            cells = [cell for row in answered.rows for cell in row.cells]
            for i, cell in enumerate(cells):
                if cell.picture:
                    files.writestr(f"{name}-{i:06d}.png", picture.png(cell.picture))
    sheets = {name: answered.sheet for name, answered in shown.items() if answered.sheet}
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
    explanation = explain(error)
    if explanation is None:
        logging.getLogger(__name__).error("a defect", exc_info=error)
        return "this failed by a defect of dumo: the terminal says where"
    text, _ = explanation
    return html.escape(text)


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
