"""Gradient reversal (Ganin and Lempitsky 2015, arXiv 1409.7495): what is behind climbs the loss that others descend.

So one backward pass serves both sides of a game, with one optimizer. A critic's slope tells a direction, and its length
says little: here each row's is brought to root mean square 1 (ours; AFM divides by a running mean of the norms). A
length needs a scale to be seen, for a loss is multiplied by weights and divided by the rows of a batch that only the
caller of `backward` knows. So beside x there is a `tap`, zeros that are added to the loss of each row: the gradient
that it gets is that row's scale.
"""

from typing import Any

import torch
from torch import Tensor

from dumo.types import PerSample, Sample, lift


def reversed_at(x: Sample, strength: float, floor: float) -> tuple[Sample, PerSample]:
    """x itself, and zeros to add to the loss l of each row; behind, x descends `strength` times the mean square of

        x - sg(x + g / (rms(g) + floor)),    g = dl/dx times the n numbers of a row,

    whatever the loss is multiplied by. So x climbs l, by steps that shrink where g is below `floor`.
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
