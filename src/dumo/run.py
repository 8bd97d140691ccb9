"""Train, sample, evaluate, show: where the packages meet. Each reads top to bottom in pipeline order.

A run is a folder: run.yaml (complete), metrics.jsonl, checkpoints/, samples/, evaluation.json, report.html.
"""

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from dumo import dist, doctor
from dumo.config.folder import claim, note
from dumo.config.load import FILE, difference, load, parse
from dumo.config.spec import Run, Sampling
from dumo.flow.draw import stream
from dumo.flow.guide import Guide
from dumo.metrics.protocol import Reference
from dumo.sample import archive, generate, picture
from dumo.sample.solver import Euler, Solver, check
from dumo.train import checkpoint, cost, log
from dumo.train import loop as training
from dumo.train.state import State
from dumo.train.step import Record
from dumo.types import Sample, UserError

Tick = Callable[[int, str], None]  # (units done so far, a note)


@runtime_checkable
class Watch(Protocol):
    """Shows how far a piece of work is: `with watch("training", 1000) as tick: tick(10, "loss 0.3")`."""

    def __call__(self, title: str, total: int, /) -> AbstractContextManager[Tick]:
        """Begin to show work of `total` units."""
        ...


@contextmanager
def unwatched(title: str, total: int, /) -> Generator[Tick, None, None]:
    """Shows nothing."""
    yield lambda done, note: None


@dataclass(frozen=True)
class Trained:
    """A run's folder, opened to read: the net that is shown (the first average), and where it stands."""

    run: Run
    folder: Path
    net: nn.Module
    step: int
    weights: str  # the file they came from, relative to the folder where it lies inside


def train(run: Run, folder: Path, *, device: str = "auto", watch: Watch = unwatched) -> State:
    """Train, or go on where the folder's last checkpoint stands. Returns the state at the end.

    Raises UserError if the folder holds another run, or the slope fails its examination, before the first step or on
    the weights of the first checkpoint; Diverged if the loss is no longer a number.
    """
    here, metrics = dist.device(device), folder / "metrics.jsonl"
    claim(run, folder)
    source, spec = run.data.open(), run.train
    doctor.examine(run, here).require()
    state = training.begin(run.build(here), run.train)
    if last := checkpoint.latest(folder / "checkpoints"):
        checkpoint.restore(last, state)
    if state.step > run.train.steps:
        raise UserError(f"{folder} has {state.step} steps behind it, so train.steps={run.train.steps} is no more to do")
    log.rewind(metrics, state.step)
    note(run, folder)

    first = min(spec.save_every, spec.steps)  # the step of the first checkpoint
    if 0 < state.step <= first:  # what was refused there still is
        doctor.examine_weights(run, state.net, here).require()

    def batches(step: int) -> tuple[Tensor, Tensor]:
        x, c = source.batch(step, spec.batch, spec.seed)
        return x.to(here), c.to(here)

    def save(state: State, record: Record) -> None:
        checkpoint.save(folder / "checkpoints", state, spec.keep)
        if state.step == first:
            doctor.examine_weights(run, state.net, here).require()

    with watch(f"training {folder.name}", spec.steps) as tick:
        tick(state.step, "")
        hooks = (
            training.Every(1, lambda state, record: tick(state.step, f"loss {record.loss:.4f}")),
            training.Every(spec.log_every, lambda state, record: log.append(metrics, asdict(record))),
            training.Every(first, save),
        )
        training.train(state, batches, run.objective, run.path, run.data.classes, spec, hooks)
    checkpoint.save(folder / "checkpoints", state, spec.keep)
    return state


def open_run(
    source: str, overrides: Sequence[str] = (), *, weights: str | None = None, device: str = "auto"
) -> Trained:
    """Open a run's folder to sample or judge it. Raises UserError where it is none, or has no checkpoint yet."""
    folder = Path(source)
    if not (folder / FILE).is_file():
        raise UserError(f"{source} is no run's folder (it has no {FILE}): train one first, e.g. dumo train digits")
    run = load(source, overrides)
    if differs := list(difference(load(source), run)):
        raise UserError(f"these fields of {source} are as they were trained:\n  " + "\n  ".join(differs))
    last = checkpoint.latest(folder / "checkpoints")
    if last is None:
        raise UserError(f"{source} has no checkpoint yet: train it first, dumo train {source}")
    shown = f"ema-{run.train.ema[0].decay}" if run.train.ema else "net"
    file = last / f"{shown}.safetensors" if weights is None else Path(weights)
    net, found = run.build(dist.device(device)), checkpoint.load_weights(file)
    checkpoint.check(file, found, net.state_dict())
    net.load_state_dict(found)
    step, _ = checkpoint.counts(last / "state.json")
    return Trained(run, folder, net.eval(), step, str(file.relative_to(folder)) if weights is None else weights)


def sample(
    trained: Trained,
    *,
    nfe: int,
    c: Tensor,
    seed: int | None = None,
    solver: Solver | None = None,
    watch: Watch = unwatched,
) -> generate.Samples:
    """One sample per label of c, image i always from stream (seed, i). Raises UserError as the solver does."""
    run, solver = trained.run, solver or trained.run.sample.solver
    with watch(f"sampling, {solver.kind} at {nfe}", len(c)) as tick:
        return generate.generate(
            trained.net,
            run.objective.read(trained.net),
            run.path,
            solver,
            c,
            nfe=nfe,
            seed=run.sample.seed if seed is None else seed,
            shape=run.data.shape,
            device=next(trained.net.parameters()).device,
            on_batch=lambda made: tick(made, ""),
        )


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
    run, shape = trained.run, trained.run.data.shape
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
    points = len(run.data.shape) == 1
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


def evaluate(
    trained: Trained,
    *,
    nfe: Sequence[int] | None = None,
    seed: int | None = None,
    solver: str | None = None,
    watch: Watch = unwatched,
) -> dict[str, Any]:
    """Judge a run by its protocol, and write the report into its folder as evaluation.json.

    `results` has one row per number of passes. `contrast` has Euler steps of the velocity, at one pass and at as many,
    where the run's own solver is another: what the other head, or the higher order, is for. Raises UserError as the
    solvers do.
    """
    run, protocol = trained.run, trained.run.evaluate.protocol
    chosen, nfe = solver_named(run, solver), tuple(nfe or run.evaluate.nfe)
    seed = run.evaluate.seed if seed is None else seed
    check(chosen, run.reads, *nfe)
    source, c = run.data.open(), protocol.labels(run.data.classes)
    reference = Reference(
        *source.reference(protocol.samples, seed),
        redraw=None if source.size else lambda i: source.reference(protocol.samples, seed, 1 + i)[0],
    )

    def row(solver: Solver, n: int) -> dict[str, Any]:
        made = sample(trained, nfe=n, c=c, seed=seed, solver=solver, watch=watch)
        return {"nfe": made.nfe, "solver": solver.kind, **protocol.score(made.x, c, reference)}

    euler = sorted({1, *nfe}) if run.reads.velocity and chosen.kind != "euler" else []
    report = {
        "run": str(trained.folder),
        "step": trained.step,
        "weights": trained.weights,
        "protocol": protocol.name,
        "samples": protocol.samples,
        "seed": seed,
        "solver": chosen.model_dump(),
        "results": [row(chosen, n) for n in nfe],
        "contrast": [row(Euler(), n) for n in euler],
        "baselines": protocol.baselines(reference),
        "versions": dist.versions(),
    }
    with archive.replacing(trained.folder / "evaluation.json") as out:
        out.write((json.dumps(log.finite(report), indent=2) + "\n").encode())
    return report


def show(run: Run) -> dict[str, Any]:
    """What a run is before it is run: its spec, its size, and what a step costs and teaches.

    `forward_units_per_step` counts floating-point operations; `slope` is the way of a slope that rides; `far` is
    P(t - r > 0.9), the share of rows where one-step sampling is taught, None where no jump is; `guidance_scale` is the
    effective one, 1 for none.
    """
    net = run.outline()
    t, r = run.objective.times(1_000_000, stream("show"))
    jumps = run.reads.endpoint or run.reads.flow_map
    guide: Guide | None = getattr(run.objective, "guide", None)
    way = cost.way(net, run.objective, run.path, run.data.shape, ref=run.train.ref)
    return {
        "spec": run.model_dump(mode="json"),
        "parameters": sum(p.numel() for p in net.parameters()),
        "forward_flops_per_image": cost.forward_flops(net, run.objective, run.data.shape),
        "forward_units_per_step": cost.forward_units(net, run.objective, run.path, run.data.shape, ref=run.train.ref),
        "slope": way and way._asdict(),
        "far": (t - r > 0.9).double().mean().item() if jumps else None,
        "guidance_scale": guide.scale if guide else 1.0,
    }
