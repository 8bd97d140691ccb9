"""Samples of a run: made, decoded and written, as one picture, as files, or as an archive.

`sample_to_files` does all of it for `dumo sample`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from dumo.config.spec import Run, Sampling
from dumo.flow.solver import Solver, check
from dumo.report.name import changed_parts, name_part, sampling_fields
from dumo.run.trained import DEFAULT_COUNT, TrainedRun, choose_solver, parse_size
from dumo.run.write_samples import write_samples
from dumo.runtime import dist
from dumo.runtime.progress import Bar, no_bar
from dumo.types import UserError


def sampling_settings(
    run: Run, *, nfe: Sequence[int] | None, seed: int | None, solver: Solver | str | None
) -> Sampling:
    """How a user asked for samples; None is as the run has it.

    Raises UserError for passes or a solver that the network cannot make.
    """
    chosen_solver = choose_solver(run.sample, solver)
    passes = tuple(nfe or run.sample.nfe)
    check(chosen_solver, run.readings, *passes)
    if seed is None:
        seed = run.sample.seed
    return run.sample.model_copy(update={"solver": chosen_solver, "nfe": passes, "seed": seed})


def sample_to_files(
    trained: TrainedRun,
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
    data = trained.spec.data
    spec = sampling_settings(trained.spec, nfe=nfe, seed=seed, solver=solver)
    height_width = parse_size(data, size)
    if form == "images" and not trained.makes_images:
        raise UserError(f"format 'images' cannot hold points of shape {trained.spec.shown_shape}: use grid or npz")
    c = trained.conditions(only, count, prompts=prompts or None, source=source)

    # Name the files after what is not as the run has it.
    name_parts = sampling_changes(trained, spec)
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
    for passes in spec.nfe:
        rows = trained.make_file_rows(c, nfe=passes, seed=spec.seed, solver=spec.solver, size=height_width, bar=bar)
        if dist.is_main():
            stem = folder / "-".join([spec.solver.kind, f"nfe{passes}", *name_parts])
            names = trained.names_of_conditions(c)
            written.append(write_samples(rows, c, stem, form, data, spec.seed, names))
        # Free them before the next ones are made.
        del rows
    return written


def sampling_changes(trained: TrainedRun, spec: Sampling) -> list[str]:
    """Return the parts of a name that say in which fields `spec` differs from the run's own sampling.

    The solver's kind is none of them, for every name begins with it.
    """
    run_fields = sampling_fields(trained.spec_as_saved.sample)
    run_fields["solver.kind"] = spec.solver.kind
    return changed_parts(trained, run_fields, sampling_fields(spec))
