"""A layer that was trained in full is said exactly by a product of full rank."""

import pytest
import torch
from torch import nn

from dumo.export.lora import product


@pytest.mark.parametrize(("wide", "high", "bias"), [(3, 5, True), (5, 3, True), (4, 4, False)])
def test_a_product_is_the_change(wide: int, high: int, bias: bool) -> None:
    torch.manual_seed(0)
    old, new = (nn.Linear(wide, high, bias, dtype=torch.float64) for _ in range(2))
    path, a, b, c = product("layer", old, new)
    assert (path, a.shape, b.shape) == ("layer", (min(wide, high), wide), (high, min(wide, high)))
    x = torch.randn(7, wide, dtype=torch.float64)
    torch.testing.assert_close(old(x) + (x @ a.T) @ b.T + c, new(x), rtol=0, atol=1e-14)
    assert bias or not c.any()
