"""Samples of a run, made, decoded and written."""

import csv
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dumo.config.check import check_guided
from dumo.config.conditions import Conditions, shown
from dumo.config.error import require_known
from dumo.config.load import parse
from dumo.config.tree import Sampling
from dumo.data import Data, Images
from dumo.data.pixel import Size
from dumo.data.written import NAMES, TABLES
from dumo.flow.guide import CFG, GuidanceScale
from dumo.flow.solver import Solver, check
from dumo.io import file as files
from dumo.io import picture
from dumo.io.read import brief
from dumo.report.name import changes, own, sampling, word
from dumo.run.prompt import names, prompted
from dumo.run.sampler import Sampler
from dumo.run.weights import RunFolder
from dumo.runtime import dist, threads
from dumo.runtime.progress import Bar, no_bar, teller
from dumo.types import Sample, UserError


def turned(c: Tensor, count: int) -> Tensor:
    """These conditions in turn, `count` in all."""
    return c[torch.arange(count) % len(c)]


def solver_of(spec: Sampling, name: str | None) -> Solver:
    """The spec's own solver, or the one of this name, with its defaults. Raises UserError for an unknown name."""
    if name in (None, spec.solver.kind):
        return spec.solver
    return parse(Sampling, {"solver": {"kind": name}}).solver


def guide_of(sampler: Sampler, trained: GuidanceScale, scale: object) -> CFG:
    """The sampler's guidance by another scale, as a user gave it, of a net that `trained` guided in training.

    Raises UserError where it is none, or the net cannot be guided.
    """
    tree = sampler.spec.guide.model_dump() | {"scale": scale}
    try:
        guide = parse(Sampling, {**sampler.spec.model_dump(mode="json"), "guide": tree}).guide
        check_guided(guide, sampler.data, sampler.objective, trained, name="guide")
    except UserError as error:
        raise UserError(str(error).replace("guide.scale", "guidance")) from error
    return guide


def with_options(
    sampler: Sampler,
    *,
    nfe: Sequence[int] | None = None,
    seed: int | None = None,
    solver: str | None = None,
    size: str | None = None,
) -> Sampler:
    """The sampler with other defaults. Raises UserError for passes, a solver or a size out of reach."""
    chosen, passes = solver_of(sampler.spec, solver), tuple(nfe or sampler.spec.nfe)
    check(chosen, sampler.taught, *passes)
    update = {"solver": chosen, "nfe": passes, "seed": sampler.spec.seed if seed is None else seed}
    return replace(sampler, spec=sampler.spec.model_copy(update=update), size=size_of(sampler.data, size))


def size_of(data: Data, text: str | None) -> Size | None:
    """'320x192', width and height in pixels, as one of the data's buckets; None: the square.

    Raises UserError for another size than the net was trained on.
    """
    images = shown(data)
    sizes = images.sizes or (images.shape[1:],) if isinstance(images, Images) else ()
    there = {f"{width}x{height}": (height, width) for height, width in sizes}
    if text is not None and text not in there:
        what = f"it is {', '.join(there)}" if there else f"data '{data.kind}' have no sizes"
        raise UserError(f"size {brief(text, 40)}, width x height, is none that the net was trained on: {what}")
    return None if text is None else there[text]


COUNT = 100  # samples, if no other number is asked for
FORMS = ("grid", "images", "npz")
SCATTERED = 4000  # points of the data behind a scatter of samples


def export(
    opened: RunFolder,
    folder: Path,
    *,
    form: str = "grid",
    count: int = COUNT,
    only: Sequence[int] | None = None,
    prompts: Sequence[str] = (),
    source: Path | None = None,
    nfe: Sequence[int] | None = None,
    seed: int | None = None,
    solver: str | None = None,
    size: str | None = None,
    bar: Bar = no_bar,
) -> list[Path]:
    """Make samples and write them: a sheet, an image each, or an .npz in ADM's layout, per number of passes.

    Names say the solver, the passes, and whatever is not as the run has it. Returns what was written. Raises UserError,
    before anything is, for a form, label, solver, size or nfe out of reach, and OSError where nothing can be.
    """
    files.check_writable(folder)
    files.sweep(folder)
    sampler = with_options(opened.sampler, nfe=nfe, seed=seed, solver=solver, size=size)
    require_known("--format", form, FORMS)
    forms = FORMS if sampler.is_image else ("grid", "npz")
    if form not in forms:
        raise UserError(f"format '{form}' does not hold samples of shape {sampler.pixels}: use {', '.join(forms)}")
    way = "ask for fewer, and for others with another --seed"
    dist.require_memory(count * prod(sampler.pixels) * torch.float32.itemsize, f"{count:,} samples take", way)
    c = turned(prompted(sampler, prompts, source), count) if prompts else sampler.conditions.in_turn(count, only)
    said = said_of(opened, sampler.spec)
    said += [word("labels", only)] if only else []
    said += [word("prompts", list(prompts))] if prompts else []
    said += [word("source", source.name)] if source else []
    said += [word("size", size)] if size else []
    said += [word("count", count)] if count != (len(prompts) or COUNT) else []
    written: list[Path] = []
    with threads.fewer_when_busy(sampler.device, teller(bar)):
        for n in sampler.spec.nfe:
            made = sampler.sample(c, nfe=n, bar=bar)
            if not dist.is_main():
                continue
            stem = folder / "-".join([sampler.spec.solver.kind, f"nfe{n}", *said])
            written.append(write(made.x, c, stem, form, sampler.data, sampler.spec.seed, names(sampler, c)))
    return written


def said_of(opened: RunFolder, spec: Sampling) -> list[str]:
    """What of a sampling is not the run's own, but for the solver's kind, as parts of a name."""
    before = {**sampling(own(opened.folder).sample), "solver.kind": spec.solver.kind}  # every name begins with it
    return changes(opened, before, sampling(spec))


def titles(c: Tensor, conditions: Conditions, names: Sequence[str] | None = None) -> dict[str, Any]:
    """How many columns a sheet of these classes has, and what is written above them, or above each image.

    A column holds one class where classes come in turn and are few, and every image says its own elsewhere.
    """
    if not conditions.count:
        return {"columns": 8}
    names = names or [conditions.name(k) for k in c.tolist()]
    turn, most = len(set(names)), 20 if shown(conditions.data).shape[-1] <= picture.READABLE else 10
    columns = min(turn * max(1, 8 // turn) if turn <= most else 10, len(names))
    in_turn = all(name == names[i % columns] for i, name in enumerate(names))
    return {"columns": columns, "titles": names[:columns] if in_turn else names}


def write(
    x: Sample, c: Tensor, stem: Path, form: str, data: Data, seed: int, names: Sequence[str] | None = None
) -> Path:
    """One set of samples as one file, or one folder of files; `names` of the conditions, where the data have others.

    Single images of captions have a table of them, which `data.images.captions` reads.

    Points are drawn before some of the data, chosen by `seed`.
    """
    points = len(shown(data).shape) == 1
    match form:
        case "images":
            picture.write_singles(stem, picture.to_rows(x))
            if names and Conditions(data).captions:
                write_captions(stem, names)
            return stem
        case "npz":
            path = stem.with_name(f"{stem.name}.npz")
            picture.write_points(path, x, c) if points else picture.write_adm(path, picture.to_rows(x), c)
            return path
        case _:
            path = stem.with_name(f"{stem.name}.png")
            sheet = (
                picture.scatter(data.open().reference(SCATTERED, seed)[0], {stem.name: x})
                if points
                else picture.sheet(picture.to_rows(x), **titles(c, Conditions(data), names))
            )
            picture.write_picture(path, sheet)
            return path


def write_captions(folder: Path, texts: Sequence[str]) -> None:
    """Write metadata.csv of the images in a folder, as `picture.write_singles` numbers them."""
    rows = StringIO()
    table = csv.writer(rows)
    table.writerow(("file_name", NAMES[0]))
    table.writerows((f"{i:06d}.png", text) for i, text in enumerate(texts))
    files.write(folder / TABLES[0], rows.getvalue().encode())
