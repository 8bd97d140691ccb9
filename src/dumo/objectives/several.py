"""Several heads of different objectives on one trunk: one pass, and one loss that sums over them (paper, Sec. 4.3).

    loss = sum_i w_i ||head_i - target_i||^2        with the targets of `dumo.objectives.part`

One slope gives the derivatives of all heads, at the price of one. What tells a head where to aim, r, reaches its own
output layer alone (`Needs.own`): so v and u mean what they do in DuMo, and velocity and endpoint alone are DuMo, to
the bit. Guidance asks the velocity, the first where there are more.

Derivatives may run along that head instead of v*, which is a draw where the head is a mean (as iMF has it), and may
grow in the first part of the training (as sCT has it): then all heads begin as the velocity.

Pulls move the net's own one-pass samples (`dumo.objectives.pull`), by further heads of the same trunk.

One pass has one time a row. Where a law sets rows with r = t apart, the heads without r may learn on these alone
(`apart`), each counted 1 / share times: so theirs are the times of these rows, whatever the others' law of steps is.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from functools import reduce
from math import lcm
from operator import add
from typing import Literal

import torch
from pydantic import Field, model_validator

from dumo.flow.disperse import Dispersed, dispersed, looking
from dumo.flow.guide import Guide
from dumo.flow.law import Signs
from dumo.flow.residual import clipped_share, demand_unbent
from dumo.flow.slope import Along, CentralSlope, Slope
from dumo.flow.times import Below, Beta, Times
from dumo.flow.weight import by_variance, weight_at
from dumo.objectives.part import Aimed, AveragePart, EndpointPart, Part, VelocityPart
from dumo.objectives.pull import Pull, Pulls, phases, pulled
from dumo.types import (
    Climb,
    Cond,
    Frozen,
    Heads,
    Needs,
    Net,
    Noised,
    PerSample,
    Reads,
    Sample,
    Spec,
    Terms,
    Time,
    lift,
    mean_square,
)


class Several(Spec):
    """A head for every part; by default the paper's first three: flow matching, consistency and MeanFlow."""

    kind: Literal["several"] = "several"
    parts: tuple[Part, ...] = (
        VelocityPart(),
        EndpointPart(),
        AveragePart(),
    )  # weights .7, .15, .15: ours, the paper is silent
    times: Times = Below(of=Beta(a=2.4, b=2.4))  # t of DuMo, Tab. 3; r ours
    drop: float = Field(default=0.1, ge=0, le=1)  # as DuMo
    guide: Guide = Guide(zeta=0.55)  # as DuMo
    slope: Slope = CentralSlope(h=0.005)  # as DuMo
    along: Literal["target", "velocity"] = "target"  # derivatives run along v*, as DuMo's, or the velocity head (ours)
    ramp: float = Field(default=0.0, ge=0, le=1)  # share of training in which they grow, from heads that are v (ours)
    disperse: Dispersed = None  # what a block makes of its rows lies apart
    probe: Signs | None = Field(default=None, exclude_if=lambda probe: probe is None)  # what a divergence is found by
    apart: bool = False  # heads that are not told r learn on rows with r = t alone (ours)
    pulls: Pulls = ()  # what moves one-pass samples to where the data are

    @property
    def needs(self) -> Needs:
        """What the net takes and gives, and the loss takes."""
        own = {p.name: ("r",) for p in self.parts if p.aims}
        heads, derives = tuple(p.name for p in self._headed), any(p.derived for p in self.parts)
        gauges = tuple(f"log_variance_{p.name}" for p in self.parts if p.variance)
        needs = Needs(
            heads=heads,
            gauges=gauges,
            own=own,
            slope=self.slope,
            derives=derives,
            guide=self.guide,
            group=lcm(2 if self._contrast else 1, *(pull.group for pull in self.pulls)),
            climbs=self._place("shortcut") is None,
            phases=phases(self.pulls),
            trained_on=next((pull.trained_on for pull in self.pulls if pull.trained_on), ""),
        )
        return looking(needs, self.disperse)

    @property
    def _headed(self) -> "tuple[Part | Pull, ...]":
        """What has a head, in the order of the net's answers: parts, then pulls that learn."""
        return *self.parts, *(pull for pull in self.pulls if pull.learns)

    @property
    def _contrast(self) -> float:
        """The most of its parts."""
        return max([0.0, *[part.contrast for part in self.parts if isinstance(part, VelocityPart)]])

    @model_validator(mode="after")
    def _whole(self) -> "Several":
        if twice := [name for name, n in Counter(p.name for p in (*self.parts, *self.pulls)).items() if n > 1]:
            raise ValueError(f"parts and pulls have names of their own, but '{twice[0]}' is that of two: rename one")
        if not any(p.kind == "velocity" for p in self.parts):
            raise ValueError("no part is of kind velocity, which guides the others: add one")
        if self.pulls and self._end is None:
            raise ValueError("pulls move one-pass samples, which no part makes: add one of kind endpoint or average")
        shortcut = any(p.kind == "shortcut" for p in self.parts)
        if shortcut or self.apart:
            moving = self.times.moving(1000)
            if moving is None or all(moving):
                raise ValueError(
                    f"{'a shortcut learns the velocity' if shortcut else 'apart: heads learn'} on rows with r = t, of "
                    f"which times '{self.times.kind}' set none apart: use times.kind=dyadic, or pair with a "
                    "velocity_ratio" + ("" if shortcut else ", or apart=false")
                )
        if any(part.power for part in self.parts):
            self.guide.demand_l2("power > 0 weighs a row by its own residual", "power=0")
        self._demand_divergence()
        demand_unbent(self._contrast, self.guide)
        if self._contrast and self.along == "velocity":
            raise ValueError("contrast moves the velocity head away from the velocity: use along=target, or contrast=0")
        return self

    def loss(self, net: Net, ref: Frozen, b: Noised) -> Terms:
        """The weighted sum over the parts; notes: what a clamp of a target with a derivative would cut."""
        answers, along = self._heads(net, ref, b)
        heads, more = answers[: len(self.parts)], answers[len(self._headed) :]
        first = self._first
        with torch.no_grad():
            v_star = self.guide(b, heads[first], lambda b, c: self._aimed(ref, first)(b.x_t, b.t, b.r, c))
            grown = min(1.0, b.progress / self.ramp) if self.ramp else 1.0
            rates = tuple(grown * rate for rate in along(v_star if self.along == "target" else heads[first].detach()))
            told = (first if part.kind == "divergence" else i for i, part in enumerate(self.parts))  # whose head
            asked = zip(self.parts, rates, told, strict=False)  # gauges have rates, too
            targets = [part.target(b, v_star, rate, self._aimed(ref, i)) for part, rate, i in asked]
        errors = [head - target for head, target in zip(heads, targets, strict=True)]
        losses = [part.measure(head, target) for part, head, target in zip(self.parts, heads, targets, strict=True)]
        alone = (b.r == b.t).to(b.t) / (1 - self.times.moving_share) if self.apart else 1
        learned = dict(zip((part.name for part in self.parts if part.variance), more, strict=False))
        known = [*zip(self.parts, errors, strict=True)]
        losses = [by_variance(loss, learned.get(p.name)) for p, loss in zip(self.parts, losses, strict=True)]
        weights = [weight_at(part.weight, b.progress) * (1 if part.aims else alone) for part in self.parts]
        loss = reduce(add, (weight * loss for weight, loss in zip(weights, losses, strict=True)))
        notes = {f"clipped_share_{part.name}": clipped_share(e) for part, e in known if part.derived}
        notes |= {f"log_variance_{name}": w.detach() for name, w in learned.items()}
        terms = Terms(loss, {part.name: mean_square(e) for part, e in known}, notes)
        u = "" if self._end is None else self.parts[self._end].name  # without pulls alone
        terms = pulled(terms, self.pulls, b, net, self._named, u=u, v=self.parts[first].name)
        return dispersed(terms, self.disperse, more)

    def read(self, net: Net) -> Reads:
        """Of each reading the first head that has it, those before that are not told r; both: told r = 0."""
        found = [self.parts[i].read(self._aimed(net, i)) for i in self._order]
        first = {f.name: [one for reads in found if (one := getattr(reads, f.name)) is not None] for f in fields(Reads)}
        reads = Reads(**{name: have[0] for name, have in first.items() if have})
        reads = reads if self._end is None else replace(reads, both=self._both(net, self._end))
        jump, growth = self._place("average"), self._place("divergence")
        return reads if jump is None or growth is None else replace(reads, climb=self._climb(net, jump, growth))

    def _climb(self, net: Net, jump: int, growth: int) -> Climb:
        """The end of the jump that part `jump` makes, and what part `growth` says of its volume, of one pass."""

        def climb(x: Sample, t: Time, s: Time, c: Cond) -> tuple[Sample, PerSample]:
            heads = net(x, c, t=t, **self._own(s))
            return x + lift(s - t, x) * heads[jump], (s - t) * heads[growth].flatten(1).sum(1)

        return climb

    def _both(self, net: Net, end: int) -> Callable[[Sample, Time, Cond], tuple[Sample, Sample]]:
        """The velocity, and the end of the jump that part `end` makes, of one pass."""

        def both(x: Sample, t: Time, c: Cond) -> tuple[Sample, Sample]:
            heads = net(x, c, t=t, **self._own(0 * t))
            return heads[self._first], x - lift(t, x) * heads[end]

        return both

    @property
    def _first(self) -> int:
        """The place of the velocity that guides."""
        return next(i for i, part in enumerate(self.parts) if part.kind == "velocity")

    def _place(self, kind: str) -> int | None:
        """That of the first part of this kind."""
        return next((i for i, part in enumerate(self.parts) if part.kind == kind), None)

    def _demand_divergence(self) -> None:
        """Raise ValueError for what a divergence is not learned, or not read, without."""
        if (self._place("divergence") is None) != (self.probe is None):
            raise ValueError(
                "a part of kind divergence, and it alone, is found by signs: add probe.kind=signs, or drop both"
            )
        if self.probe and not (self.times.climbs and self._place("average") is not None):
            raise ValueError(
                "a divergence is read along jumps from data to noise: add a part of kind average, and times of kind "
                "pair or jumps with both_ways=true"
            )

    @property
    def _end(self) -> int | None:
        """The place of the head that an endpoint is read of; None: there is none."""
        return next((i for i in self._order if self.parts[i].ends), None)

    @property
    def _order(self) -> list[int]:
        """The places of the parts in the order in which they are read: first those that are not told r."""
        return sorted(range(len(self.parts)), key=lambda i: self.parts[i].aims)

    def _named(self, net: Net, x: Sample, t: Time, c: Cond) -> dict[str, Sample]:
        """The heads by name, told r = 0."""
        names = (p.name for p in self._headed)
        return dict(zip(names, net(x, c, t=t, **self._own(0 * t)), strict=False))

    def _heads(self, net: Net, ref: Frozen, b: Noised) -> tuple[Heads, Along]:
        """The pass, and the derivatives: none where no target has one, of rows with r < t where no other needs it."""
        if not self.needs.derives:
            heads = net(b.x_t, b.c, t=b.t, **self._own(b.r))
            return heads, lambda w: tuple(torch.zeros_like(w) for _ in self.parts)
        moving = None if any(part.derived and not part.aims for part in self.parts) else b.moving
        toward = self.guide.known_target(b) if self.along == "target" else None
        return self.slope(net, ref, b.x_t, b.c, t=b.t, toward=toward, moving=moving, **self._own(b.r))

    def _aimed(self, net: Net, i: int) -> Aimed:
        """Head i as a function of r as well."""
        return lambda x, t, r, c: net(x, c, t=t, **self._own(r))[i]

    def _own(self, r: Time) -> dict[str, Time]:
        """What the net is told beside t."""
        return {"r": r} if any(part.aims for part in self.parts) else {}
