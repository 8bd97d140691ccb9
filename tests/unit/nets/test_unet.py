"""The U-Net: its size, its plan, its blocks, its condition, its dropout, its slopes."""

from math import prod, sqrt
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dumo.flow import dropout
from dumo.flow.dropout import keys, using
from dumo.flow.slope import CentralSlope, DualSlope, JvpSlope, Slope
from dumo.nets import unet
from dumo.nets.unet import BlockSpec, ResidualBlock, UNet, UNetModule, block_specs
from dumo.testing.network import randomise
from dumo.types import Frozen, Heads, Needs
from unit.nets.given import drawn, points

TINY = UNet(width=8, multipliers=(1, 2), depth=2, attend=(4,))
SHAPE = (3, 4, 4)
V, VU = Needs(heads=("v",)), Needs(heads=("v", "u"))
KEYS = keys(0, 0, 6)


def tiny(needs: Needs = VU, classes: int = 0, **fields: Any) -> UNetModule:  # noqa: ANN401
    """A net of random weights in float64, in training."""
    return drawn(TINY.model_copy(update=fields), needs, SHAPE, classes)


def apart(a: Heads, b: Heads) -> float:
    """Relative distance."""
    return max(((p - q).norm() / q.norm()).item() for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("spec", "needs", "parameters"),
    [
        (UNet(), V, 55_732_739),
        (UNet(augment=9), V, 55_733_891),  # EDM's, with its augmentation
        (UNet(), VU, 55_732_739 + 2 * 256 + (9 * 256 + 1) * 3),
    ],
)
def test_sizes(spec: UNet, needs: Needs, parameters: int) -> None:
    with torch.device("meta"):
        net = spec.build(needs, (3, 32, 32), 0)
    assert sum(p.numel() for p in net.parameters()) == parameters


def test_what_was_kept_last_joins_first() -> None:
    """The net of two resolutions, two blocks each on the way down, written out."""
    net = tiny(V)
    x, c, t = points(6, SHAPE, 0)
    e, a = F.silu(net.scalars(t=t)), net.embed(x)

    def block(i: int, *h: Tensor) -> Tensor:
        return net.blocks[i](torch.cat(h, 1), e)

    b = block(0, a)
    d = block(1, b)
    half = block(2, d)
    f = block(3, half)
    g = block(4, f)
    h = block(6, block(5, g))
    h = block(9, block(8, block(7, h, g), f), half)
    h = block(13, block(12, block(11, block(10, h), d), b), a)
    assert torch.equal(net.heads["v"](h), net(x, c, t=t)[0])


def test_edms_plan() -> None:
    """Tab. 7: 4 blocks on the way down, 5 on the way up; attention at 16 and in the middle."""
    specs = [*block_specs(UNet(), 32)]
    assert [spec.path for spec in specs].count("down") == 3 * 4 + 2
    assert [spec.path for spec in specs].count("middle") == 2
    assert [spec.takes_skip for spec in specs].count(True) == 3 * 5
    assert [i for i, spec in enumerate(specs) if spec.attends] == [5, 6, 7, 8, 14, 26]
    assert {spec.out_channels for spec in specs[1:]} == {256}


def norm(h: Tensor, groups: int) -> Tensor:
    """Group norm without weights."""
    g = h.unflatten(1, (groups, -1))
    mean, var = g.mean((2, 3, 4), keepdim=True), g.var((2, 3, 4), correction=0, keepdim=True)
    return ((g - mean) / (var + 1e-6).sqrt()).flatten(1, 2)


@pytest.mark.parametrize("resample", ["half", "same", "double"])
def test_block_by_hand(resample: Any) -> None:  # noqa: ANN401
    block = ResidualBlock(BlockSpec(8, 12, "middle", resample=resample), 5, 0.5).double()
    randomise(block)
    g = torch.Generator().manual_seed(0)
    h, e = torch.randn(2, 8, 4, 4, generator=g).double(), torch.randn(2, 5, generator=g).double()
    for layer in (block.norm_1, block.norm_2):
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)

    def other(h: Tensor) -> Tensor:
        if resample == "half":
            return (h[..., ::2, ::2] + h[..., 1::2, ::2] + h[..., ::2, 1::2] + h[..., 1::2, 1::2]) / 4
        return h.repeat_interleave(2, 2).repeat_interleave(2, 3) if resample == "double" else h

    a = block.conv_1(other(F.silu(norm(h, 2)))) + (e @ block.shift.weight.T + block.shift.bias)[..., None, None]
    a = block.conv_2(F.silu(norm(a, 1)))
    skip = torch.einsum("bchw,oc->bohw", other(h), block.skip.weight[..., 0, 0]) + block.skip.bias[:, None, None]
    assert torch.allclose(block(h, e), (skip + a) * sqrt(0.5), rtol=1e-12, atol=1e-12)


def test_attention_by_hand() -> None:
    """Every place sees every place; the sum is scaled once more."""
    plain, block = (ResidualBlock(BlockSpec(8, 8, "middle", at), 5).double() for at in (False, True))
    randomise(block)
    plain.load_state_dict(block.state_dict(), strict=False)
    g = torch.Generator().manual_seed(0)
    h, e = torch.randn(2, 8, 3, 3, generator=g).double(), torch.randn(2, 5, generator=g).double()
    before = plain(h, e)
    q, k, v = block.qkv(block.norm_3(before)).chunk(3, 1)
    weight = (torch.einsum("bchw,bcij->bhwij", q, k) / sqrt(8)).flatten(3).softmax(-1)
    mixed = torch.einsum("bhwn,bcn->bchw", weight, v.flatten(2))
    assert torch.allclose(block(h, e), (before + block.out(mixed)) * sqrt(0.5), rtol=1e-12, atol=1e-12)


def test_blocks_start_as_their_skips() -> None:
    net = TINY.build(V, SHAPE, 0)
    h, e = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0)), torch.ones(2, 32)
    first = net.blocks[0]
    assert isinstance(first, ResidualBlock)
    assert first.attends
    assert torch.allclose(first(h, e), h / 2, rtol=1e-6)
    for layer, gain in ((first.conv_1, 1), (first.qkv, sqrt(0.2))):  # Xavier's, with EDM's gain
        out_channels, in_channels, *kernel = layer.weight.shape
        sd = gain * sqrt(2 / ((out_channels + in_channels) * prod(kernel)))
        assert layer.weight.std().item() == pytest.approx(sd, rel=0.2)


def test_augmentation_is_a_condition() -> None:
    """No augmentation is zeros, or no numbers at all."""
    net = tiny(augment=9)
    x, c, t = points(6, SHAPE, 0)
    how = torch.zeros(6, 9)
    plain = net(x, c, t=t)
    assert all(torch.equal(a, b) for a, b in zip(net(x, how, t=t), plain, strict=True))
    how[2, 4] = 1
    other = net(x, how, t=t)
    assert torch.equal(other[0][[0, 1, 3, 4, 5]], plain[0][[0, 1, 3, 4, 5]])
    assert not torch.allclose(other[0][2], plain[0][2], atol=1e-3)


def test_dropout_is_for_training_under_masks() -> None:
    """Which the passes of a step share, also of some of the rows; the next step has others."""
    net, state = tiny(dropout=0.4), torch.get_rng_state()
    x, c, t = points(6, SHAPE, 0)
    plain, some = net.eval()(x, c, t=t)[0], [4, 1]
    net.train()
    with using(KEYS):
        dropped, again = net(x, c, t=t)[0], net(x, c, t=t)[0]
        with dropout.rows(some):
            part = net(x[some], c[some], t=t[some])[0]
        with dropout.off():
            null = net(x, c, t=t)[0]
        still = net.eval()(x, c, t=t)[0]
    with using(keys(0, 1, 6)):
        later = net.train()(x, c, t=t)[0]
    assert torch.equal(dropped, again)
    assert torch.allclose(part, dropped[some], rtol=1e-10, atol=1e-12)
    assert not any(torch.allclose(dropped, other, atol=1e-3) for other in (plain, later))
    assert torch.equal(null, plain)
    assert torch.equal(still, plain)
    assert torch.equal(state, torch.get_rng_state())


def test_layers_have_masks_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def drop(h: Tensor, rows: Tensor, p: float) -> Tensor:
        seen.append(rows)
        assert p == 0.4
        return dropout.drop(h, rows, p)

    monkeypatch.setattr(unet, "drop", drop)
    x, c, t = points(6, SHAPE, 0)
    with using(KEYS):
        tiny(dropout=0.4)(x, c, t=t)
    assert len({tuple(rows.flatten().tolist()) for rows in seen}) == len(seen) == 14


@pytest.mark.slow
def test_slopes_meet_the_mask_of_the_primal() -> None:
    """Riding, from the tape or by a pass of its own."""
    net = tiny(dropout=0.4)
    x, c, t = points(6, SHAPE, 0)
    w = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()

    def slope(s: Slope, direction: Tensor | None = None) -> Heads:
        return s(net, Frozen(net), x, c, t=t, direction=direction)[1](w)

    with using(KEYS):
        exact = slope(JvpSlope())
        assert apart(slope(DualSlope()), exact) < 1e-12
        assert apart(slope(DualSlope(), w), exact) < 1e-12
        assert apart(slope(CentralSlope(h=1e-3)), exact) < 1e-3
    with using(None):
        assert apart(slope(DualSlope()), exact) > 1e-2
