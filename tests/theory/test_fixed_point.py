"""Every objective rests at the exact flow, and only there: the mean gradient vanishes, and descent leads back.

Net = exact flow + probe of 1 and of x_t on every head: constants alone would miss a flipped sign.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from contract.case import members, name, objectives
from theory.exact import APART, PRODUCT, Exact, Flow, gaussian, gradient, plane, record, table

from dumo.flow.guide import Guide, Interval
from dumo.flow.slope import Central
from dumo.flow.times import Pair
from dumo.objectives import Objective

NONE, DUMO = Guide(), Guide(zeta=0.55)
GUIDES = {
    "none": NONE,
    "dumo": DUMO,
    "meanflow": Guide(omega=0.2, zeta=0.92),
    "window": Guide(omega=0.2, zeta=0.92, interval=Interval(low=0.1, high=0.75)),
    "no null pass": Guide(omega=0.5, zeta=0.5),
    "no pass of c": Guide(omega=1.5),
}
PAIRED = {cls for cls in members(Objective) if isinstance(cls.model_fields["times"].default, Pair)}
Case = tuple[Any, Flow]


def cases(flow: Flow, guide: Guide, note: str, *, exact: bool) -> Iterator[Any]:
    """Every objective with this guide, on this flow; three quarters of the pairs have r < t."""
    for o in objectives(exact=exact, guide=guide, drop=0.2):
        spread = {"times": Pair(velocity_ratio=0.25)} if type(o) in PAIRED else {}
        yield pytest.param(o.model_copy(update=spread), flow, id=f"{name(o)}-{note}")


ON_GAUSSIANS = [case for note, g in GUIDES.items() for case in cases(gaussian(g), g, note, exact=True)]
ON_MIXTURES = [
    case for f, note in ((APART, "means"), (PRODUCT, "product")) for case in cases(f, NONE, note, exact=True)
]
IN_THE_PLANE = list(cases(plane(DUMO), DUMO, "plane", exact=True))
BY_DIFFERENCE = [
    case
    for f, g, note in ((gaussian(DUMO), DUMO, "dumo"), (APART, NONE, "means"), (PRODUCT, NONE, "product"))
    for case in cases(f, g, note, exact=False)
    if isinstance(getattr(case.values[0], "slope", None), Central)
]


@pytest.mark.parametrize(("objective", "flow"), ON_GAUSSIANS + ON_MIXTURES)
def test_gradient_vanishes_at_the_flow(objective: Any, flow: Flow) -> None:
    """Measured: at most 1e-14, where the bar is 1e-10."""
    assert gradient(objective, Exact(flow, objective.needs), record(objective, flow)).abs().max() < 1e-12


@pytest.mark.parametrize(("objective", "flow"), BY_DIFFERENCE)
def test_gradient_vanishes_with_the_square_of_the_step(objective: Any, flow: Flow) -> None:
    steps = [objective.model_copy(update={"slope": Central(h=h)}) for h in (0.04, 0.02, 0.01, 0.005)]
    left = [gradient(o, Exact(flow, o.needs), record(o, flow)).abs() for o in steps]
    moved = left[-1] > 1e-14  # a head without a derivative in its target rests exactly
    assert moved[-1].all()
    assert moved.sum() == 2
    for coarse, fine in pairwise(left):
        assert ((coarse[moved] / fine[moved]).log2() - 2).abs().max() < 0.1


@pytest.mark.parametrize(("objective", "flow"), ON_GAUSSIANS + ON_MIXTURES)
def test_descent_leads_back_to_the_flow(objective: Any, flow: Flow) -> None:
    """Near the flow the gradient is linear in the displacement of the heads; all its eigenvalues are positive."""
    net, b = Exact(flow, objective.needs), record(objective, flow)
    columns = []
    for i in range(net.probe.numel()):
        net.probe.data = 1e-4 * torch.eye(net.probe.numel(), dtype=net.probe.dtype)[i].view_as(net.probe)
        columns.append(gradient(objective, net, b).flatten() / 1e-4)
    pull = torch.stack(columns, 1)
    assert pull.diag().min() > 0.1
    assert torch.linalg.eigvals(pull).real.min() > 0.1


@pytest.mark.parametrize(("objective", "flow"), ON_MIXTURES)
def test_gradient_is_the_mean_over_the_slopes(objective: Any, flow: Flow) -> None:
    """Targets are affine in v_t, so one slope and its mirror image about the mean pull apart equally."""
    objective = objective.model_copy(update={"power": 0.0} if "power" in type(objective).model_fields else {})
    net, b = Exact(flow, objective.needs), record(objective, flow)
    off = torch.randn(b.x.shape, generator=torch.Generator().manual_seed(5), dtype=b.x.dtype)
    one, other = (gradient(objective, net, replace(b, v_t=b.v_t + sign * off)) for sign in (1, -1))
    assert one.abs().max() > 1e-3
    assert (one + other).abs().max() < 1e-12


def test_another_guidance_scale_is_not_at_rest() -> None:
    """A velocity guided too little is pulled one way, one guided too much the other."""
    for o in objectives(exact=True, guide=DUMO, drop=0.2):
        flows = [gaussian(Guide(zeta=zeta)) for zeta in (0.3, 0.7)]
        little, much = (gradient(o, Exact(f, o.needs), record(o, f))[0, 1] for f in flows)
        assert little < -1e-2
        assert much > 1e-2


def test_dropped_rows_learn_the_null_flow() -> None:
    """Rows without their label are not guided: a guide that moved them would move the fixed point."""
    for o in objectives(exact=True, guide=DUMO, drop=1.0):
        flow = gaussian(DUMO)
        b = record(o, flow)
        assert not b.kept.any()
        assert gradient(o, Exact(flow, o.needs), b).abs().max() < 1e-12


@pytest.mark.parametrize(("objective", "flow"), IN_THE_PLANE)
def test_gradient_vanishes_in_the_plane(objective: Any, flow: Flow) -> None:
    """A mixture in two dimensions, guided: the flow by Runge and Kutta, to which the bar of 1e-10 applies."""
    assert gradient(objective, Exact(flow, objective.needs), record(objective, flow, 64)).abs().max() < 1e-10


def test_corners_of_time_are_in_the_record() -> None:
    b = record(next(iter(objectives())), gaussian())
    assert torch.equal(torch.stack([b.t[:3], b.r[:3]]), table([1.0, 0.0, 1.0], [0.0, 0.0, 1.0]))
