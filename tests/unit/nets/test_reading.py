"""A transformer that reads texts: what it is told of them, and how its blocks look at them."""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from contract.case import randomise
from dumo.flow.draw import draw
from dumo.flow.guide import Guide
from dumo.flow.path import Linear
from dumo.flow.slope import CentralSlope, DualSlope, JvpSlope, Slope
from dumo.nets.dit import DiT, Transformer
from dumo.nets.text.rows import Texts, Told
from dumo.objectives import DuMo
from dumo.sampling.generate import solve
from dumo.sampling.guidance import CFG
from dumo.sampling.solver import Euler, Restart, Solver
from dumo.types import Cond, Frozen, Needs, Spec

CLASSES, SHAPE = 5, (3, 4, 4)
VU = Needs(heads=("v", "u"))
MODERN: dict[str, Any] = {"norm": "rms", "qk_norm": True, "mlp": "swiglu", "position": "rope"}
ways = pytest.mark.parametrize("way", ["cross", "joint"])


class Rows(Texts):
    """A table in memory."""

    tokens: Tensor
    mask: Tensor | None
    pooled: Tensor | None

    def __init__(self, tokens: Tensor, mask: Tensor | None = None, pooled: Tensor | None = None) -> None:
        super().__init__()
        for name, rows in (("tokens", tokens), ("mask", mask), ("pooled", pooled)):
            self.register_buffer(name, rows, persistent=False)
        self.width, self.length = tokens.shape[2], tokens.shape[1]
        self.pooled_width = 0 if pooled is None else pooled.shape[1]

    def forward(self, c: Cond) -> Told:
        mask, pooled = self.mask, self.pooled
        return self.tokens[c], None if mask is None else mask[c], None if pooled is None else pooled[c]

    def append(self, texts: object) -> int:
        raise NotImplementedError


class Given(Spec):
    """Drawn texts of one to `length` tokens, padded to `room`; the last is of no caption."""

    kind: Literal["given"] = "given"
    length: int = 4
    room: int = 4
    width: int = 6
    pooled: int = 0
    masked: bool = True

    def build(self, classes: int) -> Rows:
        """Numbers are the same whatever the room; the padding is not zero."""
        g, n = torch.Generator().manual_seed(3), classes + 1
        tokens, pooled = torch.randn(n, self.length, self.width, generator=g), torch.randn(n, self.pooled, generator=g)
        rest = torch.full((n, self.room - self.length, self.width), 7.0)
        lengths = torch.arange(n) % self.length + 1
        mask = torch.arange(self.room) < lengths[:, None]
        return Rows(torch.cat([tokens, rest], 1), mask if self.masked else None, pooled if self.pooled else None)


def spec(way: str, texts: Spec | None = None, **options: object) -> DiT:
    """A tiny net that reads drawn texts."""
    tiny = DiT(patch=2, width=8, depth=2, attention=2)
    return tiny.model_copy(update={"text": way, "texts": texts or Given(), **options})


def built(way: str, texts: Spec | None = None, **options: object) -> Transformer:
    """Its net in float64, every parameter drawn."""
    net = spec(way, texts, **options).build(VU, SHAPE, CLASSES)
    randomise(net)
    return net.double()


def points(n: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """x, c and t in float64; all captions and none."""
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(n, *SHAPE, generator=g).double(),
        torch.arange(n) % (CLASSES + 1),
        torch.rand(n, generator=g).double(),
    )


class Labels(Spec):
    """A table whose pooled rows are these numbers."""

    rows: tuple[tuple[float, ...], ...]
    room: int

    def build(self, classes: int) -> Rows:
        """Zeros are its tokens."""
        pooled = torch.tensor(self.rows)
        assert len(pooled) == classes + 1
        return Rows(torch.zeros(classes + 1, self.room, 1), pooled=pooled)


def twins(way: str) -> tuple[Transformer, Transformer]:
    """A net of classes, and one that reads their labels in the place of texts: of no tokens, or silent as at the start."""
    of_classes = DiT(patch=2, width=8, depth=2, attention=2).build(VU, SHAPE, CLASSES)
    randomise(of_classes)
    assert of_classes.label is not None
    rows = tuple(map(tuple, of_classes.label.weight.tolist()))
    of_texts = spec(way, Labels(rows=rows, room=0 if way == "joint" else 1)).build(VU, SHAPE, CLASSES)
    state = of_classes.state_dict()
    state["text.pool.weight"] = torch.eye(8)
    lacking, strange = of_texts.load_state_dict(state, strict=False)
    assert strange == ["label.weight"]
    assert not [name for name in lacking if not ("text" in name or "keys" in name or "query" in name or "read" in name)]
    return of_classes, of_texts


@ways
@pytest.mark.parametrize("slope", [CentralSlope(), DualSlope(), JvpSlope()], ids=lambda slope: slope.kind)
def test_where_texts_are_labels_a_loss_is_that_of_classes(way: str, slope: Slope) -> None:
    """Guided, captions dropped: the same numbers and gradients to the bit."""
    objective = DuMo(guide=Guide(zeta=0.8), drop=0.4, slope=slope)
    x, c = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.arange(16) % CLASSES
    b = draw(objective, Linear(), x, c, torch.full_like(c, CLASSES), seed=0, step=0)
    assert 0 < b.kept.sum() < 16
    nets = twins(way)
    terms = [objective.loss(net, Frozen(net), b) for net in nets]
    for one in terms:
        one.loss.sum().backward()
    assert torch.equal(terms[0].loss, terms[1].loss)
    others = dict(nets[1].named_parameters())
    for name, p in nets[0].named_parameters():
        if name != "label.weight":
            assert p.grad is not None
            assert torch.equal(p.grad, others[name].grad), name


@ways
@pytest.mark.parametrize("solver", [Restart(), Euler()], ids=lambda solver: solver.kind)
def test_where_texts_are_labels_samples_are_those_of_classes(way: str, solver: Solver) -> None:
    """Guided by 4, in two steps."""
    c, how = torch.arange(6), {"nfe": 2, "seed": 0, "shape": SHAPE, "indices": range(6)}
    one, other = (solve(CFG(scale=4)(DuMo().read(net), CLASSES), Linear(), solver, c, **how)[1] for net in twins(way))
    assert one.std() > 0.1
    assert torch.equal(one, other)


@ways
@pytest.mark.parametrize("options", [{}, MODERN], ids=["plain", "modern"])
def test_padding_is_nothing(way: str, options: dict[str, Any]) -> None:
    x, c, t = points()
    short, long = (built(way, Given(room=room), **options) for room in (4, 16))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(short(x, c, t=t), long(x, c, t=t), strict=True))


@ways
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("options", [{}, MODERN], ids=["plain", "modern"])
def test_slopes_are_exact(way: str, options: dict[str, Any], checkpoint: bool) -> None:
    """Of what rides, what plays a tape, and where blocks are computed again."""
    net = built(way, checkpoint=checkpoint, **options)
    x, c, t = points()
    w = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()

    def off(slope: Slope, toward: Tensor | None) -> float:
        exact, found = (s(net, Frozen(net), x, c, toward=toward, t=t)[1](w) for s in (JvpSlope(), slope))
        return max(((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True))

    assert max(off(DualSlope(), toward) for toward in (None, w)) < 1e-12
    assert off(CentralSlope(), None) < 1e-3


@ways
@pytest.mark.parametrize("options", [{}, {"depth": 1}, MODERN, {"checkpoint": True}], ids=str)
def test_every_parameter_learns(way: str, options: dict[str, Any]) -> None:
    net, (x, c, t) = built(way, **options), points()
    sum(head.square().sum() for head in net(x, c, t=t)).backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
