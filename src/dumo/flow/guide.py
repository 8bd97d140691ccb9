"""Guidance, inside training (`Guide`) and while sampling (`CFG`).

In training, an objective's loss calls a `Guide` for the target velocity v*, an affine combination of three velocities,

    v* = omega v_t + zeta V(c) + (1 - omega - zeta) V(null),

where V is the network's velocity, without gradients. Outside the interval, and for dropped labels, v* = v_t. If V(c)
converges to v*, the guided velocity is

    v* = V(null) + w (E[v_t] - V(null))   with the effective scale   w = omega / (1 - zeta).

DuMo uses omega = 1 (Alg. 1, line 9): v* = v_t + zeta (V(c) - V(null)), so w = 1 / (1 - zeta). MeanFlow's kappa is our
zeta.

While sampling, a `CFG` converts the readings of a network to guided ones, which a solver calls.

The two are mutually exclusive: `GuidanceScale` describes how an objective guides its target in training.
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
from dumo.types.batch_rows import index, to_device

# (batch, condition) -> V at the batch's x_t and t
Velocity = Callable[[NoisyBatch, Cond], Sample]
# Tolerances for rounding of the settings: 1 - .2 - .8 is not 0 in floating point.
_ZERO_WEIGHT = 1e-12
_SAME_SCALE = 1e-9


class Interval(Spec):
    """The times at which guidance is active: low <= t <= high (Kynkäänniemi et al. 2024)."""

    low: float = Field(default=0.0, ge=0, le=1)
    high: float = Field(default=1.0, ge=0, le=1)

    def holds(self, t: Time) -> Rows:
        """Return which times (b,) are inside, including the endpoints."""
        return (self.low <= t) & (t <= self.high)

    @model_validator(mode="after")
    def _require_order(self) -> "Interval":
        require_order(low=self.low, high=self.high)
        return self


class Guide(Spec):
    """The guided velocity v* of training: `guide(b, v_hat, velocity)`."""

    # The weight of v_t.
    omega: float = Field(default=1.0, gt=0)
    # The weight of V(c): the enhancement ratio (paper, Sec. 3.3).
    zeta: float = Field(default=0.0, ge=0, lt=1)
    # All times by default, because the paper names no interval (our choice).
    interval: Interval = Field(default=Interval(), json_schema_extra=QUIET)

    @property
    def scale(self) -> float:
        """The effective guidance scale w; 1 means no guidance."""
        return self.omega / (1 - self.zeta)

    @property
    def active(self) -> bool:
        """Whether v* differs from v_t."""
        return self.omega != 1 or self.zeta != 0

    def inside(self, t: Time) -> Rows:
        """Return which rows have a time t (b,) inside the interval."""
        return self.interval.holds(t)

    def known_target(self, b: NoisyBatch) -> Sample | None:
        """Return v* if it is known before any pass, else None."""
        return None if self.active else b.v_t

    def __call__(
        self, b: NoisyBatch, v_hat: Sample | None, velocity: Velocity, *, resting: Array | None = None
    ) -> Sample:
        """Return v* of all rows, (b, ...).

        v_hat: V(c), if it is computed already; None means to call `velocity` for it, unless its weight is zero.
        velocity: makes a pass of the network. For the unconditional pass, its condition is `b.null`, the same object.
        resting: V(c) of the rows with r = t, in their order, if only these are computed already (`rows_at_rest`).
        """
        if not self.active:
            return b.v_t
        rows = self.guided_rows(b)
        if resting is not None:
            v_hat = self._with_moving_rows(b, resting, rows, velocity)
        guided_rows = None if rows is None else to_device(rows, b.t.device)
        if guided_rows is None:
            return self._affine_map(b, v_hat, velocity).where(self._is_guided(b), b.v_t)
        guided = b[guided_rows]
        guided_v_hat = None if v_hat is None else v_hat[guided_rows]
        with dropout.rows(guided_rows):
            v_star = self._affine_map(guided, guided_v_hat, velocity)
            # `guided_rows` may contain one row that is not guided.
            v_star = v_star.where(self._is_guided(guided), guided.v_t)
        return b.v_t.to(v_star).index_copy(0, guided_rows, v_star)

    def _with_moving_rows(
        self, b: NoisyBatch, resting: Array, guided_rows: Int[Tensor, " k"] | None, velocity: Velocity
    ) -> Sample:
        """Return V(c) of the guided rows, (b, ...): that of rows with r = t is given, the others need a pass.

        At least one row makes the pass, so that every rank makes it.
        """
        moving_rows, resting_rows = b.moving_and_resting_rows
        v_hat = torch.zeros_like(b.x_t, dtype=resting.dtype)
        v_hat = v_hat.index_copy(0, index(resting_rows, b.t.device), resting)
        if not moving_rows:
            return v_hat
        if guided_rows is not None:
            is_guided = set(guided_rows.tolist())
            moving_rows = [row for row in moving_rows if row in is_guided] or moving_rows[:1]
        i = index(moving_rows, b.t.device)
        moving = b[i]
        with dropout.rows(i):
            return v_hat.index_copy(0, i, velocity(moving, moving.c).to(v_hat))

    def guided_rows(self, b: NoisyBatch) -> Int[Tensor, " k"] | None:
        """Return the indices, on the CPU, of the rows that need the guidance passes, or None for all rows.

        At least one row is returned, so that every rank makes the passes. All rows are needed under torch.compile,
        because shapes must not depend on values, and if times and dropped labels are not available on the CPU.
        """
        if torch.compiler.is_compiling():
            return None
        on_host = b.on_host
        if on_host is None:
            return None
        # Select rows on the CPU, because their number would otherwise be read from the device.
        rows = (on_host.kept & self.inside(on_host.t)).nonzero().flatten()
        if len(rows) == len(b.t):
            return None
        if not len(rows):
            rows = rows.new_zeros(1)
        return rows

    def _is_guided(self, b: NoisyBatch) -> Array:
        """Return which rows are guided, (b, 1, ...): rows with their label, at times inside the interval."""
        return lift(b.kept & self.inside(b.t), b.x_t)

    def _affine_map(self, b: NoisyBatch, v_hat: Sample | None, velocity: Velocity) -> Sample:
        """Compute omega v_t + zeta V(c) + (1 - omega - zeta) V(null) of every row, without passes of weight zero."""
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
    """How a target was guided in training.

    scale: the effective scale w; 1 means no guidance.
    field: the field of a run that sets it.
    off: the settings that disable it.
    """

    scale: float = 1.0
    field: str = "objective.guide"
    off: str = "objective.guide.omega=1 and objective.guide.zeta=0"

    @classmethod
    def of(cls, needs: Needs) -> "GuidanceScale":
        """Return how an objective guides its target."""
        if isinstance(needs.guide, Guide):
            return cls(needs.guide.scale)
        scale = 1.0 if needs.guide is None else needs.guide
        assert not isinstance(scale, Spec), "Needs.guide is a Guide, or a scale"
        return cls(scale, "objective.scale", "objective.scale=1")

    @property
    def active(self) -> bool:
        """Whether the target was guided."""
        return abs(self.scale - 1) > _SAME_SCALE

    def reason(self, model: str = "this model") -> str:
        """Return why a model with a guided target is not guided again while sampling, for messages."""
        return f"{model} was trained at guidance scale {self.scale:.3g}; the scale is part of its weights"


class CFG(Spec):
    """Classifier-free guidance while sampling (Ho and Salimans 2022), at times inside the interval.

    The network is called with its label c and without, and the readings are extrapolated:

        v_w = V(null) + w (V(c) - V(null)),        without guidance w = 1.

    It is for networks trained with plain targets; with a guided target (`Guide`), w is part of the weights.

    A guided reading makes two passes through the network, as one pass of twice the rows. `sample.nfe` counts readings,
    the 250 of "250 x 2" in tables; `Samples.nfe` counts passes, twice as many if all times are in the interval.

    For a velocity, v_w is the velocity of the guided flow. For a jump x_t - (t - s) u, extrapolation of the jumps is
    that of their mean velocities u, as in IMM, and differs from the jump of the guided flow: between Gaussians, the
    latter scales by the geometric mean S_c^w S_0^(1 - w), and this one by w S_c + (1 - w) S_0. They are close if w is
    close to 1, or S_c to S_0. Guidance in training learns the jump of the guided flow.
    """

    # The scale w; 1 means no guidance.
    scale: float = Field(default=1.0, gt=0, le=FACTOR)
    interval: Interval = Interval()

    @property
    def active(self) -> bool:
        """Whether the scale is not 1."""
        return self.scale != 1

    def __call__(self, readings: Readings, null: int | Callable[[Cond], Cond]) -> Readings:
        """Return the guided readings. At scale 1 they are returned unchanged.

        null: the null label, or a function that replaces conditions (b,) by null conditions.
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
            only=readings.only,
        )

    def rows(self, t: Time) -> Rows:
        """Return which rows are guided at times t (b,)."""
        return self.interval.holds(t)

    def _guided(self, read: Callable[..., Any] | None, null: int | Callable[[Cond], Cond]) -> Callable[..., Any] | None:
        """Return the guided form of a reading of (x, t, c) or (x, t, s, c), or None if the objective has none.

        A reading returns a sample or a pair of samples.
        """
        if read is None:
            return None

        def guided_read(*inputs: Tensor) -> Any:  # noqa: ANN401, as the reading
            x, t, *_, c = inputs
            guided_rows = self.rows(t).nonzero().flatten()
            if not len(guided_rows):
                return read(*inputs)

            # Make one pass of all rows with their labels, and of the guided rows without.
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
