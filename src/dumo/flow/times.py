"""Distributions of the times (t, r) of a batch's rows, with r <= t except for `both_ways`, and of further numbers.

1. `dumo.flow.noisy_batch` calls `moving`, which returns the rows that may have r != t, without drawing. The kind of a
   row depends on its position in the batch, so that every rank and step has the same number of each kind.
2. It calls the distribution with the number of rows n and a generator, and gets t and r, (n,) each.

`Times` is the union of the distributions that an objective may name. `Grid` is not part of it, because its steps are
those of a teacher's trajectories.

- Distributions of one number subclass `Number`, or `ToData` for a time t with r = 0. `one` draws it. Other numbers,
  such as shares and knobs, are further random numbers of an objective.
- `Pair` and the classes below it are distributions of (t, r). Some have distributions of t as fields (`OneTimeLaw`).

With `both_ways`, every second row with a jump has t and r exchanged, t < r: a jump towards the noise (our choice;
F2D2's code draws t and r from the same distribution).
"""

from abc import abstractmethod
from collections.abc import Sequence
from math import pi
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Generator

from dumo.flow.solver import jump_times
from dumo.runtime import random
from dumo.runtime.limits import PASSES, require_order
from dumo.types import QUIET, Law, PerSample, Time, TimeLaw
from dumo.types.batch_rows import split_by_moving, spread_evenly

# EDM is Karras et al. 2022
EDM_SD = 0.5  # the standard deviation of the data (EDM, Tab. 1)
_EDM_RHO = 7.0  # the exponent of its noise levels (EDM, Eq. 5)
KARRAS_ROOTS = (0.002 ** (1 / _EDM_RHO), 80.0 ** (1 / _EDM_RHO))  # of sigma_min and sigma_max (EDM, Tab. 1)


class Number(Law):
    """A distribution of one number per row, which is drawn for the whole batch at once."""

    @abstractmethod
    def one(self, n: int, g: Generator) -> PerSample:
        """Draw a number for each of n rows, (n,)."""

    def rows(self, key: Sequence[int | str], rows: range, batch: int, shape: Sequence[int]) -> PerSample:
        """Draw the numbers of the whole batch from the stream of the key, and return those of `rows`."""
        return self.one(batch, random.stream(*key))[rows.start : rows.stop]


class ToData(TimeLaw, Number):
    """A distribution of one number in [0, 1]. As a distribution of times, every jump goes to the data, r = 0."""

    @property
    def between(self) -> bool:
        """False, because all jumps end at the data."""
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
        """Draw n times t, (n,), as ratios of gamma variables: Beta(a, b) is G_a / (G_a + G_b)."""
        shape = torch.tensor([self.a, self.b]).expand(n, 2)
        # No public function draws gamma variables with a generator.
        gamma = torch._standard_gamma(shape, generator=g)  # pyright: ignore[reportPrivateImportUsage]
        return gamma[:, 0] / gamma.sum(1)


class Uniform(ToData):
    """t ~ U(low, high), or the constant low if low = high."""

    kind: Literal["uniform"] = "uniform"
    low: float = Field(default=0.0, ge=0, le=1)
    high: float = Field(default=1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _require_order(self) -> "Uniform":
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
    """The time of a noise level sigma with sigma^(1 / rho) uniform between those of sigma_min and sigma_max.

    This is the limit of many levels of EDM, Eq. 5, with equal probabilities as in CM (Song et al. 2023).
    """

    kind: Literal["karras"] = "karras"

    def one(self, n: int, g: Generator) -> Time:
        """Draw n times t, (n,)."""
        low, high = KARRAS_ROOTS
        return karras_time(low + (high - low) * torch.rand(n, generator=g))


def karras_time(root: PerSample) -> Time:
    """Return t = s / (1 + s), s = sigma / sd, of a noise level by its root sigma^(1 / rho) (EDM, Eq. 5)."""
    s = root**_EDM_RHO / EDM_SD
    return s / (1 + s)


def karras_root(t: Time) -> PerSample:
    """Return the root sigma^(1 / rho) of the noise level of t, the inverse of `karras_time`."""
    return (EDM_SD * t / (1 - t)) ** (1 / _EDM_RHO)


OneTimeLaw = Annotated[Arctan | Beta | Karras | LogitNormal | Uniform, Field(discriminator="kind")]


class Atom(ToData):
    """A distribution `of` t, with t = `at` on an evenly spread share of rows: TCM's boundary (Lee et al. 2025: p)."""

    kind: Literal["atom"] = "atom"
    of: OneTimeLaw = Beta()
    share: float = Field(default=0.15, ge=0, le=1)
    at: float = Field(default=1.0, ge=0, le=1)

    def one(self, n: int, g: Generator) -> Time:
        """Draw n times t, (n,)."""
        is_atom = torch.tensor(spread_evenly(n, self.share), dtype=torch.bool)
        return self.of.one(n, g).masked_fill(is_atom, self.at)


class Pair(TimeLaw):
    """Two sorted draws, r <= t, with r = t on a share `velocity_ratio` of the rows (MeanFlow, Sec. 4.3).

    The share is rho of the paper's Eq. 5, which draws each row independently. Here these rows are evenly spread (our
    choice), so every rank and step has the same number of them. With `to`, r has another distribution, clamped to t
    (DMF, SoFlow). With `flow`, t has another distribution on the rows with r = t (DMF, SoFlow, alpha-Flow).
    """

    kind: Literal["pair"] = "pair"
    of: OneTimeLaw = LogitNormal()
    velocity_ratio: float = Field(default=0.75, ge=0, le=1)
    # The distribution of r; None means the smaller of two draws.
    to: OneTimeLaw | None = None
    # The distribution of t if r = t; None means the same as for jumps.
    flow: OneTimeLaw | None = None

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
        """Return which of the first n rows may have r < t; the remaining rows have r = t."""
        return tuple(not is_velocity for is_velocity in spread_evenly(n, self.velocity_ratio))

    @property
    def moving_share(self) -> float:
        """The share of rows that may have r < t: all but `velocity_ratio`."""
        return 1 - self.velocity_ratio


class Jumps(TimeLaw):
    """Three kinds of rows, evenly spread (ours).

    - r = t on a share `velocity_ratio` of all rows: the velocity.
    - r = 0 on a share `data_ratio` of the remaining rows: jumps to the data, for sampling in one pass.
    - r uniform in [0, t] on all further rows: jumps between.
    """

    kind: Literal["jumps"] = "jumps"
    # The distribution of t.
    of: OneTimeLaw = LogitNormal()
    velocity_ratio: float = Field(default=0.5, ge=0, le=1)
    data_ratio: float = Field(default=0.5, ge=0, le=1)
    both_ways: bool = Field(default=False, exclude_if=lambda both: not both)

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """t and r of n rows, both (n,)."""
        rest, data, between = self._places_by_kind(n)
        t = torch.zeros(n)
        r = torch.zeros(n)
        t[rest] = r[rest] = self.of.one(len(rest), g)
        t[data] = self.of.one(len(data), g)
        t[between] = self.of.one(len(between), g)
        r[between] = t[between] * torch.rand(len(between), generator=g)
        if self.both_ways:
            is_up = torch.zeros(n, dtype=torch.bool)
            is_up[data[1::2] + between[1::2]] = True  # half of each kind
            t, r = torch.where(is_up, r, t), torch.where(is_up, t, r)
        return t, r

    def moving(self, n: int) -> tuple[bool, ...]:
        """Return which of the first n rows may have r != t; the remaining rows have r = t."""
        return tuple(not is_velocity for is_velocity in spread_evenly(n, self.velocity_ratio))

    @property
    def moving_share(self) -> float:
        """The share of rows that may have r != t: all but `velocity_ratio`."""
        return 1 - self.velocity_ratio

    @property
    def between(self) -> bool:
        """Whether jumps end before the data: all but the share `data_ratio` do."""
        return self.data_ratio < 1

    @property
    def climbs(self) -> bool:
        """Whether some rows have t < r: jumps up to the noise."""
        return self.both_ways

    def _places_by_kind(self, n: int) -> tuple[list[int], list[int], list[int]]:
        """Return the indices of the first n rows by kind: r = t, jumps to the data (r = 0), and other jumps."""
        jumps, rest = split_by_moving(self.moving(n))
        far, near = split_by_moving(spread_evenly(len(jumps), self.data_ratio))
        return rest, [jumps[i] for i in far], [jumps[i] for i in near]


class Below(TimeLaw):
    """t from a distribution, and r uniform in [0, t]: RCGM, with r = t - U t (TwinFlow's code), and IMM."""

    kind: Literal["below"] = "below"
    of: OneTimeLaw = Uniform()

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """t and r of n rows, both (n,)."""
        t = self.of.one(n, g)
        return t, t * torch.rand(n, generator=g)


class Gap(TimeLaw):
    """t - r = sigmoid(N(-0.8, 1)), and r = sigmoid(N(-0.4, 1)) on condition that r < 1 - (t - r) (TVM's `loss.py`)."""

    kind: Literal["gap"] = "gap"

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """t and r of n rows, both (n,); r by its inverse distribution function."""
        gap = LogitNormal(mean=-0.8).one(n, g).double()
        largest_quantile = torch.special.ndtr((1 - gap).logit() + 0.4)  # of r = 1 - gap
        quantile = torch.rand(n, generator=g).double().clamp(min=1e-12) * largest_quantile
        r = (torch.special.ndtri(quantile) - 0.4).sigmoid()
        return (r + gap).clamp(max=1).float(), r.float()


class Dyadic(TimeLaw):
    """Steps of length 2^-k, k < levels, on one row of `every`; r = t on the remaining rows (shortcut models).

    A step of length 2^-k starts at a multiple of its length. The code of Frans et al. (2025) has the same number of
    rows for every k (`targets_shortcut.py`); here k is drawn, and the rows are evenly spread (our choice). On the
    remaining rows t is a multiple of 2^-levels, or has another distribution (`flow`, ours).
    """

    levels: ClassVar[int] = 7  # `denoise_timesteps` of its code, 128 = 2^7
    every: ClassVar[int] = 8  # `bootstrap_every`
    kind: Literal["dyadic"] = "dyadic"
    # The distribution of t if r = t; None means the finest grid.
    flow: OneTimeLaw | None = None

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
        """Return which of the first n rows have r < t, which depends on their position only."""
        return tuple(i % self.every == 0 for i in range(n))

    @property
    def moving_share(self) -> float:
        """The share of rows that have r < t: one of `every`."""
        return 1 / self.every

    @property
    def group(self) -> int:
        """How many neighbouring rows belong together: `every` of them hold one with r < t."""
        return self.every


class Quarters(TimeLaw):
    """Four kinds of rows in turn, for four tasks of TwinFlow (`prepare_inputs` of its code for large models).

    - t = 1, r = 0: the jump from noise to data.
    - t uniform, r uniform in [0.95 t, t]: short jumps.
    - t uniform, r uniform in [0, t]: jumps of any length.
    - r = t, t uniform: the rows of the twin.

    Their code cuts a batch into four blocks. Here neighbouring rows differ, so that any part of a batch that is a
    multiple of four has as many rows of each kind.
    """

    # The places of the rows of each kind.
    from_noise: ClassVar[slice] = slice(0, None, 4)
    short: ClassVar[slice] = slice(1, None, 4)
    any_length: ClassVar[slice] = slice(2, None, 4)
    twin: ClassVar[slice] = slice(3, None, 4)
    near: ClassVar[float] = 0.05  # the longest short jump, as a share of t
    kind: Literal["quarters"] = "quarters"

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """t and r of n rows, both (n,)."""
        t = torch.rand(n, generator=g)
        t[self.from_noise] = 1.0
        length = torch.rand(n, generator=g)  # of the jump, as a share of t
        length[self.from_noise] = 1.0
        length[self.short] *= self.near
        length[self.twin] = 0.0
        return t, t - length * t

    def moving(self, n: int) -> tuple[bool, ...]:
        """Which of the first n rows may have r < t: all but those of the twin."""
        places = range(n)
        return tuple(i not in places[self.twin] for i in places)

    @property
    def moving_share(self) -> float:
        """The share of rows that may have r < t."""
        return 0.75

    @property
    def group(self) -> int:
        """How many neighbouring rows belong together: one of each kind."""
        return 4


class Groups(TimeLaw):
    """Neighbouring rows, `size` of them, share their times (IMM, Alg. 1)."""

    size: ClassVar[int] = 4  # M of IMM, Alg. 1; an incomplete last group shares its times, too
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
    """t and r on a grid of equal steps: t uniform on it without 0, r uniform on the points below t (CMT; r ours)."""

    kind: Literal["grid"] = "grid"
    steps: int = Field(default=16, ge=1, le=PASSES)  # CMT's code, of its teacher's solver

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """t and r of n rows, both (n,)."""
        t_step = torch.randint(1, self.steps + 1, (n,), generator=g)
        r_step = (torch.rand(n, generator=g) * t_step).floor()
        r_step = r_step.clamp(max=t_step - 1)  # the product may round up to t_step
        return t_step / self.steps, r_step / self.steps


class OfSampler(TimeLaw):
    """The times of a solver in `steps` passes, t in turn and r the next time (DMD2, few-step SiD; TDM with `hop`).

    Their code draws one of these times for a whole batch. Here neighbouring rows have different ones (our choice), so
    every step has as many rows of each time, and costs the same.
    """

    kind: Literal["of_sampler"] = "of_sampler"
    # Jumps to the data and fresh noise up to the next time, or jumps to the next time (`dumo.flow.solver`).
    solver: Literal["restart", "hop"] = Field(default="restart", json_schema_extra=QUIET)
    steps: int = Field(default=4, ge=1, le=PASSES)
    m: float = Field(default=0.75, gt=0, lt=1)

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """t and r of n rows, both (n,)."""
        times = torch.tensor([*self.taught, 0.0])
        place = torch.arange(n) % self.steps
        return times[place], times[place + 1]

    @property
    def taught(self) -> list[float]:
        """The times in decreasing order."""
        return jump_times(self.steps, self.m)

    @property
    def group(self) -> int:
        """How many neighbouring rows belong together: one of each time."""
        return self.steps

    @property
    def between(self) -> bool:
        """Whether jumps end before the data."""
        return self.solver == "hop" and self.steps > 1


Times = Annotated[
    Arctan | Atom | Below | Beta | Dyadic | Gap | Groups | Jumps | Karras | LogitNormal | Pair | Quarters | Uniform,
    Field(discriminator="kind"),
]
