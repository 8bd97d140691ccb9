"""Three heads on one trunk: the formula by hand, DuMo within it, rest at the exact flow, and halves of a shortcut."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from contract.case import nets
from dumo.flow.guide import Guide, Interval
from dumo.flow.slope import CentralSlope, DualSlope, JvpSlope, Slope
from dumo.flow.times import Below, Beta, Dyadic, Pair, Uniform
from dumo.objectives import DuMo, Several
from dumo.testing.exact import D, ExactNet, column, exact_batch, gaussian, gradient
from dumo.testing.network import randomise
from dumo.testing.properties import loss_of
from dumo.types import Frozen, NoisyBatch
from theory.exact import drawn
from theory.formula import GUIDES, Told, agree, guided, half

NONE, GUIDED = Guide(), Guide(zeta=0.55)
STEPS, OTHERS = Dyadic(), Dyadic(flow=Beta())
HALF = Pair(of=Uniform(), velocity_ratio=0.5)
LAWS = {"average": Below(of=Beta()), "shortcut": STEPS}
each_third = pytest.mark.parametrize("third", LAWS)


def several(third: str, **fields: object) -> Several:
    """An objective of one of the two."""
    own = {"third": third, "times": LAWS[third], "drop": 0.3, "slope": JvpSlope(), "guide": NONE}
    return Several.model_validate({**own, **fields})


def by_hand(
    objective: Several, net: Told, b: NoisyBatch, v_star: Tensor
) -> tuple[Tensor, *tuple[dict[str, Tensor], ...]]:
    """The loss, its parts, row by row for shortcuts, and its notes."""
    v, u, m = net(b.x_t, b.c, t=b.t, r=b.r)
    u_star = v_star - column(b.t) * net.slope(1, b.x_t, b.t, 0 * b.t, v_star)
    m_star = v_star - column(b.t - b.r) * net.slope(2, b.x_t, b.t, b.r, v_star)
    notes = {"clipped_share_u": half(u - u_star)}
    if objective.third == "average":
        notes["clipped_share_m"] = half(m - m_star)
    if objective.third == "shortcut":
        m_star = v_star.clone()
        for k in range(len(b.t)):
            t, r, x, c = b.t[k : k + 1], b.r[k : k + 1], b.x_t[k : k + 1], b.c[k : k + 1]
            if t > r:
                s = r + (t - r) / 2
                first = net(x, c, t=t, r=s)[2]
                second = net(x - (t - s) * first, c, t=s, r=r)[2]
                m_star[k] = (first + second).detach()[0] / 2
    pairs = {"v": (v, v_star), "u": (u, u_star), "m": (m, m_star)}
    parts = {name: ((a - b) ** 2).sum(1) / 2 for name, (a, b) in pairs.items()}
    return 0.7 * parts["v"] + 0.15 * parts["u"] + 0.15 * parts["m"], parts, notes


@each_third
@pytest.mark.parametrize("slope", [JvpSlope(), DualSlope()], ids=lambda s: s.kind)
@pytest.mark.parametrize("guide", GUIDES[:3])
def test_by_hand(third: str, slope: Slope, guide: Guide) -> None:
    objective = several(third, guide=guide, slope=slope)
    net, b = Told(3, 2), drawn(objective)
    assert (b.r < b.t).any()
    v_star = guided(b, guide, net(b.x_t, b.c, t=b.t)[0], net(b.x_t, b.null, t=b.t)[0])
    loss, parts, notes = by_hand(objective, net, b, v_star)
    agree(objective, net, b, loss, parts, **notes)


@pytest.mark.parametrize("slope", [CentralSlope(), DualSlope(), JvpSlope()], ids=lambda s: s.kind)
@pytest.mark.parametrize("guide", [NONE, GUIDED, Guide(omega=0.4, zeta=0.3, interval=Interval(high=0.7))])
def test_the_parts_of_v_and_u_are_dumo_s_to_the_bit(slope: Slope, guide: Guide) -> None:
    """Whatever r is."""
    fields = {"slope": slope, "guide": guide, "drop": 0.3}
    dumo, three = DuMo(**fields), Several(**fields)
    one, two = (randomise(nets()[0].build(o.needs, (2,), 3)).double() for o in (dumo, three))
    one.load_state_dict({k: v for k, v in two.state_dict().items() if k in one.state_dict()})
    b = drawn(three)
    expected, found = loss_of(dumo, one, b), loss_of(three, two, b)
    assert all(torch.equal(found.parts[name], expected.parts[name]) for name in ("v", "u"))


@each_third
def test_without_a_step_m_learns_the_velocity(third: str) -> None:
    """Where r = t its gradient is flow matching's times its weight, as v's is."""
    objective, flow = several(third, times=HALF), gaussian()
    net, b = ExactNet(flow, objective.needs), exact_batch(objective, flow)
    net.probe.data = torch.tensor([0.3, -0.2], dtype=D).expand(3, 2).clone()
    grad = gradient(objective, net, replace(b, r=b.t, moving=None))
    assert grad[0].abs().min() > 0.01
    assert torch.allclose(grad[2] / 0.15, grad[0] / 0.7, rtol=1e-12)


@pytest.mark.parametrize("times", [OTHERS, HALF, Pair(of=Uniform(), velocity_ratio=0.25)])
def test_heads_apart_learn_where_r_is_t_alone(times: Dyadic | Pair) -> None:
    """Each as if these rows were all; m learns on every row as before."""
    objective = several("shortcut", times=times)
    net, b = Told(3, 2), drawn(objective)
    alike, mine = (o.loss(net, Frozen(net), b) for o in (objective, objective.model_copy(update={"apart": True})))
    still = b.r == b.t
    heads, third = 0.7 * mine.parts["v"] + 0.15 * mine.parts["u"], 0.15 * mine.parts["m"]
    assert torch.allclose(mine.loss - third, heads * still * len(b.t) / still.sum(), atol=1e-14)
    assert torch.allclose(alike.loss, heads + third, rtol=1e-14)
    assert torch.allclose((mine.loss - third).mean(), heads[still].mean(), rtol=1e-12)


def test_halves_are_those_of_theta_minus() -> None:
    """And of theta^- alone: with another one the target is another, of a step, and of a row without it is not."""
    objective = several("shortcut")
    net, ref, b = Told(3, 2), Told(3, 2), drawn(objective)
    ref.a.data.mul_(1.5)
    m, still = net(b.x_t, b.c, t=b.t, r=b.r)[2], b.r == b.t
    middle = (b.t + b.r) / 2
    one = ref(b.x_t, b.c, t=b.t, r=middle)[2]
    other = ref(b.x_t - column(b.t - middle) * one, b.c, t=middle, r=b.r)[2]
    target = torch.where(column(still), b.v_t, (one + other) / 2)
    assert torch.allclose(objective.loss(net, Frozen(ref), b).parts["m"], ((m - target) ** 2).sum(1) / 2, rtol=1e-12)


def test_reading() -> None:
    """The endpoint is u's, which aims at the data alone."""
    net = Told(3, 2)
    x, c = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=D), torch.arange(5) % 4
    t, s = torch.full((5,), 0.8, dtype=D), torch.full((5,), 0.3, dtype=D)
    readings, (v, u, m) = Several().readings(net), net(x, c, t=t, r=s)
    assert torch.equal(readings.velocity(x, t, c), v)
    assert torch.equal(readings.endpoint(x, t, c), x - column(t) * u)
    assert torch.allclose(readings.flow_map(x, t, s, c), x - 0.5 * m)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"third": "shortcut", "times": Beta()}, "times .beta..*dyadic"),
        ({"third": "shortcut", "times": Pair(velocity_ratio=0)}, "times 'pair'"),
        ({"apart": True}, "times 'below'.*apart=false"),
        ({"third": "nonsense"}, "third"),
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Several.model_validate(fields)
