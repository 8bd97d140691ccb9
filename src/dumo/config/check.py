"""What of a run does not fit together: each check looks at a few of its parts, and refuses one mismatch of theirs.

They are made when a run is read, before any work; each raises UserError, which says what is wrong, and the way out.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

from dumo.config.pieces import check_pieces
from dumo.config.tree import Tree
from dumo.data import Latents
from dumo.data.augment import Edm
from dumo.data.caption import Templates
from dumo.flow.secant import demand_precision
from dumo.flow.slope import DualSlope
from dumo.nets import Pretrained
from dumo.nets.family import Family
from dumo.nets.precondition import VELOCITIES
from dumo.nets.text import TextTable
from dumo.sampling import solver
from dumo.sampling.guidance import CFG, GuidanceScale
from dumo.types import UserError


def check(run: Tree) -> None:
    """Refuse parts that do not fit one another, the first found."""
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
    """Refuse captions that the net does not read, texts that there are no captions for, and none that are held out."""
    texts, captions = getattr(run.net, "texts", None), run.captions
    where = "data.images.captions" if isinstance(run.data, Latents) else "data.captions"
    if captions and texts is None:
        can = "set net.texts" if hasattr(run.net, "texts") else f"net '{run.net.kind}' can read none: set net.kind=dit"
        raise UserError(f"{where} gives captions, and the net reads no texts: {can}, or {where}=null")
    if texts and not captions and (texts.kind != "file" or not run.data.classes):  # a file may have a row per class
        way = "net.texts=null" if run.data.kind == "moons" else f"set {where}, or net.texts=null"
        raise UserError(f"net.texts reads captions, and data '{run.data.kind}' give none: {way}")
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
    """Refuse augmentation that the net has no input for, or a wrong one."""
    augment: Edm | None = getattr(run.images, "augment", None)
    if augment and isinstance(run.data, Latents):
        raise UserError("data.images.augment: images are encoded as they are: set data.images.augment=null")
    told, takes = augment.numbers if augment else 0, getattr(run.net, "augment", 0)
    if told != takes:
        way = f"net.augment={told}" if told == 0 or run.net.kind == "unet" else f"net.kind=unet net.augment={told}"
        raise UserError(
            f"data '{run.data.kind}' describes how an image was augmented by {told} numbers, net "
            f"'{run.net.kind}' takes {takes}: set {way}" + (", or data.augment=null" if told else "")
        )
    if augment and run.objective.drop:
        raise UserError(
            f"objective.drop = {run.objective.drop:g} would tell the net of so many augmented images that they "
            "are not, and samples would look augmented: set objective.drop=0, or data.augment=null"
        )


def check_path(run: Tree) -> None:
    """Refuse a path that the objective has no formulas for."""
    paths = run.objective.needs.paths
    if run.path.kind not in paths:
        raise UserError(
            f"objective '{run.objective.kind}' has its formulas for path {_or(paths)}, not '{run.path.kind}'"
        )


def check_times(run: Tree) -> None:
    """Refuse times with r > t where the objective has no formulas for them."""
    if run.objective.times.climbs and not run.objective.needs.climbs:
        raise UserError(
            f"objective.times.both_ways makes jumps up to the noise, for which objective '{run.objective.kind}' has no "
            "formulas: set objective.times.both_ways=false, or take objective.kind=several or meanflow"
        )


def check_precondition(run: Tree) -> None:
    """Refuse preconditioning that is made for other heads, or for another path."""
    if run.net.precondition == "none":
        return
    others = set(run.objective.needs.heads) - set(VELOCITIES)
    if run.objective.needs.signed:
        raise UserError(
            f"net.precondition '{run.net.precondition}' is not made for the negative times of objective "
            f"'{run.objective.kind}': set net.precondition=none"
        )
    if others or run.path.kind != "linear":
        what = f"path '{run.path.kind}'" if run.path.kind != "linear" else f"head {_or(tuple(sorted(others)))}"
        raise UserError(
            f"net.precondition '{run.net.precondition}' is made for velocities on path 'linear' (heads "
            f"{_or(VELOCITIES)}), not for {what}: set net.precondition=none"
        )


def check_precision(run: Tree) -> None:
    """Refuse differences whose rounding, or whose step, is too large; and weights that every pass would cast up."""
    needs, lora = run.objective.needs, getattr(run.net, "lora", None)
    if lora and lora.frozen == "bfloat16" and run.train.precision != "bf16":
        raise UserError(
            f"net.lora.frozen = bfloat16 saves memory where passes compute in bf16, and train.precision is "
            f"{run.train.precision}: set train.precision=bf16, or net.lora.frozen=float32"
        )
    for derivative in (needs.slope if needs.derives else None, needs.rate):
        if derivative:
            derivative.check(run.train.precision, run.net.time_scale)
    demand_precision(run.train.precision, needs.amplifies, run.objective.kind)


def check_compile(run: Tree) -> None:
    """Refuse to compile a net of whose blocks torch makes no one graph with the derivative that rides along."""
    needs = run.objective.needs
    if run.train.compile == "none" or not (needs.derives and isinstance(needs.slope, DualSlope)):
        return
    row: Family | None = getattr(run.outline(short=True), "row", None) if isinstance(run.net, Pretrained) else None
    if row and not row.compiles:
        raise UserError(
            f"train.compile = {run.train.compile}: torch cannot compile the blocks of this net.source where slope "
            "'dual' rides along: set train.compile=none"
        )


def check_lookup(run: Tree) -> None:
    """Refuse to compile a loss whose net looks texts up on the host."""
    texts: object = getattr(run.net, "texts", None)
    if run.train.compile == "loss" and isinstance(texts, TextTable) and texts.mapped(run.data.classes):
        raise UserError(
            f"train.compile = loss: texts take more than net.texts.memory = {texts.memory:g} GB, so they are looked up "
            "on the host, where no compiler follows: set train.compile=blocks, or raise net.texts.memory"
        )


def check_guide(run: Tree) -> None:
    """Refuse guidance in training without classes, once it is known that there are none."""
    guide, opened = run.objective.needs.guide, GuidanceScale.of(run.objective.needs)
    guided = guide.active if guide else opened.scale != 1
    if guided and run.classes_known and not run.data.classes:
        raise UserError(
            f"{opened.field} asks for guidance, but data '{run.data.kind}' has no classes to guide by: set {opened.off}"
        )


def check_guided(run: Tree, guide: CFG, name: str = "sample.guide", whose: str = "") -> None:
    """Refuse to read the run's net guided as `name` asks: untaught without a label, or twice.

    `whose` names the run where it is read for another.
    """
    guide.check(run.data.kind, run.data.classes, run.objective.drop, run.guided, name=name, whose=whose)
    if guide.active and run.objective.needs.knobs:
        of = whose and f" of {whose}"
        raise UserError(
            f"{name}.scale = {guide.scale:g} would guide once more what the knobs of objective "
            f"'{run.objective.kind}'{of} guide already: set {name}.scale=1, and sample.knobs{of}"
        )


def check_teacher(run: Tree) -> None:
    """Refuse a teacher who says nothing to the objective, or whose guidance is there twice or without classes.

    What the teacher itself can be asked for is seen when it is opened.
    """
    if points := run.objective.needs.points:
        if not (run.teacher and run.teacher.pairs):
            raise UserError(
                f"objective '{run.objective.kind}' learns from a teacher's trajectories: set teacher.source to the "
                "folder of a run that has a velocity, and teacher.pairs.count to how many"
            )
        run.teacher.pairs.check(points)
    if run.objective.needs.taught and not (run.teacher and not run.teacher.pairs):
        raise UserError(
            f"objective '{run.objective.kind}' asks a teacher for its velocity where the net comes to: set "
            "teacher.source to the folder of a run that has one, and teacher.pairs=null"
        )
    if not run.teacher:
        return
    if run.teacher.pairs and run.train.coupling:
        raise UserError(
            "train.coupling would part the data of teacher.pairs from the noise that they come from: set "
            "train.coupling=null, or teacher.pairs=null"
        )
    needs, guide = run.objective.needs, run.teacher.guide
    if run.teacher.kind == "base":
        check_base(run)
    if not run.teacher.pairs and not needs.teachable:
        raise UserError(
            f"objective '{run.objective.kind}' learns from no velocity, so a teacher's says nothing to it: set "
            "teacher.pairs, or teacher=null"
        )
    opened = GuidanceScale.of(needs)
    guide.check(run.data.kind, run.data.classes, 1.0, GuidanceScale(), name="teacher.guide")
    if guide.active and (needs.knobs or opened.active):
        field, off = (opened.field, opened.off) if opened.active else ("objective.w", "objective.w=null")
        raise UserError(
            f"{field} would guide what teacher.guide has guided: set teacher.guide.scale=1, or train with {off}"
        )


def check_base(run: Tree) -> None:
    """Refuse the base of a net that has no adapters, or on a path of which that model's velocity is not."""
    way = "set teacher.kind=run and teacher.source to the folder of a run that can teach"
    base: Callable[[], AbstractContextManager[None]] | None = getattr(run.outline(short=True), "base", None)
    if base is None:
        raise UserError(
            f"teacher.kind = base asks for the net with its adapters off, and net '{run.net.kind}' has none, so its "
            f"first weights are gone once it trains: {way}"
        )
    with base():  # a net that may have adapters refuses it itself where it has none
        pass
    if (run.path.kind, run.path.sd) != ("linear", 1):
        raise UserError(f"teacher.kind = base knows the velocity on path 'linear' of sd 1, not on this one: {way}")


def check_start(run: Tree) -> None:
    """Refuse to begin heads that are not there, and to begin anew where theta^- is to be a first stage."""
    there = run.objective.needs.heads
    if strange := [name for name in (run.start.heads if run.start else ()) if name not in there]:
        raise UserError(
            f"start.heads.{strange[0]}: objective '{run.objective.kind}' has no such head, its heads are "
            f"{', '.join(there)}"
        )
    if run.objective.needs.ref == 1 and not (run.start and run.train.ref == 1):
        raise UserError(
            f"objective '{run.objective.kind}' with low learns from the net that training begins with: set "
            "start.source to a run of all times, train.ref=1, and in train.ema {decay: 1, ramp: false} as the last"
        )


def check_knobs(run: Tree) -> None:
    """Refuse knobs that the net does not have, and those of guidance where there is nothing to guide by."""
    kind, there = run.objective.kind, run.objective.needs.knobs
    if strange := [name for name in run.sample.knobs if name not in there]:
        have = f"its knobs are {', '.join(there)}" if there else "it has none: set sample.knobs={}"
        raise UserError(f"sample.knobs.{strange[0]}: objective '{kind}' has no such knob, {have}")
    if there and not run.data.classes:
        raise UserError(
            f"objective '{kind}' teaches its knobs {', '.join(there)} to guide, but data '{run.data.kind}' has no "
            "classes to guide by: train without guidance, which of 'imf' is objective.w=null"
        )


def _or(names: tuple[str, ...]) -> str:
    return " or ".join(f"'{name}'" for name in names)
