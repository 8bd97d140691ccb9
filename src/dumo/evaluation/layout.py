"""How benchmarks of prompts want their images: in which files, under which names, and which prompts they have.

GenEval (Ghosh et al. 2023, evaluation/evaluate_images.py) reads every folder whose name is a number:

    00000/metadata.jsonl      line 0 of evaluation_metadata.jsonl
    00000/samples/0000.png    four images, 0000.png to 0003.png
    00000/grid.png            to look at; it is not read

DPG-Bench (Hu et al. 2024, dpg_bench/compute_dpg_bench.py) reads a picture for each of its text files, 0.png for 0.txt:
four images, two to a row, with nothing between them, for it cuts them apart by their side.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from PIL import Image

from dumo.io import file
from dumo.io.archive import write_picture
from dumo.io.picture import PixelRows, sheet
from dumo.texts.prompt import Prompt
from dumo.types import UserError

EACH = 4  # images of a prompt, in both


class Layout(Protocol):
    """The files of one benchmark."""

    name: ClassVar[str]
    prompts: ClassVar[int]  # that it has as published

    def check(self, prompts: Sequence[Prompt], source: Path) -> None:
        """Raise UserError where prompts are none of this benchmark's."""
        ...

    def judged(self, name: str) -> list[str]:
        """The pictures of the prompt of this name that the evaluator looks at."""
        ...

    def files(self, name: str) -> list[str]:
        """All files of that prompt, those first."""
        ...

    def write(self, folder: Path, prompt: Prompt, pixels: PixelRows) -> None:
        """Write the images of a prompt, each file whole or not at all."""
        ...


class GenEval:
    """A folder for each prompt."""

    name: ClassVar[str] = "geneval"
    prompts: ClassVar[int] = 553

    def check(self, prompts: Sequence[Prompt], source: Path) -> None:
        """Raise UserError unless each line is JSON with a tag."""
        if source.suffix != ".jsonl":
            raise UserError(f"{source} is no .jsonl: give GenEval's prompts/evaluation_metadata.jsonl")
        for number, prompt in enumerate(prompts, 1):
            told: Any = json.loads(prompt.line)
            if not isinstance(told.get("tag"), str):
                raise UserError(
                    f"{source}: prompt {number} has no tag: give GenEval's prompts/evaluation_metadata.jsonl"
                )

    def judged(self, name: str) -> list[str]:
        """Four samples."""
        return [f"{name}/samples/{j:04d}.png" for j in range(EACH)]

    def files(self, name: str) -> list[str]:
        """The samples, then what its evaluator reads beside them, and the grid."""
        return [*self.judged(name), f"{name}/metadata.jsonl", f"{name}/grid.png"]

    def write(self, folder: Path, prompt: Prompt, pixels: PixelRows) -> None:
        """The metadata come first: its evaluator stops where a folder has none."""
        *samples, metadata, grid = self.files(prompt.name)
        file.write(folder / metadata, prompt.line.encode())
        for name, one in zip(samples, pixels, strict=True):
            write_picture(folder / name, Image.fromarray(one.numpy()))
        write_picture(folder / grid, sheet(pixels, 2, scale=1))


class DpgBench:
    """A picture for each prompt."""

    name: ClassVar[str] = "dpg"
    prompts: ClassVar[int] = 1065

    def check(self, prompts: Sequence[Prompt], source: Path) -> None:
        """Raise UserError unless they are files in a folder, with no dot in their names, where its evaluator cuts."""
        if not source.is_dir():
            raise UserError(f"{source} is no folder: give DPG-Bench's dpg_bench/prompts, a .txt for each prompt")
        if dotted := next((prompt.name for prompt in prompts if "." in prompt.name), None):
            raise UserError(f"{source / dotted}.txt: DPG-Bench reads names to their first dot: call it otherwise")

    def judged(self, name: str) -> list[str]:
        """One."""
        return [f"{name}.png"]

    def files(self, name: str) -> list[str]:
        """That."""
        return self.judged(name)

    def write(self, folder: Path, prompt: Prompt, pixels: PixelRows) -> None:
        """Two rows of two images."""
        write_picture(folder / self.judged(prompt.name)[0], sheet(pixels, 2, scale=1, gap=0))


LAYOUTS: Mapping[str, Layout] = {one.name: one for one in (GenEval(), DpgBench())}
