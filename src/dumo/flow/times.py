"""Laws of (t, r), r <= t, one pair a row; kinds of rows are chosen by their place in the batch.

With `both_ways` every second row with a step has its times exchanged, t < r: a jump up to the noise (ours; F2D2's code
draws t and r alike).
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Generator

from dumo.flow.law import Arctan as Arctan
from dumo.flow.law import Atom as Atom
from dumo.flow.law import Beta as Beta
from dumo.flow.law import Karras as Karras
from dumo.flow.law import LogitNormal as LogitNormal
from dumo.flow.law import One
from dumo.flow.law import Uniform as Uniform
from dumo.runtime.bound import PASSES
from dumo.types import Time, TimeLaw
from dumo.types.rows import split_by_step, spread


class Pair(TimeLaw):
    """Two draws of one law, sorted, so that r <= t; r = t on a share `velocity_ratio` of the rows (MeanFlow, Sec. 4.3).

    That share is rho of the paper's Eq. 5, which draws it by a coin. Here the rows are evenly spread by place (ours),
    so every rank and every step has the same number of them. With `to` r has a law of its own, and is t where that is
    above t (DMF, SoFlow); with `flow` so has t on the rows with r = t (DMF, SoFlow, alpha-Flow).
    """

    kind: Literal["pair"] = "pair"
    of: One = LogitNormal()
    velocity_ratio: float = Field(default=0.75, ge=0, le=1)
    to: One | None = None  # of r; None: the lower of two draws
    flow: One | None = None  # of t where r = t; None: as the others

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """Draw n rows."""
        a, b = self.of.one(n, g), (self.to or self.of).one(n, g)
        t, r = (torch.maximum(a, b), torch.minimum(a, b)) if self.to is None else (a, torch.minimum(a, b))
        moving = torch.tensor(self.moving(n))
        if self.flow is not None:
            t = torch.where(moving, t, self.flow.one(n, g))
        return t, torch.where(moving, r, t)

    def moving(self, n: int) -> tuple[bool, ...]:
        """Which of the first n rows may have r < t; all others have r = t."""
        return tuple(not still for still in spread(n, self.velocity_ratio))

    @property
    def moving_share(self) -> float:
        """All but `velocity_ratio`."""
        return 1 - self.velocity_ratio


class Jumps(TimeLaw):
    """Three kinds of rows: r = t on a share `velocity_ratio`; of the others a share `data_ratio` has r = 0 (ours).

    So one mean velocity learns what a single pass asks of it, and the jumps between, whose r is uniform in [0, t]. The
    kinds are evenly spread by place, and every kind draws its t by itself.
    """

    kind: Literal["jumps"] = "jumps"
    of: One = LogitNormal()  # of t
    velocity_ratio: float = Field(default=0.5, ge=0, le=1)  # ours, as all shares here
    data_ratio: float = Field(default=0.5, ge=0, le=1)
    both_ways: bool = Field(default=False, exclude_if=lambda both: not both)

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """Draw n rows."""
        rest, data, between = self._places(n)
        t, r = torch.zeros(n), torch.zeros(n)
        t[rest] = r[rest] = self.of.one(len(rest), g)
        t[data] = self.of.one(len(data), g)
        t[between] = self.of.one(len(between), g)
        r[between] = t[between] * torch.rand(len(between), generator=g)
        if self.both_ways:
            up = torch.zeros(n, dtype=torch.bool)
            up[data[1::2] + between[1::2]] = True  # of each kind half
            t, r = torch.where(up, r, t), torch.where(up, t, r)
        return t, r

    def moving(self, n: int) -> tuple[bool, ...]:
        """Which of the first n rows may have r < t; all others have r = t."""
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
        """If `both_ways`."""
        return self.both_ways

    def _places(self, n: int) -> tuple[list[int], list[int], list[int]]:
        """The rows at rest, those that jump to the data, and the other jumps."""
        jumps, rest = split_by_step(self.moving(n))
        far, near = split_by_step(spread(len(jumps), self.data_ratio))
        return rest, [jumps[i] for i in far], [jumps[i] for i in near]


class Below(TimeLaw):
    """t by a law, and r uniform from 0 to t: RCGM, whose r = t - U t (TwinFlow's code), and IMM."""

    kind: Literal["below"] = "below"
    of: One = Uniform()

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """Draw n rows."""
        t = self.of.one(n, g)
        return t, t * torch.rand(n, generator=g)


class Gap(TimeLaw):
    """t - r = sigmoid(N(-0.8, 1)); r = sigmoid(N(-0.4, 1)) given that r < 1 - (t - r) (TVM, `im256_w2.yaml`)."""

    kind: Literal["gap"] = "gap"

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """Draw n rows; r by its inverse distribution function (TVM's code, `loss.py`)."""
        gap = LogitNormal(mean=-0.8).one(n, g).double()
        most = torch.special.ndtr((1 - gap).logit() + 0.4)
        share = torch.rand(n, generator=g).double().clamp(min=1e-12) * most
        r = (torch.special.ndtri(share) - 0.4).sigmoid()
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
    flow: One | None = None  # of t where r = t; None: on the finest grid

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """Draw n rows."""
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
        """One of `every`."""
        return 1 / self.every

    @property
    def group(self) -> int:
        """A piece of a batch needs the first of `every` rows."""
        return self.every


class Groups(TimeLaw):
    """Neighbouring rows, `size` of them, share their times (IMM: M of its Alg. 1)."""

    size: ClassVar[int] = 4  # M; rows of a last group that is not whole share theirs, too
    kind: Literal["groups"] = "groups"
    of: Below = Below()

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """Draw n rows."""
        t, r = (s.repeat_interleave(self.size)[:n] for s in self.of(-(-n // self.size), g))
        return t, r

    @property
    def group(self) -> int:
        """Rows of the same times."""
        return self.size


class Grid(TimeLaw):
    """t and r on a grid of equal steps, r < t: t uniform on all of it but 0, r on what lies below (CMT; r ours)."""

    kind: Literal["grid"] = "grid"
    steps: int = Field(default=16, ge=1, le=PASSES)  # CMT's code, of its teacher's solver

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """Draw n rows."""
        k = torch.randint(1, self.steps + 1, (n,), generator=g)
        return k / self.steps, (torch.rand(n, generator=g) * k).floor().clamp(max=k - 1) / self.steps


Times = Annotated[
    Arctan | Atom | Below | Beta | Dyadic | Gap | Groups | Jumps | Karras | LogitNormal | Pair | Uniform,
    Field(discriminator="kind"),
]
