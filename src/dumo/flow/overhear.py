"""What a loss asks of its slope, and its slope answers: one that listens takes the slope's place."""

from typing import Any

from dumo.types import Array, Cond, Derivative, Frozen, Heads, Net, Objective, Sample


class Overheard:
    """A slope that notes what it was asked for, and what it answered."""

    def __init__(self, slope: Derivative) -> None:
        """Nothing was asked yet."""
        self.slope, self.kind = slope, slope.kind
        self.nets: tuple[Net, Frozen] | None = None  # of the pass
        self.inputs: dict[str, Any] = {}  # of the pass, with `toward` and `moving` where these were given
        self.asked: dict[str, Any] = {}  # for the derivative: x, c, along and the inputs
        self.slopes: Heads = ()

    def __call__(self, net: Net, ref: Frozen, x: Array, c: Cond, **inputs: Any) -> tuple[Heads, Any]:  # noqa: ANN401, a slope's
        """As the slope does."""
        self.nets, self.inputs = (net, ref), inputs
        heads, along = self.slope(net, ref, x, c, **inputs)

        def noted(w: Sample) -> Heads:
            self.asked, self.slopes = {"x": x, "c": c, "along": w, **inputs}, along(w)
            return self.slopes

        return heads, noted

    def check(self, precision: str, time_scale: float = 1.0) -> None:
        """As the slope does."""
        self.slope.check(precision, time_scale)


def exchanged(objective: Objective, old: object, new: object) -> Objective:
    """The objective with `new` in the field that holds `old`, unchecked: another slope, another guide."""
    return objective.model_copy(update={name: new for name, value in objective if value is old})
