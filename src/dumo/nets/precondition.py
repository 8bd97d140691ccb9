"""EDM's preconditioning (Karras et al. 2022, Sec. 5 and Tab. 1), on the linear path and for heads that are velocities.

EDM takes y = x + sigma z and predicts the data by D = c_skip y + c_out F(c_in y), so that inputs and targets of the
layers F have variance 1 at every sigma. For data of standard deviation 1, which is assumed here,

    c_skip = 1 / (1 + sigma^2),   c_out = sigma / (1 + sigma^2)^(1/2),   c_in = 1 / (1 + sigma^2)^(1/2).

Our x_t is (1 - t) y with sigma = t / (1 - t). Let n^2 = t^2 + (1 - t)^2, so 1 + sigma^2 = n^2 / (1 - t)^2. Then the
input of the layers is c_in y = x_t / n, and D = (1 - t) x_t / n^2 + t F / n. A head is the velocity that leads to D,
(x_t - D) / t, where t cancels:

    head = (2t - 1) x_t / n^2 - F / n,

finite at every t. For Gaussian data of variance 1 the first part is the velocity itself, and F = 0. At the negative
times that mark another task, FACM's and TwinFlow's, neither holds.

With `data` (x-prediction, as in JiT and pMF: Lu et al. 2026, arXiv 2601.22158) the layers predict the data itself,
D = F, which a net of many pixels learns more easily than noise; all heads are still velocities,

    head = (x_t - F) / max(t, 0.05).

Below t = 0.05, pMF's bound, F is not the data, but x_t - 0.05 times the head.

`apply_precondition` is what a net calls, once per pass.
"""

from collections.abc import Callable
from typing import Literal

from dumo.autodiff.dual import primal
from dumo.types import Array, Sample, Time, lift

Precondition = Literal["none", "edm", "data"]
_MIN_TIME = 0.05  # x - F is divided by at least this t, with `data` (pMF's code, `pmfDiT.py`)
PRECONDITIONED_HEADS = ("v", "u", "m")  # velocities, which alone can be preconditioned


def apply_precondition(kind: Precondition, x: Sample, t: Time) -> tuple[Array, Callable[[Array], Array]]:
    """Return the layers' input for x (b, ...) at time t (b,), and the function from their output to a head.

    All are shaped like x.
    """
    if kind == "none":
        return x, lambda y: y
    time = lift(t, x).to(x.dtype)
    if kind == "data":
        is_early = (primal(time) < _MIN_TIME).to(x.dtype)  # 0 or 1
        divisor = is_early * _MIN_TIME + (1 - is_early) * time  # max(t, _MIN_TIME), with the tangent of t above it
        return x, lambda y: (x - y) / divisor
    n = (time * time + (1 - time) * (1 - time)) ** 0.5
    skip = (2 * time - 1) / (n * n) * x
    return x / n, lambda y: skip - y / n
