"""Guidance, inside training (`Guide`) and while sampling (`CFG`).

Inside training, an objective's loss calls a `Guide` for the velocity v* to learn. Every recipe is one affine map of
three velocities,

    v* = omega v_t + zeta V(c) + (1 - omega - zeta) V(null),

where V is the velocity of the net itself, without gradients. Outside the interval, and where the label was dropped,
v* = v_t. If V(c) settles at v*, the guided velocity is

    v* = V(null) + w (E[v_t] - V(null))   with the effective scale   w = omega / (1 - zeta).

DuMo takes omega = 1 (Alg. 1, line 9): v* = v_t + zeta (V(c) - V(null)), so w = 1 / (1 - zeta). MeanFlow's kappa is our
zeta.

While sampling, a `CFG` turns the readings of a net into guided ones, which a solver calls.

The two exclude each other: `GuidanceScale` says how an objective guides its target, and why such a net is not guided
again.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from pydantic import Field, model_validator
from torch import Tensor

from dumo.flow import dropout
from dumo.runtime.limits import FACTOR, require_order
from dumo.types import QUIET, Array, Cond, Needs, NoisyBatch, Readings, Rows, Sample, Spec, Time, lift
from dumo.types.batch_rows import to_device

Velocity = Callable[[NoisyBatch, Cond], Sample]  # (batch, condition) -> V at the batch's x_t and t
# Below these a difference is one of rounding, not of settings: 1 - .2 - .8 is not 0 in floating point. Ours
_ZERO_WEIGHT = 1e-12
_SAME_SCALE = 1e-9


class Interval(Spec):
    """The times where guidance acts: low <= t <= high (Kynkäänniemi et al. 2024)."""

    low: float = Field(default=0.0, ge=0, le=1)
    high: float = Field(default=1.0, ge=0, le=1)

    def holds(self, t: Time) -> Rows:
        """Which times (b,) are inside, the ends included."""
        return (self.low <= t) & (t <= self.high)

    @model_validator(mode="after")
    def _require_order(self) -> "Interval":
        require_order(low=self.low, high=self.high)
        return self


class Guide(Spec):
    """The guided velocity v* of training: `guide(b, v_hat, velocity)`."""

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

    def known_target(self, b: NoisyBatch) -> Sample | None:
        """v* where it is known before any pass, else None."""
        return None if self.active else b.v_t

    def __call__(self, b: NoisyBatch, v_hat: Sample | None, velocity: Velocity) -> Sample:
        """v* of all rows, (b, ...).

        v_hat: V(c), where the step has it already; None: `velocity` is asked for it, unless its weight is zero.
        velocity: makes a pass of the net. It gets `b.null` itself as the condition of the null pass, and may know it by
        that.
        """
        if not self.active:
            return b.v_t
        guided_rows = self.guided_rows(b)
        if guided_rows is None:
            return self._affine_map(b, v_hat, velocity).where(self._is_guided(b), b.v_t)
        guided = b[guided_rows]
        guided_v_hat = None if v_hat is None else v_hat[guided_rows]
        with dropout.rows(guided_rows):
            v_star = self._affine_map(guided, guided_v_hat, velocity)
            v_star = v_star.where(self._is_guided(guided), guided.v_t)  # one row may stand there for none
        return b.v_t.to(v_star).index_copy(0, guided_rows, v_star)

    def guided_rows(self, b: NoisyBatch) -> Int[Tensor, " k"] | None:
        """The numbers of the rows of which passes are made: those that are guided, at least one; None: all rows.

        At least one, so that every rank makes the passes. All in a compiler, for which shapes must not depend on
        values, and where times and dropped labels are not known on the CPU.
        """
        if torch.compiler.is_compiling():
            return None
        on_host = b.on_host
        if on_host is None:
            return None
        t, kept = on_host  # so that no pass waits for a device to say how many rows it has
        numbers = (kept & self.inside(t)).nonzero().flatten()
        if len(numbers) == len(b.t):
            return None
        if not len(numbers):
            numbers = numbers.new_zeros(1)  # row 0
        return to_device(numbers, b.t.device)

    def _is_guided(self, b: NoisyBatch) -> Array:
        """Which rows are guided: those with their label, at times inside the interval. Of shape (b, 1, ...)."""
        return lift(b.kept & self.inside(b.t), b.x_t)

    def _affine_map(self, b: NoisyBatch, v_hat: Sample | None, velocity: Velocity) -> Sample:
        """omega v_t + zeta V(c) + (1 - omega - zeta) V(null) of every row, without passes of weight zero."""
        null_weight = 1 - self.omega - self.zeta
        v_star = self.omega * b.v_t
        if self.zeta:
            if v_hat is None:
                v_hat = velocity(b, b.c)
            v_star = v_star + self.zeta * v_hat
        if abs(null_weight) > _ZERO_WEIGHT:
            with dropout.off():
                v_star = v_star + null_weight * velocity(b, b.null)
        return v_star


class GuidanceScale(NamedTuple):
    """How a target was guided in training."""

    scale: float = 1.0  # the effective scale w; 1: it was not guided
    field: str = "objective.guide"  # the run's field that says so
    off: str = "objective.guide.omega=1 and objective.guide.zeta=0"  # the settings that turn it off

    @classmethod
    def of(cls, needs: Needs) -> "GuidanceScale":
        """How an objective guides its target."""
        if isinstance(needs.guide, Guide):
            return cls(needs.guide.scale)
        scale = 1.0 if needs.guide is None else needs.guide
        assert not isinstance(scale, Spec), "Needs.guide is a Guide, or a scale"
        return cls(scale, "objective.scale", "objective.scale=1")

    @property
    def active(self) -> bool:
        """Whether there was any guidance."""
        return abs(self.scale - 1) > _SAME_SCALE

    def reason(self, model: str = "this model") -> str:
        """Why a model whose target was guided is not guided again when it is sampled, for messages."""
        return f"{model} was trained at guidance scale {self.scale:.3g}; the scale is part of its weights"


class CFG(Spec):
    """Classifier-free guidance while sampling (Ho and Salimans 2022), at times inside the interval.

    A net is read with its label c and without, and moved away from its reading without:

        v_w = V(null) + w (V(c) - V(null)),        w = 1 being no guidance.

    It is for nets trained on plain targets; one with a guided target (`Guide`) has its w in the weights.

    Passes: a guided reading makes two passes through the net, as one pass of twice the rows. A solver takes a number of
    readings (`sample.nfe`, what tables write as the 250 of "250 x 2"); what the net counts (`Samples.nfe`) is passes,
    so twice as many where all the times are in the interval.

    Exactness: of a velocity, v_w is the velocity of the guided flow. A jump from t to s is x_t - (t - s) u, so the same
    map of two jumps is that of their mean velocities u, as IMM samples. It is not the jump of the guided flow: between
    Gaussian laws that one scales by the geometric S_c^w S_0^(1 - w), this one by w S_c + (1 - w) S_0. They are near
    where w is near 1, or S_c near S_0. Guidance in training teaches the right jump.
    """

    scale: float = Field(default=1.0, gt=0, le=FACTOR)  # w; 1 is none
    interval: Interval = Interval()

    @property
    def active(self) -> bool:
        """Whether anything is guided at all."""
        return self.scale != 1

    def __call__(self, readings: Readings, null: int | Callable[[Cond], Cond]) -> Readings:
        """The readings, guided. At scale 1 they are returned unchanged.

        `null`: the class number of no label; or a function of conditions (b,) that returns them dropped, (b,).
        """
        if not self.active:
            return readings
        return Readings(
            velocity=self._guided(readings.velocity, null),
            endpoint=self._guided(readings.endpoint, null),
            flow_map=self._guided(readings.flow_map, null),
            both=self._guided(readings.both, null),
            hops=readings.hops,
            lowest=readings.lowest,
        )

    def rows(self, t: Time) -> Rows:
        """Which rows are guided, by the times t (b,) where the net is read."""
        return self.interval.holds(t)

    def _guided(self, read: Callable[..., Any] | None, null: int | Callable[[Cond], Cond]) -> Callable[..., Any] | None:
        """The guided form of a reading of (x, t, c) or (x, t, s, c), which returns a sample or a pair of them.

        None: the reading was never taught.
        """
        if read is None:
            return None

        def guided_read(*inputs: Tensor) -> Any:  # noqa: ANN401, as the reading
            x, t, *_, c = inputs
            guided_rows = self.rows(t).nonzero().flatten()
            if not len(guided_rows):
                return read(*inputs)

            # one pass: all rows with their labels, then the guided ones without
            null_c = torch.full_like(c, null) if isinstance(null, int) else null(c)
            null_inputs = (*inputs[:-1], null_c)
            joined_inputs: list[Tensor] = []
            for value, null_value in zip(inputs, null_inputs, strict=True):
                joined_inputs.append(torch.cat([value, null_value[guided_rows]]))
            joined = read(*joined_inputs)

            def guide(joined: Tensor) -> Tensor:
                y = joined[: len(x)]
                y_null = joined[len(x) :]
                y_w = y_null + self.scale * (y[guided_rows] - y_null)
                return y.index_copy(0, guided_rows, y_w)

            if isinstance(joined, tuple):
                return tuple(guide(part) for part in joined)
            return guide(joined)

        return guided_read
