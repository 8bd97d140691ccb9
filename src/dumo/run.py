"""Train, sample, show: where the packages meet. Each reads top to bottom in pipeline order.

A run is a folder: run.yaml (complete), metrics.jsonl, checkpoints/, milestones/, grids/, samples/, evaluation.json,
report.html.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dumo import dist, doctor, teacher
from dumo.config.folder import claim, note
from dumo.config.load import parse
from dumo.config.spec import Run, Sampling
from dumo.data import Latents
from dumo.data.source import Source
from dumo.flow.draw import stream
from dumo.flow.read import reading
from dumo.sample import archive, generate, picture
from dumo.sample.solver import Solver, check
from dumo.train import checkpoint, cost, log
from dumo.train import loop as training
from dumo.train.state import State
from dumo.train.step import Record
from dumo.trained import Trained as Trained
from dumo.trained import begun
from dumo.trained import open_run as open_run
from dumo.types import Sample, UserError
from dumo.watch import Watch, unwatched


def train(run: Run, folder: Path, *, device: str = "auto", watch: Watch = unwatched) -> State:
    """Train, or go on where the folder's last checkpoint stands. Returns the state at the end.

    Raises UserError if the folder holds another run, or the slope fails its examination, before the first step or on
    the weights of the first checkpoint; Diverged if the loss is no longer a number.
    """
    here, metrics = dist.device(device), folder / "metrics.jsonl"
    claim(run, folder)
    source, spec = run.data.open(), run.train
    doctor.examine(run, here).require()
    known = teacher.opened(run.teacher, run, here) if run.teacher else None
    last = checkpoint.latest(folder / "checkpoints")
    net = begun(run, run.start, here) if run.start and not last else run.build(here)
    state = training.begin(net, run.train)
    if last:
        checkpoint.restore(last, state)
    if state.step > run.train.steps:
        raise UserError(f"{folder} has {state.step} steps behind it, so train.steps={run.train.steps} is no more to do")
    if known:
        known.check(folder)
    log.rewind(metrics, state.step)
    note(run, folder)
    if run.teacher and known:
        known.note(folder)
        if pairs := run.teacher.pairs:
            source = teacher.couple(run, pairs, known.reads, folder / "pairs", here, watch)

    first = min(spec.save_every, spec.steps)  # the step of the first checkpoint
    if 0 < state.step <= first:  # what was refused there still is
        doctor.examine_weights(run, state.net, here).require()

    def batches(step: int) -> tuple[Tensor, ...]:
        return tuple(part.to(here) for part in source.batch(step, spec.batch, spec.seed))

    def mark(state: State, record: Record) -> None:
        if state.step in spec.milestones:
            checkpoint.mark(folder / "milestones", state)

    def save(state: State, record: Record) -> None:
        checkpoint.save(folder / "checkpoints", state, spec.keep)
        if state.step == first:
            doctor.examine_weights(run, state.net, here).require()

    def keep(state: State, record: Record) -> None:
        if record.probe or state.step % spec.log_every == 0:
            log.append(metrics, asdict(record))

    if state.step in {*spec.milestones} - checkpoint.milestones(folder / "milestones").keys():
        checkpoint.mark(folder / "milestones", state)
    with watch(f"training {folder.name}", spec.steps) as tick:
        tick(state.step, "")
        hooks = (
            training.Every(1, lambda state, record: tick(state.step, f"loss {record.loss:.4f}")),
            training.Every(1, keep),
            training.Every(1, mark),
            training.Every(first, save),
        )
        training.train(state, batches, run.objective, run.path, run.data.classes, spec, hooks, known and known.velocity)
    checkpoint.save(folder / "checkpoints", state, spec.keep)
    return state


def truth(run: Run) -> Source:
    """The data as images or points: of latents, the images that were encoded. Raises UserError as opening them does."""
    return run.data.images.open() if isinstance(run.data, Latents) else run.data.open()


def made(
    trained: Trained,
    *,
    nfe: int,
    c: Tensor,
    seed: int | None = None,
    solver: Solver | None = None,
    indices: Sequence[int] | None = None,
) -> Iterator[generate.Batch]:
    """One sample per row of c, decoded, batch by batch: those numbered `indices`, or this rank's share of all.

    Image i always comes from stream (seed, i). Raises UserError as the solver does.
    """
    run = trained.run
    some = range(dist.rank(), len(c), dist.world()) if indices is None else indices
    parts = generate.batches(
        trained.net,
        run.sample.guide(reading(run.objective, trained.net, run.sample.knobs), run.data.classes),
        run.path,
        solver or run.sample.solver,
        c[torch.tensor(some, dtype=torch.long)],
        nfe=nfe,
        seed=run.sample.seed if seed is None else seed,
        shape=run.data.shape,
        indices=some,
        device=trained.device,
    )
    return (replace(part, x=trained.decode(part.x)) for part in parts)


def sample(
    trained: Trained,
    *,
    nfe: int,
    c: Tensor,
    seed: int | None = None,
    solver: Solver | None = None,
    watch: Watch = unwatched,
) -> generate.Samples:
    """One sample per label of c, decoded, image i always from stream (seed, i). Raises UserError as the solver does."""
    solver = solver or trained.run.sample.solver
    with watch(f"sampling, {solver.kind} at {nfe}", len(c)) as tick:
        parts = made(trained, nfe=nfe, c=c, seed=seed, solver=solver, indices=range(len(c)))
        return generate.joined(parts, lambda count: tick(count, ""))


def solver_named(run: Run, name: str | None) -> Solver:
    """The run's own solver, or the one of this name, with its defaults. Raises UserError for an unknown name."""
    if name in (None, run.sample.solver.kind):
        return run.sample.solver
    return parse(Sampling, {"solver": {"kind": name}}).solver


FORMS = ("grid", "images", "npz")
TRUTH = 4000  # points of the data behind a scatter of samples


def export(
    trained: Trained,
    folder: Path,
    *,
    form: str = "grid",
    count: int = 100,
    only: Sequence[int] | None = None,
    nfe: Sequence[int] | None = None,
    seed: int | None = None,
    solver: str | None = None,
    watch: Watch = unwatched,
) -> list[Path]:
    """Make samples and write them: a sheet, an image each, or an .npz in ADM's layout, per number of passes.

    Returns what was written. Raises UserError, before anything is, for a form, label, solver or nfe out of reach.
    """
    run, shape = trained.run, trained.run.pixels
    forms = FORMS if len(shape) == 3 else ("grid", "npz")
    if form not in forms:
        raise UserError(f"format '{form}' is none for samples of shape {shape}: use {', '.join(forms)}")
    c, nfe = generate.labels(count, run.data.classes, only), tuple(nfe or run.sample.nfe)
    chosen = solver_named(run, solver)
    check(chosen, run.reads, *nfe)
    files: list[Path] = []
    for n in nfe:
        made = sample(trained, nfe=n, c=c, seed=seed, solver=chosen, watch=watch)
        files.append(write(made.x, c, folder / f"{chosen.kind}-nfe{n}", form, run))
    return files


def write(x: Sample, c: Tensor, stem: Path, form: str, run: Run) -> Path:
    """One set of samples as one file, or one folder of files."""
    points = len(run.pixels) == 1
    match form:
        case "images":
            archive.write_singles(stem, picture.to_uint8(x))
            return stem
        case "npz":
            path = stem.with_suffix(".npz")
            archive.write_points(path, x, c) if points else archive.write_adm(path, picture.to_uint8(x), c)
            return path
        case _:
            path = stem.with_suffix(".png")
            sheet = (
                picture.scatter(run.data.open().reference(TRUTH, run.sample.seed)[0], {stem.name: x})
                if points
                else picture.sheet(picture.to_uint8(x), max(run.data.classes, 8))
            )
            archive.write_picture(path, sheet)
            return path


def show(run: Run) -> dict[str, Any]:
    """What a run is before it is run: its spec, its size, and what a step costs and teaches.

    `forward_units_per_step` counts floating-point operations; `slope` is the way of a slope that rides; `far` is
    P(t - r > 0.9), the share of rows where one-step sampling is taught, None where no jump is; `guidance_scale` is the
    effective one, 1 for none.
    """
    net = run.outline()
    jumps = run.reads.endpoint or run.reads.flow_map
    way = cost.way(net, run.objective, run.path, run.data.shape, ref=run.train.ref)
    return {
        "spec": run.model_dump(mode="json"),
        "parameters": sum(p.numel() for p in net.parameters()),
        "forward_flops_per_image": cost.forward_flops(net, run.objective, run.data.shape),
        "forward_units_per_step": cost.forward_units(net, run.objective, run.path, run.data.shape, ref=run.train.ref),
        "slope": way and way._asdict(),
        "far": far(run) if jumps else None,
        "guidance_scale": run.guided.scale,
    }


def far(run: Run) -> float:
    """P(t - r > 0.9), of a million draws: the share of the rows where one-step sampling is taught."""
    t, r = run.objective.times(1_000_000, stream("show"))
    return (t - r > 0.9).double().mean().item()
