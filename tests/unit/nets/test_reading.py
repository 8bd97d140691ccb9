"""A transformer that reads texts: what it is told of them, and how its blocks look at them."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dumo.flow.guide import CFG, Guide
from dumo.flow.noisy_batch import draw
from dumo.flow.path import Linear
from dumo.flow.sampling import sample_with_noise
from dumo.flow.slope import CentralSlope, DualSlope, JvpSlope, Slope
from dumo.flow.solver import Euler, Restart, Solver
from dumo.nets.block import BlockSizes
from dumo.nets.dit import DiT, Transformer
from dumo.nets.text_rows import Rows
from dumo.nets.textblock import TextBlock
from dumo.objectives import DuMo
from dumo.testing.network import randomise
from dumo.types import Frozen, Needs, Spec
from unit.nets.given import Given, Labels, drawn, points

CLASSES, SHAPE = 5, (3, 4, 4)
VU = Needs(heads=("v", "u"))
MODERN: dict[str, Any] = {"modern": True}


def spec(texts: Spec | None = None, **options: object) -> DiT:
    """A tiny net that reads drawn texts."""
    tiny = DiT(patch=2, width=8, depth=2, attention=2)
    return tiny.model_copy(update={"texts": texts or Given(), **options})


def built(texts: Spec | None = None, **options: object) -> Transformer:
    """Its net."""
    return drawn(spec(texts, **options), VU)


def twins() -> tuple[Transformer, Transformer]:
    """A net of classes, and one that reads their labels as texts, whose tokens are silent as at the start."""
    of_classes = DiT(patch=2, width=8, depth=2, attention=2).build(VU, SHAPE, CLASSES)
    randomise(of_classes)
    assert of_classes.label is not None
    rows = tuple(map(tuple, of_classes.label.weight.tolist()))
    of_texts = spec(Labels(rows=rows)).build(VU, SHAPE, CLASSES)
    state = of_classes.state_dict()
    state["text.pool.weight"] = torch.eye(8)
    lacking, strange = of_texts.load_state_dict(state, strict=False)
    assert strange == ["label.weight"]
    assert not [name for name in lacking if not ("text" in name or "keys" in name or "query" in name or "read" in name)]
    return of_classes, of_texts


@pytest.mark.parametrize("slope", [CentralSlope(), DualSlope(), JvpSlope()], ids=lambda slope: slope.kind)
def test_where_texts_are_labels_a_loss_is_that_of_classes(slope: Slope) -> None:
    """Guided, captions dropped: the same numbers and gradients to the bit."""
    objective = DuMo(guide=Guide(zeta=0.8), drop=0.4, slope=slope)
    x, c = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.arange(16) % CLASSES
    b = draw(objective, Linear(), x, c, torch.full_like(c, CLASSES), seed=0, step=0)
    assert 0 < b.kept.sum() < 16
    nets = twins()
    terms = [objective.loss(net, Frozen(net), b) for net in nets]
    for one in terms:
        one.loss.sum().backward()
    assert torch.equal(terms[0].loss, terms[1].loss)
    others = dict(nets[1].named_parameters())
    for name, p in nets[0].named_parameters():
        if name != "label.weight":
            assert p.grad is not None
            other = others[name].grad
            assert other is not None
            assert torch.equal(p.grad, other), name


@pytest.mark.parametrize("solver", [Restart(), Euler()], ids=lambda solver: solver.kind)
def test_where_texts_are_labels_samples_are_those_of_classes(solver: Solver) -> None:
    """Guided by 4, in two steps."""
    how = partial(
        sample_with_noise, path=Linear(), solver=solver, c=torch.arange(6), nfe=2, seed=0, shape=SHAPE, indices=range(6)
    )
    one, other = (how(CFG(scale=4)(DuMo().readings(net), CLASSES))[1] for net in twins())
    assert one.std() > 0.1
    assert torch.equal(one, other)


@pytest.mark.parametrize("options", [{}, MODERN], ids=["plain", "modern"])
def test_padding_is_nothing(options: dict[str, Any]) -> None:
    x, c, t = points(6)
    short, long = (built(Given(room=room), **options) for room in (4, 16))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(short(x, c, t=t), long(x, c, t=t), strict=True))


def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """By hand: two heads of tokens (b, n, 8)."""
    mixed = torch.empty_like(q)
    for head in (slice(0, 4), slice(4, 8)):
        scores = (q[..., head] @ k[..., head].mT / 2).masked_fill(~mask[:, None], -torch.inf)
        mixed[..., head] = scores.softmax(-1) @ v[..., head]
    return mixed


def test_a_block_that_looks_across_by_hand() -> None:
    """Between attention to itself and the perceptron it adds what it finds among the tokens that are there."""
    block = TextBlock(BlockSizes(8, 2))
    randomise(block)
    g = torch.Generator().manual_seed(1)
    h, e, y = torch.randn(3, 5, 8, generator=g), torch.randn(3, 8, generator=g), torch.randn(3, 4, 8, generator=g)
    mask = torch.arange(4) < torch.tensor([[1], [3], [4]])
    first, second = block.modulations(e)
    h_1 = block.add_attention(h, first)
    k, v = block.keys.kv(y).chunk(2, -1)
    h_2 = h_1 + block.read(attended(block.query(h_1), k, v, mask))
    assert torch.allclose(block(h, e, y, mask), block.add_perceptron(h_2, second), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooled", [0, 7])
def test_every_token_that_is_there_matters_and_no_other(pooled: int) -> None:
    """Tokens by the blocks alone, where the vector is of an embedding of its own; or by their mean, too."""
    net, (x, _, t) = built(Given(pooled=pooled)), points(6)
    assert net.text is not None
    texts, c = net.text.texts, torch.full((6,), 2)  # of three tokens
    assert isinstance(texts, Rows)
    before = net(x, c, t=t)
    for token, matters in enumerate((True, True, True, False)):
        old = texts.tokens[2, token].clone()
        texts.tokens[2, token] += 1
        assert all(torch.equal(a, b) != matters for a, b in zip(net(x, c, t=t), before, strict=True))
        texts.tokens[2, token] = old


def test_texts_start_as_nothing() -> None:
    """adaLN-zero: blocks let the image through as it is, whatever the text."""
    net = spec().build(VU, SHAPE, CLASSES)
    g = torch.Generator().manual_seed(0)
    h, e, y = torch.randn(2, 4, 8, generator=g), torch.randn(2, 8, generator=g), torch.randn(2, 4, 8, generator=g)
    mask = torch.ones(2, 4, dtype=torch.bool)
    for block in net.blocks:
        assert torch.equal(block(h, e, y, mask), h)
