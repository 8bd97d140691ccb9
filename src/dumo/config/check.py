"""What of a run does not fit together: each check looks at a few of its parts, and refuses one mismatch of theirs.

They are made when a run is read, before any work; each raises UserError, which says what is wrong, and the way out.
"""

from itertools import pairwise

from dumo.config.tree import Tree
from dumo.data import Latents
from dumo.data.augment import Edm
from dumo.flow.secant import demand_precision
from dumo.flow.times import Pair
from dumo.nets.precondition import VELOCITIES
from dumo.sampling import solver
from dumo.sampling.guidance import CFG, GuidanceScale
from dumo.types import UserError


def check(run: Tree) -> None:
    """Refuse parts that do not fit one another, the first found."""
    run.outline()
    check_augment(run)
    check_path(run)
    check_precondition(run)
    check_precision(run)
    check_groups(run)
    check_guide(run)
    check_guided(run, run.sample.guide)
    check_teacher(run)
    check_start(run)
    check_knobs(run)
    solver.check(run.sample.solver, run.reads, *run.sample.nfe, *run.evaluate.nfe)
    run.evaluate.protocol.check(run.pixels, run.data.classes)


def check_augment(run: Tree) -> None:
    """Refuse augmentation that the net is not told of, or told wrong."""
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
    """Refuse differences whose rounding, or whose step, is too large."""
    needs = run.objective.needs
    for derivative in (needs.slope if needs.derives else None, needs.rate):
        if derivative:
            derivative.check(run.train.precision, run.net.time_scale)
    demand_precision(run.train.precision, needs.amplifies, run.objective.kind)


def check_groups(run: Tree) -> None:
    """Refuse pieces of a batch that part rows which belong together, and pieces that lack one kind of row."""
    times, batch, n = run.objective.times, run.train.batch, run.train.accumulate
    group = times.group
    if group > 1 and batch % (group * n):
        raise UserError(
            f"objective.times of kind '{times.kind}' keeps {group} rows together, so train.batch = {batch} must be "
            f"a multiple of {group * n} ({group} * train.accumulate; with several processes, times their number)"
        )
    moving = times.moving(batch)
    if moving is None or not 0 < times.moving_share < 1:
        return
    where = f"objective.times of kind '{times.kind}'"
    if isinstance(times, Pair):
        where = f"objective.times.velocity_ratio = {times.velocity_ratio:g}"
    for start, end in pairwise(batch * i // n for i in range(n + 1)):
        if len(set(moving[start:end])) == 1:
            raise UserError(
                f"train.batch = {batch} has a piece of {end - start} rows (train.accumulate = {n}) without one "
                f"with {'r = t' if moving[start] else 'r < t'} at {where}: raise train.batch"
            )


def check_guide(run: Tree) -> None:
    """Refuse guidance in training without classes, or by rows that do not come in whole groups."""
    guide, opened = run.objective.needs.guide, GuidanceScale.of(run.objective.needs)
    guided = guide.active if guide else opened.scale != 1
    if guided and not run.data.classes:
        raise UserError(
            f"{opened.field} asks for guidance, but data '{run.data.kind}' has no classes to guide by: set {opened.off}"
        )
    if guide and guide.group > 1 and run.train.batch % (group := guide.group * run.train.accumulate):
        raise UserError(
            f"objective.guide.fraction = {1 / guide.group:g} picks one of every {guide.group} rows of a piece, but "
            f"train.batch = {run.train.batch} is no multiple of {group} ({guide.group} * train.accumulate): "
            "change train.batch, train.accumulate or objective.guide.fraction"
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
    if not run.teacher:
        return
    needs, guide = run.objective.needs, run.teacher.guide
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


def check_start(run: Tree) -> None:
    """Refuse to begin heads that are not there."""
    there = run.objective.needs.heads
    if strange := [name for name in (run.start.heads if run.start else ()) if name not in there]:
        raise UserError(
            f"start.heads.{strange[0]}: objective '{run.objective.kind}' has no such head, its heads are "
            f"{', '.join(there)}"
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
