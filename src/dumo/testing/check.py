"""`check_objective` runs the tests of dumo's own objectives on an objective of the user."""

from collections.abc import Callable, Collection, Mapping

from dumo.flow.guide import Guide, Interval
from dumo.flow.slope import CentralSlope, DualSlope, JvpSlope
from dumo.objectives.base import ObjectiveSpec
from dumo.testing import properties
from dumo.testing.exact import APART, PLAIN, Head, gaussian
from dumo.testing.network import TinyNet, randomise
from dumo.testing.properties import CLASSES, SHAPE, PropertyError

# All kinds of guidance: with and without V(c) and V(null), and in an interval of times.
GUIDES = (
    PLAIN,
    Guide(zeta=0.55),
    Guide(omega=0.2, zeta=0.92, interval=Interval(low=0.1, high=0.75)),
    Guide(omega=0.5, zeta=0.5),
)

# Guidance that evaluates both V(c) and V(null).
EVERY_PASS = Guide(omega=0.7, zeta=0.4)


class CheckError(AssertionError):
    """An objective fails checks. `failures` maps the names of the properties to messages."""

    def __init__(self, kind: str, failures: Mapping[str, str]) -> None:
        lines = [f"- {name}: {message}" for name, message in failures.items()]
        super().__init__("\n".join([f"objective '{kind}' fails {len(failures)} of its checks:", *lines]))
        self.failures = dict(failures)


def check_objective(
    objective: ObjectiveSpec, *, skip: Collection[str] = (), heads: Mapping[str, Head] | None = None
) -> None:
    """Check the contract and the formulas of an objective in about a second. Raises CheckError.

        check_objective(Robust())
        check_objective(Robust(floor=0.1))      # call it for each setting; guidance is varied automatically
        check_objective(Steps(), skip=["gradient_vanishes_at_the_flow"])    # exact only up to its step size

    objective: the objective, with the settings to check. Finite differences are replaced with exact derivatives when
        it is compared with the exact flow.
    skip: names of properties that the objective does not have by design, which are the functions of
        `dumo.testing.properties`.
    heads: functions f(flow, x, c, t, r) that return the exact values of heads, by name (`dumo.testing.exact.HEADS`
        contains the usual names).

    Weights, constants and schedules from a paper cannot be checked.
    """
    failures: dict[str, str] = {}

    def check(property_: Callable[..., None], *arguments: object, **named: object) -> None:
        """Check a property and record a failure."""
        name = property_.__name__
        if name in skip or name in failures:
            return
        try:
            property_(*arguments, **named)
        except PropertyError as error:
            failures[name] = str(error)

    net = randomise(TinyNet(objective.needs, SHAPE, CLASSES)).double()
    b = properties.random_batch(objective, 2 * properties.group_rows(objective))

    # Check the spec and the shape of the loss, on which all other checks depend.
    check(properties.spec_is_a_value, objective)
    check(properties.loss_is_one_number_per_row, objective, net, b)
    if failures:
        raise CheckError(objective.kind, failures)

    # Use guidance from here on if the objective supports it, because it adds passes.
    is_guided = isinstance(objective.needs.guide, Guide)
    guided = objective.model_copy(update={"guide": EVERY_PASS}) if is_guided else objective

    # Check that the loss is a pure function of each row. Otherwise a backward pass may fail.
    check(properties.draws_are_keyed_by_row, guided)
    check(properties.loss_changes_nothing, guided, net, b)
    check(properties.loss_draws_nothing, guided, net, b)
    check(properties.loss_is_the_same_twice, guided, net, b)
    check(properties.rows_are_independent, guided, net)
    check(properties.passes_do_not_depend_on_the_batch, guided, net, b)
    if failures:
        raise CheckError(objective.kind, failures)

    # Check the gradients.
    check(properties.every_parameter_learns, guided, net, b)
    check(properties.targets_are_of_the_reference, guided, net, b)
    check(properties.one_pass_has_gradients, guided, net, b)
    check(properties.targets_have_no_gradient, guided, net, b)
    check(properties.guided_target_has_no_gradient, guided, net, b)

    # Check other data and precisions.
    net_without_classes = randomise(TinyNet(objective.needs, SHAPE, classes=0)).double()
    check(properties.data_without_classes_is_served, guided, net_without_classes, b)
    net_of_points = randomise(TinyNet(objective.needs, (2,), CLASSES)).double()
    check(properties.points_are_served, guided, net_of_points)
    if not isinstance(objective.needs.slope, JvpSlope):  # torch has no forward-mode derivative under autocast
        check(properties.bf16_is_served_or_refused, guided, net, b)

    # Check the functions that solvers call.
    check(properties.readings_make_one_pass_each, guided, net)
    check(properties.a_jump_of_no_time_stays, guided, net)

    # Check the formulas on exact flows, with and without guidance.
    if isinstance(objective.needs.slope, CentralSlope):
        objective = objective.model_copy(update={"slope": DualSlope()})
    for guide in GUIDES if is_guided else (PLAIN,):
        guided = objective.model_copy(update={"guide": guide}) if is_guided else objective
        flow = gaussian(guide) if guide.active or objective.needs.knobs else APART
        check(properties.gradient_vanishes_at_the_flow, guided, flow, heads)
        check(properties.descent_leads_back_to_the_flow, guided, flow, heads)
        check(properties.readings_are_those_of_the_flow, guided, flow, heads)

    if failures:
        raise CheckError(objective.kind, failures)
