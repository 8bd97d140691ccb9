"""TwinFlow: the formula by hand, the rest of each of its terms, and which way the twin pulls."""

from dataclasses import replace
from itertools import product
from math import inf

import pytest
import torch
from torch import Tensor

from dumo.flow.guide import Guide, Interval
from dumo.objectives import TwinFlow
from dumo.testing.exact import D, ExactNet, column, gaussian, growth
from dumo.testing.properties import loss_of
from dumo.types import Heads, NoisyBatch
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
