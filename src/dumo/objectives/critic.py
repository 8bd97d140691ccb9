"""DuMo and adversarial flow (AFM, Lin et al. 2025, arXiv 2511.22475): the critic is a head of the same trunk.

The logit D(x) is the mean of a head d at t = 0. It is to be higher of data x than of samples x' of the same condition,
by relativistic pairs; its slopes are kept small (R1 and R2), and so is D(x) + D(x'), which pairs do not see. With e a
row of noise:

    critic's loss = softplus(D(x') - D(x))                                            (1)
                  + SLOPES [(e . dD/dx)^2 + (e . dD/dx')^2]                           (2)
                  + CENTRE (D(x) + D(x'))^2                                           (3)

Samples climb (1), which the critic descends. Both happen in one backward pass, by gradient reversal (Ganin and
Lempitsky 2015, arXiv 1409.7495): it hands x' the opposite of its gradient g, brought to root mean square 1 in each row,
for the length of a critic's slope says little:

    V = g / (rms(g) + floor)                                                          (4)

Ours is (4); AFM divides by a running mean of the norms. AFM's transport cost, the mean square of x' - z, is left out:
which x' a z comes to is DuMo's to say.
"""

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from dumo.autodiff.dual import pair, primal, teach_others
from dumo.flow.linearize import tangent_or_zeros
from dumo.objectives.base import Needs, Net, Noise, NoisyBatch, PerSample, Sample, Terms, dropout, lift
from dumo.objectives.pull import Pull
from dumo.types import Array

WEIGHT = 0.02  # of the pull; ours
FIT = 0.3  # of the critic's own loss; ours
SLOPES = 0.25  # of (2); AFM
CENTRE = 0.01  # of (3); AFM
EVERY = 4  # (2) and (3) are taken on one row in this many; AFM does so for slopes
FLOOR = 0.01  # of (4): the root mean square of g below which samples are moved less; ours


class Critic(Pull):
    """DuMo, a head that tells data from its samples, and the pull up that head's slope."""

    own_heads: ClassVar[tuple[str, ...]] = ("d",)
    kind: Literal["critic"] = "critic"

    @property
    def needs(self) -> Needs:
        """The needs of `Pull`, rows that belong together, and the noise along which slopes are taken."""
        return replace(super().needs, group=EVERY, laws={"d.e": Noise()})

    def pull(self, net: Net, b: NoisyBatch, u: Sample) -> Terms:
        """The critic's loss, whose gradient moves the samples.

        It takes two passes with gradients. Two more, of a quarter of the rows, take exact slopes; each costs as much as
        two passes of these rows.
        """
        samples = b.z - u
        fixed_samples = samples.detach()
        if self.moves_samples(b):
            critic_input, tap = reverse_gradient(samples, WEIGHT / FIT, FLOOR)
        else:
            critic_input = fixed_samples
            tap = torch.zeros_like(b.t)
        d_real = _logit(net(b.x, b.c, t=0 * b.t)[2])
        d_fake = _logit(net(critic_input, b.c, t=0 * b.t)[2])
        pairs = softplus(d_fake - d_real)  # (1), the only term that moves samples

        d_x, slope_x = self._logit_and_slope(net, b, b.x)
        d_sample, slope_sample = self._logit_and_slope(net, b, fixed_samples)
        slopes = slope_x.square() + slope_sample.square()  # (2)
        centre = (d_x + d_sample).square()  # (3)

        loss = pairs + tap.to(pairs) + SLOPES * slopes + CENTRE * centre
        notes = {
            "right_d": (d_real > d_fake).to(pairs),
            "margin_d": (d_real - d_fake).detach(),
            "slopes_d": slopes.detach(),
        }
        return Terms(FIT * loss, {"d": pairs}, notes)

    def _logit_and_slope(self, net: Net, b: NoisyBatch, x: Sample) -> tuple[PerSample, PerSample]:
        """D, and its slope along noise, whose mean square is |dD/dx|^2: (b,) each.

        Both are taken on one row in EVERY, which stands for its neighbours.
        """
        teach_others()
        quarter = b[::EVERY]
        x_moving = pair(x[::EVERY], quarter.drawn["d.e"].to(x), recorded=True)
        with dropout.rows(range(0, len(x), EVERY)):
            head = net(x_moving, quarter.c, t=0 * quarter.t)[2]
        d = _logit(primal(head))
        slope = _logit(tangent_or_zeros(head))
        return d.repeat_interleave(EVERY), slope.repeat_interleave(EVERY)


def _logit(head: Array) -> PerSample:
    """The mean of the head, at least in fp32."""
    head = head.flatten(1)
    return head.mean(1, dtype=torch.promote_types(head.dtype, torch.float32))


def reverse_gradient(x: Sample, strength: float, floor: float) -> tuple[Sample, PerSample]:
    """Return x, whose gradient is reversed, and a tap (b,): zeros to add to the loss l of each row.

    In `backward` x descends `strength` times

        the mean square of x - sg(x + g / (rms(g) + floor)),    g = dl/dx times the n numbers of a row,

    so x climbs l, by steps that shrink where g is below `floor`. The total loss multiplies l by weights and divides it
    by the rows of a batch. The gradient of the tap is this factor, and g is divided by it.
    """
    out, tap = _Reversed.apply(x, strength, floor)  # pyright: ignore[reportGeneralTypeIssues]
    return out, tap


class _Reversed(torch.autograd.Function):
    """The function of `reverse_gradient`: the identity forward, and (4) in place of the gradient backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float, floor: float) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        ctx.strength = strength
        ctx.floor = floor
        tap = x.new_zeros(len(x))
        return x.view_as(x), tap

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        x_grad, tap_grad = grads
        scale = tap_grad.abs()
        n = x_grad[0].numel()
        g = n * x_grad
        rms = g.flatten(1).square().mean(1).sqrt()
        size = (rms + ctx.floor * scale).clamp(min=torch.finfo(g.dtype).tiny)
        return -2 * ctx.strength / n * g * lift(scale / size, g), None, None  # (4)
