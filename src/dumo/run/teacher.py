"""A teacher at work: its velocity in place of the data's, or pairs of noise and data that its flow joins."""

import importlib
import inspect
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

import torch
from torch import Tensor

from dumo import dist
from dumo.config.check import check_guided
from dumo.config.spec import Run
from dumo.config.teacher import Pairs, Teacher
from dumo.data.source import Source
from dumo.flow.reading import reading
from dumo.io import digest
from dumo.io.json import read_json, write_json
from dumo.progress import Bar, say
from dumo.random import noise
from dumo.run import base
from dumo.run.folder import open_run
from dumo.run.pairs import Coupled as Coupled
from dumo.run.pairs import couple as couple
from dumo.sampling.solver import check
from dumo.training.state import State
from dumo.types import Cond, Reads, Sample, Taught, Time, UserError, lift

FILE = "teacher.json"


@dataclass(frozen=True)
class Known:
    """A teacher, opened: what it can tell, guided as its spec says, and who it is."""

    spec: Teacher
    reads: Reads
    velocity: Taught | None  # to learn; None where pairs are all that is
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

    def begin(self, source: Source, run: Run, folder: Path, device: torch.device, bar: Bar) -> Source | Coupled:
        """Write down who teaches, and return what to train on: the run's own source, or the teacher's pairs, made now.

        Raises UserError as `couple` does.
        """
        self.note(folder)
        pairs = self.spec.pairs
        return couple(run, pairs, self.reads, folder / "pairs", device, bar) if pairs else source


def opened(teacher: Teacher, run: Run, state: State, device: torch.device) -> Known:
    """A run's teacher. Raises UserError where it cannot be had, knows other data, or cannot tell enough."""
    raw, about = found(teacher, run, state, device)
    if teacher.weak:
        weak, known = of_run(Teacher(source=teacher.weak.source, weights=teacher.weak.weights), run, device)
        raw, about = teacher.weak.lead(raw, weak), about | {"weak": known["sha256"]}
    reads = teacher.guide(raw, run.data.classes)
    if teacher.pairs:
        reach(teacher, teacher.pairs, raw)
    needs = run.objective.needs
    learned = None if teacher.pairs and not (needs.points and needs.teachable) else velocity(teacher, reads)
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
