"""What a run costs, counted: by which arms of a plan have as much."""

from collections.abc import Callable
from functools import wraps

from dumo.run.config.spec import Run
from dumo.run.plan import cost


def once(count: Callable[[Run], float]) -> Callable[[Run], float]:
    """A count that is remembered by all it depends on: most runs of a plan differ in their training alone."""
    known: dict[str, float] = {}

    @wraps(count)
    def counted(spec: Run) -> float:
        key = spec.model_dump_json(include={"data", "net", "objective", "path", "teacher"}) + repr(spec.train.ref)
        if key not in known:
            known[key] = count(spec)
        return known[key]

    return counted


@once
def units(spec: Run) -> float:
    """Forward units of a step. A teacher's pass counts as one of the net, with guidance as two."""
    teacher = spec.teacher
    taught = 0 if teacher is None or teacher.pairs else 1 if teacher.guide.scale == 1 else 2
    return taught + cost.forward_units(spec.outline(), spec.objective, spec.path, spec.data.shape, ref=spec.train.ref)


@once
def flops(spec: Run) -> float:
    """Operations of a pass, per row."""
    return cost.forward_flops(spec.outline(), spec.objective, spec.data.shape)


def operations(spec: Run) -> float:
    """Operations of a step."""
    return spec.train.batch * units(spec) * flops(spec)


def pairs(spec: Run) -> float:
    """Forward units, each of a batch, in which a teacher makes pairs of noise and data before the training."""
    found = spec.teacher and spec.teacher.pairs
    return found.count * found.passes(spec.objective.needs.teacher.points) / spec.train.batch if found else 0.0
