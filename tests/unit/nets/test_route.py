"""Routing: which tokens skip, that nothing else changes, the derivative through it, and its price."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dumo.config.load import load
from dumo.flow import dropout
from dumo.flow.dropout import keys, using
from dumo.flow.guide import Guide
from dumo.flow.noisy_batch import draw
from dumo.flow.path import Linear
from dumo.flow.slope import CentralSlope, DualSlope, JvpSlope, Slope
from dumo.nets.dit import DiT, Transformer
from dumo.nets.route import Route, TokenSplit
from dumo.objectives import DuMo
from dumo.run import flops
from dumo.run.net import meta_net
from dumo.testing.network import randomise
from dumo.types import Frozen, Heads, Needs, frozen
from unit.nets.given import Given, drawn, points

SHAPE, TOKENS = (3, 8, 8), 16
HALF = Route(share=0.5, first=1, last=2)  # half of the tokens past the second and the third of five blocks
TINY = DiT(patch=2, width=16, depth=5, attention=2, route=HALF)
VU, MF = Needs(heads=("v", "u")), Needs(inputs=("t", "r"), heads=("u",))
KEYS = keys(0, 0, 6)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "modern": {"modern": True},
    "preserved": {"magnitude": "preserved"},
    "texts": {"texts": Given()},
    "lean": {"checkpoint": True},
}
GUIDED = DuMo(guide=Guide(zeta=0.5), drop=0.0)


def tiny(needs: Needs = VU, **fields: Any) -> Transformer:  # noqa: ANN401
    """A net of random weights in float64, in training."""
    return drawn(TINY.model_copy(update=fields), needs, SHAPE)


def apart(a: Heads, b: Heads) -> float:
    """Relative distance."""
    return max(((p - q).norm() / q.norm()).item() for p, q in zip(a, b, strict=True))


def test_tokens_are_drawn_alike() -> None:
    """Each as often as others, and two of them together as chance has it: within five standard errors."""
    rows, n, through = 20_000, 16, 4
    split = TokenSplit(keys(0, 0, rows), n, through)
    assert torch.equal(torch.cat([split.processed, split.skipped], 1).sort(1).values, torch.arange(n).expand(rows, n))
    seen = torch.zeros(rows, n, dtype=torch.double).scatter(1, split.processed, 1.0)
    p, both = through / n, through * (through - 1) / (n * (n - 1))
    assert (seen.mean(0) - p).abs().max() < 5 * (p * (1 - p) / rows) ** 0.5
    pairs = (seen.mT @ seen / rows)[~torch.eye(n, dtype=torch.bool)]
    assert (pairs - both).abs().max() < 5 * (both * (1 - both) / rows) ** 0.5
    later = torch.zeros(rows, n, dtype=torch.double).scatter(1, TokenSplit(keys(0, 1, rows), n, through).processed, 1.0)
    assert ((seen * later).sum(1).mean() - through * p).abs() < 5 * (through * p / rows) ** 0.5  # the next step's


def test_what_is_parted_is_joined() -> None:
    split = TokenSplit(KEYS, TOKENS, 5)
    h = torch.randn(6, TOKENS, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(split.select(h)[2, 3], h[2, split.processed[2, 3]])
    assert torch.equal(split.merge(split.select(h), h), h)
    moved = split.merge(split.select(h) + 1, h) - h
    assert torch.allclose(moved.sum(1), torch.tensor(5.0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_what_its_tokens_make_alone(kind: str) -> None:
    """Row by row, by hand: the routed blocks on the row's own tokens, and nothing of the others."""
    net, (x, c, t) = tiny(**KINDS[kind]), points(6, SHAPE)
    split, seen = TokenSplit(KEYS, TOKENS, 8), dict[int, Tensor]()
    for i, block in enumerate(net.blocks):
        block.register_forward_hook(lambda _, args, out, i=i: seen.update({i: torch.stack([args[0], out])}))
    with using(KEYS):
        net(x, c, t=t)
    assert [seen[i].shape[2] for i in range(5)] == [16, 8, 8, 16, 16]
    assert seen[1].shape[1] == 6
    for row in range(6):
        there, skipping = split.processed[row], split.skipped[row]
        assert torch.equal(seen[1][0, row], seen[0][1, row, there])
        before, now = seen[0][1, row], seen[3][0, row]
        assert torch.equal(now[there], seen[2][1, row])
        assert torch.equal(now[skipping], before[skipping])


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_keep_their_places(kind: str) -> None:
    """Routed blocks alone are blind to skipping tokens: those may change at will. To the others they give the same."""
    net, (x, c, t) = tiny(first=0, route=Route(share=0.5, first=0, last=1), depth=2, **KINDS[kind]), points(6, SHAPE)
    split, out = TokenSplit(KEYS, TOKENS, 8), list[Tensor]()
    net.blocks[0].register_forward_hook(lambda _, __, h: out.append(h))
    patches = net._cut_patches(x, (4, 4)).clone()
    for row in range(6):
        patches[row, split.skipped[row]] += 1
    with using(KEYS):
        net(x, c, t=t)
        net(net._join_patches(patches, (4, 4)), c, t=t)
    with using(None):
        net(x, c, t=t)  # dense: the same tokens see more
    assert torch.equal(out[0], out[1])
    assert not torch.allclose(split.select(out[2]), out[0], atol=1e-3)


def test_rotary_places_go_with_their_tokens() -> None:
    """A net whose attention is cut to the tokens that go through: the same by a mask over all of them."""
    net = tiny(modern=True)
    g = torch.Generator().manual_seed(0)
    h, e = torch.randn(6, TOKENS, 16, generator=g).double(), torch.randn(6, 16, generator=g).double()
    tables = net._position_tables((4, 4), h.device)
    split, block = TokenSplit(KEYS, TOKENS, 8), net.blocks[1]
    some = block(split.select(h), e, *split.select_rotary(tables))
    for row in range(6):
        there = split.processed[row]
        alone = block(h[row : row + 1, there], e[row : row + 1], *(table[there] for table in tables))
        assert torch.allclose(some[row], alone[0], rtol=1e-10, atol=1e-12)


def test_all_passes_of_a_step_route_alike_and_sampling_is_dense() -> None:
    net, (x, c, t) = tiny(), points(6, SHAPE)
    some, dense = [4, 1], tiny(route=HALF.model_copy(update={"share": 0.0}))
    dense.load_state_dict(net.state_dict())
    with using(KEYS):
        plain = dense(x, c, t=t)[0]
    with using(KEYS):
        routed, again = net(x, c, t=t)[0], net(x, c, t=t)[0]
        with dropout.off():
            null = net(x, c, t=t)[0]
            with dropout.rows(some):
                both = net(x[some], c[some], t=t[some])[0]
        with dropout.rows(some), dropout.off():
            part = net(x[some], c[some], t=t[some])[0]
        still = net.eval()(x, c, t=t)[0]
    net.train()
    with dropout.off():
        none = net(x, c, t=t)[0]
    with using(keys(0, 1, 6)):
        later = net(x, c, t=t)[0]
    assert torch.equal(routed, again)
    assert torch.equal(routed, null)
    assert torch.equal(part, both)
    assert torch.allclose(part, routed[some], rtol=1e-10, atol=1e-12)
    assert torch.equal(still, plain)
    assert torch.equal(none, plain)
    assert not any(torch.allclose(routed, other, atol=1e-3) for other in (plain, later))
    with pytest.raises(RuntimeError, match=r"routing is in training mode without keys"):
        net(x, c, t=t)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("needs", [VU, MF], ids=["t", "t and r"])
def test_the_derivative_is_that_of_the_routed_net(kind: str, needs: Needs) -> None:
    """Riding, from the tape or by a pass of its own; torch's, and a difference's. Of the dense net it is another."""
    net, (x, c, t) = tiny(needs, **KINDS[kind]), points(6, SHAPE)
    rest = {"r": t / 3} if needs is MF else {}
    w = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()

    def slope(s: Slope, direction: Tensor | None = None) -> Heads:
        return s(net, Frozen(net), x, c, t=t, direction=direction, **rest)[1](w)

    with using(KEYS):
        exact = slope(JvpSlope())  # torch.func.jvp
        assert apart(slope(DualSlope()), exact) < 1e-12
        assert apart(slope(DualSlope(), w), exact) < 1e-12
        assert apart(slope(CentralSlope(h=1e-3)), exact) < 1e-3
    with using(None):
        assert apart(slope(DualSlope()), exact) > 1e-2


def test_a_guided_step_has_one_function() -> None:
    """Every pass of it, V(null) and the derivative too, has the same tokens; and its loss is that of torch's slope."""
    found, seen = list[tuple[float, Tensor]](), list[int]()
    x, c, _ = points(6, SHAPE)
    for slope in (DualSlope(), JvpSlope()):
        objective = GUIDED.model_copy(update={"slope": slope})
        net = tiny(objective.needs)
        net.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
        b = draw(objective, Linear(), x, c, 5, seed=0, step=0)
        with using(KEYS):
            loss = objective.loss(net, frozen(net), b).loss.sum()
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])))
    assert seen == [8] * 5  # with the tape, and V(null); and these with torch's slope
    (one, g), (other, h) = found
    assert one == pytest.approx(other, rel=1e-10)
    assert (g - h).norm() < 1e-10 * h.norm()


@pytest.mark.nightly
def test_a_guided_exact_step_of_xl_2_costs_less_than_two_thirds() -> None:
    """Counted: with half of the tokens past 23 of 28 blocks at most 0.62 of the dense step. A pass is as it was."""
    routed, dense = (load(f"imagenet256-xl2-{name}") for name in ("routed", "dual"))
    assert routed.net.model_dump()["route"]["share"] == 0.5
    units, passes = [], []
    for run in (routed, dense):
        given = meta_net(run), run.objective
        units.append(flops.forward_units(*given, run.path, (4, 32, 32)))
        passes.append(flops.forward_flops(*given, (4, 32, 32)))
    assert passes[0] == passes[1]
    assert units[0] / units[1] == pytest.approx(0.581, abs=0.001)


@pytest.mark.nightly
def test_what_is_counted_is_what_a_step_does() -> None:
    """By a few blocks, by all, and on numbers."""
    objective = GUIDED.model_copy(update={"slope": DualSlope()})
    spec = TINY.model_copy(update={"depth": 9})
    net = randomise(spec.build(objective.needs, SHAPE, 5))
    x, c, _ = points(4, SHAPE)
    b = draw(objective, Linear(), x.float(), c, 5, seed=0, step=0)

    def step() -> None:
        with using(keys(0, 0, 4)):
            objective.loss(net, frozen(net), b).loss.sum().backward()

    once = 4 * flops.forward_flops(net, objective, SHAPE)
    units = flops.forward_units(net, objective, Linear(), SHAPE, rows=4)
    assert [len(s.blocks) for s in flops.stretches(net)] == [1, 6, 2]
    assert flops.count_flops(step) / once == pytest.approx(units, rel=1e-12)


def test_it_has_no_weights() -> None:
    routed = TINY.build(VU, SHAPE, 5).state_dict()
    dense = TINY.model_copy(update={"route": None}).build(VU, SHAPE, 5).state_dict()
    assert routed.keys() == dense.keys()
