"""Every objective rests at the exact flow, and only there: the mean gradient vanishes, and descent leads back.

Net = exact flow + probe of 1 and of x_t on every head: constants alone would miss a flipped sign.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from contract.case import name, objectives
from dumo.flow.guide import Guide, Interval
from dumo.flow.slope import CentralSlope, JvpSlope
from dumo.flow.times import Pair
from dumo.objectives import MeanFlow
from dumo.objectives import Objective as AnyObjective
from dumo.testing import properties
from dumo.testing.exact import APART, ExactFlow, ExactNet, Gaussian, exact_batch, gaussian, gradient, table
from theory.exact import PRODUCT, falls, plane

NONE, DUMO = Guide(), Guide(zeta=0.55)
GUIDES = {  # by the word that stands in the name of a case
    "unguided": NONE,
    "zeta": DUMO,
    "both": Guide(omega=0.2, zeta=0.92),  # MeanFlow, XL/2
    "interval": Guide(omega=0.2, zeta=0.92, interval=Interval(low=0.1, high=0.75)),
    "no_null_pass": Guide(omega=0.5, zeta=0.5),
    "no_pass_of_c": Guide(omega=1.5),
}
Case = tuple[AnyObjective, ExactFlow]


# Compared over a step of finite length, they rest at the flow to its order only: tests/objectives holds them to that.
STEPS = {  # of a finite step, and so off the flow by an order of it: by kind, the test that says so
    "cmt": "test_the_flow_is_at_rest_on_its_own_trajectories",  # which the batch here has none of
    "consistency": "test_gradient_vanishes_with_the_step",
    "critic": "test_a_flat_critic_moves_nothing",  # whose head learns of samples, as those of other pulls
    "dmd2": "test_samples_are_at_rest_on_exact_mixtures",  # by the velocity of a teacher
    "drift": "test_drift_rests_where_samples_are_the_data",
    "freeflow": "test_it_rests_at_the_flow",  # whose head w learns of samples
    "imm": "test_it_rests_near_the_flow",
    "match": "test_it_rests_at_the_flow",
    "pi_flow": "test_it_rests_at_the_flow_to_the_order_of_its_guesses",
    "rcgm": "test_gradient_vanishes_with_the_step",
    "self_e": "test_predictions_of_gaussians_are_those_in_closed_form",  # which its guidance moves from the flow
    "shortcut": "test_only_the_first_doubling_is_off_and_by_the_order_of_its_step",
    "soflow": "test_gradient_vanishes_with_the_step",
    "tbsm": "test_it_rests_where_samples_are_the_data",  # on average over what a row meets
    "twinflow": "test_all_but_the_twin_rest_with_the_step",
}
# Their residual is bounded, turned or normalised, or they ask for a velocity elsewhere: not affine in v_t here.
BENT = ("facm", "sct", "tvm", "ucgm")
PLANAR = ("dumo", "flow_matching", "meanflow", "several")  # guided in one way by all: a velocity, jumps, and both


def serves(objective: AnyObjective, flow: ExactFlow, guide: Guide) -> bool:
    """Whether the flow is where this objective leads to, by its own guidance."""
    if objective.needs.knobs:  # they guide each row in a way of its own
        return isinstance(flow, Gaussian) and not flow.mean.any()
    return not guide.active or isinstance(objective.needs.guide, Guide)


def cases(*on: tuple[ExactFlow, Guide], exact: bool = True) -> list[Case]:
    """Every objective without a finite step, with each guide, on its flow; three quarters of the pairs have r < t."""
    every = [(o, flow, guide) for flow, guide in on for o in objectives(exact=exact, guide=guide, drop=0.2)]
    found = [(o, flow) for o, flow, guide in every if o.kind not in STEPS and serves(o, flow, guide)]
    spread = {"times": Pair(velocity_ratio=0.25)}
    return [(o.model_copy(update=spread) if isinstance(o.times, Pair) else o, flow) for o, flow in found]


def label(objective: AnyObjective, flow: ExactFlow) -> str:
    """Name of a case: the objective, and the mixture or the guide that makes its flow."""
    if flow is APART:
        words = ["apart"]
    elif flow is PRODUCT:
        words = ["product"]
    else:
        words = [word for word, guide in GUIDES.items() if guide == objective.needs.guide]
    return "-".join([name(objective), *words])


def each(some: list[Case]) -> pytest.MarkDecorator:
    """Parametrises over cases, by their names."""
    return pytest.mark.parametrize(("objective", "flow"), some, ids=[label(*case) for case in some])


ON_MIXTURES = cases((APART, NONE), (PRODUCT, NONE))
EVERY = [*cases(*((gaussian(guide), guide) for guide in GUIDES.values())), *ON_MIXTURES]
SOME = (None, NONE, DUMO)  # guides of two exact slopes, which are as one another
CLOSED = [(o, flow) for o, flow in EVERY if not isinstance(o.needs.slope, JvpSlope) or o.needs.guide in SOME]
RIDING = [  # a product of mixtures is slow, and shows no more than one
    (o, flow)
    for o, flow in EVERY
    if not isinstance(o.needs.slope, JvpSlope) and o.needs.guide in SOME and flow is not PRODUCT
]
IN_THE_PLANE = [
    (o, flow) for o, flow in cases((plane(DUMO), DUMO)) if o.kind in PLANAR and not isinstance(o.needs.slope, JvpSlope)
]
STEPPED = cases((gaussian(DUMO), DUMO), (APART, NONE), exact=False)
BY_DIFFERENCE = [(o, flow) for o, flow in STEPPED if isinstance(o.needs.slope, CentralSlope)]
STRAIGHT = [
    (o, flow) for o, flow in BY_DIFFERENCE if o.kind not in (*BENT, "imf")
]  # a difference may leave an interval


@each(CLOSED)
def test_gradient_vanishes_at_the_flow(objective: AnyObjective, flow: ExactFlow) -> None:
    """Measured: at most 1e-14, where the bar is 1e-10."""
    properties.gradient_vanishes_at_the_flow(objective, flow)


@each(STRAIGHT)
def test_gradient_vanishes_with_the_square_of_the_step(objective: AnyObjective, flow: ExactFlow) -> None:
    steps = [objective.model_copy(update={"slope": CentralSlope(h=h)}) for h in (0.04, 0.02, 0.01, 0.005)]
    left = [gradient(o, ExactNet(flow, o.needs), exact_batch(o, flow)).abs() for o in steps]
    moved = left[-1] > 1e-14  # a head without a derivative in its target rests exactly
    assert moved[-1].all()
    assert falls([size[moved] for size in left], 2)


@pytest.mark.slow
@each(RIDING)
def test_descent_leads_back_to_the_flow(objective: AnyObjective, flow: ExactFlow) -> None:
    properties.descent_leads_back_to_the_flow(objective, flow)


@each([(o, flow) for o, flow in RIDING if flow is APART and o.kind not in BENT])
def test_gradient_is_the_mean_over_the_slopes(objective: AnyObjective, flow: ExactFlow) -> None:
    """Targets are affine in v_t, so one slope and its mirror image about the mean pull apart equally."""
    objective = objective.model_copy(update={"power": 0.0} if "power" in type(objective).model_fields else {})
    net, b = ExactNet(flow, objective.needs), exact_batch(objective, flow)
    off = torch.randn(b.x.shape, generator=torch.Generator().manual_seed(5), dtype=b.x.dtype)
    one, other = (gradient(objective, net, replace(b, v_t=b.v_t + sign * off)) for sign in (1, -1))
    assert one.abs().max() > 1e-3
    assert (one + other).abs().max() < 1e-12


@pytest.mark.slow
def test_another_guidance_scale_is_not_at_rest() -> None:
    """A velocity guided too little is pulled one way, one guided too much the other."""
    for o, _ in [(o, flow) for o, flow in cases((gaussian(DUMO), DUMO)) if isinstance(o.needs.guide, Guide)]:
        flows = [gaussian(Guide(zeta=zeta)) for zeta in (0.3, 0.7)]
        little, much = (gradient(o, ExactNet(f, o.needs), exact_batch(o, f))[0, 1] for f in flows)
        assert little < -1e-3
        assert much > 1e-3


@pytest.mark.slow
def test_dropped_rows_learn_the_null_flow() -> None:
    """Rows without their label are not guided: a guide that moved them would move the fixed point."""
    for o, flow in cases((gaussian(DUMO), DUMO)):
        o = o.model_copy(update={"drop": 1.0})
        b = exact_batch(o, flow)
        assert not b.kept.any()
        assert gradient(o, ExactNet(flow, o.needs), b).abs().max() < 1e-12


@pytest.mark.nightly
@each(IN_THE_PLANE)
def test_gradient_vanishes_in_the_plane(objective: AnyObjective, flow: ExactFlow) -> None:
    """A mixture in two dimensions, guided: the flow by Runge and Kutta, to which the bar of 1e-10 applies."""
    assert gradient(objective, ExactNet(flow, objective.needs), exact_batch(objective, flow, 64)).abs().max() < 1e-10


def test_what_has_a_finite_step_is_held_to_its_order_elsewhere() -> None:
    kinds = {o.kind for o in objectives()}
    assert set(STEPS) | set(BENT) <= kinds
    tested = {o.kind for o, _ in CLOSED}
    assert tested | set(STEPS) == kinds
    for stepped, test in STEPS.items():
        assert f"def {test}(" in (Path(__file__).parents[1] / f"objectives/test_{stepped}.py").read_text()


def test_corners_of_time_are_in_the_record() -> None:
    b = exact_batch(MeanFlow(), gaussian())
    assert torch.equal(torch.stack([b.t[:3], b.r[:3]]), table([1.0, 0.0, 1.0], [0.0, 0.0, 1.0]))
