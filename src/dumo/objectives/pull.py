"""Pulls: what moves a net's own one-pass samples x' = z - u(z, 1) to where the data are, beside what regresses u.

A pull says by which V samples are to move, and x' is regressed on sg(x' + V), so u descends V. What it knows of samples
and data it learns by a head of its own, on samples that are held still, from the first step; it moves them only when a
share `after` of the training is done, for a map that is still far off gains nothing (ours). So every head is used in
every step, there is one backward pass, and one optimizer to resume.

    match    V = w - v at x'_t', where w learns the velocity of the samples     (DMD2, TwinFlow)
    critic   V is up the slope of a head d that tells data from samples         (AFM)
    drift    V is to data nearby, and from samples nearby, and there is no head  (Drifting)

The score of a law diffused to t is -(x_t + (1 - t) v) / t, so w - v is along the gradient, by x', of the divergence
KL(samples || data) diffused to t'; and it vanishes where samples have the law of the data.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch.nn.functional import softplus

from dumo.autodiff.dual import pair, recorded
from dumo.flow import dropout
from dumo.flow.drift import drift
from dumo.flow.law import Level, Noise
from dumo.flow.residual import descending
from dumo.flow.reverse import reversed_at
from dumo.flow.slope import rate_of
from dumo.flow.weight import Weight, weight_at
from dumo.objectives.part import Name
from dumo.types import Cond, Net, Noised, PerSample, Sample, Spec, Terms, Time, frozen, mean_square

Ask = Callable[[Sample, Time, Cond], Mapping[str, Sample]]  # (x_t, t, c) -> the net's heads by name
FLOOR = 1e-3  # ours: the least distance that a row is divided by
EVERY = 4  # one of so many rows has its slopes taken (AFM)


class Moving(Spec):
    """What every pull has."""

    learns: ClassVar[bool] = True  # by a head of its name
    trained_on: ClassVar[str] = ""  # by what it compares samples with data (`Needs.trained_on`)
    name: Name
    weight: Weight
    after: float = Field(default=0.5, ge=0, le=1)  # share of the training; ours

    @property
    def group(self) -> int:
        """So many neighbouring rows belong together."""
        return 1

    def acts(self, progress: float) -> bool:
        """Whether it moves samples when this share of the training is done."""
        return progress >= self.after


class Match(Moving):
    """The velocity of the net's own samples, by a head; and where it differs from the data's, samples move.

    DMD2 has a second net in the head's place (Yin et al. 2024, arXiv 2405.14867), TwinFlow negative times. Noise and
    time are no others' (`dumo.objectives.twinflow` says why the noise is fresh).

    With `alpha` samples descend SiD's loss instead (`identity`), whose slope sees how w and v change with the sample.
    """

    kind: Literal["match"] = "match"
    name: Name = "w"
    weight: Weight = 0.05  # ours
    fit: float = Field(default=0.3, gt=0)  # weight of the head's own loss; ours
    z: Noise = Noise()  # that samples are diffused with
    t: Level = Level()  # to this time
    alpha: float | None = Field(default=None, ge=0, exclude_if=lambda a: a is None)  # of SiD, who take 1.2; None: DMD2

    @model_validator(mode="after")
    def _in_time(self) -> "Match":
        self.t.demand_share("t")
        return self

    def __call__(self, b: Noised, u: Sample, ask: Ask, velocity: str) -> Terms:
        """One pass with gradients, with `alpha` two. Without guidance, V vanishes where samples have the data's law."""
        t, z = b.drawn[f"{self.name}.t"].to(b.t), b.drawn[f"{self.name}.z"].to(b.z)
        x_t, v_t = b.path.at((b.z - u).detach(), z, t)
        heads = ask(x_t, t, b.c)
        w, v = heads[self.name], heads[velocity]
        gap, fit = (w - v).detach(), mean_square(w - v_t)
        loss = self.fit * fit
        if self.acts(b.progress):
            pull = mean_square(descending(u, gap))
            if self.alpha is not None:  # a pass that moves samples alone: what its weights learn, the other's unlearn
                x_t, aim = b.path.at(b.z - u, z, t)
                moved = ask(x_t, t, b.c)
                off = (v_t - v).detach().abs().flatten(1).mean(1).clamp(min=FLOOR)
                apart = identity(moved[self.name], moved[velocity], aim, self.alpha) - identity(w, v, v_t, self.alpha)
                pull = t / off * apart  # t^2 of the guesses x_t - t v at the data, over their mean distance from it
            loss = loss + weight_at(self.weight, b.progress) * pull
        return Terms(loss, {self.name: fit}, {f"pull_{self.name}": mean_square(gap)})


class Critic(Moving):
    """A head whose mean, the logit D, is to be higher of data than of samples of the same condition; samples climb it.

    Constants of AFM (Lin et al. 2025, arXiv 2511.22475), whose critic is a net of its own: relativistic pairs
    softplus(-(D(x) - D(x'))), both sides' slopes in the direction of noise squared on a quarter of the rows, and a pull
    of logits to 0. Both sides descend in one step, by gradient reversal (`dumo.flow.reverse`).
    """

    kind: Literal["critic"] = "critic"
    name: Name = "d"
    weight: Weight = 0.02  # ours
    fit: float = Field(default=0.3, gt=0)  # weight of the critic's own loss; ours
    slopes: float = Field(default=0.25, ge=0)  # weight of the squares of its slopes, R1 and R2; 0: none
    centre: float = Field(default=0.01, ge=0)  # weight of (D(x) + D(x'))^2
    floor: float = Field(default=0.01, gt=0)  # the slope below which samples are moved less; ours
    e: Noise = Noise()  # the direction of its slopes

    @property
    def group(self) -> int:
        """One of so many rows has its slopes taken."""
        return EVERY if self.slopes else 1

    def __call__(self, b: Noised, u: Sample, ask: Ask, velocity: str) -> Terms:
        """Two passes with gradients, and two of a quarter of the rows, each as dear as two, for the exact slopes."""
        made, tap, none = (b.z - u).detach(), torch.zeros_like(b.t), torch.zeros_like(b.t)
        if self.acts(b.progress):
            made, tap = reversed_at(b.z - u, weight_at(self.weight, b.progress) / self.fit, self.floor)
        real, fake = (self.logit(ask(x, none, b.c)) for x in (b.x, made))
        pairs = softplus(fake - real)
        loss = pairs + tap.to(pairs) + self.centre * (real + fake.detach()).square()  # only the pairs move samples
        notes = {f"right_{self.name}": (real > fake).to(pairs), f"margin_{self.name}": (real - fake).detach()}
        if self.slopes:
            steep = self.steepness(b, b.x, ask) + self.steepness(b, made.detach(), ask)
            loss, notes = loss + self.slopes * steep, {**notes, f"slopes_{self.name}": steep.detach()}
        return Terms(self.fit * loss, {self.name: pairs}, notes)

    def logit(self, heads: Mapping[str, Sample]) -> PerSample:
        """The mean of the head, at least in fp32."""
        head = heads[self.name].flatten(1)
        return head.mean(1, dtype=torch.promote_types(head.dtype, torch.float32))

    def steepness(self, b: Noised, x: Sample, ask: Ask) -> PerSample:
        """The square of dD/dx along noise, |dD/dx|^2 on average, of one row of four, which stands for all four."""
        some = b[::EVERY]
        with dropout.rows(range(0, len(x), EVERY)), recorded():
            heads = ask(pair(x[::EVERY], some.drawn[f"{self.name}.e"].to(x)), torch.zeros_like(some.t), some.c)
        return self.logit({self.name: rate_of(heads[self.name])}).square().repeat_interleave(EVERY)


class Drift(Moving):
    """Samples drift to data of their condition, and from one another (`dumo.flow.drift`), without a head.

    The authors' samples drift by features of a pretrained net, 64 of a class; here by the numbers that the net is
    trained on, pixels or latents, and those rows of a group meet that share a condition.
    """

    learns: ClassVar[bool] = False
    trained_on: ClassVar[str] = "numbers"
    kind: Literal["drift"] = "drift"
    name: Name = "g"  # of its notes
    weight: Weight = 0.05  # ours
    radii: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(0.02, 0.05, 0.2), min_length=1)  # theirs
    size: int = Field(default=32, ge=2)  # rows of a group; theirs 64, of each class (`dumo.config.advice` on fewer)

    @property
    def group(self) -> int:
        """So many rows meet."""
        return self.size

    def __call__(self, b: Noised, u: Sample, ask: Ask, velocity: str) -> Terms:
        """No pass beside that of the samples. Raises ValueError where rows are no whole groups."""
        v, force = drift((b.z - u).detach(), b.x, b.c, self.radii, self.size)
        pull = mean_square(descending(u, v))
        return Terms(weight_at(self.weight, b.progress) * pull, {}, {f"force_{self.name}": force})


def identity(w: Sample, v: Sample, aim: Sample, alpha: float) -> PerSample:
    """SiD's loss of samples at x'_t: (w - v) (z' - x' - v) - alpha (w - v)^2 in mean, `aim` = z' - x'; w, v held still
    as functions, not as numbers (Zhou et al. 2024, arXiv 2404.04057, `sid_loss.py`, of the guesses x_t - t v).

    Where w is the velocity of the samples, the mean over noise of the first product is that of (w - v)^2, and twice the
    slope at alpha = 1/2 is that of its mean over samples, w's own change with them counted (ours).
    """
    gap = w - v
    return (gap * (aim - v - alpha * gap)).flatten(1).mean(1)


Pull = Annotated[Critic | Drift | Match, Field(discriminator="kind")]
Pulls = Annotated[tuple[Pull, ...], Field(exclude_if=lambda pulls: not pulls)]


def pulled(
    terms: Terms,
    pulls: Sequence[Pull],
    b: Noised,
    net: Net,
    heads: Callable[..., Mapping[str, Sample]],
    *,
    u: str,
    v: str,
) -> Terms:
    """Terms, and what pulls add: one pass for the samples, with gradients where one moves them, and each pull's own.

    `heads(net, x_t, t, c)` are a net's by name, of which `u` makes the samples and `v` is the velocity.
    """
    now = [pull for pull in pulls if pull.learns or pull.acts(b.progress)]
    if not now:
        return terms
    asked = net if any(pull.acts(b.progress) for pull in now) else frozen(net)
    u_one = heads(asked, b.z, torch.ones_like(b.t), b.c)[u]
    for pull in now:
        more = pull(b, u_one, partial(heads, net), v)
        terms = Terms(terms.loss + more.loss, {**terms.parts, **more.parts}, {**terms.notes, **more.notes})
    return terms


def phases(pulls: Sequence[Pull]) -> tuple[tuple[float, float], ...]:
    """Where steps cost alike: between the shares of the training at which pulls begin to act."""
    starts = sorted({0.0, *(pull.after for pull in pulls)} - {1.0})
    return tuple((start, end - start) for start, end in pairwise((*starts, 1.0)))
