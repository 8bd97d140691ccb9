"""Samples of a run: made, decoded and written, as one picture, as files, or as an archive.

`sample_to_files` does all of it for `dumo sample`. `with_sampling_options`, `chosen_solver`, `guide_of` and `size_of`
apply what a user asked for.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dumo.config.conditions import shown_data
from dumo.config.fit import check_guidance
from dumo.config.load import parse
from dumo.config.spec import Sampling
from dumo.data import Data, Images
from dumo.data.pixel import Size
from dumo.flow.guide import CFG, GuidanceScale
from dumo.flow.solver import Solver, check
from dumo.report.name import changed_parts, name_part, sampling_fields
from dumo.run.prompt import conditions_of_prompts, names_of_conditions
from dumo.run.sample_files import write_samples
from dumo.run.sampler import Sampler
from dumo.run.weights import OpenedRun
from dumo.runtime import dist
from dumo.runtime.progress import Bar, no_bar
from dumo.types import UserError

DEFAULT_COUNT = 100


def repeat_conditions(c: Tensor, count: int) -> Tensor:
    """The conditions c (n,) in turn, again and again: (count,)."""
    return c[torch.arange(count) % len(c)]


def require_count(count: int, conditions: Sequence[object], noun: str) -> None:
    """Raise UserError if `count` samples leave out some of the conditions that a user gave, `noun`."""
    if count < len(conditions):
        raise UserError(f"count = {count} is less than the {len(conditions)} {noun}: raise count, or give fewer {noun}")


def chosen_solver(spec: Sampling, solver: Solver | str | None) -> Solver:
    """The spec's own solver if `solver` is None or its name; of another name that with its defaults; else `solver`.

    Raises UserError for an unknown name.
    """
    if solver in (None, spec.solver.kind):
        return spec.solver
    if not isinstance(solver, str):
        return solver
    return parse(Sampling, {"solver": {"kind": solver}}).solver


def guide_of(sampler: Sampler, training_guidance: GuidanceScale, scale: object) -> CFG:
    """The sampler's guidance with another scale, as a user gave it.

    Raises UserError where it is no scale, or the net cannot be guided.
    """
    guide_fields = sampler.spec.guide.model_dump()
    guide_fields["scale"] = scale
    sampling_fields = sampler.spec.model_dump(mode="json")
    sampling_fields["guide"] = guide_fields
    try:
        guide = parse(Sampling, sampling_fields).guide
    except UserError as error:
        raise UserError(str(error).replace("guide.scale", "guidance")) from error  # as the user knows it
    check_guidance(guide, sampler.data, sampler.flow.objective, training_guidance, "guidance")
    return guide


def with_sampling_options(
    sampler: Sampler,
    *,
    nfe: Sequence[int] | None,
    seed: int | None,
    solver: Solver | str | None,
    size: str | None = None,
) -> Sampler:
    """The sampler with what a user asked for; None leaves what the run has.

    Raises UserError for passes, a solver or a size that the net cannot make.
    """
    solver_spec = chosen_solver(sampler.spec, solver)
    passes = tuple(nfe or sampler.spec.nfe)
    check(solver_spec, sampler.available_readings, *passes)
    if seed is None:
        seed = sampler.spec.seed
    spec = sampler.spec.model_copy(update={"solver": solver_spec, "nfe": passes, "seed": seed})
    return replace(sampler, spec=spec, size=size_of(sampler.data, size))


def size_of(data: Data, text: str | None) -> Size | None:
    """The height and width that a text such as '320x192', width x height in pixels, asks for; None: the square.

    Raises UserError for a size that the net was not trained on.
    """
    if text is None:
        return None
    images = shown_data(data)
    trained_sizes = ()
    if isinstance(images, Images):
        trained_sizes = images.sizes or (images.shape[1:],)
    size_by_text = {f"{width}x{height}": (height, width) for height, width in trained_sizes}
    if text in size_by_text:
        return size_by_text[text]
    sizes = ", ".join(size_by_text) or "none, as its data are no images"
    raise UserError(f"the network was not trained on size {text} (width x height): choose one of its sizes, {sizes}")


def sample_to_files(
    opened: OpenedRun,
    folder: Path,
    *,
    form: str = "grid",
    count: int = DEFAULT_COUNT,
    only: Sequence[int] | None = None,
    prompts: Sequence[str] = (),
    source: Path | None = None,
    nfe: Sequence[int] | None = None,
    seed: int | None = None,
    solver: Solver | str | None = None,
    size: str | None = None,
    bar: Bar = no_bar,
) -> list[Path]:
    """Make `count` samples for each number of passes, write them, and return the paths.

    - `form`: grid, a sheet; images, a file each; npz, an archive in ADM's layout
    - `only`: classes, in turn; `prompts`: texts, in turn; `source`: an image that prompts edit
    - `nfe`, `seed`, `solver`, `size`: None: as the run has them

    A file's name says the solver, the passes, and what is not as the run has it. Raises UserError, before anything is
    written, for an option that the run cannot use.
    """
    require_count(count, prompts, "prompts")
    require_count(count, only or (), "labels")
    sampler = with_sampling_options(opened.sampler, nfe=nfe, seed=seed, solver=solver, size=size)
    if form == "images" and not sampler.is_image:
        raise UserError(f"format 'images' cannot hold points of shape {sampler.pixels}: use grid or npz")
    if prompts:
        c = repeat_conditions(conditions_of_prompts(sampler, prompts, source), count)
    else:
        c = sampler.conditions.in_turn(count, only)

    # Name the files after what is not as the run has it.
    name_parts = sampling_changes(opened, sampler.spec)
    if only:
        name_parts.append(name_part("labels", only))
    if prompts:
        name_parts.append(name_part("prompts", list(prompts), json.dumps(list(prompts)).encode()))
    if source:
        name_parts.append(name_part("source", source.name, source.read_bytes()))
    if size:
        name_parts.append(name_part("size", size))
    default_count = len(prompts) or DEFAULT_COUNT
    if count != default_count:
        name_parts.append(name_part("count", count))

    written: list[Path] = []
    for passes in sampler.spec.nfe:
        rows = sampler.file_rows(c, nfe=passes, bar=bar)
        if dist.is_main():
            stem = folder / "-".join([sampler.spec.solver.kind, f"nfe{passes}", *name_parts])
            condition_names = names_of_conditions(sampler, c)
            written.append(write_samples(rows, c, stem, form, sampler.data, sampler.spec.seed, condition_names))
        # Free them before the next ones are made.
        del rows
    return written


def sampling_changes(opened: OpenedRun, spec: Sampling) -> list[str]:
    """The parts of a name that say in which fields `spec` differs from the run's own sampling.

    The solver's kind is none of them, for every name begins with it.
    """
    run_fields = sampling_fields(opened.run_as_saved.sample)
    run_fields["solver.kind"] = spec.solver.kind
    return changed_parts(opened, run_fields, sampling_fields(spec))
