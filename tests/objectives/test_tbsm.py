"""Three-body scattering: its ports' loss, its rest where samples are the data, and which way it moves others."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dumo.config.load import load
from dumo.flow import dropout
from dumo.objectives import TBSM
from dumo.objectives.tbsm import direction_to
from dumo.testing.exact import D, ExactFlow, ExactNet, column, gaussian
from dumo.testing.properties import loss_of
from dumo.types import Heads, NoisyBatch, UserError
from theory.exact import PRODUCT, drawn
from theory.formula import Polynomial, agree, gradients, passes

OBJECTIVE = TBSM(drop=0.3)


def port_loss(projectile: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """The ports' loss of each row before it is divided by its value, at lambda = 1 and rho = 0, by their words."""
    frozen = projectile.detach()
    radius_scale = frozen[0].numel() ** 0.5
    inter_offset, intra_offset = positive - frozen, negative - frozen
    inter_direction_to = inter_offset / (inter_offset.norm(dim=1, keepdim=True) + 1e-6)
    intra_direction_to = intra_offset / (intra_offset.norm(dim=1, keepdim=True) + 1e-6)
    target = frozen + (inter_direction_to - intra_direction_to) * radius_scale
    return ((projectile - target) ** 2).mean(1)


@pytest.mark.parametrize("online", [True, False])
def test_agrees_with_the_ports(online: bool) -> None:
    """With theta^- the net itself, and another, which makes the negative."""
    net, b = Polynomial(1), drawn(OBJECTIVE)
    ref = Polynomial(1)
    if not online:
        ref.a.data += 0.1
    one = torch.ones_like(b.t)
    projectile = b.drawn["x.z"] - net(b.drawn["x.z"], b.c, t=one)[0]
    negative = b.drawn["n.z"] - ref(b.drawn["n.z"], b.c, t=one)[0]
    loss = port_loss(projectile, b.x, negative.detach())
    agree(OBJECTIVE, net, b, loss, {"u": loss}, ref=net if online else ref)
    assert all(p.grad is None for p in ref.parameters())


def test_the_negative_drops_nothing() -> None:
    class Drops(Polynomial):
        """The polynomial, in training with dropout."""

        def forward(self, x: Tensor, c: Tensor, /, *, t: Tensor) -> Heads:
            keys = dropout.current(len(x))
            (head,) = super().forward(x, c, t=t)
            return (head if keys is None else dropout.drop(head, keys, 0.5),)

    b = drawn(OBJECTIVE)
    net, one = Drops(1), torch.ones_like(b.t)
    with dropout.using(dropout.keys(0, 0, len(b.t))):
        loss = loss_of(OBJECTIVE, net, b).loss
        sample = b.drawn["x.z"] - net(b.drawn["x.z"], b.c, t=one)[0]
    with dropout.off():
        negative = b.drawn["n.z"] - net(b.drawn["n.z"], b.c, t=one)[0]
    assert torch.allclose(loss, port_loss(sample, b.x, negative.detach()))


def test_a_direction_has_one_length_whatever_the_distance() -> None:
    x = torch.zeros(3, 2, 2, dtype=D)
    y = torch.stack([x[0], x[0] + 1e-3, x[0] - 5])
    found = direction_to(x, y)
    assert torch.allclose(found, torch.stack([x[0], x[0] + 1, x[0] - 1]), rtol=1e-3, atol=0)
    assert torch.equal(found[0], x[0])


def exchanged(b: NoisyBatch, net: ExactNet, flow: ExactFlow) -> tuple[NoisyBatch, NoisyBatch]:
    """Rows whose data are made of noise by the flow, and the rows in which data and negative have changed places."""
    one = torch.ones_like(b.t)
    p_z = torch.randn(b.x.shape, generator=torch.Generator().manual_seed(4), dtype=D)
    n_z = b.drawn["n.z"].to(D)
    x_of_p, x_of_n = (flow.carry(z, b.c, one, 0 * one) for z in (p_z, n_z))
    return replace(b, x=x_of_p), replace(b, x=x_of_n, drawn={**b.drawn, "n.z": p_z})


@pytest.mark.parametrize("flow", [gaussian(), PRODUCT], ids=lambda flow: type(flow).__name__)
def test_it_rests_where_samples_are_the_data(flow: ExactFlow) -> None:
    """Of a mixture, too: what a row meets may as well be the other way round, and both gradients add up to nothing."""
    objective = TBSM()
    net = ExactNet(flow, objective.needs)
    one, other = (
        gradients(loss_of(objective, net, rows).loss, net)[0]
        for rows in exchanged(drawn(objective, 64, flow), net, flow)
    )
    assert one.abs().max() > 1e-3
    assert (one + other).abs().max() < 1e-12


def test_a_sample_meets_nothing_at_all_where_both_are_one() -> None:
    objective = TBSM()
    net, b = ExactNet(gaussian(), objective.needs), drawn(objective)
    at_one = replace(b, x=gaussian().carry(b.drawn["n.z"].to(D), b.c, torch.ones_like(b.t), torch.zeros_like(b.t)))
    assert loss_of(objective, net, at_one).loss.max() < 1e-20


class Wide(nn.Module):
    """Samples of the Gaussian flow, times `width`."""

    def __init__(self, width: float) -> None:
        super().__init__()
        self.width = nn.Parameter(torch.tensor(width, dtype=D))

    def forward(self, x: Tensor, c: Tensor, /, *, t: Tensor) -> Heads:
        return (x - self.width * column(gaussian().std[c]) * x,)


@pytest.mark.parametrize(("width", "sign"), [(1.5, 1), (0.6, -1)])
def test_samples_of_another_width_are_moved_back(width: float, sign: int) -> None:
    net = Wide(width)
    (grad,) = gradients(loss_of(TBSM(), net, drawn(TBSM(), 512)).loss, net)
    assert sign * grad > 0.02


def test_what_comes_with_the_data_is_not_what_samples_are_made_of() -> None:
    """Noise that is tied to data, by a coupling or a teacher, would make a regression of it."""
    net, b = Polynomial(1), drawn(OBJECTIVE)
    assert torch.equal(loss_of(OBJECTIVE, net, b).loss, loss_of(OBJECTIVE, net, replace(b, z=b.x, x_t=b.x)).loss)


def test_passes() -> None:
    assert passes(OBJECTIVE, drawn(OBJECTIVE)) == (1, 1)


def test_it_is_for_one_pass() -> None:
    assert load("digits-tbsm").sample.nfe == (1,)
    with pytest.raises(UserError, match=r"below t = 1, where it was not trained"):
        load("digits-tbsm", ["sample.nfe=[2]"])
