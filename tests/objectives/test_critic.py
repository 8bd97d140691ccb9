"""Critic: the formula by hand, gradient reversal, which way samples move, and what training keeps."""

import pytest
import torch

from dumo.flow.slope import JvpSlope
from dumo.objectives.critic import (
    CENTERING_PENALTY,
    DISCRIMINATOR_WEIGHT,
    FLOOR,
    GRADIENT_PENALTY,
    WEIGHT,
    Critic,
    reverse_gradient,
)
from dumo.testing.exact import D, ExactNet, Gaussian, column, exact_batch, gaussian, gradient
from dumo.testing.properties import loss_of
from theory.exact import PRODUCT, Product, drawn
from theory.formula import Polynomial
from theory.pulled import adds, moves_samples_back, width_gradient

CRITIC = Critic(slope=JvpSlope(), drop=0.3)


@pytest.mark.parametrize("progress", [0.3, 1.0])
def test_by_hand(progress: float) -> None:
    net, b = Polynomial(3), drawn(CRITIC, 16, progress=progress)
    none = 0 * b.t
    u = net(b.z, b.c, t=none + 1)[1]
    made = (b.z - u).detach()
    real, fake = (net(x, b.c, t=none)[2].mean(1) for x in (b.x, made))
    pairs = (1 + (fake - real).exp()).log()
    a, e = net.a[2], b.drawn["d.e"].to(D)
    slopes = [((a[1] + 2 * a[3] * x) * e).mean(1) ** 2 for x in (b.x, made)]
    of_some = GRADIENT_PENALTY * (slopes[0] + slopes[1]) + CENTERING_PENALTY * (real + fake) ** 2
    loss = DISCRIMINATOR_WEIGHT * (pairs + of_some[::4].repeat_interleave(4))
    g = column((fake - real).sigmoid()) * (a[1] + 2 * a[3] * made)
    up = (g / (g.square().mean(1, keepdim=True).sqrt() + FLOOR)).detach()
    pull = WEIGHT * ((u - u.detach() + up) ** 2).sum(1) / 2 if progress >= 0.5 else none
    terms = loss_of(CRITIC, net, b)
    assert torch.allclose(terms.parts["d"], pairs, rtol=1e-12, atol=0)
    told = (slopes[0] + slopes[1])[::4].repeat_interleave(4)
    assert torch.allclose(terms.notes["slopes_d"], told, rtol=1e-10, atol=0)
    assert torch.allclose(terms.notes["margin_d"], real - fake, rtol=1e-12, atol=0)
    assert torch.equal(terms.notes["accuracy_d"], (real > fake).to(D))
    adds(CRITIC, net, b, loss, moved_as=loss + pull)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_reversal_is_the_same_whatever_the_loss_is_multiplied_by(scale: float) -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=D, requires_grad=True)
    out, tap = reverse_gradient(x, 0.5, 0.01)
    (grad,) = torch.autograd.grad((scale * (out.exp().sum(1) + tap)).sum(), x)
    g = 3 * x.detach().exp()
    rms = g.square().mean(1, keepdim=True).sqrt()
    assert torch.allclose(grad / scale, -2 * 0.5 / 3 * g / (rms + 0.01), rtol=1e-12)
    out, tap = reverse_gradient(x, 0.5, 0.01)
    (still,) = torch.autograd.grad((out * 0).sum() + tap.sum() + 0 * x.sum(), x)
    (alone,) = torch.autograd.grad(reverse_gradient(x, 0.5, 0.01)[0].exp().sum(), x)
    assert not still.any()
    assert not alone.any()  # of a part of the loss that is not this row's: a probe asks so


@pytest.mark.slow
@pytest.mark.parametrize("flow", [gaussian(), PRODUCT])
def test_a_flat_critic_moves_nothing(flow: Gaussian | Product) -> None:
    b = exact_batch(CRITIC, flow, 64)
    assert not gradient(CRITIC, ExactNet(flow, CRITIC.needs), b)[:2].abs().max() > 1e-10


def test_samples_of_another_width_are_moved_back() -> None:
    objective = Critic(slope=JvpSlope(), drop=0.0)
    assert moves_samples_back(objective, WEIGHT)
    assert abs(width_gradient(objective, 1.0)) < 1e-12
