"""Laws by which the times (t, r) of a batch's rows are drawn, r <= t, or one number for each row.

`dumo.flow.draw` calls a law with the number of rows and a generator; the law returns t and r, (n,) each. `moving` says,
without drawing, which rows may have r < t: kinds of rows are chosen by their place in the batch, so that every rank and
step has as many of each. `Times` is the union of the laws that an objective may name.

First come laws of one number (`Number`). In [0, 1] it may be a time (`ToData`): t, with r = 0, the data. Drawn for
something else, as a share or a knob, it is a number. Then come laws of pairs: `Pair` and all below it.

Where a law has `both_ways`, every second row with a step has its times exchanged, t < r: a jump up to the noise (ours;
F2D2's code draws t and r alike).
"""

from abc import abstractmethod
from collections.abc import Sequence
from math import pi
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Generator

from dumo.runtime import random
from dumo.runtime.limits import PASSES, require_order
from dumo.types import Law, PerSample, Time, TimeLaw
from dumo.types.rows import split_by_step, spread_evenly

EDM_SD = 0.5  # the standard deviation of the data: EDM (Karras et al. 2022)
EDM_RHO = 7.0  # EDM, Eq. 5
KARRAS_ROOTS = (0.002 ** (1 / EDM_RHO), 80.0 ** (1 / EDM_RHO))  # of sigma_min and sigma_max: EDM, Tab. 1


class Number(Law):
    """A number per row, drawn for the whole batch at once."""

    @abstractmethod
    def one(self, n: int, g: Generator) -> PerSample:
        """Draw one number for each of n rows."""

    def rows(self, key: Sequence[int | str], rows: range, batch: int, shape: Sequence[int]) -> PerSample:
        """The numbers (len(rows),) of these rows of a batch, which are drawn for all of it by the stream of the key."""
        return self.one(batch, random.stream(*key))[rows.start : rows.stop]


class ToData(TimeLaw, Number):
    """A law of one number in [0, 1]; as a law of times every jump goes to the data, r = 0."""

    @property
    def between(self) -> bool:
        """Whether jumps may end before the data: with r = 0 none does."""
        return False

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """t and r of n rows, both (n,)."""
        t = self.one(n, g)
        return t, torch.zeros_like(t)


class Beta(ToData):
    """t ~ Beta(a, b): (theta_1, theta_2) of the paper (Sec. 3.3 and Tab. 3)."""

    kind: Literal["beta"] = "beta"
    a: float = Field(default=2.4, gt=0)
    b: float = Field(default=2.4, gt=0)

    def one(self, n: int, g: Generator) -> Time:
        """Draw a ratio of two gamma variables."""
        shape = torch.tensor([self.a, self.b]).expand(n, 2)
        gamma = torch._standard_gamma(shape, generator=g)  # pyright: ignore[reportPrivateImportUsage]
        return gamma[:, 0] / gamma.sum(1)


class Uniform(ToData):
    """t ~ U(low, high); where both are equal, that one time."""

    kind: Literal["uniform"] = "uniform"
    low: float = Field(default=0.0, ge=0, le=1)
    high: float = Field(default=1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> "Uniform":
        require_order(low=self.low, high=self.high)
        return self

    def one(self, n: int, g: Generator) -> Time:
        """Draw n times t, (n,)."""
        return self.low + (self.high - self.low) * torch.rand(n, generator=g)


class LogitNormal(ToData):
    """t = sigmoid(N(mean, std^2)) (Esser et al. 2024, Sec. 3.1; mean and std of MeanFlow, Tab. 4)."""

    kind: Literal["logit_normal"] = "logit_normal"
    mean: float = -0.4
    std: float = Field(default=1.0, gt=0)

    def one(self, n: int, g: Generator) -> Time:
        """Draw n times t, (n,)."""
        return (self.mean + self.std * torch.randn(n, generator=g)).sigmoid()


class Arctan(ToData):
    """tan(pi t / 2) = exp(N(mean, std^2)) / sd: a log-normal noise level as an angle, in units of a right angle.

    sCM on the trigonometric path (Lu and Song 2025, its Sec. 4), whose data have the standard deviation `sd`; with
    sd = 1, FACM's times of its FM and CM losses (its code, `losses.py`: mean -0.8, std 1.6).
    """

    kind: Literal["arctan"] = "arctan"
    mean: float = -1.0
    std: float = Field(default=1.4, gt=0)
    sd: float = Field(default=EDM_SD, gt=0)

    def one(self, n: int, g: Generator) -> Time:
        """Draw n times t, (n,)."""
        normal = torch.randn(n, generator=g)
        return ((self.mean + self.std * normal).exp() / self.sd).atan() * 2 / pi


class Karras(ToData):
    """The time of a noise level sigma with sigma^(1 / rho) uniform from sigma_min to sigma_max.

    The levels of Karras et al. (2022), Eq. 5, in the limit of many: CM (Song et al. 2023) takes each as often.
    """

    kind: Literal["karras"] = "karras"

    def one(self, n: int, g: Generator) -> Time:
        """Draw n times t, (n,)."""
        low, high = KARRAS_ROOTS
        return karras_time(low + (high - low) * torch.rand(n, generator=g))


def karras_time(root: PerSample) -> Time:
    """t = s / (1 + s), s = sigma / sd, of the noise level whose root is root = sigma^(1 / rho) (EDM, Eq. 5)."""
    s = root**EDM_RHO / EDM_SD
    return s / (1 + s)


def karras_root(t: Time) -> PerSample:
    """The root sigma^(1 / rho) of the noise level of t: the inverse of `karras_time`."""
    return (EDM_SD * t / (1 - t)) ** (1 / EDM_RHO)


OneTimeLaw = Annotated[Arctan | Beta | Karras | LogitNormal | Uniform, Field(discriminator="kind")]


class Atom(ToData):
    """One law, but t = `at` on a share of the rows, evenly spread: TCM's boundary (Lee et al. 2025, its p)."""

    kind: Literal["atom"] = "atom"
    of: OneTimeLaw = Beta()
    share: float = Field(default=0.15, ge=0, le=1)
    at: float = Field(default=1.0, ge=0, le=1)

    def one(self, n: int, g: Generator) -> Time:
        """Draw n times t, (n,)."""
        is_atom = torch.tensor(spread_evenly(n, self.share), dtype=torch.bool)
        return self.of.one(n, g).masked_fill(is_atom, self.at)


class Pair(TimeLaw):
    """Two draws of one law, sorted, so that r <= t; r = t on a share `velocity_ratio` of the rows (MeanFlow, Sec. 4.3).

    That share is rho of the paper's Eq. 5, which draws it by a coin. Here the rows are evenly spread by place (ours),
    so every rank and every step has the same number of them. With `to` r has a law of its own, and is t where that is
    above t (DMF, SoFlow); with `flow` so has t on the rows with r = t (DMF, SoFlow, alpha-Flow).
    """

    kind: Literal["pair"] = "pair"
    of: OneTimeLaw = LogitNormal()
    velocity_ratio: float = Field(default=0.75, ge=0, le=1)
    to: OneTimeLaw | None = None  # of r; None: the lower of two draws
    flow: OneTimeLaw | None = None  # of t where r = t; None: as the others

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """t and r of n rows, both (n,)."""
        a = self.of.one(n, g)
        b = (self.to or self.of).one(n, g)
        t = torch.maximum(a, b) if self.to is None else a
        r = torch.minimum(a, b)
        moving = torch.tensor(self.moving(n))
        if self.flow is not None:
            t = torch.where(moving, t, self.flow.one(n, g))
        return t, torch.where(moving, r, t)

    def moving(self, n: int) -> tuple[bool, ...]:
        """Which of the first n rows may have r < t; all others have r = t."""
        return tuple(not rests for rests in spread_evenly(n, self.velocity_ratio))

    @property
    def moving_share(self) -> float:
        """The share of rows that may have r < t: all but `velocity_ratio`."""
        return 1 - self.velocity_ratio


class Jumps(TimeLaw):
    """Three kinds of rows: r = t on a share `velocity_ratio`; of the others a share `data_ratio` has r = 0 (ours).

    So one mean velocity learns what a single pass asks of it, and the jumps between, whose r is uniform in [0, t]. The
    kinds are evenly spread by place, and every kind draws its t by itself.
    """

    kind: Literal["jumps"] = "jumps"
    of: OneTimeLaw = LogitNormal()  # of t
    velocity_ratio: float = Field(default=0.5, ge=0, le=1)  # ours, as all shares here
    data_ratio: float = Field(default=0.5, ge=0, le=1)
    both_ways: bool = Field(default=False, exclude_if=lambda both: not both)

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """t and r of n rows, both (n,)."""
        rest, data, between = self._places(n)
        t = torch.zeros(n)
        r = torch.zeros(n)
        t[rest] = r[rest] = self.of.one(len(rest), g)
        t[data] = self.of.one(len(data), g)
        t[between] = self.of.one(len(between), g)
        r[between] = t[between] * torch.rand(len(between), generator=g)
        if self.both_ways:
            is_up = torch.zeros(n, dtype=torch.bool)
            is_up[data[1::2] + between[1::2]] = True  # of each kind half
            t, r = torch.where(is_up, r, t), torch.where(is_up, t, r)
        return t, r

    def moving(self, n: int) -> tuple[bool, ...]:
        """Which of the first n rows may have r < t; all others have r = t."""
        return tuple(not rests for rests in spread_evenly(n, self.velocity_ratio))

    @property
    def moving_share(self) -> float:
        """The share of rows that may have r < t: all but `velocity_ratio`."""
        return 1 - self.velocity_ratio

    @property
    def between(self) -> bool:
        """Whether jumps end before the data: all but the share `data_ratio` do."""
        return self.data_ratio < 1

    @property
    def climbs(self) -> bool:
        """Whether some rows have t < r, jumps up to the noise."""
        return self.both_ways

    def _places(self, n: int) -> tuple[list[int], list[int], list[int]]:
        """Numbers of the rows at rest (r = t), of those that jump to the data (r = 0), and of the other jumps."""
        jumps, rest = split_by_step(self.moving(n))
        far, near = split_by_step(spread_evenly(len(jumps), self.data_ratio))
        return rest, [jumps[i] for i in far], [jumps[i] for i in near]


class Below(TimeLaw):
    """t by a law, and r uniform from 0 to t: RCGM, whose r = t - U t (TwinFlow's code), and IMM."""

    kind: Literal["below"] = "below"
    of: OneTimeLaw = Uniform()

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """t and r of n rows, both (n,)."""
        t = self.of.one(n, g)
        return t, t * torch.rand(n, generator=g)


class Gap(TimeLaw):
    """t - r = sigmoid(N(-0.8, 1)); r = sigmoid(N(-0.4, 1)) given that r < 1 - (t - r) (TVM, `im256_w2.yaml`)."""

    kind: Literal["gap"] = "gap"

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """t and r of n rows, both (n,); r by its inverse distribution function (TVM's code, `loss.py`)."""
        gap = LogitNormal(mean=-0.8).one(n, g).double()
        max_quantile = torch.special.ndtr((1 - gap).logit() + 0.4)  # of r = 1 - gap
        quantile = torch.rand(n, generator=g).double().clamp(min=1e-12) * max_quantile
        r = (torch.special.ndtri(quantile) - 0.4).sigmoid()
        return (r + gap).clamp(max=1).float(), r.float()


class Dyadic(TimeLaw):
    """Steps of 2^-k, k < levels, from a place on their own grid, on one row of `every`; r = t on the others.

    Shortcut models (Frans et al. 2025), whose code gives every k as many rows (`targets_shortcut.py`); here k is drawn,
    and the rows stand evenly spread, so that any share of a batch has its part of them (ours). t of the other rows lies
    on the grid of 2^-levels, or is by a law of its own (`flow`, ours).
    """

    levels: ClassVar[int] = 7  # `denoise_timesteps` of its code, 128 = 2^7
    every: ClassVar[int] = 8  # `bootstrap_every`
    kind: Literal["dyadic"] = "dyadic"
    flow: OneTimeLaw | None = None  # of t where r = t; None: on the finest grid

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """t and r of n rows, both (n,)."""
        jumps = torch.tensor(self.moving(n))
        k = torch.where(jumps, (torch.rand(n, generator=g) * self.levels).floor(), self.levels)
        step = torch.exp2(-k)
        t = 1 - (torch.rand(n, generator=g) / step).floor() * step
        if self.flow is not None:
            t = torch.where(jumps, t, self.flow.one(n, g))
        return t, torch.where(jumps, t - step, t)

    def moving(self, n: int) -> tuple[bool, ...]:
        """Which of the first n rows have r < t, by their place alone."""
        return tuple(i % self.every == 0 for i in range(n))

    @property
    def moving_share(self) -> float:
        """The share of rows that have r < t: one of `every`."""
        return 1 / self.every

    @property
    def group(self) -> int:
        """How many neighbouring rows belong together: each `every` of them hold one with r < t."""
        return self.every


class Groups(TimeLaw):
    """Neighbouring rows, `size` of them, share their times (IMM: M of its Alg. 1)."""

    size: ClassVar[int] = 4  # M; rows of a last group that is not whole share theirs, too
    kind: Literal["groups"] = "groups"
    of: Below = Below()

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """t and r of n rows, both (n,)."""
        num_groups = -(-n // self.size)  # rounded up
        t, r = self.of(num_groups, g)
        return t.repeat_interleave(self.size)[:n], r.repeat_interleave(self.size)[:n]

    @property
    def group(self) -> int:
        """How many neighbouring rows belong together: those that share their times."""
        return self.size


class Grid(TimeLaw):
    """t and r on a grid of equal steps, r < t: t uniform on all of it but 0, r on what lies below (CMT; r ours)."""

    kind: Literal["grid"] = "grid"
    steps: int = Field(default=16, ge=1, le=PASSES)  # CMT's code, of its teacher's solver

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """t and r of n rows, both (n,)."""
        k = torch.randint(1, self.steps + 1, (n,), generator=g)
        l = (torch.rand(n, generator=g) * k).floor().clamp(max=k - 1)  # noqa: E741, of r as k of t
        return k / self.steps, l / self.steps


Times = Annotated[
    Arctan | Atom | Below | Beta | Dyadic | Gap | Groups | Jumps | Karras | LogitNormal | Pair | Uniform,
    Field(discriminator="kind"),
]
