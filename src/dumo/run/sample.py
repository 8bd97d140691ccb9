"""Samples of a run, made, decoded and written."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dumo import dist
from dumo.config.load import parse
from dumo.config.spec import Run
from dumo.config.tree import Sampling
from dumo.data import Latents
from dumo.data.source import Source
from dumo.flow.reading import reading
from dumo.io import archive, picture
from dumo.progress import Bar, no_bar
from dumo.run.folder import RunFolder
from dumo.run.name import changes, own, sampling, word
from dumo.sampling import generate
from dumo.sampling.solver import Solver, check
from dumo.types import Reads, Sample, UserError


def real_data(run: Run) -> Source:
    """The data as images or points: of latents, the images that were encoded. Raises UserError as opening them does."""
    return run.data.images.open() if isinstance(run.data, Latents) else run.data.open()


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
    check_classes(c, run.data.classes)
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
    """One sample per class of c, decoded, image i always from stream (seed, i). Raises as `sample_batches`."""
    solver = solver or opened.run.sample.solver
    with bar(f"sampling, {solver.kind} at {nfe}", len(c)) as tick:
        parts = sample_batches(opened, nfe=nfe, c=c, seed=seed, solver=solver, indices=range(len(c)))
        return generate.joined(parts, lambda count: tick(count, ""))


def check_classes(c: Tensor, classes: int) -> None:
    """Raise UserError for a class outside [0, classes]; that of this number means no class."""
    wrong = c[(c < 0) | (c > classes)]
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
    nfe: Sequence[int] | None = None,
    seed: int | None = None,
    solver: str | None = None,
    bar: Bar = no_bar,
) -> list[Path]:
    """Make samples and write them: a sheet, an image each, or an .npz in ADM's layout, per number of passes.

    Names say the solver, the passes, and whatever is not as the run has it. Returns what was written. Raises UserError,
    before anything is, for a form, label, solver or nfe out of reach.
    """
    run, shape = opened.run, opened.run.pixels
    forms = FORMS if len(shape) == 3 else ("grid", "npz")
    if form not in forms:
        raise UserError(f"format '{form}' is none for samples of shape {shape}: use {', '.join(forms)}")
    c, nfe = generate.labels(count, run.data.classes, only), tuple(nfe or run.sample.nfe)
    chosen = solver_named(run, solver)
    check(chosen, run.reads, *nfe)
    asked = run.sample.model_copy(update={"solver": chosen, "seed": run.sample.seed if seed is None else seed})
    opened = replace(opened, run=run.model_copy(update={"sample": asked}))
    before = {**sampling(own(opened)), "solver.kind": chosen.kind}  # every name begins with it
    said = changes(opened, before, sampling(opened.run))
    said += [word("labels", only)] if only else []
    said += [word("count", count)] if count != COUNT else []
    files: list[Path] = []
    for n in nfe:
        made = sample(opened, nfe=n, c=c, bar=bar)
        files.append(write(made.x, c, folder / "-".join([chosen.kind, f"nfe{n}", *said]), form, run))
    return files


def write(x: Sample, c: Tensor, stem: Path, form: str, run: Run) -> Path:
    """One set of samples as one file, or one folder of files."""
    points = len(run.pixels) == 1
    match form:
        case "images":
            archive.write_singles(stem, picture.to_rows(x))
            return stem
        case "npz":
            path = stem.with_name(f"{stem.name}.npz")
            archive.write_points(path, x, c) if points else archive.write_adm(path, picture.to_rows(x), c)
            return path
        case _:
            path = stem.with_name(f"{stem.name}.png")
            sheet = (
                picture.scatter(run.data.open().reference(SCATTERED, run.sample.seed)[0], {stem.name: x})
                if points
                else picture.sheet(picture.to_rows(x), max(run.data.classes, 8))
            )
            archive.write_picture(path, sheet)
            return path
