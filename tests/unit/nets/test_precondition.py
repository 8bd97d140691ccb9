"""EDM's preconditioning: its own formulas, under every slope."""

import pytest
import torch
from torch import Tensor, nn

from dumo.config.load import load
from dumo.flow.slope import DualSlope, JvpSlope
from dumo.nets import DiT, UNet
from dumo.types import Frozen, Needs, UserError, lift
from unit.nets.given import drawn, points

D = torch.float64
SHAPE = (2, 4, 4)
NEEDS = Needs(inputs=("t", "r"), heads=("v", "u"), gauges=("doubt",))
DIT = DiT(patch=2, width=16, depth=2, attention=2)
EDM = DIT.model_copy(update={"precondition": "edm"})
UNET = UNet(width=8, multipliers=(1, 2), depth=1, attend=(2,))


def built(net: DiT | UNet) -> nn.Module:
    return drawn(net, NEEDS, SHAPE, 3)


def at(n: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, c, t and r."""
    x, c, t = points(n, SHAPE, 3)
    return x, c, t, t / 2


@pytest.mark.parametrize("net", [DIT, UNET], ids=["dit", "unet"])
def test_a_net_is_that_of_edm(net: DiT | UNet) -> None:
    """D = c_skip y + c_out F(c_in y) of EDM's Tab. 1, with F the net as it is without, at times that nobody scales."""
    x, c, t, r = at()
    model, plain = built(net.model_copy(update={"precondition": "edm"})), built(net)
    plain.load_state_dict(model.state_dict())
    for sd in (1.0, 0.5):  # sigma and y in units of the data's deviation
        sigma = lift(sd * t / (1 - t), x)
        y = sd * x / (1 - lift(t, x))
        skip, out, into = sd**2 / (sigma**2 + sd**2), sigma * sd / (sigma**2 + sd**2).sqrt(), (sigma**2 + sd**2) ** -0.5
        *layers, doubt = plain(into * y, c, t=t, r=r)
        *heads, same = model(x, c, t=t, r=r)
        for head, f in zip(heads, layers, strict=True):
            data = (skip * y + out * f) / sd
            assert torch.allclose(x - lift(t, x) * head, data, rtol=1e-12, atol=1e-12)
        assert torch.equal(doubt, same)


def test_it_starts_at_the_velocity_of_gaussian_data() -> None:
    """Whose x_t has the standard deviation n: d log n / dt = (2t - 1) / n^2. Also at the corners of time and beyond."""
    x, c, _, _ = at()
    t = torch.tensor([0.0, 1.0, 0.5, -0.005, 1.005, -1.0], dtype=D)
    n_squared = lift(t**2 + (1 - t) ** 2, x)
    for head in EDM.build(NEEDS, SHAPE, 3).double()(x, c, t=t, r=t)[:2]:
        assert torch.allclose(head, (2 * lift(t, x) - 1) / n_squared * x, rtol=1e-14, atol=0)


def test_a_net_of_data_is_its_layers_answer() -> None:
    """x_t - t u, at times above the bound; below it nothing is divided by less; and slopes by the chain rule."""
    x, c, t, r = at()
    t[0], t[1], t[2] = 0.04, 0.05, 0.0
    model, plain = built(DIT.model_copy(update={"precondition": "data"})), built(DIT)
    plain.load_state_dict(model.state_dict())
    w = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=D)
    known, along = JvpSlope()(plain, Frozen(plain), x, c, t=t, r=r)
    least, moves = lift(t.clamp(min=0.05), x), lift((t >= 0.05).to(D), x)
    layers = zip(known[:2], along(w)[:2], strict=True)
    wanted = [((x - f) / least, (w - df - moves * (x - f) / least) / least) for f, df in layers]
    for direction in (None, w):
        heads, along = DualSlope()(model, Frozen(model), x, c, t=t, r=r, direction=direction)
        for head, slope, (u, du_dt) in zip(heads, along(w), wanted, strict=False):
            assert torch.allclose(head, u, rtol=1e-13, atol=0)
            assert torch.allclose(slope, du_dt, rtol=1e-10, atol=1e-10)
        assert torch.equal(heads[2], known[2])


def test_a_run_refuses_it_off_the_linear_path() -> None:
    load("digits", ["net.precondition=edm"])
    load("digits-imf", ["net.precondition=data"])
    with pytest.raises(UserError, match=r"net\.precondition.*path 'trig'.*precondition=none"):
        load("digits-sct", ["net.precondition=edm"])
