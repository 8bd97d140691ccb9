"""What an objective cannot be combined with, although training or sampling would run without an error.

Each `require_...` raises UserError with the whole message: the value, the rule, and the field of a run or the argument
of `dumo.Flow` that fixes it. `dumo.Flow`, `dumo.config.check_spec`, the trainer and the losses of objectives call
them, so a combination is refused in the same words wherever it is asked for.

    require_precision, require_precise_passes, require_precise_weights    16 bits, if rounding is amplified
    require_path, require_times                                           formulas and times of the objective
    require_teacher, require_teacher_share, require_unguided_teacher      what is learned from a teacher
    require_same_data                                                     a teacher of other data
    require_first_stage                                                   theta^- of a second stage
    require_labels                                                        objectives that compare rows of one label
    require_conditions                                                    conditions without classes= or null=
    require_guidable, require_names                                       guidance and knobs while sampling

`why_unguided` says why a model cannot be guided. `without_drop` changes an objective for a network that has no null
condition.
"""

from collections.abc import Collection, Mapping
from math import isinf
from typing import Any, cast

import torch
from torch import Tensor, nn

from dumo.flow.adapter import Condition, ConditionRows, Null, is_labels
from dumo.flow.guide import CFG, GuidanceScale, Guide
from dumo.flow.precision import HALVES, precision_of
from dumo.flow.reading import available_readings
from dumo.runtime import dist
from dumo.types import Needs, NoisyBatch, Objective, UserError

# The largest factor by which a loss may multiply the rounding of its network below fp32. bf16 rounds the network's
# output by 2^-8 of it, and 20 times that is 8 % of the loss's residual.
MAX_GAIN = 20

# ------------------------------------------------------------------------------------------------------------ precision


def require_precision(precision: str, gain: float, kind: str) -> None:
    """Refuse passes of this precision if they are too coarse for objective `kind`.

    `gain` is the largest factor by which the objective multiplies the rounding of the network at any time of the
    training; infinite: without bound. A gain above MAX_GAIN needs fp32, also if it is reached for a while only, as by
    alpha-Flow while alpha is strictly between 0 and 1.
    """
    if gain > MAX_GAIN and precision != "fp32":
        times = "without bound" if isinf(gain) else f"by up to {gain:g}"
        raise UserError(
            f"objective '{kind}' needs precision fp32, not {precision}, because it multiplies the rounding of the "
            f"network {times}: set train.precision=fp32 (in dumo.Flow precision='fp32' and weights in float32), a "
            "longer step of the objective, or objective 'meanflow' with slope 'dual'"
        )


def require_precise_passes(noised: NoisyBatch, gain: float, kind: str) -> None:
    """Refuse passes on this batch in the precision that holds now, as `require_precision` does."""
    require_precision(precision_of(noised.x_t), gain, kind)


def require_precise_weights(objective: Objective, net: nn.Module) -> None:
    """Refuse a network that computes with weights of 16 bits, if the objective amplifies rounding."""
    dtypes: set[torch.dtype | None] = {p.dtype for p in net.parameters()}
    for part in dist.sharded_parts(net):
        # There is no public way to the policy of FSDP2.
        dtypes.add(part._get_fsdp_state()._mp_policy.param_dtype)  # noqa: SLF001
    for dtype in HALVES:
        if dtype in dtypes:
            weights = f"weights in {str(dtype).removeprefix('torch.')}"
            require_precision(weights, objective.needs.amplifies, objective.kind)


# ------------------------------------------------------------------------------------------------------- path and times


def require_path(objective: Objective, path: str) -> None:
    """Refuse a kind of path for which the objective has no formulas."""
    paths = objective.needs.formulas.paths
    if path in paths:
        return
    names = " or ".join(f"'{name}'" for name in paths)
    fix = f"set path.kind={paths[0]} (dumo.Flow(path=...)), or take objective.kind=dumo"
    if path == "diffusion":  # a pretrained network knows no other path
        fix = "take another objective, such as objective.kind=dumo"
    raise UserError(f"objective '{objective.kind}' has its formulas for path {names}, not '{path}': {fix}")


def require_times(objective: Objective) -> None:
    """Refuse jumps for which the objective has no formulas, and times that never teach what its guide reads."""
    if objective.times.climbs and not objective.needs.formulas.climbs:
        raise UserError(
            f"objective.times.both_ways makes jumps up to the noise, for which objective '{objective.kind}' has no "
            "formulas: set objective.times.both_ways=false, or take objective.kind=f2d2 or meanflow"
        )
    guide = objective.needs.guide
    reads_velocity = isinstance(guide, Guide) and guide.active and "r" in objective.needs.inputs
    is_taught = objective.times.teaches_velocity or available_readings(objective).velocity is not None
    if reads_velocity and not is_taught:
        raise UserError(
            f"objective.guide reads the velocity of objective '{objective.kind}' at r = t, and all of objective.times "
            f"have r = 0: set objective.times.kind=pair or jumps, or {GuidanceScale().off}"
        )


# -------------------------------------------------------------------------------------------------- teacher and theta^-


def require_teacher(objective: Objective, *, gives_velocity: bool, gives_trajectories: bool = False) -> None:
    """Refuse an objective without the teacher that it learns from, and a velocity that it would ignore."""
    needs = objective.needs.teacher
    if needs.points and not gives_trajectories:
        raise UserError(
            f"objective '{objective.kind}' learns from a teacher's trajectories, which only dumo train makes: set "
            "teacher.source to the folder of a run that has a velocity, and teacher.pairs={count: 8192}"
        )
    if not needs.points and needs.velocity == "must" and not gives_velocity:
        raise UserError(
            f"objective '{objective.kind}' learns from a teacher's velocity: set teacher.source to the folder of a run "
            "that has one, and teacher.pairs=null (dumo.Flow(teacher=...))"
        )
    if needs.velocity == "no" and gives_velocity:
        raise UserError(
            f"objective '{objective.kind}' does not use the velocity of a teacher: set teacher=null, or teacher.pairs "
            "(in dumo.Flow leave out teacher=)"
        )


def require_teacher_share(
    share: float, batch: int, objective: Objective, *, gives_velocity: bool, field: str = "prior"
) -> None:
    """Refuse a share of the rows that no teacher answers, that the objective cannot mix with data, or that is no row.

    `field`: the name of the share, for the message.
    """
    needs = objective.needs.teacher
    if not gives_velocity or needs.velocity != "may" or needs.points:
        raise UserError(
            f"{field} = {share:g} is a share of the rows that a teacher's velocity answers, and objective "
            f"'{objective.kind}' has no such teacher, or cannot learn from data beside it: set teacher={{kind: base}} "
            f"(dumo.Flow(teacher=...)) with objective.kind=dumo, or {field}=null"
        )
    if not 0 < round(share * batch) < batch:
        raise UserError(
            f"{field} = {share:g} of a batch of {batch} rows is no row, or all of them: change {field} or the batch"
        )


def require_unguided_teacher(objective: Objective, scale: float, field: str = "teacher.guide.scale") -> None:
    """Refuse to guide the target of an objective whose teacher is guided at `scale` already.

    `field`: what sets the teacher's guidance, for the message.
    """
    guidance = training_guidance(objective.needs)
    if scale != 1 and guidance is not None:
        raise UserError(
            f"{guidance.field} would guide what teacher.guide has guided, at scale {scale:g}: set {field}=1, or train "
            f"with {guidance.off}"
        )


def require_same_data(teacher: str, teacher_facts: Mapping[str, object], facts: Mapping[str, object]) -> None:
    """Refuse a teacher of other data. Facts have the same names for the teacher and for the student.

    `teacher`: its name, for the message.
    """
    differences: list[str] = []
    for field, value in facts.items():
        if teacher_facts[field] != value:
            differences.append(f"{field} is {teacher_facts[field]} there, {value} here")
    if differences:
        raise UserError(
            f"{teacher} knows other data: {'; '.join(differences)}. Take a teacher trained on this data, or set these "
            "fields as they are there"
        )


def require_first_stage(objective: Objective, *, has_first_stage: bool) -> None:
    """Refuse an objective whose theta^- is the network of a first stage, if nobody names it."""
    if objective.needs.ref == 1 and not has_first_stage:
        raise UserError(
            f"objective '{objective.kind}' with low learns from the network that training begins with: set "
            "start.source to a run of all times, train.ref=1, and in train.ema {decay: 1} as the last (in dumo.Flow "
            "ref= a copy of that network)"
        )


def require_labels(objective: Objective, *, has_coupling: bool) -> None:
    """Refuse conditions other than labels, if rows of one label are compared."""
    if objective.needs.compares_rows or has_coupling:
        subject = "coupling=" if has_coupling else f"objective '{objective.kind}'"
        raise UserError(
            f"{subject} compares rows of one label, and c is not a label: give labels and classes=, or take another "
            "objective without coupling="
        )


def require_conditions(
    c: Condition, classes: int, null: Null, *, waits: bool = False, may_be_null: bool = False
) -> None:
    """Refuse conditions of `dumo.Flow` that would be ignored, or taken for others.

    waits: whether to read labels on a GPU, which must be waited for; those on a CPU always are.
    may_be_null: whether a label may be the one that means none, as it may if the network is read.
    """
    if c is None:
        if classes or null is not None:
            raise UserError("classes= and null= are for conditions, and there are none: give c, or leave them out")
    elif is_labels(c):
        labels = cast(Tensor, c)
        if not classes:
            raise UserError("c are labels, which would be ignored: give dumo.Flow(net, classes=...)")
        if waits or labels.device.type == "cpu":
            out_of_range = labels[(labels < 0) | (labels >= classes + may_be_null)]
            if len(out_of_range):
                raise UserError(
                    f"label {int(out_of_range[0])} with classes = {classes}: labels are 0 to {classes - 1}, and "
                    f"{classes} means none"
                )
    elif classes:
        raise UserError(f"classes = {classes} are for labels of integers (b,), and c is not: give c as such")
    else:
        rows = ConditionRows.of(c, null)
        require_names("null", rows.null, rows.rows, "c")


# ------------------------------------------------------------------------------------------------------------- guidance


def training_guidance(needs: Needs) -> GuidanceScale | None:
    """How an objective guides its target in training; None if it does not."""
    guidance = GuidanceScale.of(needs)
    # A guide may act although its effective scale is 1.
    is_guided = needs.guide.active if isinstance(needs.guide, Guide) else guidance.active
    if is_guided:
        return guidance
    # iMF draws its scale at random up to objective.w, and has knobs only then.
    return GuidanceScale(field="objective.w", off="objective.w=null") if needs.knobs else None


def why_unguided(
    objective: Objective, trained: GuidanceScale, *, has_null: bool, model: str = "this model", train: str = "train"
) -> str | None:
    """Why a model cannot be guided while sampling, and what else to do, as the end of a sentence; None if it can.

    trained: how its target was guided in training.
    has_null: whether it has classes or other conditions, and a null condition among them.
    model, train: the model, and the command that trains it, for the message.
    """
    if not has_null:
        return (
            f"{model} has no classes or other conditions to guide by: train with them (in dumo.Flow classes= or null=)"
        )
    if trained.active:
        return f"{trained.reason(model)}: {train} with {trained.off}"
    if not objective.drop:
        return f"{model} never learned without a label, since objective.drop = 0: {train} with objective.drop=0.1"
    if objective.needs.knobs:
        return (
            f"the knobs of objective '{objective.kind}' guide {model} already: set sample.knobs (in dumo.Flow knobs=)"
        )
    return None


def require_guidable(
    guide: CFG,
    objective: Objective,
    trained: GuidanceScale,
    *,
    has_null: bool,
    field: str = "guidance",
    model: str = "this model",
    train: str = "train",
) -> None:
    """Refuse guidance of a model that is guided already or has no null condition.

    `field`: what asks for the guidance, for the message. The others are those of `why_unguided`.
    """
    reason = why_unguided(objective, trained, has_null=has_null, model=model, train=train) if guide.active else None
    if reason:
        raise UserError(f"{field} = {guide.scale:g}: {reason}, or set {field}=1")


def require_names(field: str, names: Collection[str], known: Collection[str], objective: str) -> None:
    """Refuse knobs or heads of an unknown name, which would do nothing."""
    for name in names:
        if name not in known:
            valid = ", ".join(known) or f"none: set {field}={{}}"
            raise UserError(f"{field}.{name}: objective '{objective}' has no '{name}'; valid: {valid}")


def without_drop(objective: Objective) -> Objective:
    """A copy of the objective that drops no condition and guides its target by none.

    Guidance needs what the network makes of no condition, which it learns from dropped ones. A network without a null
    condition gets neither. iMF keeps its knobs, but they guide nowhere: if V(null) is V(c), its v* settles at the
    unguided velocity.
    """
    fields = dict(objective)
    changed: dict[str, Any] = {}
    if fields.get("drop"):
        changed["drop"] = 0.0
    guide = fields.get("guide")
    if isinstance(guide, Guide) and guide.active:
        changed["guide"] = Guide()
    if isinstance(objective.needs.guide, int | float) and "scale" in fields:
        changed["scale"] = 1.0
    return objective.model_copy(update=changed)
