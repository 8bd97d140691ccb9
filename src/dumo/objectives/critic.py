"""DuMo and adversarial flow (AFM, Lin et al. 2025, arXiv 2511.22475): a discriminator as an extra head.

The discriminator is a head d of the generator's network: its logit D(x) is the mean of d at t = 0. Its loss is
relativistic, on pairs of data x and samples x' of the same condition, with gradient penalties (R1 and R2) and a
centering penalty for D(x) + D(x'), which the pairs do not determine. With a row of noise e:

    discriminator loss = softplus(D(x') - D(x))                                       (1)
                       + GRADIENT_PENALTY [(e . dD/dx)^2 + (e . dD/dx')^2]            (2)
                       + CENTERING_PENALTY (D(x) + D(x'))^2                           (3)

The discriminator minimizes (1), and samples maximize it, in one backward pass by gradient reversal (Ganin and Lempitsky
2015, arXiv 1409.7495). The gradient g of x' is normalized in each row, because its length has little meaning:

    V = g / (rms(g) + floor)                                                          (4)

(4) is our choice; AFM divides by a running mean of the norms. AFM's transport cost, the mean square of x' - z, is
omitted, because DuMo's loss determines the assignment of x' to z.
"""

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from dumo.autodiff.dual import accept_duals, pair, primal
from dumo.flow.linearize import tangent_or_zeros
from dumo.objectives.base import Needs, Net, Noise, NoisyBatch, PerSample, Sample, Terms, dropout, lift
from dumo.objectives.pull import Pull
from dumo.types import Array

WEIGHT = 0.02  # of the samples' adversarial loss (our choice)
DISCRIMINATOR_WEIGHT = 0.3  # of the discriminator's loss (our choice)
GRADIENT_PENALTY = 0.25  # of (2), as AFM
CENTERING_PENALTY = 0.01  # of (3), as AFM
PENALTY_INTERVAL = 4  # (2) and (3) are computed on one row in this many; AFM does so for (2)
FLOOR = 0.01  # of (4): the root mean square of g below which samples move less (our choice)


class Critic(Pull):
    """DuMo's loss, a discriminator head, and an adversarial loss of the samples."""

    own_heads: ClassVar[tuple[str, ...]] = ("d",)
    kind: Literal["critic"] = "critic"

    @property
    def needs(self) -> Needs:
        """The needs of `Pull`, groups of PENALTY_INTERVAL rows, and the noise for the gradient penalties."""
        return replace(super().needs, group=PENALTY_INTERVAL, laws={"d.e": Noise()})

    def pull(self, net: Net, b: NoisyBatch, u: Sample) -> Terms:
        """Return the discriminator's loss, with a reversed gradient for the samples.

        It makes two passes with gradients, and two of one row in PENALTY_INTERVAL, which cost twice as much per row.
        """
        samples = b.z - u
        fixed_samples = samples.detach()
        if self.moves_samples(b):
            fake, scale_probe = reverse_gradient(samples, WEIGHT / DISCRIMINATOR_WEIGHT, FLOOR)
        else:
            fake = fixed_samples
            scale_probe = torch.zeros_like(b.t)
        d_real = _logit(net(b.x, b.c, t=0 * b.t)[2])
        d_fake = _logit(net(fake, b.c, t=0 * b.t)[2])
        pairs = softplus(d_fake - d_real)  # (1), the only term with a gradient for samples

        d_x, slope_x = self._logit_and_slope(net, b, b.x)
        d_sample, slope_sample = self._logit_and_slope(net, b, fixed_samples)
        slopes = slope_x.square() + slope_sample.square()  # (2)
        center = (d_x + d_sample).square()  # (3)

        loss = pairs + scale_probe.to(pairs) + GRADIENT_PENALTY * slopes + CENTERING_PENALTY * center
        notes = {
            "accuracy_d": (d_real > d_fake).to(pairs),
            "margin_d": (d_real - d_fake).detach(),
            "slopes_d": slopes.detach(),
        }
        return Terms(DISCRIMINATOR_WEIGHT * loss, {"d": pairs}, notes)

    def _logit_and_slope(self, net: Net, b: NoisyBatch, x: Sample) -> tuple[PerSample, PerSample]:
        """Return D, and its derivative along noise, with mean square |dD/dx|^2: (b,) each.

        Both are computed on one row in PENALTY_INTERVAL and repeated for its neighbours.
        """
        accept_duals()
        penalty_rows = b[::PENALTY_INTERVAL]
        dual_x = pair(x[::PENALTY_INTERVAL], penalty_rows.drawn["d.e"].to(x), recorded=True)
        with dropout.rows(range(0, len(x), PENALTY_INTERVAL)):
            head = net(dual_x, penalty_rows.c, t=0 * penalty_rows.t)[2]
        d = _logit(primal(head))
        slope = _logit(tangent_or_zeros(head))
        return d.repeat_interleave(PENALTY_INTERVAL), slope.repeat_interleave(PENALTY_INTERVAL)


def _logit(head: Array) -> PerSample:
    """Return the mean of the head, at least in fp32."""
    head = head.flatten(1)
    return head.mean(1, dtype=torch.promote_types(head.dtype, torch.float32))


def reverse_gradient(x: Sample, strength: float, floor: float) -> tuple[Sample, PerSample]:
    """Return x with a reversed gradient, and zeros `scale_probe` (b,) to add to the loss l of each row.

    The gradient of x is that of `strength` times

        the mean square of x - sg(x + g / (rms(g) + floor)),    g = dl/dx times the n numbers of a row,

    so x ascends l, by steps that decrease if g is below `floor`. The total loss multiplies l by weights and divides it
    by the number of rows. The gradient of `scale_probe` is this factor, by which g is divided.
    """
    out, scale_probe = _Reversed.apply(x, strength, floor)  # pyright: ignore[reportGeneralTypeIssues]
    return out, scale_probe


class _Reversed(torch.autograd.Function):
    """The function of `reverse_gradient`: the identity forward, and (4) backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float, floor: float) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        ctx.strength = strength
        ctx.floor = floor
        scale_probe = x.new_zeros(len(x))
        return x.view_as(x), scale_probe

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        x_grad, probe_grad = grads
        scale = probe_grad.abs()
        n = x_grad[0].numel()
        g = n * x_grad
        rms = g.flatten(1).square().mean(1).sqrt()
        size = (rms + ctx.floor * scale).clamp(min=torch.finfo(g.dtype).tiny)
        return -2 * ctx.strength / n * g * lift(scale / size, g), None, None  # (4)
