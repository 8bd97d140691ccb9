"""Laws of (t, r), r <= t, whose rows may differ by place. Those of one time aim at the data: r = 0.

With `both_ways` every second row with a step has its times exchanged, t < r: a jump up to the noise (ours; F2D2's code
draws t and r alike).
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Generator

from dumo.bound import PASSES, ROWS
from dumo.flow.density import Alike
from dumo.flow.density import Arctan as Arctan
from dumo.flow.density import Beta as Beta
from dumo.flow.density import Karras as Karras
from dumo.flow.density import LogitNormal as LogitNormal
from dumo.flow.density import Stratified as Stratified
from dumo.flow.density import Uniform as Uniform
from dumo.flow.mixture import Atom as Atom
from dumo.flow.mixture import Mixture as Mixture
from dumo.place import split_by_step, spread
from dumo.types import Time, TimeLaw

BothWays = Annotated[bool, Field(exclude_if=lambda both: not both)]
Single = Annotated[
    Arctan | Atom | Beta | Karras | LogitNormal | Mixture | Stratified | Uniform, Field(discriminator="kind")
]


class Pair(TimeLaw):
    """Two draws of one law, sorted, so that r <= t; on a share `velocity_ratio` of the rows r = t (MeanFlow, Sec. 4.3).

    This is rho of the paper's Eq. 5. The rows are chosen by their place in the batch, evenly spread, not by a coin
    (ours): so every rank and every step has the same number of them. With `to` r has a law of its own, and is t where
    that is above t (MeanFlow on CIFAR-10); with `flow` so has t on the rows with r = t (SoFlow).
    """

    kind: Literal["pair"] = "pair"
    of: Alike = LogitNormal()
    velocity_ratio: float = Field(default=0.75, ge=0, le=1)
    to: Alike | None = None  # of r; None: the lower of two draws
    flow: Alike | None = None  # of t where r = t; None: as elsewhere
    both_ways: BothWays = False

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """Draw n rows."""
        (a, _), (b, _) = self.of(n, g), (self.to or self.of)(n, g)
        t, r = (torch.maximum(a, b), torch.minimum(a, b)) if self.to is None else (a, torch.minimum(a, b))
        moving = torch.tensor(self.moving(n))
        if self.flow is not None:
            t = torch.where(moving, t, self.flow(n, g)[0])
        r = torch.where(moving, r, t)
        return turned(t, r, split_by_step(self.moving(n))[0]) if self.both_ways else (t, r)

    def moving(self, n: int) -> tuple[bool, ...]:
        """Which of the first n rows may have r < t, by their place alone; all others have r = t."""
        return tuple(not still for still in spread(n, self.velocity_ratio))

    @property
    def moving_share(self) -> float:
        """All but `velocity_ratio`."""
        return 1 - self.velocity_ratio

    @property
    def climbs(self) -> bool:
        """Where asked."""
        return self.both_ways


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
    to: Alike | None = None  # of r of jumps that end before the data; None: uniform in [0, t]
    flow: Single | None = None  # of t where r = t; None: as elsewhere
    both_ways: BothWays = False

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """Draw n rows."""
        rest, data, between = self._places(n)
        t, r = torch.zeros(n), torch.zeros(n)
        t[rest] = r[rest] = (self.flow or self.of)(len(rest), g)[0]
        t[data] = self.of(len(data), g)[0]
        t[between] = self.of(len(between), g)[0]
        k = len(between)
        r[between] = torch.minimum(self.to(k, g)[0], t[between]) if self.to else t[between] * torch.rand(k, generator=g)
        for rows in (data, between) if self.both_ways else ():  # of each kind half
            t, r = turned(t, r, rows)
        return t, r

    def moving(self, n: int) -> tuple[bool, ...]:
        """Which of the first n rows jump, by their place alone; all others have r = t."""
        return tuple(not still for still in spread(n, self.velocity_ratio))

    @property
    def moving_share(self) -> float:
        """All but `velocity_ratio`."""
        return 1 - self.velocity_ratio

    @property
    def between(self) -> bool:
        """All but `data_ratio` of the jumps."""
        return self.data_ratio < 1

    @property
    def climbs(self) -> bool:
        """Where asked."""
        return self.both_ways

    def _places(self, n: int) -> tuple[list[int], list[int], list[int]]:
        """The rows at rest, those that jump to the data, and the other jumps."""
        jumps, rest = split_by_step(self.moving(n))
        far, near = split_by_step(spread(len(jumps), self.data_ratio))
        return rest, [jumps[i] for i in far], [jumps[i] for i in near]


class Below(TimeLaw):
    """t by a law, and r uniform from `low` to t: RCGM, whose r = t - U t (TwinFlow's code), and IMM."""

    kind: Literal["below"] = "below"
    of: Single = Uniform()
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
    flow: Alike | None = None  # of t where r = t; None: on the finest grid

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

    @property
    def between(self) -> bool:
        """As the law that is shared."""
        return self.of.between

    @property
    def climbs(self) -> bool:
        """As the law that is shared."""
        return self.of.climbs


class Grid(TimeLaw):
    """t and r on a grid of equal steps, r < t: t uniform on all of it but 0, r on what lies below (CMT; r ours)."""

    kind: Literal["grid"] = "grid"
    steps: int = Field(default=16, ge=1, le=PASSES)  # CMT's code, of its teacher's solver

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """Draw n rows."""
        k = torch.randint(1, self.steps + 1, (n,), generator=g)
        return k / self.steps, (torch.rand(n, generator=g) * k).floor().clamp(max=k - 1) / self.steps


def turned(t: Time, r: Time, rows: list[int]) -> tuple[Time, Time]:
    """The same times, but exchanged on every second of these rows, the first of them left."""
    up = torch.zeros(len(t), dtype=torch.bool)
    up[rows[1::2]] = True
    return torch.where(up, r, t), torch.where(up, t, r)


Times = Annotated[
    Arctan
    | Atom
    | Below
    | Beta
    | Dyadic
    | Gap
    | Groups
    | Jumps
    | Karras
    | LogitNormal
    | Mixture
    | Pair
    | Stratified
    | Uniform,
    Field(discriminator="kind"),
]
