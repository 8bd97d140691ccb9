"""Whether the values of a run fit together, checked when it is read; `dumo.run.fit` checks what takes a net or files.

Names that one part asks of another are `dumo.config.need`'s. What else does not fit is said here, a function per kind
of mismatch, with the way out. The first line is raised.
"""

from collections.abc import Iterable, Iterator
from itertools import chain

from dumo.config.conditions import Conditions, shown
from dumo.config.need import faults, has_classes
from dumo.config.subject import prior, subject
from dumo.config.teacher import Start, Teacher
from dumo.config.tree import Evaluation, Tree
from dumo.data import Data
from dumo.flow import solver
from dumo.flow.guide import CFG, GuidanceScale
from dumo.flow.slope import demand_precision
from dumo.flow.times import Jumps, Pair
from dumo.nets import Net
from dumo.objectives import Objective
from dumo.training.layout import share_of
from dumo.training.spec import Train
from dumo.training.step import passes
from dumo.types import Objective as AnyObjective
from dumo.types import UserError


def check(run: Tree) -> None:
    """Raise UserError for the first mismatch between the values of a run; no net is made and no file is read."""
    data, net, objective, train = run.data, run.net, run.objective, run.train
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
    trained, taught = GuidanceScale.of(objective.needs), GuidanceScale(teacher.guide.scale if teacher else 1.0)
    wrong = {
        "objective.drop leaves out the condition: set it to 0": objective.drop > 0,
        f"{trained.field} guides away from none: set {trained.off}": trained.active,
        "teacher.guide.scale guides away from none: set it to 1": taught.active,
        "sample.guide.scale guides away from none: set it to 1": sampled.active,
    }
    if getattr(Conditions(data).captions, "source", None):
        what = "captions.source names images to edit, which a model that edits always has"
        yield from (f"{what}, and {why}; or captions.source=null" for why, found in wrong.items() if found)


def validation(evaluation: Evaluation) -> Iterator[str]:
    """Judging in training by what makes no samples, or by too few, and a best step of none that are judged."""
    kind, few = evaluation.protocol.kind, evaluation.few
    if evaluation.best and not evaluation.every:
        yield "evaluate.best keeps the best of the steps that are judged, and none is: set evaluate.every to some steps"
    if evaluation.every and kind == "likelihood":
        yield "evaluate.every judges samples, and protocol likelihood the data: set evaluate.every=0"
    if evaluation.every and few is not None and few < evaluation.fewest:
        yield f"evaluate.few = {few}: protocol {kind} judges {evaluation.fewest} samples or more: set as many, or null"


def augmentation(data: Data, net: Net, objective: Objective) -> Iterator[str]:
    """Augmentation for which the net has no input, or one of another size."""
    augment = shown(data).augment
    gives, takes = augment.numbers if augment else 0, net.augment
    if gives != takes:
        way = f"net.augment={gives}" if gives == 0 or net.kind == "unet" else f"net.kind=unet net.augment={gives}"
        yield (
            f"data '{data.kind}' describes how an image was augmented by {gives} numbers, net '{net.kind}' takes "
            f"{takes}: set {way}" + (", or data.augment=null" if gives else "")
        )
    if augment and objective.drop:
        yield (
            f"objective.drop = {objective.drop:g} would drop how an image was augmented with its label, and samples "
            "would look augmented: set objective.drop=0, or data.augment=null"
        )


def precision(objective: Objective, net: Net, train: Train) -> Iterator[str]:
    """Frozen weights that every pass would cast up, and an objective that amplifies rounding errors."""
    needs, lora = objective.needs, net.lora
    if lora and lora.frozen == "bfloat16" and train.precision != "bf16":
        yield (
            f"net.lora.frozen = bfloat16 saves memory where passes compute in bf16, and train.precision is "
            f"{train.precision}: set train.precision=bf16, or net.lora.frozen=float32"
        )
    demand_precision(train.precision, needs.amplifies, objective.kind)


def check_pieces(train: Train, objective: AnyObjective, ranks: int = 1) -> None:
    """Raise UserError if ranks cannot cut the batch into passes with all kinds of rows, or a field takes one rank."""
    require(pieces(train, objective, ranks))


def pieces(train: Train, objective: AnyObjective, ranks: int) -> Iterator[str]:
    """Passes without rows of a kind, and what takes one rank."""
    times = objective.times
    cuts, moving = passes(train, objective, ranks), times.moving(train.batch)
    on, ratio = f"{ranks} rank{'s' * (ranks > 1)}", getattr(times, "velocity_ratio", None)
    if moving is not None and 0 < times.moving_share < 1:
        law = getattr(times, "kind", type(times).__name__)
        said = f", velocity_ratio {ratio:g}" if isinstance(times, Jumps | Pair) else ""
        cut = f", train.micro_batch = {train.micro_batch}" if train.micro_batch else ""
        for rows in chain.from_iterable(cuts):
            if len(set(moving[rows])) == 1:
                yield (
                    f"train.batch = {train.batch}{cut} on {on} has a pass of {rows.stop - rows.start} rows without one "
                    f"with {'r = t' if moving[rows.start] else 'r < t'} (objective.times '{law}'{said}): raise "
                    f"train.batch{' or train.micro_batch' if cut else ''}{', or take fewer ranks' * (ranks > 1)}"
                )
    share_of(train.share, ranks)
    if ranks > 1 and train.compile == "loss":
        yield f"train.compile = loss is for one rank, not for {ranks}: set train.compile=blocks"


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
        of = source and f" of {source}"
        raise UserError(
            f"{name}.scale = {guide.scale:g} would guide once more what the knobs of objective "
            f"'{objective.kind}'{of} guide already: set {name}.scale=1, and sample.knobs{of}"
        )


def teaching(teacher: Teacher | None, objective: Objective, data: Data, train: Train) -> Iterator[str]:
    """A coupling that would part a teacher's pairs, and guidance of a teacher that is double or without classes.

    What the teacher can do is checked when it is opened.
    """
    if not teacher:
        return
    needs = objective.needs
    if teacher.pairs and train.coupling:
        yield (
            "train.coupling would part the data of teacher.pairs from the noise that they come from: set "
            "train.coupling=null, or teacher.pairs=null"
        )
    guide, own = teacher.guide, GuidanceScale.of(needs)
    guide.check(data.kind, has_classes(data), 1.0, GuidanceScale(), name="teacher.guide")
    if guide.active and (needs.knobs or own.active):
        field, off = (own.field, own.off) if own.active else ("objective.w", "objective.w=null")
        yield f"{field} would guide what teacher.guide has guided: set teacher.guide.scale=1, or train with {off}"


def beginning(start: Start | None, objective: Objective, train: Train) -> Iterator[str]:
    """An objective that learns from the net that training begins with, without a start."""
    who = f"objective '{objective.kind}'"
    if objective.needs.ref == 1 and not (start and train.ref == 1):
        yield (
            f"{who} with low learns from the net that training begins with: set start.source to a run of all times, "
            "train.ref=1, and in train.ema {decay: 1} as the last"
        )
