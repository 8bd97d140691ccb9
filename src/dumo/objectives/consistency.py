"""Consistency training (CM, iCT; ECT, Geng et al. 2025, arXiv 2406.14548): neighbouring points predict the same data.

CM is by Song et al. 2023, iCT by Song and Dhariwal 2024. With u the mean velocity to the data, the network's prediction
of the data is D. A discretization (`Ratio`, `KarrasGrid`, `Equal`) selects r < t. x_r lies along v_t from x_t, and has
the same data and noise on the linear path; there theta^- must make the same prediction:

    D(x_t, t) = x_t - t u                                                                     (1)
    x_r = x_t - (t - r) v_t                                                                   (2)
    D(x_t, t) = sg D(x_r, r),        and at r = 0        D = x_r = x                          (3)

Divided by t - r, this is DuMo's residual with a secant for the derivative, and at r = 0 it is flow matching:

    e = (sg D(x_r, r) - D(x_t, t)) / (t - r) = u - v_t + r (u - u_r) / (t - r)                (4)
    e  is about  u - v_t + t du/dt

The loss is a function of (t - r) e, the difference of D, as the authors' loss. With sigma = t / (1 - t), the weight is

    1 / (sigma_t - sigma_r) = (1 - t) (1 - r) / (t - r)                                       (5)

Together, the length of the step cancels in (1 - t) (1 - r) e. The gradient with respect to u still has the factor
t / (sigma_t - sigma_r), which grows as steps get shorter.

LCM (Luo et al. 2023, arXiv 2310.04378) learns from a teacher: with the run's `teacher`, v_t is its velocity, and (2)
is a step of DDIM, which is Euler's method on the linear path.

TCM (Lee et al. 2025, arXiv 2410.14895) is a second stage on times above `low` only, so that the network's capacity
serves one-step sampling. Below `low`, D is that of the first stage, the initial weights, which are kept as theta^-: the
run's `train.ref` with decay 1. At the boundary t = `low`, r < `low`, and the second stage learns from the first.
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
ECT_K = 8.0  # k of ECT's mapping, which lengthens steps near the data (`training/loss.py`)


class Ratio(Spec):
    """ECT: sigma_r = sigma_t max(0, 1 - q^-(stage + 1) (1 + 8 sigmoid(-sigma_t))) (`training/loss.py`).

    t is not changed. In the first stage, with q = 2, most rows have r = 0, which is flow matching.
    """

    kind: Literal["ratio"] = "ratio"
    # ECT's short run uses 256, with stages = 1.
    q: float = Field(default=2.0, gt=1, le=FACTOR)
    # Of 25,000 steps each, in 200,000 steps (`run_ecm.sh`).
    stages: int = Field(default=8, ge=1, le=STEPS)

    @property
    def changes(self) -> bool:
        """Whether r depends on the progress of the training."""
        return self.stages > 1

    def __call__(self, t: Time, progress: float) -> tuple[Time, Time]:
        """Return t and r; r < t, but r = t at t = 0, and at t = 1 unless r = 0."""
        stage = min(int(progress * self.stages), self.stages - 1)
        sigma = EDM_SD * t / (1 - t)
        ratio = (1 - self.q ** -(stage + 1) * (1 + ECT_K * (-sigma).sigmoid())).clamp(min=0)  # sigma_r / sigma_t
        return t, ratio * t / (1 - t + ratio * t).clamp(min=1e-12)


class KarrasGrid(Spec):
    """The noise levels of Karras et al. (2022), Eq. 5: t is rounded up and r down to the ends of a step.

    The lowest level is 0, at which a consistency model is the identity; in the paper it is 0.002, with a special
    parametrization. The probability of a step is that of t between its ends. A log-normal distribution is therefore
    iCT's discretized one (Song and Dhariwal 2024, Sec. 3.5), except for the 0.8 % outside of the grid, which the first
    and last step get.
    """

    kind: Literal["grid"] = "grid"
    # Growth of the number of steps: "double" is iCT's (Sec. 3.4), "root" CM's (App. C).
    growth: Literal["double", "root"] = "double"
    # The number of steps at the start and at the end of the training: s_0 and s_1 of iCT.
    first: int = Field(default=10, ge=1, le=STEPS)
    last: int = Field(default=1280, ge=1, le=STEPS)

    @model_validator(mode="after")
    def _require_order(self) -> "KarrasGrid":
        require_order(first=self.first, last=self.last)
        return self

    @property
    def changes(self) -> bool:
        """Whether steps depend on the progress of the training."""
        return self.first != self.last

    def steps(self, progress: float) -> int:
        """Return the number of steps between the highest and the lowest level."""
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
    """Steps of equal length: t is rounded up and r down to the ends of a step.

    LCM uses 50 steps of equal length in its schedule's index (Luo et al. 2023, arXiv 2310.04378, Alg. 1).
    """

    kind: Literal["equal"] = "equal"
    changes: ClassVar[bool] = False
    count: int = Field(ge=1, le=STEPS)

    def __call__(self, t: Time, progress: float) -> tuple[Time, Time]:
        """Return the ends of the step that t falls into."""
        i = (t * self.count).floor().clamp(max=self.count - 1)
        return (i + 1) / self.count, i / self.count


Discretization = Annotated[Equal | KarrasGrid | Ratio, Field(discriminator="kind")]


class Consistency(ObjectiveSpec):
    """The flow map to the data, from pairs of neighbouring times; theta^- is the run's `train.ref`.

    A discretization maps t and the progress of the training to t, possibly rounded, and r < t, which approaches t
    during training. The papers use noise levels, y = x + sigma z, with data of standard deviation 0.5: in units of
    that, x_t = (1 - t) y and t / (1 - t) = 2 sigma. The defaults are ECT's.
    """

    kind: Literal["consistency"] = "consistency"
    times: Times = _LOG_NORMAL
    # The papers have no labels or do not drop them (our choice).
    drop: float = Field(default=0.0, ge=0, le=1)
    discretization: Discretization = Ratio()
    # Weight rows by 1 / (sigma_t - sigma_r).
    weighted: bool = True
    # c of a Huber loss; 0 is the length of the difference, and None plain l2.
    soft: float | None = Field(default=0.0, ge=0)
    # The lowest time of a second stage: TCM's sigma = 1 with data of 0.5 is 2/3. None trains all times.
    low: float | None = Field(default=None, gt=0, lt=1, exclude_if=lambda low: low is None)
    # The weight of rows at `low`. TCM's 0.1 for the mean over a quarter of the rows is 0.3 per row.
    boundary: float = Field(default=_BOUNDARY, ge=0, exclude_if=lambda boundary: boundary == _BOUNDARY)

    @property
    def gain(self) -> float:
        """The largest factor by which (4) amplifies the network's rounding error: r / (t - r) is unbounded."""
        return inf

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the network, and the other needs of the loss."""
        ref = None
        if self.low:
            # The weights of the first stage.
            ref = 1.0
        elif not self.weighted and self.soft is None:
            # CM increases it from 0.9 to 0.9986; the constant is our choice.
            ref = 0.99
        # Without noise levels of the linear path, the loss is also defined for diffusion paths.
        has_no_noise_level = not self.weighted and self.discretization.kind == "equal"
        formulas = STRAIGHT if has_no_noise_level else Formulas(unit=True)
        # If t changes, the loss computes v_t again.
        keeps_t = not self.low and self.discretization.kind == "ratio"
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
        """Make one pass with gradients and one without. Rows with t = r, which are at t = 0 or 1, have weight 0.

        With `low`, times are clamped to it, and theta^- and the network make a pass without gradients each. Raises
        UserError if the precision is too low for short steps.
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
        has_no_step = r == t
        inverse_step = (1 / (t - r).masked_fill(has_no_step, 1)).masked_fill(has_no_step, 0)
        e = u_hat - b.v_t + lift(r * inverse_step, b.x_t) * (u_hat - u_r)  # (4)
        difference = lift(t - r, b.x_t) * e  # sg D(x_r, r) - D(x_t, t), of (3)
        loss = mean_square(difference) if self.soft is None else huber(difference, self.soft)
        if self.weighted:
            weight = weight * (1 - t) * (1 - r) * inverse_step  # (5)
        return Terms(weight * loss, {"u": mean_square(e)}, {"clipped_share": clipped_share(e)})

    def readings(self, net: Net) -> Readings:
        """Return the endpoint x_0 = x_t - t u, for times from `low`. The head is a velocity only at t = 0."""
        return Readings(endpoint=jump_to_data(net), lowest=self.low or 0.0)
