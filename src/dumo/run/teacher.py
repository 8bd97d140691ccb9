"""A teacher at work: its velocity in place of the data's, or pairs of noise and data that its flow joins."""

import importlib
import inspect
import sys
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import safetensors.torch
import torch
from torch import Tensor, nn

from dumo.flow import generate
from dumo.flow.precision import Precision, autocast
from dumo.flow.reading import bind, reading
from dumo.io import digest
from dumo.io.file import write
from dumo.io.read import read_json, write_json
from dumo.io.source import Source, Table, rows_of
from dumo.io.weights import load
from dumo.run.config.check import check_guided
from dumo.run.config.spec import Run
from dumo.run.config.teacher import Pairs, Teacher
from dumo.run.folder import open_run
from dumo.runtime import dist, signals
from dumo.runtime.progress import Bar, say
from dumo.runtime.random import noise
from dumo.training import agreement
from dumo.training.state import State
from dumo.types import Cond, Heads, Reads, Sample, Taught, Time, Trail, UserError

FILE = "teacher.json"
SHARD = 1024  # pairs to a file: what a stop may lose


@dataclass(frozen=True)
class Known:
    """A teacher, opened: its velocity, guided as its spec says, and who it is."""

    spec: Teacher
    reads: Reads
    velocity: Taught | None  # to learn; None where pairs are all that is learned from
    about: dict[str, str]

    def check(self, folder: Path) -> None:
        """Raise UserError where another teacher taught what is in this folder."""
        file, stands = folder / FILE, any((folder / name).is_dir() for name in ("pairs", "checkpoints"))
        if not stands or not file.is_file():
            return
        way_out = f"delete it if the teacher is the one that {folder} began with, or start anew in another folder"
        then = read_json(file, way_out)
        if then != self.about:
            raise UserError(
                f"{folder} began with another teacher: {then} then, {self.about} now. Put the teacher back as it was, "
                "or start anew in another folder"
            )

    def note(self, folder: Path) -> None:
        """Write down who teaches: the main process does."""
        if dist.is_main():
            write_json(folder / FILE, self.about)

    def begin(self, source: Source, run: Run, folder: Path, device: torch.device, bar: Bar) -> "Source | Coupled":
        """Write down who teaches, and return what to train on: the run's own source, or the teacher's pairs, made now.

        Raises UserError as `couple` does.
        """
        self.note(folder)
        pairs = self.spec.pairs
        return couple(run, pairs, self.reads, folder / "pairs", device, bar) if pairs else source


@dataclass(frozen=True)
class Base:
    """The passes of a net with its adapters off, the model that it began as, in a precision. The net offers `base()`.

    It answers between the passes of a step, even within its loss. So it only switches, and switches back: no weight is
    changed, no gradient recorded, and every part of the net is in its own mode again.
    """

    net: nn.Module
    precision: Precision

    @torch.no_grad()
    def __call__(self, x: Sample, c: Cond, /, **inputs: Time) -> Heads:
        """As `Net`, without gradients and dropout."""
        off = cast(Callable[[], AbstractContextManager[None]], self.net.base)
        with generate.evaluating(self.net), off(), autocast(self.precision, x.device):
            return self.net(x, c, **inputs)


def opened(teacher: Teacher, run: Run, state: State, device: torch.device) -> Known:
    """A run's teacher. Raises UserError where it cannot be opened, knows other data, or has no velocity."""
    match teacher.kind:
        case "run":
            raw, about = of_run(teacher, run, device)
        case "python":
            raw, about = of_user(teacher, run, device)
        case "base":
            raw, about = of_base(run, state.net), {"sha256": str(state.frozen)}
    if raw.velocity is None:
        raise UserError(f"the teacher {teacher.source} has no velocity: take one whose objective teaches it")
    reads, needs = teacher.guide(raw, run.data.classes), run.objective.needs
    learned = None if teacher.pairs and not (needs.points and needs.teachable) else velocity(reads)
    return Known(teacher, reads, learned, {"source": teacher.source or teacher.kind, **about})


def velocity(reads: Reads) -> Taught:
    """The velocity to learn at (x_t, t, c), where the data's own is v."""
    read = reads.velocity
    assert read, "a teacher without one is refused"

    def taught(x: Sample, t: Time, c: Cond, v: Sample) -> Sample:
        with torch.no_grad():
            return v + (read(x, t, c).to(v) - v)  # rounded so, runs go on to the bit as they began

    return taught


def of_base(run: Run, net: nn.Module) -> Reads:
    """The velocity of a net's base, which is every head of it, at r = t where it takes r."""
    base = bind(Base(net, run.train.precision), **run.objective.needs.knobs)
    names = run.objective.needs.inputs
    return Reads(velocity=lambda x, t, c: base(x, c, **dict.fromkeys(names, t))[0])


def of_run(teacher: Teacher, run: Run, device: torch.device) -> tuple[Reads, dict[str, str]]:
    """What the net of another run was taught, and its digest.

    Raises UserError where it knows other data, or cannot be guided as `teacher.guide` says.
    """
    known = open_run(teacher.source, device=str(device))
    other, there, here = known.run, facts(known.run), facts(run)
    if differs := [f"{name} is {there[name]} there, {here[name]} here" for name in here if there[name] != here[name]]:
        raise UserError(
            f"the teacher {teacher.source} knows other data: {'; '.join(differs)}. Take a teacher trained on this "
            "data, or set these fields as they are there"
        )
    check_guided(teacher.guide, other.data, other.objective, other.guided, "teacher.guide", teacher.source)
    return reading(other.objective, known.net, other.sample.knobs), {"sha256": digest.of_file(known.file)}


def facts(run: Run) -> dict[str, object]:
    """What a teacher and its pupil must agree on."""
    names = ("shape", "classes", "codec")
    data: dict[str, object] = {f"data.{name}": getattr(run.data, name, None) for name in names}
    return {**data, "path": run.path.kind, "path.sd": run.path.sd}


def of_user(teacher: Teacher, run: Run, device: torch.device) -> tuple[Reads, dict[str, str]]:
    """What the user's function returns, tried on two rows, and the digest of its source, not of what it calls.

    Raises UserError where it cannot be imported, fails, or has no velocity of the shape of x.
    """
    module, _, name = teacher.source.partition(":")
    if dist.is_main():
        say(f"teacher.source: this run executes {teacher.source}")
    x, c = noise(0, range(2), 0, run.data.shape).to(device), torch.tensor([0, run.data.classes], device=device)
    with importable(Path.cwd()):
        try:
            make = getattr(importlib.import_module(module), name)
            reads = cast(Reads, make(run, device))
            with torch.no_grad():
                v = cast(Callable[..., Tensor], reads.velocity)(x, torch.full((2,), 0.5, device=device), c)
            if v.shape != x.shape:
                raise TypeError(f"the velocity of x of shape {tuple(x.shape)} has shape {tuple(v.shape)}")
        except Exception as error:
            what = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(
                f"teacher.source = {teacher.source}: {what}. Give module:function, importable from here, that takes "
                "(run, device) and returns a dumo.types.Reads, whose velocity takes (x, t, c)"
            ) from error
    return reads, {"sha256": digest.of_bytes(inspect.getsource(make).encode())}


@contextmanager
def importable(folder: Path) -> Generator[None]:
    """Let modules of this folder be imported, as `python -m` does and an installed command does not."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


class Coupled:
    """Pairs of data and noise, with their classes, as a source of batches."""

    def __init__(self, x: Tensor, z: Tensor, c: Tensor, between: Trail | None = None) -> None:
        """All in memory; `between` is where the flow is on its way from x to z."""
        self.table, self.z, self.between = Table(x, c), z, between

    def batch(self, step: int, batch: int, seed: int, rows: slice = slice(None)) -> tuple[Tensor, ...]:
        """x, c, z and what is between, of rows of a step's batch, in the order that a table of x would have."""
        places = rows_of(step, batch, size=self.table.size, seed=seed, rows=rows)
        return self.table.x[places], self.table.c[places], *(paired[places] for paired in self._paired)

    @property
    def _paired(self) -> tuple[Tensor, ...]:
        return (self.z,) if self.between is None else (self.z, self.between)

    def numbers(self, step: int, batch: int, seed: int, rows: slice = slice(None)) -> Tensor:
        """The numbers of the pairs."""
        return self.table.numbers(step, batch, seed, rows)

    def fingerprint(self) -> str:
        """Of all pairs."""
        return digest.short(self.table.fingerprint(), *map(digest.of_tensor, self._paired))


def couple(run: Run, pairs: Pairs, reads: Reads, folder: Path, device: torch.device, bar: Bar) -> Coupled:
    """Pairs that the teacher's flow joins: those that stand in `folder`, and the others, made now, file by file.

    Rank k of n makes k, k + n, k + 2 n ... of the files that lack; every rank must call it, and has all pairs. Raises,
    on every rank, UserError where a file is damaged, or the teacher's answers are not finite, which are not written;
    OSError where the disk is full; Stopped where that is asked, between two passes.
    """
    c = generate.labels(pairs.count, run.data.classes)
    files = {folder / f"{first:08d}.safetensors": first for first in range(0, pairs.count, SHARD)}
    lacking = agreement.main(lambda: [file for file in files if not file.is_file()])

    def make() -> list[int]:
        for file in lacking[dist.rank() :: dist.world()]:
            signals.check()
            some = range(files[file], min(files[file] + SHARD, pairs.count))
            made = joined(run, pairs, reads, c[list(some)], some, device)
            if bad := [k for k, x in zip(some, made["x"], strict=True) if not x.isfinite().all()]:
                return bad
            write(file, safetensors.torch.save(made))
            tick(some.stop, "")
        return []

    with bar("the teacher's pairs", pairs.count) as tick:
        bad = [k for found in agreement.agreed(make) for k in found]  # who failed would be waited for
        tick(pairs.count, "")
    if bad:
        raise UserError(
            f"{len(bad)} of the teacher's pairs are not finite, the first is number {min(bad)}: mend the teacher, or "
            "take another"
        )
    parts = agreement.own(lambda: [load_pairs(file) for file in files])
    return Coupled(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def load_pairs(file: Path) -> dict[str, Tensor]:
    """The pairs of a file. Raises UserError where it is damaged."""
    try:
        return load(file)
    except UserError as error:
        raise UserError(f"{file} is damaged: delete it, and these pairs are made again") from error


def joined(run: Run, pairs: Pairs, reads: Reads, c: Tensor, numbers: range, device: torch.device) -> dict[str, Tensor]:
    """Noise, the data that the flow carries it to, and as many points between as the objective learns from."""
    points, c_here, shape = run.objective.needs.points, c.to(device), run.data.shape
    solver, nfe = pairs.solver, pairs.passes(points)
    if points:
        z = noise(0, numbers, 0, shape).to(device)
        x, between = generate.trailed(reads, run.path, solver, z, c_here, nfe=nfe, points=points)
        return {"x": x.cpu(), "z": z.cpu(), "c": c, "between": between.cpu()}
    z, x = generate.solve(reads, run.path, solver, c_here, nfe=nfe, seed=0, shape=shape, indices=numbers)
    return {"x": x.cpu(), "z": z.cpu(), "c": c}
