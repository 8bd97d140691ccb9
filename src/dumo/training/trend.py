"""Where the error of a training goes: its level now, and the lowest it was.

A loss may be weighted by its own size, and is then constant or of any sign; its parts are not, they are mean squares.
Their sum over a batch is the error e of a step, and the level a running geometric mean of it,

    log level_n = d log level_{n-1} + (1 - d) log e_n,        d = 0.95, ours: some twenty steps,

which one batch that is a thousand times worse multiplies by 1.4 only. A training that learns something ends below
where it began, so a level far above the lowest says that it was lost on the way, though every number of it is finite.
"""

from math import exp, isfinite, log

from pydantic import BaseModel, ConfigDict

DECAY = 0.95
FAR = 10.0  # times the lowest: ours; guidance, growing targets and noise move the level by less
LEAST = 1e-12  # of an error, below which its logarithm says nothing


class Trend(BaseModel):
    """The level of the error, and its lowest; None before the first step. A function of the steps made."""

    model_config = ConfigDict(frozen=True)

    level: float | None = None
    lowest: float | None = None

    def after(self, error: float) -> "Trend":
        """The trend with one step more, of this error, which is not negative; of no number, the same."""
        if not isfinite(error):  # of a part that is only watched
            return self
        error = max(error, LEAST)
        level = error if self.level is None else exp(DECAY * log(self.level) + (1 - DECAY) * log(error))
        return Trend(level=level, lowest=level if self.lowest is None else min(level, self.lowest))

    @property
    def good(self) -> bool:
        """Whether the level is within FAR of the lowest."""
        return self.level is None or self.lowest is None or self.level <= FAR * self.lowest
