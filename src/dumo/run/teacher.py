"""A teacher at work: its velocity in place of the data's, or pairs of noise and data that its flow joins."""

import importlib
import inspect
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from dumo import dist, stop
from dumo.config.check import check_guided
from dumo.config.spec import Run
from dumo.config.teacher import Pairs, Teacher
from dumo.data.epoch import rows_of
from dumo.data.source import Source, Table
from dumo.flow.reading import reading
from dumo.io import digest
from dumo.io.file import write
from dumo.io.json import read_json, write_json
from dumo.io.weights import load
from dumo.progress import Bar, say
from dumo.random import noise
from dumo.run import base
from dumo.run.folder import open_run
from dumo.sampling import generate
from dumo.sampling.solver import check
from dumo.training import agreement
from dumo.training.state import State
from dumo.types import Cond, Reads, Sample, Taught, Time, UserError, lift

FILE = "teacher.json"
SHARD = 1024  # pairs to a file: what a stop may lose


@dataclass(frozen=True)
class Known:
    """A teacher, opened: what it can tell, guided as its spec says, and who it is."""

    spec: Teacher
    reads: Reads
    velocity: Taught | None  # to learn; None where pairs are
    about: dict[str, str]

    def check(self, folder: Path) -> None:
        """Raise UserError where another taught what stands in this folder."""
        file, stands = folder / FILE, any((folder / name).is_dir() for name in ("pairs", "checkpoints"))
        if not stands or not file.is_file():
            return
        way_out = f"delete it if the teacher is the one that {folder} began with, or start anew in another folder"
        then = read_json(file, way_out)
        if then != self.about:
            raise UserError(
                f"{folder} began with another teacher: {then} then, {self.about} now. Set teacher.weights, or make the "
                "function, what it was, or start anew in another folder"
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


def opened(teacher: Teacher, run: Run, state: State, device: torch.device) -> Known:
    """A run's teacher. Raises UserError where it cannot be had, knows other data, or cannot tell enough."""
    raw, about = found(teacher, run, state, device)
    reads = teacher.guide(raw, run.data.classes)
    if teacher.pairs:
        reach(teacher, teacher.pairs, raw)
    learned = None if teacher.pairs else velocity(teacher, reads)
    if teacher.kind == "python":
        try_out(teacher, run, reads, device)
    return Known(teacher, reads, learned, {"source": teacher.source or teacher.kind, **about})


def found(teacher: Teacher, run: Run, state: State, device: torch.device) -> tuple[Reads, dict[str, str]]:
    """What a teacher can tell, and its digest. Raises UserError where it cannot be had, or knows other data."""
    if teacher.kind == "base":
        return base.reads_of(run, state.net), {"sha256": str(state.frozen)}
    return (of_user if teacher.kind == "python" else of_run)(teacher, run, device)


def of_user(teacher: Teacher, run: Run, device: torch.device) -> tuple[Reads, dict[str, str]]:
    """What the function that the user names returns, and the digest of its source; what runs is said before it does.

    Raises UserError where there is none, it fails, or it returns no `Reads`.
    """
    module, _, name = teacher.source.partition(":")
    way = "Give module:function, importable from here, that takes (run, device) and returns a dumo.types.Reads"
    with importable(Path.cwd()), explained(teacher, way):
        if dist.is_main():
            where = f" of {file}" if (file := file_of(module)) else ""
            say(f"teacher.source: this run executes {teacher.source}{where}")
        make: Callable[[Run, torch.device], object] = getattr(importlib.import_module(module), name)
        reads = make(run, device)
    if not isinstance(reads, Reads):
        raise UserError(
            f"teacher.source = {teacher.source} returned {type(reads).__name__}: it must return a dumo.types.Reads"
        )
    if not (reads.velocity or reads.endpoint or reads.flow_map):
        raise UserError(f"teacher.source = {teacher.source}: its Reads has no velocity, and nothing else: give it one")
    return reads, digest_of(make)


def file_of(module: str) -> str | None:
    """The file that a module would be imported from, found without running any of it; None where it is not known."""
    if module in sys.modules:
        return getattr(sys.modules[module], "__file__", None)
    path: Sequence[str] | None = None
    spec: ModuleSpec | None = None
    for i, _ in enumerate(parts := module.split("."), 1):
        spec = PathFinder.find_spec(".".join(parts[:i]), path)
        if spec is None:
            return None
        path = spec.submodule_search_locations or ()
    return spec and spec.origin


def digest_of(make: Callable[..., object]) -> dict[str, str]:
    """The SHA-256 of a function's source; nothing where that is not available. What the function calls is not in it."""
    try:
        return {"sha256": digest.of_bytes(inspect.getsource(make).encode())}
    except (OSError, TypeError):
        return {}


@contextmanager
def importable(folder: Path) -> Generator[None]:
    """Let modules of this folder be imported, as `python -m` does and an installed command does not."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


@contextmanager
def explained(teacher: Teacher, way: str) -> Generator[None]:
    """Whatever goes wrong in a user's code is a UserError, with a way out."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"teacher.source = {teacher.source}: {what}. {way}") from error


def try_out(teacher: Teacher, run: Run, reads: Reads, device: torch.device) -> None:
    """Ask a user's teacher for two rows, one without a label: before anything is written, UserError where it fails."""
    uses = teacher.pairs.solver.uses if teacher.pairs else "velocity"
    takes = "(x, t, s, c)" if uses == "flow_map" else "(x, t, c)"
    x, c = noise(0, range(2), 0, run.data.shape).to(device), torch.tensor([0, run.data.classes], device=device)
    t = torch.full((2,), 0.5, device=device)
    gives = "two of the shape of x" if uses == "both" else "the shape of x"
    with explained(teacher, f"Its {uses} must take {takes} and return {gives}"), torch.no_grad():
        found = getattr(reads, uses)(x, t, *([0 * t] if uses == "flow_map" else []), c)
        answers: tuple[Tensor, ...] = found if uses == "both" else (found,)
        for y in answers:
            if y.shape != x.shape:
                raise TypeError(f"{uses} of x of shape {tuple(x.shape)} has shape {tuple(y.shape)}")
            if not y.isfinite().all():
                raise ValueError(f"{uses} at t = 0.5 is no finite number")


def reach(teacher: Teacher, pairs: Pairs, reads: Reads) -> None:
    """Raise UserError where the solver of the pairs cannot follow what the teacher tells."""
    try:
        check(pairs.solver, reads, pairs.nfe)
    except UserError as error:
        what = str(error).replace("this objective", f"the teacher {teacher.source}")
        asked = f"teacher.pairs.solver.kind={pairs.solver.kind} teacher.pairs.nfe={pairs.nfe}"
        raise UserError(f"{asked}: {what}") from error


def of_run(teacher: Teacher, run: Run, device: torch.device) -> tuple[Reads, dict[str, str]]:
    """What the net of another run can tell, and its digest.

    Raises UserError where it knows other data, or cannot be guided as asked.
    """
    known = open_run(teacher.source, weights=teacher.weights, device=str(device))
    there, here = facts(known.run), facts(run)
    if differs := [f"{name} is {there[name]} there, {here[name]} here" for name in here if there[name] != here[name]]:
        raise UserError(
            f"the teacher {teacher.source} knows other data: {'; '.join(differs)}. Take a teacher trained on this "
            "data, or set these fields as they are there"
        )
    check_guided(known.run, teacher.guide, "teacher.guide", teacher.source)
    return reading(known.run.objective, known.net, known.run.sample.knobs), {"sha256": digest.of_file(known.file)}


def facts(run: Run) -> dict[str, object]:
    """What a teacher and its pupil must agree on."""
    names = ("shape", "classes", "codec", "per_channel")
    data: dict[str, object] = {f"data.{name}": getattr(run.data, name, None) for name in names}
    return {**data, "path": run.path.kind, "path.sd": run.path.sd}


def velocity(teacher: Teacher, reads: Reads) -> Taught:
    """The velocity to learn at (x_t, t, c), where the data's own is v. Raises UserError where none was taught."""
    if (read := reads.velocity) is None:
        raise UserError(f"the teacher {teacher.source} has no velocity: take one whose objective teaches it")

    def mixed(x: Sample, t: Time, c: Cond, v: Sample) -> Sample:
        with torch.no_grad():
            inside = teacher.interval.holds(t)
            weight = torch.where(inside, teacher.mix, teacher.elsewhere)
            return v + lift(weight, v).to(v) * (read(x, t, c).to(v) - v)

    return mixed


class Coupled:
    """Pairs of data and noise, with their classes, as a source of batches."""

    def __init__(self, x: Tensor, z: Tensor, c: Tensor) -> None:
        """All in memory."""
        self.table, self.z = Table(x, c), z

    def batch(self, step: int, batch: int, seed: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
        """x, c and z of the rows `rows` of a step's batch, in the order that a table of x would have."""
        places = rows_of(step, batch, size=len(self.z), seed=seed, rows=rows)
        return self.table.x[places], self.table.c[places], self.z[places]

    def numbers(self, step: int, batch: int, seed: int, rows: slice = slice(None)) -> Tensor:
        """The numbers of the pairs."""
        return self.table.numbers(step, batch, seed, rows)

    def fingerprint(self) -> str:
        """Of all pairs."""
        return digest.short(self.table.fingerprint(), digest.of_tensor(self.z))


def couple(run: Run, pairs: Pairs, reads: Reads, folder: Path, device: torch.device, bar: Bar) -> Coupled:
    """Pairs that the teacher's flow joins: those that stand in `folder`, and the others, made now, file by file.

    Rank k of n makes k, k + n, k + 2 n ... of the files that lack; every rank must call it, and has all pairs. Raises,
    on every rank, UserError where a file is damaged, or the teacher answers with what is no number, which is not
    written; OSError where the disk is full; Stopped where that is asked, between two passes.
    """
    c = generate.labels(pairs.count, run.data.classes)
    files = {folder / f"{first:08d}.safetensors": first for first in range(0, pairs.count, SHARD)}
    lacking = agreement.main(lambda: [file for file in files if not file.is_file()])

    def make() -> list[int]:
        for file in lacking[dist.rank() :: dist.world()]:
            stop.check()
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
            f"the teacher makes {len(bad)} pairs, the first number {min(bad)}, of what is no finite number: mend it, "
            "or take another solver or more passes (teacher.pairs)"
        )
    parts = agreement.own(lambda: [load_pairs(file) for file in files])
    return Coupled(*(torch.cat([part[name] for part in parts]) for name in ("x", "z", "c")))


def load_pairs(file: Path) -> dict[str, Tensor]:
    """The pairs of a file. Raises UserError where it is damaged."""
    try:
        return load(file)
    except UserError as error:
        raise UserError(f"{file} is damaged: delete it, and these pairs are made again") from error


def joined(run: Run, pairs: Pairs, reads: Reads, c: Tensor, numbers: range, device: torch.device) -> dict[str, Tensor]:
    """Noise, and the data that the flow carries it to."""
    z, x = generate.solve(
        *(reads, run.path, pairs.solver, c.to(device)),
        nfe=pairs.nfe,
        seed=pairs.seed,
        shape=run.data.shape,
        indices=numbers,
    )
    return {"x": x.cpu(), "z": z.cpu(), "c": c}
