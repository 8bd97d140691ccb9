"""Generate, decode and write samples of a run: `sample_to_files` implements `dumo sample`."""

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
    """Return the run's sampling settings with the user's changes. None keeps the run's setting.

    Raises UserError if the run does not support the NFE or the solver.
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
    """Write `count` samples for each NFE and return the paths.

    - `form`: `grid` for one image, `images` for one file per sample, `npz` for an archive in ADM's layout
    - `only`, `prompts`: classes or prompts to alternate between
    - `source`: an image that the prompts edit
    - `nfe`, `seed`, `solver`, `size`: None means the run's setting

    File names contain the solver, the NFE, and settings that differ from the run's. Raises UserError before writing
    anything if the run does not support an option.
    """
    data = trained.spec.data
    spec = sampling_settings(trained.spec, nfe=nfe, seed=seed, solver=solver)
    height_width = parse_size(data, size)
    if form == "images" and not trained.makes_images:
        raise UserError(f"format 'images' cannot hold points of shape {trained.spec.shown_shape}: use grid or npz")
    c = trained.conditions(only, count, prompts=prompts or None, source=source)

    # Name the files after settings that differ from the run's.
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
        # Free the samples before the next ones are generated.
        del rows
    return written


def sampling_changes(trained: TrainedRun, spec: Sampling) -> list[str]:
    """Return name parts for the fields in which `spec` differs from the run's sampling settings.

    The solver's kind is omitted, because every name begins with it.
    """
    run_fields = sampling_fields(trained.spec_as_saved.sample)
    run_fields["solver.kind"] = spec.solver.kind
    return changed_parts(trained, run_fields, sampling_fields(spec))
