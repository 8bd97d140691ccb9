"""TwinFlow: the formula by hand, the rest of each of its terms, and which way the twin pulls."""

from dataclasses import replace
from itertools import product
from math import inf, pi

import pytest
import torch
from torch import Tensor

from dumo.error import UserError
from dumo.flow.guide import Guide, Interval
from dumo.flow.slope import DualSlope
from dumo.flow.times import Quarters
from dumo.objectives import TwinFlow
from dumo.testing.exact import D, ExactNet, column, gaussian, growth
from dumo.testing.properties import loss_of
from dumo.types import Frozen, Heads, NoisyBatch
from theory.exact import drawn, falls
from theory.formula import Polynomial, agree, changed, guided, half

GUIDES = [Guide(), Guide(omega=0.8, zeta=0.55, interval=Interval(low=0.2, high=0.8))]


def rcgm(o: TwinFlow, u: Tensor, ref: Polynomial, x: Tensor, b: NoisyBatch, t: Tensor, r: Tensor) -> Tensor:
    """u - u* of two jumps from t - 0.01, all rows of which are further than that from r."""
    (v_c,), (v_null,) = ref(x, b.c, t=t, r=t), ref(x, b.null, t=t, r=t)
    v_star = guided(replace(b, t=t), o.guide, v_c, v_null)
    y, now = x - o.step * v_star, t - o.step
    middle = (now + r) / 2
    one = column(now - middle) * ref(y, b.c, t=now, r=middle)[0]
    other = column(middle - r) * ref(y - one, b.c, t=middle, r=r)[0]
    return ((column(t - r) * u - one - other) / o.step - v_star).detach()


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("clip", [inf, 1.0])
def test_loss_and_gradient_are_those_of_the_formula(guide: Guide, clip: float) -> None:
    o = changed(TwinFlow, clip=clip, step=0.05)(guide=guide, drop=0.3)
    net, ref, b = Polynomial(1), Polynomial(1), drawn(o, 16)
    ref.a.data = ref.a.data.roll(1) / 2
    b = replace(b, r=torch.minimum(b.r, b.t - 2 * o.step))
    one, none = torch.ones_like(b.t), torch.zeros_like(b.t)

    (u,), (v,), (u_one,) = (
        net(x, b.c, t=t, r=r) for x, t, r in ((b.x_t, b.t, b.r), (b.x_t, b.t, b.t), (b.z, one, none))
    )
    (v_c,), (v_null,) = (ref(b.x_t, c, t=b.t, r=b.t) for c in (b.c, b.null))
    made, z = (b.z - u_one).detach(), b.drawn["z_twin"].to(D)
    at, t_twin = (lambda t: column(t) * z + column(1 - t) * made), b.drawn["t_twin"].to(D)
    (v_fake,) = net(at(b.t), b.c, t=-b.t, r=-b.t)
    (twin,), (real,) = (net(at(t_twin), b.c, t=s, r=s) for s in (-t_twin, t_twin))
    off = {
        "u": rcgm(o, u, ref, b.x_t, b, b.t, b.r),
        "one": rcgm(o, u_one, ref, b.z, b, one, none),
        "rectify": (twin - real).detach(),
    }
    beyond = half(off["u"] / clip)
    targets = {
        "u": (u, u - off["u"].clamp(-clip, clip)),
        "flow": (v, guided(b, guide, v_c, v_null)),
        "one": (u_one, u_one - off["one"].clamp(-clip, clip)),
        "twin": (v_fake, z - made),
        "rectify": (u_one, u_one - off["rectify"]),
    }
    parts = {name: ((y - y_star.detach()) ** 2).sum(1) / 2 for name, (y, y_star) in targets.items()}
    loss = sum(parts.values(), 0 * b.t)
    agree(o, net, b, loss, parts, ref=ref, close=1e-10, near=1e-14, clipped_share=beyond)


def test_all_but_the_twin_rest_with_the_step() -> None:
    """Row by row: G and the flow at once; the jumps are off by one step of Euler's, O(h)."""
    left: list[Tensor] = []
    for h in (0.02, 0.01, 0.005):
        o = changed(TwinFlow, clip=inf, step=h)(guide=Guide())
        parts = loss_of(o, ExactNet(gaussian(), o.needs), drawn(o, 128, teacher=True)).parts
        assert max(parts[name].max() for name in ("flow", "rectify")) < 1e-20
        left.append(torch.stack([parts[name].mean().sqrt() for name in ("u", "one")]))
    assert falls(left, 1)


@pytest.mark.parametrize("own", [False, True], ids=["other noise", "its own noise"])
def test_the_twin_rests_at_the_flow_unless_samples_meet_their_own_noise(own: bool) -> None:
    """The mean over noise, exactly: the gradient is of second order in both noises, of which +-1 have the moments.

    In their own noise samples move on straight lines, whose mean velocity is not the flow's (but for the tutorial).
    """
    o = TwinFlow(guide=Guide(), drop=0.0)
    four = torch.tensor(list(product((1, -1), repeat=2)), dtype=D)
    z, z_twin = (column(a).expand(4, 2) for a in four.T)
    b = drawn(o, 4)
    for t in (0.0, 0.3, 1.0):
        at = replace(b, z=z, c=0 * b.c).at(torch.full_like(b.t, t))
        at = replace(at, r=0 * at.t, drawn={**b.drawn, "z_twin": z if own else z_twin})
        net = ExactNet(gaussian(), o.needs)
        (left,) = torch.autograd.grad(loss_of(o, net, at).parts["twin"].mean(), net.probe)
        assert bool(left.abs().max() < 1e-12) != own


def test_the_twin_is_taught_by_no_teacher() -> None:
    """A teacher knows the data's velocity, not that of the samples."""
    o, net = changed(TwinFlow, clip=inf)(guide=Guide()), Polynomial(1)
    plain, taught = (loss_of(o, net, drawn(o, 16, teacher=teacher)).parts for teacher in (False, True))
    assert torch.equal(plain["twin"], taught["twin"])
    assert torch.equal(plain["rectify"], taught["rectify"])
    assert (plain["flow"] != taught["flow"]).all()
    assert (plain["one"] != taught["one"]).all()


class TooWide(ExactNet):
    """The exact flow, but samples are `wide` times as wide, and the twin knows it."""

    wide = 1.5

    def forward(self, x: Tensor, c: Tensor, /, *, t: Tensor, **inputs: Tensor) -> Heads:
        (u,) = super().forward(x, c, t=t, **inputs)
        std = gaussian().std[c]
        fake = column(growth(self.wide * std, t.abs())) * x
        one = x - column(self.wide * std) * x + self.probe[0, 1] * x
        return (torch.where(column(t < 0), fake, torch.where(column((t == 1) & (inputs["r"] == 0)), one, u)),)


@pytest.mark.parametrize(("wide", "sign"), [(1.5, -1), (0.6, 1)])
def test_samples_of_another_width_are_pulled_back(wide: float, sign: int) -> None:
    """x' = z - u: where they are too wide u is to grow along z, so its gradient is below 0; and conversely."""
    o = TwinFlow(guide=Guide(), drop=0.0)
    net, b = TooWide(gaussian(), o.needs), drawn(o, 256)
    net.wide = wide
    (pull,) = torch.autograd.grad(loss_of(o, net, b).parts["rectify"].mean(), net.probe)
    assert pull[0, 1] * sign > 1e-2


# ------------------------------------------------------------------------------------------- one task on each row


def test_quarters_are_the_four_tasks_of_the_released_code() -> None:
    t, r = Quarters()(4000, torch.Generator().manual_seed(0))
    assert (t[0::4] == 1).all()
    assert (r[0::4] == 0).all()
    assert (r[1::4] >= 0.95 * t[1::4] - 1e-6).all()
    assert (r[3::4] == t[3::4]).all()
    share = r[2::4] / t[2::4]
    assert (share.mean() - 0.5).abs() < 0.03
    assert (share.std() - 12**-0.5).abs() < 0.02
    assert Quarters().moving(8) == (True, True, True, False) * 2


def released(o: TwinFlow, net: Polynomial, ref: Polynomial, b: NoisyBatch) -> Tensor:
    """`training_step` of their `twinflow.py`, row by row, with the batch's random numbers."""

    def weighed(error: Tensor) -> Tensor:
        """`barron_reweighting_loss` or `l2_loss`, whose weight is held still."""
        mse = (error**2).mean()
        c = o.barron
        return mse if c is None else mse * ((mse / (c**2 + 1e-8) + 1) ** -0.5).detach() / c

    def predict(model: Polynomial, x: Tensor, c: Tensor, t: float, r: float) -> Tensor:
        return model(x[None], c[None], t=torch.tensor([t], dtype=D), r=torch.tensor([r], dtype=D))[0][0]

    jump_losses, gap_losses = list[Tensor](), list[Tensor]()
    for i in range(len(b.t)):
        x, z, c, null = b.x[i], b.z[i], b.c[i], b.null[i]
        t, r, z_twin, t_twin = float(b.t[i]), float(b.r[i]), b.drawn["z_twin"][i].to(D), float(b.drawn["t_twin"][i])
        if i % 4 == 3:  # adv
            x = z_twin - predict(net, z_twin, c, 1.0, 0.0).detach()
            error = predict(net, t * z + (1 - t) * x, c, -t, -t) - (z - x)
            jump_losses.append(weighed(error))
            continue
        x_t = t * z + (1 - t) * x
        v = z - x
        if i % 4 and bool(b.kept[i]):
            v_c, v_null = predict(ref, x_t, c, t, t), predict(ref, x_t, null, t, t)
            v = (v + o.guide.zeta * (v_c - v_null)).detach()
        u = predict(net, x_t, c, t, r)
        if o.slope is not None:
            du_dt = net.slope(0, x_t[None], torch.tensor([t], dtype=D), torch.tensor([r], dtype=D), v[None])[0]
            residual = u + (t - r) * du_dt - v
        else:
            now, y, moved = max(t - 0.01, r), x_t - 0.01 * v, 0 * x
            for k in range(o.order):
                start, end = (now * (1 - j / o.order) + r * j / o.order for j in (k, k + 1))
                f = predict(ref, y, c, start, end)
                y, moved = y - (start - end) * f, moved + (start - end) * f
            near = t < r + 0.01
            residual = u - v if near else 100 * (t - r) * u - 100 * moved - v
        error = u - (u - residual.clamp(-1, 1)).detach()
        jump_losses.append(weighed(error) * (torch.tensor((1 - (t - r)) * pi / 2.5).tan() + 1))
        if i % 4 == 0:  # e2e
            sample = (z - u).detach()
            x_twin = t_twin * z_twin + (1 - t_twin) * sample
            g = predict(net, x_twin, c, -t_twin, -t_twin) - predict(net, x_twin, c, t_twin, t_twin)
            gap_losses.append(weighed(u - (u - g.clamp(-1, 1)).detach()))
    return torch.stack(jump_losses).mean() + o.match * torch.stack(gap_losses).mean()


@pytest.mark.parametrize("zeta", [0.0, 0.8])
@pytest.mark.parametrize("barron", [None, 1e-3])
@pytest.mark.parametrize(("order", "slope"), [(1, None), (2, None), (1, DualSlope())])
def test_the_loss_in_quarters_is_that_of_the_released_code(
    zeta: float, barron: float | None, order: int, slope: DualSlope | None
) -> None:
    o = TwinFlow(times=Quarters(), guide=Guide(zeta=zeta), barron=barron, match=0.5, order=order, slope=slope, drop=0.3)
    net, ref, b = Polynomial(1), Polynomial(1), drawn(o, 16)
    if slope is None:
        ref.a.data = ref.a.data.roll(1) / 2
    loss = o.loss(net, Frozen(net if slope else ref), b).loss.mean()
    theirs = released(o, net, net if slope else ref, b)
    assert torch.allclose(loss, theirs, rtol=1e-6)
    ours, wanted = (torch.autograd.grad(y, net.parameters()) for y in (loss, theirs))
    for grad, right in zip(ours, wanted, strict=True):
        assert torch.allclose(grad, right, rtol=1e-6, atol=1e-6 * float(right.abs().max()))


def test_all_but_the_twin_rest_in_quarters_with_an_exact_slope() -> None:
    """At the exact flow, row by row: no step is finite, so no error is left."""
    o = changed(TwinFlow, clip=inf)(times=Quarters(), guide=Guide(), drop=0.0, slope=DualSlope())
    parts = loss_of(o, ExactNet(gaussian(), o.needs), drawn(o, 128, teacher=True)).parts
    at = torch.arange(128) % 4
    assert parts["u"][(at == 1) | (at == 2)].max() < 1e-20
    assert parts["rectify"].max() < 1e-20
    assert parts["u"][at == 3].min() > 1e-6


def test_a_batch_without_all_four_tasks_is_refused() -> None:
    o = TwinFlow(times=Quarters())
    with pytest.raises(UserError, match="multiples of 4"):
        loss_of(o, Polynomial(1), drawn(o, 6))
