"""Times at which a solver looks at the net: from noise, t = `start` at or just below 1, down to data, t = 0.

With n steps these are the n + 1 times start, ..., start / n, 0. Solvers that end with a jump to the data visit n times,
the last of them above 0. Their uniform grid s = 1, (n - 1) / n, ..., 1 / n is bent by a power, t = start s^p, and the
one number that says how much is m, the time at s = 1/2: start (1/2)^p = m. Solved for p, this reads
t = start (m / start)^log2(1 / s), which at s = 1 and s = 1/2 is exact.
"""

from collections.abc import Sequence
from math import log2
from typing import Annotated

from pydantic import Field

from dumo.types import Sample, Time

Start = Annotated[float, Field(gt=0, le=1)]  # the first time; UCGM starts at 0.999 with SD-VAE
Middle = Annotated[float, Field(gt=0, lt=1)]  # m
Middles = Annotated[dict[Annotated[int, Field(ge=2)], Middle], Field(exclude_if=lambda m_at: not m_at)]  # by passes


def uniform(n: int, start: float = 1.0) -> list[float]:
    """The n + 1 times from `start` to 0 that cut [0, start] into n equal steps."""
    return [start * ((n - k) / n) for k in range(n + 1)]


def jumps(n: int, m: float = 0.5, start: float = 1.0) -> list[float]:
    """The n times of the jumps to the data, for 0 < m < start: two of them are (start, m). Ours."""
    return [start * (m / start) ** log2(n / (n - k)) for k in range(n)]


def rows(times: Sequence[float], like: Sample) -> list[Time]:
    """Each time, once per row of `like`, on its device and in its precision."""
    return [like.new_full((len(like),), t) for t in times]
