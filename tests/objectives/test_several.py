"""Several heads on one trunk: the formula by hand, DuMo within it, and rest at the exact flow for all sets of parts."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from contract.case import Counted, nets, randomise, step
from dumo.config.load import load
from dumo.flow.draw import draw
from dumo.flow.guide import Guide, Interval
from dumo.flow.law import Signs
from dumo.flow.path import Linear
from dumo.flow.slope import CentralSlope, DualSlope, JvpSlope, Slope
from dumo.flow.times import Below, Beta, Dyadic, Jumps, Pair, Uniform
from dumo.objectives import DuMo, Several
from dumo.objectives.part import AveragePart, DivergencePart, EndpointPart, ShortcutPart, VelocityPart
from dumo.types import Frozen, Heads, Noised
from theory.exact import APART, PRODUCT, D, Exact, Gaussian, Product, column, gaussian, gradient, record
from theory.formula import GUIDES, Polynomial, gradients, guided, rows

NONE, GUIDED = Guide(), Guide(zeta=0.55)
V, U, M, S = VelocityPart(weight=0.6), EndpointPart(weight=0.3), AveragePart(weight=0.2), ShortcutPart(weight=0.4)
G = DivergencePart(weight=0.1)
STEPS = Dyadic(levels=4, every=2)
HALF = Pair(of=Uniform(), velocity_ratio=0.5)
DUMO = (VelocityPart(weight=0.7), EndpointPart(weight=1 - 0.7))
SETS = {  # every way to have heads, with a law that teaches them
    "dumo and average": ((V, U, M), Below(of=Beta())),
    "dumo and shortcut": ((V, U, S), STEPS),
    "average": ((V, M), HALF),
    "jumps": ((V, M), Jumps(of=Uniform())),
    "shortcut": ((V, S), HALF),
    "all": ((U, M, V, ShortcutPart(name="s", weight=0.4)), HALF),
    "divergence": ((V, M, G), Pair(of=Uniform(), velocity_ratio=0.25, both_ways=True)),
    "twice": ((V, U, VelocityPart(name="v2", weight=0.1), EndpointPart(name="u2", weight=0.1)), HALF),
}
each_set = pytest.mark.parametrize("made_of", SETS)


def several(made_of: str, **fields: object) -> Several:
    """An objective of one of the sets."""
    parts, times = SETS[made_of]
    own = {"parts": parts, "times": times, "probe": Signs() if G in parts else None}
    return Several(**{**own, "drop": 0.3, "slope": JvpSlope(), "guide": NONE, **fields})


class Aimed(Polynomial):
    """The polynomial, whose heads are told r where they may be."""

    def __init__(self, objective: Several) -> None:
        super().__init__(len(objective.parts))
        self.aims = [part.aims for part in objective.parts]

    def forward(self, x: Tensor, c: Tensor, /, *, t: Tensor, r: Tensor | None = None) -> Heads:
        told, alone = super().forward(x, c, t=t, r=r), super().forward(x, c, t=t)
        return tuple(a if aims else b for a, b, aims in zip(told, alone, self.aims, strict=True))


def by_hand(objective: Several, net: Aimed, b: Noised, v_star: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its parts, row by row for shortcuts."""
    loss, parts = torch.zeros(len(b.t), dtype=D), dict[str, Tensor]()
    heads = net(b.x_t, b.c, t=b.t, r=b.r)
    first = [part.kind for part in objective.parts].index("velocity")
    w = heads[first].detach() if objective.along == "velocity" else v_star
    grown = b.progress / objective.ramp if b.progress < objective.ramp else 1
    for i, (part, head) in enumerate(zip(objective.parts, heads, strict=True)):
        target = v_star.clone()
        if part.kind == "endpoint":
            target -= grown * column(b.t) * net.slope(i, b.x_t, b.t, 0 * b.t, w)
        if part.kind == "average":
            target -= grown * column(b.t - b.r) * net.slope(i, b.x_t, b.t, b.r, w)
        if part.kind == "divergence":
            _, one, by_t, by_x, *_ = net.a[first].detach()
            target = one + by_t * column(b.t) + 2 * by_x * b.x_t
            target -= grown * column(b.t - b.r) * net.slope(i, b.x_t, b.t, b.r, w)
        for k in range(len(b.t)) if part.kind == "shortcut" else ():
            t, r, x, c = b.t[k : k + 1], b.r[k : k + 1], b.x_t[k : k + 1], b.c[k : k + 1]
            if t > r:
                s = r + (t - r) / 2
                first = net(x, c, t=t, r=s)[i]
                second = net(x - (t - s) * first, c, t=s, r=r)[i]
                target[k] = (first + second).detach()[0] / 2
        square = ((head - target) ** 2).sum(1)
        parts[part.name] = square / 2
        measured = square / (square + part.floor).detach() ** part.power if part.power else square / 2
        loss = loss + part.weight * measured
    return loss, parts


@each_set
@pytest.mark.parametrize("guide", GUIDES[:4])
def test_by_hand(made_of: str, guide: Guide) -> None:
    objective = several(made_of, guide=guide)
    net = Aimed(objective)
    b = drawn(objective)
    assert (b.r < b.t).any()
    at = next(i for i, part in enumerate(objective.parts) if part.kind == "velocity")
    v_star = guided(b, guide, net(b.x_t, b.c, t=b.t)[at], net(b.x_t, b.null, t=b.t)[at])
    loss, parts = by_hand(objective, net, b, v_star)
    found = objective.loss(net, Frozen(net), b)
    assert torch.allclose(found.loss, loss, rtol=1e-12, atol=0)
    assert found.parts.keys() == parts.keys()
    assert all(torch.allclose(found.parts[key], value, rtol=1e-12, atol=0) for key, value in parts.items())
    assert list(found.notes) == [
        f"clipped_share_{p.name}" for p in objective.parts if p.kind in ("endpoint", "average", "divergence")
    ]
    for mine, hand in zip(gradients(found.loss, net), gradients(loss, net), strict=True):
        assert torch.allclose(mine, hand, rtol=1e-11, atol=1e-13)


def drawn(objective: Several, n: int = 64) -> Noised:
    """Rows as training draws them."""
    g, flow = torch.Generator().manual_seed(1), gaussian()
    c = torch.arange(n) % 3
    return draw(objective, Linear(), flow.data(c, g), c, torch.full_like(c, 3), seed=0, step=0)


@pytest.mark.parametrize("slope", [JvpSlope(), DualSlope()], ids=lambda s: s.kind)
@pytest.mark.parametrize(("ramp", "progress"), [(0.0, 0.0), (0.5, 0.0), (0.5, 0.2), (0.5, 0.5), (0.5, 1.0)])
@pytest.mark.parametrize("guide", [NONE, GUIDED])
def test_derivatives_may_run_along_the_velocity_and_grow(
    slope: Slope, ramp: float, progress: float, guide: Guide
) -> None:
    for along in ("target", "velocity"):
        objective = several("dumo and average", slope=slope, along=along, ramp=ramp, guide=guide)
        net, b = Aimed(objective), replace(rows(objective), progress=progress)
        first = net(b.x_t, b.c, t=b.t, r=b.r)[0], net(b.x_t, b.null, t=b.t, r=b.r)[0]
        loss, parts = by_hand(objective, net, b, guided(b, guide, *first))
        found = objective.loss(net, Frozen(net), b)
        assert torch.allclose(found.loss, loss, rtol=1e-12, atol=0)
        for mine, hand in zip(gradients(found.loss, net), gradients(loss, net), strict=True):
            assert torch.allclose(mine, hand, rtol=1e-11, atol=1e-13)
    assert parts


@pytest.mark.parametrize("power", [0.75, 1.0])
@pytest.mark.parametrize("adaptive", [(0,), (1,), (2,), (0, 1, 2)])
def test_the_adaptive_metric_is_of_the_parts_that_have_it(power: float, adaptive: tuple[int, ...]) -> None:
    own = {"power": power, "floor": 0.1}
    parts = tuple(part.model_copy(update=own if i in adaptive else {}) for i, part in enumerate((V, U, M)))
    objective = several("dumo and average", parts=parts)
    net, b = Aimed(objective), rows(objective)
    loss, squares = by_hand(objective, net, b, b.v_t)
    found = objective.loss(net, Frozen(net), b)
    assert torch.allclose(found.loss, loss, rtol=1e-12, atol=0)
    assert all(torch.allclose(found.parts[key], value, rtol=1e-12, atol=0) for key, value in squares.items())
    for mine, hand in zip(gradients(found.loss, net), gradients(loss, net), strict=True):
        assert torch.allclose(mine, hand, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("slope", [CentralSlope(), DualSlope(), JvpSlope()], ids=lambda s: s.kind)
@pytest.mark.parametrize("guide", [NONE, GUIDED, Guide(omega=0.4, zeta=0.3, interval=Interval(high=0.7))])
def test_velocity_and_endpoint_alone_are_dumo_to_the_bit(slope: Slope, guide: Guide) -> None:
    """And with any third head: the parts of v and u are DuMo's, whatever r is."""
    fields = {"slope": slope, "guide": guide, "times": Beta(), "drop": 0.3}
    dumo, mine, more = DuMo(**fields), Several(parts=DUMO, **fields), Several(parts=(*DUMO, AveragePart()), **fields)
    net = nets()[0]
    one, two = (randomise(net.build(o.needs, (2,), 3)).double() for o in (dumo, more))
    one.load_state_dict({k: v for k, v in two.state_dict().items() if k in one.state_dict()})
    b = drawn(mine)
    expected, found = step(dumo, one, b), step(mine, one, b)
    assert torch.equal(expected.loss, found.loss)
    for a, c in zip(gradients(expected.loss, one), gradients(found.loss, one), strict=True):
        assert torch.equal(a, c)
    told = step(more, two, replace(b, r=b.t * 0.3))
    assert all(torch.equal(told.parts[name], expected.parts[name]) for name in ("v", "u"))


@each_set
@pytest.mark.parametrize("along", ["target", "velocity"])
@pytest.mark.parametrize("flow", [gaussian(GUIDED), gaussian(Guide(omega=0.2, zeta=0.9)), APART, PRODUCT])
def test_rests_at_the_flow(made_of: str, along: str, flow: Gaussian | Product) -> None:
    objective = several(made_of, guide=flow.guide, along=along)
    net, b = Exact(flow, objective.needs), record(objective, flow, 32)
    assert gradient(objective, net, b).abs().max() < 1e-10


@each_set
def test_descent_leads_back(made_of: str) -> None:
    """Near the flow the gradient is linear in the displacement; all eigenvalues are positive."""
    flow, objective = gaussian(), several(made_of)
    net, b = Exact(flow, objective.needs), record(objective, flow)
    columns = []
    for i in range(net.probe.numel()):
        net.probe.data = 1e-4 * torch.eye(net.probe.numel(), dtype=D)[i].view_as(net.probe)
        columns.append(gradient(objective, net, b).flatten() / 1e-4)
    assert torch.linalg.eigvals(torch.stack(columns, 1)).real.min() > 0.01


@pytest.mark.parametrize("third", [M, S], ids=lambda p: p.kind)
def test_without_a_step_an_aimed_head_learns_the_velocity(third: AveragePart | ShortcutPart) -> None:
    """Where r = t its gradient is flow matching's times its weight, as v's is."""
    objective = Several(parts=(V, U, third), times=HALF, guide=NONE, slope=JvpSlope())
    flow = gaussian()
    net, b = Exact(flow, objective.needs), record(objective, flow)
    net.probe.data = torch.tensor([0.3, -0.2], dtype=D).expand(3, 2).clone()
    grad = gradient(objective, net, replace(b, r=b.t, moving=None))
    assert grad[0].abs().min() > 0.01
    assert torch.allclose(grad[2] / third.weight, grad[0] / V.weight, rtol=1e-12)


OTHERS = Dyadic(levels=4, every=2, flow=Beta())


@pytest.mark.parametrize("times", [OTHERS, HALF, Pair(of=Uniform(), velocity_ratio=0.25)])
def test_heads_apart_learn_where_r_is_t_alone(times: Dyadic | Pair) -> None:
    """Each as if these rows were all; heads that are told r learn on every row as before."""
    objective = Several(parts=(V, U, S), times=times, guide=NONE, slope=JvpSlope())
    net, b = Aimed(objective), drawn(objective)
    alike, mine = (o.loss(net, Frozen(net), b) for o in (objective, objective.model_copy(update={"apart": True})))
    still = b.r == b.t
    heads = V.weight * mine.parts["v"] + U.weight * mine.parts["u"]
    assert torch.allclose(mine.loss - S.weight * mine.parts["m"], heads * still * len(b.t) / still.sum(), atol=1e-14)
    assert torch.allclose(alike.loss, heads + S.weight * mine.parts["m"], rtol=1e-14)
    assert torch.allclose((mine.loss - S.weight * mine.parts["m"]).mean(), heads[still].mean(), rtol=1e-12)


@pytest.mark.parametrize("flow", [gaussian(GUIDED), APART, PRODUCT])
def test_heads_apart_rest_at_the_flow(flow: Gaussian | Product) -> None:
    objective = Several(parts=(V, U, S), times=OTHERS, guide=flow.guide, slope=JvpSlope(), apart=True)
    net, b = Exact(flow, objective.needs), record(objective, flow, 32)
    assert gradient(objective, net, b).abs().max() < 1e-10


def test_the_paper_s_third_head_leaves_v_and_u_the_times_of_dumo() -> None:
    three = load("imagenet256-xl2-three-heads-shortcut").objective
    assert isinstance(three, Several)
    assert isinstance(three.times, Dyadic)
    assert three.apart
    assert three.times.flow == load("imagenet256-xl2").objective.times


COUNTS = [  # passes with gradients, and without
    (several("dumo and average", slope=CentralSlope()), 1, 2),  # one slope for all heads
    (several("dumo and average", slope=CentralSlope(), guide=GUIDED), 1, 3),  # null
    (several("dumo and average", slope=DualSlope()), 1, 0),  # a ride
    (several("dumo and average", slope=DualSlope(), guide=GUIDED), 1, 1),  # a tape; null
    (several("dumo and shortcut", slope=DualSlope()), 1, 2),  # halves
    (several("average", slope=DualSlope()), 2, 0),  # a ride of the rows with r < t, and the others
    (several("average", slope=JvpSlope()), 1, 1),
    (several("divergence", slope=JvpSlope()), 1, 2),  # and J e
    (several("shortcut", slope=CentralSlope()), 1, 2),  # no derivative, so no slope
]


@pytest.mark.parametrize(("objective", "graded", "still"), COUNTS)
def test_passes(objective: Several, graded: int, still: int) -> None:
    model = Counted(randomise(nets()[0].build(objective.needs, (2,), 3)).double())
    step(objective, model, drawn(objective))
    assert (model.graded, model.still) == (graded, still)


def test_halves_are_made_of_the_rows_that_move_alone() -> None:
    """By their place: a piece of a batch without any makes no pass for them."""
    objective = several("shortcut", times=Dyadic(levels=4, every=8))
    b, model = drawn(objective), Counted(randomise(nets()[0].build(objective.needs, (2,), 3)).double())
    step(objective, model, b[1:8])
    assert model.still == 0
    sizes = list[int]()
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    step(objective, model, b)
    assert sizes == [64, 8, 8]


def test_halves_are_those_of_theta_minus() -> None:
    """And of theta^- alone: with another one the target is another, of a step, and of a row without it is not."""
    objective = several("shortcut")
    net, ref, b = Aimed(objective), Aimed(objective), drawn(objective)
    ref.a.data.mul_(1.5)
    m, still = net(b.x_t, b.c, t=b.t, r=b.r)[1], b.r == b.t
    middle = (b.t + b.r) / 2
    one = ref(b.x_t, b.c, t=b.t, r=middle)[1]
    other = ref(b.x_t - column(b.t - middle) * one, b.c, t=middle, r=b.r)[1]
    target = torch.where(column(still), b.v_t, (one + other) / 2)
    assert torch.allclose(objective.loss(net, Frozen(ref), b).parts["m"], ((m - target) ** 2).sum(1) / 2, rtol=1e-12)


def test_readings_are_of_the_head_that_is_told_least() -> None:
    objective = several("all")
    net = Aimed(objective)
    x, c = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=D), torch.arange(5) % 4
    t, s = torch.full((5,), 0.8, dtype=D), torch.full((5,), 0.3, dtype=D)
    reads, (u, m, v, _) = objective.read(net), net(x, c, t=t, r=s)
    assert reads.velocity
    assert reads.endpoint
    assert reads.flow_map
    assert torch.equal(reads.velocity(x, t, c), v)
    assert torch.equal(reads.endpoint(x, t, c), x - column(t) * u)
    assert torch.allclose(reads.flow_map(x, t, s, c), x - 0.5 * m)
    average, shortcut = (several(made_of) for made_of in ("average", "shortcut"))
    net = Aimed(average)
    endpoint = average.read(net).endpoint
    assert endpoint
    assert torch.equal(endpoint(x, t, c), x - column(t) * net(x, c, t=t, r=0 * t)[1])
    assert shortcut.read(net).endpoint is None
    assert several("twice").read(net).flow_map is None


def test_needs() -> None:
    """r is no input that all heads share."""
    needs = several("all").needs
    assert (needs.inputs, needs.heads, needs.own) == (("t",), ("u", "m", "v", "s"), {"m": ("r",), "s": ("r",)})
    assert not Several(parts=DUMO).needs.own


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"parts": (V, AveragePart(name="v"))}, "'v' is that of two"),
        ({"parts": (U, M)}, "no part is of kind velocity"),
        ({"parts": ()}, "no part is of kind velocity"),
        ({"parts": (V, S), "times": Beta()}, "times 'beta'.*dyadic"),
        ({"parts": (V, S), "times": Pair(velocity_ratio=0)}, "times 'pair'"),
        ({"parts": (V, M), "times": Below(), "apart": True}, "apart: .*times 'below'.*apart=false"),
        ({"parts": (V, AveragePart(power=1)), "guide": Guide(zeta=0.5, fraction=0.5)}, "power=0"),
        ({"parts": (VelocityPart(power=1), U), "guide": Guide(zeta=0.5, fraction=0.5)}, "power=0"),
        ({"parts": ({"kind": "velocity", "contrast": 0.05, "power": 1}, U)}, "power=0, or contrast=0"),
        ({"parts": (V, M, G), "times": HALF}, "divergence.*probe.kind=signs"),
        ({"parts": (V, M), "probe": Signs()}, "divergence.*probe.kind=signs"),
        ({"parts": (V, M, G), "probe": Signs(), "times": HALF}, "both_ways=true"),
        ({"parts": (V, G), "probe": Signs(), "times": SETS["divergence"][1]}, "add a part of kind average"),
        ({"parts": ({"kind": "velocity", "weight": 0},)}, "weight"),
        ({"parts": ({"kind": "velocity", "name": "loss"},)}, "name"),
        ({"parts": ({"kind": "nonsense"},)}, "average.*endpoint.*shortcut.*velocity"),
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Several.model_validate(fields)


def test_defaults() -> None:
    """Sec. 4.3, first of its two; weights of the second and third head are ours, all else is DuMo's."""
    o, dumo = Several(), DuMo()
    assert [(p.kind, p.name, p.weight) for p in o.parts] == [
        ("velocity", "v", 0.7),
        ("endpoint", "u", 0.15),
        ("average", "m", 0.15),
    ]
    assert (o.drop, o.guide, o.slope, o.times) == (dumo.drop, dumo.guide, dumo.slope, Below(of=dumo.times))
