"""A teacher at work: its velocity in place of the data's, or pairs of noise and data that its flow joins."""

import importlib
import inspect
import sys
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from dumo.config import trust
from dumo.config.check import check_guided
from dumo.config.load import load
from dumo.config.source import FILE as RUN
from dumo.config.spec import Run
from dumo.config.teacher import Pairs, Teacher
from dumo.data import Data, Latents
from dumo.flow import generate
from dumo.flow.flow import Flow
from dumo.flow.path import Path as FlowPath
from dumo.flow.precision import Precision, autocast
from dumo.flow.reading import bind, teaching
from dumo.flow.solver import Heun
from dumo.io import digest, table, weights
from dumo.io.read import read_json, write_json
from dumo.io.source import Source, Table, rows_of
from dumo.io.table import Column, Index
from dumo.objectives.flow_matching import FlowMatching
from dumo.run.weights import open_run
from dumo.runtime import dist, signals
from dumo.runtime.progress import Bar, say
from dumo.runtime.random import noise
from dumo.training import agreement
from dumo.training.state import State
from dumo.types import Cond, Heads, Needs, Reads, Sample, Taught, Time, Trail, UserError

FILE = "teacher.json"
CODEC = "data.codec.sha256"
SHARD = 1024  # pairs to a shard: what a stop may lose


@dataclass(frozen=True)
class Known:
    """A teacher ready to teach: its velocity, guided as its spec says, and its digest."""

    spec: Teacher
    reads: Reads
    velocity: Taught | None  # to learn; None where pairs are all that is learned from
    about: dict[str, str]

    def check(self, folder: Path) -> None:
        """Raise UserError where another teacher taught what is in this folder, or its pairs have changed."""
        file = folder / FILE
        taught = (folder / "checkpoints").is_dir() or any((folder / "pairs").glob("shard-*"))
        if not taught or not file.is_file():
            return
        way_out = f"delete it if the teacher is the one that {folder} began with, or start anew in another folder"
        then = read_json(file, way_out)
        if not isinstance(then, dict) or then.get("sha256") != self.about["sha256"]:  # wherever it lies
            raise UserError(
                f"{folder} began with another teacher: {then} then, {self.about} now. Put the teacher back as it was, "
                "or start anew in another folder"
            )
        pairs = folder / "pairs"
        if there := table.read(pairs, Plan):
            table.require(pairs, there, deep=True)
            if there.teacher != self.about["sha256"]:
                raise UserError(f"{pairs} are another teacher's: {Plan.remake}")

    def note(self, folder: Path) -> None:
        """Write down who teaches: the main process does."""
        if dist.is_main():
            write_json(folder / FILE, self.about)

    def begin(
        self, source: Source, points: int, path: FlowPath, data: Data, folder: Path, device: torch.device, bar: Bar
    ) -> "Source | Coupled":
        """Write down who teaches, and return what to train on: the run's own source, or the teacher's pairs, made now.

        `points` is how many of a trajectory the objective learns from. Raises UserError as `couple` does.
        """
        self.note(folder)
        if not (pairs := self.spec.pairs):
            return source
        plan = Plan.of(pairs, points, path, data, self.about["sha256"])
        return couple(plan, self.reads, folder / "pairs", device, bar)


class Base(nn.Module):
    """The passes of a net with its adapters off, the model that it began as, in a precision. The net offers `base()`.

    It answers between the passes of a step, even within its loss. So it only switches, and switches back: no weight is
    changed, no gradient recorded, and every part of the net is in its own mode again.
    """

    def __init__(self, net: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.net = net
        self.precision: Precision = precision

    @torch.no_grad()
    def forward(self, x: Sample, c: Cond, /, **inputs: Time) -> Heads:
        """As `Net`, without gradients and dropout."""
        off = cast(Callable[[], AbstractContextManager[None]], self.net.base)
        with generate.evaluating(self.net), off(), autocast(self.precision, x.device):
            return self.net(x, c, **inputs)


class Untuned(nn.Module):
    """The model of a pipeline, at the base of a net: each of the heads is the velocity, where r = t."""

    def __init__(self, base: Base, needs: Needs) -> None:
        super().__init__()
        self.base = base
        self.needs = needs

    def forward(self, x: Sample, c: Cond, /, *, t: Time) -> Heads:
        """The velocity."""
        times = [name for name in self.needs.names if name not in self.needs.knobs]
        return bind(self.base, **self.needs.knobs)(x, c, **dict.fromkeys(times, t))[:1]


def open_teacher(teacher: Teacher, run: Run, state: State, device: torch.device) -> Known:
    """A run's teacher. Raises UserError where it cannot be opened, knows other data, or has no velocity."""
    match teacher.kind:
        case "run":
            flow, about = of_run(teacher, run.data, run.path, device)
            reads = flow.readings(teacher.guide)
        case "python":
            raw, about = of_user(teacher, run, device)
            reads = teacher.guide(raw, run.data.classes)
        case "base":
            about = {"sha256": str(state.frozen)}
            reads = of_base(teacher, run, state.net).readings(teacher.guide)
    wants = run.objective.needs.teacher
    learned = None if teacher.pairs and not (wants.points and wants.velocity != "no") else teaching(reads)
    return Known(teacher, reads, learned, {"source": teacher.source or teacher.kind, **about})


def of_base(teacher: Teacher, run: Run, net: nn.Module) -> Flow:
    """The flow of the model under a net's adapters: an untuned pipeline's, or a few-step run's under a subject.

    That one is read by the objective in its own run.yaml. Raises UserError where it cannot be guided as `teacher.guide`
    says.
    """
    base = Base(net, run.train.precision)
    if not (run.start and run.has_subject):
        return Flow(Untuned(base, run.objective.needs), FlowMatching(), classes=run.data.classes)
    few_step = load(run.start.source)
    check_guided(teacher.guide, few_step.data, few_step.objective, few_step.guided, "teacher.guide", run.start.source)
    return Flow(base, few_step.objective, classes=run.data.classes, knobs=few_step.sample.knobs)


def of_run(teacher: Teacher, data: Data, path: FlowPath, device: torch.device) -> tuple[Flow, dict[str, str]]:
    """The flow of another run, and its digest.

    Raises UserError where it knows other data, or cannot be guided as `teacher.guide` says.
    """
    if not Path(teacher.source, RUN).is_file():
        raise UserError(
            f"teacher.source: {teacher.source} is no run's folder (it has no {RUN}): train one there, or say where "
            "it is with --set teacher.source=..."
        )
    known = open_run(teacher.source, device=str(device))
    other = known.run
    there = facts(other.data, other.path)
    here = facts(data, path)
    known_to_both = [name for name in here if name != CODEC or None not in (there[name], here[name])]
    if differs := [f"{n} is {there[n]} there, {here[n]} here" for n in known_to_both if there[n] != here[n]]:
        raise UserError(
            f"the teacher {teacher.source} knows other data: {'; '.join(differs)}. Take a teacher trained on this "
            "data, or set these fields as they are there"
        )
    check_guided(teacher.guide, other.data, other.objective, other.guided, "teacher.guide", teacher.source)
    flow = Flow(known.net, other.objective, classes=data.classes, knobs=other.sample.knobs)
    return flow, {"sha256": weights.sha256(known.file)}


def facts(data: Data, path: FlowPath) -> dict[str, object]:
    """What a teacher and its pupil must agree on."""
    facts: dict[str, object] = {"data.shape": data.shape, "data.classes": data.classes}
    codec = data.codec if isinstance(data, Latents) else None
    facts |= {"data.codec": codec and codec.facts(), CODEC: codec and codec.sha256}
    return {**facts, "path": path.kind, "path.sd": path.sd}


def of_user(teacher: Teacher, run: Run, device: torch.device) -> tuple[Reads, dict[str, str]]:
    """What the user's function returns, tried on two rows, and the digest of its source, not of what it calls.

    Raises UserError where it cannot be imported, fails, or has no velocity of the shape of x.
    """
    module, _, name = teacher.source.partition(":")
    trust.require(trust.teachers({"kind": teacher.kind, "source": teacher.source}), "teacher.source of this run")
    if dist.is_main():
        say(f"teacher.source: this run executes {teacher.source}")
    x, c = noise(0, range(2), 0, run.data.shape).to(device), torch.tensor([0, run.data.classes], device=device)
    with importable(Path.cwd()):
        try:
            make = getattr(importlib.import_module(module), name)
            reads = cast(Reads, make(run, device))
            user_velocity = reads.velocity
            if user_velocity is None:
                raise TypeError("the dumo.types.Reads that it returned has velocity=None")
            with torch.no_grad():
                v = user_velocity(x, torch.full((2,), 0.5, device=device), c)
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


class Plan(Index):
    """What index.json says of a teacher's pairs: data x, noise z, classes c, and points of the flow between."""

    word: ClassVar[str] = "set of pairs"
    remake: ClassVar[str] = "delete it, and these pairs are made again"
    repaired: ClassVar[bool] = False
    teacher: str  # SHA-256 of its weights, or of its source
    path: FlowPath
    solver: Heun = Pairs.solver
    nfe: int
    points: int
    classes: int

    @classmethod
    def of(cls, pairs: Pairs, points: int, path: FlowPath, data: Data, by: str) -> "Plan":
        """The plan of pairs of such data on this path, by a teacher of this digest."""
        shape = data.shape
        x = Column(dtype="float32", shape=shape)
        between = {"between": Column(dtype="float32", shape=(points - 1, *shape))} if points else {}
        return cls(
            columns={"x": x, "z": x, "c": Column(dtype="int64"), **between},
            rows=pairs.count,
            shard_rows=SHARD,
            teacher=by,
            path=path,
            nfe=pairs.passes(points),
            points=points,
            classes=data.classes,
        )


def couple(plan: Plan, reads: Reads, folder: Path, device: torch.device, bar: Bar) -> Coupled:
    """Pairs that the teacher's flow joins: those that stand in `folder`, and the others, made now, shard by shard.

    Rank k of n makes the shards k, k + n, k + 2 n ...; every rank must call it, and has all pairs. Raises, on every
    rank, UserError where the pairs are others or have changed, or the teacher's answers are not finite, which are not
    written; OSError where the disk is full; Stopped after a signal, between two shards.
    """
    c, rank, world = generate.labels(plan.rows, plan.classes), dist.rank(), dist.world()

    def shard(number: int, behind: Callable[[int], None]) -> dict[str, Tensor]:
        signals.check()
        some = plan.span(number)
        made = solve_pairs(plan, reads, c[list(some)], some, device)
        if bad := [k for k, x in zip(some, made["x"], strict=True) if not x.isfinite().all()]:
            raise UserError(
                f"{len(bad)} of the teacher's pairs are not finite, the first is number {bad[0]}: mend the teacher, or "
                "take another"
            )
        return made

    def load() -> dict[str, Tensor]:
        index = table.read(folder, Plan) or plan
        table.require(folder, index)  # `make` has compared the checksums
        parts = [table.Table(folder, index).tensors(number) for number in range(plan.count)]
        return {name: torch.cat([part[name] for part in parts]) for name in plan.columns}

    with bar("the teacher's pairs", table.share(plan.rows, plan.shard_rows, rank, world)) as tick:
        # who failed would be waited for
        agreement.gather_results(lambda: table.make(folder, plan, shard, rank=rank, world=world, tick=tick).missing)
    return Coupled(**agreement.on_each_rank(load))


def solve_pairs(plan: Plan, reads: Reads, c: Tensor, numbers: range, device: torch.device) -> dict[str, Tensor]:
    """Noise, the data that the flow carries it to, and as many points between as the objective learns from."""
    c_here, shape = c.to(device), plan.columns["x"].shape
    if plan.points:
        z = noise(0, numbers, 0, shape).to(device)
        x, between = generate.trailed(reads, plan.path, plan.solver, z, c_here, nfe=plan.nfe, points=plan.points)
        return {"x": x.cpu(), "z": z.cpu(), "c": c, "between": between.cpu()}
    z, x = generate.solve(reads, plan.path, plan.solver, c_here, nfe=plan.nfe, seed=0, shape=shape, indices=numbers)
    return {"x": x.cpu(), "z": z.cpu(), "c": c}
