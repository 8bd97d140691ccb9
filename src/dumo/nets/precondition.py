"""EDM's preconditioning (Karras et al. 2022, Sec. 5 and Tab. 1), on the linear path and for heads that are velocities.

EDM predicts the data from y = x + sigma z by D = c_skip y + c_out F(c_in y), so that inputs and targets of the layers F
have variance 1 at every sigma. For data of standard deviation 1, as assumed here,

    c_skip = 1 / (1 + sigma^2),   c_out = sigma / (1 + sigma^2)^(1/2),   c_in = 1 / (1 + sigma^2)^(1/2).

On the linear path x_t = (1 - t) y with sigma = t / (1 - t). With n^2 = t^2 + (1 - t)^2, 1 + sigma^2 = n^2 / (1 - t)^2,
so the input of the layers is c_in y = x_t / n, and D = (1 - t) x_t / n^2 + t F / n. A head is the velocity to D,
(x_t - D) / t, in which t cancels:

    head = (2t - 1) x_t / n^2 - F / n,

which is finite at every t. For Gaussian data of variance 1 the first term is the velocity, and F = 0. This does not
hold at the negative times of FACM and TwinFlow, which mark another task.

With `data` (x-prediction, as in JiT and pMF: Lu et al. 2026, arXiv 2601.22158) the layers predict the data, D = F,
which is easier to learn than noise for many pixels; all heads are still velocities,

    head = (x_t - F) / max(t, 0.05).

Below t = 0.05, pMF's bound, F is not the data, but x_t - 0.05 times the head.

A network calls `apply_precondition` once per pass.
"""

from collections.abc import Callable
from typing import Literal

from dumo.autodiff.dual import primal
from dumo.types import Array, Sample, Time, lift

Precondition = Literal["none", "edm", "data"]
# With `data`, the smallest divisor of x - F (pMF's code, `pmfDiT.py`).
_MIN_TIME = 0.05
# The heads that are velocities. Other heads cannot be preconditioned.
PRECONDITIONED_HEADS = ("v", "u", "m")


def apply_precondition(kind: Precondition, x: Sample, t: Time) -> tuple[Array, Callable[[Array], Array]]:
    """Return the input of the layers for x (b, ...) at time t (b,), and a function from their output to a head.

    All are shaped like x.
    """
    if kind == "none":
        return x, lambda y: y
    time = lift(t, x).to(x.dtype)
    if kind == "data":
        # max(t, _MIN_TIME), with the tangent of t above _MIN_TIME.
        is_early = (primal(time) < _MIN_TIME).to(x.dtype)
        divisor = is_early * _MIN_TIME + (1 - is_early) * time
        return x, lambda y: (x - y) / divisor
    n = (time * time + (1 - time) * (1 - time)) ** 0.5
    skip = (2 * time - 1) / (n * n) * x
    return x / n, lambda y: skip - y / n
