"""What every net keeps: names in, names out, zero at the start, a null class, a gap for r, and smoothness in time."""

import pytest
import torch
from torch import Tensor

from contract.case import kind, nets
from dumo.flow.slope import DualSlope, JvpSlope
from dumo.nets import DiT, Net
from dumo.nets.unet import UNet
from dumo.objectives import MeanFlow
from dumo.testing.network import randomise
from dumo.types import Frozen, Needs
from dumo.types import Net as AnyNet
from unit.nets.given import Given

each = pytest.mark.parametrize("net", nets(), ids=kind)
SHAPE = (2, 4, 4)
RICH = Needs(inputs=("t", "r"), heads=("v", "u", "m"), gauges=("doubt", "trust"), knobs={"w": 1.0, "low": 0.0})
V, VU = (Needs(inputs=("t",), heads=heads) for heads in (("v",), ("v", "u")))
TINY = DiT(patch=2, width=8, depth=2, attention=2)
MODERN, KEPT, TEXTS = {"modern": True}, {"magnitude": "preserved"}, {"texts": Given()}
OPTIONS = ({}, MODERN, {"qk_norm": True}, KEPT, MODERN | KEPT, TEXTS, TEXTS | MODERN)
VARIANTS: list[tuple[Net, Needs]] = [
    *((TINY.model_copy(update={**some, "checkpoint": lean}), VU) for some in OPTIONS for lean in (False, True)),
    (TINY.model_copy(update={**TEXTS, "depth": 1}), VU),
    (TINY.model_copy(update={"depth": 5, "late": 3}), MeanFlow().needs),
    (UNet(width=8, multipliers=(1, 2), depth=2, attend=(4,), augment=2), Needs(heads=("v", "u"), gauges=("a",))),
    *((net, Needs(heads=("v", "u", "m"), own={"m": ("r",)})) for net in nets()),
]


def points(n: int = 6) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """x, c with the null class 3 among them, and every input of RICH."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, *SHAPE, generator=g)
    return x, torch.arange(n) % 4, {k: torch.rand(n, generator=g) for k in ("t", "r", "w", "low")}


@each
def test_outputs_come_in_the_order_of_the_needs(net: Net) -> None:
    x, c, inputs = points()
    model = net.build(RICH, SHAPE, 3)
    assert isinstance(model, AnyNet)
    randomise(model)
    v, u, m, doubt, trust = model(x, c, **inputs)
    assert v.shape == u.shape == m.shape == x.shape
    assert doubt.shape == trust.shape == (6,)
    for i, name in enumerate(RICH.heads):
        for p in model.heads[name].parameters():
            p.data.zero_()
        out = model(x, c, **inputs)
        assert not out[i].any()
        assert all(out[j].any() for j in range(i + 1, 5))


@each
def test_rows_do_not_see_each_other(net: Net) -> None:
    x, c, inputs = points()
    model = randomise(net.build(RICH, SHAPE, 3))
    whole = model(x, c, **inputs)
    row = model(x[2:3], c[2:3], **{k: s[2:3] for k, s in inputs.items()})
    assert all(torch.allclose(a[2:3], b, rtol=1e-4, atol=1e-5) for a, b in zip(whole, row, strict=True))


@each
def test_all_heads_and_gauges_start_at_zero_and_names_are_checked(net: Net) -> None:
    x, c, inputs = points()
    model = net.build(RICH, SHAPE, 3)
    assert not any(out.any() for out in model(x, c, **inputs))
    for wrong in ({}, {"t": inputs["t"]}, inputs | {"s": inputs["t"]}):
        with pytest.raises(TypeError, match="inputs t, r, w, low"):
            model(x, c, **wrong)


@each
@pytest.mark.parametrize("name", ["t", "r", "w", "low"])
def test_every_input_reaches_every_head(net: Net, name: str) -> None:
    x, c, inputs = points()
    model = randomise(net.build(RICH, SHAPE, 3))
    before, after = model(x, c, **inputs), model(x, c, **inputs | {name: inputs[name] + 0.3})
    assert all((a - b).abs().max() > 1e-5 for a, b in zip(before, after, strict=True))


@each
def test_r_enters_as_the_gap(net: Net) -> None:
    """With t's own embedding silenced, only t - r counts."""
    x, c, _ = points()
    model = randomise(net.build(Needs(inputs=("t", "r"), heads=("u",)), SHAPE, 3))
    for p in model.scalars.embedders["t"].parameters():
        p.data.zero_()
    t, r = torch.full((6,), 0.75), torch.full((6,), 0.25)
    (base,), (moved,), (wider,) = (model(x, c, t=t - s, r=r - q) for s, q in ((0, 0), (0.25, 0.25), (0, 0.25)))
    assert torch.equal(base, moved)
    assert not torch.allclose(base, wider)


@each
def test_classes_and_null_are_told_apart(net: Net) -> None:
    """Without classes labels do not matter."""
    x, c, inputs = points()
    model, alone = (randomise(net.build(V, SHAPE, classes)) for classes in (3, 0))
    outs = [model(x, torch.full((6,), c), t=inputs["t"])[0] for c in range(4)]
    for i in range(4):
        assert all(not torch.allclose(outs[i], outs[j]) for j in range(i))
    with pytest.raises(IndexError):
        model(x, torch.full((6,), 4), t=inputs["t"])
    assert torch.equal(alone(x, c, t=inputs["t"])[0], alone(x, 0 * c, t=inputs["t"])[0])
    assert not any("label" in name for name, _ in alone.named_parameters())


@each
def test_time_scale_is_a_unit_of_time(net: Net) -> None:
    x, c, inputs = points()
    slow, quick = (randomise(net.model_copy(update={"time_scale": s}).build(V, SHAPE, 3)) for s in (1.0, 10.0))
    assert torch.allclose(slow(x, c, t=10 * inputs["t"])[0], quick(x, c, t=inputs["t"])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("net", "needs"), VARIANTS)
def test_every_parameter_learns_and_slopes_are_exact(net: Net, needs: Needs) -> None:
    """Whatever the options; of what rides, what plays a tape, and where blocks are computed again."""
    augmented, g = isinstance(net, UNet) and bool(net.augment), torch.Generator().manual_seed(0)
    model = randomise(net.build(needs, SHAPE, 0 if augmented else 3)).double()
    (x, w), t = torch.randn(2, 6, *SHAPE, generator=g).double(), torch.rand(6, generator=g).double()
    c = x[:, :2, 0, 0] if augmented else torch.arange(6) % 4
    inputs = {name: t / 3 if name == "r" else t for name in needs.names}
    torch.stack([out.square().sum() for out in model(x, c, **inputs)]).sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    for direction in (None, w):
        slopes = JvpSlope(), DualSlope()
        exact, found = (s(model, Frozen(model), x, c, direction=direction, **inputs)[1](w) for s in slopes)
        assert all(((a - b).norm() / b.norm()).item() < 1e-12 for a, b in zip(found, exact, strict=True))
