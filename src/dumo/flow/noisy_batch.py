"""The random numbers of a training step, and the noisy batch (`NoisyBatch`) that a loss gets.

1. `make_draws` draws the times, noise, dropped labels and further numbers of a step's rows on the CPU, at any time
   before the step and in any thread.
2. `add_noise` makes the noisy batch on the data's device: it divides the data by the path's sd, couples noise to data
   (`Coupling`), puts both on the path, drops conditions and asks the teacher. It waits for the device only if there is
   a coupling.

`draw` does both at once, for steps that are only counted, timed or tried; `path_velocity` stands in for their teacher.
`Noise` and `Signs` are laws of further numbers that an objective may ask for.

Each quantity has a random stream of its own, keyed by a hash of (seed, step, its name). A number per row is drawn for
the global batch, and each rank takes its rows. Samples shaped like the data are drawn for a rank's rows only, each
keyed by its number in the batch, because drawing the noise of many ranks takes longer than a step. Either way a row is
the same on every rank. So two ranks equal one, a resumed run needs no generator state, and two objectives get the same
t, z and dropped labels, whatever else they draw.
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
from dumo.types import Cond, Law, NoisyBatch, Objective, Rows, Sample, Spec, TeacherVelocity, Time, Trail
from dumo.types.batch_rows import pin, to_device

# The name in the key of the stream that picks the rows that the teacher answers.
PRIOR = "prior"


class Noise(Law):
    """N(0, I), shaped like the data."""

    kind: Literal["noise"] = "noise"

    def rows(self, key: Sequence[int | str], rows: range, batch: int, shape: Sequence[int]) -> Sample:
        """Draw one sample for each of these rows."""
        return keyed_normal(*key, rows=rows, shape=shape)


class Signs(Law):
    """Shaped like the data, 1 or -1 with equal probability: Hutchinson's directions (`dumo.flow.likelihood`)."""

    kind: Literal["signs"] = "signs"

    def rows(self, key: Sequence[int | str], rows: range, batch: int, shape: Sequence[int]) -> Sample:
        """Draw one sample of signs for each of these rows."""
        return random.keyed_signs(*key, rows=rows, shape=shape)


class Coupling(Spec):
    """A pairing of noise with data that makes paths cross less, so that one velocity can follow them.

    It is optimal transport within a minibatch (Pooladian et al. 2023; Tong et al. 2024): among rows of one class, in
    groups of `group` neighbouring rows, noises change places so that the sum of squared distances between data and
    noise is the least. x, z and the class keep their laws, and z stays independent of the class. The joint law of x and
    z is another, and so is the flow, which still carries N(0, I) to the data.
    """

    group: int = Field(ge=2, le=ROWS)  # rows; the larger, the straighter the paths; costs its cube, per class

    def __call__(self, x: Sample, z: Sample, c: Cond) -> Sample:
        """The noises z (b, ...) in the order in which they go with data x (b, ...).

        c: the conditions, before any is dropped. The rows are of whole groups. It is computed on the CPU, so a GPU is
        waited for. In a class of a group with a number that is not finite, noises stay in place.
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
    """For each row of x (n, d) the number of the row of z (n, d) that goes with it, (n,), by scipy.

    The sum of their squared distances is the least. Where a number is not finite, row i goes with row i.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import

    cost = torch.cdist(x, z).square()
    if not cost.isfinite().all():
        return torch.arange(len(x))
    return torch.from_numpy(linear_sum_assignment(cost.numpy())[1])


@dataclass(frozen=True)
class Draws:
    """The random numbers of some rows of a step's batch, on the CPU."""

    t: Time
    r: Time
    z: Sample | None  # float32; None: the data bring their noise with them
    kept: Rows  # the rows whose condition is not dropped
    keys: dropout.Keys  # of the masks of dropout
    laws: Mapping[str, Tensor]  # the objective's further laws, by name
    moving: tuple[bool, ...] | None  # the rows that may have r != t, fixed by place; None: all
    teacher_rows: Rows | None = None  # the rows that a teacher answers; None: all, if there is one

    def __getitem__(self, rows: slice) -> "Draws":
        """The draws of some of the rows."""
        moving = None if self.moving is None else self.moving[rows]
        return replace(self._map_tensors(lambda v: v[rows]), moving=moving)

    def pin(self) -> "Draws":
        """A copy in pinned memory, from which a GPU reads while the CPU goes on."""
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
    batch: the number of rows of the whole batch, on all ranks.
    rows: those of the batch that are wanted.
    z: whether to draw their noise, too.
    prior: the share of the batch that a teacher answers; None: it answers all.
    """
    row_numbers = range(batch)[rows]
    with torch.device("cpu"):  # whatever torch.set_default_device says
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
    """Make the noisy batch of data x (b, ...) and conditions c (b, ...) by draws of as many rows, on the device of x.

    null: what a dropped condition becomes, a row each, or one class number for all.
    progress: the share of the training that is done, from 0 to 1.
    z: noise that belongs to x; None: that of the draws.
    teacher: what it makes of (x_t, t, c, v_t) takes the place of v_t, on the rows `draws.teacher_rows`.
    coupling: which noise goes with which data; None: as drawn.
    between: the places from x to z that a trajectory goes through, at equal steps, of which t is to be an end.
    asks_teacher: whether the teacher is asked for v_t; else it is asked by the loss alone (`FromTeacher.reads_v_t`).
    """
    # Send the draws to the device. Times stay in float32 if the data are in 16 bits.
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

    # Put data and noise on the path.
    x = x / path.sd
    if coupling:
        z = coupling(x, z, c)
    x_t, v_t = path.at(x, z, t)

    # Drop conditions. Rows that the teacher answers are not guided, because it is guided itself.
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
        teacher=teacher,
        trail=trail,
        host=(draws.t.to(exact), guided_on_host) if device.type == "cuda" else None,
        teacher_rows=teacher_rows,
    )
    if trail is not None:
        b = replace(b, x_t=b.on(t))
    if teacher and asks_teacher:
        b = replace(b, v_t=b.velocity(b.x_t, t, v_t))
    return b


def path_velocity(x_t: Sample, t: Time, c: Cond, v_t: Sample) -> Sample:
    """Return v_t, the path's own velocity: it stands in for a teacher if a step is only counted, timed or tried."""
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
    """Make the noisy batch of x (b, ...), rows `first : first + b` of a step's batch of `batch` rows (None: all of it).

    null, z, teacher: as in `add_noise`; the teacher is asked only if the objective reads v_t (`FromTeacher.reads_v_t`).
    Raises ValueError if the batch ends before these rows do.
    """
    if batch is None:
        batch = len(x)
    rows = slice(first, first + len(x))
    if rows.stop > batch:
        raise ValueError(f"rows {first} to {rows.stop} are not of a batch of {batch}")
    draws = make_draws(objective, x.shape[1:], seed=seed, step=step, batch=batch, rows=rows, z=z is None)
    asks_teacher = objective.needs.teacher.reads_v_t
    return add_noise(draws, path, x, c, null, progress=progress, z=z, teacher=teacher, asks_teacher=asks_teacher)
