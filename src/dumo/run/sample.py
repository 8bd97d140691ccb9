"""Samples of a run, made, decoded and written."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dumo.data import Moons
from dumo.flow import generate
from dumo.flow.reading import reading
from dumo.flow.solver import Solver, check
from dumo.io import file as files
from dumo.io import picture
from dumo.io.source import Source
from dumo.run.config.load import parse
from dumo.run.config.spec import Run
from dumo.run.config.tree import Sampling
from dumo.run.folder import RunFolder
from dumo.run.name import changes, own, sampling, word
from dumo.run.prompt import highest, names, prompted
from dumo.runtime import dist, memory
from dumo.runtime.progress import Bar, no_bar
from dumo.types import Reads, Sample, UserError


def real_data(run: Run) -> Source:
    """The data as images or points with their classes: of latents, the images that were encoded. Raises as opening."""
    return run.data.open() if isinstance(run.data, Moons) else run.data.originals()


def conditions(run: Run, count: int, only: Sequence[int] | None = None) -> Tensor:
    """The conditions of `count` samples: `only` these in turn; None: all classes in turn, or captions of them.

    Raises UserError for one out of range, or no samples.
    """
    if only:
        return generate.labels(count, run.data.classes, only)
    return run.conditions(generate.labels(count, run.data.labels))


def turned(c: Tensor, count: int) -> Tensor:
    """These conditions in turn, `count` in all."""
    return c[torch.arange(count) % len(c)]


def guided_reading(opened: RunFolder) -> Reads:
    """The net as it is sampled: with the run's knobs and guidance."""
    run = opened.run
    return run.sample.guide(reading(run.objective, opened.net, run.sample.knobs), run.data.classes)


def sample_batches(
    opened: RunFolder,
    *,
    nfe: int,
    c: Tensor,
    seed: int | None = None,
    solver: Solver | None = None,
    indices: Sequence[int] | None = None,
) -> Iterator[generate.Batch]:
    """One sample per row of c, decoded, batch by batch: those numbered `indices`, or this rank's share of all.

    Image i always comes from stream (seed, i). Raises UserError for a class out of range, and as the solver does.
    """
    run = opened.run
    check_classes(c, run.data.classes, highest(opened))
    some = range(dist.rank(), len(c), dist.world()) if indices is None else indices
    parts = generate.batches(
        opened.net,
        guided_reading(opened),
        run.path,
        solver or run.sample.solver,
        c[torch.tensor(some, dtype=torch.long)],
        nfe=nfe,
        seed=run.sample.seed if seed is None else seed,
        shape=run.data.shape,
        indices=some,
        device=opened.device,
        precision=run.precision,
    )
    return (replace(part, x=opened.decode(part.x)) for part in parts)


def sample(
    opened: RunFolder,
    *,
    nfe: int,
    c: Tensor,
    seed: int | None = None,
    solver: Solver | None = None,
    bar: Bar = no_bar,
) -> generate.Samples:
    """One sample per class of c, decoded, image i always from stream (seed, i). Raises as `sample_batches`.

    Several ranks share the work, each must call it, and all of them get all samples.
    """
    solver, mine, done = solver or opened.run.sample.solver, list[generate.Batch](), 0
    with bar(f"sampling, {solver.kind} at {nfe}", len(c)) as tick:
        for part in sample_batches(opened, nfe=nfe, c=c, seed=seed, solver=solver):
            mine.append(part)
            done += len(part.x) * dist.world()
            tick(min(done, len(c)), "")
    return shared(mine, opened.run.pixels)


def shared(mine: Sequence[generate.Batch], pixels: Sequence[int]) -> generate.Samples:
    """What all ranks made, in the order of their numbers; some may have made none. Every rank must call it."""
    index = torch.cat([torch.zeros(0, dtype=torch.long), *(part.index for part in mine)])
    x = torch.cat([torch.zeros(0, *pixels), *(part.x for part in mine)])
    passes = torch.tensor([part.nfe for part in mine], dtype=torch.long)
    index, x, passes = (torch.cat(dist.gathered(one)) for one in (index, x, passes))
    return generate.Samples(x[index.argsort()], int(passes.unique().item()))


def check_classes(c: Tensor, classes: int, highest: int) -> None:
    """Raise UserError for a class outside [0, classes], of which the last means no class, and behind all prompts."""
    wrong = c[(c < 0) | (c > highest)]
    if len(wrong):
        there = (
            f"classes run from 0 to {classes - 1}, {classes} is no class"
            if classes
            else "these data have none, so c is 0"
        )
        raise UserError(f"class {int(wrong[0])} is out of range: {there}")


def solver_named(run: Run, name: str | None) -> Solver:
    """The run's own solver, or the one of this name, with its defaults. Raises UserError for an unknown name."""
    if name in (None, run.sample.solver.kind):
        return run.sample.solver
    return parse(Sampling, {"solver": {"kind": name}}).solver


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
    nfe: Sequence[int] | None = None,
    seed: int | None = None,
    solver: str | None = None,
    bar: Bar = no_bar,
) -> list[Path]:
    """Make samples and write them: a sheet, an image each, or an .npz in ADM's layout, per number of passes.

    Names say the solver, the passes, and whatever is not as the run has it. Returns what was written. Raises UserError,
    before anything is, for a form, label, solver or nfe out of reach, and OSError where nothing can be.
    """
    files.check_writable(folder)
    files.sweep(folder)
    run, shape = opened.run, opened.run.pixels
    forms = FORMS if len(shape) == 3 else ("grid", "npz")
    if form not in forms:
        raise UserError(f"format '{form}' does not hold samples of shape {shape}: use {', '.join(forms)}")
    way = "ask for fewer, and for others with another --seed"
    memory.require(count * prod(shape) * torch.float32.itemsize, f"{count:,} samples take", way)
    opened, said = with_options(opened, nfe=nfe, seed=seed, solver=solver)
    c = turned(prompted(opened, prompts), count) if prompts else conditions(run, count, only)
    chosen, passes = opened.run.sample.solver, opened.run.sample.nfe
    said += [word("labels", only)] if only else []
    said += [word("prompts", list(prompts))] if prompts else []
    said += [word("count", count)] if count != (len(prompts) or COUNT) else []
    written: list[Path] = []
    for n in passes:
        made = sample(opened, nfe=n, c=c, bar=bar)
        if not dist.is_main():
            continue
        written.append(
            write(made.x, c, folder / "-".join([chosen.kind, f"nfe{n}", *said]), form, run, names(opened, c))
        )
    return written


def with_options(
    opened: RunFolder, *, nfe: Sequence[int] | None = None, seed: int | None = None, solver: str | None = None
) -> tuple[RunFolder, list[str]]:
    """The run as it is to be sampled, and what of that is not its own, but for the solver's kind, as parts of a name.

    Raises UserError for passes or a solver out of reach.
    """
    run, chosen = opened.run, solver_named(opened.run, solver)
    passes, seed = tuple(nfe or run.sample.nfe), run.sample.seed if seed is None else seed
    check(chosen, run.reads, *passes)
    sampling_ = run.sample.model_copy(update={"solver": chosen, "nfe": passes, "seed": seed})
    opened = replace(opened, run=run.model_copy(update={"sample": sampling_}))
    before = {**sampling(own(opened)), "solver.kind": chosen.kind}  # every name begins with it
    return opened, changes(opened, before, sampling(opened.run))


def titles(c: Tensor, run: Run, names: Sequence[str] | None = None) -> dict[str, Any]:
    """How many columns a sheet of these classes has, and what is written above them, or above each image.

    A column holds one class where classes come in turn and are few, and every image says its own elsewhere.
    """
    if not run.data.classes:
        return {"columns": 8}
    names = names or [run.class_name(k) for k in c.tolist()]
    turn, most = len(set(names)), 20 if run.pixels[-1] <= picture.READABLE else 10
    columns = min(turn * max(1, 8 // turn) if turn <= most else 10, len(names))
    in_turn = all(name == names[i % columns] for i, name in enumerate(names))
    return {"columns": columns, "titles": names[:columns] if in_turn else names}


def write(x: Sample, c: Tensor, stem: Path, form: str, run: Run, names: Sequence[str] | None = None) -> Path:
    """One set of samples as one file, or one folder of files; `names` of the conditions, where the run has others."""
    points = len(run.pixels) == 1
    match form:
        case "images":
            picture.write_singles(stem, picture.to_rows(x))
            return stem
        case "npz":
            path = stem.with_name(f"{stem.name}.npz")
            picture.write_points(path, x, c) if points else picture.write_adm(path, picture.to_rows(x), c)
            return path
        case _:
            path = stem.with_name(f"{stem.name}.png")
            sheet = (
                picture.scatter(run.data.open().reference(SCATTERED, run.sample.seed)[0], {stem.name: x})
                if points
                else picture.sheet(picture.to_rows(x), **titles(c, run, names))
            )
            picture.write_picture(path, sheet)
            return path
