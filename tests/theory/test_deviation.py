"""Data of any deviation, on a path that knows it, are data of deviation 1: training, samples, the authors' formulas.

Theirs have sigma_d in many places; ours have it in two, where data enter and where samples leave.
"""

from collections.abc import Callable
from math import cos, pi, sin

import pytest
import torch
from torch import Tensor, nn

from contract.case import kind, objectives
from dumo.flow.noisy_batch import draw
from dumo.flow.path import FlowPath, Linear, Trig
from dumo.flow.reading import jump_to_data
from dumo.flow.sampling import sample_with_noise
from dumo.flow.solver import Restart
from dumo.nets import DiT
from dumo.objectives import SCT, Consistency
from dumo.testing.exact import D, column
from dumo.testing.network import randomise
from dumo.training.settings import Train
from dumo.training.state import begin
from dumo.types import Frozen, Net, NoisyBatch, Objective, Readings, lift
from objectives.test_consistency import AUTHORS
from theory.formula import Polynomial
from trained import ToyTrainer
from unit.training.toy import flow_of

POINT = (2, 1, 1)  # a point as an image
TINY = DiT(patch=1, width=16, depth=1, attention=2)
each_sd = pytest.mark.parametrize("sd", [0.5, 0.75, 3.0])
C = torch.arange(48) % 3
UNIT = [
    (o, Trig if "trig" in o.needs.formulas.paths else Linear) for o in objectives(exact=True) if o.needs.formulas.unit
]


def data(n: int = 48) -> Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(3), dtype=D)


def noised(objective: Objective, path: FlowPath, x: Tensor, progress: float = 0.4) -> NoisyBatch:
    return draw(objective, path, x, C, torch.full_like(C, 3), seed=0, step=0, progress=progress)


def test_those_with_such_constants_say_so() -> None:
    assert {o.kind for o, _ in UNIT} == {"consistency", "imm", "sct"}


@each_sd
@pytest.mark.parametrize(("objective", "path"), UNIT, ids=kind)
def test_training_is_that_of_data_of_deviation_1(
    objective: Objective, path: Callable[..., FlowPath], sd: float
) -> None:
    """Losses and weights, step by step; with EDM's preconditioning on its path."""
    net = TINY.model_copy(update={"precondition": "edm" if path is Linear else "none"})
    train = Train(steps=3, batch=48, ema=(), precision="fp32")
    one, other = (begin(randomise(net.build(objective.needs, POINT, 3)).double(), train) for _ in range(2))
    x = data().view(-1, *POINT)
    for _ in range(3):
        first = ToyTrainer(one, flow_of(one, train, objective, path(), 3), train).step((x, C))
        second = ToyTrainer(other, flow_of(other, train, objective, path(sd=sd), 3), train).step((sd * x, C))
        assert first.loss == pytest.approx(second.loss, rel=1e-9)
    for a, b in zip(one.net.parameters(), other.net.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-8)


@each_sd
@pytest.mark.parametrize("path", [Linear, Trig])
def test_samples_leave_in_the_units_of_the_data(path: Callable[..., FlowPath], sd: float) -> None:
    """Also those of several passes, which are noised again on the way."""
    readings = Readings(endpoint=jump_to_data(Polynomial(1).float()))

    def made(path: FlowPath) -> tuple[Tensor, Tensor]:
        return sample_with_noise(readings, path, Restart(), C[:6], nfe=3, seed=0, shape=(2,), indices=range(6))

    (z, x), (same, wide) = made(path()), made(path(sd=sd))
    assert torch.equal(z, same)
    assert torch.allclose(wide, sd * x, rtol=1e-6)


@each_sd
@pytest.mark.parametrize("name", AUTHORS)
def test_consistency_is_its_authors(name: str, sd: float) -> None:
    """y = x + sigma n, D(y, sigma), and constants for sigma_d = 0.5 that grow with sigma_d."""
    o = AUTHORS[name]
    net, x = Polynomial(1), sd * data()
    b = noised(o, Linear(sd=sd), x)
    t, r = o.discretization(b.t, b.progress)

    def denoised(sigma: Tensor) -> Tensor:
        y, t = x + column(sigma) * b.z, sigma / (sd + sigma)
        x_t = column(1 - t) * y / sd
        return sd * (x_t - column(t) * net(x_t, b.c, t=t)[0])

    above, below = sd * t / (1 - t), sd * r / (1 - r)
    apart = denoised(above) - denoised(below)
    if name == "cm":
        loss = apart.square().mean(1) / sd**2  # by no weight: so it is in units of sigma_d
    else:
        c = {"ict": 0.00054, "ect": 0.0}[name] * 2**0.5 * sd / 0.5
        loss = ((apart.square().sum(1) + c**2).sqrt() - c) / (above - below) / 2**0.5
    assert torch.allclose(o.loss(net, Frozen(net), b).loss, loss, rtol=1e-7)


def test_levels_grow_with_the_deviation() -> None:
    """ECT's sigma = exp(N(-1.1, 4)) for 0.5; 1.5 times as wide data have 1.5 times the levels."""
    o = Consistency()
    for sd in (0.5, 0.75):
        x = torch.zeros(20_000, 1)
        c = torch.zeros(len(x), dtype=torch.long)
        b = draw(o, Linear(sd=sd), x, c, c, seed=0, step=0)
        level = (sd * b.t / (1 - b.t)).log()  # of noise, in the units that the data come in
        assert abs(level.mean() - (-1.1 + torch.tensor(sd / 0.5).log())) < 0.05
        assert abs(level.std() - 2) < 0.05


@each_sd
def test_sct_is_its_authors(sd: float) -> None:
    """x_theta = cos x + sin z' with z' ~ N(0, sigma_d^2), the net sigma_d F(x_theta / sigma_d), c = 0.1 for 0.5."""
    o = SCT(weigh=False)
    net, x = Polynomial(1), sd * data()
    b = noised(o, Trig(sd=sd), x)
    f = net(b.x_t, b.c, t=b.t)[0].detach()
    rate = net.slope(0, b.x_t, b.t, 0 * b.t, b.v_t) * 2 / pi
    sizes = []
    for i in range(len(x)):
        theta, z = pi / 2 * b.t[i].item(), sd * b.z[i]
        x_theta, dx = cos(theta) * x[i] + sin(theta) * z, cos(theta) * z - sin(theta) * x[i]
        assert torch.allclose(x_theta / sd, b.x_t[i])
        g = -(cos(theta) ** 2) * (sd * f[i] - dx) - cos(theta) * sin(theta) * (x_theta + sd * rate[i])
        size = g.square().mean().sqrt()
        sizes.append((size / (size + 0.1 * sd / 0.5)) ** 2)
    assert torch.allclose(o.loss(net, Frozen(net), b).loss, torch.stack(sizes), rtol=1e-8)


@each_sd
def test_edm_is_its_authors(sd: float) -> None:
    """D = c_skip y + c_out F(c_in y) with sigma_data = sd, of a net that is told so by its path."""
    framed, plain = (TINY.model_copy(update={"precondition": p}) for p in ("edm", "none"))
    needs, x = Consistency().needs, data().view(-1, *POINT)
    net, layers = (randomise(spec.build(needs, POINT, 3)).double() for spec in (framed, plain))
    layers.load_state_dict(net.state_dict())
    b = noised(Consistency(), Linear(sd=sd), sd * x)
    sigma = lift(sd * b.t / (1 - b.t), x)
    y = sd * x + sigma * b.z
    skip, out, into = sd**2 / (sigma**2 + sd**2), sigma * sd / (sigma**2 + sd**2).sqrt(), (sigma**2 + sd**2) ** -0.5
    data_hat = skip * y + out * call(layers, into * y, b)
    assert torch.allclose(sd * (b.x_t - lift(b.t, x) * call(net, b.x_t, b)), data_hat, rtol=1e-9, atol=1e-10)


def call(net: Net | nn.Module, x: Tensor, b: NoisyBatch) -> Tensor:
    return net(x, b.c, t=b.t)[0]
