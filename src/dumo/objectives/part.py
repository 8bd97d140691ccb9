"""The parts of an objective of several heads: each a head, its weight, and what it is to be.

With v* the guided velocity, along which the heads are derived, r at rest,

    velocity   v*                         for   v(x_t, t) = dx_t/dt                      (flow matching, Eq. 3)
    endpoint   v* - t du/dt               for   u(x_t, t) = (x_t - x_0) / t              (DuMo, Alg. 1)
    average    v* - (t - r) dm/dt         for   m(x_t, t, r) = (x_t - x_r) / (t - r)     (MeanFlow, its Eq. 11)
    shortcut   the mean of m over both halves of [r, t], or v* where r = t; for the same m   (Frans et al. 2025)
    divergence e (J e) - (t - r) dg/dt    for   g(x_t, t, r) = mean of dv_i/dx_i over [r, t]   (F2D2, Ai et al. 2025)

The last holds as the average's does: (t - r) g is an integral along the flow, whose derivative at t is diag J there, of
J = dv/dx of theta^-'s own velocity, e random signs with e_i (J e)_i = J_ii in the mean. The sum of g is the mean
divergence, all that a likelihood asks for; that each number learns its own J_ii is ours, theirs is one number a row.

To add a part: write its class here, and name it in the union.
"""

from collections.abc import Callable
from operator import not_
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from dumo.flow import dropout
from dumo.flow.divergence import diagonal
from dumo.flow.residual import Contrast, adaptive, contrasted
from dumo.flow.weight import Weight
from dumo.place import index
from dumo.types import Cond, Noised, PerSample, Reads, Sample, Spec, Time, lift, mean_square

Aimed = Callable[[Sample, Time, Time, Cond], Sample]  # (x_t, t, r, c) -> what one head says there
Name = Annotated[str, Field(pattern=r"^[a-z]\d*$")]  # of a head: a letter, and perhaps a number
FLOOR = 0.01  # MeanFlow's code


class WeightedHead(Spec):
    """What every part has."""

    aims: ClassVar[bool] = False  # its head is told r
    derived: ClassVar[bool] = False  # its target holds its head's derivative
    ends: ClassVar[bool] = False  # its head jumps to the data
    name: Name
    weight: Weight
    variance: bool = Field(default=False, exclude_if=not_)  # divided by it at t, learned (EDM2, Eq. 21)
    power: float = Field(default=0.0, ge=0, exclude_if=not_)  # p of MeanFlow's Eq. 22; ours: 0, the mean square
    floor: float = Field(default=FLOOR, gt=0, exclude_if=lambda floor: floor == FLOOR)  # c of it

    def measure(self, head: Sample, target: Sample) -> PerSample:
        """The loss of a head, before its weight: the mean square, or MeanFlow's adaptive sum of squares."""
        return adaptive(head - target, self.power, self.floor) if self.power else mean_square(head - target)


class VelocityPart(WeightedHead):
    """Flow matching. The first of this kind is the velocity that guidance asks."""

    kind: Literal["velocity"] = "velocity"
    name: Name = "v"
    weight: Weight = 0.7  # DuMo's beta, Tab. 3
    contrast: Contrast = 0.0  # of v's targets (Stoica et al. 2025, who take 0.05)

    @model_validator(mode="after")
    def _square(self) -> "VelocityPart":
        if self.contrast and (self.variance or self.power):
            raise ValueError("contrast is no square: set variance=false and power=0, or contrast=0")
        return self

    def target(self, b: Noised, v_star: Sample, rate: Sample, ref: Aimed) -> Sample:
        """v*."""
        return v_star

    def measure(self, head: Sample, target: Sample) -> PerSample:
        """Mean square, and contrast."""
        return contrasted(super().measure(head, target), head, target, self.contrast)

    def read(self, head: Aimed) -> Reads:
        """The slope of the path."""
        return Reads(velocity=lambda x, t, c: head(x, t, t, c))


class EndpointPart(WeightedHead):
    """DuMo's flow map to the data: consistency."""

    kind: Literal["endpoint"] = "endpoint"
    derived: ClassVar[bool] = True
    ends: ClassVar[bool] = True
    name: Name = "u"
    weight: Weight = 0.15  # ours

    def target(self, b: Noised, v_star: Sample, rate: Sample, ref: Aimed) -> Sample:
        """Alg. 1, line 10."""
        return v_star - lift(b.t, b.x_t) * rate

    def read(self, head: Aimed) -> Reads:
        """The jump to the data (Eq. 6)."""
        return Reads(endpoint=lambda x, t, c: x - lift(t, x) * head(x, t, t, c))


class AveragePart(WeightedHead):
    """MeanFlow's mean velocity down to r."""

    kind: Literal["average"] = "average"
    aims: ClassVar[bool] = True
    derived: ClassVar[bool] = True
    ends: ClassVar[bool] = True
    name: Name = "m"
    weight: Weight = 0.15  # ours

    def target(self, b: Noised, v_star: Sample, rate: Sample, ref: Aimed) -> Sample:
        """MeanFlow, Eq. 11."""
        return v_star - lift(b.t - b.r, b.x_t) * rate

    def read(self, head: Aimed) -> Reads:
        """Jumps, that to the data among them (MeanFlow, Eq. 12)."""
        jump = leap(head)
        return Reads(flow_map=jump, endpoint=lambda x, t, c: jump(x, t, 0 * t, c))


class ShortcutPart(WeightedHead):
    """Mean velocity of a step from those of its halves, which theta^- makes; on rows without a step, v*.

    The finest half is of a size that no row has: it is read off between the sizes next to it (ours; Frans et al. take
    the velocity there). Neither is anything clipped (ours).
    """

    kind: Literal["shortcut"] = "shortcut"
    aims: ClassVar[bool] = True
    name: Name = "m"
    weight: Weight = 0.15  # ours

    def target(self, b: Noised, v_star: Sample, rate: Sample, ref: Aimed) -> Sample:
        """Frans et al., Eq. 4 and 5."""
        place, _ = b.rows_by_step
        if not place:
            return v_star
        m_star, some, i = v_star.clone(), b[place], index(place, v_star.device)
        middle = (some.t + some.r) / 2
        with dropout.rows(i):
            one = ref(some.x_t, some.t, middle, some.c)
            other = ref(some.x_t - lift(some.t - middle, one) * one, middle, some.r, some.c)
        m_star[i] = ((one + other) / 2).to(m_star).where(lift(some.r < some.t, one), m_star[i])
        return m_star

    def read(self, head: Aimed) -> Reads:
        """Jumps, best of the sizes that were taught."""
        return Reads(flow_map=leap(head))


class DivergencePart(WeightedHead):
    """How much volume grows in a jump, per unit of time: the sum of g over the numbers of a sample."""

    kind: Literal["divergence"] = "divergence"
    aims: ClassVar[bool] = True
    derived: ClassVar[bool] = True
    name: Name = "g"
    weight: Weight = 0.05  # ours

    def target(self, b: Noised, v_star: Sample, rate: Sample, ref: Aimed) -> Sample:
        """Of `ref`, which is the velocity here, the Jacobian's diagonal by the signs in `drawn`."""
        _, square = diagonal(lambda x, t, c: ref(x, t, b.r, c), b.x_t, b.t, b.c, b.drawn["probe"].to(b.x_t))
        return square - lift(b.t - b.r, b.x_t) * rate

    def read(self, head: Aimed) -> Reads:
        """Nothing by itself."""
        return Reads()


def leap(head: Aimed) -> Callable[[Sample, Time, Time, Cond], Sample]:
    """x_r = x_t - (t - r) m."""
    return lambda x, t, r, c: x - lift(t - r, x) * head(x, t, r, c)


Part = Annotated[AveragePart | DivergencePart | EndpointPart | ShortcutPart | VelocityPart, Field(discriminator="kind")]
