"""Pulls: each formula by hand, its rest where samples have the law of the data, which way it moves others, and what
training keeps.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from contract import test_draw, test_loss
from contract.case import Counted, nets, randomise, step
from dumo.config.load import load
from dumo.flow.draw import draw
from dumo.flow.drift import drift
from dumo.flow.guide import Guide
from dumo.flow.path import Linear
from dumo.flow.reverse import reversed_at
from dumo.flow.slope import DualSlope, JvpSlope
from dumo.flow.times import Beta
from dumo.nets import Net
from dumo.nets.dit import DiT
from dumo.objectives import Several
from dumo.objectives.part import AveragePart, EndpointPart, ShortcutPart, VelocityPart
from dumo.objectives.pull import Critic, Drift, Match, Pull, identity
from dumo.preflight.cost import forward_units
from dumo.run.train import train
from dumo.types import Frozen, Heads, Noised
from theory.exact import PRODUCT, D, Exact, Gaussian, Product, column, gaussian, gradient, growth, record
from theory.formula import Polynomial, gradients

PARTS = VelocityPart(weight=0.6), EndpointPart(weight=0.4)


def several(*pulls: Pull, **fields: object) -> Several:
    """DuMo with pulls."""
    given = {"parts": PARTS, "times": Beta(), "guide": Guide(), "slope": JvpSlope(), "drop": 0.3}
    return Several.model_validate({**given, "pulls": pulls, **fields})


def drawn(objective: Several, n: int = 16, progress: float = 1.0) -> Noised:
    """Rows as training draws them."""
    flow, g = gaussian(), torch.Generator().manual_seed(1)
    c = torch.arange(n) % flow.classes
    null = torch.full_like(c, flow.classes)
    return draw(objective, Linear(), flow.data(c, g), c, null, seed=0, step=0, progress=progress)


def added(objective: Several, net: torch.nn.Module, b: Noised) -> Tensor:
    """What the pulls add to the loss of each row."""
    return step(objective, net, b).loss - step(objective.model_copy(update={"pulls": ()}), net, b).loss


@pytest.mark.parametrize("progress", [0.3, 0.4, 1.0])
def test_match_by_hand(progress: float) -> None:
    objective = several(Match(weight=0.7, fit=0.2, after=0.4))
    net, b = Polynomial(3), drawn(objective, progress=progress)
    none, z, t = 0 * b.t, b.drawn["w.z"].to(D), b.drawn["w.t"].to(D)
    u = net(b.z, b.c, t=none + 1)[1]
    made = (b.z - u).detach()
    v, _, w = net(column(t) * z + column(1 - t) * made, b.c, t=t)
    gap, fit = (w - v).detach(), ((w - z + made) ** 2).sum(1) / 2
    pull = ((u - u.detach() + gap) ** 2).sum(1) / 2
    loss = 0.2 * fit + (0.7 * pull if progress >= 0.4 else 0)
    terms = step(objective, net, b)
    assert torch.allclose(terms.parts["w"], fit, rtol=1e-12, atol=0)
    assert torch.allclose(terms.notes["pull_w"], (gap**2).sum(1) / 2, rtol=1e-12, atol=0)
    assert torch.allclose(added(objective, net, b), loss, rtol=1e-9, atol=0)
    for mine, hand in zip(gradients(added(objective, net, b), net), gradients(loss, net), strict=True):
        assert torch.allclose(mine, hand, rtol=1e-9, atol=1e-13)


def test_match_by_identity_by_hand() -> None:
    """Samples see how w and v change along them, and no weight but that of u learns it."""
    objective = several(Match(weight=0.7, fit=0.2, after=0, alpha=1.2))
    net, b = Polynomial(3), drawn(objective)
    still = deepcopy(net).requires_grad_(False)
    z, t = b.drawn["w.z"].to(D), b.drawn["w.t"].to(D)
    made = b.z - net(b.z, b.c, t=0 * b.t + 1)[1]
    x_t = column(t) * z + column(1 - t) * made
    v, _, w = still(x_t, b.c, t=t)
    fit = ((net(x_t.detach(), b.c, t=t)[2] - z + made.detach()) ** 2).sum(1) / 2
    product = ((w - v) * (z - made - v) - 1.2 * (w - v) ** 2).sum(1) / 2
    distance = (column(t) * (z - made - v)).abs().sum(1).detach() / 2
    loss = 0.2 * fit + 0.7 * t**2 * product / distance
    terms = step(objective, net, b)
    assert torch.allclose(terms.notes["pull_w"], ((w - v) ** 2).sum(1) / 2, rtol=1e-12, atol=0)
    assert torch.allclose(added(objective, net, b), 0.2 * fit, rtol=1e-9, atol=0)
    for mine, hand in zip(gradients(added(objective, net, b), net), gradients(loss, net), strict=True):
        assert torch.allclose(mine, hand, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("alpha", "exact"), [(0.5, True), (1.2, False)])
def test_half_of_the_identity_is_the_slope_of_the_divergence(alpha: float, exact: bool) -> None:
    """Gaussian samples of any width; means over both noises, of which +-1 have the moments that matter."""
    s = torch.tensor(1.7, dtype=D, requires_grad=True)
    x, z = torch.tensor(list(product((1, -1), repeat=2)), dtype=D).T[:, :, None]
    for t in torch.tensor([0.2, 0.5, 0.9], dtype=D):
        x_t, v_of, w_of = t * z + (1 - t) * s * x, growth(torch.tensor(0.6, dtype=D), t), growth(s, t)
        (slope,) = torch.autograd.grad(((w_of - v_of) * x_t).square().mean(), s, retain_graph=True)
        loss = identity(w_of.detach() * x_t, v_of * x_t, z - s * x, alpha).mean()
        (found,) = torch.autograd.grad(loss, s)
        assert torch.isclose(2 * found, slope, rtol=1e-12) == exact


FLOWS = gaussian(), PRODUCT


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("alpha", [None, 1.2])
def test_match_rests_at_the_flow(flow: Gaussian | Product, alpha: float | None) -> None:
    """Row by row for v and u; for w on average only, which is the next test's."""
    objective = several(Match(after=0, alpha=alpha))
    b = record(objective, flow, 64)
    assert gradient(objective, Exact(flow, objective.needs), b)[:2].abs().max() < 1e-10


def test_the_head_of_samples_rests_at_the_flow() -> None:
    """The mean over noise, exactly: the gradient is of second order in both noises, of which +-1 have the moments."""
    objective = several(Match(), drop=0.0)
    four = torch.tensor(list(product((1, -1), repeat=2)), dtype=D)
    z, z_own = (column(a).expand(4, 2) for a in four.T)
    b = drawn(objective, 4)
    for t in (0.0, 0.3, 1.0):
        at = replace(b, z=z, c=0 * b.c, drawn={"w.z": z_own, "w.t": torch.full_like(b.t, t)})
        net = Exact(gaussian(), objective.needs)
        (left,) = torch.autograd.grad(step(objective, net, at).parts["w"].mean(), net.probe)
        assert left.abs().max() < 1e-12
        (left,) = torch.autograd.grad(
            step(objective, net, replace(at, drawn={**at.drawn, "w.z": z})).parts["w"].mean(), net.probe
        )
        assert left.abs().max() > 1e-3


class Wide(Exact):
    """The exact flow of data, but samples are `wide` times as wide, and w knows it."""

    wide = 1.0

    def forward(self, x: Tensor, c: Tensor, /, *, t: Tensor, **inputs: Tensor) -> Heads:
        heads = dict(zip(self.needs.heads, super().forward(x, c, t=t, **inputs), strict=True))
        assert isinstance(self.flow, Gaussian)
        std = self.wide * self.flow.std[c]
        heads["u"] = torch.where(column(t == 1), x - column(std) * x + self.probe[1, 1] * x, heads["u"])
        known = {"w": column(growth(std, t)) * x, "d": (1 - self.wide) * x * x}
        heads |= {name: known[name] for name in heads.keys() & known.keys()}
        return tuple(heads.values())


def width_gradient(objective: Several, wide: float, n: int = 256) -> float:
    """d loss of the pulls / d probe of u: above 0 where descent makes samples wider."""
    net, b = Wide(gaussian(), objective.needs), drawn(objective, n)
    net.wide = wide
    (grad,) = torch.autograd.grad(added(objective, net, b).mean(), net.probe)
    return grad[1, 1].item()


@pytest.mark.parametrize("alpha", [None, 1.0])
def test_match_moves_samples_of_another_width_back(alpha: float | None) -> None:
    objective = several(Match(weight=1.0, alpha=alpha), drop=0.0)
    assert width_gradient(objective, 1.5) < -1e-2
    assert abs(width_gradient(objective, 1.0)) < 1e-12
    assert width_gradient(objective, 0.6) > 1e-2


@pytest.mark.parametrize("progress", [0.3, 1.0])
def test_critic_by_hand(progress: float) -> None:
    critic = Critic(weight=0.7, fit=0.2, after=0.4, slopes=0.3, centre=0.1, floor=0.05)
    objective = several(critic)
    net, b = Polynomial(3), drawn(objective, progress=progress)
    none = 0 * b.t
    u = net(b.z, b.c, t=none + 1)[1]
    made = (b.z - u).detach()
    real, fake = (net(x, b.c, t=none)[2].mean(1) for x in (b.x, made))
    pairs = (1 + (fake - real).exp()).log()
    a, e = net.a[2], b.drawn["d.e"].to(D)
    steep = [((a[1] + 2 * a[3] * x) * e).mean(1)[::4].repeat_interleave(4) ** 2 for x in (b.x, made)]
    loss = 0.2 * (pairs + 0.1 * (real + fake.detach()) ** 2 + 0.3 * (steep[0] + steep[1]))
    g = column((fake - real).sigmoid()) * (a[1] + 2 * a[3] * made)
    up = (g / (g.square().mean(1, keepdim=True).sqrt() + 0.05)).detach()
    pull = 0.7 * ((u - u.detach() + up) ** 2).sum(1) / 2 if progress >= 0.4 else none
    terms = step(objective, net, b)
    assert torch.allclose(terms.parts["d"], pairs, rtol=1e-12, atol=0)
    assert torch.allclose(terms.notes["slopes_d"], steep[0] + steep[1], rtol=1e-10, atol=0)
    assert torch.allclose(terms.notes["margin_d"], real - fake, rtol=1e-12, atol=0)
    assert torch.equal(terms.notes["right_d"], (real > fake).to(D))
    assert torch.allclose(added(objective, net, b), loss, rtol=1e-9, atol=0)
    for mine, hand in zip(gradients(added(objective, net, b), net), gradients(loss + pull, net), strict=True):
        assert torch.allclose(mine, hand, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_reversal_is_the_same_whatever_the_loss_is_multiplied_by(scale: float) -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=D, requires_grad=True)
    out, tap = reversed_at(x, 0.5, 0.01)
    (grad,) = torch.autograd.grad((scale * (out.exp().sum(1) + tap)).sum(), x)
    g = 3 * x.detach().exp()
    rms = g.square().mean(1, keepdim=True).sqrt()
    assert torch.allclose(grad / scale, -2 * 0.5 / 3 * g / (rms + 0.01), rtol=1e-12)
    out, tap = reversed_at(x, 0.5, 0.01)
    (still,) = torch.autograd.grad((out * 0).sum() + tap.sum() + 0 * x.sum(), x)
    (alone,) = torch.autograd.grad(reversed_at(x, 0.5, 0.01)[0].exp().sum(), x)
    assert not still.any()
    assert not alone.any()  # of a part of the loss that is not this row's: a probe asks so


@pytest.mark.parametrize("flow", FLOWS)
def test_a_flat_critic_moves_nothing(flow: Gaussian | Product) -> None:
    objective = several(Critic(after=0, slopes=0))
    b = record(objective, flow, 64)
    assert not gradient(objective, Exact(flow, objective.needs), b)[:2].abs().max() > 1e-10


def test_a_critic_moves_samples_of_another_width_back() -> None:
    objective = several(Critic(weight=1.0, slopes=0), drop=0.0)
    assert width_gradient(objective, 1.5) < -1e-2
    assert abs(width_gradient(objective, 1.0)) < 1e-12
    assert width_gradient(objective, 0.6) > 1e-2


def test_drift_by_hand() -> None:
    """Row by row; classes do not meet, and what is brought to 1 is each group's."""
    x, y = torch.randn(2, 12, 3, generator=torch.Generator().manual_seed(0), dtype=D)
    c, radii = torch.tensor([0, 0, 1, 0, 1, 0, 2, 0, 0, 2, 2, 0]), (0.3, 1.0)
    found, sizes = drift(x, y, c, radii, 6)
    for first in (0, 6):
        own = range(first, first + 6)
        sees = {i: [j for j in own if j != i and c[j] == c[i]] for i in own}
        far = {(i, side, j): (x[i] - (x, y)[side][j]).norm() for i in own for side in (0, 1) for j in sees[i]}
        unit, total, mean = torch.stack([*far.values()]).mean(), torch.zeros(6, 3, dtype=D), torch.zeros((), dtype=D)
        for radius in radii:
            kernel = {key: (-d / unit / radius).exp() for key, d in far.items()}
            a = {
                (i, s, j): k
                / sum(v for (p, _, _), v in kernel.items() if p == i) ** 0.5
                / sum(v for (_, q, o), v in kernel.items() if (q, o) == (s, j)) ** 0.5
                for (i, s, j), k in kernel.items()
            }
            v = torch.zeros(6, 3, dtype=D)
            for i in own:
                for j, k in product(sees[i], sees[i]):
                    v[i - first] += a[i, 1, j] * a[i, 0, k] * (y[j] - x[k]) / unit * 3**0.5
            size = v.square().mean().sqrt()
            total, mean = total + v / size, mean + size / 2
        assert torch.allclose(found[first : first + 6], total, rtol=1e-9, atol=1e-12)
        assert torch.allclose(sizes[first : first + 6], mean.expand(6))


def test_drift_rests_where_samples_are_the_data() -> None:
    """To rounding; and a row that meets nobody stays where it is."""
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(0), dtype=D)
    v, size = drift(x, x, torch.arange(16) % 3, (0.02, 0.2), 8)
    assert v.abs().max() < 1e-9
    assert size.max() < 1e-12
    assert not drift(x, x + 1, torch.arange(16), (0.02, 0.2), 8)[0].any()


def test_drift_by_captions_is_drift_by_classes() -> None:
    """Whatever says which rows belong together."""
    x, y = torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(0), dtype=D)
    c = torch.arange(16) % 3
    one, other = (drift(x, y, told, (0.2,), 8)[0] for told in (c, torch.eye(3)[c].view(16, 3, 1)))
    assert torch.equal(one, other)


def test_drift_moves_samples_of_another_width_back() -> None:
    objective = several(Drift(weight=1.0, radii=(0.2, 0.5)), drop=0.0)
    assert width_gradient(objective, 1.5) < -1e-2
    assert width_gradient(objective, 0.6) > 1e-2
    with pytest.raises(ValueError, match="whole groups of 32"):
        step(objective, Exact(gaussian(), objective.needs), drawn(objective, 16))


def test_drift_by_itself_makes_no_pass_until_it_acts() -> None:
    objective = several(Drift(size=8), slope=DualSlope())
    for progress, graded in ((0.0, 1), (0.7, 2)):
        model = Counted(randomise(nets()[0].build(objective.needs, (2,), 3)).double())
        terms = step(objective, model, drawn(objective, progress=progress))
        assert (model.graded, model.still) == (graded, 0)
        assert ("force_g" in terms.notes) == (graded == 2)
    assert objective.needs.heads == ("v", "u")


LATE = Match(after=0.5)
EVERY = (Match(after=0.0, alpha=1.2), Critic(after=0.0), Drift(after=0.0, size=8))
CASES = [several(LATE, Critic(), slope=DualSlope()), several(*EVERY, slope=DualSlope())]
CONTRACT = [
    test_loss.test_loss_is_pure,
    test_loss.test_halves_of_the_loss_are_the_whole,
    test_loss.test_passes_never_depend_on_the_record,
    test_loss.test_every_parameter_gets_a_gradient,
    test_loss.test_reference_gets_no_gradient,
    test_loss.test_loss_serves_data_without_classes,
]


@pytest.mark.parametrize("law", CONTRACT)
@pytest.mark.parametrize("objective", CASES)
def test_the_contract_of_losses(law: Callable[[Several, Net], None], objective: Several) -> None:
    """As of every objective; of the smallest net."""
    law(objective, nets()[0])


@pytest.mark.parametrize(
    "law", [test_draw.test_shares_of_the_draw_are_the_whole, test_draw.test_draws_are_keyed_by_seed_and_step]
)
def test_the_contract_of_draws(law: Callable[[Several], None]) -> None:
    law(CASES[0])


def test_draws_of_pulls_are_their_own() -> None:
    """By the name of the pull: two of a kind draw other numbers, and what others draw is as without them."""
    objective = several(LATE, Match(name="w2"))
    b, plain = drawn(objective), drawn(several())
    assert b.drawn.keys() == {"w.z", "w.t", "w2.z", "w2.t"}
    assert (b.drawn["w.z"] != b.drawn["w2.z"]).all()
    assert torch.equal(b.x_t, plain.x_t)


@pytest.mark.parametrize(
    ("pulls", "before", "now"),
    [((LATE,), (2, 1), (3, 0)), ((LATE, Match(name="w2", after=0.2, alpha=1)), (3, 1), (5, 0))],
)
def test_passes(pulls: tuple[Pull, ...], before: tuple[int, int], now: tuple[int, int]) -> None:
    """One for the samples, with gradients only where something moves them, and one for each head."""
    objective = several(*pulls, slope=DualSlope())
    for progress, count in ((0.0, before), (0.7, now)):
        model = Counted(randomise(nets()[0].build(objective.needs, (2,), 3)).double())
        step(objective, model, drawn(objective, progress=progress))
        assert (model.graded, model.still) == count


def test_cost() -> None:
    """4 F before, 6 F from then on: the mean of both halves."""
    objective, plain = several(LATE, slope=DualSlope()), several(slope=DualSlope())
    assert objective.needs.phases == ((0.0, 0.5), (0.5, 0.5))
    units = [
        forward_units(
            DiT(width=32, depth=2, patch=2, attention=2).build(objective.needs, (1, 8, 8), 3), o, Linear(), (1, 8, 8)
        )
        for o in (objective, plain)
    ]
    assert units[0] - units[1] == pytest.approx(5, rel=0.06)


def test_a_pull_leaves_gauges_alone() -> None:
    """Heads come first, then gauges, in the net's answers."""
    parts = VelocityPart(variance=True), EndpointPart(variance=True)
    objective = several(LATE, parts=parts)
    net, b = Polynomial(3), drawn(objective)
    gauges = torch.rand(2, len(b.t), generator=torch.Generator().manual_seed(0), dtype=D)
    terms = objective.loss(lambda x, c, **at: (*net(x, c, **at), *gauges), Frozen(net), b)
    assert torch.equal(terms.notes["log_variance_v"], gauges[0])
    assert torch.equal(terms.notes["log_variance_u"], gauges[1])


def test_off_is_nothing() -> None:
    assert "pulls" not in Several().model_dump()
    assert Several().needs.phases == ((0.0, 1.0),)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"pulls": (Match(name="u"),)}, "'u' is that of two"),
        ({"parts": (PARTS[0], ShortcutPart()), "pulls": (Match(),)}, "endpoint or average"),
        ({"pulls": ({"kind": "match", "after": 1.5},)}, "after"),
        ({"pulls": ({"kind": "match", "t": {"low": -1}},)}, r"t is in \[0, 1\]"),
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Several.model_validate({"times": {"kind": "dyadic"}, **fields})


def test_samples_are_those_of_the_endpoint_that_is_read() -> None:
    """Of an average told r = 0."""
    objective = several(Match(after=0), parts=(AveragePart(), VelocityPart()))
    net, b = Polynomial(3), drawn(objective)
    seen: list[Tensor] = []
    objective.loss(lambda x, c, **at: (seen.append(x), net(x, c, **at))[1], Frozen(net), b)
    t, z = column(b.drawn["w.t"].to(D)), b.drawn["w.z"].to(D)
    (m, *_) = net(b.z, b.c, t=torch.ones_like(b.t), r=0 * b.t)
    assert torch.allclose(seen[-1], t * z + (1 - t) * (b.z - m), rtol=1e-12)


TINY = ["net.width=16", "net.depth=2", "train.batch=16", "train.steps=4", "train.save_every=2", "train.probe_every=2"]
PULLED = (
    "objective={kind: several, parts: [{kind: velocity}, {kind: endpoint}], times: {kind: beta}, guide: {}, "
    "pulls: [{kind: match}, {kind: critic}, {kind: drift, size: 8}]}"
)
RATES = "train.optimizer.heads=[{name: d, betas: [0, .9]}, {name: w, lr: .001}]"


def test_resumed_is_uninterrupted(tmp_path: Path) -> None:
    """From the step after which pulls act."""
    run, last = load("moons", [*TINY, PULLED, RATES]), tmp_path / "checkpoints/step-00000004"

    def end() -> list[bytes]:
        return [(last / f"{part}.safetensors").read_bytes() for part in ("net", "optimizer")]

    train(run, tmp_path)
    whole = end()
    train(run, tmp_path, step=2)
    assert end() == whole
