"""Prompt sheets: what a net makes of some texts, a prompt under its pictures, which are of more and more passes.

A prompt keeps its noise from left to right, so what differs is the number of passes.
"""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from dumo.flow.solver import able
from dumo.io import picture
from dumo.run.folder import RunFolder
from dumo.run.prompt import names, prompted
from dumo.runtime.progress import Bar, no_bar

PASSES = (1, 2, 4)  # the columns, as far as the solver can make them
COUNT = 9  # captions that are shown where no prompts are given
GAP, LETTER, MARGIN = 6, 14, 18  # pixels: between pictures, of a letter, between prompts
NARROWEST = 240  # pixels of a prompt's column: room for its words


@dataclass(frozen=True)
class Shown:
    """A prompt with its picture: an image for each number of passes, side by side."""

    prompt: str
    image: Image.Image


@dataclass(frozen=True)
class PromptSheet:
    """Prompts at these numbers of passes."""

    passes: tuple[int, ...]
    shown: tuple[Shown, ...]

    def picture(self, across: int = 3) -> Image.Image:
        """All of them as one picture on white, `across` prompts to a row."""
        width = max(NARROWEST, self.shown[0].image.width)
        font = ImageFont.truetype(findfont("DejaVu Sans"), LETTER)
        letters = max(1, int(width / font.getlength("n")))
        texts = [textwrap.fill(one.prompt, letters) for one in self.shown]
        high = self.shown[0].image.height + (1 + max(text.count("\n") + 1 for text in texts)) * (LETTER + 4) + MARGIN
        rows, across = -(-len(texts) // across), min(across, len(texts))
        page = Image.new("RGB", (across * (width + MARGIN) - MARGIN, rows * high + LETTER + MARGIN), "white")
        pen = ImageDraw.Draw(page)
        head = f"from left to right: {', '.join(map(str, self.passes))} passes through the net"
        pen.text((0, 0), head, "black", font)
        for i, (one, text) in enumerate(zip(self.shown, texts, strict=True)):
            x, y = i % across * (width + MARGIN), i // across * high + LETTER + MARGIN
            page.paste(one.image, (x, y))
            pen.multiline_text((x, y + one.image.height + 4), text, "black", font)
        return page


def prompt_sheet(opened: RunFolder, prompts: Sequence[str] = (), bar: Bar = no_bar) -> PromptSheet | None:
    """What the net makes of these prompts, or, where none are given, of captions of its data; None: it reads no texts.

    Raises UserError as `dumo.run.prompt.prompted`.
    """
    run = opened.run
    if not prompts and (run.conditions.captions is None or len(run.pixels) != 3):
        return None
    c = prompted(opened.sampler, prompts) if prompts else run.conditions.in_turn(COUNT)
    solver = run.sample.solver
    passes = tuple(n for n in PASSES if able(solver, run.reads, n)) or run.sample.nfe
    with bar("sampling prompts", sum(passes)) as tick:
        made = list[torch.Tensor]()
        for done, n in enumerate(passes, 1):
            made.append(picture.to_rows(opened.sampler.sample(c, nfe=n).x))
            tick(sum(passes[:done]), "")
    return PromptSheet(passes, tuple(strips(torch.stack(made, 1), names(opened.sampler, c))))


def strips(pixels: torch.Tensor, texts: Sequence[str]) -> Iterator[Shown]:
    """Each prompt's images (passes, h, w, 3) side by side."""
    for text, row in zip(texts, pixels, strict=True):
        yield Shown(text, picture.sheet(row, len(row), gap=GAP))
