"""pi-Flow (Chen et al. 2025, arXiv 2510.14974): one pass returns a policy, a velocity on a segment of time.

Time is divided into equal segments. A pass at the start t of a segment returns heads d0, d1, ..., which give N
predictions of the data, at N equidistant times from the segment's end up to t. Between these times the prediction is
linear, and the policy is the velocity towards it (their DX policy):

    x^_i = x_t - t d_i                                                        (1)
    pi(x, s) = (x - x^(s)) / s                                                (2)

On a piece with x^(s) = a + k s, dx/ds = pi(x, s) has a closed-form solution, since (x / s)' = -(a + k s) / s^2:

    x_s' = q x_s + a (1 - q) - k s' log q,        q = s' / s                  (3)

which is a at s' = 0. Therefore no solver is needed; their 128 Euler steps per flow converge to this (ours).

The policy is detached and integrated to two times of the segment, where it should match the teacher's velocity:

    || pi(x_s, s) - sg V(x_s, s) ||^2        x_s on the policy's trajectory   (4)

Unlike DuMo, there is no derivative, and at the exact flow the predictions are the means of the data along the
trajectory. x_s is not on a path between known data and noise, so a teacher is required.

ArcFlow (Yang et al. 2026, arXiv 2602.09014) has another policy, a sum of N velocities whose lengths change with time
alone. Heads a0, a1, ... give the velocities, and heads l1, l2, ... their rates of growth, which the channels of a pixel
share; l_0 = 0:

    pi(s) = mean over k of a_k exp(l_k (t - s))                               (5)
    x_s' = x_s - mean over k of a_k exp(l_k (t - s)) f(l_k, s - s')           (6)
    f(l, d) = (exp(l d) - 1) / l,        f(0, d) = d

Their network predicts velocities and weights; a_k is their product times N, so that each a_k begins as the teacher's
velocity.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import log
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
from dumo.types import Array

_MIN_TIME = 1e-4  # the smallest time, or difference of times, in a divisor (their code)
_ROUNDING = 1e-6  # the tolerance for times, in segments (our choice)
# exp(l_k) of an untrained network: the first and the last, equidistant in l_k in between (ArcFlow's code).
_GROWTH = (0.2, 4.0)


@dataclass(frozen=True)
class DXPolicy:
    """The policy pi on a segment of time, by predictions of the data.

    x: the input of the pass.
    heads: the d_i, each shaped like x, with increasing time; the last is at t.
    t: the start of the segment, (b,).
    end: the end of the segment, (b,).
    """

    x: Sample
    heads: Sequence[Sample]
    t: Time
    end: Time

    @property
    def source(self) -> Sample:
        """The velocity pi at the source, x and t."""
        return self.heads[-1]

    def velocity(self, x: Sample, s: Time) -> Sample:
        """Return pi at points x and times s (b,) of the segment."""
        last = len(self.heads) - 1
        # From 0 at the end to `last` at t. Only the two neighbouring heads have a weight.
        position = (s - self.end) / (self.t - self.end).clamp(min=_MIN_TIME) * last
        weights = [(1 - (position - i).abs()).clamp(min=0) for i in range(len(self.heads))]
        d = reduce(add, (lift(weight, x) * head for weight, head in zip(weights, self.heads, strict=True)))
        return (x - self.x + lift(self.t, x) * d) / lift(s.clamp(min=_MIN_TIME), x)  # (1) and (2)

    def roll(self, x: Sample, s: Time, to: Time) -> Sample:
        """Integrate the policy from x at times s (b,) down to times `to` (b,) of the segment."""
        predictions = [self.x - lift(self.t, x) * head for head in self.heads]  # (1)
        pieces = max(1, len(predictions) - 1)
        for i in reversed(range(pieces)):
            low = self.end + (self.t - self.end) * i / pieces
            high = self.end + (self.t - self.end) * (i + 1) / pieces
            # A single prediction is constant.
            prediction_low = predictions[i]
            prediction_high = predictions[min(i + 1, len(predictions) - 1)]
            k = (prediction_high - prediction_low) / lift((high - low).clamp(min=_MIN_TIME / pieces), x)
            a = prediction_low - lift(low, x) * k
            # Integrate over the part of [to, s] on this piece, if there is one.
            start = torch.minimum(torch.maximum(s, low), high)
            stop = torch.minimum(torch.maximum(to, low), high)
            q = stop / torch.where(start > 0, start, 1)
            x_stop = lift(q, x) * x + lift(1 - q, x) * a - lift(torch.xlogy(stop, q), x) * k  # (3)
            x = torch.where(lift(stop < start, x), x_stop, x)
        return x


@dataclass(frozen=True)
class MomentumPolicy:
    """ArcFlow's policy on a segment of time.

    a: the velocities a_k, each shaped like x.
    rates: the l_k, each (b, 1, ...); the first is 0.
    t: the start of the segment, (b,).
    """

    a: Sequence[Sample]
    rates: Sequence[Array]
    t: Time

    @classmethod
    def of(cls, heads: Sequence[Sample], t: Time) -> "MomentumPolicy":
        """Return the policy of a pass with heads a0, a1, ..., l1, l2, ..."""
        n = (len(heads) + 1) // 2
        a, growth = heads[:n], heads[n:]
        first, last = (log(limit) for limit in _GROWTH)
        means = [head.mean(1, keepdim=True) for head in growth]
        rates = [first + (last - first) * k / max(1, n - 2) + mean for k, mean in enumerate(means)]
        return cls(a, [torch.zeros_like(a[0][:, :1]), *rates], t)

    @property
    def source(self) -> Sample:
        """The velocity pi at the source, at t."""
        return reduce(add, self.a) / len(self.a)

    def velocity(self, x: Sample, s: Time) -> Sample:
        """Return pi at times s (b,) of the segment; it does not depend on the points x."""
        past = lift(self.t - s, x)
        return reduce(add, (a * (rate * past).exp() for a, rate in zip(self.a, self.rates, strict=True))) / len(self.a)

    def roll(self, x: Sample, s: Time, to: Time) -> Sample:
        """Integrate the policy from x at times s (b,) down to times `to` (b,) of the segment."""
        past, step = lift(self.t - s, x), lift(s - to, x)
        changes: list[Sample] = []
        for a, rate in zip(self.a, self.rates, strict=True):
            exponent = rate * step
            is_zero = exponent == 0
            mean_growth = torch.where(is_zero, 1, exponent.expm1() / torch.where(is_zero, 1, exponent))
            changes.append(a * (rate * past).exp() * mean_growth * step)
        return x - reduce(add, changes) / len(self.a)  # (6)


class PiFlow(ObjectiveSpec):
    """Imitation of a teacher's velocity along the network's policy, with one pass per segment."""

    kind: Literal["pi_flow"] = "pi_flow"
    # The segments. The authors use 1 and 2 on ImageNet, 4 and 8 for text to image.
    times: Grid = Grid(steps=4)
    # dx: pi-Flow's policy, (2); momentum: ArcFlow's, (5).
    policy: Literal["dx", "momentum"] = "dx"
    # N; 10 in their DX policies for text to image, 16 in ArcFlow.
    guesses: int = Field(default=10, ge=1, le=100)
    drop: float = Field(default=0.0, ge=0, le=1)  # our choice, because the teacher provides guidance
    # The policy is integrated to two shares of the segment, the smaller one first.
    early: Uniform = Uniform()
    late: Uniform = Uniform()

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the network, and the other needs of the loss."""
        if self.policy == "dx":
            heads = tuple(f"d{i}" for i in range(self.guesses))
        else:
            rates = (f"l{k}" for k in range(1, self.guesses))
            heads = (*(f"a{k}" for k in range(self.guesses)), *rates)
        return Needs(heads=heads, laws={"early": self.early, "late": self.late}, teacher=FromTeacher("must"))

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Make one pass, with losses at two times, as theirs, and at t, where the batch contains V already (ours).

        Raises UserError for a batch without a teacher.
        """
        if b.teacher is None:
            raise UserError(
                f"objective '{self.kind}' learns from a teacher's velocity, but this batch has no teacher: pass "
                "add_noise(..., teacher=...), or set teacher.source in a run"
            )
        policy = self._policy(net(b.x_t, b.c, t=b.t), b.x_t, b.t)
        parts = {"source": mean_square(policy.source - b.v_t)}
        shares = torch.stack([b.drawn["early"].to(b.t), b.drawn["late"].to(b.t)])
        early, late = shares.sort(0)[0]
        x = b.x_t
        s = b.t
        for name, share in (("early", early), ("late", late)):
            to = b.t - share * (b.t - self._end(b.t))
            with torch.no_grad():
                x = policy.roll(x, s, to)
                s = to
                data_v = b.path.at(b.x, b.z, s)[1]
                v = b.teacher(x, s, b.c, data_v)
            parts[name] = mean_square(policy.velocity(x, s) - v)  # (4)
        return Terms(torch.stack([*parts.values()]).mean(0), parts)

    def _policy(self, heads: tuple[Sample, ...], x: Sample, t: Time) -> DXPolicy | MomentumPolicy:
        """Return the policy of a pass at x and t, the start of a segment, with the outputs `heads`."""
        if self.policy == "momentum":
            return MomentumPolicy.of(heads, t)
        return DXPolicy(x=x, heads=heads, t=t, end=self._end(t))

    def _end(self, t: Time) -> Time:
        """Return the ends of the segments that start at t."""
        return (t - 1 / self.times.steps).clamp(min=0)

    def readings(self, net: Net) -> Readings:
        """Return jumps from the start of a segment to any time in it."""

        def jump(x: Sample, t: Time, s: Time, c: Cond) -> Sample:
            return self._policy(net(x, c, t=t), x, t).roll(x, t, s)

        def endpoint(x: Sample, t: Time, c: Cond) -> Sample:
            return jump(x, t, 0 * t, c)

        # With one segment, a pass from t = 1 jumps to the data.
        has_one_segment = self.times.steps == 1
        return Readings(endpoint=endpoint if has_one_segment else None, flow_map=jump, hops=self._is_trained)

    def _is_trained(self, t: float, s: float) -> bool:
        """Whether a jump starts at the start of a segment, and ends in the segment."""
        num_segments = t * self.times.steps
        is_at_start = abs(num_segments - round(num_segments)) < _ROUNDING and round(num_segments) > 0
        return is_at_start and (t - s) * self.times.steps < 1 + _ROUNDING
