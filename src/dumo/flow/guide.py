"""Guidance inside training: every recipe is one affine map of three velocities,

    v* = omega v_t + zeta V(c) + (1 - omega - zeta) V(null),

with V the net's own velocity, without gradients. Where V(c) settles at v*, the guided velocity is

    v* = V(null) + w (E[v_t] - V(null))   with the effective scale   w = omega / (1 - zeta).

DuMo takes omega = 1 (Alg. 1, line 9): v* = v_t + zeta (V(c) - V(null)), so w = 1 / (1 - zeta).
MeanFlow's kappa is our zeta. At times outside the interval, and on rows whose label was dropped, v* = v_t.
"""

from collections.abc import Callable

import torch
from jaxtyping import Int
from pydantic import Field, model_validator
from torch import Tensor

from dumo.flow import dropout
from dumo.types import QUIET, Array, Cond, Noised, Rows, Sample, Spec, Time, lift
from dumo.types.rows import sent

Velocity = Callable[[Noised, Cond], Sample]  # (record, condition) -> V at its x_t and t


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


class Guide(Spec):
    """The guided velocity v*, on rows that kept their label, at times inside the interval."""

    omega: float = Field(default=1.0, gt=0)  # weight of v_t
    zeta: float = Field(default=0.0, ge=0, lt=1)  # weight of V(c): the enhancement ratio (paper, Sec. 3.3)
    interval: Interval = Field(default=Interval(), json_schema_extra=QUIET)  # ours: the paper is silent, so all times

    @property
    def scale(self) -> float:
        """The effective guidance scale w; 1 means none."""
        return self.omega / (1 - self.zeta)

    @property
    def active(self) -> bool:
        """Whether v* differs from v_t at all."""
        return self.omega != 1 or self.zeta != 0

    def inside(self, t: Time) -> Rows:
        """Where guidance acts, by the time."""
        return self.interval.holds(t)

    def known_target(self, b: Noised) -> Sample | None:
        """v* where it is known before any pass, else None."""
        return None if self.active else b.v_t

    def __call__(self, b: Noised, v_hat: Sample | None, velocity: Velocity) -> Sample:
        """Return v*. `v_hat` is V(c) where the step has it already, else None; makes no pass of weight zero.

        The condition of the null pass is `b.null` itself, by which `velocity` may know it.
        """
        if not self.active:
            return b.v_t
        place = self.needing(b)
        if place is None:
            return self._inside(b, v_hat, velocity).where(self._rows(b), b.v_t)
        some = b[place]
        with dropout.rows(place):
            v_star = self._inside(some, None if v_hat is None else v_hat[place], velocity)
            v_star = v_star.where(self._rows(some), some.v_t)
        return b.v_t.to(v_star).index_copy(0, place, v_star)

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

    def _rows(self, b: Noised) -> Array:
        """Where guidance acts: kept labels, inside the interval; shaped to choose among samples."""
        return lift(b.kept & self.inside(b.t), b.x_t)

    def _inside(self, b: Noised, v_hat: Sample | None, velocity: Velocity) -> Sample:
        """The affine map, of every row of the record."""
        v_star, rest = self.omega * b.v_t, 1 - self.omega - self.zeta
        if self.zeta:
            v_star = v_star + self.zeta * (velocity(b, b.c) if v_hat is None else v_hat)
        if abs(rest) > 1e-12:  # 1 - .2 - .8 is not 0 in floating point
            with dropout.off():
                v_star = v_star + rest * velocity(b, b.null)
        return v_star
