"""What a loss asks of its slope: one that listens takes the slope's place for a pass."""

from typing import Any, Protocol, Self

from dumo.types import Array, Cond, Derivative, Frozen, Heads, Net, Objective, Sample


class Overheard:
    """A slope that notes what it was asked for, and what it answered."""

    def __init__(self, slope: Derivative) -> None:
        """Nothing was asked yet."""
        self.slope, self.kind, self.check = slope, slope.kind, slope.check
        self.nets: tuple[Net, Frozen] | None = None
        self.asked: dict[str, Any] = {}
        self.slopes: Heads = ()

