"""A policy (pi-Flow, Chen et al. 2025, arXiv 2510.14974): a velocity on a segment of time that asks no net.

One pass at x_t gives guesses at the data, x^_i, at N even times from the segment's end up to t, between which x^(s) is
linear. At any place x of the segment the policy goes towards the guess of its time,

    pi(x, s) = (x - x^(s)) / s.

Along a piece on which x^(s) = a + b s, dx/ds = pi(x, s) is solved in closed form, for (x / s)' = -(a + b s) / s^2:

    x_s' = q x_s + a (1 - q) - b s' log q,        q = s' / s,

which at s' = 0 is a. So nothing is stepped: their 128 Euler steps of a whole flow tend to this (ours).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch

from dumo.types import Sample, Time, lift

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
