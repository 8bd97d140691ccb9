"""What every loss keeps, whatever the objective, its slope and its net: a pure function of the batch, row by row."""

from itertools import cycle

import pytest
import torch
from torch import nn

from contract.case import name, nets, objectives, one_each
from contract.outside import PlainNet
from dumo.flow.compatibility import MAX_GAIN
from dumo.flow.guide import Guide
from dumo.flow.slope import CentralSlope, DualSlope, JvpSlope
from dumo.flow.times import Uniform
from dumo.nets import Net
from dumo.objectives import DuMo, MeanFlow, Objective
from dumo.testing import properties
from dumo.testing.network import CountedNet, randomise
from dumo.testing.properties import CLASSES, SHAPE, loss_of, random_batch
from dumo.types import UserError
from tiers import tiered

GUIDE = Guide(omega=0.7, zeta=0.4)
FIRST = nets()[0]
# By default, and with every pass that guidance has; those without a guide are the same twice.
ALL = list(dict.fromkeys([*objectives(drop=0.3), *objectives(guide=GUIDE, drop=0.3)]))
ONCE = one_each(guide=GUIDE, drop=0.3)
PAIRS = [*zip(ONCE, cycle((*nets(), PlainNet())), strict=False)]  # each objective with one net, by turns
# Samples of the network, or a velocity beside the consistency, are trained as well.
SEVERAL_TRAINED_PASSES = ("critic", "drift", "facm", "freeflow", "match", "tvm", "twinflow")
each = pytest.mark.parametrize(("objective", "net"), PAIRS, ids=name)


def built(objective: Objective, net: Net, shape: tuple[int, ...] = SHAPE, classes: int = CLASSES) -> nn.Module:
    """A net of random weights in float64."""
    return randomise(net.build(objective.needs, shape, classes)).double()


@each
def test_loss_parts_and_notes_are_one_number_per_row(objective: Objective, net: Net) -> None:
    properties.loss_is_one_number_per_row(objective, built(objective, net), random_batch(objective))


@each
def test_loss_is_pure(objective: Objective, net: Net) -> None:
    """Twice the same bits; the batch, the weights and the global generator are left as they were."""
    model, b = built(objective, net), random_batch(objective)
    properties.loss_changes_nothing(objective, model, b)
    properties.loss_draws_nothing(objective, model, b)
    properties.loss_is_the_same_twice(objective, model, b)


@each
def test_halves_of_the_loss_are_the_whole(objective: Objective, net: Net) -> None:
    properties.rows_are_independent(objective, built(objective, net))


@pytest.mark.parametrize("objective", tiered(ALL, now=ONCE, id=name))
def test_passes_never_depend_on_the_record(objective: Objective) -> None:
    properties.passes_do_not_depend_on_the_batch(objective, built(objective, FIRST), random_batch(objective))


GUIDED = Guide(zeta=0.5)
COUNTS = [  # passes with gradients, and without; test_cost counts those of further slopes and guides in operations
    (DuMo(guide=GUIDED, slope=CentralSlope()), 1, 3),  # t - h, t + h, null; V(c) is the graded pass itself
    (DuMo(guide=GUIDED, slope=JvpSlope()), 1, 2),  # null, and one differentiated
    # Rows with r = t have a training pass of their own, which gives V(c). The others: V(c), null, t - h, t + h.
    (MeanFlow(slope=CentralSlope()), 2, 4),
    (MeanFlow(guide=Guide(omega=0.5, zeta=0.5), slope=CentralSlope()), 2, 3),  # null weighs nothing
    (MeanFlow(guide=Guide(omega=1.5), slope=CentralSlope()), 1, 3),  # V(c) weighs nothing
    (MeanFlow(slope=JvpSlope()), 2, 3),
    (MeanFlow(slope=DualSlope()), 2, 2),  # V(c), null; a ride of the rows with r < t, and the others
    (MeanFlow(slope=DualSlope(), times=Uniform()), 1, 2),  # all rows have r < t
]


@pytest.mark.parametrize(("objective", "graded", "still"), COUNTS)
def test_passes_are_as_many_as_documented(objective: Objective, graded: int, still: int) -> None:
    model = CountedNet(built(objective, nets()[0]))
    loss_of(objective, model, random_batch(objective))
    assert (model.graded, model.still) == (graded, still)


@each
def test_every_parameter_gets_a_gradient(objective: Objective, net: Net) -> None:
    properties.every_parameter_learns(objective, built(objective, net), random_batch(objective))


@each
def test_targets_are_of_the_reference(objective: Objective, net: Net) -> None:
    """Of TwinFlow two passes without gradients are of the weights in training: its velocity gap is of these.

    Of DMD2 all are: its samples, and their fake score. Of Self-E that of V(null) is.
    """
    still_passes = {"twinflow": 2, "dmd2": 4, "self_e": 1}.get(objective.kind, 0)
    model, b = built(objective, net), random_batch(objective)
    properties.targets_are_of_the_reference(objective, model, b, still_passes=still_passes)


@each
def test_targets_have_no_gradient(objective: Objective, net: Net) -> None:
    model, b = built(objective, net), random_batch(objective)
    properties.targets_have_no_gradient(objective, model, b)
    properties.guided_target_has_no_gradient(objective, model, b)
    if objective.kind not in SEVERAL_TRAINED_PASSES:
        properties.one_pass_has_gradients(objective, model, b)


@each
def test_loss_serves_data_without_classes(objective: Objective, net: Net) -> None:
    model = built(objective, net, classes=0)
    properties.data_without_classes_is_served(objective, model, random_batch(objective))


@pytest.mark.parametrize("objective", ONCE, ids=name)
def test_loss_serves_points(objective: Objective) -> None:
    (mlp,) = (net for net in nets() if net.kind == "mlp")
    properties.points_are_served(objective, built(objective, mlp, (2,)))


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
    dtype = torch.bfloat16 if bf16_data else torch.float32
    for b in properties.altered_batches(random_batch(objective)).values():
        b = properties.cast_batch(b, dtype)
        with torch.autocast("cpu", torch.bfloat16):
            if refused(objective):
                with pytest.raises(UserError, match="fp32"):
                    loss_of(objective, model, b)
            else:
                loss = loss_of(objective, model, b).loss
                assert loss.isfinite().all()
                loss.mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("objective", [o for o in ALL if refused(o)], ids=name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_differences_are_refused_below_fp32_without_autocast(objective: Objective, dtype: torch.dtype) -> None:
    model = built(objective, nets()[0]).to(dtype)
    b = properties.cast_batch(random_batch(objective), dtype, times=dtype)
    with pytest.raises(UserError, match="fp32"):
        loss_of(objective, model, b)
