"""`Flow`: a network, the objective that teaches it, and how it is read.

A training step calls it in this order: `make_draws` draws the random numbers, `add_noise` makes the record of a batch,
`terms` its loss. Whatever samples, judges, teaches or exports calls `readings`, and `batches` makes samples of them.

`dumo.flow.loop` is a flow for a user's network and loop. Neither owns an optimizer or a file.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from dumo.flow import dropout
from dumo.flow.guide import CFG
from dumo.flow.noise import Coupling, Draws, add_noise, make_draws
from dumo.flow.path import FlowPath, Linear
from dumo.flow.precision import Precision, autocast
from dumo.flow.reading import readings_of
from dumo.flow.solver import Solver
from dumo.types import (
    Cond,
    Frozen,
    Net,
    NoisyBatch,
    Objective,
    Readings,
    Sample,
    TeacherVelocity,
    Terms,
    Trail,
    UserError,
    frozen,
    unwrap,
)

if TYPE_CHECKING:
    from dumo.flow.sampling import Batch

Loss = Callable[[Net, Frozen, NoisyBatch], Terms]  # of (net, theta^-, record)


class Flow(nn.Module):
    """A network, called as dumo's own are, net(x, c, t=t), and the objective that teaches it.

    - `classes`: labels are 0 to classes - 1, and `classes` itself means none.
    - `teacher`: a function of (x_t, t, c, v_t), whose velocity takes the place of the data's, on a share `prior` of the
      rows (None: on all).
    - `ref`: theta^-, an average of the weights; None: the weights in training.
    - `precision`: of passes; None: float32 in pieces and samples.
    - `knobs`: values by name, for readings; None: the objective's own.
    - `guide`: guidance while sampling; None: none.
    """

    def __init__(
        self,
        net: nn.Module,
        objective: Objective,
        *,
        classes: int = 0,
        seed: int = 0,
        path: FlowPath | None = None,
        coupling: Coupling | None = None,
        teacher: TeacherVelocity | None = None,
        prior: float | None = None,
        ref: nn.Module | None = None,
        precision: Precision | None = None,
        knobs: Mapping[str, float] | None = None,
        guide: CFG | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.objective = objective
        self.classes = classes
        self.seed = seed
        self.path: FlowPath = path or Linear()
        self.coupling = coupling
        self.teacher = teacher
        self.prior = prior
        self.ref = Frozen(ref) if ref is not None else None
        self.precision: Precision | None = precision
        self.knobs = knobs
        self.guide = guide or CFG()

    # ------------------------------------------------------------------------------------ a training step, in pieces

    def make_draws(
        self, step: int, shape: Sequence[int], *, batch: int, rows: slice = slice(None), z: bool = True
    ) -> Draws:
        """The random numbers of these rows of a step's batch, for samples of this shape; `z`: their noise, too."""
        return make_draws(
            self.objective,
            shape,
            seed=self.seed,
            step=step,
            batch=batch,
            rows=rows,
            z=z,
            prior=self.prior,
        )

    def add_noise(
        self,
        draws: Draws,
        x: Sample,
        c: Cond,
        *,
        null: Cond | int | None = None,
        z: Sample | None = None,
        between: Trail | None = None,
        progress: float = 0.0,
        teacher: TeacherVelocity | None = None,
    ) -> NoisyBatch:
        """The record of data x (b, ...) of conditions c (b,), by draws of as many rows (`dumo.flow.noise.add_noise`).

        null: what a dropped condition becomes, for all or for each row; None: the class number of none.
        teacher: instead of the flow's own.
        """
        return add_noise(
            draws,
            self.path,
            x,
            c,
            self.classes if null is None else null,
            progress=progress,
            z=z,
            teacher=teacher or self.teacher,
            coupling=self.coupling,
            between=between,
            ask_at_x_t=self.objective.needs.teacher.at_x_t,
        )

    def terms(self, b: NoisyBatch, keys: dropout.Keys, loss: Loss | None = None, *, keep: bool = True) -> Terms:
        """The loss of a record, one number per row, by a network of dumo's.

        keys: of dropout, one for each row.
        loss: a compiled one; None: the objective's.
        keep: whether autocast's copies of weights are kept to the end of the pass (`dumo.flow.precision.autocast`).
        """
        if loss is None:
            loss = self.objective.loss
        with autocast(self.precision or "fp32", b.x_t.device, keep=keep), dropout.using(keys):
            return loss(cast(Net, self.net), self.reference, b)

    @property
    def reference(self) -> Frozen:
        """theta^-: the average given as `ref`, else the weights in training."""
        return self.ref or frozen(cast(Net, self.net))

    # --------------------------------------------------------------------------------------------------- how it is read

    def readings(self, guide: CFG | None = None, knobs: Mapping[str, float] | None = None) -> Readings:
        """What the network tells a solver, with this guidance and these knobs (None: the flow's own).

        c are class numbers. A reading that the objective never taught is None.
        """
        readings = readings_of(self.objective, cast(Net, self.net), knobs or self.knobs)
        return (guide or self.guide)(readings, self.classes)

    @property
    def device(self) -> torch.device:
        """The device of the network's first parameter; the CPU where it has none."""
        parameter = next(unwrap(self.net).parameters(), None)
        if parameter is None:
            return torch.device("cpu")
        return parameter.device

    def batches(
        self,
        readings: Readings,
        solver: Solver,
        c: Cond,
        *,
        nfe: int,
        seed: int,
        shape: Sequence[int],
        indices: Sequence[int] | None = None,
        batch: int | None = None,
        z: Sample | None = None,
    ) -> "Iterator[Batch]":
        """Samples of this shape, one per row of c, by a reading of the network, a batch at a time.

        The arguments are those of `sampling.sample_batches`. Raises UserError if the solver cannot serve the reading or
        nfe, and Stopped after a signal.
        """
        from dumo.flow import sampling  # training needs none of it

        return sampling.sample_batches(
            self.net,
            readings,
            self.path,
            solver,
            c,
            nfe=nfe,
            seed=seed,
            shape=shape,
            indices=indices,
            batch=batch or sampling.BATCH,
            device=self.device,
            precision=self.precision or "fp32",
            z=z,
        )

    def of(self, net: nn.Module) -> "Flow":
        """A copy of this flow over another network, such as an average of its weights."""
        other = copy.copy(self)
        other.__dict__["_modules"] = {}  # a copy shares them, and would give its network to this flow
        other.net = net
        return other


def require_loss_per_row(terms: Terms, rows: int, objective: str) -> Terms:
    """What an objective's loss returned. Raises UserError unless it is one number for each of this many rows.

    The trainer takes the mean, so a mean, or a column, would be trained on at another scale.
    """
    if terms.loss.shape != (rows,):
        raise UserError(
            f"objective '{objective}': its loss has shape {tuple(terms.loss.shape)}: return dumo.types.Terms(loss), "
            f"where loss has one number per row, shape ({rows},), such as dumo.types.mean_square(e)"
        )
    return terms
