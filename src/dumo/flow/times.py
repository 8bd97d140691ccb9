"""Laws of (t, r), r <= t. Those of one time aim at the data: r = 0."""

from math import pi
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Generator

from dumo.bound import ROWS
from dumo.place import split_by_step
from dumo.types import Time, TimeLaw


class Beta(TimeLaw):
    """t ~ Beta(a, b), r = 0: (theta_1, theta_2) of the paper (Sec. 3.3 and Tab. 3)."""

    kind: Literal["beta"] = "beta"
    a: float = Field(default=2.4, gt=0)
    b: float = Field(default=2.4, gt=0)

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """Draw n rows, as a ratio of two gamma variables."""
        shape = torch.tensor([self.a, self.b]).expand(n, 2)
        gamma = torch._standard_gamma(shape, generator=g)  # pyright: ignore[reportPrivateImportUsage]
        t = gamma[:, 0] / gamma.sum(1)
        return t, torch.zeros_like(t)


class Uniform(TimeLaw):
    """t ~ U(low, high), r = 0; where both are equal, that one time."""

    kind: Literal["uniform"] = "uniform"
    low: float = Field(default=0.0, ge=0, le=1)
    high: float = Field(default=1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> "Uniform":
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) must not be above high ({self.high})")
        return self

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """Draw n rows."""
        t = self.low + (self.high - self.low) * torch.rand(n, generator=g)
        return t, torch.zeros_like(t)


class LogitNormal(TimeLaw):
    """t = sigmoid(N(mean, std^2)), r = 0 (Esser et al. 2024, Sec. 3.1; mean and std of MeanFlow, Tab. 4)."""

    kind: Literal["logit_normal"] = "logit_normal"
    mean: float = -0.4
    std: float = Field(default=1.0, gt=0)

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """Draw n rows."""
        t = (self.mean + self.std * torch.randn(n, generator=g)).sigmoid()
        return t, torch.zeros_like(t)


class Arctan(TimeLaw):
    """tan(pi t / 2) = exp(N(mean, std^2)) / sd, r = 0: a log-normal noise level as an angle, in units of a right angle.

    sCM on the trigonometric path (Lu and Song 2025, its Sec. 4), whose data have the standard deviation `sd`; with
    sd = 1, FACM's times of its FM and CM losses (its code, `losses.py`: mean -0.8, std 1.6).
    """

    kind: Literal["arctan"] = "arctan"
    mean: float = -1.0
    std: float = Field(default=1.4, gt=0)
    sd: float = Field(default=0.5, gt=0)

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """Draw n rows."""
        level = (self.mean + self.std * torch.randn(n, generator=g)).exp() / self.sd
        t = level.atan() * 2 / pi
        return t, torch.zeros_like(t)


class Karras(TimeLaw):
    """t = s / (1 + s), with s = sigma / sd and sigma^(1 / rho) uniform from `low` to `high`; r = 0.

    The noise levels of Karras et al. (2022), Eq. 5, in the limit of many: so are those of CM (Song et al. 2023) spread.
    """

    kind: Literal["karras"] = "karras"
    low: float = Field(default=0.002, gt=0)
    high: float = Field(default=80.0, gt=0)
    rho: float = Field(default=7.0, ge=1)
    sd: float = Field(default=0.5, gt=0)  # of the data that `low` and `high` are meant for

    @model_validator(mode="after")
    def _ordered(self) -> "Karras":
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        return self

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """Draw n rows."""
        low, high = self.low ** (1 / self.rho), self.high ** (1 / self.rho)
        s = (low + (high - low) * torch.rand(n, generator=g)) ** self.rho / self.sd
        t = s / (1 + s)
        return t, torch.zeros_like(t)


One = Annotated[Arctan | Beta | Karras | LogitNormal | Uniform, Field(discriminator="kind")]  # laws of one time


class Atom(TimeLaw):
    """One law, but t = `at` on a share of the rows; r = 0 (ours).

    Laws with a density teach one-step sampling, which starts at t = 1 exactly, by its neighbours. The rows are chosen
    by their place, evenly spread.
    """

    kind: Literal["atom"] = "atom"
    of: One = Beta()
    share: float = Field(default=0.15, ge=0, le=1)
    at: float = Field(default=1.0, ge=0, le=1)

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """Draw n rows."""
        t, r = self.of(n, g)
        return t.masked_fill(torch.tensor(spread(n, self.share), dtype=torch.bool), self.at), r


Single = Annotated[Arctan | Atom | Beta | Karras | LogitNormal | Uniform, Field(discriminator="kind")]  # and of it


class Pair(TimeLaw):
    """Two draws of one law, sorted, so that r <= t; on a share `velocity_ratio` of the rows r = t (MeanFlow, Sec. 4.3).

    This is rho of the paper's Eq. 5. The rows are chosen by their place in the batch, evenly spread, not by a coin
    (ours): so every rank and every step has the same number of them. With `to` r has a law of its own, and is t where
    that is above t (MeanFlow on CIFAR-10); with `flow` so has t on the rows with r = t (SoFlow).
    """

    kind: Literal["pair"] = "pair"
    of: One = LogitNormal()
    velocity_ratio: float = Field(default=0.75, ge=0, le=1)
    to: One | None = None  # of r; None: the lower of two draws
    flow: One | None = None  # of t where r = t; None: as elsewhere

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """Draw n rows."""
        (a, _), (b, _) = self.of(n, g), (self.to or self.of)(n, g)
        t, r = (torch.maximum(a, b), torch.minimum(a, b)) if self.to is None else (a, torch.minimum(a, b))
        moving = torch.tensor(self.moving(n))
        if self.flow is not None:
            t = torch.where(moving, t, self.flow(n, g)[0])
        return t, torch.where(moving, r, t)

    def moving(self, n: int) -> tuple[bool, ...]:
        """Which of the first n rows may have r < t, by their place alone; all others have r = t."""
        return tuple(not still for still in spread(n, self.velocity_ratio))

    @property
    def moving_share(self) -> float:
        """All but `velocity_ratio`."""
        return 1 - self.velocity_ratio


class Jumps(TimeLaw):
    """Jumps, r < t, on all rows but a share `velocity_ratio`; of these a share `data_ratio` goes to the data, r = 0.

    So one mean velocity learns what a single pass asks of it, and the jumps between (ours). r of the other jumps is
    uniform in [0, t], or by a law of its own (`to`), and t where that is above t. The three kinds of rows are chosen by
    place, evenly spread, and every kind draws its t by itself.
    """

    kind: Literal["jumps"] = "jumps"
    of: Single = LogitNormal()  # of t
    velocity_ratio: float = Field(default=0.5, ge=0, le=1)  # ours, as all shares here
    data_ratio: float = Field(default=0.5, ge=0, le=1)
    to: One | None = None  # of r of jumps that end before the data; None: uniform in [0, t]
    flow: Single | None = None  # of t where r = t; None: as elsewhere

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """Draw n rows."""
        rest, data, between = self._places(n)
        t, r = torch.zeros(n), torch.zeros(n)
        t[rest] = r[rest] = (self.flow or self.of)(len(rest), g)[0]
        t[data] = self.of(len(data), g)[0]
        t[between] = self.of(len(between), g)[0]
        k = len(between)
        r[between] = torch.minimum(self.to(k, g)[0], t[between]) if self.to else t[between] * torch.rand(k, generator=g)
        return t, r

    def moving(self, n: int) -> tuple[bool, ...]:
        """Which of the first n rows jump, by their place alone; all others have r = t."""
        return tuple(not still for still in spread(n, self.velocity_ratio))

    @property
    def moving_share(self) -> float:
        """All but `velocity_ratio`."""
        return 1 - self.velocity_ratio

    def _places(self, n: int) -> tuple[list[int], list[int], list[int]]:
        """The rows at rest, those that jump to the data, and the other jumps."""
        jumps, rest = split_by_step(self.moving(n))
        far, near = split_by_step(spread(len(jumps), self.data_ratio))
        return rest, [jumps[i] for i in far], [jumps[i] for i in near]


class Below(TimeLaw):
    """t by a law, and r uniform from `low` to t: RCGM, whose r = t - U t (TwinFlow's code), and IMM."""

    kind: Literal["below"] = "below"
    of: One = Uniform()
    low: float = Field(default=0.0, ge=0, lt=1)

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """Draw n rows; t is at least `low`."""
        t = self.of(n, g)[0].clamp(min=self.low)
        return t, self.low + (t - self.low) * torch.rand(n, generator=g)


class Gap(TimeLaw):
    """t - r = sigmoid(N), and r = sigmoid(N) given that r < 1 - (t - r) (TVM's code, `loss.py`)."""

    kind: Literal["gap"] = "gap"
    of: LogitNormal = LogitNormal(mean=-0.8, std=1.0)  # of t - r
    to: LogitNormal = LogitNormal(mean=-0.4, std=1.0)  # of r, cut off

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """Draw n rows; r by its inverse distribution function."""
        gap = self.of(n, g)[0].double()
        most = torch.special.ndtr(((1 - gap).logit() - self.to.mean) / self.to.std)
        share = torch.rand(n, generator=g).double().clamp(min=1e-12) * most
        r = (self.to.mean + self.to.std * torch.special.ndtri(share)).sigmoid()
        return (r + gap).clamp(max=1).float(), r.float()


class Dyadic(TimeLaw):
    """Steps of 2^-k, k < levels, from a place on their own grid, on one row of `every`; elsewhere the finest, r = t.

    Shortcut models (Frans et al. 2025), whose code gives every k as many rows (`targets_shortcut.py`); here k is drawn,
    and the rows stand evenly spread, so that any share of a batch has its part of them (ours). t of the other rows lies
    on the grid of 2^-levels, or is by a law of its own (`flow`, ours).
    """

    kind: Literal["dyadic"] = "dyadic"
    levels: int = Field(default=7, ge=1, le=20)
    every: int = Field(default=8, ge=1, le=ROWS)
    flow: One | None = None  # of t where r = t; None: on the finest grid

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """Draw n rows."""
        jumps = torch.tensor(self.moving(n))
        k = torch.where(jumps, (torch.rand(n, generator=g) * self.levels).floor(), self.levels)
        step = torch.exp2(-k)
        t = 1 - (torch.rand(n, generator=g) / step).floor() * step
        if self.flow is not None:
            t = torch.where(jumps, t, self.flow(n, g)[0])
        return t, torch.where(jumps, t - step, t)

    def moving(self, n: int) -> tuple[bool, ...]:
        """Which of the first n rows have r < t, by their place alone."""
        return tuple(i % self.every == 0 for i in range(n))

    @property
    def moving_share(self) -> float:
        """One of `every`."""
        return 1 / self.every

    @property
    def group(self) -> int:
        """A piece of a batch needs the first of so many."""
        return self.every


class Groups(TimeLaw):
    """Neighbouring rows, `size` of them, share their times (IMM: M of its Alg. 1)."""

    kind: Literal["groups"] = "groups"
    of: "Below | Pair" = Field(default=Below(), discriminator="kind")
    size: int = Field(default=4, ge=2, le=ROWS)

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """Draw n rows; those of a last group that is not whole share theirs, too."""
        t, r = (s.repeat_interleave(self.size)[:n] for s in self.of(-(-n // self.size), g))
        return t, r

    @property
    def group(self) -> int:
        """Those of the same times."""
        return self.size


def spread(n: int, share: float) -> tuple[bool, ...]:
    """Which of the first n rows are picked, by place alone: a share of them, evenly spread, whatever n is."""
    so_far = (torch.arange(n + 1, dtype=torch.float64) * share + 1e-9).floor()
    return tuple((so_far.diff() > 0).tolist())


Times = Annotated[
    Arctan | Atom | Below | Beta | Dyadic | Gap | Groups | Jumps | Karras | LogitNormal | Pair | Uniform,
    Field(discriminator="kind"),
]
