"""Images of a benchmark's prompts, in the files that its evaluator reads, with their card.

Image j of prompt i is sample 4 i + j of the seed, whatever makes it and when. So what is there is kept, and work that
was stopped goes on. The card lies next to the folder, FOLDER.json: the evaluator needs images alone, but what
it finds (`dumo.report.verdict`) is worth no more than what is known of them.

GenEval (Ghosh et al. 2023, evaluation/evaluate_images.py) reads every folder whose name is a number:

    00000/metadata.jsonl      line 0 of evaluation_metadata.jsonl
    00000/samples/0000.png    four images, 0000.png to 0003.png
    00000/grid.png            to look at; it is not read

DPG-Bench (Hu et al. 2024, dpg_bench/compute_dpg_bench.py) reads a picture for each of its text files, 0.png for 0.txt:
four images, two to a row, with nothing between them, for it cuts them apart by their side.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image

from dumo.encoders.caption import Prompt, read_prompts
from dumo.evaluation.protocol import name_of
from dumo.io import digest, file, picture
from dumo.io.read import brief, finite, read_json, write_json
from dumo.report import evaluate
from dumo.report.card import Card, card
from dumo.report.sample import said_of, with_options
from dumo.run.prompt import prompted
from dumo.run.sampler import Sampler
from dumo.run.weights import RunFolder
from dumo.runtime import dist, signals
from dumo.runtime.progress import Bar, no_bar
from dumo.types import UserError

EACH = 4  # images of a prompt, in both


class Layout(ABC):
    """The files of one benchmark."""

    name: ClassVar[str]
    prompts: ClassVar[int]  # that it has as published

    @abstractmethod
    def unfit(self, prompts: Sequence[Prompt], source: Path) -> str:
        """Why prompts are not of this benchmark, and the way out; "": they are."""

    @abstractmethod
    def judged(self, name: str) -> list[str]:
        """The pictures of the prompt of this name that the evaluator looks at."""

    def files(self, name: str) -> list[str]:
        """All files of that prompt, those first."""
        return self.judged(name)

    @abstractmethod
    def write(self, folder: Path, prompt: Prompt, pixels: picture.PixelRows) -> None:
        """Write the images of a prompt, each file whole or not at all."""


class GenEval(Layout):
    """A folder for each prompt."""

    name: ClassVar[str] = "geneval"
    prompts: ClassVar[int] = 553

    def unfit(self, prompts: Sequence[Prompt], source: Path) -> str:
        """Each line must be JSON with a tag."""
        wrong = "is no .jsonl" if source.suffix != ".jsonl" else ""
        for number, prompt in enumerate(() if wrong else prompts, 1):
            if not isinstance(json.loads(prompt.line).get("tag"), str):
                wrong = wrong or f"prompt {number} has no tag"
        return wrong and f"{wrong}: give GenEval's prompts/evaluation_metadata.jsonl"

    def judged(self, name: str) -> list[str]:
        """Four samples."""
        return [f"{name}/samples/{j:04d}.png" for j in range(EACH)]

    def files(self, name: str) -> list[str]:
        """The samples, then what else its evaluator reads, and the grid."""
        return [*self.judged(name), f"{name}/metadata.jsonl", f"{name}/grid.png"]

    def write(self, folder: Path, prompt: Prompt, pixels: picture.PixelRows) -> None:
        """The metadata come first: its evaluator stops where a folder has none."""
        *samples, metadata, grid = self.files(prompt.name)
        file.write(folder / metadata, prompt.line.encode())
        for name, one in zip(samples, pixels, strict=True):
            picture.write_picture(folder / name, Image.fromarray(one.numpy()))
        picture.write_picture(folder / grid, picture.sheet(pixels, 2, scale=1))


class DpgBench(Layout):
    """A picture for each prompt."""

    name: ClassVar[str] = "dpg"
    prompts: ClassVar[int] = 1065

    def unfit(self, prompts: Sequence[Prompt], source: Path) -> str:
        """They must be files in a folder, with no dot in their names, where its evaluator cuts."""
        dotted = next((prompt.name for prompt in prompts if "." in prompt.name), None)
        if not source.is_dir():
            return "is no folder: give DPG-Bench's dpg_bench/prompts, a .txt for each prompt"
        return f"{dotted}.txt: DPG-Bench reads names to their first dot: call it otherwise" if dotted else ""

    def judged(self, name: str) -> list[str]:
        """One."""
        return [f"{name}.png"]

    def write(self, folder: Path, prompt: Prompt, pixels: picture.PixelRows) -> None:
        """Two rows of two images."""
        picture.write_picture(folder / self.judged(prompt.name)[0], picture.sheet(pixels, 2, scale=1, gap=0))


LAYOUTS: Mapping[str, Layout] = {one.name: one for one in (GenEval(), DpgBench())}


ELSEWHERE = ("device", "versions", "weights")  # of a card: where it was made, and where the weights lie


def make(
    opened: RunFolder,
    layout: Layout,
    source: Path,
    folder: Path,
    *,
    nfe: Sequence[int] | None = None,
    seed: int | None = None,
    solver: str | None = None,
    bar: Bar = no_bar,
) -> list[Path]:
    """Make four images of each prompt of `source`, in a folder per number of passes; return those.

    Several ranks share the prompts. Raises UserError, before anything is written, for a file of other prompts, a run
    that makes no images or reads no texts, a solver or nfe out of reach, and a folder whose images were made otherwise.
    """
    file.check_writable(folder)
    prompts, sampler = read_prompts(source), opened.sampler
    if wrong := layout.unfit(prompts, source):
        raise UserError(f"{source}: {wrong}")
    sampler = with_options(sampler, nfe=nfe, seed=seed, solver=solver)
    c = prompted(sampler, [prompt.text for prompt in prompts]).repeat_interleave(EACH)
    kind, stem = sampler.spec.solver.kind, [source.stem, *said_of(opened, sampler.spec)]
    opened = replace(opened, run=opened.run.model_copy(update={"sample": sampler.spec}))
    notes: dict[Path, tuple[int, dict[str, Any]]] = {}
    for n in sampler.spec.nfe:
        place = folder / "-".join([layout.name, kind, f"nfe{n}", *stem])
        known = {"report": "-".join(["evaluation", layout.name, kind, *stem]) + ".json", "step": opened.step}
        judged = evaluate.with_options(opened, nfe=[n], seed=sampler.spec.seed)
        known |= {"card": card(judged, facts_of(layout, source, prompts), len(c)) | own_fields(layout, len(c))}
        notes[place] = n, known | {"prompts": {prompt.name: prompt.text for prompt in prompts}}
        require(place, known)
    for place, (n, known) in notes.items():
        missing = absent(layout, place, prompts)
        if dist.is_main():
            write_json(note(place), known)
        with bar(f"sampling, {kind} at {n}", EACH * len(missing)) as tick:
            for done, (i, pixels) in enumerate(made(sampler, c, n, missing[dist.rank() :: dist.world()]), 1):
                signals.check()
                layout.write(place, prompts[i], pixels)
                tick(min(done * dist.world(), len(missing)) * EACH, "")
    dist.barrier()
    return list(notes)


def made(sampler: Sampler, c: torch.Tensor, nfe: int, which: Sequence[int]) -> Iterator[tuple[int, picture.PixelRows]]:
    """The images of these prompts, prompt by prompt."""
    indices = [EACH * i + j for i in which for j in range(EACH)]
    if not indices:
        return
    turn, waiting = iter(which), list[torch.Tensor]()
    for part in sampler.batches(c, nfe=nfe, indices=indices):
        waiting += picture.to_rows(part.x)
        while len(waiting) >= EACH:
            yield next(turn), torch.stack(waiting[:EACH])
            del waiting[:EACH]


def absent(layout: Layout, place: Path, prompts: Sequence[Prompt]) -> list[int]:
    """The prompts some of whose files are missing, as rank 0 sees it, before any rank goes on."""
    if dist.is_main():
        for inside in {(place / name).parent for prompt in prompts for name in layout.files(prompt.name)}:
            file.sweep(inside)
    there = [all((place / name).is_file() for name in layout.files(prompt.name)) for prompt in prompts]
    return (~dist.gathered(torch.tensor(there))[0]).nonzero()[:, 0].tolist()


def facts_of(layout: Layout, source: Path, prompts: Sequence[Prompt]) -> dict[str, str]:
    """What measures images of these prompts."""
    return {
        "features": f"the evaluator of {layout.name}, as published",
        "reference": f"{len(prompts):,} prompts of {source.name}",
        "reference_sha256": digest.of_bytes(*(f"{prompt.name}\n{prompt.line}\n".encode() for prompt in prompts)),
        "rounding": "0 to 255",
    }


def own_fields(layout: Layout, total: int) -> Card:
    """The fields of a card in which a benchmark differs from the run's protocol."""
    return {
        "protocol": name_of(layout.name, *([f"{total} samples"] if total != EACH * layout.prompts else [])),
        "labels": f"{EACH} samples of each prompt, sample {EACH} i + j of the seed is image j of prompt i",
        "contrast": [],
    }


def note(place: Path) -> Path:
    """Where the card of a folder of images lies."""
    return place.parent / f"{place.name}.json"


def require(place: Path, known: Mapping[str, Any]) -> None:
    """Raise UserError where a folder holds images that were made otherwise, or nobody knows how."""
    if not place.exists():
        return
    way = "give another --out, or remove it"
    before = read_note(place, f"nothing says what made its images; {way}")["card"]
    now: Any = finite(known["card"])
    for field in (field for field in now if field not in ELSEWHERE and now[field] != before.get(field)):
        was, new = brief(before.get(field), 60), brief(now[field], 60)
        raise UserError(f"{place} holds images that were made otherwise ({field}: {was}, now {new}): {way}")


def read_note(place: Path, way_out: str) -> dict[str, Any]:
    """The card of a folder of images. Raises UserError for no such file, or a damaged one."""
    path = note(place)
    found = read_json(path, way_out)
    parts = {"report": str, "step": int, "card": dict, "prompts": dict}
    if not isinstance(found, dict) or not all(isinstance(found.get(part), kind) for part, kind in parts.items()):
        raise UserError(f"{path} is no card of images: {way_out}")
    return found
