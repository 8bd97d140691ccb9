"""Inductive moment matching against its formulas, written out pair by pair; and where it rests, on average."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dumo.flow.times import Below, Groups, Uniform
from dumo.objectives import IMM
from dumo.testing.exact import APART, D, ExactNet, Gaussian, column, exact_batch, table
from dumo.types import Frozen, NoisyBatch
from theory.formula import Polynomial, agree, changed

ONE = Gaussian(table([0.5, 0.5])[0], table([0.3, 0.3])[0])  # one class


def rows(objective: IMM, n: int = 24) -> NoisyBatch:
    return replace(exact_batch(objective, APART, n), teacher=None)


@pytest.mark.parametrize(
    ("size", "constants"), [(4, {}), (3, {"gap": 160 / 2**15, "weight_power": 1.0, "weight_bias": 5.0})]
)
def test_formula(size: int, constants: dict[str, float]) -> None:
    o = changed(IMM, **constants)(times=changed(Groups, size=size)())
    net, b = Polynomial(1), rows(o)
    q = torch.maximum(b.r, torch.minimum(b.t - 1e-4, (eta := (b.t / (1 - b.t) - o.gap).clamp(min=0)) / (1 + eta)))
    x_q = column(q) * b.z + column(1 - q) * b.x
    y = b.x_t - column(b.t - b.r) * net(b.x_t, b.c, t=b.t, r=b.r)[0]
    y_q = (x_q - column(q - b.r) * net(x_q, b.c, t=q, r=b.r)[0]).detach()
    assert (q > b.r).any()

    def kernel(one: Tensor, other: Tensor, i: int, j: int) -> Tensor:
        far = (one[i] - other[j]).norm() if one is not other or i != j else 0 * one[i, 0]
        return torch.exp(-far.clamp(min=1e-8) / ((b.t - b.r)[i] * 2))

    loss, far = [], []
    for first in range(0, len(b.t), size):
        pairs = [(i, j) for i in range(first, first + size) for j in range(first, first + size)]
        every = [kernel(y, y, *pair) + kernel(y_q, y_q, *pair) - 2 * kernel(y, y_q, *pair) for pair in pairs]
        far += [torch.stack(every).mean()] * size
    for t, distance in zip(b.t, far, strict=True):
        snr = torch.log((1 - t) / t) * 2
        weight = torch.sigmoid(o.weight_bias - snr) / (t * (1 - t)) * (1 - t) ** o.weight_power / ((1 - t) ** 2 + t**2)
        loss.append(weight * distance)
    agree(o, net, b, torch.stack(loss), {"u": torch.stack(far)}, close=1e-7, near=1e-9)


def test_weight_is_a_derivative() -> None:
    """-dlambda/dt by differentiation, away from the ends; finite at them."""
    o, t = IMM(), torch.linspace(0.01, 0.99, 50, dtype=D, requires_grad=True)
    snr = 2 * torch.log((1 - t) / t)
    (slope,) = torch.autograd.grad(snr.sum(), t)
    hand = 0.5 * torch.sigmoid(4 - snr) * -slope * (1 - t) ** 2 / ((1 - t) ** 2 + t**2)
    assert torch.allclose(o.weight(t), hand, rtol=1e-12)
    assert torch.equal(o.weight(torch.tensor([0.0, 1.0])), torch.zeros(2))


@pytest.mark.parametrize("o", [IMM(), changed(IMM, gap=160 / 2**15)(), changed(IMM, gap=2.0)()])
def test_q_lies_between(o: IMM) -> None:
    """From r to t, short of t by 1e-4 at least where there is room."""
    t = torch.linspace(0, 1, 101, dtype=D).repeat_interleave(3)
    r = t * torch.tensor([0.0, 0.5, 1.0], dtype=D).repeat(101)
    q = o.earlier_time(t, r)
    assert ((q >= r) & (q <= t)).all()
    assert (q <= torch.maximum(r, t - 1e-4) + 1e-15).all()
    far = (t < 1) & (q > r) & (q < t - 1.1e-4)
    assert far.any()
    assert torch.allclose((t / (1 - t) - q / (1 - q))[far], torch.tensor(o.gap, dtype=D), rtol=1e-9)


def pulls(off: Tensor, size: int = 4, gap: float = 0.2) -> tuple[Tensor, Tensor]:
    """The gradient on a probe that is off the flow, and its error: of 16,000 rows in 40 pieces."""
    o = changed(IMM, gap=gap)(times=changed(Groups, size=size)(of=Below(of=Uniform(low=0.2, high=0.8))), drop=0.0)
    net, b = ExactNet(ONE, o.needs), exact_batch(o, ONE, 16000)
    net.probe.data = off.view(1, 2)
    loss = o.loss(net, Frozen(net), b).loss.view(40, -1).mean(1)
    found = torch.stack([torch.autograd.grad(part, net.probe, retain_graph=True)[0][0] for part in loss])
    return found.mean(0), found.std(0) / len(found) ** 0.5


@pytest.mark.nightly
def test_it_rests_near_the_flow() -> None:
    """Of groups, by samples: to their error but for the pairs of one x and z, one of M, whose y' is nearer to the mean
    than y, for its part of x_q is forgotten: less and less as q comes close to t."""
    flow = torch.zeros(2, dtype=D)
    (small, _), (large, error), (close, _) = pulls(flow, 2), pulls(flow, 16), pulls(flow, 2, 0.02)
    assert small[1] < -0.02
    assert abs(large[1]) < abs(small[1]) / 4
    assert abs(close[1]) < abs(small[1]) / 3
    assert abs(large[0]) < 3 * error[0]  # no side is preferred


@pytest.mark.slow
def test_it_is_led_back_to_the_flow() -> None:
    for i in range(2):
        for off in (-0.3, 0.3):
            pull, error = pulls(off * torch.eye(2, dtype=D)[i], 16)
            assert pull[i] * (1 if off > 0 else -1) > 10 * error[i]


def test_rows_of_a_group_are_compared_with_one_another_only() -> None:
    o = IMM()
    net, b = Polynomial(1), rows(o)
    whole = o.loss(net, Frozen(net), b).loss
    assert torch.equal(whole, whole[::4].repeat_interleave(4))
    one = replace(b, x=b.x.index_fill(0, torch.tensor([5]), 0.7))
    changed = o.loss(net, Frozen(net), one.at(b.t)).loss != whole
    assert changed.nonzero().flatten().tolist() == [4, 5, 6, 7]
    order = [2, 0, 3, 1, *range(4, 24)]
    assert torch.allclose(o.loss(net, Frozen(net), b[order]).loss, whole, rtol=1e-12)


def test_distances_are_in_fp32_under_autocast() -> None:
    """Rounded to bf16, an exponent close to 0 would leave kernels of 1 and no gradient."""
    o = IMM()
    net, b = Polynomial(1).float(), rows(o)
    b = replace(b, **{key: getattr(b, key).float() for key in ("x", "z", "x_t", "v_t", "t", "r")})
    plain = o.loss(net, Frozen(net), b).loss
    with torch.autocast("cpu", torch.bfloat16):
        low = o.loss(net, Frozen(net), b).loss
    assert low.dtype == torch.float32
    assert torch.allclose(low, plain, rtol=0.1, atol=1e-4)
    rounded = [a.bfloat16() for a in (b.x_t, b.z)]
    exact = o.discrepancy(*(a.float() for a in rounded), b.t - b.r)
    assert torch.equal(o.discrepancy(*rounded, b.t - b.r), exact)
