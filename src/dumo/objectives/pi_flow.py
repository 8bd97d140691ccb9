"""pi-Flow (Chen et al. 2025, arXiv 2510.14974): one pass gives a policy, a velocity on a segment of time.

Time is cut into equal segments. A pass at the top t of a segment returns heads d0, d1, ..., which give N guesses at the
data: one for each of N even times from the segment's end up to t. Between these times the guess is linear, and the
policy goes towards the guess of its time (their DX policy):

    x^_i = x_t - t d_i                                                        (1)
    pi(x, s) = (x - x^(s)) / s                                                (2)

Along a piece on which x^(s) = a + k s, dx/ds = pi(x, s) is solved in closed form, for (x / s)' = -(a + k s) / s^2:

    x_s' = q x_s + a (1 - q) - k s' log q,        q = s' / s                  (3)

which at s' = 0 is a. So no solver steps along the policy: their 128 Euler steps of a whole flow tend to this (ours).

The policy, held still, is rolled out to two times of the segment, and where it arrives it is to go as the teacher does:

    || pi(x_s, s) - sg V(x_s, s) ||^2        x_s on the policy's own way      (4)

Unlike DuMo: no derivative is taken, and at the exact flow the guesses are the means of the data along the way. x_s lies
on no path between data and noise that are known, so only a teacher can be asked there: a batch without one is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Literal

import torch
from pydantic import Field

from dumo.objectives.base import (
    Cond,
    FromTeacher,
    Frozen,
    Grid,
    Needs,
    Net,
    NoisyBatch,
    ObjectiveSpec,
    Readings,
    Sample,
    Terms,
    Time,
    Uniform,
    UserError,
    lift,
    mean_square,
)

_MIN_TIME = 1e-4  # the least time, or length of time, that is divided by (their code)
_ROUNDING = 1e-6  # of times in segments: ours


@dataclass(frozen=True)
class Policy:
    """The policy pi on a segment of time, from a pass at its top."""

    x: Sample  # where the pass was made
    heads: Sequence[Sample]  # the d_i, each shaped like x, in order of time: the last is that of t
    t: Time  # the top of the segment, (b,)
    end: Time  # its lower end, (b,)

    def velocity(self, x: Sample, s: Time) -> Sample:
        """Return pi at points x and times s (b,) of the segment."""
        last = len(self.heads) - 1
        place = (s - self.end) / (self.t - self.end).clamp(min=_MIN_TIME) * last  # from 0 at the end to `last` at t
        weights = [(1 - (place - i).abs()).clamp(min=0) for i in range(len(self.heads))]  # 0 but for two neighbours
        d = reduce(add, (lift(weight, x) * head for weight, head in zip(weights, self.heads, strict=True)))
        return (x - self.x + lift(self.t, x) * d) / lift(s.clamp(min=_MIN_TIME), x)  # (1) and (2)

    def roll(self, x: Sample, s: Time, to: Time) -> Sample:
        """Return the points to which the policy carries x from times s (b,) down to times `to` (b,) of the segment."""
        guesses = [self.x - lift(self.t, x) * head for head in self.heads]  # (1)
        pieces = max(1, len(guesses) - 1)
        for i in reversed(range(pieces)):
            low = self.end + (self.t - self.end) * i / pieces
            high = self.end + (self.t - self.end) * (i + 1) / pieces
            guess_low = guesses[i]
            guess_high = guesses[min(i + 1, len(guesses) - 1)]  # a single guess is constant
            k = (guess_high - guess_low) / lift((high - low).clamp(min=_MIN_TIME / pieces), x)
            a = guess_low - lift(low, x) * k
            # The part of the way from s to `to` that lies on this piece; rows without one stay.
            start = torch.minimum(torch.maximum(s, low), high)
            stop = torch.minimum(torch.maximum(to, low), high)
            q = stop / torch.where(start > 0, start, 1)
            x_stop = lift(q, x) * x + lift(1 - q, x) * a - lift(torch.xlogy(stop, q), x) * k  # (3)
            x = torch.where(lift(stop < start, x), x_stop, x)
        return x


class PiFlow(ObjectiveSpec):
    """Imitation of a teacher's velocity along the net's own policy; a pass for each segment."""

    kind: Literal["pi_flow"] = "pi_flow"
    times: Grid = Grid(steps=4)  # its ends are those of segments; theirs 1, 2 on ImageNet, 4, 8 of text to image
    guesses: int = Field(default=10, ge=1, le=100)  # N of its DX policies of text to image
    drop: float = Field(default=0.0, ge=0, le=1)  # ours: the teacher has its own answer without a label
    # The policy is rolled out to two shares of the segment, the smaller one first.
    early: Uniform = Uniform()
    late: Uniform = Uniform()

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the net, and what else the loss needs."""
        heads = tuple(f"d{i}" for i in range(self.guesses))
        return Needs(heads=heads, laws={"early": self.early, "late": self.late}, teacher=FromTeacher("must"))

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """One pass. Two states as theirs, and the source itself, at which the batch has V already (ours).

        Raises UserError for a batch without a teacher.
        """
        if b.teacher is None:
            raise UserError(
                f"objective '{self.kind}' learns from a teacher's velocity, and this batch has no teacher: give it "
                "one, add_noise(..., teacher=...), in a run teacher.source"
            )
        policy = self._policy(net(b.x_t, b.c, t=b.t), b.x_t, b.t)
        parts = {"source": mean_square(policy.heads[-1] - b.v_t)}
        shares = torch.stack([b.drawn["early"].to(b.t), b.drawn["late"].to(b.t)])
        early, late = shares.sort(0)[0]
        x = b.x_t
        s = b.t
        for name, share in (("early", early), ("late", late)):
            to = b.t - share * (b.t - policy.end)
            with torch.no_grad():
                x = policy.roll(x, s, to)
                s = to
                data_v = b.path.at(b.x, b.z, s)[1]  # for a teacher that reads it
                v = b.teacher(x, s, b.c, data_v)
            parts[name] = mean_square(policy.velocity(x, s) - v)  # (4)
        return Terms(torch.stack([*parts.values()]).mean(0), parts)

    def _policy(self, heads: tuple[Sample, ...], x: Sample, t: Time) -> Policy:
        """Return the policy of a pass at x and t, the top of a segment, with the outputs `heads`."""
        end = (t - 1 / self.times.steps).clamp(min=0)
        return Policy(x=x, heads=heads, t=t, end=end)

    def readings(self, net: Net) -> Readings:
        """Jumps from the top of a segment to anywhere in it."""

        def jump(x: Sample, t: Time, s: Time, c: Cond) -> Sample:
            return self._policy(net(x, c, t=t), x, t).roll(x, t, s)

        def endpoint(x: Sample, t: Time, c: Cond) -> Sample:
            return jump(x, t, 0 * t, c)

        has_one_segment = self.times.steps == 1  # then a pass jumps to the data, from t = 1, which alone is taught
        return Readings(endpoint=endpoint if has_one_segment else None, flow_map=jump, hops=self._is_taught)

    def _is_taught(self, t: float, s: float) -> bool:
        """Whether a jump begins at the top of a segment, and ends in it."""
        num_segments = t * self.times.steps  # from the data up to t
        is_at_top = abs(num_segments - round(num_segments)) < _ROUNDING and round(num_segments) > 0
        return is_at_top and (t - s) * self.times.steps < 1 + _ROUNDING
