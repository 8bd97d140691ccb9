"""Guidance inside training: every recipe is one affine map of three velocities,

    v* = omega v_t + zeta V(c) + (1 - omega - zeta) V(null),

with V the net's own velocity, without gradients. Where V(c) settles at v*, the guided velocity is

    v* = V(null) + w (E[v_t] - V(null))   with the effective scale   w = omega / (1 - zeta).

DuMo takes omega = 1 (Alg. 1, line 9): v* = v_t + zeta (V(c) - V(null)), so w = 1 / (1 - zeta).
MeanFlow's kappa is our zeta.

Elsewhere, at times outside an interval and on rows whose label was dropped, v* = v_t; or, as UCGM has it, the average

    v* = (v_t + V(c)) / 2,

where c is null on dropped rows. The fixed point is the same: V settles where V = E[v*] = (E[v_t] + V) / 2, at
V = E[v_t]. Where V(c) is the pass in training itself, v_hat - v* = (v_hat - v_t) / 2: with plain l2 half of flow
matching's gradient, a quarter of its loss. What u is taught of v* has half the noise of v_t.

The passes for V may be made on a random part of the rows. Of k consecutive rows, M of which are to be guided, one of
these M is picked, each with probability 1 / M, and its guidance counts M times:

    v* = v_t + M (v*_full - v_t)  on the picked row,   v* = v_t  on the others,   so the mean of v* is v*_full.

With plain l2 the gradient is affine in the target, and a target v* - t du/dt is affine in v*, along which it is taken:
the gradient is right on average, whatever the net (ours; exact with an exact slope, to O(h^2) with a difference).
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Int
from pydantic import Field, model_validator
from torch import Tensor

from dumo.flow import dropout
from dumo.place import sent
from dumo.types import Cond, Noised, PerSample, Rows, Sample, Spec, Time, UserError, lift

AskVelocity = Callable[[Noised, Cond], Sample]  # (record, condition) -> V at its x_t and t


class Interval(Spec):
    """The times where guidance acts: low <= t <= high (Kynkäänniemi et al. 2024)."""

    low: float = Field(default=0.0, ge=0, le=1)
    high: float = Field(default=1.0, ge=0, le=1)

    def holds(self, t: Time) -> Rows:
        """Which times are inside, the ends included."""
        return (self.low <= t) & (t <= self.high)

    @model_validator(mode="after")
    def _ordered(self) -> "Interval":
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) must not be above high ({self.high})")
        return self


FADING = 0.025  # of SoFlow: how slowly guidance comes back below t = 1

PRESETS: dict[str, dict[str, Any]] = {  # what a name in place of a Guide's fields stands for
    "paper": {"zeta": 0.55},  # DuMo, Alg. 1 and Tab. 3 at 256 x 256; the rest as below, for the paper is silent
    "ucgm": {"zeta": 0.44, "interval": {"high": 0.75}, "elsewhere": "average"},  # UCGM's code, multi-step, 256 x 256
}


class Guide(Spec):
    """The guided velocity v*, on rows that kept their label, at times inside the interval; or the name of a preset."""

    omega: float = Field(default=1.0, gt=0)  # weight of v_t
    zeta: float = Field(default=0.0, ge=0, lt=1)  # weight of V(c): the enhancement ratio (paper, Sec. 3.3)
    interval: Interval = Interval()  # ours: the paper is silent, so all times
    elsewhere: Literal["data", "average"] = "data"  # v* of other rows: v_t, or (v_t + V(c)) / 2 as UCGM
    fraction: float = Field(default=1.0, gt=0, le=1)  # of the rows that passes are made on, 1 / k (ours)
    fade: float | None = Field(default=None, ge=0, lt=1)  # the time from which guidance fades, to none at t = 1: SoFlow

    @model_validator(mode="before")
    @classmethod
    def _named(cls, fields: object) -> object:
        if not isinstance(fields, str):
            return fields
        if fields not in PRESETS:
            raise ValueError(f"there is no preset '{fields}'; valid: {', '.join(PRESETS)}, or the fields themselves")
        return PRESETS[fields]

    @model_validator(mode="after")
    def _whole(self) -> "Guide":
        if abs(1 / self.fraction - self.every) > 1e-6:
            less, more = (1 / k for k in (int(1 / self.fraction) + 1, int(1 / self.fraction)))
            raise ValueError(
                f"fraction is {self.fraction:g}, but it must be one row of a whole number, 1/k: "
                f"use {less:.12g} or {more:.12g}"
            )
        return self

    @property
    def every(self) -> int:
        """k: one of so many consecutive rows has its passes made."""
        return round(1 / self.fraction)

    @property
    def random(self) -> bool:
        """Whether v* is right on average only: enough for plain l2, and for no other loss (`demand_l2`)."""
        return self.active and self.every > 1

    @property
    def scale(self) -> float:
        """The effective guidance scale w; 1 means none."""
        return self.omega / (1 - self.zeta)

    @property
    def active(self) -> bool:
        """Whether v* differs from v_t at all: without guidance there is no elsewhere either."""
        return self.omega != 1 or self.zeta != 0

    @property
    def group(self) -> int:
        """So many consecutive rows must stand together: one is picked of them."""
        return self.every if self.random else 1

    @property
    def unguided(self) -> "Guide":
        """One that makes the passes of rows elsewhere alone: V(c) for an average, else none, and never V(null)."""
        return Guide(omega=0.5, zeta=0.5, elsewhere="average") if self.elsewhere == "average" else Guide()

    def inside(self, t: Time) -> Rows:
        """Where guidance acts, by the time."""
        return self.interval.holds(t)

    def known_target(self, b: Noised) -> Sample | None:
        """v* where it is known before any pass, else None."""
        return None if self.active else b.v_t

    def demand_l2(self, why: str, way_out: str) -> None:
        """Refuse a random v* with a ValueError, for a loss whose gradient is not affine in its target, and say why."""
        if self.random:
            raise ValueError(
                f"guide.fraction = {self.fraction:g} makes the target right on average only, which biases a gradient "
                f"that is not affine in it: {why}. Use {way_out}, or guide.fraction=1"
            )

    def __call__(self, b: Noised, v_hat: Sample | None, velocity: AskVelocity) -> Sample:
        """Return v*. `v_hat` is V(c) where the step has it already, else None; makes no pass of weight zero.

        An average takes V(c) of every row: `v_hat`, for no pass more, or else one pass of all.

        Raises UserError where a fraction of the rows is asked for and they are no whole number of groups.
        """
        if not self.active:
            return b.v_t
        if self.elsewhere == "average" and v_hat is None:
            v_hat = velocity(b, b.c)
        rows, rest = lift(self.rows(b), b.x_t), self._rest(b, v_hat)
        place, weight = self.pick(b) if self.random else (self.needing(b), None)
        if place is None:
            return self._inside(b, v_hat, velocity).where(rows, rest)
        some = b[place]
        with dropout.rows(place):
            v_star = self._inside(some, None if v_hat is None else v_hat[place], velocity)
        if weight is not None:
            v_star = some.v_t + lift(weight.to(v_star), v_star) * (v_star - some.v_t)
        v_star = v_star.where(rows[place], rest[place])
        return rest.to(v_star).index_copy(0, place, v_star)

    def needing(self, b: Noised) -> Int[Tensor, " k"] | None:
        """The places where guidance acts, at least one, so that every rank makes the pass; None: make it for all.

        That is also the answer where shapes must not depend on numbers, to a compiler, or where no number is known.
        """
        if torch.compiler.is_compiling() or (known := b.known) is None:
            return None
        t, kept = known  # on the CPU, so that no pass waits for a device to say how many rows it has
        place = (kept & self.inside(t)).nonzero().flatten()
        if len(place) == len(b.t):
            return None
        return sent(place if len(place) else place.new_zeros(1), b.t.device)

    def pick(self, b: Noised) -> tuple[Int[Tensor, " k"], PerSample]:
        """The place of one row per group, the guided one of the largest coin, and how many guided rows it stands for.

        A group without a guided row gives some row, which stands for none.
        """
        if len(b.t) % self.every:
            raise UserError(
                f"guide.fraction = {self.fraction:g} picks one of every {self.every} rows, but here are {len(b.t)}: "
                f"make train.batch and train.micro_batch multiples of {self.every}, or change objective.guide.fraction"
            )
        rows = self.rows(b).view(-1, self.every)
        winner = b.coin.view_as(rows).where(rows, -1).argmax(1)
        return torch.arange(0, len(b.t), self.every, device=winner.device) + winner, rows.sum(1).to(b.t)

    def rows(self, b: Noised) -> Rows:
        """Where guidance acts: kept labels, inside the interval."""
        return b.kept & self.inside(b.t)

    def _inside(self, b: Noised, v_hat: Sample | None, velocity: AskVelocity) -> Sample:
        """The affine map, of every row of the record."""
        v_star, rest = self.omega * b.v_t, 1 - self.omega - self.zeta
        if self.zeta:
            v_star = v_star + self.zeta * (velocity(b, b.c) if v_hat is None else v_hat)
        if abs(rest) > 1e-12:  # 1 - .2 - .8 is not 0 in floating point
            with dropout.off():
                v_null = velocity(b, b.null)
            v_star = v_star + rest * (v_null if self.fade is None else b.v_t + self._left(b) * (v_null - b.v_t))
        return v_star

    def _left(self, b: Noised) -> Sample:
        """What fading leaves of V(null), in [0, 1]; v_t has the rest (SoFlow's code, `models.py`)."""
        assert self.fade is not None
        s = ((1 - b.t) / (1 - self.fade)).clamp(0, 1)
        return lift(torch.where(s < 1, -torch.expm1(-FADING * s / (1 - s).clamp(min=1e-12)), 1), b.x_t)

    def _rest(self, b: Noised, v_hat: Sample | None) -> Sample:
        """v* of rows that no guidance has reached: those elsewhere, and guided ones that were not picked."""
        if self.elsewhere == "data" or v_hat is None:
            return b.v_t
        return ((b.v_t + v_hat) / 2).where(lift(~self.rows(b), b.x_t), b.v_t)
