"""d/dt along a direction: by formula on a net whose derivative is known, and to the order that each slope claims."""

import pytest
import torch
from torch import Tensor, nn

from contract.case import members
from dumo.flow.slope import CentralSlope, DualSlope, JvpSlope, Slope
from dumo.testing.exact import D, column
from dumo.types import Frozen, Heads
from theory.exact import falls


class Wave(nn.Module):
    """Heads sin(a x + b t + r) and x^2 exp(t r), where every input counts."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([1.5, 2.0], dtype=D))
        self.passes = 0

    def forward(self, x: Tensor, c: Tensor, /, *, t: Tensor, r: Tensor) -> Heads:
        self.passes += 1
        t, r = column(t), column(r)
        return (self.a[0] * x + self.a[1] * t + r + column(c)).sin(), x**2 * (t * r).exp()

    def slopes(self, x: Tensor, c: Tensor, t: Tensor, r: Tensor, w: Tensor) -> Heads:
        t, r, a = column(t), column(r), self.a.detach()
        wave = (a[0] * x + a[1] * t + r + column(c)).cos() * (a[0] * w + a[1])
        return wave, (2 * x * w + r * x**2) * (t * r).exp()


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(4)
    x, w = torch.randn(2, 32, 3, generator=g, dtype=D)
    r, t = torch.rand(2, 32, generator=g, dtype=D).sort(0).values
    return x, torch.arange(32) % 3, t, r, w


def error(slope: Slope) -> Tensor:
    """The largest error of each head."""
    net, (x, c, t, r, w) = Wave(), inputs()
    _, along = slope(net, Frozen(net), x, c, t=t, r=r)
    found, known = along(w), net.slopes(x, c, t, r, w)
    return torch.stack([(a - b).abs().max() for a, b in zip(found, known, strict=True)])


@pytest.mark.parametrize("slope", [JvpSlope(), DualSlope()], ids=lambda s: s.kind)
def test_exact_slopes_are_exact(slope: Slope) -> None:
    assert error(slope).max() < 1e-13


@pytest.mark.parametrize("slope", [cls() for cls in members(Slope)], ids=lambda s: s.kind)
@pytest.mark.parametrize("known", [False, True], ids=["found", "known"])
@pytest.mark.parametrize("own", [False, True], ids=["same weights", "average"])
def test_rows_that_do_not_move_get_zeros(slope: Slope, known: bool, own: bool) -> None:
    """Whatever the way, the others get the derivative that they get when all move; no row's value changes."""
    net, (x, c, t, r, w) = Wave(), inputs()
    ref = Frozen(Wave() if own else net)
    direction = {"direction": w} if known else {}
    wanted = slope(net, ref, x, c, t=t, r=r)[1](w)
    for share in (0, 1, 3, 4):  # of four rows
        moving = tuple(i % 4 < share for i in range(len(x)))
        heads, along = slope(net, ref, x, c, t=t, r=r, moving=moving, **direction)
        moved = torch.tensor(moving)[:, None]
        for found, known_slope, head, value in zip(along(w), wanted, heads, net(x, c, t=t, r=r), strict=True):
            assert torch.equal(head, value)
            assert not found[~moved[:, 0]].any()
            assert (found - known_slope.where(moved, 0)).abs().max() < 1e-12


def test_a_ride_goes_where_it_was_told_and_a_tape_plays_once() -> None:
    net, (x, c, t, r, w) = Wave(), inputs()
    _, along = DualSlope()(net, Frozen(net), x, c, t=t, r=r, direction=w)
    with pytest.raises(ValueError, match="direction"):
        along(2 * w)
    _, along = DualSlope()(net, Frozen(net), x, c, t=t, r=r)
    along(w)
    with pytest.raises(RuntimeError, match="once"):
        along(w)


def test_way_of_a_dual() -> None:
    net, way = Wave(), DualSlope().strategy
    assert way(net, Frozen(net), known=False).name == "deferred"
    assert way(net, Frozen(net), known=True).name == "fused"
    assert way(net, Frozen(net), known=True, moving=(True, False)).name == "fused"
    assert way(net, Frozen(net), known=False, moving=(True, False)).name == "separate"  # a tape is of all rows
    assert way(net, Frozen(Wave()), known=True).name == "separate"
    assert way(torch.nn.DataParallel(net), Frozen(net), known=False).name == "deferred"  # seen through a wrapper
    net.gradient_checkpointing = True  # type: ignore[assignment]
    assert way(net, Frozen(net), known=False).name == "separate"
    assert way(net, Frozen(net), known=True).name == "fused"


def test_central_is_of_second_order() -> None:
    assert falls([error(CentralSlope(h=h)) for h in (0.04, 0.02, 0.01, 0.005)], 2, within=0.02)


@pytest.mark.parametrize("slope", [cls() for cls in members(Slope)])
def test_value_is_of_the_net_and_derivative_of_the_reference(slope: Slope) -> None:
    """The moving average may differ from the weights in training: the one is regressed, the other differentiated."""
    net, ref, (x, c, t, r, w) = Wave(), Wave(), inputs()
    ref.a.data *= 0.5
    heads, along = slope(net, Frozen(ref), x, c, t=t, r=r)
    assert torch.equal(heads[0], net(x, c, t=t, r=r)[0])
    assert heads[0].requires_grad
    found = along(w.requires_grad_())
    assert not any(d.requires_grad for d in found)
    assert (found[0] - ref.slopes(x, c, t, r, w)[0]).abs().max() < 1e-3
    assert (found[0] - net.slopes(x, c, t, r, w)[0]).abs().max() > 0.1


@pytest.mark.parametrize("slope", [cls() for cls in members(Slope)])
def test_the_derivative_is_affine_in_the_direction(slope: Slope) -> None:
    """So the mean of targets over v_t is the target at its mean; to the square of the step for differences."""
    net, (x, c, t, r, w) = Wave(), inputs()

    def along(w: Tensor) -> Heads:
        return slope(net, Frozen(net), x, c, t=t, r=r)[1](w)

    for middle, one, other in zip(along(0 * w), along(w), along(-w), strict=True):
        assert ((one + other) / 2 - middle).abs().max() < (1e-2 if isinstance(slope, CentralSlope) else 1e-13)


def test_central_leaves_the_unit_interval_rather_than_be_one_sided() -> None:
    """At t = 1, where one-step sampling runs, a clamped difference would be of first order."""
    net, (x, c, _, r, w) = Wave(), inputs()
    one = torch.ones_like(r)
    errors = []
    for h in (0.02, 0.01):
        _, along = CentralSlope(h=h)(net, Frozen(net), x, c, t=one, r=r)
        errors.append((along(w)[0] - net.slopes(x, c, one, r, w)[0]).abs().max())
    assert abs((errors[0] / errors[1]).log2() - 2) < 0.05
