"""Pulls: what moves a net's own one-pass samples x' = z - u(z, 1) to where the data are, beside what regresses u.

A pull says by which V samples are to move, and x' is regressed on sg(x' + V), so u descends V. What it knows of samples
and data it learns by a head of its own, on samples that are held still, from the first step; it moves them only when a
share `after` of the training is done, for a map that is still far off gains nothing (ours). So every head is used in
every step, there is one backward pass, and one optimizer to resume.

    match   V = w - v at x'_t', where w learns the velocity of the samples     (DMD2, TwinFlow)

The score of a law diffused to t is -(x_t + (1 - t) v) / t, so w - v is along the gradient, by x', of the divergence
KL(samples || data) diffused to t'; and it vanishes where samples have the law of the data.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from dumo.flow.law import Level, Noise
from dumo.flow.residual import descending
from dumo.flow.weight import Weight, weight_at
from dumo.objectives.part import Name
from dumo.types import Cond, Net, Noised, Sample, Spec, Terms, Time, frozen, mean_square

Ask = Callable[[Sample, Time], Mapping[str, Sample]]  # (x_t, t) -> the net's heads by name
Named = Callable[[Net, Sample, Time, Cond], Mapping[str, Sample]]  # the same of (net, x_t, t, c)


class Moving(Spec):
    """What every pull has."""

    learns: ClassVar[bool] = True  # by a head of its name
    name: Name
    weight: Weight
    after: float = Field(default=0.5, ge=0, le=1)  # share of the training; ours

    def acts(self, progress: float) -> bool:
        """Whether it moves samples when this share of the training is done."""
        return progress >= self.after


class Match(Moving):
    """The velocity of the net's own samples, by a head; and where it differs from the data's, samples move.

    DMD2 has a second net in the head's place (Yin et al. 2024, arXiv 2405.14867), TwinFlow negative times. Noise and
    time are no others' (`dumo.objectives.twinflow` says why the noise is fresh).
    """

    kind: Literal["match"] = "match"
    name: Name = "w"
    weight: Weight = 0.05  # ours
    fit: float = Field(default=0.3, gt=0)  # weight of the head's own loss; ours
    z: Noise = Noise()  # that samples are diffused with
    t: Level = Level()  # to this time

    @model_validator(mode="after")
    def _in_time(self) -> "Match":
        self.t.demand_share("t")
        return self

    def __call__(self, b: Noised, u: Sample, ask: Ask, velocity: str) -> Terms:
        """One pass with gradients. Without guidance, V vanishes where samples have the law of the data."""
        t, z = b.drawn[f"{self.name}.t"].to(b.t), b.drawn[f"{self.name}.z"].to(b.z)
        x_t, v_t = b.path.at((b.z - u).detach(), z, t)
        heads = ask(x_t, t)
        w = heads[self.name]
        pull = mean_square(descending(u, (w - heads[velocity]).detach()))
        fit = mean_square(w - v_t)
        loss = self.fit * fit + (weight_at(self.weight, b.progress) * pull if self.acts(b.progress) else 0)
        return Terms(loss, {self.name: fit}, {f"pull_{self.name}": pull.detach()})


Pull = Annotated[Match, Field(discriminator="kind")]
Pulls = Annotated[tuple[Pull, ...], Field(exclude_if=lambda pulls: not pulls)]


def pulled(terms: Terms, pulls: Sequence[Pull], b: Noised, net: Net, heads: Named, *, u: str, v: str) -> Terms:
    """Terms, and what pulls add: one pass for the samples, with gradients where one moves them, and each pull's own.

    `heads` are a net's by name, of which `u` makes the samples and `v` is the velocity.
    """
    now = [pull for pull in pulls if pull.learns or pull.acts(b.progress)]
    if not now:
        return terms
    asked = net if any(pull.acts(b.progress) for pull in now) else frozen(net)
    u_one = heads(asked, b.z, torch.ones_like(b.t), b.c)[u]
    for pull in now:
        more = pull(b, u_one, lambda x, t: heads(net, x, t, b.c), v)
        terms = Terms(terms.loss + more.loss, {**terms.parts, **more.parts}, {**terms.notes, **more.notes})
    return terms


def phases(pulls: Sequence[Pull]) -> tuple[tuple[float, float], ...]:
    """Where steps cost alike: between the shares of the training at which pulls begin to act."""
    starts = sorted({0.0, *(pull.after for pull in pulls)} - {1.0})
    return tuple((start, end - start) for start, end in pairwise((*starts, 1.0)))
