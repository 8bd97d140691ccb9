"""What the parts of a run ask of one another: every name that one part asks for must be among those that another has.

`faults` is the entrance: it goes through all needs and yields a line for each name that is missing, of which
`dumo.config.check` raises the first. Each `_..._needs` below yields the needs of one subject. A fact that is true or
false counts as a name that is there or not ("captions", "classes"), so that a condition is a need like any other.

Others also use `BY_KNOBS`, `has_classes`, `captions_field`, `buckets_field` and `ways_to_captions`.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from dumo.config.conditions import Conditions, shown
from dumo.config.parts import RunParts
from dumo.data import Data, has_images, is_images, is_latents
from dumo.flow.guide import GuidanceScale, Guide
from dumo.nets.precondition import PRECONDITIONED_HEADS
from dumo.objectives import Objective
from dumo.runtime.door import settings

NETS_OF_ANY_SIZE = ("dit", "diffusers")  # kinds of nets that take samples of several sizes
BY_KNOBS = GuidanceScale(field="objective.w", off="objective.w=null")  # of iMF, whose scales are drawn up to this field


@dataclass(frozen=True)
class Need:
    """The names that one part of a run asks for, and the names that another part has."""

    asks: Collection[str]
    has: Collection[str]
    fault: Callable[[str], str]  # from a name that is missing to a line that says so, with the fix

    def faults(self) -> Iterator[str]:
        """A line for each name that is missing."""
        for name in self.asks:
            if name not in self.has:
                yield self.fault(name)


def faults(run: RunParts) -> Iterator[str]:
    """A line for each name that a part of the run asks for and no other part has, subject by subject."""
    subjects = (
        _caption_needs,
        _size_needs,
        _formula_needs,
        _precondition_needs,
        _class_needs,
        _teacher_needs,
        _named_needs,
    )
    for needs_of_subject in subjects:
        for need in needs_of_subject(run):
            yield from need.faults()


def _caption_needs(run: RunParts) -> Iterator[Need]:
    """Captions must be given exactly where the net reads them, and where the protocol or its split asks for them."""
    data = run.data
    texts = run.net.texts
    captioning = Conditions(data).captions
    has_held_out = captioning is not None and captioning.kind == "templates" and bool(captioning.held)
    field = captions_field(data)
    data_has = _true_names({"captions": bool(captioning), "held-out templates": has_held_out})
    net_reads = _true_names({"captions": texts is not None and texts.kind != "codes"})
    protocol_reads = _true_names({"captions": run.evaluate.protocol.kind == "clip-score"})
    judging_asks = _true_names({"held-out templates": run.evaluate.captions == "held"})

    def captions_fault(_: str) -> str:
        if texts is not None and texts.kind == "pipeline":
            return f"net.texts reads captions, and data '{data.kind}' have none. {ways_to_captions(data)}"
        data_captions = "some" if captioning else "none"
        net_captions = "some" if net_reads else "none"
        return (
            f"{field} gives the captions that net.texts reads: set both, or neither. Here data '{data.kind}' give "
            f"{data_captions}, and net '{run.net.kind}' reads {net_captions}"
        )

    yield Need(net_reads, data_has, captions_fault)
    yield Need(_true_names({"captions": bool(captioning)}), net_reads, captions_fault)
    yield Need(
        protocol_reads,
        data_has,
        lambda _: (
            f"protocol clip-score compares images with captions, and data '{data.kind}' give none: set {field}, or "
            "choose another protocol"
        ),
    )
    yield Need(
        judging_asks,
        data_has,
        lambda _: (
            f"evaluate.captions=held asks for templates that are held out, and {field}.held names none: name some, or "
            "set evaluate.captions=seen"
        ),
    )


def _size_needs(run: RunParts) -> Iterator[Need]:
    """Images of several sizes need a net that takes them, and no teacher's pairs, which are squares."""
    net = run.net
    teacher = run.teacher
    field = buckets_field(run.data)
    asks = _true_names({"several sizes": field is not None})
    yield Need(
        asks,
        _true_names({"several sizes": net.kind in NETS_OF_ANY_SIZE}),
        lambda _: f"net '{net.kind}' is made for one size, and {field} has several: set {field}=null, or net.kind=dit",
    )
    yield Need(
        asks,
        _true_names({"several sizes": not (teacher and teacher.pairs)}),
        lambda _: f"teacher.pairs are squares, and {field} has other shapes: set {field}=null, or teacher.pairs=null",
    )


def _formula_needs(run: RunParts) -> Iterator[Need]:
    """The objective must have formulas for the run's path, and for jumps up to the noise where its times make some."""
    objective = run.objective
    formulas = objective.needs.formulas
    yield Need(
        [run.path.kind],
        formulas.paths,
        lambda path: f"objective '{objective.kind}' has its formulas for path {_quoted(formulas.paths)}, not '{path}'",
    )
    yield Need(
        _true_names({"jumps up": objective.times.climbs}),
        _true_names({"jumps up": formulas.climbs}),
        lambda _: (
            f"objective.times.both_ways makes jumps up to the noise, for which objective '{objective.kind}' has no "
            "formulas: set objective.times.both_ways=false, or take objective.kind=f2d2 or meanflow"
        ),
    )


def _precondition_needs(run: RunParts) -> Iterator[Need]:
    """A preconditioned net gives velocities on the linear path, at positive times: the run must ask for no more."""
    precondition = run.net.precondition
    objective = run.objective
    if precondition == "none":
        return
    asks = _true_names({f"the negative times of objective '{objective.kind}'": objective.needs.signed})
    asks += [f"path '{run.path.kind}'", *(f"head '{head}'" for head in sorted(objective.needs.heads))]
    yield Need(
        asks,
        ["path 'linear'", *(f"head '{head}'" for head in PRECONDITIONED_HEADS)],
        lambda name: (
            f"net.precondition '{precondition}' is made for velocities (heads {_quoted(PRECONDITIONED_HEADS)}) on path "
            f"'linear', not for {name}: set net.precondition=none"
        ),
    )


def _class_needs(run: RunParts) -> Iterator[Need]:
    """Guidance in training needs classes to guide by."""
    trained = _trained_guidance(run.objective)
    if trained is None:
        return
    yield Need(
        ["classes"],
        _true_names({"classes": has_classes(run.data)}),
        lambda _: (
            f"{trained.field} asks for guidance, but data '{run.data.kind}' has no classes to guide by: set "
            f"{trained.off}"
        ),
    )


def _teacher_needs(run: RunParts) -> Iterator[Need]:
    """The teacher must give the velocity or trajectories that the objective learns from, and nothing it cannot use."""
    objective = run.objective
    teacher = run.teacher
    needs = objective.needs.teacher
    gives = _true_names(
        {
            "velocity": teacher is not None and not teacher.pairs,
            "trajectories": teacher is not None and bool(teacher.pairs),
        }
    )
    must_learn_from: list[str] = []
    pairs = "null"
    if needs.points:
        must_learn_from = ["trajectories"]
        pairs = "{count: 8192}"
    elif needs.velocity == "must":
        must_learn_from = ["velocity"]
    yield Need(
        must_learn_from,
        gives,
        lambda name: (
            f"objective '{objective.kind}' learns from a teacher's {name}: set teacher.source to the folder of a run "
            f"that has a velocity, and teacher.pairs={pairs}"
        ),
    )
    yield Need(
        gives,
        _true_names({"velocity": needs.velocity != "no", "trajectories": True}),
        lambda name: (
            f"objective '{objective.kind}' learns from no {name}, so a teacher's says nothing to it: set "
            "teacher.pairs, or teacher=null"
        ),
    )


def _named_needs(run: RunParts) -> Iterator[Need]:
    """The knobs that sampling sets, and the heads that `start.heads` fills, must be among the objective's."""
    objective = run.objective
    started_heads = run.start.heads if run.start else ()
    yield _field_need("sample.knobs", run.sample.knobs, objective.needs.knobs, objective.kind, "knob")
    yield _field_need("start.heads", started_heads, objective.needs.heads, objective.kind, "head")


def _field_need(field: str, asks: Collection[str], has: Collection[str], objective: str, noun: str) -> Need:
    """The names that a field gives must be among those that an objective has; `noun` says what they name."""
    valid = f"its {noun}s are {', '.join(has)}" if has else f"it has none: set {field}={{}}"
    return Need(asks, has, lambda name: f"{field}.{name}: objective '{objective}' has no such {noun}, {valid}")


def _true_names(facts: Mapping[str, bool]) -> list[str]:
    """The names of the facts that are true, in order."""
    return [name for name, is_true in facts.items() if is_true]


def _quoted(names: Collection[str]) -> str:
    """The names in quotation marks, as alternatives: 'a' or 'b'."""
    return " or ".join(f"'{name}'" for name in names)


def captions_field(data: Data) -> str:
    """The dotted path of the field that holds the images' captions."""
    return "data.images.captions" if is_latents(data) else "data.captions"


def buckets_field(data: Data) -> str | None:
    """The dotted path of the field by which images have several sizes; None: all have one size."""
    images = shown(data)
    if not (has_images(data) and is_images(images) and images.buckets):
        return None
    return "data.images.buckets" if is_latents(data) else "data.buckets"


def ways_to_captions(data: Data) -> str:
    """A message's end: three ways to give a pretrained model the captions that it reads."""
    field = captions_field(data)
    files = settings(f"{field}.kind=files")
    templates = settings(f'{field}={{kind: templates, templates: ["a photo of a {{}}"]}}')
    codes = settings(f"{field}=null", "net.texts.kind=codes")
    return (
        f"Give them, {files}, or make them of the classes' names, {templates}; or take random codes for the classes, "
        f"{codes}, and the model reads no prompt"
    )


def _trained_guidance(objective: Objective) -> GuidanceScale | None:
    """The guidance that is trained into the net, by the objective's guide or its knobs; None: there is none.

    A guide may be active although its scale is 1.
    """
    needs = objective.needs
    trained = GuidanceScale.of(needs)
    is_guided = needs.guide.active if isinstance(needs.guide, Guide) else trained.scale != 1
    if is_guided:
        return trained
    return BY_KNOBS if needs.knobs else None


def has_classes(data: Data) -> bool:
    """Whether the data have classes or captions. Data whose classes are not counted yet pass as having some."""
    return data.classes > 0 or not Conditions(data).known
