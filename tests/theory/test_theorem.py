"""Theorem 1 of the paper: what consistency training has of flow matching, as gradients and as values.

Its Eq. 10, with F = F_theta(x_t, t) and F_s = F_theta-(x_s, s) at s = lam t, held still, is

    L(lam) = E |F - v_t|^2 + lam / (1 - lam) E |F - F_s|^2.

Of UCGM's loss at the ratio lam, without its weights and bound, the mean of |e|^2 with e = F - v_t + lam / (1 - lam)
(F - F_s) held still, it has the gradient, 2 e dF, for every lam: that is the decomposition. It has not its value. With
F smooth, F - F_s = (1 - lam) t dF/dt + O((1 - lam)^2), the total derivative along v_t, and so

- as lam -> 0 both terms tend to flow matching's, values and gradients;
- as lam -> 1 the gradient tends to that of consistency, e = F - v_t + t dF/dt, and so does UCGM's own value; but the
  value of Eq. 10 tends to flow matching's: its second term is lam (1 - lam) E |t dF/dt|^2. What "approximates
  consistency models" is the gradient, and only while theta- is held still: through F and F_s it is flow matching's.
"""

import pytest
import torch
from torch import Tensor

from dumo.flow.residual import descent_error
from dumo.flow.slope import JvpSlope
from dumo.objectives import UCGM, FlowMatching
from dumo.testing.exact import column
from dumo.types import Frozen, mean_square
from theory.exact import falls
from theory.formula import Polynomial, gradients, rows

NEAR = (0.04, 0.02, 0.01, 0.005)  # of 0 or 1


NET, B = Polynomial(1), rows(UCGM())


def ucgm(ratio: float) -> Tensor:
    """Its loss without its weights and its bound, row by row."""
    u, e = UCGM(ratio=ratio, slope=JvpSlope()).residual(NET, B)
    return mean_square(descent_error(u, e))


def matching() -> Tensor:
    """Flow matching's, row by row."""
    return FlowMatching().loss(NET, Frozen(NET), B).loss


def surrogate(lam: float, *, still: bool = True) -> Tensor:
    """Eq. 10, row by row; `still` or with gradients through F_theta- too."""
    (now,) = NET(B.x_t, B.c, t=B.t)
    s = lam * B.t
    (then,) = NET(column(s) * B.z + column(1 - s) * B.x, B.c, t=s)
    return mean_square(now - B.v_t) + lam / (1 - lam) * mean_square(now - (then.detach() if still else then))


def slopes(loss: Tensor) -> Tensor:
    """The gradient of the mean, as one vector."""
    return torch.cat([g.flatten() for g in gradients(loss, NET)])


@pytest.mark.parametrize("lam", [0.01, 0.3, 0.5, 0.9, 0.99])
def test_the_gradient_decomposes_at_every_ratio(lam: float) -> None:
    one, two = ucgm(lam), surrogate(lam)
    assert torch.allclose(slopes(one), slopes(two), rtol=1e-9, atol=1e-12)
    assert (one.mean() / two.mean() - 1).abs() > 1e-3  # not the value


def test_towards_0_both_are_flow_matching() -> None:
    value, slope = matching().mean(), slopes(matching())
    for of in (ucgm, surrogate):
        assert falls([(of(lam).mean() - value).abs() for lam in NEAR], 1)
        assert falls([(slopes(of(lam)) - slope).norm() for lam in NEAR], 1)


def test_towards_1_the_gradient_is_that_of_consistency_and_so_is_the_value_of_ucgm() -> None:
    limit, value = slopes(ucgm(1.0)), ucgm(1.0).mean()
    assert falls([(slopes(surrogate(1 - d)) - limit).norm() for d in NEAR], 1)
    assert (limit - slopes(matching())).norm() > 0.1 * limit.norm()
    assert falls([(ucgm(1 - d).mean() - value).abs() for d in NEAR], 1)


def test_towards_1_the_value_of_the_surrogate_is_that_of_flow_matching() -> None:
    """It falls off as (1 - lam) E |t dF/dt|^2."""
    plain, consistency = matching().mean(), ucgm(1.0).mean()
    assert (consistency / plain - 1).abs() > 0.1
    over = [surrogate(1 - d).mean() - plain for d in NEAR]
    assert falls(over, 1)
    change = column(B.t) * NET.slope(0, B.x_t, B.t, 0 * B.t, B.v_t)
    assert torch.allclose(over[-1] / NEAR[-1], mean_square(change).mean(), rtol=0.05)


def test_towards_1_the_gradient_through_both_is_that_of_flow_matching() -> None:
    """Consistency is in what is held still."""
    assert falls([(slopes(surrogate(1 - d, still=False)) - slopes(matching())).norm() for d in NEAR], 1)
