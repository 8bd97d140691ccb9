"""Times at which a sampler looks at the net, from noise (at or just below t = 1) down to data (t = 0).

A solver of n steps takes the n + 1 uniform times start, ..., start / n, 0. A sampler that jumps straight to the data
and noises again visits n times, the last of them above 0. Its uniform grid s = 1, (n - 1) / n, ..., 1 / n is bent by
a power, t = start s^p, and the one number that says how much is m, the time at s = 1/2: start (1/2)^p = m. Solved for
p, this reads t = start (m / start)^log2(1 / s), which at s = 1 and s = 1/2 is exact.
"""

from collections.abc import Sequence
from math import log2

from dumo.types import Sample, Time


def uniform(n: int, start: float = 1.0) -> list[float]:
    """The n + 1 times from `start` to 0 that cut [0, start] into n equal steps."""
    return [start * ((n - k) / n) for k in range(n + 1)]


def jumps(n: int, m: float = 0.5, start: float = 1.0) -> list[float]:
    """The n times of the jumps to the data, for 0 < m < start: two of them are (start, m). Ours."""
    return [start * (m / start) ** log2(n / (n - k)) for k in range(n)]


def rows(times: Sequence[float], like: Sample) -> list[Time]:
    """Each time, once per row of `like`, on its device and in its precision."""
    return [like.new_full((len(like),), t) for t in times]
