"""Check that the values of a run fit together, when it is read; `dumo.run.mismatch` checks what takes a net or files.

`check` goes through all rules and raises the first line. A rule is a function that yields a line per mismatch, with the
fix. Names that one part asks of another are `dumo.config.need`'s.
"""

from collections.abc import Iterable, Iterator
from itertools import chain

from dumo.config.conditions import Conditions, shown
from dumo.config.need import BY_KNOBS, faults, has_classes
from dumo.config.subject import prior, subject
from dumo.config.teacher import Start, Teacher
from dumo.config.tree import Evaluation, Tree
from dumo.data import Data
from dumo.flow import solver
from dumo.flow.guide import CFG, GuidanceScale
from dumo.flow.slope import require_precision
from dumo.flow.times import Jumps, Pair
from dumo.nets import Net
from dumo.objectives import Objective
from dumo.training.layout import share_of
from dumo.training.spec import Train
from dumo.training.step import passes
from dumo.types import Objective as AnyObjective
from dumo.types import TimeLaw, UserError


def check(run: Tree) -> None:
    """Raise UserError for the first mismatch between the values of a run; no net is made and no file is read."""
    data = run.data
    net = run.net
    objective = run.objective
    train = run.train
    require(
        faults(run),
        unconditional(data, objective, run.sample.guide, run.teacher),
        augmentation(data, net, objective),
        precision(objective, net, train),
    )
    check_pieces(train, objective)
    check_guided(run.sample.guide, data, objective, run.guided)
    require(
        teaching(run.teacher, objective, data, train),
        beginning(run.start, objective, train),
        subject(run),
        prior(data, run.teacher, objective, train),
    )
    solver.check(run.sample.solver, run.reads, *run.sample.nfe, *run.evaluate.nfe)
    run.evaluate.protocol.check(run.pixels, data.labels)
    require(validation(run.evaluate))


def require(*faults: Iterable[str]) -> None:
    """Raise UserError with the first fault, if there is one."""
    for fault in chain.from_iterable(faults):
        raise UserError(fault)


def unconditional(data: Data, objective: Objective, sampled: CFG, teacher: Teacher | None) -> Iterator[str]:
    """Images to edit, and something that leaves out the condition: a model that edits always has one."""
    if not getattr(Conditions(data).captions, "source", None):
        return
    trained = GuidanceScale.of(objective.needs)
    reasons: list[str] = []
    if objective.drop > 0:
        reasons.append("objective.drop leaves out the condition: set it to 0")
    if trained.active:
        reasons.append(f"{trained.field} guides away from none: set {trained.off}")
    if teacher and teacher.guide.active:
        reasons.append("teacher.guide.scale guides away from none: set it to 1")
    if sampled.active:
        reasons.append("sample.guide.scale guides away from none: set it to 1")
    for reason in reasons:
        yield (
            f"captions.source names images to edit, which a model that edits always has, and {reason}; or "
            "captions.source=null"
        )


def validation(evaluation: Evaluation) -> Iterator[str]:
    """Judging in training by what makes no samples, or by too few, and a best step of none that are judged."""
    kind = evaluation.protocol.kind
    if evaluation.best and not evaluation.every:
        yield "evaluate.best keeps the best of the steps that are judged, and none is: set evaluate.every to some steps"
    if evaluation.every and kind == "likelihood":
        yield "evaluate.every judges samples, and protocol likelihood the data: set evaluate.every=0"
    if evaluation.every and evaluation.few is not None and evaluation.few < evaluation.fewest:
        yield (
            f"evaluate.few = {evaluation.few}: protocol {kind} judges {evaluation.fewest} samples or more: set as "
            "many, or null"
        )


def augmentation(data: Data, net: Net, objective: Objective) -> Iterator[str]:
    """Augmentation for which the net has no input, or one of another size."""
    augment = shown(data).augment
    numbers = augment.numbers if augment else 0
    if numbers != net.augment:
        fix = f"net.augment={numbers}"
        if numbers and net.kind != "unet":
            fix = f"net.kind=unet {fix}"
        if numbers:
            fix += ", or data.augment=null"
        yield (
            f"data '{data.kind}' describes how an image was augmented by {numbers} numbers, net '{net.kind}' takes "
            f"{net.augment}: set {fix}"
        )
    if augment and objective.drop:
        yield (
            f"objective.drop = {objective.drop:g} would drop how an image was augmented with its label, and samples "
            "would look augmented: set objective.drop=0, or data.augment=null"
        )


def precision(objective: Objective, net: Net, train: Train) -> Iterator[str]:
    """Frozen weights that every pass would cast up, and an objective that amplifies rounding errors."""
    lora = net.lora
    if lora and lora.frozen == "bfloat16" and train.precision != "bf16":
        yield (
            f"net.lora.frozen = bfloat16 saves memory where passes compute in bf16, and train.precision is "
            f"{train.precision}: set train.precision=bf16, or net.lora.frozen=float32"
        )
    require_precision(train.precision, objective.needs.amplifies, objective.kind)


def check_pieces(train: Train, objective: AnyObjective, ranks: int = 1) -> None:
    """Raise UserError if ranks cannot cut the batch into passes with all kinds of rows, or a field takes one rank."""
    times = objective.times
    passes_by_rank = passes(train, objective, ranks)
    moving = times.moving(train.batch)
    if moving is not None and 0 < times.moving_share < 1:
        for rows in chain.from_iterable(passes_by_rank):
            kinds = set(moving[rows])
            if len(kinds) == 1:
                num_rows = rows.stop - rows.start
                raise UserError(pass_of_one_kind(train, times, ranks, num_rows, moving=kinds.pop()))
    share_of(train.share, ranks)
    if ranks > 1 and train.compile == "loss":
        raise UserError(f"train.compile = loss is for one rank, not for {ranks}: set train.compile=blocks")


def pass_of_one_kind(train: Train, times: TimeLaw, ranks: int, rows: int, *, moving: bool) -> str:
    """Why a pass of this number of rows is refused: all of them have r < t (`moving`), or all r = t."""
    law = f"'{getattr(times, 'kind', type(times).__name__)}'"
    if isinstance(times, Jumps | Pair):
        law += f", velocity_ratio {times.velocity_ratio:g}"
    batch = f"train.batch = {train.batch}"
    fix = "raise train.batch"
    if train.micro_batch:
        batch += f", train.micro_batch = {train.micro_batch}"
        fix += " or train.micro_batch"
    place = "1 rank"
    if ranks > 1:
        place = f"{ranks} ranks"
        fix += ", or take fewer ranks"
    missing = "r = t" if moving else "r < t"
    return f"{batch} on {place} has a pass of {rows} rows without one with {missing} (objective.times {law}): {fix}"


def check_guided(
    guide: CFG,
    data: Data,
    objective: AnyObjective,
    trained: GuidanceScale,
    name: str = "sample.guide",
    source: str = "",
) -> None:
    """Raise UserError for guidance of a net that never saw a missing label, or that is guided already.

    `trained` is its guidance in training, `name` the field that asks, `source` the run if it is read for another.
    """
    guide.check(data.kind, has_classes(data), objective.drop, trained, name=name, whose=source)
    if guide.active and objective.needs.knobs:
        of_source = f" of {source}" if source else ""
        raise UserError(
            f"{name}.scale = {guide.scale:g} would guide once more what the knobs of objective "
            f"'{objective.kind}'{of_source} guide already: set {name}.scale=1, and sample.knobs{of_source}"
        )


def teaching(teacher: Teacher | None, objective: Objective, data: Data, train: Train) -> Iterator[str]:
    """A coupling that would part a teacher's pairs, and guidance of a teacher that is double or without classes.

    What the teacher can do is checked when it is opened.
    """
    if not teacher:
        return
    if teacher.pairs and train.coupling:
        yield (
            "train.coupling would part the data of teacher.pairs from the noise that they come from: set "
            "train.coupling=null, or teacher.pairs=null"
        )
    teacher.guide.check(data.kind, has_classes(data), 1.0, GuidanceScale(), name="teacher.guide")
    trained = GuidanceScale.of(objective.needs)
    if not trained.active and objective.needs.knobs:
        trained = BY_KNOBS
    if teacher.guide.active and (trained.active or trained is BY_KNOBS):
        yield (
            f"{trained.field} would guide what teacher.guide has guided: set teacher.guide.scale=1, or train with "
            f"{trained.off}"
        )


def beginning(start: Start | None, objective: Objective, train: Train) -> Iterator[str]:
    """An objective that learns from the net that training begins with, without a start."""
    if objective.needs.ref == 1 and not (start and train.ref == 1):
        yield (
            f"objective '{objective.kind}' with low learns from the net that training begins with: set start.source to "
            "a run of all times, train.ref=1, and in train.ema {decay: 1} as the last"
        )
