"""Transformers of diffusers as they are, tiny and random: a Dual runs through them, its tangent the derivative."""

import pytest
import torch
from torch import Tensor, nn

from dumo.types import Array
from transformers_tiny import TINY
from unit.autodiff.test_rule import known, ride, tape

pytestmark = pytest.mark.slow  # diffusers takes seconds to import

T = torch.tensor([0.3125, 0.875])  # exact in fp32, as are 1 - t and 1000 t: rounded they would be other times


def gradients(model: nn.Module, y: Tensor) -> dict[str, Tensor | None]:
    """Of every parameter, of one number made of y."""
    model.zero_grad()
    y.square().mean().backward()
    return {name: p.grad if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", TINY)
def test_the_tangent_is_the_derivative_and_the_pass_stays_as_it_was(name: str) -> None:
    row = TINY[name]
    moves = float(row.kind != "UNet2DConditionModel")  # a U-Net asks whether its time is a Tensor: dumo embeds it first
    at, along = {"x": row.x(), "t": T}, {"x": row.x(seed=5), "t": torch.full_like(T, moves)}
    model, exact = row.model(), row.model(torch.float64)
    in_float64 = ({key: y.double() for key, y in some.items()} for some in (at, along))
    slope = known(lambda x, t: (row(exact, x, t),), *in_float64)[0].detach()

    def passed(x: Array, t: Array) -> tuple[Array]:
        return (row(model, x, t),)

    bound = 1e-6 if moves else 5e-6  # fp32 knows the sines of 875 rad no better
    (plain,) = passed(**at)
    truth = gradients(model, plain)
    assert plain.shape == row.shape
    for way in (ride, tape):
        (y,) = way(passed, at, along)
        assert torch.equal(y.p, plain)
        assert float((y.t.double() - slope).norm() / slope.norm()) <= bound
        found = gradients(model, y.p)
        for of, g in truth.items():
            assert (g is None) == (found[of] is None), of
            assert g is None or torch.equal(found[of], g), of
