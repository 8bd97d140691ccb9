"""Guidance, inside training and while sampling. Inside training every recipe is one affine map of three velocities,

    v* = omega v_t + zeta V(c) + (1 - omega - zeta) V(null),

with V the net's own velocity, without gradients. Where V(c) settles at v*, the guided velocity is

    v* = V(null) + w (E[v_t] - V(null))   with the effective scale   w = omega / (1 - zeta).

DuMo takes omega = 1 (Alg. 1, line 9): v* = v_t + zeta (V(c) - V(null)), so w = 1 / (1 - zeta).
MeanFlow's kappa is our zeta. At times outside the interval, and on rows whose label was dropped, v* = v_t.

`Guide` is that map: an objective calls it in its loss. `CFG` guides a sampler: it turns readings into guided ones.
`GuidanceScale` says what guided an objective's target, and that such a net is not guided again.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from pydantic import Field, model_validator
from torch import Tensor

from dumo.flow import dropout
from dumo.runtime.limits import FACTOR, require_order
from dumo.types import QUIET, Array, Cond, Needs, Noised, Reads, Rows, Sample, Spec, Time, lift
from dumo.types.rows import to_device

Velocity = Callable[[Noised, Cond], Sample]  # (record, condition) -> V at its x_t and t


class Interval(Spec):
    """The times where guidance acts: low <= t <= high (Kynkäänniemi et al. 2024)."""

    low: float = Field(default=0.0, ge=0, le=1)
    high: float = Field(default=1.0, ge=0, le=1)

    def holds(self, t: Time) -> Rows:
        """Which times (b,) are inside, the ends included."""
        return (self.low <= t) & (t <= self.high)

    @model_validator(mode="after")
    def _ordered(self) -> "Interval":
        require_order(low=self.low, high=self.high)
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
        """Which rows are at a time (b,) at which guidance acts."""
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
            return self._affine_map(b, v_hat, velocity).where(self._is_guided(b), b.v_t)
        some = b[place]
        some_v_hat = None if v_hat is None else v_hat[place]
        with dropout.rows(place):
            v_star = self._affine_map(some, some_v_hat, velocity)
            v_star = v_star.where(self._is_guided(some), some.v_t)
        return b.v_t.to(v_star).index_copy(0, place, v_star)

    def needing(self, b: Noised) -> Int[Tensor, " k"] | None:
        """The numbers of the rows where guidance acts, at least one, so that every rank makes the pass.

        None: make it for all rows. So also in a compiler, for which shapes must not depend on values, and where times
        and dropped labels are not known on the CPU.
        """
        if torch.compiler.is_compiling():
            return None
        known = b.known
        if known is None:
            return None
        t, kept = known  # on the CPU, so that no pass waits for a device to say how many rows it has
        place = (kept & self.inside(t)).nonzero().flatten()
        if len(place) == len(b.t):
            return None
        if not len(place):
            place = place.new_zeros(1)
        return to_device(place, b.t.device)

    def _is_guided(self, b: Noised) -> Array:
        """Which rows are guided: label kept, inside the interval; of shape (b, 1, ...), to choose among samples."""
        return lift(b.kept & self.inside(b.t), b.x_t)

    def _affine_map(self, b: Noised, v_hat: Sample | None, velocity: Velocity) -> Sample:
        """omega v_t + zeta V(c) + (1 - omega - zeta) V(null), of every row; makes no pass of weight zero."""
        null_weight = 1 - self.omega - self.zeta
        v_star = self.omega * b.v_t
        if self.zeta:
            if v_hat is None:
                v_hat = velocity(b, b.c)
            v_star = v_star + self.zeta * v_hat
        if abs(null_weight) > 1e-12:  # 1 - .2 - .8 is not 0 in floating point
            with dropout.off():
                v_star = v_star + null_weight * velocity(b, b.null)
        return v_star


class GuidanceScale(NamedTuple):
    """What guided a target in training: its effective scale, 1 for none, the field that says so, what turns it off."""

    scale: float = 1.0
    field: str = "objective.guide"
    off: str = "objective.guide.omega=1 and objective.guide.zeta=0"

    @classmethod
    def of(cls, needs: Needs) -> "GuidanceScale":
        """What an objective guides its target by."""
        if isinstance(needs.guide, Guide):
            return cls(needs.guide.scale)
        scale = 1.0 if needs.guide is None else needs.guide
        assert not isinstance(scale, Spec), "Needs.guide is a Guide, or a scale"
        return cls(scale, "objective.scale", "objective.scale=1")

    @property
    def active(self) -> bool:
        """Whether there was any guidance."""
        return abs(self.scale - 1) > 1e-9  # 0.2 / (1 - 0.8) is not 1 in floating point

    def reason(self, model: str = "this model") -> str:
        """Why a model that it guided in training is not guided again when it is sampled."""
        return f"{model} was trained at guidance scale {self.scale:.3g}; the scale is part of its weights"


class CFG(Spec):
    """Guidance while sampling (Ho and Salimans 2022), at times inside the interval. A net is read with its label c and
    without, and moved away from what it says without:

        v_w = V(null) + w (V(c) - V(null)),        w = 1 being no guidance.

    It is for nets trained on plain targets; one with a guided target (`Guide`) has its w in the weights.

    Of a velocity this is the velocity of the guided flow, exactly. A jump from t to s is x_t - (t - s) u, so the same
    map of two jumps is that of their mean velocities u, as IMM samples. It is not the jump of the guided flow: between
    Gaussian laws that one scales by the geometric S_c^w S_0^(1 - w), this one by w S_c + (1 - w) S_0. They are near
    where w is near 1, or S_c near S_0. Guidance in training teaches the right jump.

    A guided reading makes two passes through the net, as one pass of twice the rows. A solver takes a number of
    readings (`sample.nfe`, what tables write as the 250 of "250 x 2"); what the net counts (`Samples.nfe`) is passes,
    so twice as many where all the times are in the interval.
    """

    scale: float = Field(default=1.0, gt=0, le=FACTOR)  # w; 1 is none
    interval: Interval = Interval()

    @property
    def active(self) -> bool:
        """Whether anything is guided at all."""
        return self.scale != 1

    def __call__(self, reads: Reads, null: int | Callable[[Cond], Cond]) -> Reads:
        """The readings, guided. At scale 1 they are returned unchanged.

        `null`: the class number of no label; or a function of conditions (b,) that returns them dropped, (b,).
        """
        if not self.active:
            return reads
        return Reads(
            velocity=reads.velocity and self._guided(reads.velocity, null),
            endpoint=reads.endpoint and self._guided(reads.endpoint, null),
            flow_map=reads.flow_map and self._guided(reads.flow_map, null),
            both=reads.both and self._guided(reads.both, null),
            hops=reads.hops,
            lowest=reads.lowest,
        )

    def rows(self, t: Time) -> Rows:
        """Which rows are guided, by the time where the net is read."""
        return self.interval.holds(t)

    def _guided(self, read: Callable[..., Any], null: int | Callable[[Cond], Cond]) -> Callable[..., Any]:
        """Guide one reading, of (x, t, c) or (x, t, s, c), that returns a sample or a pair of them."""

        def guided_read(*inputs: torch.Tensor) -> Any:  # noqa: ANN401, as the reading
            x, t, *_, c = inputs
            place = self.rows(t).nonzero().flatten()
            if not len(place):
                return read(*inputs)
            null_c = torch.full_like(c, null) if isinstance(null, int) else null(c)
            null_inputs = (*inputs[:-1], null_c)
            both_inputs = [torch.cat([a, b[place]]) for a, b in zip(inputs, null_inputs, strict=True)]
            answer = read(*both_inputs)

            def mix(both: torch.Tensor) -> torch.Tensor:  # the rows, and those without a label
                y = both[: len(x)]
                y_null = both[len(x) :]
                return y.index_copy(0, place, y_null + self.scale * (y[place] - y_null))

            if isinstance(answer, tuple):
                return tuple(mix(part) for part in answer)
            return mix(answer)

        return guided_read
