"""An interactive page to sample runs in the browser, for `dumo demo`.

`open_demo` opens runs, `build_page` lays out the fields and a gallery for each run, and `serve` serves the page on this
machine until a signal.

A page of another site that is open in the same browser can send requests here under a name of its own that leads to
this machine (DNS rebinding). So only requests to the names of this machine are answered. Gradio lets no page of another
origin read an answer.
"""

import html
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from dumo.config.check_spec import may_have_classes
from dumo.flow.compatibility import why_unguided
from dumo.io import picture
from dumo.report.gallery import TAUGHT_BY_LETTER, sampling_modes
from dumo.run.prompt_rows import texts_of
from dumo.run.trained import TrainedRun
from dumo.run.weights import load_run
from dumo.run.write_samples import data_points
from dumo.runtime import require, signals
from dumo.types import UserError

if TYPE_CHECKING:
    import gradio as gr

LOCAL_NAMES = ("localhost", "127.0.0.1")
MAX_IMAGES = 64
MAX_PASSES = 100
MAX_GUIDANCE = 10.0
# With more classes, the class is typed instead of selected from a list.
MAX_LISTED_CLASSES = 1000
# Encoded prompts that are kept in memory; with T5-XXL each takes 8 MB.
MAX_ENCODED_PROMPTS = 64
POLL_SECONDS = 0.1
# As many columns of pictures as fit, and all rows: Gradio would scroll them in half a screen.
CSS = """
.grid-container { grid-template-columns: repeat(auto-fill, minmax(7rem, 1fr)) !important; margin-top: 1.5rem; }
.grid-wrap { min-height: 0 !important; max-height: none !important; }
"""


def open_demo(folders: Sequence[str], *, weights: str | None = None, device: str = "auto") -> list[TrainedRun]:
    """Open the runs of a page. Raises UserError if their classes differ."""
    runs = [load_run(folder, weights=weights, device=device) for folder in folders]
    classes: list[object] = []
    for run in runs:
        conditions = run.spec.conditions
        classes.append("captions" if conditions.captions else (conditions.count, conditions.names))
    if any(other != classes[0] for other in classes):
        raise UserError(f"{' and '.join(folders)} have different classes: use runs of the same data, or one run")
    return runs


def build_page(runs: Sequence[TrainedRun]) -> "gr.Blocks":
    """Lay out the page of one run or several. The defaults of the fields are those of the first run."""
    # Gradio reads the environment when it is imported.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    gr: Any = require("gradio", "demo", "dumo demo")
    first = runs[0]
    letters = [letter for letter in TAUGHT_BY_LETTER if any(letter in sampling_modes(run.spec) for run in runs)]
    can_guide = any(
        why_unguided(run.spec.objective, run.spec.training_guidance, has_null=may_have_classes(run.spec.data)) is None
        for run in runs
    )
    titles = [run.folder.name for run in runs]

    with gr.Blocks(title=f"{' and '.join(titles)} · dumo", analytics_enabled=False) as blocks:
        # The fields.
        with gr.Row():
            conditions = first.spec.conditions
            if conditions.captions:
                condition = gr.Textbox(next(iter(conditions.words), ""), label="prompt", scale=3)
            elif 0 < conditions.count <= MAX_LISTED_CLASSES:
                names = [conditions.name(c) for c in range(conditions.count)]
                condition = gr.Dropdown([("all, in turn", ""), *names], value="", label="class")
            else:
                condition = gr.Textbox("", label="class, by name or number", visible=conditions.count > 0)
            count = gr.Slider(1, MAX_IMAGES, 16, step=1, label="images", visible=first.makes_images)
            seed = gr.Number(first.spec.sample.seed, label="seed", precision=0, minimum=0, maximum=2**31 - 1)
        with gr.Row():
            nfe = gr.Slider(1, MAX_PASSES, min(first.spec.sample.nfe[0], MAX_PASSES), step=1, label="NFE")
            mode_choices = [(f"{TAUGHT_BY_LETTER[letter]}: {letter}", letter) for letter in letters]
            mode = gr.Radio(mode_choices, value=letters[0], label="sample by", visible=len(letters) > 1)
            scale = first.spec.sample.guide.scale
            top = max(scale, MAX_GUIDANCE)
            guidance = gr.Slider(min(scale, 1.0), top, scale, step=0.1, label="guidance scale", visible=can_guide)
        button = gr.Button("Make", variant="primary")

        # A gallery for each run.
        galleries: list[Any] = []
        with gr.Row():
            for run, title in zip(runs, titles, strict=True):
                with gr.Column():
                    parameters = sum(parameter.numel() for parameter in run.net.parameters())
                    gr.Markdown(f"### {title}\n{run.spec.about}. Step {run.step:,}, {parameters:,} parameters.")
                    gallery = gr.Gallery(
                        label=title, height="auto", object_fit="contain", format="png", interactive=False
                    )
                    galleries.append(gallery)

        def make(
            condition: str, count: int, seed: int, nfe: int, letter: str, scale: float
        ) -> Iterator[dict[Any, Any]]:
            for run, gallery in zip(runs, galleries, strict=True):
                try:
                    pictures, note = sample(run, condition, count, seed, nfe, letter, scale)
                    yield {gallery: gr.Gallery(pictures, label=note)}
                except UserError as error:
                    raise gr.Error(html.escape(str(error)), print_exception=False) from None

        fields = [condition, count, seed, nfe, mode, guidance]
        button.click(make, fields, galleries, concurrency_limit=1, api_visibility="private")
    return blocks


def sample(
    trained: TrainedRun, condition: str, count: int, seed: int, nfe: int, letter: str, scale: float
) -> tuple[list[tuple[Image.Image, str]], str]:
    """Sample a run as `dumo sample` does. Returns pictures with captions, one of many points, and what they took.

    `condition` is a prompt, or the name or number of a class; "" means all classes in turn. `letter` names a sampling
    mode (`dumo.report.gallery.sampling_modes`). Raises UserError for a mode that the run was not trained for.
    """
    conditions = trained.spec.conditions
    count = count if trained.makes_images else picture.SCATTER_POINTS
    if conditions.captions:
        texts = texts_of(trained.net)
        if texts:
            texts.forget(MAX_ENCODED_PROMPTS - 1)
        c = trained.conditions(None, count, prompts=[condition])
    else:
        is_chosen = conditions.count and condition.strip()
        c = trained.conditions([condition] if is_chosen else None, count)
    modes = sampling_modes(trained.spec)
    if letter not in modes:
        raise UserError(f"objective {trained.spec.objective.kind} of {trained.folder} does not train {letter}")
    solver = modes[letter].solver_for(nfe)
    guide = trained.spec.sample.guide
    if scale != guide.scale:
        guide = trained.guide_of(scale)
    began = time.perf_counter()
    samples = trained.make_samples(c, nfe=nfe, seed=seed, solver=solver, guide=guide)
    note = f"{samples.nfe} NFE, {time.perf_counter() - began:.2g} s"
    if not trained.makes_images:
        points = data_points(trained.spec.data, trained.spec.sample.seed)
        return [(picture.scatter(points, {"": samples.x}), "")], note
    # Small images are enlarged, so that their pixels stay squares.
    factor = picture.readable_scale(samples.x.shape[-1])
    pictures: list[tuple[Image.Image, str]] = []
    for i, image in enumerate(picture.singles(samples.x)):
        size = (factor * image.width, factor * image.height)
        name = conditions.name(int(c[i])) if conditions.count and not conditions.captions else str(i)
        pictures.append((image.resize(size, Image.Resampling.NEAREST), name))
    return pictures, note


def serve(blocks: "gr.Blocks", port: int | None, when_ready: Callable[[str], None]) -> None:
    """Serve a page on this machine until a signal (`dumo.runtime.signals`).

    `port` None is the first that is free from 7860 on. `when_ready` is called with the page's address once it can be
    opened. Raises OSError if the port is taken.
    """
    from gradio.themes import Default
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    _, url, _ = blocks.launch(
        server_name="127.0.0.1",
        server_port=port,
        app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=[*LOCAL_NAMES])]},
        # The browser's own fonts: Gradio's theme fetches others from the network.
        css=CSS,
        theme=Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        run_history=False,
        max_file_size=1,
        ssr_mode=False,
        share=False,
    )
    when_ready(url)
    try:
        while signals.poll() is None:
            time.sleep(POLL_SECONDS)
    finally:
        blocks.close()


def tunnel_text(url: str) -> str:
    """Return a line with the command to open the page from another machine."""
    port = url.rstrip("/").rpartition(":")[2]
    return f"on another machine:  ssh -L {port}:localhost:{port} {socket.gethostname()}    then open http://localhost:{port}"
