"""Pairs of data and noise that a teacher's flow joins, made once, and where that flow is between the two."""

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from dumo import dist, stop
from dumo.config.spec import Run
from dumo.config.teacher import Pairs
from dumo.data.epoch import rows_of
from dumo.data.source import Table
from dumo.io import digest
from dumo.io.file import write
from dumo.io.weights import load
from dumo.progress import Bar
from dumo.random import noise
from dumo.sampling import generate
from dumo.sampling.solver import Stepper
from dumo.training import agreement
from dumo.types import Reads, Trail, UserError

SHARD = 1024  # pairs to a file: what a stop may lose


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
    return Coupled(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def load_pairs(file: Path) -> dict[str, Tensor]:
    """The pairs of a file. Raises UserError where it is damaged."""
    try:
        return load(file)
    except UserError as error:
        raise UserError(f"{file} is damaged: delete it, and these pairs are made again") from error


def joined(run: Run, pairs: Pairs, reads: Reads, c: Tensor, numbers: range, device: torch.device) -> dict[str, Tensor]:
    """Noise, the data that the flow carries it to, and as many points between as the objective learns from."""
    c_here = c.to(device)
    if points := run.objective.needs.points:
        assert isinstance(pairs.solver, Stepper), "a run of another is refused"
        z = noise(pairs.seed, numbers, 0, run.data.shape).to(device)
        x, between = generate.trailed(reads, run.path, pairs.solver, z, c_here, nfe=pairs.nfe, points=points)
        return {"x": x.cpu(), "z": z.cpu(), "c": c, "between": between.cpu()}
    z, x = generate.solve(
        *(reads, run.path, pairs.solver, c_here),
        nfe=pairs.nfe,
        seed=pairs.seed,
        shape=run.data.shape,
        indices=numbers,
    )
    return {"x": x.cpu(), "z": z.cpu(), "c": c}
