"""EDM's preconditioning (Karras et al. 2022, Sec. 5 and Tab. 1), on the linear path and for heads that are velocities.

EDM takes y = x + sigma z and makes the data of it, D = c_skip y + c_out F(c_in y), so that what the layers F take in
and are to put out has variance 1 at every sigma. For data of standard deviation 1, as it is taken here,

    c_skip = 1 / (1 + sigma^2),   c_out = sigma / (1 + sigma^2)^(1/2),   c_in = 1 / (1 + sigma^2)^(1/2).

Our x_t is (1 - t) y with sigma = t / (1 - t). Let n^2 = t^2 + (1 - t)^2, so 1 + sigma^2 = n^2 / (1 - t)^2. Then the
layers take in c_in y = x_t / n, and D = (1 - t) x_t / n^2 + t F / n. A head is the velocity that leads to D,
(x_t - D) / t, where t drops out:

    head = (2t - 1) x_t / n^2 - F / n,

finite at every t. Of Gaussian data of variance 1 the first part is the velocity itself, and F = 0. At the negative
times that stand for another task, FACM's and TwinFlow's, neither holds.

With `data` (x-prediction, as JiT and pMF have it: Lu et al. 2026, arXiv 2601.22158) the layers put out the data itself,
D = F, which a net of many pixels learns more easily than noise; and all heads are velocities still,

    head = (x_t - F) / max(t, 0.05).

Below t = 0.05, pMF's bound, F is not the data, but x_t - 0.05 times the head.
"""

from collections.abc import Callable
from typing import Literal

from dumo.autodiff.dual import primal
from dumo.types import Array, Sample, Time, lift

Precondition = Literal["none", "edm", "data"]
EARLIEST = 0.05  # pMF's code, `pmfDiT.py`
VELOCITIES = ("v", "u", "m")  # the heads that it is meant for


def framed(kind: Precondition, x: Sample, t: Time) -> tuple[Array, Callable[[Array], Array]]:
    """Return what the layers take in at time t, and what makes a head, shaped like x, of what they put out."""
    if kind == "none":
        return x, lambda y: y
    past = lift(t, x).to(x.dtype)
    if kind == "data":
        near = (primal(past) < EARLIEST).to(x.dtype)
        least = near * EARLIEST + (1 - near) * past
        return x, lambda y: (x - y) / least
    n = (past * past + (1 - past) * (1 - past)) ** 0.5
    skip = (2 * past - 1) / (n * n) * x
    return x / n, lambda y: skip - y / n
