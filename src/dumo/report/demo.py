"""The page: what can be asked, and where its answers stand. Nothing of it is fetched from elsewhere.

An answer is HTML that holds its pictures. Whatever a person typed is escaped in it, and in what says that it was wrong.
"""

import html
from collections.abc import Callable, Iterator
from functools import partial

import gradio as gr
import torch
from gradio.components import Component
from gradio.themes import Base, Default

from dumo.report import answer
from dumo.report.answer import PASSES, Answer
from dumo.report.markup import Told, rendered, said
from dumo.report.sampler import Sampler

MENU = 1000  # classes that are listed; of more, one is typed: ours
WAITING = 64  # questions in the queue; more are refused: ours
FONT, MONO = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # the machine's own: no theme's is fetched


def theme() -> Base:
    """Plain, in the letters of whoever looks."""
    return Default(font=FONT, font_mono=MONO)


def page(sampler: Sampler, told: Told) -> gr.Blocks:
    """The page of a run. `told` says what a person reads of an error."""
    name, image = sampler.opened.folder.resolve().name, sampler.opened.sampler.is_image
    with gr.Blocks(title=f"{name} · dumo", analytics_enabled=False) as blocks:
        gr.HTML(f"<h1>{html.escape(name)}</h1><p>{html.escape(about(sampler))}</p>")
        with gr.Row():
            given = [asked(sampler), seed("seed", "0")]
        with gr.Tab("Passes"):
            button(partial(answer.passes, sampler), told, *given)
        if image:
            with gr.Tab("Seeds"):
                button(partial(answer.seeds, sampler), told, *given, reading(sampler))
            with gr.Tab("Between two seeds"):
                with gr.Row():
                    ways = seed("other seed", "1"), reading(sampler), passes()
                button(partial(answer.interpolation, sampler), told, *given, *ways)
            with gr.Tab("Nearest images"):
                with gr.Row():
                    ways = reading(sampler), passes()
                button(partial(answer.neighbours, sampler), told, *given, *ways)
    return blocks.queue(max_size=WAITING)


def about(sampler: Sampler) -> str:
    """What the run is, in a line."""
    opened = sampler.opened
    numbers = sum(p.numel() for p in opened.net.parameters())
    return f"{opened.run.about}. Step {opened.step:,}, {numbers:,} parameters, on {where(opened.device)}."


def where(device: torch.device) -> str:
    """The device's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the processor"


def asked(sampler: Sampler) -> gr.Dropdown | gr.Textbox:
    """What is to be made: a prompt where the run reads captions, else a class from a list.

    Where classes are too many for a list it is typed, by name or number; where there are none nothing is asked.
    """
    run = sampler.opened.run
    if run.conditions.captions:
        return gr.Textbox(run.conditions.name(0), label="prompt", lines=1, scale=3)
    if 0 < run.data.classes <= MENU:
        names = [run.conditions.name(c) for c in range(run.data.classes)]
        return gr.Dropdown(names, value=names[0], label="class")
    return gr.Textbox("0", label="class, by name or number", max_lines=1, visible=run.data.classes > 0)


def seed(label: str, value: str) -> gr.Textbox:
    """A seed, as text: what is no number is answered in words."""
    return gr.Textbox(value, label=label, max_lines=1)


def reading(sampler: Sampler) -> gr.Radio:
    """The way to sample; not shown where there is one alone."""
    ways = [(one.title, letter) for letter, one in sampler.readings.items()]
    return gr.Radio(ways, value=ways[0][1], label="by", visible=len(ways) > 1)


def passes() -> gr.Radio:
    """How many passes through the net."""
    return gr.Radio([*PASSES], value=PASSES[0], label="passes")


def button(answers: Callable[..., Iterator[Answer]], told: Told, *inputs: Component) -> None:
    """A button, and below it the answers, each in the place of the one before.

    All buttons share a device: one question is answered at a time, the others wait.
    """
    pressed, place = gr.Button("Make", variant="primary"), gr.HTML()

    def work(*given: object) -> Iterator[str]:
        try:
            yield from map(rendered, answers(*given))
        except Exception as error:
            raise gr.Error(said(error, told), print_exception=False) from None

    pressed.click(work, [*inputs], place, concurrency_id="device", concurrency_limit=1)
