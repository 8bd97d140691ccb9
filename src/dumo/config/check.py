"""Check that the values of a run fit together, when it is read; `dumo.run.mismatch` checks what takes a net or files.

`check` is the entrance for a whole run: it goes through the rules in order, of the parts that the run has, and raises
the first mismatch. A rule, `_..._faults`, yields a line for each mismatch, with the fix. `dumo.config.need` has the
rules by which one part of a run asks something of another.

Three checks are also called by themselves, for what is known after a run is read: `check_ranks` with the number of
ranks, `check_guidance` with the guidance of one request, and `require` with faults that others find. `why_unguided`
says in advance whether a request for guidance would be refused.
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

from dumo.config import need
from dumo.config.conditions import shown_data
from dumo.config.need import IMF_SCALE, may_have_classes
from dumo.config.parts import Evaluation, RunParts
from dumo.data import Data, is_latents
from dumo.flow import solver
from dumo.flow.fit import GuidanceRefusal, first_stage_problem, guidance_refusal, picks_some_rows, prior_problem
from dumo.flow.guide import CFG, GuidanceScale
from dumo.flow.precision import require_precision
from dumo.flow.times import Jumps, Pair
from dumo.nets import Net
from dumo.objectives import Objective
from dumo.training.layout import share_of
from dumo.training.spec import Train
from dumo.training.step import split_into_passes
from dumo.types import Objective as AnyObjective
from dumo.types import TimeLaw, UserError

if TYPE_CHECKING:
    from dumo.config.teacher import Start, Teacher


def check(run: RunParts) -> None:
    """Raise UserError for the first mismatch between the values of a run. Makes no net and reads no file."""
    data = run.data
    net = run.net
    objective = run.objective
    train = run.train
    require(need.faults(run))
    captioning = data.captions
    if captioning is not None and captioning.kind == "files" and captioning.source:
        require(_editing_faults(objective, run.sample.guide, run.teacher))
    require(_augmentation_faults(data, net, objective))
    require(_frozen_dtype_faults(net, train))
    require_precision(train.precision, objective.needs.amplifies, objective.kind)
    check_ranks(train, objective)
    if run.sample.guide.active:
        check_guidance(run.sample.guide, data, objective, run.training_guidance)
    if run.teacher:
        require(_teacher_faults(run.teacher, objective, data, train))
    require(_start_faults(run.start, objective, train))
    if net.lora and net.lora.subject:
        require(_subject_faults(run))
    if is_latents(data) and data.prior:
        require(_prior_faults(data.prior, run.teacher, objective, train))
    solver.check(run.sample.solver, run.reads, *run.sample.nfe, *run.evaluate.nfe)
    run.evaluate.protocol.check(run.shown_shape, data.labels)
    if run.evaluate.every or run.evaluate.best:
        require(_validation_faults(run.evaluate))


def require(faults: Iterable[str]) -> None:
    """Raise UserError with the first of these lines, if there is one."""
    first_fault = next(iter(faults), None)
    if first_fault is not None:
        raise UserError(first_fault)


def _editing_faults(objective: Objective, sampling_guide: CFG, teacher: "Teacher | None") -> Iterator[str]:
    """A model that edits images always has one as its condition: nothing may leave the condition out."""
    training_guidance = GuidanceScale.of(objective.needs)
    reasons: list[str] = []
    if objective.drop > 0:
        reasons.append("objective.drop leaves out the condition: set it to 0")
    if training_guidance.active:
        reasons.append(f"{training_guidance.field} guides away from none: set {training_guidance.off}")
    if teacher and teacher.guide.active:
        reasons.append("teacher.guide.scale guides away from none: set it to 1")
    if sampling_guide.active:
        reasons.append("sample.guide.scale guides away from none: set it to 1")
    for reason in reasons:
        yield (
            f"captions.source names images to edit, which a model that edits always has, and {reason}; or "
            "captions.source=null"
        )


def _validation_faults(evaluation: Evaluation) -> Iterator[str]:
    """Judging in training needs a protocol that judges samples, enough of them, and some steps to choose a best of."""
    kind = evaluation.protocol.kind
    if evaluation.best and not evaluation.every:
        yield "evaluate.best keeps the best of the steps that are judged, and none is: set evaluate.every to some steps"
    if evaluation.every and kind == "likelihood":
        yield "evaluate.every judges samples, and protocol likelihood the data: set evaluate.every=0"
    if evaluation.every and evaluation.few is not None and evaluation.few < evaluation.min_samples:
        yield (
            f"evaluate.few = {evaluation.few}: protocol {kind} judges {evaluation.min_samples} samples or more: set as "
            "many, or null"
        )


def _augmentation_faults(data: Data, net: Net, objective: Objective) -> Iterator[str]:
    """The net must take as many numbers as describe an image's augmentation, and training must not drop them."""
    augment = shown_data(data).augment
    num_labels = augment.augment_dim if augment else 0
    if num_labels != net.augment:
        fix = f"net.augment={num_labels}"
        if num_labels and net.kind != "unet":
            fix = f"net.kind=unet {fix}"
        if num_labels:
            fix += ", or data.augment=null"
        yield (
            f"data '{data.kind}' describes how an image was augmented by {num_labels} numbers, net '{net.kind}' takes "
            f"{net.augment}: set {fix}"
        )
    if augment and objective.drop:
        yield (
            f"objective.drop = {objective.drop:g} would drop how an image was augmented with its label, and samples "
            "would look augmented: set objective.drop=0, or data.augment=null"
        )


def _frozen_dtype_faults(net: Net, train: Train) -> Iterator[str]:
    """Frozen weights in bfloat16 need passes in bf16."""
    lora = net.lora
    if lora and lora.frozen == "bfloat16" and train.precision != "bf16":
        yield (
            f"net.lora.frozen = bfloat16 saves memory where passes compute in bf16, and train.precision is "
            f"{train.precision}: set train.precision=bf16, or net.lora.frozen=float32"
        )


def check_ranks(train: Train, objective: AnyObjective, ranks: int = 1) -> None:
    """Raise UserError where these ranks cannot share the training.

    Each pass must have rows with r < t and rows with r = t, if the batch has both; `train.share` must divide the ranks;
    and `train.compile=loss` takes one rank.
    """
    times = objective.times
    passes_by_rank = split_into_passes(train, objective, ranks)
    moving = times.moving(train.batch)
    if moving is not None and 0 < times.moving_share < 1:
        for rows in chain.from_iterable(passes_by_rank):
            kinds = set(moving[rows])
            if len(kinds) == 1:
                num_rows = rows.stop - rows.start
                raise UserError(_one_kind_message(train, times, ranks, num_rows, moving=kinds.pop()))
    share_of(train.share, ranks)
    if ranks > 1 and train.compile == "loss":
        raise UserError(f"train.compile = loss is for one rank, not for {ranks}: set train.compile=blocks")


def _one_kind_message(train: Train, times: TimeLaw, ranks: int, rows: int, *, moving: bool) -> str:
    """The message that refuses a pass of this number of rows: all have r < t (`moving`), or all have r = t."""
    time_law = f"'{getattr(times, 'kind', type(times).__name__)}'"
    if isinstance(times, Jumps | Pair):
        time_law += f", velocity_ratio {times.velocity_ratio:g}"
    batch = f"train.batch = {train.batch}"
    fix = "raise train.batch"
    if train.micro_batch:
        batch += f", train.micro_batch = {train.micro_batch}"
        fix += " or train.micro_batch"
    rank_count = "1 rank"
    if ranks > 1:
        rank_count = f"{ranks} ranks"
        fix += ", or take fewer ranks"
    missing = "r = t" if moving else "r < t"
    return (
        f"{batch} on {rank_count} has a pass of {rows} rows without one with {missing} (objective.times {time_law}): "
        f"{fix}"
    )


def why_unguided(
    data: Data, objective: AnyObjective, trained: GuidanceScale, source: str = ""
) -> GuidanceRefusal | None:
    """Why a net is not guided when it is sampled: it has no null condition, or is guided already. None: it can be.

    `trained` is the net's guidance in training; `source` is the run that the net is of, "" the one that is read.
    """
    model = f"the model of {source}" if source else "this model"
    train = f"train {source}" if source else "train"
    if not may_have_classes(data):
        return GuidanceRefusal(f"data '{data.kind}' has no classes to guide by", "")
    knobs = f"sample.knobs of {source}" if source else "sample.knobs"
    return guidance_refusal(objective, trained, set_knobs=knobs, model=model, train=train)


def check_guidance(
    guide: CFG,
    data: Data,
    objective: AnyObjective,
    trained: GuidanceScale,
    field: str = "sample.guide.scale",
    source: str = "",
) -> None:
    """Raise UserError for guidance of a net that is not guided (`why_unguided`). `field` asks for it."""
    if not guide.active:
        return
    refusal = why_unguided(data, objective, trained, source)
    if refusal is None:
        return
    fix = f"set {field}=1"
    if refusal.instead:
        fix += f", {refusal.instead}"
    raise UserError(f"{field} = {guide.scale:g}: {refusal.reason}: {fix}")


def _teacher_faults(teacher: "Teacher", objective: Objective, data: Data, train: Train) -> Iterator[str]:
    """A teacher's pairs must stay together, and guidance must come from the teacher or the objective, not from both.

    What the teacher can do is checked when it is opened.
    """
    if teacher.pairs and train.coupling:
        yield (
            "train.coupling would part the data of teacher.pairs from the noise that they come from: set "
            "train.coupling=null, or teacher.pairs=null"
        )
    if teacher.guide.active and not may_have_classes(data):
        yield (
            f"teacher.guide.scale = {teacher.guide.scale:g}: data '{data.kind}' has no classes to guide by: set "
            "teacher.guide.scale=1"
        )
    objective_guidance = GuidanceScale.of(objective.needs)
    is_guided_by_objective = objective_guidance.active
    if not is_guided_by_objective and objective.needs.knobs:
        objective_guidance = IMF_SCALE
        is_guided_by_objective = True
    if teacher.guide.active and is_guided_by_objective:
        yield (
            f"{objective_guidance.field} would guide what teacher.guide has guided: set teacher.guide.scale=1, or "
            f"train with {objective_guidance.off}"
        )


def _start_faults(start: "Start | None", objective: Objective, train: Train) -> Iterator[str]:
    """An objective that learns from the net that training begins with needs a start, and train.ref=1 to keep it.

    train.ref=1 is a decay of 1: the average of the weights that never moves.
    """
    problem = first_stage_problem(objective)
    if problem and not (start and train.ref == 1):
        yield (
            f"{problem}: set start.source to a run of all times, train.ref=1, and in train.ema {{decay: 1}} as the last"
        )


def _subject_faults(run: RunParts) -> Iterator[str]:
    """Adapters for a subject need a few-step run to begin from, with the weights of its pipeline."""
    starts_from_run = run.has_subject and run.start and run.start.kind == "run" and not run.start.heads
    if not starts_from_run:
        yield (
            "net.lora.subject trains adapters on top of a few-step run's, on the weights of its pipeline: set "
            "start={kind: run, source: RUN}, its folder, without start.heads, and net.weights=source"
        )


def _prior_faults(prior_share: float, teacher: "Teacher | None", objective: Objective, train: Train) -> Iterator[str]:
    """Prior images need a teacher that answers them by its velocity, and a share of the batch that is some rows of it.

    `prior_share` is that share, in (0, 1).
    """
    if not teacher or teacher.pairs or prior_problem(objective):
        yield (
            "data.prior has images for the teacher to answer by its velocity: set teacher={kind: base}, and an "
            "objective that may learn from one, objective.kind=dumo; or data.prior=null"
        )
    if not picks_some_rows(prior_share, train.batch):
        yield f"data.prior = {prior_share:g} of train.batch = {train.batch} is no row, or all of them: change one"
