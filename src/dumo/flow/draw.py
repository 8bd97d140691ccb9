"""What a loss reads that is random: times, noise, dropped labels and further laws, all drawn here.

Every draw has a stream of its own, named after what it is. What else training draws has streams of its own, too: the
order of the data, augmentation, weights at step 0, and masks of dropout, whose keys are `dumo.flow.dropout`'s.

A stream's key is a hash of (seed, step, name). What is a number per row is drawn for the whole batch, of which each
caller takes its rows. What is shaped like the data is drawn for the caller's rows alone, each by its number in the
batch: else every rank would draw the noise of all, which takes longer than a step where ranks are many. Either way a
row is the same on every rank. So two ranks equal one, a resumed run needs no generator state, and an objective that
draws one thing more sees the same t, z and dropped labels as its sibling.

So the numbers of a step are known before it, all of them on the CPU: `drawn` makes them, at any time, in any thread,
and `noised` puts them to the data, on the data's device, which it does not wait for.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Int64
from pydantic import Field
from torch import Tensor

from dumo.flow import dropout
from dumo.flow.path import Path
from dumo.runtime import random
from dumo.runtime.bound import ROWS
from dumo.runtime.random import keyed, share_of_rows, stream
from dumo.types import Cond, Law, Noised, Objective, Rows, Sample, Spec, Taught, Time, Trail
from dumo.types.rows import pin, to_device

PRIOR = "prior"  # the name by which rows of a batch are picked that a teacher answers


class Noise(Law):
    """N(0, I), shaped like the data: drawn for the rows that are asked for."""

    kind: Literal["noise"] = "noise"

    def rows(self, key: Sequence[int | str], rows: range, batch: int, shape: Sequence[int]) -> Sample:
        """Draw one sample for each of these rows."""
        return keyed(*key, rows=rows, shape=shape)


class Signs(Law):
    """1 or -1 for every number of a sample, as likely: directions of Hutchinson's estimate (`dumo.flow.likelihood`)."""

    kind: Literal["signs"] = "signs"

    def rows(self, key: Sequence[int | str], rows: range, batch: int, shape: Sequence[int]) -> Sample:
        """Draw one sample of signs for each of these rows."""
        return random.signs(*key, rows=rows, shape=shape)


class Coupling(Spec):
    """Which noise goes with which data: paths that cross less, so that one velocity can follow them.

    Among rows of one class, in groups of `group` neighbouring rows, noises change places so that the sum of squared
    distances between data and noise is the least: optimal transport of a minibatch (Pooladian et al. 2023; Tong et al.
    2024). So x, z and the class keep their laws, and z stays independent of the class; the law of x and z together is
    another, and so is the flow, which still carries N(0, I) to the data.
    """

    group: int = Field(ge=2, le=ROWS)  # the larger, the straighter; its cube is what it costs, per class

    def __call__(self, x: Sample, z: Sample, c: Cond) -> Sample:
        """The noises z in the order in which they go with x, of classes c before any is dropped; of whole groups.

        Found on the CPU, so a GPU is waited for. Where a number is not finite nothing is moved.
        """
        there = torch.unique(c.cpu(), dim=0, return_inverse=True)[1]
        data, noise = (side.detach().cpu().double().flatten(1) for side in (x, z))
        order = torch.arange(len(z))
        for group in order.clone().split(self.group):
            for k in there[group].unique():
                rows = group[there[group] == k]
                order[rows] = rows[assigned(data[rows], noise[rows])]
        return z[order.to(z.device)]


def assigned(x: Tensor, z: Tensor) -> Int64[Tensor, " n"]:
    """For each row of x the row of z that goes with it, by scipy."""
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
    kept: Rows
    keys: dropout.Keys  # of the masks of dropout
    laws: Mapping[str, Tensor]  # the objective's further laws, by name
    moving: tuple[bool, ...] | None  # the rows that may have r < t, fixed by place; None: all
    taught: Rows | None = None  # the rows that a teacher answers; None: all, if there is one

    def __getitem__(self, rows: slice) -> "Draws":
        """Some of the rows."""
        return replace(self._each(lambda v: v[rows]), moving=self.moving and self.moving[rows])

    def pin(self) -> "Draws":
        """The same in pinned memory, from which a GPU reads while the CPU goes on."""
        return self._each(pin)

    def _each(self, f: Callable[[Tensor], Tensor]) -> "Draws":
        own = {name: f(getattr(self, name)) for name in ("t", "r", "kept", "keys")}
        z, taught = (None if v is None else f(v) for v in (self.z, self.taught))
        return replace(self, **own, z=z, taught=taught, laws={name: f(v) for name, v in self.laws.items()})


def drawn(
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
    """Draw for rows `rows` of the batch of `batch` samples of this shape at this step; `z`: their noise, too.

    `prior`: the share of the batch that a teacher answers; None: it answers all.
    """
    n, mine = batch, range(batch)[rows]
    t, r = objective.times(n, stream(seed, step, "times"))
    moving = objective.times.moving(n)
    return Draws(
        t=t[rows],
        r=r[rows],
        z=keyed(seed, step, "z", rows=mine, shape=shape) if z else None,
        kept=(torch.rand(n, generator=stream(seed, step, "kept")) >= objective.drop)[rows],
        keys=dropout.keys(seed, step, n)[rows],
        laws={name: law.rows((seed, step, "law", name), mine, n, shape) for name, law in objective.needs.laws.items()},
        moving=moving and moving[rows],
        taught=None if prior is None else share_of_rows(seed, step, PRIOR, n, prior)[rows],
    )


def noised(
    draws: Draws,
    path: Path,
    x: Sample,
    c: Cond,
    null: Cond | int,
    *,
    progress: float = 0.0,
    z: Sample | None = None,
    teacher: Taught | None = None,
    coupling: Coupling | None = None,
    between: Trail | None = None,
) -> Noised:
    """The record of rows whose numbers are drawn, the noise coupled to x by a `coupling`; all else as `draw` has it.

    `between` are the places from x to z that a trajectory goes through, at equal steps, of which t is to be an end.
    """
    here, exact = x.device, torch.promote_types(x.dtype, torch.float32)  # times stay exact where the data is bf16
    t, r, kept = (to_device(v, here) for v in (draws.t, draws.r, draws.kept))
    taught = None if draws.taught is None else to_device(draws.taught, here)
    t, r = t.to(exact), r.to(exact)
    if z is None:
        assert draws.z is not None, "noise was neither drawn nor given"
        z = to_device(draws.z, here).to(x)
    laws = {name: to_device(v, here).to(exact) for name, v in draws.laws.items()}

    x = x / path.sd
    if coupling:
        z = coupling(x, z, c)
    x_t, v_t = path.at(x, z, t)
    null = torch.full_like(c, null) if isinstance(null, int) else null
    c = torch.where(kept.view(-1, *(1,) * (c.ndim - 1)), c, null)
    guided = draws.kept
    if taught is not None and draws.taught is not None:  # what the teacher answers is guided already
        kept, guided = kept & ~taught, guided & ~draws.taught
    host = (draws.t.to(exact), guided) if here.type == "cuda" else None
    trail = None if between is None else torch.cat([x[:, None], between, z[:, None]], 1)
    b = Noised(path, x, z, t, r, x_t, v_t, c, null, kept, draws.moving, laws, progress, teacher, trail, host, taught)
    if trail is not None:
        b = replace(b, x_t=b.on(t))
    return replace(b, v_t=b.velocity(b.x_t, t, v_t)) if teacher else b


def draw(
    objective: Objective,
    path: Path,
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
    teacher: Taught | None = None,
) -> Noised:
    """Rows `first : first + len(x)` of the record that a batch of `batch` rows (None: these rows) gets at this step.

    `null` is what a dropped label becomes, a row each, or one class index for all (`data.classes` of our data).
    `z` is noise that belongs to x, as a teacher paired them; None: drawn. What a `teacher` makes of
    (x_t, t, c, v_t) takes the place of v_t. Raises ValueError where the batch ends before these rows do.
    """
    n, rows = batch or len(x), slice(first, first + len(x))
    if rows.stop > n:
        raise ValueError(f"rows {first} to {rows.stop} are not of a batch of {n}")
    draws = drawn(objective, x.shape[1:], seed=seed, step=step, batch=n, rows=rows, z=z is None)
    return noised(draws, path, x, c, null, progress=progress, z=z, teacher=teacher)
