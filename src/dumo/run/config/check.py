"""Whether the parts of a run fit together, checked when it is read: each check refuses one kind of mismatch.

Each raises UserError, with what is wrong and the way out.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import chain

from dumo.data import Latents
from dumo.data.augment import Edm
from dumo.data.caption import Templates
from dumo.flow import solver
from dumo.flow.guide import CFG, GuidanceScale
from dumo.flow.slope import DualSlope, demand_precision
from dumo.flow.times import Jumps, Pair
from dumo.nets import Pretrained
from dumo.nets.family import Family
from dumo.nets.precondition import VELOCITIES
from dumo.nets.table import TextTable
from dumo.run.config.tree import Tree
from dumo.training.layout import share_of
from dumo.training.step import passes
from dumo.types import Guide, UserError


def check(run: Tree) -> None:
    """Refuse parts that do not fit together; the first mismatch raises."""
    check_captions(run)
    run.outline(short=True)
    check_augment(run)
    check_path(run)
    check_times(run)
    check_precondition(run)
    check_precision(run)
    check_pieces(run)
    check_compile(run)
    check_lookup(run)
    check_guide(run)
    check_guided(run, run.sample.guide)
    check_teacher(run)
    check_start(run)
    check_knobs(run)
    solver.check(run.sample.solver, run.reads, *run.sample.nfe, *run.evaluate.nfe)
    run.evaluate.protocol.check(run.pixels, run.data.labels)


def check_captions(run: Tree) -> None:
    """Refuse captions without texts, texts without captions, and held out captions that do not exist."""
    texts, captions = getattr(run.net, "texts", None), run.conditions.captions
    where = "data.images.captions" if isinstance(run.data, Latents) else "data.captions"
    of_classes = texts and texts.kind == "file" and run.data.classes  # a file may have a row per class
    if bool(captions) != bool(texts) and not of_classes:
        raise UserError(
            f"{where} gives the captions that net.texts reads: set both, or neither. Here data '{run.data.kind}' give "
            f"{'some' if captions else 'none'}, and net '{run.net.kind}' reads {'some' if texts else 'none'}"
        )
    if run.evaluate.protocol.kind == "clip-score" and not captions:
        raise UserError(
            f"protocol clip-score compares images with captions, and data '{run.data.kind}' give none: set {where}, or "
            "choose another protocol"
        )
    if run.evaluate.captions == "held" and not (isinstance(captions, Templates) and captions.held):
        raise UserError(
            f"evaluate.captions=held asks for templates that are held out, and {where}.held names none: name some, or "
            "set evaluate.captions=seen"
        )


def check_augment(run: Tree) -> None:
    """Refuse augmentation for which the net has no input, or one of another size."""
    augment: Edm | None = getattr(run.images, "augment", None)
    if augment and isinstance(run.data, Latents):
        raise UserError("data.images.augment: images are encoded as they are: set data.images.augment=null")
    gives, takes = augment.numbers if augment else 0, getattr(run.net, "augment", 0)
    if gives != takes:
        way = f"net.augment={gives}" if gives == 0 or run.net.kind == "unet" else f"net.kind=unet net.augment={gives}"
        raise UserError(
            f"data '{run.data.kind}' describes how an image was augmented by {gives} numbers, net "
            f"'{run.net.kind}' takes {takes}: set {way}" + (", or data.augment=null" if gives else "")
        )
    if augment and run.objective.drop:
        raise UserError(
            f"objective.drop = {run.objective.drop:g} would drop how an image was augmented with its label, and "
            "samples would look augmented: set objective.drop=0, or data.augment=null"
        )


def check_path(run: Tree) -> None:
    """Refuse a path that the objective has no formulas for."""
    paths = run.objective.needs.formulas.paths
    if run.path.kind not in paths:
        raise UserError(
            f"objective '{run.objective.kind}' has its formulas for path {_or(paths)}, not '{run.path.kind}'"
        )


def check_times(run: Tree) -> None:
    """Refuse times with r > t where the objective has no formulas for them."""
    if run.objective.times.climbs and not run.objective.needs.formulas.climbs:
        raise UserError(
            f"objective.times.both_ways makes jumps up to the noise, for which objective '{run.objective.kind}' has no "
            "formulas: set objective.times.both_ways=false, or take objective.kind=f2d2 or meanflow"
        )


def check_precondition(run: Tree) -> None:
    """Refuse preconditioning that is made for other heads, another path, or no negative times."""
    others = tuple(sorted({*run.objective.needs.heads} - {*VELOCITIES}))
    what = [f"the negative times of objective '{run.objective.kind}'"] if run.objective.needs.signed else []
    what += [f"path '{run.path.kind}'"] if run.path.kind != "linear" else []
    what += [f"head {_or(others)}"] if others else []
    if run.net.precondition != "none" and what:
        raise UserError(
            f"net.precondition '{run.net.precondition}' is made for velocities (heads {_or(VELOCITIES)}) on path "
            f"'linear', not for {what[0]}: set net.precondition=none"
        )


def check_precision(run: Tree) -> None:
    """Refuse differences with too large a rounding error or step, and frozen weights that every pass would cast up."""
    needs, lora = run.objective.needs, getattr(run.net, "lora", None)
    if lora and lora.frozen == "bfloat16" and run.train.precision != "bf16":
        raise UserError(
            f"net.lora.frozen = bfloat16 saves memory where passes compute in bf16, and train.precision is "
            f"{run.train.precision}: set train.precision=bf16, or net.lora.frozen=float32"
        )
    if needs.slope:
        needs.slope.check(run.train.precision, run.net.time_scale)
    demand_precision(run.train.precision, needs.amplifies, run.objective.kind)


def check_pieces(run: Tree, ranks: int = 1) -> None:
    """Refuse a batch that the ranks cannot cut into passes with all kinds of rows, and what takes one rank."""
    train, times = run.train, run.objective.times
    pieces, moving = passes(train, run.objective, ranks), times.moving(train.batch)
    if moving is not None and 0 < times.moving_share < 1:
        for rows in chain.from_iterable(pieces):
            if len(set(moving[rows])) == 1:
                raise UserError(_lacking(run, ranks, rows, "r = t" if moving[rows.start] else "r < t"))
    share_of(train.share, ranks)
    if ranks > 1 and train.compile == "loss":
        raise UserError(f"train.compile = loss is for one rank, not for {ranks}: set train.compile=blocks")


def _lacking(run: Tree, ranks: int, rows: slice, kind: str) -> str:
    """Which pass lacks rows of this kind, and the way out."""
    train, times = run.train, run.objective.times
    ratio = f", velocity_ratio {times.velocity_ratio:g}" if isinstance(times, Jumps | Pair) else ""
    cut = f", train.micro_batch = {train.micro_batch}" if train.micro_batch else ""
    return (
        f"train.batch = {train.batch}{cut} on {ranks} rank{'s' * (ranks > 1)} has a pass of {rows.stop - rows.start} "
        f"rows without one with {kind} (objective.times '{times.kind}'{ratio}): raise train.batch"
        f"{' or train.micro_batch' if cut else ''}{', or take fewer ranks' if ranks > 1 else ''}"
    )


def check_compile(run: Tree) -> None:
    """Refuse to compile blocks of which torch makes no single graph with a dual slope."""
    if run.train.compile == "none" or not isinstance(run.objective.needs.slope, DualSlope):
        return
    row: Family | None = getattr(run.outline(short=True), "row", None) if isinstance(run.net, Pretrained) else None
    if row and not row.compiles:
        raise UserError(
            f"train.compile = {run.train.compile}: torch cannot compile the blocks of this net.source where slope "
            "'dual' rides along: set train.compile=none"
        )


def check_lookup(run: Tree) -> None:
    """Refuse to compile a loss whose net looks up texts on the host."""
    texts: object = getattr(run.net, "texts", None)
    if run.train.compile == "loss" and isinstance(texts, TextTable) and texts.mapped(run.data.classes):
        raise UserError(
            f"train.compile = loss: texts take more than net.texts.memory = {texts.memory:g} GB, so they are looked up "
            "on the host, where no compiler follows: set train.compile=blocks, or raise net.texts.memory"
        )


def check_guide(run: Tree) -> None:
    """Refuse guidance in training without classes."""
    guide, opened = run.objective.needs.guide, GuidanceScale.of(run.objective.needs)
    guided, field, off = guide.active if isinstance(guide, Guide) else opened.scale != 1, opened.field, opened.off
    if run.objective.needs.knobs:
        guided, field, off = True, "objective.w", "objective.w=null"
    if guided and not _classes(run):
        raise UserError(f"{field} asks for guidance, but data '{run.data.kind}' has no classes to guide by: set {off}")


def check_guided(run: Tree, guide: CFG, name: str = "sample.guide", whose: str = "") -> None:
    """Refuse guidance of a net that never saw a missing label, or that is guided already.

    `name` is the field that asks; `whose` names the run if it is read for another.
    """
    guide.check(run.data.kind, _classes(run), run.objective.drop, run.guided, name=name, whose=whose)
    if guide.active and run.objective.needs.knobs:
        of = whose and f" of {whose}"
        raise UserError(
            f"{name}.scale = {guide.scale:g} would guide once more what the knobs of objective "
            f"'{run.objective.kind}'{of} guide already: set {name}.scale=1, and sample.knobs{of}"
        )


def check_teacher(run: Tree) -> None:
    """Refuse a teacher from which the objective does not learn, or whose guidance is double or without classes.

    What the teacher can do is checked when it is opened.
    """
    needs, pairs = run.objective.needs, bool(run.teacher and run.teacher.pairs)
    learns, points = needs.teacher.velocity, needs.teacher.points
    if (points or learns == "must") and (not run.teacher or pairs != bool(points)):
        what, way = ("trajectories", "{count: 8192}") if points else ("velocity", "null")
        raise UserError(
            f"objective '{run.objective.kind}' learns from a teacher's {what}: set teacher.source to the folder of a "
            f"run that has a velocity, and teacher.pairs={way}"
        )
    if not run.teacher:
        return
    if pairs and run.train.coupling:
        raise UserError(
            "train.coupling would part the data of teacher.pairs from the noise that they come from: set "
            "train.coupling=null, or teacher.pairs=null"
        )
    if run.teacher.kind == "base":
        check_base(run)
    if not pairs and learns == "no":
        raise UserError(
            f"objective '{run.objective.kind}' learns from no velocity, so a teacher's says nothing to it: set "
            "teacher.pairs, or teacher=null"
        )
    guide, opened = run.teacher.guide, GuidanceScale.of(needs)
    guide.check(run.data.kind, _classes(run), 1.0, GuidanceScale(), name="teacher.guide")
    if guide.active and (needs.knobs or opened.active):
        field, off = (opened.field, opened.off) if opened.active else ("objective.w", "objective.w=null")
        raise UserError(
            f"{field} would guide what teacher.guide has guided: set teacher.guide.scale=1, or train with {off}"
        )


def check_base(run: Tree) -> None:
    """Refuse the base of a net without adapters, or on another path than that of its velocity."""
    base: Callable[[], AbstractContextManager[None]] | None = getattr(run.outline(short=True), "base", None)
    if base is None or (run.path.kind, run.path.sd) != ("linear", 1):
        raise UserError(
            f"teacher.kind = base asks for the net with its adapters off, on path 'linear' of sd 1; this is net "
            f"'{run.net.kind}' on path '{run.path.kind}' of sd {run.path.sd:g}: set teacher.kind=run and "
            "teacher.source to the folder of a run that can teach"
        )
    with base():  # a net that may have adapters refuses it if it has none
        pass


def check_start(run: Tree) -> None:
    """Refuse to begin heads that do not exist, and theta^- of a first stage without one."""
    there = run.objective.needs.heads
    if strange := [name for name in (run.start.heads if run.start else ()) if name not in there]:
        raise UserError(
            f"start.heads.{strange[0]}: objective '{run.objective.kind}' has no such head, its heads are "
            f"{', '.join(there)}"
        )
    if run.objective.needs.ref == 1 and not (run.start and run.train.ref == 1):
        raise UserError(
            f"objective '{run.objective.kind}' with low learns from the net that training begins with: set "
            "start.source to a run of all times, train.ref=1, and in train.ema {decay: 1} as the last"
        )


def check_knobs(run: Tree) -> None:
    """Refuse knobs that the net does not have."""
    kind, there = run.objective.kind, run.objective.needs.knobs
    if strange := [name for name in run.sample.knobs if name not in there]:
        have = f"its knobs are {', '.join(there)}" if there else "it has none: set sample.knobs={}"
        raise UserError(f"sample.knobs.{strange[0]}: objective '{kind}' has no such knob, {have}")


def _classes(run: Tree) -> int:
    """How many there are; some, where they are not counted yet."""
    return run.data.classes if run.conditions.known else 1


def _or(names: tuple[str, ...]) -> str:
    return " or ".join(f"'{name}'" for name in names)
