"""A derivative inside a loss: its value, and its own gradient, through every rule and every net.

The truth is made by reverse-mode three times over: J^T v is linear in v, and its derivative in v along d is J d, which
is then differentiated. That is exact but for `F.layer_norm`, whose third derivative torch has wrong, as it has that of
forward-mode; so in the truth it is written out.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dumo.autodiff import dual
from dumo.autodiff.dual import Dual
from dumo.flow.linearize import heads_and_end_derivatives
from dumo.nets import MLP, DiT
from dumo.testing.network import randomise
from dumo.types import Array, Heads, Needs
from theory.test_dual import BATCH, CLASSES, NEEDS, SHAPE, SIZES, D, each_net, error, made, record
from unit.autodiff.test_rule import RULED, Shapes, directions, function, moving, operands, ride

SMOOTH = [(shapes, call) for shapes, call in RULED if not any(s in call for s in ("float", "half()", "double()"))]


def by_formula(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """`F.layer_norm`."""
    variance, mean = torch.var_mean(x, tuple(range(-len(shape), 0)), correction=0, keepdim=True)
    y = (x - mean) / (variance + eps).sqrt() * (1 if weight is None else weight)
    return y if bias is None else y + bias


@pytest.fixture
def honest(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Heads]:
    """J d of outputs f() along the directions d of some inputs, to be differentiated further."""

    def derivative(f: Callable[[], Heads], inputs: Sequence[Tensor], along: Sequence[Tensor]) -> Heads:
        with monkeypatch.context() as patch, sdpa_kernel(SDPBackend.MATH):
            patch.setattr(F, "layer_norm", by_formula)
            outputs = f()
            back = [torch.zeros_like(y, requires_grad=True) for y in outputs]
            if not any(y.requires_grad for y in outputs):
                return tuple(torch.zeros_like(y) for y in outputs)
            pulled = torch.autograd.grad(outputs, inputs, back, create_graph=True, materialize_grads=True)
            along_d = sum((p * d).sum() for p, d in zip(pulled, along, strict=True))
            return torch.autograd.grad(along_d, back, create_graph=True, materialize_grads=True)

    return derivative


def weighed(heads: Sequence[Array]) -> Tensor:
    """A number made of all numbers."""
    g = torch.Generator().manual_seed(3)
    return sum((h.double() * torch.randn(h.shape, generator=g, dtype=D)).sum() for h in heads)


def gradients(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    if not loss.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    return list(torch.autograd.grad(loss, leaves, retain_graph=True, materialize_grads=True))


@pytest.mark.parametrize(("shapes", "call"), SMOOTH, ids=[call for _, call in SMOOTH])
def test_gradient_of_a_tangent(shapes: Shapes, call: str, honest: Callable[..., Heads]) -> None:
    f, given = function(call), {name: x.requires_grad_(x.dtype == D) for name, x in operands(shapes, call, D).items()}
    along = directions(given, tuple(moving(shapes, given)))
    leaves = [x for x in given.values() if x.requires_grad]
    found = ride(f, given, along, recorded=True)
    tangents = [h.t if isinstance(h, Dual) else torch.zeros_like(h) for h in found]
    truth = honest(lambda: f(**given), [given[name] for name in along], list(along.values()))
    for a, b in zip(gradients(weighed(tangents), leaves), gradients(weighed(truth), leaves), strict=True):
        assert (a - b).abs().max() <= 1e-11 * max(1, b.abs().max()), call


@pytest.mark.parametrize("recorded", [True, False])
def test_tangents_are_recorded_where_that_is_said(recorded: bool) -> None:
    x = torch.randn(2, 3, dtype=D, requires_grad=True)
    y = torch.zeros_like(dual.pair(x, torch.ones_like(x), recorded=recorded))
    y[:] = F.silu(dual.pair(x, torch.ones_like(x), recorded=recorded))
    assert (2 * y).t.requires_grad == recorded  # pyright: ignore


def test_a_norm_has_a_gradient_at_zero() -> None:
    x = torch.zeros(2, 3, dtype=D, requires_grad=True)
    along = Dual(x, torch.ones_like(x), recorded=True)
    for y in (torch.linalg.vector_norm(along, dim=1), F.normalize(along)):
        assert torch.autograd.grad(y.t.sum(), x)[0].isfinite().all()


def by_corners(net: nn.Module, dtype: torch.dtype = D) -> tuple[Heads, Heads]:
    """Heads and rates in r, in every corner of time."""
    x, c, t, r, _ = record(dtype)
    return heads_and_end_derivatives(net, x, c, t=t, r=r)


@each_net
def test_rates_and_their_gradients_are_exact(name: str, honest: Callable[..., Heads]) -> None:
    net = made(name)
    x, c, t, r, _ = record()
    r.requires_grad_()
    truth = honest(lambda: net(x, c, t=t, r=r), [r], [torch.ones_like(r)])
    heads, rates = by_corners(net)
    assert all(torch.equal(a, b) for a, b in zip(heads, net(x, c, t=t, r=r), strict=True))
    assert all(b.norm() > 0.01 for b in truth)
    assert error(rates, truth) < 1e-12
    leaves = list(net.parameters())
    mine, known = (
        gradients(sum(h.square().sum() for h in (*heads, *found)), leaves) for found in (rates, truth)
    )  # of values and rates together
    plain = gradients(sum(h.square().sum() for h in heads), leaves)
    for a, b in zip(mine, known, strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm().clamp(min=1e-3)
    assert sum((b - c).norm() > 1e-3 * b.norm() for b, c in zip(known, plain, strict=True)) > len(leaves) / 3


def test_checkpointing_changes_nothing() -> None:
    def found(checkpoint: bool) -> list[Tensor]:
        net = randomise(DiT(**SIZES, checkpoint=checkpoint).build(NEEDS, SHAPE, CLASSES)).to(D)
        heads, rates = by_corners(net)
        return gradients(weighed((*heads, *rates)), list(net.parameters()))

    for a, b in zip(found(True), found(False), strict=True):
        assert torch.equal(a, b)


def test_a_head_that_the_input_does_not_reach_has_rate_zero() -> None:
    needs = Needs(inputs=("t", "r"), heads=("v", "u"))

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = MLP(width=8, depth=1).build(needs, SHAPE, CLASSES)

        def forward(self, x: Tensor, c: Tensor, /, *, t: Tensor, r: Array) -> Heads:
            return self.net(x, c, t=t, r=0 * t)[0], self.net(x, c, t=t, r=r)[1]

    net = randomise(Half()).to(D)
    (v, u), (dv, du) = by_corners(net)
    assert v.shape == u.shape == dv.shape == du.shape == (BATCH, *SHAPE)
    assert not dv.any()
    assert du.any()
