"""Check the compatibility of the specs of a run, and report departures from the papers or models it is based on.

`check` raises UserError for the first mismatch between values. It builds no network and reads no file, unlike
`dumo.run.check_network`. Only mismatches that would silently train or evaluate wrongly are refused.

`check_ranks` and `check_guidance` are also called on their own, with a number of ranks or the guidance of one request.
`advice` returns lines to print before training.
"""

import shlex
from collections.abc import Sequence
from itertools import chain
from math import log
from typing import TYPE_CHECKING

from dumo.config.conditions import Conditions, shown_data
from dumo.data import Data, Images, Latents
from dumo.flow import solver
from dumo.flow.compatibility import (
    require_first_stage,
    require_guidable,
    require_independent_noise,
    require_names,
    require_null,
    require_path,
    require_precision,
    require_teacher,
    require_teacher_share,
    require_times,
    require_unguided_teacher,
    training_guidance,
)
from dumo.flow.guide import CFG, GuidanceScale
from dumo.flow.path import FlowPath
from dumo.flow.times import Jumps, Pair
from dumo.io.yaml import yaml_text
from dumo.nets import Net, Pretrained
from dumo.nets.precondition import PRECONDITIONED_HEADS
from dumo.objectives import Objective
from dumo.training.ema import Ema
from dumo.training.layout import share_of
from dumo.training.micro_batch import split_batch
from dumo.training.settings import Train
from dumo.types import Objective as AnyObjective
from dumo.types import UserError

if TYPE_CHECKING:
    from dumo.config.spec import Evaluation, Run

_KINDS_OF_ANY_SIZE = ("dit", "diffusers")

# Advice is given if a ratio or its inverse exceeds these values.
_MAX_SIDE_RATIO = 2.0  # side of the images / default side of the pipeline
_MAX_DIFFUSION_SIDE_RATIO = 1.4  # the same for diffusion models, e.g. Stable Diffusion 2.1 (768 pixels) at 512
_MAX_SD_RATIO = 1.2  # standard deviation of the data / of the path


def check(run: "Run") -> None:
    """Raise UserError for the first mismatch between the values of a run."""
    data = run.data
    objective = run.objective
    train = run.train

    # The network's inputs must match the data.
    _check_captions(run)
    if getattr(data.captions, "source", None):
        _check_editing(run)
    _check_sizes(run)
    _check_augmentation(data, run.net, objective)

    # The objective needs a supported path, suitable times, a precision and a teacher.
    require_path(objective, run.path.kind)
    require_times(objective)
    has_pairs = run.teacher is not None and bool(run.teacher.pairs)
    require_independent_noise(objective, has_coupling=bool(train.coupling), has_pairs=has_pairs)
    if run.net.precondition != "none":
        _check_precondition(run)
    require_precision(train.precision, objective.needs.amplifies, objective.kind)
    _check_fake_score(run)
    _check_teacher(run)
    _check_start(run)
    if isinstance(data, Latents) and data.prior:
        gives_velocity = run.teacher is not None and not run.teacher.pairs
        require_teacher_share(data.prior, train.batch, objective, gives_velocity=gives_velocity, field="data.prior")
    check_ranks(train, objective)

    # Guidance, in training and in sampling.
    _check_training_guidance(data, objective)
    check_guidance(run.sample.guide, data, objective, run.training_guidance)
    require_names("sample.knobs", run.sample.knobs, objective.needs.knobs, objective.kind)

    # The dtype of frozen weights must be that of the passes.
    lora = run.net.lora
    if lora and lora.frozen == "bfloat16" and train.precision != "bf16":
        raise UserError(
            f"net.lora.frozen=bfloat16 would round the frozen weights with train.precision={train.precision}: set "
            "train.precision=bf16 or net.lora.frozen=float32"
        )

    # Sampling and evaluation.
    solver.check(run.sample.solver, run.readings, *run.sample.nfe, *run.evaluate.nfe)
    run.evaluate.protocol.check(run.shown_shape, data.labels)
    _check_validation(run.evaluate)


def _check_captions(run: "Run") -> None:
    """Raise UserError if captions are missing, or if the network would treat captions as class labels."""
    texts = run.net.texts
    has_captions = run.data.captions is not None
    reads_captions = texts is not None and texts.kind != "codes"
    if reads_captions and not has_captions:
        raise UserError(f"net.texts needs captions, but data '{run.data.kind}' has none. {ways_to_captions(run.data)}")
    if has_captions and not reads_captions:
        raise UserError(
            f"{captions_field(run.data)} is set, but net '{run.net.kind}' does not use captions: set "
            f"net.texts, or {captions_field(run.data)}=null"
        )


def _check_editing(run: "Run") -> None:
    """Raise UserError if an image-editing model would drop its condition, which always includes an image."""
    training_guidance = GuidanceScale.of(run.objective.needs)
    reason = ""
    if run.objective.drop > 0:
        reason = "objective.drop drops conditions: set it to 0"
    elif training_guidance.active:
        reason = f"{training_guidance.field} needs the null condition: set {training_guidance.off}"
    elif run.teacher and run.teacher.guide.active:
        reason = "teacher.guide.scale needs the null condition: set it to 1"
    elif run.sample.guide.active:
        reason = "sample.guide.scale needs the null condition: set it to 1"
    if reason:
        raise UserError(f"captions.source trains image editing, in which conditions are never dropped, but {reason}")


def _check_sizes(run: "Run") -> None:
    """Raise UserError if buckets are used with an incompatible network or with a teacher's pairs, which are squares."""
    buckets = buckets_field(run.data)
    if buckets is None:
        return
    if run.net.kind not in _KINDS_OF_ANY_SIZE:
        raise UserError(
            f"net '{run.net.kind}' supports a single image size, but {buckets} has several: set {buckets}=null or "
            "net.kind=dit"
        )
    if run.teacher and run.teacher.pairs:
        raise UserError(
            f"teacher.pairs are square, but {buckets} has other shapes: set {buckets}=null or teacher.pairs=null"
        )


def _check_augmentation(data: Data, net: Net, objective: Objective) -> None:
    """Raise UserError if the network's augmentation labels do not match the data's, or if training drops them."""
    augment = shown_data(data).augment
    num_labels = augment.augment_dim if augment else 0
    if num_labels != net.augment:
        fix = f"net.augment={num_labels}"
        if num_labels and net.kind != "unet":
            fix = f"net.kind=unet {fix}"
        if num_labels:
            fix += ", or data.augment=null"
        raise UserError(
            f"data '{data.kind}' has {num_labels} augmentation labels per image, but net '{net.kind}' expects "
            f"{net.augment}: set {fix}"
        )
    if augment and objective.drop:
        raise UserError(
            f"objective.drop = {objective.drop:g} would also drop augmentation labels, and samples would look "
            "augmented: set objective.drop=0 or data.augment=null"
        )


def _check_precondition(run: "Run") -> None:
    """Raise UserError if a preconditioned network is used off the linear path or at negative times."""
    objective = run.objective
    excess: list[str] = []
    if objective.needs.signed:
        excess.append(f"the negative times of objective '{objective.kind}'")
    if run.path.kind != "linear":
        excess.append(f"path '{run.path.kind}'")
    excess += [f"head '{head}'" for head in sorted(objective.needs.heads) if head not in PRECONDITIONED_HEADS]
    if excess:
        heads = " or ".join(f"'{head}'" for head in PRECONDITIONED_HEADS)
        raise UserError(
            f"net.precondition '{run.net.precondition}' supports heads {heads} on path 'linear', but not {excess[0]}: "
            "set net.precondition=none"
        )


def _check_fake_score(run: "Run") -> None:
    """Raise UserError if a fake score shares trained weights with the generator, or if fake_lr is set without one."""
    objective = run.objective
    if not objective.needs.fake_score:
        if getattr(run.train.optimizer, "fake_lr", None) is not None:
            raise UserError(
                f"train.optimizer.fake_lr is set, but objective '{objective.kind}' has no fake score: set it to null"
            )
        return
    net = run.net
    if not isinstance(net, Pretrained) or net.lora is None or net.lora.subject or net.lowpass is not None:
        raise UserError(
            f"objective '{objective.kind}' trains its fake score as a second LoRA on the frozen weights of a pipeline, "
            "and with net.lowpass both would train the same time embedder: set net.kind=diffusers, net.lora.rank=64, "
            "net.lora.subject=null and net.lowpass=null, or for other networks objective.kind=match"
        )
    if run.path.kind == "diffusion" and objective.times.group == 1:
        raise UserError(
            "objective.times.steps = 1 amplifies the error of a noise-predicting model about 15 times: set "
            "objective.times.steps=2 or more"
        )


def _check_teacher(run: "Run") -> None:
    """Raise UserError if the teacher has no target for the objective, or if guidance would be applied twice."""
    objective = run.objective
    teacher = run.teacher
    gives_velocity = teacher is not None and not teacher.pairs
    gives_trajectories = teacher is not None and bool(teacher.pairs)
    require_teacher(objective, gives_velocity=gives_velocity, gives_trajectories=gives_trajectories)
    if objective.needs.teacher.points and objective.drop and may_have_classes(run.data):
        # Without labels, the net would learn the mean of trajectories over all labels.
        raise UserError(
            f"objective.drop = {objective.drop:g}, but each trajectory of objective '{objective.kind}' belongs to a "
            "label: set objective.drop=0"
        )
    if teacher is None:
        return
    if teacher.pairs and run.train.coupling:
        raise UserError(
            "train.coupling would separate the data of teacher.pairs from their noise: set train.coupling=null or "
            "teacher.pairs=null"
        )
    if teacher.guide.active and not may_have_classes(run.data):
        raise UserError(
            f"teacher.guide.scale = {teacher.guide.scale:g}, but data '{run.data.kind}' has no classes for guidance: "
            "set teacher.guide.scale=1"
        )
    require_unguided_teacher(objective, teacher.guide.scale)
    embedded = run.net.guidance if isinstance(run.net, Pretrained) else None
    if teacher.kind == "base" and teacher.guide.active and embedded not in (None, 1):
        raise UserError(
            f"teacher.guide.scale = {teacher.guide.scale:g}, but the base model already embeds a guidance scale of "
            f"{embedded:g}: set teacher.guide.scale=1, or net.guidance=1"
        )


def _check_start(run: "Run") -> None:
    """Raise UserError if an objective's first stage, or the few-step run for a subject's adapters, is missing."""
    # train.ref=1 is an EMA decay of 1, which keeps the initial weights.
    require_first_stage(run.objective, has_first_stage=run.start is not None and run.train.ref == 1)
    if run.start:
        require_names("start.heads", run.start.heads, run.objective.needs.heads, run.objective.kind)
    lora = run.net.lora
    starts_from_run = run.has_subject and run.start and run.start.kind == "run" and not run.start.heads
    if lora and lora.subject and not starts_from_run:
        raise UserError(
            "net.lora.subject trains adapters on top of a few-step run: set start={kind: run, source: RUN} with the "
            "run's folder and without start.heads, and net.weights=source"
        )


def check_ranks(train: Train, objective: AnyObjective, ranks: int = 1) -> None:
    """Raise UserError if the run cannot be trained on this number of ranks.

    If the batch has rows with r < t and rows with r = t, each micro-batch must have both. `train.share` must divide the
    number of ranks, and `train.compile=loss` supports one rank only.
    """
    times = objective.times
    micro_batches_by_rank = split_batch(train, objective, ranks)
    moving = times.moving(train.batch)
    if moving is not None and 0 < times.moving_share < 1:
        for rows in chain.from_iterable(micro_batches_by_rank):
            kinds = set(moving[rows])
            if len(kinds) > 1:
                continue
            times_text = f"'{getattr(times, 'kind', type(times).__name__)}'"
            if isinstance(times, Jumps | Pair):
                times_text += f", velocity_ratio {times.velocity_ratio:g}"
            missing = "r = t" if kinds.pop() else "r < t"
            raise UserError(
                f"train.batch = {train.batch} on {ranks} ranks (train.micro_batch = {train.micro_batch}) has a "
                f"micro-batch of {rows.stop - rows.start} rows, none of them with {missing} (objective.times "
                f"{times_text}): increase train.batch or train.micro_batch, or use fewer ranks"
            )
    share_of(train.share, ranks)
    if ranks > 1 and train.compile == "loss":
        raise UserError(f"train.compile=loss supports one rank, got {ranks}: set train.compile=blocks")


def _check_training_guidance(data: Data, objective: Objective) -> None:
    """Raise UserError for guidance in training without classes. A guide may be active although its scale is 1."""
    require_null(objective, has_null=may_have_classes(data))
    if may_have_classes(data):
        return
    guidance = training_guidance(objective.needs)
    if guidance is not None:
        raise UserError(f"{guidance.field} enables guidance, but data '{data.kind}' has no classes: set {guidance.off}")


def check_guidance(
    guide: CFG,
    data: Data,
    objective: AnyObjective,
    trained: GuidanceScale,
    field: str = "sample.guide.scale",
    source: str = "",
) -> None:
    """Raise UserError if `guide`, the value of `field`, is active for a network that does not support guidance.

    `trained` is the guidance of the network in training. `source` is the network's run for the message, if it is not
    the run itself.
    """
    require_guidable(
        guide,
        objective,
        trained,
        has_null=may_have_classes(data),
        field=field,
        model=f"the model of {source}" if source else "this model",
        train=f"train {source}" if source else "train",
    )


def _check_validation(evaluation: "Evaluation") -> None:
    """Raise UserError if validation in training has no interval, no protocol on samples, or too few samples."""
    kind = evaluation.protocol.kind
    if evaluation.best and not evaluation.every:
        raise UserError(
            "evaluate.best keeps the best evaluated step, but no step is evaluated: set evaluate.every above 0"
        )
    if evaluation.every and kind == "likelihood":
        raise UserError("evaluate.every scores samples, but protocol likelihood scores data: set evaluate.every=0")
    if evaluation.every and evaluation.few is not None and evaluation.few < evaluation.min_samples:
        raise UserError(
            f"evaluate.few = {evaluation.few}, but protocol {kind} needs at least {evaluation.min_samples} samples: "
            "increase it, or set it to null"
        )


def captions_field(data: Data) -> str:
    """Return the dotted path of the field for captions."""
    return "data.images.captions" if isinstance(data, Latents) else "data.captions"


def buckets_field(data: Data) -> str | None:
    """Return the dotted path of the field for buckets, or None if all images have one size."""
    images = shown_data(data)
    if not (isinstance(data, Images | Latents) and isinstance(images, Images) and images.buckets):
        return None
    return "data.images.buckets" if isinstance(data, Latents) else "data.buckets"


def ways_to_captions(data: Data) -> str:
    """Return a hint for messages: three ways to condition a pretrained model."""
    field = captions_field(data)
    return (
        f"Set {field}.kind=files to read captions, or generate them from class names with "
        f'{field}={{kind: templates, templates: ["a photo of a {{}}"]}}, or set '
        f"{field}=null and net.texts.kind=codes to replace prompts with random class embeddings"
    )


def may_have_classes(data: Data) -> bool:
    """Whether the data have classes or captions, or may have classes that are not counted yet."""
    return data.classes > 0 or not Conditions(data).are_known


def advice(run: "Run", sd: float | None = None) -> list[str]:
    """Return a line for each deviation of a run from its source, with the setting of the source.

    `sd` is the measured standard deviation of the data, if known.
    """
    lines: list[str] = []
    if isinstance(run.net, Pretrained) and run.net.side:
        max_ratio = _MAX_DIFFUSION_SIDE_RATIO if run.path.kind == "diffusion" else _MAX_SIDE_RATIO
        lines += _size_advice(run.net.side, run.shown_shape, max_ratio)
    decay = run.objective.needs.ref
    if decay is not None and run.train.ref == "self":
        lines.append(_reference_advice(run.objective.kind, decay, run.train))
    if sd:
        lines += _deviation_advice(run.objective, run.net, run.path, sd)
    return lines


def _size_advice(side: int, shape: Sequence[int], max_ratio: float) -> list[str]:
    """Advise on images (channels, height, width) much larger or smaller than the pipeline's `side` pixels."""
    _, height, width = shape
    if 1 / max_ratio <= height / side <= max_ratio:
        return []
    return [
        f"the pipeline's default size is {side} x {side} pixels, but this run uses {height} x {width}. To use the "
        f"pipeline's:  data.images.side={side}"
    ]


def _reference_advice(objective: str, decay: float, train: Train) -> str:
    """Advise to use an EMA with this `decay` for theta^-, as in the objective's paper."""
    fields = [f"train.ref={decay:g}"]
    if decay not in [ema.key for ema in train.ema]:
        averages = [ema.model_dump(mode="json") for ema in (*train.ema, Ema(decay=decay))]
        fields.insert(0, f"train.ema={yaml_text(averages)}")
    return (
        f"theta^- is an EMA with decay {decay:g} in the paper of objective '{objective}', but the current weights in "
        f"this run (train.ref: self). To use the EMA:  {shlex.join(fields)}"
    )


def _deviation_advice(objective: Objective, net: Net, path: FlowPath, sd: float) -> list[str]:
    """Advise on objectives or nets with constants for unit variance, if the standard deviation is sd / path.sd."""
    owners: list[str] = []
    if objective.needs.formulas.unit:
        owners.append(f"objective '{objective.kind}'")
    if net.precondition != "none":
        owners.append(f"net.precondition '{net.precondition}'")
    if not owners or abs(log(sd / path.sd)) <= log(_MAX_SD_RATIO):
        return []
    units = "" if path.sd == 1 else f" in units of path.sd = {path.sd:g}"
    return [
        f"the constants of {' and '.join(owners)} assume data with standard deviation 1, but this data has "
        f"{sd / path.sd:.2g}{units}. To rescale them:  path.sd={sd:.2g}"
    ]
