"""Consistency training (CM, iCT; ECT, Geng et al. 2025, arXiv 2406.14548): two points of a path make the same data.

CM is of Song et al. 2023, iCT of Song and Dhariwal 2024. With u the mean velocity down to 0, the net guesses the data
as D. A discretization (`Ratio`, `KarrasGrid`, `Equal`) picks r < t; along v_t one goes from x_t to x_r, which on the
linear path has the same data and noise; and there theta^- must make the same guess:

    D(x_t, t) = x_t - t u                                                                     (1)
    x_r = x_t - (t - r) v_t                                                                   (2)
    D(x_t, t) = sg D(x_r, r),        and at r = 0        D = x_r = x                          (3)

Divided by t - r this is DuMo's residual with a secant for its derivative, and at r = 0 it is flow matching:

    e = (sg D(x_r, r) - D(x_t, t)) / (t - r) = u - v_t + r (u - u_r) / (t - r)                (4)
    e  is about  u - v_t + t du/dt

The loss is of (t - r) e, so it lives on D, as the authors' does, and has their weight, with sigma = t / (1 - t):

    1 / (sigma_t - sigma_r) = (1 - t) (1 - r) / (t - r)                                       (5)

Together one regresses (1 - t) (1 - r) e: the length of the step drops out. The gradient with respect to u still has the
factor t / (sigma_t - sigma_r), which grows as steps get short.

LCM (Luo et al. 2023, arXiv 2310.04378) learns from a teacher: with the run's `teacher`, v_t is its velocity, and (2)
is the step of DDIM, which on the linear path is Euler's.

TCM (Lee et al. 2025, arXiv 2410.14895) is a second stage, on times from `low` up alone: all of the net learns what
one-step sampling asks. Below, D is that of the first stage, which training begins with and keeps as theta^-: the run's
`train.ref` of decay 1. On the boundary, t = `low`, r lies below it, and there the second stage learns from the first.
"""

from math import ceil, inf, log, log2
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from dumo.flow.times import EDM_SD, KARRAS_ROOTS, karras_root, karras_time
from dumo.objectives.base import (
    STRAIGHT,
    Formulas,
    FromTeacher,
    Frozen,
    LogitNormal,
    Needs,
    Net,
    NoisyBatch,
    ObjectiveSpec,
    Readings,
    Spec,
    Terms,
    Time,
    Times,
    clipped_share,
    frozen,
    huber,
    jump_to_data,
    lift,
    mean_square,
    require_precise_passes,
)
from dumo.runtime.limits import FACTOR, STEPS, require_order

_BOUNDARY = 0.3  # weight of rows at `low`: TCM
_LOG_NORMAL = LogitNormal(mean=-1.1 + log(2), std=2.0)  # sigma = exp(N(-1.1, 4)) on data of standard deviation 0.5
NEAR = 8.0  # k of ECT's mapping: how much longer a step is near the data (`training/loss.py`)


class Ratio(Spec):
    """sigma_r = sigma_t max(0, 1 - q^-(stage + 1) (1 + 8 sigmoid(-sigma_t))): the mapping of ECT (`training/loss.py`).

    Times stay as they are drawn. At first, with q = 2, most of them have r = 0, which is flow matching.
    """

    kind: Literal["ratio"] = "ratio"
    q: float = Field(default=2.0, gt=1, le=FACTOR)  # with stages = 1, 256: their quick run
    stages: int = Field(default=8, ge=1, le=STEPS)  # 200,000 steps, the next stage after 25,000 (`run_ecm.sh`)

    @property
    def changes(self) -> bool:
        """Whether r changes with the training's progress."""
        return self.stages > 1

    def __call__(self, t: Time, progress: float) -> tuple[Time, Time]:
        """Return t and r; r < t, but r = t at t = 0, and at t = 1 unless r = 0."""
        stage = min(int(progress * self.stages), self.stages - 1)
        sigma = EDM_SD * t / (1 - t)
        ratio = (1 - self.q ** -(stage + 1) * (1 + NEAR * (-sigma).sigmoid())).clamp(min=0)  # sigma_r / sigma_t
        return t, ratio * t / (1 - t + ratio * t).clamp(min=1e-12)


class KarrasGrid(Spec):
    """The levels of Karras et al. (2022), Eq. 5: t goes up to the end of its step, and r is where the step begins.

    The lowest level is 0, where a consistency model is the identity; theirs is 0.002, with an identity made for it.
    Each step gets the share of the rows that t's law has between its ends. So a log-normal is iCT's discretised one
    (Song and Dhariwal 2024, Sec. 3.5), but for the 0.8 % beyond the grid, which the outermost steps take.
    """

    kind: Literal["grid"] = "grid"
    growth: Literal["double", "root"] = "double"  # of the number of steps: iCT's (its Sec. 3.4), CM's (its App. C)
    # The number of steps at the start and at the end of the training: s_0 and s_1 of iCT.
    first: int = Field(default=10, ge=1, le=STEPS)
    last: int = Field(default=1280, ge=1, le=STEPS)

    @model_validator(mode="after")
    def _require_order(self) -> "KarrasGrid":
        require_order(first=self.first, last=self.last)
        return self

    @property
    def changes(self) -> bool:
        """Whether steps change with the training's progress."""
        return self.first != self.last

    def steps(self, progress: float) -> int:
        """How many steps there are from the highest level to the lowest."""
        if self.growth == "root":
            growth = (self.last + 1) ** 2 - self.first**2
            return max(1, ceil((progress * growth + self.first**2) ** 0.5 - 1))
        doublings = int(progress * (log2(self.last / self.first) + 1))
        return min(self.first * 2**doublings, self.last)

    def __call__(self, t: Time, progress: float) -> tuple[Time, Time]:
        """Return the ends of the step that t falls into."""
        low, high = KARRAS_ROOTS
        n = self.steps(progress)
        i = ((karras_root(t) - low) / (high - low) * n).floor().clamp(0, n - 1)
        top = karras_time(low + (high - low) * (i + 1) / n)
        bottom = karras_time(low + (high - low) * i / n)
        return top, torch.where(i > 0, bottom, 0.0)


class Equal(Spec):
    """Steps of one length: t goes up to the end of its step, and r is where the step begins.

    LCM has 50 (Luo et al. 2023, arXiv 2310.04378, Alg. 1), equal in the index of its table.
    """

    kind: Literal["equal"] = "equal"
    changes: ClassVar[bool] = False  # with the training's progress
    count: int = Field(ge=1, le=STEPS)

    def __call__(self, t: Time, progress: float) -> tuple[Time, Time]:
        """Return the ends of the step that t falls into."""
        i = (t * self.count).floor().clamp(max=self.count - 1)
        return (i + 1) / self.count, i / self.count


Discretization = Annotated[Equal | KarrasGrid | Ratio, Field(discriminator="kind")]


class Consistency(ObjectiveSpec):
    """The flow map to the data, from pairs of neighbouring times; theta^- is the run's `train.ref`.

    A discretization takes t and the share of the training that is done; it returns t, which may move, and r < t, ever
    closer to it. Authors speak of noise levels, y = x + sigma z with data of deviation 0.5: in units of that x_t =
    (1 - t) y, t / (1 - t) = 2 sigma. Defaults: ECT.
    """

    kind: Literal["consistency"] = "consistency"
    times: Times = _LOG_NORMAL
    drop: float = Field(default=0.0, ge=0, le=1)  # ours: all three train without labels or without dropping any
    discretization: Discretization = Ratio()
    weighted: bool = True  # by 1 / (sigma_t - sigma_r)
    soft: float | None = Field(default=0.0, ge=0)  # c of a Huber loss; 0: the length of the difference; None: plain l2
    # The first time of a second stage, as its authors' sigma = 1 of 0.5 is 2/3; None: all times are trained.
    low: float | None = Field(default=None, gt=0, lt=1, exclude_if=lambda low: low is None)
    # Weight of rows at `low`: theirs is 0.1 for the mean of a quarter of the rows: 0.3 where other rows weigh 1.
    boundary: float = Field(default=_BOUNDARY, ge=0, exclude_if=lambda boundary: boundary == _BOUNDARY)

    @property
    def gain(self) -> float:
        """The factor by which (4) multiplies the rounding of the net, at most."""
        return inf

    @property
    def needs(self) -> Needs:
        """Rounding is multiplied by r / (t - r), 1 / (1 - t) times sigma_r / (sigma_t - sigma_r): without bound."""
        ref = None
        if self.low:
            ref = 1.0  # the first stage
        elif not self.weighted and self.soft is None:
            ref = 0.99  # CM's goes from 0.9 to 0.9986; ours
        has_no_noise_level = not self.weighted and self.discretization.kind == "equal"  # none of the linear path's
        formulas = STRAIGHT if has_no_noise_level else Formulas(unit=True)
        keeps_t = not self.low and self.discretization.kind == "ratio"  # else v_t is taken anew, at another t
        teacher = FromTeacher(reads_v_t=keeps_t)
        return Needs(
            inputs=("t",),
            heads=("u",),
            formulas=formulas,
            teacher=teacher,
            ref=ref,
            scheduled=self.discretization.changes,
            amplifies=self.gain,
        )

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """One pass with gradients, one without. A row at t = r, which is at t = 0 or 1 only, weighs nothing.

        With `low`, times below it are raised to it, and there are two passes without gradients: of theta^-, and of the
        net. Raises UserError where passes are too coarse for short steps.
        """
        require_precise_passes(b, self.gain, self.kind)
        t = b.t
        weight = torch.ones_like(t)
        if self.low:
            weight = weight.masked_fill(t <= self.low, self.boundary)
            t = t.clamp(min=self.low)
        t, r = self.discretization(t, b.progress)
        if t is not b.t:
            b = b.at(t)
        (u_hat,) = net(b.x_t, b.c, t=t)
        x_r = b.x_t - lift(t - r, b.x_t) * b.v_t  # (2)
        (u_r,) = ref(x_r, b.c, t=r)
        if self.low:
            (u_r_of_net,) = frozen(net)(x_r, b.c, t=r)
            u_r = torch.where(lift(r < self.low, x_r), u_r, u_r_of_net)
        at_rest = r == t
        inverse_step = (1 / (t - r).masked_fill(at_rest, 1)).masked_fill(at_rest, 0)
        e = u_hat - b.v_t + lift(r * inverse_step, b.x_t) * (u_hat - u_r)  # (4)
        difference = lift(t - r, b.x_t) * e  # sg D(x_r, r) - D(x_t, t), of (3)
        loss = mean_square(difference) if self.soft is None else huber(difference, self.soft)
        if self.weighted:
            weight = weight * (1 - t) * (1 - r) * inverse_step  # (5)
        return Terms(weight * loss, {"u": mean_square(e)}, {"clipped_share": clipped_share(e)})

    def readings(self, net: Net) -> Readings:
        """The head jumps to the data, x_0 = x_t - t u, from no time below `low`. It is a velocity at t = 0 only."""
        return Readings(endpoint=jump_to_data(net), lowest=self.low or 0.0)
