"""Load a teacher, which provides the velocity target, or pairs of noise and data on trajectories of its flow.

1. `open_teacher` opens a run's folder, a user-defined function, or the net in training without its adapters.
2. `LoadedTeacher.require_same` checks that the teacher has not changed since the run began.
3. `LoadedTeacher.training_source` writes teacher.json. If the spec asks for pairs, `make_pairs` generates them as a
   table (`dumo.io.table`) in the run's folder, and `TeacherPairs` reads batches from it.

`base_flow` and `BaseNet` use a net without its adapters as a teacher.
"""

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
from dumo.config.check_spec import check_guidance
from dumo.config.load import load
from dumo.config.spec import Run
from dumo.config.teacher_spec import Pairs, Teacher
from dumo.data import Data, Latents
from dumo.flow import sampling
from dumo.flow.compatibility import require_same_data
from dumo.flow.module import Flow
from dumo.flow.path import FlowPath
from dumo.flow.precision import Precision, autocast
from dumo.flow.reading import bind_knobs, teacher_velocity
from dumo.flow.solver import Heun
from dumo.io import digest, table, tensor_files
from dumo.io.data_source import DataSource, TensorData
from dumo.io.read import read_json, write_json
from dumo.io.table import Column, TableIndex
from dumo.objectives.flow_matching import FlowMatching
from dumo.run.trained import max_rows_per_pass
from dumo.run.weights import load_run
from dumo.runtime import dist, signals
from dumo.runtime.progress import Bar, print_line
from dumo.runtime.random import noise
from dumo.training import agreement
from dumo.training.state import State
from dumo.types import Cond, Heads, Needs, Readings, Sample, TeacherVelocity, Time, Trail, UserError

FILE = "teacher.json"
# The subfolder of the run's folder for pairs.
_PAIRS_FOLDER = "pairs"
_CODEC_HASH = "data.codec.sha256"
# Pairs per shard; an interruption loses at most one shard.
SHARD_ROWS = 1024


@dataclass(frozen=True)
class LoadedTeacher:
    """A loaded teacher with the guidance of its spec."""

    spec: Teacher
    readings: Readings
    # The velocity target; None if the run learns only from pairs.
    velocity: TeacherVelocity | None
    # The content of teacher.json: the source and its SHA-256.
    record: dict[str, str]

    def require_same(self, folder: Path) -> None:
        """Raise UserError if the folder was trained with another teacher, or if its pairs have changed."""
        file = folder / FILE
        pairs_folder = folder / _PAIRS_FOLDER
        has_taught = (folder / "checkpoints").is_dir() or any(pairs_folder.glob("shard-*"))
        if not has_taught or not file.is_file():
            return

        # Compare hashes, because the teacher may have been moved.
        record_before = read_json(file)
        if not isinstance(record_before, dict) or record_before.get("sha256") != self.record["sha256"]:
            raise UserError(
                f"{folder} began with another teacher: {record_before} then, {self.record} now. Put the teacher back "
                "as it was, or start anew in another folder"
            )

        # Check the pairs.
        index = table.read_index(pairs_folder, PairsIndex)
        if index is None:
            return
        table.require_intact(pairs_folder, index, deep=True)
        if index.teacher != self.record["sha256"]:
            raise UserError(f"{pairs_folder} are another teacher's: {PairsIndex.remake_hint}")

    def write_record(self, folder: Path) -> None:
        """Write teacher.json on rank 0."""
        if dist.is_main():
            write_json(folder / FILE, self.record)

    def training_source(
        self, source: DataSource, run: Run, folder: Path, device: torch.device, bar: Bar
    ) -> "DataSource | TeacherPairs":
        """Write teacher.json, and return the training data: `source`, or newly generated pairs of the teacher.

        Every rank must call it.
        """
        self.write_record(folder)
        pairs = self.spec.pairs
        if pairs is None:
            return source
        points = run.objective.needs.teacher.points
        index = PairsIndex.of(pairs, points, run.path, run.data, self.record["sha256"])
        return make_pairs(index, self.readings, folder / _PAIRS_FOLDER, device, bar, rows=max_rows_per_pass(run.train))


def open_teacher(teacher: Teacher, run: Run, state: State, device: torch.device) -> LoadedTeacher:
    """Open a run's teacher with the guidance of its spec.

    `state` contains the net in training, which is the teacher if `teacher.kind` is base. Raise UserError if the teacher
    cannot be opened, was trained on other data, or has no velocity.
    """
    match teacher.kind:
        case "run":
            flow, sha256 = _run_flow(teacher, run.data, run.path, device)
            readings = flow.readings(guide=teacher.guide)
        case "python":
            user_reads, sha256 = _call_user_function(teacher, run, device)
            readings = teacher.guide(user_reads, run.data.classes)
        case "base":
            sha256 = str(state.frozen)
            readings = base_flow(teacher, run, state.net).readings(guide=teacher.guide)
    velocity = teacher_velocity(readings) if teacher.gives_velocity(run.objective.needs.teacher) else None
    return LoadedTeacher(teacher, readings, velocity, {"source": teacher.source or teacher.kind, "sha256": sha256})


def base_flow(teacher: Teacher, run: Run, net: nn.Module) -> Flow:
    """Return the flow of the model under a net's adapters: the original pipeline, or a subject's few-step run.

    A few-step run uses the objective in its own run.yaml. Raise UserError if it does not support `teacher.guide`.
    """
    base_net = BaseNet(net, run.train.precision)
    if not (run.start and run.has_subject):
        return Flow(_BaseVelocity(base_net, run.objective.needs), FlowMatching(), direct=True, classes=run.data.classes)
    few_step = load(run.start.source)
    check_guidance(
        teacher.guide,
        few_step.data,
        few_step.objective,
        few_step.training_guidance,
        "teacher.guide.scale",
        run.start.source,
    )
    return Flow(base_net, few_step.objective, direct=True, classes=run.data.classes, knobs=few_step.sample.knobs)


class BaseNet(nn.Module):
    """The model under a net's adapters, evaluated in a precision. The net must have a context manager `base()`.

    It is called between the passes of a step, even inside the loss. It therefore restores adapters and training modes,
    changes no weights and records no gradients.
    """

    def __init__(self, net: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.net = net
        self.precision: Precision = precision

    @torch.no_grad()
    def forward(self, x: Sample, c: Cond, /, **inputs: Time) -> Heads:
        """Return the heads of the net without its adapters, each (b, *shape), without gradients and dropout."""
        off = cast(Callable[[], AbstractContextManager[None]], self.net.base)
        with sampling.eval_mode(self.net), off(), autocast(self.precision, x.device):
            return self.net(x, c, **inputs)


class _BaseVelocity(nn.Module):
    """A pipeline's model as a net with one head, the velocity: at r = t each head equals the velocity."""

    def __init__(self, base: BaseNet, needs: Needs) -> None:
        super().__init__()
        self.base = base
        self.needs = needs

    def forward(self, x: Sample, c: Cond, /, *, t: Time) -> Heads:
        """Return the velocity (b, *shape) as the only head."""
        times = [name for name in self.needs.names if name not in self.needs.knobs]
        return bind_knobs(self.base, **self.needs.knobs)(x, c, **dict.fromkeys(times, t))[:1]


def _run_flow(teacher: Teacher, data: Data, path: FlowPath, device: torch.device) -> tuple[Flow, str]:
    """Return the flow of another run and the SHA-256 of its weights.

    Raise UserError if it was trained on other data, or does not support `teacher.guide`.
    """
    trained = load_run(teacher.source, device=str(device))
    teacher_run = trained.spec
    teacher_facts = _facts(teacher_run.data, teacher_run.path)
    facts = _facts(data, path)
    # A hash is None if the codec was not read yet.
    if None in (teacher_facts[_CODEC_HASH], facts[_CODEC_HASH]):
        facts.pop(_CODEC_HASH)
    require_same_data(f"the teacher {teacher.source}", teacher_facts, facts)
    check_guidance(
        teacher.guide,
        teacher_run.data,
        teacher_run.objective,
        teacher_run.training_guidance,
        "teacher.guide.scale",
        teacher.source,
    )
    flow = Flow(trained.net, teacher_run.objective, direct=True, classes=data.classes, knobs=teacher_run.sample.knobs)
    return flow, tensor_files.sha256(trained.file)


def _facts(data: Data, path: FlowPath) -> dict[str, object]:
    """Return the fields in which a teacher and its student must agree."""
    codec = data.codec if isinstance(data, Latents) else None
    return {
        "data.shape": data.shape,
        "data.classes": data.classes,
        "data.codec": codec.facts() if codec else None,
        _CODEC_HASH: codec.sha256 if codec else None,
        "path": path.kind,
        "path.sd": path.sd,
    }


def _call_user_function(teacher: Teacher, run: Run, device: torch.device) -> tuple[Readings, str]:
    """Call a user-defined function; return its readings, tested on two rows, and the SHA-256 of its source code.

    The hash does not cover functions that it calls. Raise UserError if the shape of its velocity differs from x.
    """
    module, _, name = teacher.source.partition(":")
    trust.require([teacher.source], "teacher.source of this run")
    if dist.is_main():
        print_line(f"teacher.source: this run executes {teacher.source}")
    x = noise(0, range(2), 0, run.data.shape).to(device)
    t = torch.full((2,), 0.5, device=device)
    # Include the null class.
    c = torch.tensor([0, run.data.classes], device=device)
    with _importable(Path.cwd()):
        function = getattr(importlib.import_module(module), name)
        readings = cast(Readings, function(run, device))
        if readings.velocity is None:
            raise UserError(
                f"teacher.source = {teacher.source}: the Readings that it returned has velocity=None: set it"
            )
        with torch.no_grad():
            v = readings.velocity(x, t, c)
        if v.shape != x.shape:
            raise UserError(
                f"teacher.source = {teacher.source}: the velocity of x of shape {tuple(x.shape)} has shape "
                f"{tuple(v.shape)}: return one of the shape of x"
            )
        source_code = inspect.getsource(function)
    return readings, digest.of_bytes(source_code.encode())


@contextmanager
def _importable(folder: Path) -> Generator[None]:
    """Add a folder to the import path, as `python -m` does for the current folder."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


class TeacherPairs:
    """A data source of pairs of data and noise with classes."""

    def __init__(self, x: Tensor, z: Tensor, c: Tensor, between: Trail | None = None) -> None:
        """Take tensors in memory; `between` (n, points - 1, *shape) are points of the trajectory from x to z."""
        self.table = TensorData(x, c)
        self.z = z
        self.between = between

    def batch(self, step: int, batch_size: int, seed: int, rows: slice = slice(None)) -> tuple[Tensor, ...]:
        """Return x, c, z and, if present, `between` for the positions `rows` of a step's batch."""
        numbers = self.numbers(step, batch_size, seed, rows)
        return self.table.x[numbers], self.table.c[numbers], *(tensor[numbers] for tensor in self._noise_and_trail)

    @property
    def _noise_and_trail(self) -> tuple[Tensor, ...]:
        """z, and `between` if present."""
        return (self.z,) if self.between is None else (self.z, self.between)

    def numbers(self, step: int, batch_size: int, seed: int, rows: slice = slice(None)) -> Tensor:
        """Return the indices (b,) of the pairs at the positions `rows` of a step's batch."""
        return self.table.numbers(step, batch_size, seed, rows)

    def fingerprint(self) -> str:
        """Return a hash of all pairs."""
        return digest.short(self.table.fingerprint(), *map(digest.of_tensor, self._noise_and_trail))


class PairsIndex(TableIndex):
    """The index.json of a teacher's pairs: data x, noise z, classes c, and points between on the trajectory."""

    noun: ClassVar[str] = "set of pairs"
    remake_hint: ClassVar[str] = "delete it, and these pairs are made again"
    is_repairable: ClassVar[bool] = False
    # SHA-256 of the teacher's weights or source code.
    teacher: str
    path: FlowPath
    solver: Heun = Pairs.solver
    nfe: int
    points: int
    classes: int

    @classmethod
    def of(cls, pairs: Pairs, points: int, path: FlowPath, data: Data, teacher_sha256: str) -> "PairsIndex":
        """Create the index. `points` is the number of points per trajectory that the objective uses."""
        shape = data.shape
        columns = {
            "x": Column(dtype="float32", shape=shape),
            "z": Column(dtype="float32", shape=shape),
            "c": Column(dtype="int64"),
        }
        if points:
            columns["between"] = Column(dtype="float32", shape=(points - 1, *shape))
        return cls(
            columns=columns,
            rows=pairs.count,
            shard_rows=SHARD_ROWS,
            teacher=teacher_sha256,
            path=path,
            nfe=pairs.passes(points),
            points=points,
            classes=data.classes,
        )


def make_pairs(
    index: PairsIndex, readings: Readings, folder: Path, device: torch.device, bar: Bar, *, rows: int = sampling.BATCH
) -> TeacherPairs:
    """Integrate the teacher's flow from noise to data, and return the pairs. Shards in `folder` are reused.

    Missing shards are generated `rows` pairs at a time. Rank k of n generates the shards k, k + n, k + 2 n ...; every
    rank must call it, and gets all pairs. Raise on every rank: UserError if the pairs in `folder` are different or
    damaged, or if new pairs are not finite; OSError if the disk is full; Stopped after a signal, between two shards.
    """
    c = sampling.labels_in_turn(index.rows, index.classes)
    rank = dist.rank()
    world_size = dist.world()

    def make_shard(number: int, behind: Callable[[int], None]) -> dict[str, Tensor]:
        signals.check()
        numbers = index.span(number)
        pieces: list[dict[str, Tensor]] = []
        for start in range(0, len(numbers), rows):
            piece = numbers[start : start + rows]
            pieces.append(_solve_pairs(index, readings, c[list(piece)], piece, device))
        tensors = {name: torch.cat([piece[name] for piece in pieces]) for name in index.columns}
        not_finite = [k for k, x in zip(numbers, tensors["x"], strict=True) if not x.isfinite().all()]
        if not_finite:
            raise UserError(
                f"{len(not_finite)} of the teacher's pairs are not finite, the first is number {not_finite[0]}: mend "
                "the teacher, or take another"
            )
        return tensors

    def load_pairs() -> dict[str, Tensor]:
        written_index = table.read_index(folder, PairsIndex) or index
        # `make_shards` has compared the checksums.
        table.require_intact(folder, written_index)
        pairs_table = table.ShardTable(folder, written_index)
        shards = [pairs_table.tensors(number) for number in range(index.num_shards)]
        return {name: torch.cat([shard[name] for shard in shards]) for name in index.columns}

    with bar("the teacher's pairs", table.rows_of_rank(index.rows, index.shard_rows, rank, world_size)) as tick:
        # Raise the error of a rank on all ranks, which would otherwise wait for its shards.
        agreement.gather_results(
            lambda: table.make_shards(folder, index, make_shard, rank=rank, world=world_size, tick=tick).missing
        )
    return TeacherPairs(**agreement.on_each_rank(load_pairs))


def _solve_pairs(
    index: PairsIndex, readings: Readings, c: Tensor, numbers: range, device: torch.device
) -> dict[str, Tensor]:
    """Draw noise and integrate the teacher's flow; return x, z, c and, if used, the points between, on the CPU.

    `c` (n,) are the classes of the n pairs with these numbers.
    """
    shape = index.columns["x"].shape
    device_c = c.to(device)
    if index.points:
        z = noise(0, numbers, 0, shape).to(device)
        x, between = sampling.sample_trajectory(
            readings, index.path, index.solver, z, device_c, nfe=index.nfe, points=index.points
        )
        return {"x": x.cpu(), "z": z.cpu(), "c": c, "between": between.cpu()}
    z, x = sampling.sample_with_noise(
        readings, index.path, index.solver, device_c, nfe=index.nfe, seed=0, shape=shape, indices=numbers
    )
    return {"x": x.cpu(), "z": z.cpu(), "c": c}
