"""What does not fit an objective: rules that `dumo train`, `dumo sample` and `dumo.Flow` share.

Each function returns what is wrong as the first clause of a message, or None. The caller adds the way out, in the words
of its own settings. `picks_some_rows` answers by a truth value.

    path_problem          the kind of path
    climb_problem         jumps up to the noise; with the way out, which is a field of the objective
    guide_problem         a guide by a velocity that is never taught; with the way out, as above
    teacher_problem       a teacher's velocity, of which the objective learns nothing
    prior_problem         a teacher's velocity on some of the rows alone
    picks_some_rows       whether a share of a batch is some of its rows
    first_stage_problem   theta^- that must be the net of a first stage
    guidance_refusal      guidance while sampling
"""

from typing import NamedTuple

from dumo.flow.guide import GuidanceScale, Guide
from dumo.flow.reading import taught_readings
from dumo.types import Objective


def path_problem(objective: Objective, path: str) -> str | None:
    """The objective has no formulas for this kind of path."""
    paths = objective.needs.formulas.paths
    if path in paths:
        return None
    names = " or ".join(f"'{name}'" for name in paths)
    return f"objective '{objective.kind}' has its formulas for path {names}, not '{path}'"


def climb_problem(objective: Objective) -> str | None:
    """The objective's times make jumps up to the noise, and it has no formulas for them."""
    if not objective.times.climbs or objective.needs.formulas.climbs:
        return None
    return (
        f"objective.times.both_ways makes jumps up to the noise, for which objective '{objective.kind}' has no "
        "formulas: set objective.times.both_ways=false, or take objective.kind=f2d2 or meanflow"
    )


def guide_problem(objective: Objective) -> str | None:
    """The objective is guided by the net's velocity, and its times never teach it."""
    guide = objective.needs.guide
    reads_velocity = isinstance(guide, Guide) and guide.active and "r" in objective.needs.inputs
    is_taught = objective.times.teaches_velocity or taught_readings(objective).velocity is not None
    if not reads_velocity or is_taught:
        return None
    return (
        f"objective.guide reads the velocity of objective '{objective.kind}' at r = t, and all of objective.times have "
        f"r = 0: set objective.times.kind=pair or jumps, or {GuidanceScale().off}"
    )


def teacher_problem(objective: Objective) -> str | None:
    """The objective learns nothing of the velocity that a teacher gives."""
    if objective.needs.teacher.velocity != "no":
        return None
    return f"objective '{objective.kind}' learns from no velocity, so a teacher's says nothing to it"


def prior_problem(objective: Objective) -> str | None:
    """A teacher's velocity cannot answer some of the rows, and the data the others."""
    needs = objective.needs.teacher
    if needs.velocity == "may" and not needs.points:
        return None
    return f"objective '{objective.kind}' cannot learn from a teacher on some rows, and from the data on the others"


def picks_some_rows(share: float, batch: int) -> bool:
    """Whether this share of a batch, rounded to a row, is some of its rows, neither none nor all."""
    return 0 < round(share * batch) < batch


def first_stage_problem(objective: Objective) -> str | None:
    """Theta^- must be the net that training begins with, which nobody has named."""
    if objective.needs.ref != 1:
        return None
    return f"objective '{objective.kind}' with low learns from the net that training begins with"


class GuidanceRefusal(NamedTuple):
    """Why a net cannot be guided when it is sampled, in a clause, and what else to do; "": nothing."""

    reason: str
    instead: str


def guidance_refusal(
    objective: Objective,
    trained: GuidanceScale,
    *,
    set_knobs: str,
    model: str = "this model",
    train: str = "train",
) -> GuidanceRefusal | None:
    """Why a net is not guided when it is sampled: it was guided in training, or has no null condition.

    trained: how its target was guided in training.
    set_knobs: how the caller sets knobs.
    model, train: the net, and the command that trains it, for the message.
    """
    if trained.active:
        return GuidanceRefusal(trained.reason(model), f"or {train} with {trained.off}")
    if not objective.drop:
        return GuidanceRefusal(
            f"{model} never learned without a label, since objective.drop = 0", f"or {train} with objective.drop=0.1"
        )
    if objective.needs.knobs:
        return GuidanceRefusal(f"the knobs of objective '{objective.kind}' guide {model} already", f"and {set_knobs}")
    return None
