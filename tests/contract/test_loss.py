"""What every loss keeps, whatever the objective, its slope and its net: a pure function of the record, row by row."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields, replace
from itertools import cycle

import pytest
import torch
from torch import Tensor, nn

from contract.case import Counted, name, nets, objectives, one_each, randomise, step
from contract.outside import PlainNet
from dumo.flow.compatibility import MAX_GAIN
from dumo.flow.guide import Guide
from dumo.flow.noise import draw, path_velocity
from dumo.flow.path import Linear
from dumo.flow.slope import CentralSlope, DualSlope, JvpSlope
from dumo.flow.times import Uniform
from dumo.nets import Net
from dumo.objectives import DuMo, MeanFlow, Objective
from dumo.types import Frozen, NoisyBatch, UserError
from tiers import tiered

GUIDE = Guide(omega=0.7, zeta=0.4)
CLASSES = 3
SHAPE = (2, 4, 4)
FIRST = nets()[0]
N = 16  # two groups of the rows that any law keeps together
# By default, and with every pass that guidance has; those without a guide are the same twice.
ALL = list(dict.fromkeys([*objectives(drop=0.3), *objectives(guide=GUIDE, drop=0.3)]))
ONCE = one_each(guide=GUIDE, drop=0.3)
PAIRS = [*zip(ONCE, cycle((*nets(), PlainNet())), strict=False)]  # each objective with one net, by turns
each = pytest.mark.parametrize(("objective", "net"), PAIRS, ids=name)


def built(objective: Objective, net: Net, shape: tuple[int, ...] = SHAPE, classes: int = CLASSES) -> nn.Module:
    """A net of random weights in float64."""
    return randomise(net.build(objective.needs, shape, classes)).double()


def record(objective: Objective, n: int = N, shape: tuple[int, ...] = SHAPE, rows: slice = slice(None)) -> NoisyBatch:
    """Rows of a batch of n."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(n, *shape, generator=g, dtype=torch.float64)
    c = torch.arange(n) % CLASSES
    first = rows.start or 0
    return draw(
        objective,
        Linear(),
        x[rows],
        c[rows],
        CLASSES,
        seed=1,
        step=2,
        batch=n,
        first=first,
        progress=0.5,
        teacher=path_velocity,
    )


@each
def test_loss_parts_and_notes_are_one_number_per_row(objective: Objective, net: Net) -> None:
    terms = step(objective, built(objective, net), record(objective))
    assert terms.parts
    for row in (terms.loss, *terms.parts.values()):
        assert row.shape == (N,)
        assert row.isfinite().all()
    for row in (*terms.parts.values(), *(terms.loss,) * (not objective.needs.gauges)):  # a gauge's logarithm is added
        assert (row > 0).all()
    assert terms.loss.requires_grad
    for row in terms.notes.values():
        assert row.shape == (N,)
        assert row.isfinite().all()
        assert not row.requires_grad
    assert not terms.notes.keys() & {"loss", *terms.parts}  # they share a log


@each
def test_loss_is_pure(objective: Objective, net: Net) -> None:
    """Twice the same bits; the record, the weights and the global generator are left as they were."""
    model, b = built(objective, net), record(objective)
    tensors = {f.name: v for f in fields(b) if isinstance(v := getattr(b, f.name), Tensor)} | dict(b.drawn)
    before, weights = deepcopy(tensors), deepcopy(model.state_dict())
    state = torch.get_rng_state()
    one, two = step(objective, model, b), step(objective, model, b)
    assert torch.equal(one.loss, two.loss)
    assert all(torch.equal(part, two.parts[key]) for key, part in one.parts.items())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[key]) for key, v in tensors.items())
    assert all(torch.equal(v, weights[key]) for key, v in model.state_dict().items())


@each
def test_halves_of_the_loss_are_the_whole(objective: Objective, net: Net) -> None:
    model = built(objective, net)
    whole = step(objective, model, record(objective)).loss
    halves = [step(objective, model, record(objective, rows=slice(i, i + 8))).loss for i in (0, 8)]
    cut = [step(objective, model, record(objective)[i : i + 8]).loss for i in (0, 8)]
    assert torch.allclose(torch.cat(halves), whole, rtol=1e-9, atol=0)
    assert torch.allclose(torch.cat(cut), whole, rtol=1e-9, atol=0)


def altered(b: NoisyBatch) -> dict[str, NoisyBatch]:
    """The same rows, in every corner of the record, and so with any of them moving."""
    one, b = torch.ones_like(b.t), replace(b, moving=None)

    def at(t: Tensor, r: Tensor) -> NoisyBatch:
        return replace(b.at(t), r=r)

    return {
        "drawn": b,
        "all dropped": replace(b, c=b.null, kept=torch.zeros_like(b.kept)),
        "none dropped": replace(b, c=torch.zeros_like(b.c), kept=torch.ones_like(b.kept)),
        "data": at(0 * one, 0 * one),
        "noise": at(one, 0 * one),
        "noise, no step": at(one, one),
        "no step": at(b.t, b.t),
        "half": at(one / 2, one / 4),
        "times as bf16 has them": at(b.t.bfloat16().to(b.t), b.r.bfloat16().to(b.r)),
    }


@pytest.mark.parametrize("objective", tiered(ALL, now=ONCE, id=name))
def test_passes_never_depend_on_the_record(objective: Objective) -> None:
    """Under sharding, a rank that skips a pass stops all others."""
    counts, module = set(), built(objective, FIRST)
    for b in altered(record(objective)).values():
        model = Counted(module)
        terms = step(objective, model, b)
        assert terms.loss.isfinite().all()
        counts.add((model.graded, model.still))
    assert len(counts) == 1


GUIDED = Guide(zeta=0.5)
COUNTS = [  # passes with gradients, and without; test_cost counts those of further slopes and guides in operations
    (DuMo(guide=GUIDED, slope=CentralSlope()), 1, 3),  # t - h, t + h, null; V(c) is the graded pass itself
    (DuMo(guide=GUIDED, slope=JvpSlope()), 1, 2),  # null, and one differentiated
    (MeanFlow(slope=CentralSlope()), 1, 4),  # V(c) at r = t, null, t - h, t + h
    (MeanFlow(guide=Guide(omega=0.5, zeta=0.5), slope=CentralSlope()), 1, 3),  # null weighs nothing
    (MeanFlow(guide=Guide(omega=1.5), slope=CentralSlope()), 1, 3),  # V(c) weighs nothing
    (MeanFlow(slope=JvpSlope()), 1, 3),
    (MeanFlow(slope=DualSlope()), 2, 2),  # V(c), null; a ride of the rows with r < t, and the others
    (MeanFlow(slope=DualSlope(), times=Uniform()), 1, 2),  # all rows have r < t
]


@pytest.mark.parametrize(("objective", "graded", "still"), COUNTS)
def test_passes_are_as_many_as_documented(objective: Objective, graded: int, still: int) -> None:
    model = Counted(built(objective, nets()[0]))
    step(objective, model, record(objective))
    assert (model.graded, model.still) == (graded, still)


@each
def test_every_parameter_gets_a_gradient(objective: Objective, net: Net) -> None:
    model = built(objective, net)
    step(objective, model, record(objective)).loss.mean().backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key
        assert p.grad.any(), key


@each
def test_reference_gets_no_gradient(objective: Objective, net: Net) -> None:
    """theta^- as a copy, its weights asking for gradients, gives the same loss and gradients, and gets none."""
    model, b = built(objective, net), replace(record(objective), moving=None)  # or a ride makes two passes of one
    ref = deepcopy(model)

    def grads(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss.mean(), list(model.parameters())))

    one, two = objective.loss(model, Frozen(model), b), objective.loss(model, Frozen(ref), b)
    assert torch.equal(one.loss, two.loss)
    assert all(torch.equal(a, b) for a, b in zip(grads(one.loss), grads(two.loss), strict=True))
    objective.loss(model, Frozen(ref), b).loss.mean().backward()
    assert all(p.grad is None for p in ref.parameters())


@each
def test_targets_are_of_the_reference(objective: Objective, net: Net) -> None:
    """Passes without gradients are of theta^-, but for two of TwinFlow's: its velocity gap is of the weights as now."""
    model, ref = Counted(built(objective, net)), Counted(built(objective, net))
    objective.loss(model, Frozen(ref), replace(record(objective), moving=None))
    assert model.still == (2 if objective.kind == "twinflow" else 0)
    assert ref.graded == 0


@each
def test_loss_serves_data_without_classes(objective: Objective, net: Net) -> None:
    model = built(objective, net, classes=0)
    b = replace(record(objective), c=torch.zeros(N, dtype=torch.long), null=torch.zeros(N, dtype=torch.long))
    terms = step(objective, model, b)
    assert terms.loss.isfinite().all()
    terms.loss.mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("objective", ONCE, ids=name)
def test_loss_serves_points(objective: Objective) -> None:
    (mlp,) = (net for net in nets() if net.kind == "mlp")
    assert step(objective, built(objective, mlp, (2,)), record(objective, shape=(2,))).loss.isfinite().all()


def low(cast: Callable[[Tensor], Tensor], b: NoisyBatch) -> NoisyBatch:
    """The record with its data in another precision; times stay."""
    data = {key: cast(getattr(b, key)) for key in ("x", "z", "x_t", "v_t")}
    return replace(b, **data, t=b.t.float(), r=b.r.float(), drawn={key: v.float() for key, v in b.drawn.items()})


def refused(objective: Objective) -> bool:
    """Whether it takes a difference that rounding would outweigh."""
    by_slope = objective.kind != "alpha_flow" and isinstance(objective.needs.slope, CentralSlope)
    return by_slope or objective.needs.amplifies > MAX_GAIN


IN_BF16 = [(o, FIRST) for o in dict.fromkeys([*ONCE, *filter(refused, ALL)]) if o.needs.slope != JvpSlope()]
EACH_NET = [(DuMo(guide=GUIDE, slope=DualSlope()), net) for net in (*nets(), PlainNet())]


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "net"), [*IN_BF16, *EACH_NET], ids=name)
@pytest.mark.parametrize(
    "bf16_data", [pytest.param(False, id="fp32 data"), pytest.param(True, id="bf16 data", marks=pytest.mark.nightly)]
)
def test_bf16_is_served_or_refused(objective: Objective, net: Net, bf16_data: bool) -> None:
    """Exact slopes work in the corners of time under autocast; differences are refused, for they would be noise."""
    model = built(objective, net).float()
    for b in altered(record(objective)).values():
        b = low(lambda x: x.to(torch.bfloat16 if bf16_data else torch.float32), b)
        with torch.autocast("cpu", torch.bfloat16):
            if refused(objective):
                with pytest.raises(UserError, match="fp32"):
                    step(objective, model, b)
            else:
                loss = step(objective, model, b).loss
                assert loss.isfinite().all()
                loss.mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("objective", [o for o in ALL if refused(o)], ids=name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_differences_are_refused_below_fp32_without_autocast(objective: Objective, dtype: torch.dtype) -> None:
    model = built(objective, nets()[0]).to(dtype)
    b = low(lambda x: x.to(dtype), record(objective))
    b = replace(b, t=b.t.to(dtype), r=b.r.to(dtype), drawn={key: v.to(dtype) for key, v in b.drawn.items()})
    with pytest.raises(UserError, match="fp32"):
        step(objective, model, b)
