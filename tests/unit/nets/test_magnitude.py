"""Magnitude preservation: mean squares that stay 1, and rows that have no length."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dumo.flow.path import Linear
from dumo.nets.block import BlockSizes, Modulation
from dumo.nets.dit import DiT
from dumo.nets.magnitude import MagnitudePreservingBlock, UnitRowLinear, blend
from dumo.objectives import DuMo
from dumo.testing.network import randomise
from dumo.training.optim import AdamW
from dumo.training.settings import Train
from dumo.training.state import begin
from dumo.types import Needs
from trained import ToyTrainer
from unit.training.toy import flow_of

KEPT: dict[str, Any] = {"magnitude": "preserved"}
TINY = DiT(patch=2, width=8, depth=3, attention=2, **KEPT)
D = torch.float64


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """From N(0, 1)."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def size(x: Tensor) -> float:
    """The root of the mean square."""
    return x.square().mean().sqrt().item()


def test_a_unit_keeps_the_mean_square_whatever_its_weights() -> None:
    layer = randomise(UnitRowLinear(64, 256)).double()
    x = drawn(4000, 64)
    y = layer(x)
    assert size(y) == pytest.approx(1, abs=0.02)
    layer.get_parameter("weight").data *= 1 + torch.arange(256)[:, None]
    assert torch.allclose(layer(x), y, rtol=1e-12)


def test_its_gradient_is_orthogonal_to_its_rows() -> None:
    layer = randomise(UnitRowLinear(8, 5)).double()
    (layer(drawn(20, 8)) * drawn(20, 5, seed=1)).sum().backward()
    weight = layer.get_parameter("weight")
    assert weight.grad is not None
    assert weight.grad.norm() > 1
    assert (weight * weight.grad).sum(1).abs().max() < 1e-12


def test_a_sum_is_that_of_edm2() -> None:
    """lerp(h, a, 0.3) / sqrt(0.7^2 + 0.3^2): its Eq. 88, of a gate 3/7."""
    h, a = drawn(2, 9)
    known = torch.lerp(h, a, 0.3) / (0.7**2 + 0.3**2) ** 0.5
    assert torch.allclose(blend(h, a, torch.tensor(3 / 7, dtype=D)), known, rtol=1e-12)


@pytest.mark.parametrize("modern", [False, True])
def test_a_layer_keeps_the_mean_square(modern: bool) -> None:
    """Tokens of mean square 1 at every modulation, then a perceptron of mean square 1."""
    block = MagnitudePreservingBlock(BlockSizes(96, 2, modern))
    randomise(block).double()
    m = Modulation(*(5 * drawn(40, 1, 96, seed=i) for i in range(3)))
    shown = block.layer_input(drawn(40, 16, 96), m)
    assert torch.allclose(shown.square().mean(-1), torch.ones(40, 16, dtype=D), atol=1e-5)
    assert size(block.apply_perceptron(shown)) == pytest.approx(1, abs=0.05)


def test_tokens_keep_their_mean_square_through_blocks() -> None:
    """Of twelve blocks with open gates; without, tokens grow tenfold."""
    sizes = [spread(**options) for options in ({}, KEPT)]
    assert sizes[0] > 10
    assert 0.5 < sizes[1] < 1.2


def spread(**options: Any) -> float:  # noqa: ANN401
    """The root of the mean square of the tokens behind the last block."""
    net = DiT(patch=1, width=32, depth=12, attention=2, **options).build(Needs(), (2, 6, 6), 0)
    seen: list[float] = []
    randomise(net).double()
    for block in net.blocks:
        block.get_parameter("modulation.bias").data += 1.5
    net.blocks[-1].register_forward_hook(lambda _, __, out: seen.append(size(out)))
    net(drawn(8, 2, 6, 6), torch.zeros(8, dtype=torch.long), t=torch.rand(8, generator=torch.Generator(), dtype=D))
    return seen[0]


def test_rows_have_length_1_after_a_step() -> None:
    net = TINY.build(DuMo().needs, (1, 4, 4), 3)
    spec = Train(steps=2, batch=4, optimizer=AdamW(lr=0.1))
    state, start = begin(net, spec), [layer.weight.clone() for layer in units(net)]
    assert len(start) == 3 * 4
    for _ in range(2):  # the gates are closed in the first
        batch = [torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(4) % 3]
        ToyTrainer(state, flow_of(state, spec, DuMo(), Linear(), 3), spec).step(batch)
    for before, layer in zip(start, units(net), strict=True):
        assert torch.allclose(layer.weight.norm(dim=1), torch.ones(len(before)), atol=1e-6)
    assert any(not torch.equal(before, layer.weight) for before, layer in zip(start, units(net), strict=True))


def units(net: torch.nn.Module) -> list[UnitRowLinear]:
    """All layers of a net whose rows have no length."""
    return [layer for layer in net.modules() if isinstance(layer, UnitRowLinear)]
