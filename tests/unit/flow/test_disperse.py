"""Laws of the dispersive loss, and what a net shows of its inside."""

from math import log

import pytest
import torch
from torch import Tensor

from contract.case import kind, nets, randomise
from dumo.config.load import load
from dumo.flow.disperse import Disperse
from dumo.flow.draw import draw
from dumo.flow.path import Linear
from dumo.flow.slope import CentralSlope, DualSlope
from dumo.nets import DiT, Net
from dumo.objectives import Several
from dumo.objectives.part import EndpointPart, VelocityPart
from dumo.training.cut import together
from dumo.types import Frozen, UserError

FOUR = Disperse(group=4, tau=0.3, weight=0.2, after=0.5)
H = torch.randn(8, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TRAIN = load("digits").train
PARTS = (VelocityPart(), EndpointPart())
TWO = Several(parts=PARTS, disperse=FOUR, slope=DualSlope(), drop=0.2)
SHAPE = (2, 4, 4)


def test_by_hand() -> None:
    for first in (0, 4):
        rows = H[first : first + 4]
        d = torch.stack([(a - b).square().mean() for a in rows for b in rows])
        assert torch.allclose(FOUR(H)[first : first + 4], (-d / 0.3).exp().mean().log(), rtol=1e-12)


def test_it_is_0_where_all_are_one_and_falls_to_the_log_of_their_number() -> None:
    assert FOUR(H[:1].expand(8, -1, -1)).abs().max() < 1e-12
    found = [FOUR(scale * H).mean().item() for scale in (0.1, 1, 10, 1e3)]
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(-log(4), abs=1e-12)


def test_rows_that_lie_on_one_another_have_a_gradient() -> None:
    h = H[:1].repeat(4, 1, 1).requires_grad_()
    (slope,) = torch.autograd.grad(FOUR(h).sum(), [h])
    assert slope.isfinite().all()


def test_groups_are_those_of_the_global_batch() -> None:
    assert torch.equal(FOUR(H), torch.cat([FOUR(H[:4]), FOUR(H[4:])]))
    assert together(TRAIN, TWO) == 4
    with pytest.raises(ValueError, match="6 rows are no whole groups of 4"):
        FOUR(H[:6])


@pytest.mark.parametrize("slope", [DualSlope(), CentralSlope()], ids=kind)
def test_it_is_added_to_the_loss_without_a_pass(slope: DualSlope | CentralSlope) -> None:
    plain, spread = (Several(parts=PARTS, disperse=some, slope=slope, drop=0.2) for some in (None, FOUR))
    net = randomise(DiT(width=16, depth=2, attention=2, patch=2).build(spread.needs, SHAPE, 3)).eval()
    seen: list[int] = []
    net.register_forward_hook(lambda *_: seen.append(1))
    x, c = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
    b = draw(spread, Linear(), x, c, torch.full_like(c, 3), seed=0, step=0)
    one, passes = plain.loss(net, Frozen(net), b), len(seen)
    other = spread.loss(net, Frozen(net), b)
    assert len(seen) == 2 * passes
    inside: Tensor = net(b.x_t, b.c, t=b.t)[-1]
    assert torch.allclose(other.notes["dispersion"], FOUR(inside), atol=1e-6)
    assert torch.allclose(other.loss, one.loss + 0.2 * other.notes["dispersion"], atol=1e-6)


@pytest.mark.parametrize("net", nets(), ids=kind)
def test_a_net_shows_its_inside_or_says_that_it_cannot(net: Net) -> None:
    """What is behind the asked block moves the heads and not what is shown."""
    if net.kind == "unet":
        with pytest.raises(UserError, match=r"objective\.disperse=null"):
            net.build(TWO.needs, SHAPE, 3)
        return
    built = randomise(net.build(TWO.needs, SHAPE, 3)).eval()
    x, c, t = torch.ones(2, *SHAPE), torch.zeros(2, dtype=torch.long), torch.full((2,), 0.3)
    before = built(x, c, t=t)
    assert len(before) == 3
    blocks = getattr(built, "blocks", None) or built.layers
    for p in blocks[1].parameters():
        p.data += 1
    after = built(x, c, t=t)
    assert torch.equal(before[2], after[2])
    assert not torch.allclose(before[0], after[0])
    for p in blocks[0].parameters():
        p.data += 1
    assert not torch.allclose(after[2], built(x, c, t=t)[2])
