"""Guidance while sampling (Ho and Salimans 2022): a net is read with its label and without, and drawn from the one

    v_w = V(null) + w (V(c) - V(null)),        w = 1 being no guidance.

It is for nets trained on plain targets. One whose target was guided (`dumo.flow.guide`) has its w in the weights.

Of a velocity this is the velocity of the guided flow, exactly. A jump from t to s is x_t - (t - s) u, so the same map
of two jumps is that of their mean velocities u, as IMM samples. It is not the jump of the guided flow: between Gaussian
laws that one scales by the geometric S_c^w S_0^(1 - w), this one by w S_c + (1 - w) S_0. They are near where w is near
1, or S_c near S_0. Guidance in training teaches the right jump.

A guided reading makes two passes through the net, as one pass of twice the rows. A solver is asked for readings
(`sample.nfe`, what tables write as the 250 of "250 x 2"); what the net counts (`Samples.nfe`) is passes, so twice as
many where all the times are in the interval.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pydantic import Field

from dumo.flow.guide import Interval
from dumo.runtime.bound import FACTOR
from dumo.types import Guide, Needs, Reads, Rows, Sample, Spec, Time, UserError


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
        return cls(1.0 if needs.guide is None else needs.guide, "objective.scale", "objective.scale=1")

    @property
    def active(self) -> bool:
        """Whether there was any guidance."""
        return abs(self.scale - 1) > 1e-9  # 0.2 / (1 - 0.8) is not 1 in floating point


class CFG(Spec):
    """The readings of a net, guided by `scale` at times inside the interval."""

    scale: float = Field(default=1.0, gt=0, le=FACTOR)  # w; 1 is none
    interval: Interval = Interval()

    @property
    def active(self) -> bool:
        """Whether anything is guided at all."""
        return self.scale != 1

    def __call__(self, reads: Reads, null: int) -> Reads:
        """The readings, guided; `null` is the class index of no label. As they are where the scale is 1."""
        if not self.active:
            return reads
        return Reads(
            velocity=reads.velocity and self._of(reads.velocity, null),
            endpoint=reads.endpoint and self._of(reads.endpoint, null),
            flow_map=reads.flow_map and self._of(reads.flow_map, null),
            both=reads.both and self._of(reads.both, null),
            hops=reads.hops,
            lowest=reads.lowest,
        )

    def rows(self, t: Time) -> Rows:
        """Which rows are guided, by the time where the net is read."""
        return self.interval.holds(t)

    def check(
        self,
        data: str,
        classes: int,
        drop: float,
        opened: GuidanceScale,
        *,
        name: str = "sample.guide",
        whose: str = "",
    ) -> None:
        """Refuse what has no null condition, or is guided already, with a UserError.

        Of the data the kind and number of classes, of the objective its `drop` and what guided it in training; `name`
        is the field that asks, `whose` the run that is read, where that is another.
        """
        here, none = f"{name}.scale = {self.scale:g}", f"set {name}.scale=1"
        of, train = (f" of {whose}", f"train {whose}") if whose else ("", "train")
        if not self.active:
            return
        if not classes:
            raise UserError(f"{here} asks for guidance, but data '{data}' has no classes to guide by: {none}")
        if opened.active:
            raise UserError(
                f"{here} would guide once more what {opened.field}{of} has guided in training, by "
                f"{opened.scale:.3g}: {none}, or {train} with {opened.off}"
            )
        if not drop:
            raise UserError(
                f"{here} needs what the net makes without a label, which objective.drop = 0{of} never teaches: "
                f"{none}, or {train} with objective.drop=0.1"
            )

    def _of(self, read: Callable[..., Any], null: int) -> Callable[..., Any]:
        """Guide one reading, of (x, t, c) or (x, t, s, c), that answers with a sample or a pair of them."""

        def guided(x: Sample, t: Time, *rest: torch.Tensor) -> Any:  # noqa: ANN401, as the reading
            place, c = self.rows(t).nonzero().flatten(), rest[-1]
            if not len(place):
                return read(x, t, *rest)
            without = (x, t, *rest[:-1], torch.full_like(c, null))
            found = read(*(torch.cat([a, b[place]]) for a, b in zip((x, t, *rest), without, strict=True)))

            def mixed(both: torch.Tensor) -> torch.Tensor:  # the rows, and those without a label
                y, y_null = both[: len(x)], both[len(x) :]
                return y.index_copy(0, place, y_null + self.scale * (y[place] - y_null))

            return tuple(map(mixed, found)) if isinstance(found, tuple) else mixed(found)

        return guided
