"""Images of a benchmark's prompts, in the files that its evaluator reads, with their card.

`make_images` is the entrance, and `LAYOUTS` has the benchmarks by name. In this order `make_images`

1. reads the prompts, and checks that they are the benchmark's;
2. refuses a folder whose images were made otherwise;
3. removes what a killed run left half-written, writes a card for each folder, and makes the images that are missing.

Image j of prompt i is sample 4 i + j of the seed, whatever makes it and when. So images that exist are kept, and work
that was stopped resumes. The card lies next to the folder, FOLDER.json: the evaluator reads images alone, and its
scores stay with it, but they are worth no more than what is known of the images.

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
from dumo.evaluation.protocol import protocol_name
from dumo.io import digest, file, picture
from dumo.io.read import brief, null_nonfinite, read_json, write_json
from dumo.report import evaluate
from dumo.report.card import Card, make_card
from dumo.report.sample import sampling_changes, with_sampling_options
from dumo.run.prompt import conditions_of_prompts, edits_images
from dumo.run.sampler import Sampler
from dumo.run.weights import RunFolder
from dumo.runtime import dist, signals
from dumo.runtime.door import option
from dumo.runtime.progress import Bar, no_bar
from dumo.types import UserError

IMAGES_PER_PROMPT = 4  # in both benchmarks


class Layout(ABC):
    """The files of one benchmark."""

    name: ClassVar[str]
    num_prompts: ClassVar[int]  # that the benchmark has as published

    @abstractmethod
    def require_fit(self, prompts: Sequence[Prompt], source: Path) -> None:
        """Raise UserError where the prompts of the file or folder `source` are not this benchmark's."""

    @abstractmethod
    def files(self, name: str) -> list[str]:
        """The paths of a prompt's files, in the folder of all prompts; `name` is the prompt's."""

    @abstractmethod
    def write(self, folder: Path, prompt: Prompt, pixels: picture.PixelRows) -> None:
        """Write the images `pixels` (4, h, w, channels) of a prompt into a folder, each file whole or not at all."""


class _GenEval(Layout):
    """GenEval: a folder for each prompt."""

    name: ClassVar[str] = "geneval"
    num_prompts: ClassVar[int] = 553

    def require_fit(self, prompts: Sequence[Prompt], source: Path) -> None:
        """Raise UserError unless `source` is a .jsonl, each line of which has a tag."""
        fix = "give GenEval's prompts/evaluation_metadata.jsonl"
        if source.suffix.lower() != ".jsonl":
            raise UserError(f"{source}: is no .jsonl: {fix}")
        for number, prompt in enumerate(prompts, 1):
            if not isinstance(json.loads(prompt.line).get("tag"), str):
                raise UserError(f"{source}: prompt {number} has no tag: {fix}")

    def files(self, name: str) -> list[str]:
        """The paths of four samples, of the metadata that the evaluator reads, and of the grid."""
        samples = [f"{name}/samples/{j:04d}.png" for j in range(IMAGES_PER_PROMPT)]
        return [*samples, f"{name}/metadata.jsonl", f"{name}/grid.png"]

    def write(self, folder: Path, prompt: Prompt, pixels: picture.PixelRows) -> None:
        """Write the metadata, four samples, and the grid."""
        *samples, metadata, grid = self.files(prompt.name)
        # first, because the evaluator stops where a folder has none
        file.write(folder / metadata, prompt.line.encode())
        for name, image in zip(samples, pixels, strict=True):
            picture.write_picture(folder / name, Image.fromarray(image.numpy()))
        picture.write_picture(folder / grid, picture.sheet(pixels, 2, scale=1))


class _DpgBench(Layout):
    """DPG-Bench: a picture for each prompt."""

    name: ClassVar[str] = "dpg"
    num_prompts: ClassVar[int] = 1065

    def require_fit(self, prompts: Sequence[Prompt], source: Path) -> None:
        """Raise UserError unless `source` is a folder of prompts without a dot in their names.

        The evaluator reads names to their first dot.
        """
        if not source.is_dir():
            raise UserError(f"{source}: is no folder: give DPG-Bench's dpg_bench/prompts, a .txt for each prompt")
        for prompt in prompts:
            if "." in prompt.name:
                raise UserError(
                    f"{source}: {prompt.name}.txt: DPG-Bench reads names to their first dot: call it otherwise"
                )

    def files(self, name: str) -> list[str]:
        """The path of one picture."""
        return [f"{name}.png"]

    def write(self, folder: Path, prompt: Prompt, pixels: picture.PixelRows) -> None:
        """Write one picture, two rows of two images."""
        [name] = self.files(prompt.name)
        picture.write_picture(folder / name, picture.sheet(pixels, 2, scale=1, gap=0))


LAYOUTS: Mapping[str, Layout] = {layout.name: layout for layout in (_GenEval(), _DpgBench())}
# Fields of a card that say where images were made, and do not change them. `weights` is a path; their hash is compared.
PLACE_FIELDS = ("device", "versions", "weights")


def make_images(
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
    """Make four images of each prompt of `source`, in a folder for each number of passes; return the folders.

    Several ranks share the prompts. Raises UserError, before anything is written, for a file of other prompts, a run
    that makes no images or reads no texts, a solver or nfe out of reach, and a folder whose images were made otherwise.
    """
    # the prompts, and the conditions of their images
    file.check_writable(folder)
    prompts = read_prompts(source)
    layout.require_fit(prompts, source)
    sampler = with_sampling_options(opened.sampler, nfe=nfe, seed=seed, solver=solver)
    if edits_images(sampler.data):
        raise UserError(
            f"this run edits images, and {layout.name} has prompts alone: give {option('prompt')} and "
            f"{option('source')} instead"
        )
    c = conditions_of_prompts(sampler, [prompt.text for prompt in prompts]).repeat_interleave(IMAGES_PER_PROMPT)
    solver_kind = sampler.spec.solver.kind
    name_parts = [source.stem, *sampling_changes(opened, sampler.spec)]
    sampled_run = replace(opened, run=opened.run.model_copy(update={"sample": sampler.spec}))

    # a folder and a card for each number of passes
    cards: dict[int, Card] = {}
    image_folders: dict[int, Path] = {}
    for passes in sampler.spec.nfe:
        judged_run = evaluate.with_judging_options(sampled_run, nfe=[passes], seed=sampler.spec.seed)
        run_card = make_card(judged_run, _facts(layout, source, prompts), len(c))
        cards[passes] = run_card | _benchmark_fields(layout, len(c))
        image_folders[passes] = folder / "-".join([layout.name, solver_kind, f"nfe{passes}", *name_parts])
        _require_same_card(image_folders[passes], cards[passes])

    # the images that are missing
    for passes, image_folder in image_folders.items():
        if dist.is_main():
            _remove_half_written_files(layout, image_folder, prompts)
        missing = _missing_prompts(layout, image_folder, prompts)
        if dist.is_main():
            write_json(_card_file(image_folder), {"card": cards[passes]})
        with bar(f"sampling, {solver_kind} at {passes}", IMAGES_PER_PROMPT * len(missing)) as tick:
            missing_on_rank = missing[dist.rank() :: dist.world()]
            for done, (i, pixels) in enumerate(_images_by_prompt(sampler, c, passes, missing_on_rank), 1):
                signals.check()
                layout.write(image_folder, prompts[i], pixels)
                tick(min(done * dist.world(), len(missing)) * IMAGES_PER_PROMPT, "")  # other ranks are about as far
    dist.barrier()
    return list(image_folders.values())


def _images_by_prompt(
    sampler: Sampler, c: torch.Tensor, nfe: int, prompt_numbers: Sequence[int]
) -> Iterator[tuple[int, picture.PixelRows]]:
    """Yield each prompt's number and its images (4, h, w, channels), for the prompts of these numbers."""
    if not prompt_numbers:
        return
    indices: list[int] = []
    for i in prompt_numbers:
        first = IMAGES_PER_PROMPT * i
        indices += range(first, first + IMAGES_PER_PROMPT)
    remaining_numbers = iter(prompt_numbers)
    pending_images: list[torch.Tensor] = []  # a batch may end within a prompt
    for batch in sampler.batches(c, nfe=nfe, indices=indices):
        pending_images += picture.to_rows(batch.x)
        while len(pending_images) >= IMAGES_PER_PROMPT:
            yield next(remaining_numbers), torch.stack(pending_images[:IMAGES_PER_PROMPT])
            del pending_images[:IMAGES_PER_PROMPT]


def _remove_half_written_files(layout: Layout, image_folder: Path, prompts: Sequence[Prompt]) -> None:
    """Remove the temporary files that a killed run left in the folders of the prompts' files."""
    subfolders = {(image_folder / name).parent for prompt in prompts for name in layout.files(prompt.name)}
    for subfolder in subfolders:
        file.sweep(subfolder)


def _missing_prompts(layout: Layout, image_folder: Path, prompts: Sequence[Prompt]) -> list[int]:
    """The numbers of the prompts some of whose files are missing.

    Rank 0 decides, before any rank writes: every rank must call it.
    """
    is_complete: list[bool] = []
    for prompt in prompts:
        is_complete.append(all((image_folder / name).is_file() for name in layout.files(prompt.name)))
    is_complete_on_main = dist.all_gather(torch.tensor(is_complete))[0]
    return (~is_complete_on_main).nonzero()[:, 0].tolist()


def _facts(layout: Layout, source: Path, prompts: Sequence[Prompt]) -> dict[str, str]:
    """What a card says of the measure: the evaluator, and the prompts of `source`."""
    return {
        "features": f"the evaluator of {layout.name}, as published",
        "reference": f"{len(prompts):,} prompts of {source.name}",
        "reference_sha256": digest.of_bytes(*(f"{prompt.name}\n{prompt.line}\n".encode() for prompt in prompts)),
        "rounding": "0 to 255",
    }


def _benchmark_fields(layout: Layout, total: int) -> Card:
    """The fields of a card in which a benchmark of `total` images differs from the run's own protocol."""
    protocol = layout.name
    if total != IMAGES_PER_PROMPT * layout.num_prompts:
        protocol = protocol_name(layout.name, f"{total} samples")
    return {
        "protocol": protocol,
        "labels": (
            f"{IMAGES_PER_PROMPT} samples of each prompt, "
            f"sample {IMAGES_PER_PROMPT} i + j of the seed is image j of prompt i"
        ),
        "contrast": [],
    }


def _card_file(image_folder: Path) -> Path:
    """The file of the card of a folder of images."""
    return image_folder.parent / f"{image_folder.name}.json"


def _require_same_card(image_folder: Path, card: Card) -> None:
    """Raise UserError where a folder holds images of another card, or of none."""
    if not image_folder.exists():
        return
    fix = "give another --out, or remove it"
    path = _card_file(image_folder)
    stored = read_json(path, f"nothing says what made its images; {fix}")
    if not isinstance(stored, dict) or not isinstance(stored.get("card"), dict):
        raise UserError(f"{path} is no card of images: nothing says what made them; {fix}")
    stored_card: dict[str, Any] = stored["card"]
    for field in dict.fromkeys([*card, *stored_card]):  # a field that only one of them has differs, too
        value = null_nonfinite(card.get(field))
        stored_value = stored_card.get(field)
        if field not in PLACE_FIELDS and value != stored_value:
            raise UserError(
                f"{image_folder} holds images that were made otherwise "
                f"({field}: {brief(stored_value, 60)}, now {brief(value, 60)}): {fix}"
            )
