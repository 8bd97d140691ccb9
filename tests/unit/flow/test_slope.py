"""What slopes refuse, and how many passes they make. Their mathematics is in tests/theory."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from dumo.flow.slope import CentralSlope, DualSlope, JvpSlope
from dumo.types import Frozen, Heads, UserError


class Noting(nn.Module):
    """A net that notes what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, x: Tensor, c: Tensor, /, *, t: Tensor, r: Tensor) -> Heads:
        self.asked.append((x, t, r))
        return (x * t[:, None],)


X, C = torch.ones(2, 3), torch.zeros(2, dtype=torch.long)
T, R, W = torch.tensor([0.5, 1.0]), torch.tensor([0.1, 0.2]), torch.full((2, 3), 2.0)


def test_jvp_makes_one_pass_later() -> None:
    net = Noting()
    _, along = JvpSlope()(net, Frozen(net), X, C, t=T, r=R)
    assert len(net.asked) == 1
    (slope,) = along(W)
    assert len(net.asked) == 2
    assert torch.allclose(slope, W * T[:, None] + X)


@pytest.mark.parametrize("slope", [CentralSlope(), JvpSlope()])
def test_a_derivative_can_be_asked_for_twice(slope: CentralSlope | JvpSlope) -> None:
    _, along = slope(Noting(), Frozen(Noting()), X, C, t=T, r=R)
    assert torch.equal(along(W)[0], along(W)[0])


REFUSED = [*((0.005, p, 1.0) for p in ("bf16", "fp16")), (0.005, "fp32", 10.1), (0.005, "fp32", 1000.0)]


@pytest.mark.parametrize(("h", "precision", "scale"), [*REFUSED, (0.06, "fp32", 1.0), (0.1, "fp32", 0.6)])
def test_central_refuses_what_rounding_or_its_step_would_outweigh(h: float, precision: str, scale: float) -> None:
    """With the way out."""
    with pytest.raises(
        UserError, match=r"time_scale.*dual" if precision == "fp32" else rf"fp32, not {precision}.*dual"
    ):
        CentralSlope(h=h).check(precision, scale)
    JvpSlope().check(precision, scale)


@pytest.mark.parametrize("scale", [1.0, 3.0, 7.0, 12.0, 70.0, 1000.0])
def test_the_step_that_a_refusal_names_is_served(scale: float) -> None:
    """The way out must be one."""
    with pytest.raises(UserError) as refused:
        CentralSlope(h=0.1).check("fp32", scale)
    named = str(refused.value).split("h <= ")[1].split(",")[0]
    CentralSlope(h=float(named)).check("fp32", scale)


@pytest.mark.parametrize("name", ["gradient_checkpointing", "grad_checkpointing", "wrapper"])
def test_where_activations_are_let_go_the_dual_pass_is_its_own(name: str) -> None:
    net = nn.Sequential(nn.Linear(3, 3))
    assert DualSlope().strategy(net, Frozen(net), known=False).name == "deferred"
    if name == "wrapper":
        net[0] = checkpoint_wrapper(net[0])
    else:
        setattr(net[0], name, True)
    assert DualSlope().strategy(net, Frozen(net), known=False).name == "separate"
