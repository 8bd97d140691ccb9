"""Dropout in a training step: its masks are keyed, reach the net, and are the same in every pass of the step."""

import torch

from dumo.flow.guide import Guide
from dumo.flow.path import Linear
from dumo.flow.slope import DualSlope, JvpSlope
from dumo.nets import UNet
from dumo.objectives import DuMo
from dumo.training.spec import Train
from dumo.training.state import begin
from dumo.training.step import Record, Task, train_step

SMALL = {"width": 8, "multipliers": (1, 2), "attend": (4,), "depth": 1}


def step(dropout: float, rows: int | None = None, exact: bool = False) -> tuple[Record, torch.Tensor]:
    """One step of a small U-Net, and its gradient."""
    objective = DuMo(slope=JvpSlope() if exact else DualSlope(), guide=Guide(zeta=0.5), drop=0.25)
    torch.manual_seed(0)
    net = UNet(**SMALL, dropout=dropout).build(objective.needs, (3, 8, 8), 3)
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    spec = Train(steps=1, batch=8, seed=1, micro_batch=rows)
    state = begin(net, spec)
    x, c = torch.randn(8, 3, 8, 8), torch.arange(8) % 3
    done = train_step(state, Task(objective, Linear(), 3), (x, c), spec)
    return done, torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def test_dropout_changes_the_step_and_draws_nothing() -> None:
    (plain, _), (one, first), (again, second) = step(0.0), step(0.3), step(0.3)
    assert one.loss != plain.loss
    assert one.loss == again.loss
    assert torch.equal(first, second)


def test_pieces_of_a_batch_meet_the_masks_of_the_whole() -> None:
    (whole, one), (pieces, other) = step(0.3), step(0.3, rows=2)
    assert abs(whole.loss - pieces.loss) < 1e-5 * whole.loss
    assert (one - other).norm() < 1e-5 * one.norm()


def test_the_derivative_is_of_the_pass_that_it_rides_on() -> None:
    """A pass of its own, as `JvpSlope` makes, meets the same masks."""
    (ride, one), (own, other) = step(0.3), step(0.3, exact=True)
    assert abs(ride.loss - own.loss) < 1e-4 * ride.loss
    assert (one - other).norm() < 1e-4 * one.norm()
