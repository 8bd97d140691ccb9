"""DuMo and adversarial flow (AFM, Lin et al. 2025, arXiv 2511.22475): the critic is a head of the same trunk.

The mean of the head d at t = 0, the logit D, is to be higher of data than of samples of the same condition, by
relativistic pairs softplus(D(x') - D(x)); samples climb what the critic descends. Its slopes dD/dx are kept small (R1
and R2), and so is D(x) + D(x'), which pairs do not see. Both sides descend in one backward pass, by gradient reversal
(Ganin and Lempitsky 2015, arXiv 1409.7495).

A critic's slope g tells a direction, and its length says little: each row's is brought to root mean square 1 (ours; AFM
divides by a running mean of the norms). AFM's transport cost, the mean square of x' - z, is left out: which x' a z
comes to is DuMo's to say.
"""

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from dumo.autodiff.dual import pair, primal
from dumo.flow import dropout
from dumo.flow.draw import Noise
from dumo.flow.slope import rate_of
from dumo.objectives.pull import Pull
from dumo.types import Array, Needs, Net, Noised, PerSample, Sample, Terms, lift

WEIGHT, FIT = 0.02, 0.3  # of the pull, and of the critic's own loss; ours
SLOPES, CENTRE = 0.25, 0.01  # of the squares of its slopes, and of (D(x) + D(x'))^2; AFM
EVERY = 4  # one in this many rows has these two taken; AFM, of slopes
FLOOR = 0.01  # the root mean square of g below which samples are moved less; ours


class Critic(Pull):
    """DuMo, a head that tells data from its samples, and the pull up that head's slope."""

    own: ClassVar[tuple[str, ...]] = ("d",)
    kind: Literal["critic"] = "critic"

    @property
    def needs(self) -> Needs:
        """As every pull; rows that belong together, and the directions of slopes."""
        return replace(super().needs, group=EVERY, laws={"d.e": Noise()})

    def pull(self, net: Net, b: Noised, u: Sample) -> Terms:
        """Two passes with gradients, and two of a quarter of the rows, each the price of two, for the exact slopes."""
        still = (b.z - u).detach()
        made, tap = reversed_at(b.z - u, WEIGHT / FIT, FLOOR) if self.acts(b) else (still, torch.zeros_like(b.t))
        real, fake = (logit(net(x, b.c, t=0 * b.t)[2]) for x in (b.x, made))
        pairs = softplus(fake - real)
        (d, slope), (d_still, slope_still) = (self.steepness(net, b, x) for x in (b.x, still))
        slopes = slope.square() + slope_still.square()
        loss = pairs + tap.to(pairs) + SLOPES * slopes + CENTRE * (d + d_still).square()  # only pairs move samples
        notes = {"right_d": (real > fake).to(pairs), "margin_d": (real - fake).detach(), "slopes_d": slopes.detach()}
        return Terms(FIT * loss, {"d": pairs}, notes)

    def steepness(self, net: Net, b: Noised, x: Sample) -> tuple[PerSample, PerSample]:
        """D, and its slope along noise, whose square is |dD/dx|^2 in the mean: of a quarter of the rows, for all."""
        some = b[::EVERY]
        with dropout.rows(range(0, len(x), EVERY)):
            head = net(pair(x[::EVERY], some.drawn["d.e"].to(x), recorded=True), some.c, t=0 * some.t)[2]
        d, slope = logit(primal(head)), logit(rate_of(head))
        return d.repeat_interleave(EVERY), slope.repeat_interleave(EVERY)


def logit(head: Array) -> PerSample:
    """The mean of the head, at least in fp32."""
    head = head.flatten(1)
    return head.mean(1, dtype=torch.promote_types(head.dtype, torch.float32))


def reversed_at(x: Sample, strength: float, floor: float) -> tuple[Sample, PerSample]:
    """Return x, and a tap: zeros to add to the loss l of each row. In `backward` x descends `strength` times

        the mean square of x - sg(x + g / (rms(g) + floor)),    g = dl/dx times the n numbers of a row,

    so x climbs l, by steps that shrink where g is below `floor`. The gradient of the tap is what l is multiplied by in
    the loss, by weights and the rows of a batch; dividing by it leaves no trace of that.
    """
    out, tap = _Reversed.apply(x, strength, floor)  # pyright: ignore[reportGeneralTypeIssues]
    return out, tap


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float, floor: float) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        ctx.strength, ctx.floor = strength, floor
        return x.view_as(x), x.new_zeros(len(x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        slope, scale = grads
        n = slope[0].numel()
        g = n * slope
        rms = g.flatten(1).square().mean(1).sqrt()
        size = (rms + ctx.floor * scale.abs()).clamp(min=torch.finfo(g.dtype).tiny)
        return -2 * ctx.strength / n * g * lift(scale.abs() / size, g), None, None
