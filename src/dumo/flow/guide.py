"""Guidance inside training: every recipe is one affine map of three velocities,

    v* = omega v_t + zeta V(c) + (1 - omega - zeta) V(null),

with V the net's own velocity, without gradients. Where V(c) settles at v*, the guided velocity is

    v* = V(null) + w (E[v_t] - V(null))   with the effective scale   w = omega / (1 - zeta).

DuMo takes omega = 1 (Alg. 1, line 9): v* = v_t + zeta (V(c) - V(null)), so w = 1 / (1 - zeta).
MeanFlow's kappa is our zeta.
"""

from collections.abc import Callable

from pydantic import Field, model_validator

from dumo.types import Cond, Noised, Rows, Sample, Spec, lift

Velocity = Callable[[Noised, Cond], Sample]  # (record, condition) -> V at its x_t and t


class Interval(Spec):
    """The times where guidance acts: low <= t <= high (Kynkäänniemi et al. 2024)."""

    low: float = Field(default=0.0, ge=0, le=1)
    high: float = Field(default=1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> "Interval":
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) must not be above high ({self.high})")
        return self


class Guide(Spec):
    """The guided velocity v*. Rows whose label was dropped, and times outside the interval, keep v_t."""

    omega: float = Field(default=1.0, gt=0)  # weight of v_t
    zeta: float = Field(default=0.0, ge=0, lt=1)  # weight of V(c): the enhancement ratio (paper, Sec. 3.3)
    interval: Interval = Interval()  # ours: the paper is silent, so all times

    @property
    def scale(self) -> float:
        """The effective guidance scale w; 1 means none."""
        return self.omega / (1 - self.zeta)

    @property
    def active(self) -> bool:
        """Whether v* differs from v_t at all."""
        return self.omega != 1 or self.zeta != 0

    def __call__(self, b: Noised, v_hat: Sample | None, velocity: Velocity) -> Sample:
        """Return v*. `v_hat` is V(c) where the step has it already, else None; makes no pass of weight zero."""
        if not self.active:
            return b.v_t
        v_star, rest = self.omega * b.v_t, 1 - self.omega - self.zeta
        if self.zeta:
            v_star = v_star + self.zeta * (velocity(b, b.c) if v_hat is None else v_hat)
        if abs(rest) > 1e-12:  # 1 - .2 - .8 is not 0 in floating point
            v_star = v_star + rest * velocity(b, b.null)
        return v_star.where(lift(self.rows(b), b.x_t), b.v_t)

    def rows(self, b: Noised) -> Rows:
        """Where guidance acts: kept labels, inside the interval."""
        return b.kept & (self.interval.low <= b.t) & (b.t <= self.interval.high)
