"""Whether a slope is the derivative: du/dt compared with a central difference in float64.

Few-step objectives regress on du/dt. If it is wrong, nothing fails: the loss falls towards another target. It is wrong
easily: a difference divides the rounding of two passes by 2 h, a network may cut off the tangent of its time, and a
rule or a kernel may have a bug, perhaps on one device alone.

`slope_errors` compares a slope with the derivative, and `max_slope_error` says how far it may be off. For a user's
network the derivative is a `central_difference`, which holds whatever its code does. `dumo.Flow` calls `choose_slope`,
which takes the first exact slope that runs and is right. A new network has layers of zeros, behind which du/dt is 0
whatever the slope, so a copy is examined in which these are noise (`copy_without_zero_layers`).
`dumo.run.examination` compares the network of a run in the same way; if it is dumo's own, with the forward mode of
`dumo.autodiff.float64`.

`exact`, `derivatives` and `errors` have an entry for each output of the network, in their order: heads (b, ...), then
gauges (b,).
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import inf
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy

from dumo.autodiff.dual import RAISED_ON_DUALS
from dumo.autodiff.float64 import float64_copy
from dumo.flow.adapter import NetAdapter
from dumo.flow.precision import precision_of
from dumo.flow.slope import MAX_SLOPE_ERROR, CentralSlope, DualSlope, JvpSlope, Slope
from dumo.flow.trainable import inputs_of
from dumo.runtime import dist
from dumo.types import Cond, Frozen, Heads, Needs, Net, NoisyBatch, Sample, Time, UserError, unwrap

# Half-steps h of the central difference, in units of t. The short ones are exact in float64; the long ones serve
# networks that compute a part, such as the embedding of t, in float32.
_HALF_STEPS = (1e-6, 1e-5, 1e-4, 4e-4, 2e-3, 1e-2)
# Two neighbouring half-steps whose differences agree to this are taken at once
_AGREEMENT = 1e-4
# The largest relative error of an exact slope in fp32. Measured errors are 1e-6, and 2e-4 with an embedding of 1000
# radians. Of `central`, and in other precisions, it is MAX_SLOPE_ERROR.
_MAX_EXACT_ERROR = 0.01
# An l2 norm of du/dt below this counts as this, so that rounding is no error if du/dt is zero
_MIN_NORM = 2e-5
_MAX_COPIED_PARAMETERS = 400_000_000  # a larger network is examined as it is


@torch.no_grad()
def central_difference(
    net: nn.Module, x_t: Sample, direction: Sample, c: Cond, inputs: Mapping[str, Time], *, in_float64: bool = True
) -> tuple[Heads, float]:
    """d/dt of every output of a network by a central difference, and how uncertain it is, as a relative error.

    x_t (b, ...) moves along `direction`, dx_t/dt, and the t among `inputs` with 1. In float64 a copy of the
    network makes the passes, on the device of x_t, or on the CPU if that has no float64; otherwise the network itself,
    in the precision that holds now. The weights of the network stay as they are. The uncertainty is the difference of
    the two neighbouring half-steps that agree best, of the worst output.
    """
    attention: AbstractContextManager[object] = nullcontext()
    if in_float64:
        device = torch.device("cpu") if x_t.device.type == "mps" else x_t.device
        net = _net_in_float64(net, device)
        x_t, direction = x_t.to(device).double(), direction.to(device).double()
        inputs = {name: value.to(device).double() for name, value in inputs.items()}
        c = c.to(device)
        attention = sdpa_kernel(SDPBackend.MATH)  # which rounds least

    best: Heads = ()
    least_gap = inf
    previous: Heads = ()
    with attention, torch.autocast(x_t.device.type, enabled=False) if in_float64 else nullcontext():
        for h in _HALF_STEPS:
            behind = net(x_t - h * direction, c, **{**inputs, "t": inputs["t"] - h})
            ahead = net(x_t + h * direction, c, **{**inputs, "t": inputs["t"] + h})
            differences = tuple((end - start) / (2 * h) for start, end in zip(behind, ahead, strict=True))
            if previous:
                pairs = zip(differences, previous, strict=True)
                gap = max(float(_relative_error(longer, shorter)) for longer, shorter in pairs)
                if gap < least_gap:
                    best, least_gap = previous, gap
            # Without a copy all half-steps are taken: ranks that share the weights must make equally many passes.
            if in_float64 and least_gap < _AGREEMENT:
                break
            previous = differences
    return best or previous, least_gap


def slope_errors(
    slope: Slope,
    net: Net,
    ref: Frozen,
    x_t: Sample,
    direction: Sample,
    c: Cond,
    inputs: Mapping[str, Time],
    exact: Heads,
) -> list[Tensor]:
    """The relative l2 error of a slope, by output, in the precision that holds now.

    A loss may know the direction before the pass of the network, or only after it, and a slope may compute the two
    cases differently: the larger error counts.
    """
    errors_by_use: list[list[Tensor]] = []
    for known_direction in (direction, None):
        # `moving=None`: the derivative is wanted on all rows.
        _, along = slope(net, ref, x_t, c, toward=known_direction, moving=None, **cast(dict[str, Any], inputs))
        with torch.no_grad():
            derivatives = along(direction)
        errors_by_use.append([_relative_error(found, true) for found, true in zip(derivatives, exact, strict=True)])
    return [torch.maximum(known, unknown) for known, unknown in zip(*errors_by_use, strict=True)]


def max_slope_error(slope: Slope, precision: str) -> float:
    """The largest relative error that a slope may have in a precision, as `precision_of` names it."""
    if isinstance(slope, DualSlope | JvpSlope) and precision == "fp32":
        return _MAX_EXACT_ERROR
    return MAX_SLOPE_ERROR


def choose_slope(
    slopes: Sequence[Slope], net: NetAdapter, b: NoisyBatch, needs: Needs, *, is_copy: bool
) -> tuple[Slope, str]:
    """How du/dt of a network is taken: the first of some slopes that is right, and a report of its error for the user.

    slopes: in the order in which they are tried.
    net: the network, or its copy, on whose batch b of a few rows the slope is tried.
    is_copy: whether `net` is of a copy, which is compared in float64.

    Every rank must call it, and all choose alike. Raises UserError if no slope is the derivative.
    """
    inputs = inputs_of(b, needs)
    exact, uncertainty = _exact_derivative(net, b, inputs, is_copy=is_copy)
    # Passes may round so much that no two differences agree. An exact slope is then taken if it runs.
    uncertainty = dist.largest(uncertainty)
    is_compared = uncertainty <= MAX_SLOPE_ERROR
    failures: list[str] = []
    for slope in slopes:
        try:
            errors = slope_errors(slope, net, Frozen(net), b.x_t, b.v_t, b.c, inputs, exact)
            error = max(float(error) if error.isfinite() else inf for error in errors)
            failure = f"du/dt is {100 * error:.2g} % off a central difference"
        except (UserError, *RAISED_ON_DUALS) as raised:
            error = inf
            failure = f"{type(raised).__name__}: {str(raised).partition(chr(10))[0]}"
        is_failed_here = error == inf
        error = dist.largest(error)
        if error == inf and not is_failed_here:
            failure = "it fails on another rank"
        if not is_compared and not isinstance(slope, CentralSlope) and error < inf:
            text = f"{slope.kind}, not compared, for passes round so that differences do not agree"
            return slope, "; ".join([text, *failures])
        if error <= max_slope_error(slope, precision_of(b.x_t)) + uncertainty:
            text = f"{slope.kind}, {100 * error:.2g} % off a central difference"
            return slope, "; ".join([text, *failures])
        failures.append(f"not {slope.kind}: {failure}")
    raise UserError(
        f"no du/dt of {type(unwrap(net.net)).__name__}: {'; '.join(failures)}: change the network, or give the "
        'objective another slope, such as slope={"kind": "central"}, a difference of two passes'
    )


def copy_without_zero_layers(net: nn.Module) -> nn.Module | None:
    """A copy of a network whose layers of zeros are noise; None if it is too large, sharded, lazy or not copied.

    A head that starts at zero has du/dt = 0, to which any slope is right.
    """
    parameters = list(net.parameters())
    # Weights of torch.distributed.tensor, which is slow to import, have a `full_tensor`.
    is_sharded = bool(dist.sharded_parts(net)) or any(hasattr(p, "full_tensor") for p in parameters)
    if is_sharded or any(is_lazy(p) for p in parameters):
        return None
    if sum(p.numel() for p in parameters) > _MAX_COPIED_PARAMETERS:
        return None
    try:
        copied = copy.deepcopy(net)
    except (RuntimeError, TypeError):  # tensors that are results, as of old weight norms; locks and other handles
        return None
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in copied.parameters():
            # Drawn for every parameter, so that its noise does not depend on which others are zero.
            noise = torch.randn(p.shape, generator=generator, device="cpu").to(p)
            if not p.any():
                std = 0.1 if p.ndim < 2 else p[0].numel() ** -0.5
                p.add_(noise * std)
    return copied


def _exact_derivative(
    net: NetAdapter, b: NoisyBatch, inputs: Mapping[str, Time], *, is_copy: bool
) -> tuple[Heads, float]:
    """`central_difference` on a batch: of a copy in float64 if the network can, else in the precision that holds now.

    Under autocast and of 16 bits the uncertainty is infinite: x ± h v is then x itself, and differences agree on what
    is wrong.
    """
    direction = b.v_t.to(b.x_t)
    if is_copy:
        try:
            return central_difference(net, b.x_t, direction, b.c, inputs)
        except (RuntimeError, TypeError):  # a network that names float32 itself
            pass
    exact, uncertainty = central_difference(net, b.x_t, direction, b.c, inputs, in_float64=False)
    return exact, uncertainty if precision_of(b.x_t) == "fp32" else inf


def _net_in_float64(net: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a network, or of that in an adapter with its conditions, that computes in float64 on a device."""
    if not isinstance(net, NetAdapter):
        return float64_copy(net, device)
    adapter = net.with_net(float64_copy(unwrap(net.net), device))
    if adapter.rows is not None:
        adapter.rows = adapter.rows.to(device, torch.float64)
    return adapter


def _relative_error(derivative: Tensor, exact: Tensor) -> Tensor:
    """The l2 error over the l2 norm, which counts as _MIN_NORM at least."""
    return (derivative.to(exact) - exact).norm() / exact.norm().clamp(min=_MIN_NORM)
