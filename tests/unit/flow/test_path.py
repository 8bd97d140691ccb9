"""The linear path: its ends, its slope, its precision."""

import pytest
import torch

from dumo.flow.path import Linear

G = torch.Generator().manual_seed(0)
X, Z = torch.randn(2, 6, 2, 3, generator=G, dtype=torch.float64)
T = torch.linspace(0, 1, 6, dtype=torch.float64)


def test_by_hand() -> None:
    """Data at zero and noise at one to the bit."""
    x_t, v_t = Linear().at(X, Z, T)
    for i in range(6):
        assert torch.allclose(x_t[i], i / 5 * Z[i] + (1 - i / 5) * X[i], rtol=0, atol=1e-15)
    assert torch.equal(v_t, Z - X)
    assert torch.equal(x_t[0], X[0])
    assert torch.equal(x_t[-1], Z[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_points_have_the_precision_of_the_data(dtype: torch.dtype) -> None:
    x_t, v_t = Linear().at(X.to(dtype), Z.to(dtype), T.float())
    assert (x_t.dtype, v_t.dtype) == (dtype, dtype)
