"""Refuse combinations with an objective that would otherwise train or sample incorrectly without an error.

Each `require_...` raises a UserError that names the value, the rule, and the field of a run or the argument of
`dumo.Flow` to change. `dumo.Flow`, `dumo.config.check_spec`, the trainer and the objectives' losses call them.

    require_precision, require_precise_passes, require_precise_weights    precisions below fp32
    require_path, require_times                                           paths and times without formulas
    require_teacher, require_teacher_share, require_unguided_teacher      teachers
    require_same_data                                                     a teacher of other data
    require_first_stage                                                   theta^- of a second stage
    require_labels                                                        objectives that compare rows of one label
    require_independent_noise                                             objectives that noise tied to data biases
    require_conditions                                                    conditions without classes= or null=
    require_guidable, require_names                                       guidance and knobs while sampling

`why_unguided` returns the reason why a model cannot be guided. `without_drop` adapts an objective to a network without
a null condition.
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
from dumo.flow.times import Groups
from dumo.runtime import dist
from dumo.types import Needs, NoisyBatch, Objective, UserError

# The largest factor by which a loss may amplify the rounding error of a network below fp32. The relative rounding error
# of bf16 is 2^-8, and 20 times that is 8 % of the loss's residual.
MAX_GAIN = 20

# ------------------------------------------------------------------------------------------------------------ precision


def require_precision(precision: str, gain: float, kind: str) -> None:
    """Refuse passes of this precision if it is too low for objective `kind`.

    gain: the largest factor, possibly infinite, by which the objective amplifies the network's rounding error during
        training. A gain above MAX_GAIN needs fp32, also if it is reached temporarily, as in alpha-Flow while alpha is
        strictly between 0 and 1.
    """
    if gain > MAX_GAIN and precision != "fp32":
        times = "without bound" if isinf(gain) else f"by up to {gain:g}"
        raise UserError(
            f"objective '{kind}' needs precision fp32, not {precision}, because it amplifies the network's rounding "
            f"error {times}: set train.precision=fp32 (in dumo.Flow precision='fp32' and weights in float32), a "
            "longer step of the objective, or objective 'meanflow' with slope 'dual'"
        )


def require_precise_passes(noised: NoisyBatch, gain: float, kind: str) -> None:
    """Refuse passes on this batch in the current precision, as `require_precision`."""
    require_precision(precision_of(noised.x_t), gain, kind)


def require_precise_weights(objective: Objective, net: nn.Module) -> None:
    """Refuse a network that computes with 16-bit weights, if the objective amplifies rounding errors."""
    dtypes: set[torch.dtype | None] = {p.dtype for p in net.parameters()}
    for part in dist.sharded_parts(net):
        # FSDP2 has no public accessor for its mixed-precision policy.
        dtypes.add(part._get_fsdp_state()._mp_policy.param_dtype)  # noqa: SLF001
    for dtype in HALVES:
        if dtype in dtypes:
            weights = f"weights in {str(dtype).removeprefix('torch.')}"
            require_precision(weights, objective.needs.amplifies, objective.kind)


# ------------------------------------------------------------------------------------------------------- path and times


def require_path(objective: Objective, path: str) -> None:
    """Refuse a path for which the objective has no formulas."""
    paths = objective.needs.formulas.paths
    if path in paths:
        return
    names = " or ".join(f"'{name}'" for name in paths)
    fix = f"set path.kind={paths[0]} (dumo.Flow(path=...)), or use objective.kind=dumo"
    # The path of a pretrained diffusion network is fixed.
    if path == "diffusion":
        fix = "use another objective, such as objective.kind=dumo"
    raise UserError(f"objective '{objective.kind}' is defined for path {names}, not '{path}': {fix}")


def require_times(objective: Objective) -> None:
    """Refuse jumps for which the objective has no formulas, and times at which its guide's velocity is not trained."""
    if objective.times.climbs and not objective.needs.formulas.climbs:
        raise UserError(
            f"objective.times.both_ways adds jumps towards the noise, for which objective '{objective.kind}' has no "
            "formulas: set objective.times.both_ways=false, or use objective.kind=f2d2 or meanflow"
        )
    guide = objective.needs.guide
    reads_velocity = isinstance(guide, Guide) and guide.active and "r" in objective.needs.inputs
    is_trained = objective.times.trains_velocity or available_readings(objective).velocity is not None
    if reads_velocity and not is_trained:
        raise UserError(
            f"objective.guide needs the velocity of objective '{objective.kind}' at r = t, but objective.times only "
            f"have r = 0: set objective.times.kind=pair or jumps, or {GuidanceScale().off}"
        )


# -------------------------------------------------------------------------------------------------- teacher and theta^-


def require_teacher(objective: Objective, *, gives_velocity: bool, gives_trajectories: bool = False) -> None:
    """Refuse a missing teacher, and a teacher velocity that the objective would ignore."""
    needs = objective.needs.teacher
    if needs.points and not gives_trajectories:
        raise UserError(
            f"objective '{objective.kind}' learns from a teacher's trajectories, which only dumo train creates: set "
            "teacher.source to the folder of a run with a velocity, and teacher.pairs={count: 8192}"
        )
    if not needs.points and needs.velocity == "must" and not gives_velocity:
        raise UserError(
            f"objective '{objective.kind}' learns from a teacher's velocity: set teacher.source to the folder of a run "
            "with a velocity, and teacher.pairs=null (dumo.Flow(teacher=...))"
        )
    if needs.velocity == "no" and gives_velocity:
        raise UserError(
            f"objective '{objective.kind}' does not use a teacher's velocity: set teacher=null, or teacher.pairs "
            "(in dumo.Flow remove teacher=)"
        )


def require_teacher_share(
    share: float, batch: int, objective: Objective, *, gives_velocity: bool, field: str = "prior"
) -> None:
    """Refuse a share of rows with a teacher's target if the objective does not support it, or if it is no row or all.

    field: the name of the share, for the message.
    """
    needs = objective.needs.teacher
    if not gives_velocity or needs.velocity != "may" or needs.points:
        raise UserError(
            f"{field} = {share:g} needs a teacher's velocity and an objective that mixes it with data, which objective "
            f"'{objective.kind}' does not: set teacher={{kind: base}} (dumo.Flow(teacher=...)) with "
            f"objective.kind=dumo, or {field}=null"
        )
    if not 0 < round(share * batch) < batch:
        raise UserError(
            f"{field} = {share:g} selects none or all of the {batch} rows of a batch: change {field} or the batch size"
        )


def require_unguided_teacher(objective: Objective, scale: float, field: str = "teacher.guide.scale") -> None:
    """Refuse a guided target if the teacher is guided at `scale` already.

    field: the setting of the teacher's guidance, for the message.
    """
    guidance = training_guidance(objective.needs)
    if scale != 1 and guidance is not None:
        raise UserError(
            f"{guidance.field} would guide the target twice, because the teacher is guided at scale {scale:g}: set "
            f"{field}=1, or train with {guidance.off}"
        )


def require_same_data(teacher: str, teacher_fields: Mapping[str, object], fields: Mapping[str, object]) -> None:
    """Refuse a teacher of other data, by fields that describe the data of the teacher and of the student.

    teacher: its name, for the message.
    """
    differences: list[str] = []
    for field, value in fields.items():
        if teacher_fields[field] != value:
            differences.append(f"{field} is {teacher_fields[field]} instead of {value}")
    if differences:
        raise UserError(
            f"{teacher} was trained on other data: {'; '.join(differences)}. Use a teacher trained on this data, or "
            "set these fields to the teacher's values"
        )


def require_first_stage(objective: Objective, *, has_first_stage: bool) -> None:
    """Refuse a second-stage objective, whose theta^- is the network of the first stage, without that network."""
    if objective.needs.ref == 1 and not has_first_stage:
        raise UserError(
            f"objective '{objective.kind}' with low learns from the network of a first stage: set start.source to a "
            "run trained at all times, train.ref=1, and {decay: 1} as the last of train.ema (in dumo.Flow set ref= to "
            "a copy of that network)"
        )


def require_labels(objective: Objective, *, has_coupling: bool) -> None:
    """Refuse conditions other than labels, if the objective or a coupling compares rows of one label."""
    if objective.needs.compares_rows or has_coupling:
        subject = "coupling=" if has_coupling else f"objective '{objective.kind}'"
        raise UserError(
            f"{subject} compares rows of one label, but c is not a label: pass labels and classes=, or use another "
            "objective without coupling="
        )


def require_null(objective: Objective, *, has_null: bool) -> None:
    """Refuse training without conditions or without dropping any, if the objective learns from their effect.

    has_null: whether there are conditions, and a null condition that replaces dropped ones.
    """
    if objective.needs.reads_null and not (has_null and objective.drop):
        raise UserError(
            f"objective '{objective.kind}' learns from the difference between conditional and unconditional "
            "velocities, so some conditions must be dropped: train with classes or captions (in dumo.Flow classes= or "
            "null=) and objective.drop=0.1, or use objective.kind=flow_matching"
        )


def require_independent_noise(objective: Objective, *, has_coupling: bool, has_pairs: bool = False) -> None:
    """Refuse noise that depends on the data, if the objective would be biased by it.

    - A coupling makes the rows of a group depend on each other. An objective that compares them mistakes the distance
      between a sample and data near its noise for a distance between distributions: on N(0, I) samples contract.
    - If the noise of a row depends on its data, by a coupling or by a teacher's pairs, the velocity of the data differs
      from that of samples diffused with fresh noise, although both have the same distribution.
    """
    compares = objective.needs.compares_rows or isinstance(objective.times, Groups)
    tie = ""
    if has_coupling and (compares or objective.needs.diffuses_samples):
        tie = "train.coupling"
    elif has_pairs and objective.needs.diffuses_samples:
        tie = "teacher.pairs"
    if tie:
        argument = "; in dumo.Flow remove coupling=" if has_coupling else ""
        raise UserError(
            f"{tie} makes noise depend on data, but objective '{objective.kind}' assumes independent noise and would "
            f"be biased: set {tie}=null{argument}"
        )


def require_conditions(
    c: Condition, classes: int, null: Null, *, waits: bool = False, may_be_null: bool = False
) -> None:
    """Refuse conditions of `dumo.Flow` that would be ignored or misinterpreted.

    waits: whether to check labels on a GPU, which synchronizes; labels on a CPU are always checked.
    may_be_null: whether a label may be the null label, as it may while sampling.
    """
    if c is None:
        if classes or null is not None:
            raise UserError("classes= and null= need conditions: pass c, or remove them")
    elif is_labels(c):
        labels = cast(Tensor, c)
        if not classes:
            raise UserError("c are labels, which would be ignored: set dumo.Flow(net, classes=...)")
        if waits or labels.device.type == "cpu":
            out_of_range = labels[(labels < 0) | (labels >= classes + may_be_null)]
            if len(out_of_range):
                raise UserError(
                    f"label {int(out_of_range[0])} is out of range: labels are 0 to {classes - 1}, and {classes} is "
                    "the null label"
                )
    elif classes:
        raise UserError(
            f"classes = {classes} needs integer labels c of shape (b,): pass such labels, or remove classes"
        )
    else:
        rows = ConditionRows.of(c, null)
        require_names("null", rows.null, rows.rows, "c")


# ------------------------------------------------------------------------------------------------------------- guidance


def training_guidance(needs: Needs) -> GuidanceScale | None:
    """Return how an objective guides its target in training; None if it does not."""
    guidance = GuidanceScale.of(needs)
    # A guide may be active although its effective scale is 1.
    is_guided = needs.guide.active if isinstance(needs.guide, Guide) else guidance.active
    if is_guided:
        return guidance
    # iMF draws its scale up to objective.w, and has knobs only if that is set.
    return GuidanceScale(field="objective.w", off="objective.w=null") if needs.knobs else None


def why_unguided(
    objective: Objective, trained: GuidanceScale, *, has_null: bool, model: str = "this model", train: str = "train"
) -> str | None:
    """Return why a model cannot be guided while sampling, and the alternative, as the end of a sentence, or None.

    trained: how its target was guided in training.
    has_null: whether it has classes or other conditions, and a null condition.
    model, train: the model, and the command that trains it, for the message.
    """
    if not has_null:
        return f"{model} has no classes or other conditions: train with them (in dumo.Flow classes= or null=)"
    if trained.active:
        return f"{trained.reason(model)}: {train} with {trained.off}"
    if not objective.drop:
        return f"{model} was trained without dropped labels, since objective.drop = 0: {train} with objective.drop=0.1"
    if objective.needs.knobs:
        return f"objective '{objective.kind}' guides {model} by its knobs: set sample.knobs (in dumo.Flow knobs=)"
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

    field: the setting of the guidance, for the message. See `why_unguided` for the remaining arguments.
    """
    reason = why_unguided(objective, trained, has_null=has_null, model=model, train=train) if guide.active else None
    if reason:
        raise UserError(f"{field} = {guide.scale:g}: {reason}, or set {field}=1")


def require_names(field: str, names: Collection[str], known: Collection[str], objective: str) -> None:
    """Refuse knobs or heads of an unknown name, which would be ignored."""
    for name in names:
        if name not in known:
            valid = ", ".join(known) or f"none: set {field}={{}}"
            raise UserError(f"{field}.{name}: objective '{objective}' has no '{name}'; valid: {valid}")


def without_drop(objective: Objective) -> Objective:
    """Return a copy of the objective that drops no conditions and does not guide its target.

    Guidance needs the unconditional velocity, which the network learns from dropped conditions. iMF keeps its knobs,
    without effect: if V(null) = V(c), its v* converges to the unguided velocity.
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
