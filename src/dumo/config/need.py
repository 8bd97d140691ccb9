"""Checks that span several parts of a run's config, such as an objective that needs a teacher.

`faults` is the entrance: it goes subject by subject, and yields a line for each thing that one part asks for and no
other part has. `dumo.config.check` raises the first. Each `_..._faults` below has one subject.

Others also use `IMF_SCALE`, `may_have_classes`, `captions_field`, `buckets_field` and `ways_to_captions`.
"""

from collections.abc import Collection, Iterator

from dumo.config.conditions import Conditions, shown_data
from dumo.config.parts import RunParts
from dumo.data import Data, has_images, is_images, is_latents
from dumo.flow.fit import climb_problem, guide_problem, path_problem, teacher_problem
from dumo.flow.guide import GuidanceScale, Guide
from dumo.nets.precondition import PRECONDITIONED_HEADS
from dumo.objectives import Objective
from dumo.runtime import door

_NETS_OF_ANY_SIZE = ("dit", "diffusers")  # kinds of nets that take samples of several sizes
# Of iMF, which draws its scale of guidance at random up to objective.w
IMF_SCALE = GuidanceScale(field="objective.w", off="objective.w=null")


def faults(run: RunParts) -> Iterator[str]:
    """A line for each thing that a part of the run asks for and no other part has, subject by subject."""
    needs = run.objective.needs
    yield from _caption_faults(run)
    buckets = buckets_field(run.data)
    if buckets is not None:
        yield from _size_faults(run, buckets)
    yield from _formula_faults(run.objective, run.path.kind)
    if run.net.precondition != "none":
        yield from _precondition_faults(run)
    if not may_have_classes(run.data):
        yield from _class_faults(run.data, run.objective)
    yield from _teacher_faults(run)
    yield from _name_faults("sample.knobs", run.sample.knobs, needs.knobs, run.objective.kind, "knob")
    if run.start:
        yield from _name_faults("start.heads", run.start.heads, needs.heads, run.objective.kind, "head")


def _caption_faults(run: RunParts) -> Iterator[str]:
    """Captions must be given exactly where the net reads them, and where the protocol or its split asks for them."""
    data = run.data
    texts = run.net.texts
    captioning = data.captions
    field = captions_field(data)
    has_captions = captioning is not None
    net_reads_captions = texts is not None and texts.kind != "codes"
    if has_captions != net_reads_captions:
        if texts is not None and texts.kind == "pipeline":
            yield f"net.texts reads captions, and data '{data.kind}' have none. {ways_to_captions(data)}"
        else:
            data_captions = "some" if has_captions else "none"
            net_captions = "some" if net_reads_captions else "none"
            yield (
                f"{field} gives the captions that net.texts reads: set both, or neither. Here data '{data.kind}' give "
                f"{data_captions}, and net '{run.net.kind}' reads {net_captions}"
            )
    if run.evaluate.protocol.kind == "clip-score" and not has_captions:
        yield (
            f"protocol clip-score compares images with captions, and data '{data.kind}' give none: set {field}, or "
            "choose another protocol"
        )
    has_held_out = captioning is not None and captioning.kind == "templates" and bool(captioning.held)
    if run.evaluate.captions == "held" and not has_held_out:
        yield (
            f"evaluate.captions=held asks for templates that are held out, and {field}.held names none: name some, or "
            "set evaluate.captions=seen"
        )


def _size_faults(run: RunParts, buckets: str) -> Iterator[str]:
    """Images of several sizes need a net that takes them, and no teacher's pairs, which are squares.

    `buckets` is the dotted path of the field that gives them these sizes.
    """
    net = run.net
    if net.kind not in _NETS_OF_ANY_SIZE:
        yield f"net '{net.kind}' is made for one size, and {buckets} has several: set {buckets}=null, or net.kind=dit"
    if run.teacher and run.teacher.pairs:
        yield f"teacher.pairs are squares, and {buckets} has other shapes: set {buckets}=null, or teacher.pairs=null"


def _formula_faults(objective: Objective, path: str) -> Iterator[str]:
    """The objective must have formulas for this kind of path, and its times must serve it."""
    wrong_path = path_problem(objective, path)
    if wrong_path and path == "diffusion":  # of a pretrained net, which knows no other
        yield f"{wrong_path}: take another objective, such as objective.kind=dumo"
    elif wrong_path:
        yield f"{wrong_path}: set path.kind={objective.needs.formulas.paths[0]}"
    wrong_times = climb_problem(objective) or guide_problem(objective)
    if wrong_times:
        yield wrong_times


def _precondition_faults(run: RunParts) -> Iterator[str]:
    """A preconditioned net gives velocities on the linear path, at positive times: the run must ask for no more."""
    objective = run.objective
    excess: list[str] = []
    if objective.needs.signed:
        excess.append(f"the negative times of objective '{objective.kind}'")
    if run.path.kind != "linear":
        excess.append(f"path '{run.path.kind}'")
    excess += [f"head '{head}'" for head in sorted(objective.needs.heads) if head not in PRECONDITIONED_HEADS]
    for name in excess:
        yield (
            f"net.precondition '{run.net.precondition}' is made for velocities (heads "
            f"{_quoted(PRECONDITIONED_HEADS)}) on path 'linear', not for {name}: set net.precondition=none"
        )


def _class_faults(data: Data, objective: Objective) -> Iterator[str]:
    """Guidance in training, by the objective's guide or its knobs, needs classes to guide by, and these data have none.

    A guide may be active although its scale is 1.
    """
    needs = objective.needs
    trained = GuidanceScale.of(needs)
    is_guided = needs.guide.active if isinstance(needs.guide, Guide) else trained.scale != 1
    if is_guided:
        guidance = trained
    elif needs.knobs:
        guidance = IMF_SCALE
    else:
        return
    yield f"{guidance.field} asks for guidance, but data '{data.kind}' has no classes to guide by: set {guidance.off}"


def _teacher_faults(run: RunParts) -> Iterator[str]:
    """The teacher must give the velocity or trajectories that the objective learns from, and nothing it cannot use.

    A trajectory is that of a label, which then must not be dropped.
    """
    objective = run.objective
    teacher = run.teacher
    needs = objective.needs.teacher
    gives_velocity = teacher is not None and not teacher.pairs
    gives_trajectories = teacher is not None and bool(teacher.pairs)
    if needs.points and not gives_trajectories:
        yield _missing_teacher(objective, "trajectories", pairs="{count: 8192}")
    if needs.points and objective.drop and may_have_classes(run.data):
        yield (
            f"objective.drop = {objective.drop:g}: objective '{objective.kind}' learns a trajectory, which is of its "
            "label, so without labels it would learn the mean over trajectories of all labels: set objective.drop=0"
        )
    if not needs.points and needs.velocity == "must" and not gives_velocity:
        yield _missing_teacher(objective, "velocity", pairs="null")
    problem = teacher_problem(objective)
    if gives_velocity and problem:
        yield f"{problem}: set teacher.pairs, or teacher=null"


def _missing_teacher(objective: Objective, subject: str, *, pairs: str) -> str:
    """The line for an objective that lacks a teacher's `subject`, which the setting `pairs` of teacher.pairs gives."""
    return (
        f"objective '{objective.kind}' learns from a teacher's {subject}: set teacher.source to the folder of a run "
        f"that has a velocity, and teacher.pairs={pairs}"
    )


def _name_faults(
    field: str, names: Collection[str], known: Collection[str], objective: str, noun: str
) -> Iterator[str]:
    """The names that a field gives must be among those that the objective has; `noun` says what they name."""
    valid = f"its {noun}s are {', '.join(known)}" if known else f"it has none: set {field}={{}}"
    for name in names:
        if name not in known:
            yield f"{field}.{name}: objective '{objective}' has no such {noun}, {valid}"


def _quoted(names: Collection[str]) -> str:
    """The names in quotation marks, as alternatives: 'a' or 'b'."""
    return " or ".join(f"'{name}'" for name in names)


def captions_field(data: Data) -> str:
    """The dotted path of the field that holds the images' captions."""
    return "data.images.captions" if is_latents(data) else "data.captions"


def buckets_field(data: Data) -> str | None:
    """The dotted path of the field by which images have several sizes; None: all have one size."""
    images = shown_data(data)
    if not (has_images(data) and is_images(images) and images.buckets):
        return None
    return "data.images.buckets" if is_latents(data) else "data.buckets"


def ways_to_captions(data: Data) -> str:
    """A message's end: three ways to give a pretrained model the captions that it reads."""
    field = captions_field(data)
    files = door.settings(f"{field}.kind=files")
    templates = door.settings(f'{field}={{kind: templates, templates: ["a photo of a {{}}"]}}')
    codes = door.settings(f"{field}=null", "net.texts.kind=codes")
    return (
        f"Give them, {files}, or make them of the classes' names, {templates}; or take random codes for the classes, "
        f"{codes}, and the model reads no prompt"
    )


def may_have_classes(data: Data) -> bool:
    """Whether the data have classes or captions, or may have some because classes are not counted yet."""
    return data.classes > 0 or not Conditions(data).are_known
