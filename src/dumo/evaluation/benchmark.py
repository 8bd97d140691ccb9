"""Images of a benchmark's prompts, in the files that its evaluator reads (`dumo.evaluation.layout`), with their card.

Image j of prompt i is sample 4 i + j of the seed, whoever makes it and when. So what stands is kept, and a work that
was stopped goes on. The card lies beside the folder, FOLDER.json: its own evaluator needs no more than images, but what
it finds (`dumo.evaluation.verdict`) is worth no more than what is known of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dumo import dist, stop
from dumo.evaluation.card import Card, card
from dumo.evaluation.evaluate import asked as judged_as
from dumo.evaluation.layout import EACH, Layout
from dumo.io import digest, file, picture
from dumo.io.json import finite, read_json, write_json
from dumo.io.text import brief
from dumo.progress import Bar, no_bar
from dumo.protocols.evaluator import named
from dumo.run.folder import RunFolder
from dumo.run.prompt import prompted
from dumo.run.sample import asked, sample_batches
from dumo.texts.prompt import Prompt, read_prompts
from dumo.types import UserError

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
    prompts, shape = read_prompts(source), opened.run.pixels
    layout.check(prompts, source)
    if len(shape) != 3:
        raise UserError(f"{opened.folder} makes points of shape {shape}, not images: there is nothing to show")
    opened, said = asked(opened, nfe=nfe, seed=seed, solver=solver)
    c = prompted(opened, [prompt.text for prompt in prompts]).repeat_interleave(EACH)
    kind, stem = opened.run.sample.solver.kind, [source.stem, *said]
    notes: dict[Path, tuple[int, dict[str, Any]]] = {}
    for n in opened.run.sample.nfe:
        place = folder / "-".join([layout.name, kind, f"nfe{n}", *stem])
        told = {"report": "-".join(["evaluation", layout.name, kind, *stem]) + ".json", "step": opened.step}
        told |= {"card": card_of(opened, layout, source, prompts, n)}
        notes[place] = n, told | {"prompts": {prompt.name: prompt.text for prompt in prompts}}
        require(place, told)
    for place, (n, told) in notes.items():
        missing = absent(layout, place, prompts)
        if dist.is_main():
            write_json(note(place), told)
        with bar(f"sampling, {kind} at {n}", EACH * len(missing)) as tick:
            for done, (i, pixels) in enumerate(made(opened, c, n, missing[dist.rank() :: dist.world()]), 1):
                stop.check()
                layout.write(place, prompts[i], pixels)
                tick(min(done * dist.world(), len(missing)) * EACH, "")
    dist.barrier()
    return list(notes)


def made(opened: RunFolder, c: torch.Tensor, nfe: int, which: Sequence[int]) -> Iterator[tuple[int, picture.PixelRows]]:
    """The images of these prompts, prompt by prompt."""
    indices = [EACH * i + j for i in which for j in range(EACH)]
    if not indices:
        return
    turn, waiting = iter(which), list[torch.Tensor]()
    for part in sample_batches(opened, nfe=nfe, c=c, seed=opened.run.sample.seed, indices=indices):
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


def card_of(opened: RunFolder, layout: Layout, source: Path, prompts: Sequence[Prompt], nfe: int) -> Card:
    """What images of these prompts depend on."""
    total = EACH * len(prompts)
    facts = {
        "features": f"the evaluator of {layout.name}, as published",
        "reference": f"{len(prompts):,} prompts of {source.name}",
        "reference_sha256": digest.of_bytes(*(f"{prompt.name}\n{prompt.line}\n".encode() for prompt in prompts)),
        "rounding": "0 to 255",
    }
    as_sampled = judged_as(opened, nfe=[nfe], seed=opened.run.sample.seed)
    changed = {
        "protocol": named(layout.name, total, EACH * layout.prompts),
        "labels": f"{EACH} samples of each prompt, sample {EACH} i + j of the seed is image j of prompt i",
        "contrast": [],
    }
    return card(as_sampled, facts, total) | changed


def note(place: Path) -> Path:
    """Where the card of a folder of images lies."""
    return place.parent / f"{place.name}.json"


def require(place: Path, told: Mapping[str, Any]) -> None:
    """Raise UserError where a folder holds images that were made otherwise, or nobody knows how."""
    if not place.exists():
        return
    way = "give another --out, or remove it"
    before = read_note(place, way)["card"] if note(place).is_file() else None
    if before is None:
        raise UserError(f"{place} is there, and no {note(place).name} beside it says what made its images: {way}")
    now: Any = finite(told["card"])
    for field in (field for field in now if field not in ELSEWHERE and now[field] != before.get(field)):
        was, new = brief(before.get(field), 60), brief(now[field], 60)
        raise UserError(f"{place} holds images that were made otherwise ({field}: {was}, now {new}): {way}")


def read_note(place: Path, way_out: str) -> dict[str, Any]:
    """What stands beside a folder of images. Raises UserError for no such file, or a damaged one."""
    path = note(place)
    try:
        found = read_json(path, way_out)
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there: {way_out}") from error
    parts = {"report": str, "step": int, "card": dict, "prompts": dict}
    if not isinstance(found, dict) or not all(isinstance(found.get(part), kind) for part, kind in parts.items()):
        raise UserError(f"{path} is no card of images: {way_out}")
    return found
