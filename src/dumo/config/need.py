"""What the parts of a run ask of one another: names that one asks for, less names that another has, must leave none.

`dumo.config.check` raises the first fault. A function per subject lists its needs.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from dumo.config.conditions import Conditions, shown
from dumo.config.tree import Tree
from dumo.data import Data, Images, Latents
from dumo.data.caption import Templates
from dumo.flow.guide import GuidanceScale, Guide
from dumo.nets.precondition import VELOCITIES

ANY_SIZE = ("dit", "diffusers")  # the nets that take samples of any size


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
    data, net, texts = run.data, run.net, run.net.texts
    given = Conditions(data).captions
    field = captions_field(data)
    data_has = names_of(
        {
            "captions": bool(given),
            "held-out templates": isinstance(given, Templates) and bool(given.held),
        }
    )
    net_reads = names_of({"captions": texts is not None and texts.kind != "codes"})
    judged = names_of({"captions": run.evaluate.protocol.kind == "clip-score"})
    held = names_of({"held-out templates": run.evaluate.captions == "held"})

    def unpaired(_: str) -> str:
        if texts is not None and texts.kind == "pipeline":
            return f"net.texts reads captions, and data '{data.kind}' have none. {ways_to_captions(data)}"
        give = "some" if given else "none"
        reads = "some" if net_reads else "none"
        return (
            f"{field} gives the captions that net.texts reads: set both, or neither. Here data '{data.kind}' give "
            f"{give}, and net '{net.kind}' reads {reads}"
        )

    yield Need(net_reads, data_has, unpaired)
    yield Need(names_of({"captions": bool(given)}), net_reads, unpaired)
    yield Need(
        judged,
        data_has,
        lambda _: (
            f"protocol clip-score compares images with captions, and data '{data.kind}' give none: set {field}, or "
            "choose another protocol"
        ),
    )
    yield Need(
        held,
        data_has,
        lambda _: (
            f"evaluate.captions=held asks for templates that are held out, and {field}.held names none: name some, or "
            "set evaluate.captions=seen"
        ),
    )


def sizes(run: Tree) -> Iterator[Need]:
    """Images of several sizes, for which a net must be made; a teacher's pairs are squares."""
    net, teacher = run.net, run.teacher
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
    has = objective.needs.formulas
    yield Need(
        [run.path.kind],
        has.paths,
        lambda path: f"objective '{objective.kind}' has its formulas for path {quoted(has.paths)}, not '{path}'",
    )
    yield Need(
        names_of({"jumps up": objective.times.climbs}),
        names_of({"jumps up": has.climbs}),
        lambda _: (
            f"objective.times.both_ways makes jumps up to the noise, for which objective '{objective.kind}' has no "
            "formulas: set objective.times.both_ways=false, or take objective.kind=f2d2 or meanflow"
        ),
    )


def preconditioning(run: Tree) -> Iterator[Need]:
    """What a net is preconditioned for: velocities on the linear path, at positive times."""
    precondition, objective = run.net.precondition, run.objective
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
    field, off = trained_guidance(run)
    yield Need(
        names_of({"classes": field is not None}),
        names_of({"classes": has_classes(run.data)}),
        lambda _: f"{field} asks for guidance, but data '{run.data.kind}' has no classes to guide by: set {off}",
    )


def teaching(run: Tree) -> Iterator[Need]:
    """A teacher's velocity or trajectories, which the objective may have to learn from, and may be unable to."""
    objective, teacher = run.objective, run.teacher
    needs = objective.needs.teacher
    learns = "trajectories" if needs.points else "velocity"
    gives = names_of(
        {
            "velocity": teacher is not None and not teacher.pairs,
            "trajectories": teacher is not None and bool(teacher.pairs),
        }
    )
    pairs = "{count: 8192}" if needs.points else "null"
    yield Need(
        names_of({learns: needs.points > 0 or needs.velocity == "must"}),
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
    return named("sample.knobs", run.sample.knobs, run.objective.needs.knobs, run.objective.kind, "knob")


def heads(run: Tree) -> Iterator[Need]:
    """Heads that begin as others, of those that the objective has."""
    begun = run.start.heads if run.start else ()
    return named("start.heads", begun, run.objective.needs.heads, run.objective.kind, "head")


def named(field: str, asks: Collection[str], has: Collection[str], objective: str, what: str) -> Iterator[Need]:
    """Names that a field gives, of those that an objective has."""
    those = f"its {what}s are {', '.join(has)}" if has else f"it has none: set {field}={{}}"
    yield Need(asks, has, lambda name: f"{field}.{name}: objective '{objective}' has no such {what}, {those}")


def names_of(facts: Mapping[str, bool]) -> list[str]:
    """The names of what is so."""
    return [name for name, holds in facts.items() if holds]


def quoted(names: Collection[str]) -> str:
    """'a' or 'b'."""
    return " or ".join(f"'{name}'" for name in names)


def captions_field(data: Data) -> str:
    """The field of the images' captions."""
    return "data.images.captions" if isinstance(data, Latents) else "data.captions"


def buckets_field(data: Data) -> str | None:
    """The field of the images' several sizes; None: they have one."""
    images = shown(data)
    if not (isinstance(data, Images | Latents) and isinstance(images, Images) and images.buckets):
        return None
    return "data.images.buckets" if isinstance(data, Latents) else "data.buckets"


def ways_to_captions(data: Data) -> str:
    """How a pretrained model comes to texts."""
    field = captions_field(data)
    return (
        f"Give them, --set {field}.kind=files, or make them of the classes' names, --set '{field}={{kind: templates, "
        'templates: ["a photo of a {}"]}\'; or take random codes for the classes, '
        f"--set {field}=null --set net.texts.kind=codes, and the model reads no prompt"
    )


def trained_guidance(run: Tree) -> tuple[str | None, str]:
    """The field that guides in training (None: none does), and what to set for it not to."""
    needs = run.objective.needs
    scale = GuidanceScale.of(needs)
    guided = needs.guide.active if isinstance(needs.guide, Guide) else scale.scale != 1
    if guided:
        return scale.field, scale.off
    if needs.knobs:  # iMF's, which a field of its own guides
        return "objective.w", "objective.w=null"
    return None, ""


def has_classes(data: Data) -> bool:
    """Whether there are classes; those that are not counted yet are taken for some."""
    return data.classes > 0 if Conditions(data).known else True
