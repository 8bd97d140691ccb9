"""pi-Flow (Chen et al. 2025, arXiv 2510.14974): one pass gives a policy, a velocity on a segment of time.

Time is cut into equal segments. At the top of one, the heads d0, d1, ... say (x_t - x^_i) / t, with x^_i guesses at the
data at N even times from the segment's end up to t, between which x^(s) is linear. At any place x of the segment the
policy goes towards the guess of its time (their DX policy),

    pi(x, s) = (x - x^(s)) / s.

Along a piece on which x^(s) = a + b s, dx/ds = pi(x, s) is solved in closed form, for (x / s)' = -(a + b s) / s^2:

    x_s' = q x_s + a (1 - q) - b s' log q,        q = s' / s,

which at s' = 0 is a. So nothing is stepped: their 128 Euler steps of a whole flow tend to this (ours).

The policy, held still, is rolled out to two times of the segment, and where it arrives it is to go as the teacher does:

    || pi(x_s, s) - sg V(x_s, s) ||^2        x_s on the policy's own way.

No derivative is taken, and at the exact flow the guesses are the means of the data along the way. Without a teacher
there is nothing to ask at x_s, which is no point of a path between data and noise that are known: it is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Literal

import torch
from pydantic import Field

from dumo.flow.times import Grid, Uniform
from dumo.types import (
    Cond,
    FromTeacher,
    Frozen,
    Needs,
    Net,
    Noised,
    Reads,
    Sample,
    Spec,
    Terms,
    Time,
    lift,
    mean_square,
)

LEAST = 1e-4  # of a time that is divided by (their code)


@dataclass(frozen=True)
class Policy:
    """From x at time t down to `end`; `slopes` are (x - x^_i) / t, the last of them that of t itself."""

    x: Sample
    slopes: Sequence[Sample]
    t: Time
    end: Time

    def velocity(self, x: Sample, s: Time) -> Sample:
        """pi at x and a time of the segment."""
        last = len(self.slopes) - 1
        place = (s - self.end) / (self.t - self.end).clamp(min=LEAST) * last
        near = (lift((1 - (place - i).abs()).clamp(min=0), x) * h for i, h in enumerate(self.slopes))
        slope = reduce(add, near)  # the line between two guesses
        return (x - self.x + lift(self.t, x) * slope) / lift(s.clamp(min=LEAST), x)

    def roll(self, x: Sample, s: Time, to: Time) -> Sample:
        """Where the policy carries x from time s down to `to`; not beyond the segment."""
        guesses = [self.x - lift(self.t, x) * h for h in self.slopes]
        pieces = max(1, len(guesses) - 1)
        for i in reversed(range(pieces)):
            low, high = (self.end + (self.t - self.end) * k / pieces for k in (i, i + 1))
            one, other = guesses[i], guesses[min(i + 1, len(guesses) - 1)]
            b = (other - one) / lift((high - low).clamp(min=LEAST / pieces), x)
            a = one - lift(low, x) * b
            begins, ends = (torch.minimum(torch.maximum(at, low), high) for at in (s, to))
            q = ends / torch.where(begins > 0, begins, 1)
            moved = lift(q, x) * x + lift(1 - q, x) * a - lift(torch.xlogy(ends, q), x) * b
            x = torch.where(lift(ends < begins, x), moved, x)
        return x


class PiFlow(Spec):
    """Imitation of a teacher's velocity along the net's own policy; a pass for each segment."""

    kind: Literal["pi_flow"] = "pi_flow"
    times: Grid = Grid(steps=4)  # its ends are those of segments; theirs 1, 2 on ImageNet, 4, 8 of text to image
    guesses: int = Field(default=10, ge=1, le=100)  # N of its DX policies of text to image
    drop: float = Field(default=0.0, ge=0, le=1)  # ours: the teacher has its own answer without a label
    early: Uniform = Uniform()  # shares of the segment; the larger of these two is gone to last
    late: Uniform = Uniform()

    @property
    def needs(self) -> Needs:
        """What the net takes and gives, and the loss takes."""
        laws = {"early": self.early, "late": self.late}
        return Needs(heads=tuple(f"d{i}" for i in range(self.guesses)), laws=laws, teacher=FromTeacher("must"))

    def loss(self, net: Net, ref: Frozen, b: Noised) -> Terms:
        """One pass. Two states as theirs, and the source itself, at which the record has V already (ours)."""
        policy = self.policy(net(b.x_t, b.c, t=b.t), b.x_t, b.t)
        shares = (b.drawn[name].to(b.t) for name in ("early", "late"))
        x, s = b.x_t, b.t
        parts = {"source": mean_square(policy.slopes[-1] - b.v_t)}
        for name, share in zip(("early", "late"), torch.stack([*shares]).sort(0)[0], strict=True):
            to = b.t - share * (b.t - policy.end)
            with torch.no_grad():
                x, s = policy.roll(x, s, to), to
                v = b.path.at(b.x, b.z, s)[1]  # the data's, for a teacher that is mixed with it
                v = b.teacher(x, s, b.c, v) if b.teacher else v
            parts[name] = mean_square(policy.velocity(x, s) - v)
        return Terms(torch.stack([*parts.values()]).mean(0), parts)

    def policy(self, heads: tuple[Sample, ...], x: Sample, t: Time) -> Policy:
        """That of a pass at x and t."""
        return Policy(x, heads, t, (t - 1 / self.times.steps).clamp(min=0))

    def read(self, net: Net) -> Reads:
        """Jumps from the top of a segment to anywhere in it."""

        def jump(x: Sample, t: Time, s: Time, c: Cond) -> Sample:
            return self.policy(net(x, c, t=t), x, t).roll(x, t, s)

        whole = self.times.steps == 1
        return Reads(
            endpoint=(lambda x, t, c: jump(x, t, 0 * t, c)) if whole else None,  # t = 1 alone is taught
            flow_map=jump,
            hops=self._taught,
        )

    def _taught(self, t: float, s: float) -> bool:
        """Whether a jump begins at the top of a segment, and ends in it."""
        place = t * self.times.steps
        return abs(place - round(place)) < 1e-6 and round(place) > 0 and (t - s) * self.times.steps < 1 + 1e-6
