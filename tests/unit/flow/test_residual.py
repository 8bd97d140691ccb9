"""The adaptive metric against its formula, value and gradient; what is watched has no gradient."""

import pytest
import torch

from dumo.flow.residual import adaptive_l2, clipped_share, head_gap


@pytest.mark.parametrize(("p", "c"), [(0.0, 0.01), (0.5, 0.1), (1.0, 0.01), (1.5, 1.0)])
def test_value_and_gradient(p: float, c: float) -> None:
    """S / (S + c)^p; the weight is held still, so the gradient is 2 e / (S + c)^p."""
    e = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    loss = adaptive_l2(e, p, c)
    (grad,) = torch.autograd.grad(loss.sum(), e)
    for i in range(5):
        total = sum(float(a) ** 2 for a in e[i].detach().flatten())
        assert loss[i].item() == pytest.approx(total / (total + c) ** p, rel=1e-12)
        assert torch.allclose(grad[i], 2 * e[i] / (total + c) ** p, rtol=1e-12, atol=0)


def test_a_residual_of_zero_is_no_corner() -> None:
    e = torch.zeros(2, 3, requires_grad=True)
    loss = adaptive_l2(e, 1.0, 0.01)
    loss.sum().backward()
    assert not loss.any()
    assert e.grad is not None
    assert not e.grad.any()


def test_what_lies_beyond_a_bound_is_counted_by_row() -> None:
    e = torch.tensor([[[0.5, -1.5], [1.0, 3.0]], [[-0.9, 0.0], [0.9, -1.0]]], requires_grad=True)
    assert clipped_share(e).tolist() == [0.5, 0.0]
    assert clipped_share(e, 0.5).tolist() == [0.75, 0.75]
    assert not clipped_share(e).requires_grad
    assert clipped_share(e.to(torch.bfloat16).repeat(1, 1, 600)).tolist() == [0.5, 0.0]  # as many as bf16 cannot count


def test_heads_are_apart_by_the_difference_of_their_residuals() -> None:
    v, u, slope = (torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(3))
    t, v_star = torch.rand(4, 1, 1), torch.zeros(4, 3, 2)
    found = head_gap(v - v_star, u - (v_star - t * slope))
    assert torch.allclose(found, (v - u - t * slope).square().mean((1, 2)))
    assert not found.requires_grad
