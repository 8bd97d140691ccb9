"""Transformers of diffusers as they are, tiny and random: a Dual runs through them, its tangent the derivative."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import dumo.autodiff.rule  # noqa: F401, the operations of a Dual
from dumo.autodiff.dual import Dual, pair
from dumo.autodiff.tape import Later, holds, play
from dumo.types import Array
from transformers_tiny import TINY, Tiny

pytestmark = pytest.mark.slow  # diffusers takes seconds to import

T = torch.tensor([0.3125, 0.875])  # exact in fp32, as are 1 - t and 1000 t: rounded they would be other times


def ride(f: Callable[[Array, Array], Array], x: Tensor, t: Tensor, w: Tensor) -> Array:
    """The output, whose tangent rode along."""
    return f(pair(x, w), pair(t, torch.ones_like(t)))


def tape(f: Callable[[Array, Array], Array], x: Tensor, t: Tensor, w: Tensor) -> Array:
    """The output, whose tangent came after the pass."""
    dx, dt = Later(x.shape, x.dtype), Later(t.shape, t.dtype)
    y = f(pair(x, dx), pair(t, dt))
    dx.value, dt.value = w, torch.ones_like(t)
    assert holds([y.t])
    play([y.t])
    return Dual(y.p, y.t.value)


def exact(row: Tiny, x: Tensor, t: Tensor, w: Tensor) -> Tensor:
    """The derivative in float64, by torch."""
    model = row.model(torch.float64)
    x, t, w = (a.double() for a in (x, t, w))
    with sdpa_kernel(SDPBackend.MATH):
        _, slope = torch.func.jvp(lambda x, t: row(model, x, t), (x, t), (w, torch.ones_like(t)))
    return slope.detach()


def gradients(model: nn.Module, y: Tensor) -> dict[str, Tensor | None]:
    """Of every parameter, of one number made of y."""
    model.zero_grad()
    y.square().mean().backward()
    return {name: p.grad if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", TINY)
def test_the_tangent_is_the_derivative_and_the_pass_stays_as_it_was(name: str) -> None:
    row = TINY[name]
    model, x, w = row.model(), row.x(), row.x(seed=5)
    plain = row(model, x, T)
    slope, truth = exact(row, x, T, w), gradients(model, plain)
    assert plain.shape == row.shape
    for way in (ride, tape):
        y = way(lambda x, t: row(model, x, t), x, T, w)
        assert torch.equal(y.p, plain)
        assert float((y.t.double() - slope).norm() / slope.norm()) <= 1e-6
        found = gradients(model, y.p)
        for of, g in truth.items():
            assert (g is None) == (found[of] is None), of
            assert g is None or torch.equal(found[of], g), of
