"""Whether the values of a run fit together, checked when it is read; `dumo.run.fit` checks what is opened.

A function per kind of mismatch says in a line each what does not fit, with the way out; the first line is raised.
"""

from collections.abc import Collection, Iterable, Iterator
from itertools import chain

from dumo.config.conditions import Conditions, shown
from dumo.config.subject import prior, subject
from dumo.config.teacher import Start, Teacher
from dumo.config.tree import Evaluation, Tree
from dumo.data import Data, Images, Latents
from dumo.data.caption import Templates
from dumo.flow import solver
from dumo.flow.guide import CFG, GuidanceScale
from dumo.flow.path import Path
from dumo.flow.slope import demand_precision
from dumo.flow.times import Jumps, Pair
from dumo.nets import Net
from dumo.nets.precondition import VELOCITIES
from dumo.objectives import Objective
from dumo.training.layout import share_of
from dumo.training.spec import Train
from dumo.training.step import passes
from dumo.types import Guide, UserError

ANY_SHAPE = ("dit", "diffusers")  # the nets that take samples of any shape


def check(run: Tree) -> None:
    """Raise UserError for the first mismatch between the values of a run; no net is made and no file is read."""
    data, net, objective, path, train = run.data, run.net, run.objective, run.path, run.train
    require(captions(data, net, run.evaluate), unconditional(data, objective, run.sample.guide, run.teacher))
    require(
        buckets(data, net, run.teacher),
        augmentation(data, net, objective),
        formulas(objective, path, net),
        precision(objective, net, train),
    )
    check_pieces(train, objective)
    require(guidance(objective, data))
    check_guided(run.sample.guide, data, objective, run.guided)
    require(
        teaching(run.teacher, objective, data, train),
        beginning(run.start, objective, train),
        subject(run),
        prior(data, run.teacher, objective, train),
        unknown("sample.knobs", run.sample.knobs, objective.needs.knobs, f"objective '{objective.kind}'", "knob"),
    )
    solver.check(run.sample.solver, run.reads, *run.sample.nfe, *run.evaluate.nfe)
    run.evaluate.protocol.check(run.pixels, data.labels)
    require(validation(run.evaluate))


def require(*faults: Iterable[str]) -> None:
    """Raise UserError with the first fault, if there is one."""
    for fault in chain.from_iterable(faults):
        raise UserError(fault)


def captions(data: Data, net: Net, evaluation: Evaluation) -> Iterator[str]:
    """Captions without texts, texts without captions, and captions that are judged by and do not exist."""
    texts, given = net.texts, Conditions(data).captions
    where = "data.images.captions" if isinstance(data, Latents) else "data.captions"
    reads = texts is not None and texts.kind != "codes"
    if texts is not None and texts.kind == "pipeline" and not given:
        yield f"net.texts reads captions, and data '{data.kind}' have none. {ways_to_captions(data)}"
    elif bool(given) != reads:
        yield (
            f"{where} gives the captions that net.texts reads: set both, or neither. Here data '{data.kind}' give "
            f"{'some' if given else 'none'}, and net '{net.kind}' reads {'some' if reads else 'none'}"
        )
    if evaluation.protocol.kind == "clip-score" and not given:
        yield (
            f"protocol clip-score compares images with captions, and data '{data.kind}' give none: set {where}, or "
            "choose another protocol"
        )
    if evaluation.captions == "held" and not (isinstance(given, Templates) and given.held):
        yield (
            f"evaluate.captions=held asks for templates that are held out, and {where}.held names none: name some, or "
            "set evaluate.captions=seen"
        )


def unconditional(data: Data, objective: Objective, sampled: CFG, teacher: Teacher | None) -> Iterator[str]:
    """Images to edit, and rows of none: no model that edits is called without one."""
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


def buckets(data: Data, net: Net, teacher: Teacher | None) -> Iterator[str]:
    """Buckets with a net of one size, or with a teacher whose pairs are squares."""
    images = shown(data)
    if not (isinstance(data, Images | Latents) and isinstance(images, Images) and images.buckets):
        return
    field = "data.images.buckets" if isinstance(data, Latents) else "data.buckets"
    if net.kind not in ANY_SHAPE:
        yield f"net '{net.kind}' is made for one size, and {field} has several: set {field}=null, or net.kind=dit"
    if teacher and teacher.pairs:
        yield f"teacher.pairs are squares, and {field} has other shapes: set {field}=null, or teacher.pairs=null"


def ways_to_captions(data: Data) -> str:
    """How a pretrained model comes to texts."""
    where = "data.images.captions" if isinstance(data, Latents) else "data.captions"
    return (
        f"Give them, --set {where}.kind=files, or make them of the classes' names, --set '{where}={{kind: templates, "
        'templates: ["a photo of a {}"]}\'; or take random codes for the classes, '
        f"--set {where}=null --set net.texts.kind=codes, and the model reads no prompt"
    )


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


def formulas(objective: Objective, path: Path, net: Net) -> Iterator[str]:
    """A path or times that the objective has no formulas for, and what preconditioning has none for."""
    needs, who = objective.needs, f"objective '{objective.kind}'"
    if path.kind not in needs.formulas.paths:
        yield f"{who} has its formulas for path {_or(needs.formulas.paths)}, not '{path.kind}'"
    if objective.times.climbs and not needs.formulas.climbs:
        yield (
            f"objective.times.both_ways makes jumps up to the noise, for which {who} has no formulas: set "
            "objective.times.both_ways=false, or take objective.kind=f2d2 or meanflow"
        )
    others = tuple(sorted({*needs.heads} - {*VELOCITIES}))
    odd = [f"the negative times of {who}"] if needs.signed else []
    odd += [f"path '{path.kind}'"] if path.kind != "linear" else []
    odd += [f"head {_or(others)}"] if others else []
    if net.precondition != "none" and odd:
        yield (
            f"net.precondition '{net.precondition}' is made for velocities (heads {_or(VELOCITIES)}) on path "
            f"'linear', not for {odd[0]}: set net.precondition=none"
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


def check_pieces(train: Train, objective: Objective, ranks: int = 1) -> None:
    """Raise UserError if ranks cannot cut the batch into passes with all kinds of rows, or a field takes one rank."""
    require(pieces(train, objective, ranks))


def pieces(train: Train, objective: Objective, ranks: int) -> Iterator[str]:
    """Passes without rows of a kind, and what takes one rank."""
    times = objective.times
    cuts, moving = passes(train, objective, ranks), times.moving(train.batch)
    on, ratio = f"{ranks} rank{'s' * (ranks > 1)}", getattr(times, "velocity_ratio", None)
    if moving is not None and 0 < times.moving_share < 1:
        said = f", velocity_ratio {ratio:g}" if isinstance(times, Jumps | Pair) else ""
        cut = f", train.micro_batch = {train.micro_batch}" if train.micro_batch else ""
        for rows in chain.from_iterable(cuts):
            if len(set(moving[rows])) == 1:
                yield (
                    f"train.batch = {train.batch}{cut} on {on} has a pass of {rows.stop - rows.start} rows without one "
                    f"with {'r = t' if moving[rows.start] else 'r < t'} (objective.times '{times.kind}'{said}): raise "
                    f"train.batch{' or train.micro_batch' if cut else ''}{', or take fewer ranks' * (ranks > 1)}"
                )
    share_of(train.share, ranks)
    if ranks > 1 and train.compile == "loss":
        yield f"train.compile = loss is for one rank, not for {ranks}: set train.compile=blocks"


def guidance(objective: Objective, data: Data) -> Iterator[str]:
    """Guidance in training without classes."""
    guide, scale = objective.needs.guide, GuidanceScale.of(objective.needs)
    guided, field, off = guide.active if isinstance(guide, Guide) else scale.scale != 1, scale.field, scale.off
    if objective.needs.knobs and not guided:  # iMF's, which a field of its own guides
        guided, field, off = True, "objective.w", "objective.w=null"
    if guided and not _classes(data):
        yield f"{field} asks for guidance, but data '{data.kind}' has no classes to guide by: set {off}"


def check_guided(
    guide: CFG,
    data: Data,
    objective: Objective,
    trained: GuidanceScale,
    name: str = "sample.guide",
    source: str = "",
) -> None:
    """Raise UserError for guidance of a net that never saw a missing label, or that is guided already.

    `trained` is its guidance in training, `name` the field that asks, `source` the run if it is read for another.
    """
    guide.check(data.kind, _classes(data), objective.drop, trained, name=name, whose=source)
    if guide.active and objective.needs.knobs:
        of = source and f" of {source}"
        raise UserError(
            f"{name}.scale = {guide.scale:g} would guide once more what the knobs of objective "
            f"'{objective.kind}'{of} guide already: set {name}.scale=1, and sample.knobs{of}"
        )


def teaching(teacher: Teacher | None, objective: Objective, data: Data, train: Train) -> Iterator[str]:
    """A teacher from which the objective does not learn, and guidance of it that is double or without classes.

    What the teacher can do is checked when it is opened.
    """
    needs, pairs = objective.needs, bool(teacher and teacher.pairs)
    if (needs.teacher.points or needs.teacher.velocity == "must") and (
        not teacher or pairs != bool(needs.teacher.points)
    ):
        what, way = ("trajectories", "{count: 8192}") if needs.teacher.points else ("velocity", "null")
        yield (
            f"objective '{objective.kind}' learns from a teacher's {what}: set teacher.source to the folder of a "
            f"run that has a velocity, and teacher.pairs={way}"
        )
    if not teacher:
        return
    if pairs and train.coupling:
        yield (
            "train.coupling would part the data of teacher.pairs from the noise that they come from: set "
            "train.coupling=null, or teacher.pairs=null"
        )
    if not pairs and needs.teacher.velocity == "no":
        yield (
            f"objective '{objective.kind}' learns from no velocity, so a teacher's says nothing to it: set "
            "teacher.pairs, or teacher=null"
        )
    guide, own = teacher.guide, GuidanceScale.of(needs)
    guide.check(data.kind, _classes(data), 1.0, GuidanceScale(), name="teacher.guide")
    if guide.active and (needs.knobs or own.active):
        field, off = (own.field, own.off) if own.active else ("objective.w", "objective.w=null")
        yield f"{field} would guide what teacher.guide has guided: set teacher.guide.scale=1, or train with {off}"


def beginning(start: Start | None, objective: Objective, train: Train) -> Iterator[str]:
    """Heads to begin with that do not exist, and theta^- of a first stage without one."""
    who = f"objective '{objective.kind}'"
    yield from unknown("start.heads", start.heads if start else (), objective.needs.heads, who, "head")
    if objective.needs.ref == 1 and not (start and train.ref == 1):
        yield (
            f"{who} with low learns from the net that training begins with: set start.source to a run of all times, "
            "train.ref=1, and in train.ema {decay: 1} as the last"
        )


def unknown(field: str, names: Iterable[str], there: Collection[str], who: str, what: str) -> Iterator[str]:
    """Names of a field that are not among those that there are."""
    have = f"its {what}s are {', '.join(there)}" if there else f"it has none: set {field}={{}}"
    for name in names:
        if name not in there:
            yield f"{field}.{name}: {who} has no such {what}, {have}"


def _classes(data: Data) -> int:
    """How many there are; some, where they are not counted yet."""
    return data.classes if Conditions(data).known else 1


def _or(names: tuple[str, ...]) -> str:
    return " or ".join(f"'{name}'" for name in names)
