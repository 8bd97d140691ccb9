"""The demo: a page to play with runs, and its server.

1. `offline_gradio` imports Gradio.
2. `build_page` lays out the page of some runs.
3. `serve` serves it, to this machine alone, until a signal.
4. When a person presses a button, `answer_runs` asks each run in turn (`dumo.report.answer`), `answers_html` makes HTML
   of what there is so far, and `write_downloads` makes the files to download.

An answer is HTML that holds its pictures: nothing is fetched from elsewhere. What a person typed is escaped in it, and
in what says that it was wrong. Only what is downloaded lies in files, for a while, in a folder that goes at the end.
Gradio is imported in functions, because it reads the environment when it is imported (`offline_gradio`).
"""

import html
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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
from dumo.report.answer import Answer, AnswerFunction, answer_runs
from dumo.report.gallery import TAUGHT_BY_LETTER
from dumo.report.live import InteractiveRun
from dumo.runtime import import_extra, signals
from dumo.runtime.signals import Stopped
from dumo.types import UserError

if TYPE_CHECKING:
    import gradio as gr
    from gradio.components import Component

HERE = Path(__file__).parent  # where the template and the styles of answers lie
MAX_LISTED_CLASSES = 1000  # of more, one is typed instead of chosen from a list: ours
MAX_IMAGES = 64  # in an answer: ours
DEFAULT_IMAGES = 16  # in an answer: ours
MAX_PASSES = 100  # ours
MAX_GUIDANCE = 10  # end of the scale of guidance, unless the run's own is above it: ours
GUIDANCE_STEP = 0.1  # ours
DOWNLOAD_SECONDS = 3600  # for which files can be downloaded: ours
MAX_QUESTIONS = 64  # in the queue; more are refused: ours
FONT = ["system-ui", "sans-serif"]  # the machine's own, so that no theme's is fetched
MONOSPACE_FONT = ["ui-monospace", "monospace"]
INFO_COLOUR = "*body_text_color"  # of the text below a label: it must be readable
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which no encoder can read
POLL_SECONDS = 0.1  # between two looks for a signal
GRACE_SECONDS = 1  # that open connections have after it: ours
Explain = Callable[[BaseException], tuple[str, int] | None]  # an error's text and exit code; None: it is a defect


def build_page(runs: Sequence[InteractiveRun], explain: Explain) -> "gr.Blocks":
    """The page of one run or more, which fit next to each other; `explain` gives what a person reads of an error."""
    import gradio as gr

    first_run = runs[0]  # the defaults are this one's
    modes: list[tuple[str, str]] = []
    for letter, taught in TAUGHT_BY_LETTER.items():
        if any(letter in run.modes for run in runs):
            modes.append((f"{taught}: {letter}", letter))
    default_nfe = max(1, min(first_run.sampler.spec.nfe[0], MAX_PASSES))

    # a new field at each call; seeds are texts, so that what is no number is answered in words
    seed_field = partial(gr.Textbox, max_lines=1)
    mode_field = partial(gr.Radio, modes, value=modes[0][1], label="by", visible=len(modes) > 1)
    nfe_field = partial(gr.Slider, 1, MAX_PASSES, default_nfe, step=1, precision=0, label="NFE")
    add_button = partial(_add_button, runs, explain)

    names = " and ".join(run.name for run in runs)
    with gr.Blocks(
        title=f"{names} · dumo", analytics_enabled=False, delete_cache=(DOWNLOAD_SECONDS, DOWNLOAD_SECONDS)
    ) as blocks:
        with gr.Row():
            for shown_run in runs:
                title = f"<h1>{html.escape(shown_run.name)}</h1><p>{html.escape(_run_line(shown_run))}</p>"
                gr.HTML(title)
        with gr.Row():
            seed = seed_field(f"{first_run.sampler.spec.seed}", label="seed")
            shared_fields = [_condition_field(first_run), seed, _guidance_field(runs)]
        gr.HTML(guidance_html(runs))
        if first_run.sampler.is_image:
            with gr.Tab("Make"):
                with gr.Row():
                    count = gr.Slider(1, MAX_IMAGES, DEFAULT_IMAGES, step=1, precision=0, label="images")
                    fields = count, nfe_field(), mode_field()
                add_button(answer.make_samples, *shared_fields, *fields, has_downloads=True)
        with gr.Tab("NFE"):
            add_button(answer.compare_passes, *shared_fields)
        if first_run.sampler.is_image:
            with gr.Tab("Between two seeds"):
                with gr.Row():
                    fields = seed_field("1", label="other seed"), mode_field(), nfe_field()
                add_button(answer.interpolate_seeds, *shared_fields, *fields)
            with gr.Tab("Nearest images"):
                with gr.Row():
                    fields = mode_field(), nfe_field()
                add_button(answer.find_neighbours, *shared_fields, *fields)
    return blocks.queue(max_size=MAX_QUESTIONS)


def _run_line(run: InteractiveRun) -> str:
    """A line on a run: what it is about, its step, the number of its parameters, and its device."""
    opened = run.opened
    parameters = sum(p.numel() for p in opened.net.parameters())
    device_name = "the processor"
    if opened.device.type == "cuda":
        device_name = torch.cuda.get_device_name(opened.device)
    return f"{opened.run.about}. Step {opened.step:,}, {parameters:,} parameters, on {device_name}."


def _condition_field(run: InteractiveRun) -> "gr.Dropdown | gr.Textbox":
    """A field for a prompt where the run reads captions, else for a class, or all classes in turn.

    A class is chosen from a list; where they are too many for that, it is typed, by name or number. Without classes the
    field is hidden.
    """
    import gradio as gr

    conditions = run.sampler.conditions
    if conditions.captions:
        first_caption = next(iter(conditions.words), "")  # "": those of its data are not here
        return gr.Textbox(first_caption, label="prompt", lines=1, scale=3)
    if 0 < conditions.count <= MAX_LISTED_CLASSES:
        names = [conditions.name(c) for c in range(conditions.count)]
        return gr.Dropdown([("all, in turn", ""), *names], value="", label="class")
    label = "class, by name or number; none: all, in turn"
    return gr.Textbox("", label=label, max_lines=1, visible=conditions.count > 0)


def _guidance_field(runs: Sequence[InteractiveRun]) -> "gr.Slider":
    """A slider for the scale of guidance; hidden where no run can be guided."""
    import gradio as gr

    scale = runs[0].sampler.spec.guide.scale
    return gr.Slider(
        min(scale, 1),
        max(scale, MAX_GUIDANCE),
        scale,
        step=GUIDANCE_STEP,
        label="guidance scale",
        info="1: none; else every pass is two",
        visible=any(not run.guidance_refusal for run in runs),
        min_width=280,
    )


def guidance_html(runs: Sequence[InteractiveRun]) -> str:
    """HTML of why runs cannot be guided, a sentence for each; "" where all can be."""
    sentences: list[str] = []
    for run in runs:
        if run.guidance_refusal:
            whose = f" of {run.name}" if len(runs) > 1 else ""
            sentences.append(html.escape(f"No guidance{whose}: {run.guidance_refusal}."))
    return " ".join(sentences)


def _add_button(
    runs: Sequence[InteractiveRun],
    explain: Explain,
    answer_run: AnswerFunction,
    *fields: "Component",
    has_downloads: bool = False,
) -> None:
    """Add a button, and below it a place for the answer, where each takes the place of the one before.

    `answer_run` is called with the values of `fields`. All buttons share the device: one question is answered at a
    time, the others wait.
    """
    import gradio as gr

    button = gr.Button("Make", variant="primary")
    answer_place = gr.HTML()
    downloads = _add_downloads() if has_downloads else None

    def on_click(*field_values: object) -> Iterator[dict["Component", object]]:
        try:
            texts = [value for value in field_values if isinstance(value, str)]
            if SURROGATE.search("".join(texts)):
                raise UserError("a text has half a character, which cannot be read: type it anew")
            with TemporaryDirectory(prefix="dumo-demo-") as folder:  # Gradio copies what it needs at every yield
                for answers in answer_runs(runs, answer_run, *field_values):
                    updates: dict[Component, object] = {answer_place: answers_html(answers)}
                    if downloads:
                        updates |= downloads.fill(answers, Path(folder))
                    yield updates
        except Exception as error:
            raise gr.Error(error_html(error, explain), print_exception=False) from None

    outputs: list[Component] = [answer_place]
    if downloads:
        outputs += downloads.components
    button.click(on_click, [*fields], outputs, concurrency_id="device", concurrency_limit=1)


@dataclass(frozen=True)
class _Downloads:
    """Components from which a person downloads pictures and copies Python.

    `fill` writes the files of some answers into a folder, and returns the updates of the components.
    """

    components: "Sequence[Component]"
    fill: "Callable[[Mapping[str, Answer], Path], dict[Component, object]]"


def _add_downloads() -> _Downloads:
    """Add buttons to download pictures, and a field of Python to copy; all are empty until there is an answer."""
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

    def fill(answers: Mapping[str, Answer], folder: Path) -> dict["Component", object]:
        archive, sheet = write_downloads(answers, folder)
        scripts = [run_answer.script for run_answer in answers.values()]
        return {
            images: gr.DownloadButton(value=archive, interactive=True),
            grid: gr.DownloadButton(value=sheet, interactive=True),
            code: gr.Code("\n".join(["import dumo\n", *scripts]), visible=True),
        }

    return _Downloads((images, grid, code), fill)


def write_downloads(answers: Mapping[str, Answer], folder: Path) -> tuple[Path, Path]:
    """Write the pictures of answers, by the runs' names, into a folder.

    Returns the path of an archive with a file for each picture, and of a picture with the sheets of all runs.
    """
    archive = folder / "images.zip"
    with ZipFile(archive, "w") as files:
        for name, run_answer in answers.items():
            cells = [cell for row in run_answer.rows for cell in row.cells]
            for i, cell in enumerate(cells):
                if cell.picture:
                    files.writestr(f"{name}-{i:06d}.png", picture.png(cell.picture))
    sheets = {name: run_answer.sheet for name, run_answer in answers.items() if run_answer.sheet}
    names = list(sheets) if len(answers) > 1 else ()
    grid = folder / "grid.png"
    picture.write_picture(grid, picture.labelled_grid([("", list(sheets.values()))], names))
    return archive, grid


def answers_html(answers: Mapping[str, Answer]) -> str:
    """Answers, by the runs' names, as HTML: rows of pictures with words. Pixels of small pictures stay squares."""
    loader = jinja2.FileSystemLoader(HERE)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    cast(dict[str, Any], environment.filters)["embed"] = picture.embed
    template = environment.get_template("answer.html.j2")
    return template.render(answers=answers, small=picture.MIN_READABLE_HEIGHT)


def error_html(error: Exception, explain: Explain) -> str:
    """HTML of what a person reads of an error. A defect is logged with its trace, and the text only says so."""
    if isinstance(error, Stopped):
        return "this page is being closed"
    explanation = explain(error)
    if explanation is None:
        logging.getLogger(__name__).error("a defect", exc_info=error)
        return "this failed by a defect of dumo: the terminal says where"
    text, _ = explanation
    return html.escape(text)


@contextmanager
def offline_gradio() -> Generator[None, None, None]:
    """Import Gradio so that it reports nothing to its makers; at the end, remove the files that it made.

    Raises UserError as `import_extra`.
    """
    with TemporaryDirectory(prefix="dumo-demo-") as folder:
        os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=folder, HF_HUB_OFFLINE="1")
        import_extra("gradio", "demo", "dumo demo")  # it reads the variables when it is imported
        yield


def serve(blocks: "gr.Blocks", listener: socket.socket, when_ready: Callable[[str], None]) -> None:
    """Serve a page until a signal (`dumo.runtime.signals`).

    `when_ready` is called with the page's address once it can be opened. Raises RuntimeError where the server does not
    start.
    """
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI
    from gradio.themes import Default

    theme = Default(font=FONT, font_mono=MONOSPACE_FONT)
    theme = theme.set(block_info_text_color=INFO_COLOUR, block_info_text_color_dark=INFO_COLOUR)
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        blocks,
        path="/",
        app_kwargs={"openapi_url": None, "docs_url": None, "redoc_url": None},
        theme=theme,
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
    config = uvicorn.Config(guard(app), log_level="warning", timeout_graceful_shutdown=GRACE_SECONDS)
    server = uvicorn.Server(config)
    thread = Thread(target=server.run, kwargs={"sockets": [listener]}, name="server", daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(POLL_SECONDS)
    if not server.started:
        raise RuntimeError("the server of the page did not start")
    when_ready(url(listener))
    while signals.poll() is None and thread.is_alive():
        time.sleep(POLL_SECONDS)
    server.should_exit = True
    thread.join(GRACE_SECONDS + 2)  # else the process ends it: it is a daemon
