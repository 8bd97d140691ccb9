"""`check_objective` runs on anybody's objective what dumo's own tests run on each of dumo's."""

from collections.abc import Callable, Collection, Mapping

from dumo.flow.guide import Guide, Interval
from dumo.flow.slope import CentralSlope, DualSlope, JvpSlope
from dumo.objectives.base import ObjectiveSpec
from dumo.testing import properties
from dumo.testing.exact import APART, PLAIN, Head, gaussian
from dumo.testing.network import TinyNet, randomise
from dumo.testing.properties import CLASSES, SHAPE, PropertyError

# Guidance of every kind: with V(c) and without, with V(null) and without, and in an interval of times.
GUIDES = (
    PLAIN,
    Guide(zeta=0.55),
    Guide(omega=0.2, zeta=0.92, interval=Interval(low=0.1, high=0.75)),
    Guide(omega=0.5, zeta=0.5),
)

EVERY_PASS = Guide(omega=0.7, zeta=0.4)  # of V(c) and of V(null)


class CheckError(AssertionError):
    """An objective lacks properties: `failures` says by the name of each what was found."""

    def __init__(self, kind: str, failures: Mapping[str, str]) -> None:
        lines = [f"- {name}: {message}" for name, message in failures.items()]
        super().__init__("\n".join([f"objective '{kind}' fails {len(failures)} of its checks:", *lines]))
        self.failures = dict(failures)


def check_objective(
    objective: ObjectiveSpec, *, skip: Collection[str] = (), heads: Mapping[str, Head] | None = None
) -> None:
    """Check that an objective keeps its contract, and that its formulas hold. It takes about a second.

        check_objective(Robust())
        check_objective(Robust(floor=0.1))      # each option needs a call of its own; guidance is tried by itself
        check_objective(Steps(), skip=["gradient_vanishes_at_the_flow"])    # it is at the flow only up to its step

    objective: with the options to check. A slope that is a difference is replaced by an exact one at the exact flow.
    skip: the names of properties that the objective lacks by design. They are the functions of
        `dumo.testing.properties`.
    heads: by the names of heads, f(flow, x, c, t, r), what they are at the exact flow (`dumo.testing.exact.HEADS`
        has those of usual names).

    What only a paper states, such as weights, constants and schedules, it cannot know. Raises CheckError.
    """
    failures: dict[str, str] = {}

    def check(property_: Callable[..., None], *arguments: object, **named: object) -> None:
        """Run the check of a property, and note how it fails."""
        name = property_.__name__
        if name in skip or name in failures:
            return
        try:
            property_(*arguments, **named)
        except PropertyError as error:
            failures[name] = str(error)

    net = randomise(TinyNet(objective.needs, SHAPE, CLASSES)).double()
    b = properties.random_batch(objective, 2 * properties.group_rows(objective))

    # Check the objective as a value, and the shape of its loss. All that follows rests on these.
    check(properties.spec_is_a_value, objective)
    check(properties.loss_is_one_number_per_row, objective, net, b)
    if failures:
        raise CheckError(objective.kind, failures)

    # From here on, guide where that is possible: it takes further passes.
    is_guided = isinstance(objective.needs.guide, Guide)
    guided = objective.model_copy(update={"guide": EVERY_PASS}) if is_guided else objective

    # Check that the loss is a pure function of each row, without which a backward pass may fail.
    check(properties.draws_are_keyed_by_row, guided)
    check(properties.loss_changes_nothing, guided, net, b)
    check(properties.loss_draws_nothing, guided, net, b)
    check(properties.loss_is_the_same_twice, guided, net, b)
    check(properties.rows_are_independent, guided, net)
    check(properties.passes_do_not_depend_on_the_batch, guided, net, b)
    if failures:
        raise CheckError(objective.kind, failures)

    # Check what the gradient reaches.
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

    # Check what a solver reads.
    check(properties.readings_make_one_pass_each, guided, net)
    check(properties.a_jump_of_no_time_stays, guided, net)

    # Check the formulas at flows that are known exactly, unguided and guided.
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
