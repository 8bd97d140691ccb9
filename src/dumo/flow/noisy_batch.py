"""The random numbers of a training step, and the noisy batch (`NoisyBatch`) of a loss.

1. `make_draws` draws the times, noise, dropped labels and the objective's further random numbers on the CPU, at any
   time before the step and in any thread.
2. `add_noise` makes the noisy batch on the data's device: it divides the data by the path's sd, couples noise with data
   (`Coupling`), computes the points of the path, drops conditions and calls the teacher. It synchronizes with the
   device only to couple noise with data, unless the draws were coupled before (`Draws.couple`).

`draw` does both, for steps that are only counted, timed or checked; `path_velocity` replaces their teacher. `Noise` and
`Signs` are distributions of an objective's further random numbers.

Each quantity has its own random stream, keyed by a hash of (seed, step, its name). Scalars are drawn for the global
batch, and each rank uses its rows. Samples shaped like the data are drawn for the rows of a rank only, each keyed by
its index in the batch, because drawing the noise of many ranks would take longer than a step. Random numbers therefore
do not depend on the number of ranks, a resumed run needs no generator state, and all objectives get the same t, z and
dropped labels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Int64
from pydantic import Field
from torch import Tensor

from dumo.flow import dropout
from dumo.flow.path import FlowPath
from dumo.runtime import random
from dumo.runtime.limits import ROWS
from dumo.runtime.random import keyed_normal, random_row_mask, stream
from dumo.types import Cond, Law, NoisyBatch, Objective, OnHost, Rows, Sample, Spec, TeacherVelocity, Time, Trail
from dumo.types.batch_rows import pin, to_device

# The key of the random stream that selects the rows with a teacher's target.
PRIOR = "prior"


class Noise(Law):
    """Standard normal noise, shaped like the data."""

    kind: Literal["noise"] = "noise"

    def rows(self, key: Sequence[int | str], rows: range, batch: int, shape: Sequence[int]) -> Sample:
        """Draw one sample for each of these rows."""
        return keyed_normal(*key, rows=rows, shape=shape)


class Signs(Law):
    """Random signs, shaped like the data: Hutchinson's directions (`dumo.flow.likelihood`)."""

    kind: Literal["signs"] = "signs"

    def rows(self, key: Sequence[int | str], rows: range, batch: int, shape: Sequence[int]) -> Sample:
        """Draw one sample of signs for each of these rows."""
        return random.keyed_signs(*key, rows=rows, shape=shape)


class Coupling(Spec):
    """Minibatch optimal transport between noise and data (Pooladian et al. 2023; Tong et al. 2024).

    Within groups of `group` consecutive rows, and among rows of one class, noises are permuted to minimize the sum of
    squared distances between data and noise, so that paths cross less. The marginal distributions do not change, and z
    remains independent of the class. The flow differs, but still maps N(0, I) to the data.
    """

    # Larger groups give straighter paths. The cost is cubic in the number of rows of a class in a group.
    group: int = Field(ge=2, le=ROWS)

    def __call__(self, x: Sample, z: Sample, c: Cond) -> Sample:
        """Permute the noises z (b, ...) to match the data x (b, ...), whose rows form whole groups.

        c: the conditions before any are dropped.

        It runs on the CPU, and so synchronizes with a GPU if x or z is there. Noises of a group and class with a
        non-finite value are not permuted.
        """
        class_of_row = torch.unique(c.cpu(), dim=0, return_inverse=True)[1]
        data = x.detach().cpu().double().flatten(1)
        noise = z.detach().cpu().double().flatten(1)
        order = torch.arange(len(z))
        for group in order.clone().split(self.group):
            for k in class_of_row[group].unique():
                rows = group[class_of_row[group] == k]
                order[rows] = rows[_cheapest_assignment(data[rows], noise[rows])]
        return z[order.to(z.device)]


def _cheapest_assignment(x: Tensor, z: Tensor) -> Int64[Tensor, " n"]:
    """Return the index (n,) of the row of z (n, d) that is assigned to each row of x (n, d), by scipy.

    The assignment minimizes the sum of squared distances. It is the identity if a value is not finite.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import

    cost = torch.cdist(x, z).square()
    if not cost.isfinite().all():
        return torch.arange(len(x))
    return torch.from_numpy(linear_sum_assignment(cost.numpy())[1])


@dataclass(frozen=True)
class Draws:
    """The random numbers of some rows of a step's batch, on the CPU.

    z: noise in float32; None if the data have noise of their own.
    kept: the rows whose condition is not dropped.
    keys: of the dropout masks.
    laws: draws of the objective's further distributions, by name.
    moving: the rows that may have r != t, determined by their position; None means all.
    teacher_rows: the rows with a teacher's target; None means all, if there is a teacher.
    step: the number of steps before this one.
    is_coupled: whether the noise was assigned to the data (`couple`).
    """

    t: Time
    r: Time
    z: Sample | None
    kept: Rows
    keys: dropout.Keys
    laws: Mapping[str, Tensor]
    moving: tuple[bool, ...] | None
    teacher_rows: Rows | None = None
    step: int = 0
    is_coupled: bool = False

    def __getitem__(self, rows: slice) -> "Draws":
        """Return the draws of some of the rows."""
        moving = None if self.moving is None else self.moving[rows]
        return replace(self._map_tensors(lambda v: v[rows]), moving=moving)

    def couple(self, coupling: Coupling, path: FlowPath, x: Sample, c: Cond) -> "Draws":
        """Return draws whose noise is assigned to the data x (b, ...) with conditions c, all of them on the CPU."""
        assert self.z is not None, "data with noise of their own are not coupled"
        return replace(self, z=coupling(x / path.sd, self.z.to(x), c), is_coupled=True)

    def pin(self) -> "Draws":
        """Return a copy in pinned memory, for asynchronous transfer to a GPU."""
        return self._map_tensors(pin)

    def _map_tensors(self, change: Callable[[Tensor], Tensor]) -> "Draws":
        return replace(
            self,
            t=change(self.t),
            r=change(self.r),
            z=None if self.z is None else change(self.z),
            kept=change(self.kept),
            keys=change(self.keys),
            laws={name: change(v) for name, v in self.laws.items()},
            teacher_rows=None if self.teacher_rows is None else change(self.teacher_rows),
        )


def make_draws(
    objective: Objective,
    shape: Sequence[int],
    *,
    seed: int,
    step: int,
    batch: int,
    rows: slice = slice(None),
    z: bool = True,
    prior: float | None = None,
) -> Draws:
    """Draw the random numbers of some rows of a step's batch of samples, on the CPU.

    shape: of a sample.
    batch: the number of rows of the global batch.
    rows: the rows of the batch to draw for.
    z: whether to draw noise.
    prior: the share of the batch with a teacher's target; None means all.
    """
    row_numbers = range(batch)[rows]
    # Override torch.set_default_device.
    with torch.device("cpu"):
        t, r = objective.times(batch, stream(seed, step, "times"))
        is_condition_kept = torch.rand(batch, generator=stream(seed, step, "kept")) >= objective.drop
        moving = objective.times.moving(batch)
        laws: dict[str, Tensor] = {}
        for name, law in objective.needs.laws.items():
            laws[name] = law.rows((seed, step, "law", name), row_numbers, batch, shape)
        teacher_rows = None
        if prior is not None:
            teacher_rows = random_row_mask(seed, step, PRIOR, batch, prior)[rows]
        return Draws(
            t=t[rows],
            r=r[rows],
            z=keyed_normal(seed, step, "z", rows=row_numbers, shape=shape) if z else None,
            kept=is_condition_kept[rows],
            keys=dropout.keys(seed, step, batch)[rows],
            laws=laws,
            moving=None if moving is None else moving[rows],
            teacher_rows=teacher_rows,
            step=step,
        )


def add_noise(
    draws: Draws,
    path: FlowPath,
    x: Sample,
    c: Cond,
    null: Cond | int,
    *,
    progress: float = 0.0,
    z: Sample | None = None,
    teacher: TeacherVelocity | None = None,
    coupling: Coupling | None = None,
    between: Trail | None = None,
    asks_teacher: bool = True,
) -> NoisyBatch:
    """Make the noisy batch of data x (b, ...) and conditions c (b, ...) with the draws of b rows, on the device of x.

    null: the replacement of a dropped condition: one row each, or the null label.
    progress: the share of the training that is done, from 0 to 1.
    z: noise for x; None means that of the draws.
    teacher: a velocity (x_t, t, c, v_t) that replaces v_t on the rows `draws.teacher_rows`.
    coupling: assigns noise to data, unless the draws have done so; None means in the order of the draws.
    between: the points of a trajectory from x to z, at equal time steps; t must be the end of a step.
    asks_teacher: whether to call the teacher for v_t; otherwise only the loss calls it (`FromTeacher.reads_v_t`).
    """
    # Copy the draws to the device. Times stay in float32 if the data are in 16 bits.
    device = x.device
    exact = torch.promote_types(x.dtype, torch.float32)
    t = to_device(draws.t, device).to(exact)
    r = to_device(draws.r, device).to(exact)
    kept = to_device(draws.kept, device)
    teacher_rows = None if draws.teacher_rows is None else to_device(draws.teacher_rows, device)
    laws = {name: to_device(v, device).to(exact) for name, v in draws.laws.items()}
    if z is None:
        assert draws.z is not None, "noise was neither drawn nor given"
        z = to_device(draws.z, device).to(x)

    # Compute the points of the path.
    x = x / path.sd
    if coupling and not draws.is_coupled:
        z = coupling(x, z, c)
    x_t, v_t = path.at(x, z, t)

    # Drop conditions. Rows with a teacher's target are not guided, because the teacher may be guided itself.
    if isinstance(null, int):
        null = torch.full_like(c, null)
    c = torch.where(kept.view(-1, *(1,) * (c.ndim - 1)), c, null)
    guided_on_host = draws.kept
    if teacher_rows is not None and draws.teacher_rows is not None:
        kept = kept & ~teacher_rows
        guided_on_host = guided_on_host & ~draws.teacher_rows

    trail = None
    if between is not None:
        trail = torch.cat([x[:, None], between, z[:, None]], 1)
    b = NoisyBatch(
        path=path,
        x=x,
        z=z,
        t=t,
        r=r,
        x_t=x_t,
        v_t=v_t,
        c=c,
        null=null,
        kept=kept,
        moving=draws.moving,
        drawn=laws,
        progress=progress,
        step=draws.step,
        teacher=teacher,
        trail=trail,
        host=OnHost(draws.t.to(exact), guided_on_host, draws.teacher_rows) if device.type == "cuda" else None,
        teacher_rows=teacher_rows,
    )
    if trail is not None:
        b = replace(b, x_t=b.on(t))
    if teacher and asks_teacher:
        b = replace(b, v_t=b.velocity(b.x_t, t, v_t))
    return b


def path_velocity(x_t: Sample, t: Time, c: Cond, v_t: Sample) -> Sample:
    """Return v_t, in place of a teacher's velocity, for steps that are only counted, timed or checked."""
    return v_t


def draw(
    objective: Objective,
    path: FlowPath,
    x: Sample,
    c: Cond,
    null: Cond | int,
    *,
    seed: int,
    step: int,
    batch: int | None = None,
    first: int = 0,
    progress: float = 0.0,
    z: Sample | None = None,
    teacher: TeacherVelocity | None = None,
) -> NoisyBatch:
    """Make the noisy batch of x (b, ...), rows `first : first + b` of a step's batch of `batch` rows.

    batch: None means b.
    null, z, teacher: as in `add_noise`; the teacher is called only if the objective uses v_t (`FromTeacher.reads_v_t`).

    Raises ValueError if these rows exceed the batch.
    """
    if batch is None:
        batch = len(x)
    rows = slice(first, first + len(x))
    if rows.stop > batch:
        raise ValueError(f"rows {first} to {rows.stop} exceed a batch of {batch} rows")
    draws = make_draws(objective, x.shape[1:], seed=seed, step=step, batch=batch, rows=rows, z=z is None)
    asks_teacher = objective.needs.teacher.reads_v_t
    return add_noise(draws, path, x, c, null, progress=progress, z=z, teacher=teacher, asks_teacher=asks_teacher)
