"""What the parts of a run ask of one another: every name that one asks for must be among those that another has.

A function per subject yields its `Need`s; `faults` has a line for each name that is missing, and `dumo.config.check`
raises the first.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from dumo.config.conditions import Conditions, shown
from dumo.config.tree import Tree
from dumo.data import Data, has_images, is_images, is_latents
from dumo.data.caption import Templates
from dumo.flow.guide import GuidanceScale, Guide
from dumo.nets.precondition import VELOCITIES
from dumo.objectives import Objective

ANY_SIZE = ("dit", "diffusers")  # the nets that take samples of any size
BY_KNOBS = GuidanceScale(field="objective.w", off="objective.w=null")  # iMF's, by a field of its own


@dataclass(frozen=True)
class Need:
    """Names that one part of a run asks for, and those that another has."""

    asks: Collection[str]
    has: Collection[str]
    fault: Callable[[str], str]  # a line for a name that is missing, with the way out

    def faults(self) -> Iterator[str]:
        """A line for each name that is missing."""
        for name in self.asks:
            if name not in self.has:
                yield self.fault(name)


def faults(run: Tree) -> Iterator[str]:
    """A line for each name that a part of the run asks for in vain."""
    for needs_of in (captions, sizes, formulas, preconditioning, classes, teaching, inputs, heads):
        for need in needs_of(run):
            yield from need.faults()


def captions(run: Tree) -> Iterator[Need]:
    """Captions, and who reads them."""
    data = run.data
    texts = run.net.texts
    captioning = Conditions(data).captions
    has_held_out = isinstance(captioning, Templates) and bool(captioning.held)
    field = captions_field(data)
    data_has = names_of({"captions": bool(captioning), "held-out templates": has_held_out})
    net_reads = names_of({"captions": texts is not None and texts.kind != "codes"})
    protocol_reads = names_of({"captions": run.evaluate.protocol.kind == "clip-score"})
    judged_by = names_of({"held-out templates": run.evaluate.captions == "held"})

    def unpaired(_: str) -> str:
        if texts is not None and texts.kind == "pipeline":
            return f"net.texts reads captions, and data '{data.kind}' have none. {ways_to_captions(data)}"
        data_captions = "some" if captioning else "none"
        net_captions = "some" if net_reads else "none"
        return (
            f"{field} gives the captions that net.texts reads: set both, or neither. Here data '{data.kind}' give "
            f"{data_captions}, and net '{run.net.kind}' reads {net_captions}"
        )

    yield Need(net_reads, data_has, unpaired)
    yield Need(names_of({"captions": bool(captioning)}), net_reads, unpaired)
    yield Need(
        protocol_reads,
        data_has,
        lambda _: (
            f"protocol clip-score compares images with captions, and data '{data.kind}' give none: set {field}, or "
            "choose another protocol"
        ),
    )
    yield Need(
        judged_by,
        data_has,
        lambda _: (
            f"evaluate.captions=held asks for templates that are held out, and {field}.held names none: name some, or "
            "set evaluate.captions=seen"
        ),
    )


def sizes(run: Tree) -> Iterator[Need]:
    """Images of several sizes, for which a net must be made; a teacher's pairs are squares."""
    net = run.net
    teacher = run.teacher
    field = buckets_field(run.data)
    several = names_of({"several sizes": field is not None})
    yield Need(
        several,
        names_of({"several sizes": net.kind in ANY_SIZE}),
        lambda _: f"net '{net.kind}' is made for one size, and {field} has several: set {field}=null, or net.kind=dit",
    )
    yield Need(
        several,
        names_of({"several sizes": not (teacher and teacher.pairs)}),
        lambda _: f"teacher.pairs are squares, and {field} has other shapes: set {field}=null, or teacher.pairs=null",
    )


def formulas(run: Tree) -> Iterator[Need]:
    """A path, and jumps up to the noise, that the objective must have formulas for."""
    objective = run.objective
    formulas = objective.needs.formulas
    yield Need(
        [run.path.kind],
        formulas.paths,
        lambda path: f"objective '{objective.kind}' has its formulas for path {quoted(formulas.paths)}, not '{path}'",
    )
    yield Need(
        names_of({"jumps up": objective.times.climbs}),
        names_of({"jumps up": formulas.climbs}),
        lambda _: (
            f"objective.times.both_ways makes jumps up to the noise, for which objective '{objective.kind}' has no "
            "formulas: set objective.times.both_ways=false, or take objective.kind=f2d2 or meanflow"
        ),
    )


def preconditioning(run: Tree) -> Iterator[Need]:
    """What a net is preconditioned for: velocities on the linear path, at positive times."""
    precondition = run.net.precondition
    objective = run.objective
    if precondition == "none":
        return
    asks = names_of({f"the negative times of objective '{objective.kind}'": objective.needs.signed})
    asks += [f"path '{run.path.kind}'", *(f"head '{head}'" for head in sorted(objective.needs.heads))]
    yield Need(
        asks,
        ["path 'linear'", *(f"head '{head}'" for head in VELOCITIES)],
        lambda name: (
            f"net.precondition '{precondition}' is made for velocities (heads {quoted(VELOCITIES)}) on path 'linear', "
            f"not for {name}: set net.precondition=none"
        ),
    )


def classes(run: Tree) -> Iterator[Need]:
    """Classes, which guidance in training asks for."""
    trained = trained_guidance(run.objective)
    if trained is None:
        return
    yield Need(
        ["classes"],
        names_of({"classes": has_classes(run.data)}),
        lambda _: (
            f"{trained.field} asks for guidance, but data '{run.data.kind}' has no classes to guide by: set "
            f"{trained.off}"
        ),
    )


def teaching(run: Tree) -> Iterator[Need]:
    """A teacher's velocity or trajectories, which the objective may have to learn from, and may be unable to."""
    objective = run.objective
    teacher = run.teacher
    needs = objective.needs.teacher
    gives = names_of(
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
        names_of({"velocity": needs.velocity != "no", "trajectories": True}),
        lambda name: (
            f"objective '{objective.kind}' learns from no {name}, so a teacher's says nothing to it: set "
            "teacher.pairs, or teacher=null"
        ),
    )


def inputs(run: Tree) -> Iterator[Need]:
    """Inputs that sampling sets, of those that the objective lets be set."""
    return named_by_field("sample.knobs", run.sample.knobs, run.objective.needs.knobs, run.objective.kind, "knob")


def heads(run: Tree) -> Iterator[Need]:
    """Heads that begin as others, of those that the objective has."""
    started = run.start.heads if run.start else ()
    return named_by_field("start.heads", started, run.objective.needs.heads, run.objective.kind, "head")


def named_by_field(
    field: str, asks: Collection[str], has: Collection[str], objective: str, noun: str
) -> Iterator[Need]:
    """Names that a field gives, of those that an objective has."""
    valid = f"its {noun}s are {', '.join(has)}" if has else f"it has none: set {field}={{}}"
    yield Need(asks, has, lambda name: f"{field}.{name}: objective '{objective}' has no such {noun}, {valid}")


def names_of(facts: Mapping[str, bool]) -> list[str]:
    """The names of what is so."""
    return [name for name, holds in facts.items() if holds]


def quoted(names: Collection[str]) -> str:
    """'a' or 'b'."""
    return " or ".join(f"'{name}'" for name in names)


def captions_field(data: Data) -> str:
    """The field of the images' captions."""
    return "data.images.captions" if is_latents(data) else "data.captions"


def buckets_field(data: Data) -> str | None:
    """The field of the images' several sizes; None: they have one."""
    images = shown(data)
    if not (has_images(data) and is_images(images) and images.buckets):
        return None
    return "data.images.buckets" if is_latents(data) else "data.buckets"


def ways_to_captions(data: Data) -> str:
    """How a pretrained model comes to texts."""
    field = captions_field(data)
    return (
        f"Give them, --set {field}.kind=files, or make them of the classes' names, --set '{field}={{kind: templates, "
        'templates: ["a photo of a {}"]}\'; or take random codes for the classes, '
        f"--set {field}=null --set net.texts.kind=codes, and the model reads no prompt"
    )


def trained_guidance(objective: Objective) -> GuidanceScale | None:
    """What guides in training, whose scale may be 1 in all; None: nothing does."""
    needs = objective.needs
    trained = GuidanceScale.of(needs)
    guided = needs.guide.active if isinstance(needs.guide, Guide) else trained.scale != 1
    if guided:
        return trained
    return BY_KNOBS if needs.knobs else None


def has_classes(data: Data) -> bool:
    """Whether there are classes; those that are not counted yet are taken for some."""
    return data.classes > 0 or not Conditions(data).known
