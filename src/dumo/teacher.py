"""A teacher at work: its velocity in place of the data's, or pairs of noise and data that its flow joins."""

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from dumo.codecs.weights import digest
from dumo.config.spec import Run
from dumo.config.teacher import Pairs, Teacher
from dumo.data.source import Table
from dumo.data.stream import rows_of
from dumo.flow.draw import Velocity
from dumo.flow.read import reading
from dumo.sample import archive, generate
from dumo.sample.noise import noise
from dumo.sample.solver import check
from dumo.train import checkpoint
from dumo.trained import open_run
from dumo.types import Cond, Reads, Sample, Time, UserError, lift
from dumo.watch import Watch

FILE = "teacher.json"
SHARD = 1024  # pairs to a file: what a stop may lose


@dataclass(frozen=True)
class Known:
    """A teacher, opened: what it can tell, guided as its spec says, and who it is."""

    reads: Reads
    velocity: Velocity | None  # to learn; None where pairs are
    about: dict[str, str]

    def check(self, folder: Path) -> None:
        """Raise UserError where another taught when the run in this folder began."""
        if not (file := folder / FILE).is_file() or (then := json.loads(file.read_text())) == self.about:
            return
        raise UserError(
            f"{folder} began with another teacher:\n  {then}\n  {self.about} now\n"
            "Set teacher.weights to what it was, or start anew in another folder"
        )

    def note(self, folder: Path) -> None:
        """Write down who teaches."""
        with archive.replacing(folder / FILE) as out:
            out.write((json.dumps(self.about, indent=2) + "\n").encode())


def opened(teacher: Teacher, run: Run, device: torch.device) -> Known:
    """A run's teacher. Raises UserError where it cannot be had, knows other data, or cannot tell enough."""
    reads, about = (of_user if teacher.kind == "python" else of_run)(teacher, run, device)
    if teacher.pairs:
        check(teacher.pairs.solver, reads, teacher.pairs.nfe)
    reads = teacher.guide(reads, run.data.classes)
    learned = None if teacher.pairs else velocity(teacher, reads)
    return Known(reads, learned, {"source": teacher.source, **about})


def of_user(teacher: Teacher, run: Run, device: torch.device) -> tuple[Reads, dict[str, str]]:
    """What the function that the user names returns. Raises UserError where there is none, or it returns no `Reads`."""
    module, _, name = teacher.source.partition(":")
    try:
        make: Callable[[Run, torch.device], object] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"teacher.source = {teacher.source}: {error}. Give module:function, importable from where you are"
        ) from error
    reads: object = make(run, device)
    if not isinstance(reads, Reads):
        raise UserError(f"{teacher.source} returned {type(reads).__name__}: a teacher is read by a dumo.types.Reads")
    return reads, {}


def of_run(teacher: Teacher, run: Run, device: torch.device) -> tuple[Reads, dict[str, str]]:
    """What the net of another run can tell, and its digest. Raises UserError where it knows other data."""
    known = open_run(teacher.source, weights=teacher.weights, device=str(device))
    there, here = facts(known.run), facts(run)
    if differs := [f"{name} is {there[name]} there, {here[name]} here" for name in here if there[name] != here[name]]:
        raise UserError(f"the teacher {teacher.source} knows other data: " + "; ".join(differs))
    return reading(known.run.objective, known.net, known.run.sample.knobs), {"sha256": digest(known.file)}


def facts(run: Run) -> dict[str, object]:
    """What a teacher and its pupil must agree on."""
    names = ("shape", "classes", "codec", "per_channel")
    data: dict[str, object] = {f"data.{name}": getattr(run.data, name, None) for name in names}
    return {**data, "path": run.path.kind}


def velocity(teacher: Teacher, reads: Reads) -> Velocity:
    """The velocity to learn at (x_t, t, c), where the data's own is v. Raises UserError where none was taught."""
    if (read := reads.velocity) is None:
        raise UserError(f"the teacher {teacher.source} has no velocity: take one whose objective teaches it")

    def mixed(x: Sample, t: Time, c: Cond, v: Sample) -> Sample:
        with torch.no_grad():
            inside = (teacher.interval.low <= t) & (t <= teacher.interval.high)
            weight = torch.where(inside, teacher.mix, teacher.elsewhere)
            return v + lift(weight, v).to(v) * (read(x, t, c).to(v) - v)

    return mixed


class Coupled:
    """Pairs of data and noise, with their classes, as a source of batches."""

    def __init__(self, x: Tensor, z: Tensor, c: Tensor) -> None:
        """All in memory."""
        self.table, self.z = Table(x, c), z

    def batch(self, step: int, batch: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """x, c and z of a step, in the order that a table of x would have."""
        rows = rows_of(step, batch, size=len(self.z), seed=seed)
        return self.table.x[rows], self.table.c[rows], self.z[rows]


def couple(run: Run, pairs: Pairs, reads: Reads, folder: Path, device: torch.device, watch: Watch) -> Coupled:
    """Pairs that the teacher's flow joins: those that stand in `folder`, and the others, made now, file by file.

    Raises UserError where the solver cannot serve the reading.
    """
    check(pairs.solver, reads, pairs.nfe)
    c = generate.labels(pairs.count, run.data.classes)
    files: list[Path] = []
    with watch("the teacher's pairs", pairs.count) as tick:
        for first in range(0, pairs.count, SHARD):
            some = range(first, min(first + SHARD, pairs.count))
            files.append(file := folder / f"{first:08d}.safetensors")
            if not file.is_file():
                made = joined(run, pairs, reads, c[list(some)], some, device)
                with archive.replacing(file) as out:
                    out.write(safetensors.torch.save(made))
            tick(some.stop, "")
    parts = [checkpoint.load_weights(file) for file in files]
    return Coupled(*(torch.cat([part[name] for part in parts]) for name in ("x", "z", "c")))


@torch.no_grad()
def joined(run: Run, pairs: Pairs, reads: Reads, c: Tensor, numbers: range, device: torch.device) -> dict[str, Tensor]:
    """Noise, and the data that the flow carries it to."""
    z = noise(pairs.seed, numbers, 0, run.data.shape).to(device)
    x = pairs.solver(reads, run.path, z, c.to(device), pairs.nfe, lambda k: noise(pairs.seed, numbers, k, z.shape[1:]))
    return {"x": x.float().cpu(), "z": z.cpu(), "c": c}
