"""Check du/dt of a slope against a central difference in float64.

Few-step objectives use du/dt in their target, so a wrong derivative trains another target without an error. Possible
causes are rounding in a difference, a network that detaches its time, and a bug in a rule or a kernel, perhaps on one
device only.

`slope_errors` measures the error of a slope, and `max_slope_error` returns the tolerance. The reference for a user's
network is a `central_difference`, which does not depend on its code. `dumo.Flow` calls `choose_slope`, which returns
the first slope that runs and is accurate. In a new network, layers of zeros may hide du/dt, so the check uses a copy
with noise in these layers (`copy_without_zero_layers`). `dumo.run.examination` checks the network of a run in the same
way, with `dumo.autodiff.float64` as the reference for dumo's own networks.

`exact`, `derivatives` and `errors` have an entry for each output of the network: heads (b, ...), then gauges (b,).
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

# Half-steps h of the central difference, in units of t. The short ones are exact in float64; the long ones are for
# networks that compute a part, such as the embedding of t, in float32.
_HALF_STEPS = (1e-6, 1e-5, 1e-4, 4e-4, 2e-3, 1e-2)
# Stop at two neighbouring half-steps with this relative difference.
_AGREEMENT = 1e-4
# The largest relative error of an exact slope in fp32. Measured errors are 1e-6, and 2e-4 with an embedding of 1000
# radians. For `central` and other precisions it is MAX_SLOPE_ERROR.
_MAX_EXACT_ERROR = 0.01
# The smallest norm of du/dt in a relative error, so that rounding is not an error if du/dt is zero.
_MIN_NORM = 2e-5
# A larger network is not copied for the check.
_MAX_COPIED_PARAMETERS = 400_000_000


@torch.no_grad()
def central_difference(
    net: nn.Module, x_t: Sample, direction: Sample, c: Cond, inputs: Mapping[str, Time], *, in_float64: bool = True
) -> tuple[Heads, float]:
    """Compute d/dt of every output of a network by a central difference, and its relative uncertainty.

    x_t (b, ...) changes with `direction` = dx_t/dt, and t in `inputs` with 1. In float64, a copy of the network makes
    the passes, on the device of x_t, or on the CPU if that device has no float64; otherwise the network itself does, in
    the current precision. The uncertainty is the difference of the two neighbouring half-steps that agree best, for the
    worst output.
    """
    attention: AbstractContextManager[object] = nullcontext()
    if in_float64:
        device = torch.device("cpu") if x_t.device.type == "mps" else x_t.device
        net = _net_in_float64(net, device)
        x_t, direction = x_t.to(device).double(), direction.to(device).double()
        inputs = {name: value.to(device).double() for name, value in inputs.items()}
        c = c.to(device)
        attention = sdpa_kernel(SDPBackend.MATH)  # has the smallest rounding error

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
            # Without a copy, use all half-steps, because ranks that share sharded weights must make the same passes.
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
    """Return the relative l2 error of a slope for each output, in the current precision.

    A slope may compute the derivative differently if the direction is known before the pass: the larger of the two
    errors is returned.
    """
    errors_by_use: list[list[Tensor]] = []
    for known_direction in (direction, None):
        _, along = slope(net, ref, x_t, c, direction=known_direction, moving=None, **cast(dict[str, Any], inputs))
        with torch.no_grad():
            derivatives = along(direction)
        errors_by_use.append([_relative_error(found, true) for found, true in zip(derivatives, exact, strict=True)])
    return [torch.maximum(known, unknown) for known, unknown in zip(*errors_by_use, strict=True)]


def max_slope_error(slope: Slope, precision: str) -> float:
    """Return the largest acceptable relative error of a slope in a precision that `precision_of` returns."""
    if isinstance(slope, DualSlope | JvpSlope) and precision == "fp32":
        return _MAX_EXACT_ERROR
    return MAX_SLOPE_ERROR


def choose_slope(
    slopes: Sequence[Slope], net: NetAdapter, b: NoisyBatch, needs: Needs, *, is_copy: bool
) -> tuple[Slope, str]:
    """Return the first slope that is accurate, and a report of its error for the user.

    slopes: the candidates in order.
    net: the network, or a copy of it.
    b: a batch of a few rows.
    is_copy: whether `net` is a copy, which is checked in float64.

    Every rank must call it, and all choose the same slope. Raises UserError if no slope is accurate.
    """
    inputs = inputs_of(b, needs)
    exact, uncertainty = _exact_derivative(net, b, inputs, is_copy=is_copy)
    # If rounding is so large that no two differences agree, accept an exact slope that runs.
    uncertainty = dist.largest(uncertainty)
    is_compared = uncertainty <= MAX_SLOPE_ERROR
    failures: list[str] = []
    for slope in slopes:
        try:
            errors = slope_errors(slope, net, Frozen(net), b.x_t, b.v_t, b.c, inputs, exact)
            error = max(float(error) if error.isfinite() else inf for error in errors)
            failure = f"du/dt has a relative error of {error:.2g} against a central difference"
        except (UserError, *RAISED_ON_DUALS) as raised:
            error = inf
            failure = f"{type(raised).__name__}: {str(raised).partition(chr(10))[0]}"
        is_failed_here = error == inf
        error = dist.largest(error)
        if error == inf and not is_failed_here:
            failure = "it fails on another rank"
        if not is_compared and not isinstance(slope, CentralSlope) and error < inf:
            text = f"{slope.kind}: not checked, because rounding is too large for a central difference"
            return slope, "; ".join([text, *failures])
        if error <= max_slope_error(slope, precision_of(b.x_t)) + uncertainty:
            text = f"{slope.kind}: relative error {error:.2g} against a central difference"
            return slope, "; ".join([text, *failures])
        failures.append(f"not {slope.kind}: {failure}")
    raise UserError(
        f"du/dt of {type(unwrap(net.net)).__name__} cannot be computed: {'; '.join(failures)}: change the network, or "
        'set another slope of the objective, such as slope={"kind": "central"}, a difference of two passes'
    )


def copy_without_zero_layers(net: nn.Module) -> nn.Module | None:
    """Copy a network and add noise to its layers of zeros. Return None if it is too large, sharded, lazy or fails.

    A head that starts at zero has du/dt = 0, so any slope would pass the check.
    """
    parameters = list(net.parameters())
    # DTensors have a `full_tensor`. Importing torch.distributed.tensor is slow.
    is_sharded = bool(dist.sharded_parts(net)) or any(hasattr(p, "full_tensor") for p in parameters)
    if is_sharded or any(is_lazy(p) for p in parameters):
        return None
    if sum(p.numel() for p in parameters) > _MAX_COPIED_PARAMETERS:
        return None
    try:
        copied = copy.deepcopy(net)
    except (RuntimeError, TypeError):
        # Non-leaf tensors, as in old weight norms, and locks cannot be copied.
        return None
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in copied.parameters():
            # Draw noise for every parameter, so that it does not depend on which parameters are zero.
            noise = torch.randn(p.shape, generator=generator, device="cpu").to(p)
            if not p.any():
                std = 0.1 if p.ndim < 2 else p[0].numel() ** -0.5
                p.add_(noise * std)
    return copied


def _exact_derivative(
    net: NetAdapter, b: NoisyBatch, inputs: Mapping[str, Time], *, is_copy: bool
) -> tuple[Heads, float]:
    """Compute `central_difference` on a batch, in float64 if the network is a copy and supports it.

    With autocast or 16-bit weights the uncertainty is infinite, because x ± h v rounds to x.
    """
    direction = b.v_t.to(b.x_t)
    if is_copy:
        try:
            return central_difference(net, b.x_t, direction, b.c, inputs)
        except (RuntimeError, TypeError):
            # The network casts to float32 explicitly.
            pass
    exact, uncertainty = central_difference(net, b.x_t, direction, b.c, inputs, in_float64=False)
    return exact, uncertainty if precision_of(b.x_t) == "fp32" else inf


def _net_in_float64(net: nn.Module, device: torch.device) -> nn.Module:
    """Copy a network, or an adapter with its conditions, to float64 on a device."""
    if not isinstance(net, NetAdapter):
        return float64_copy(net, device)
    adapter = net.with_net(float64_copy(unwrap(net.net), device))
    if adapter.rows is not None:
        adapter.rows = adapter.rows.to(device, torch.float64)
    return adapter


def _relative_error(derivative: Tensor, exact: Tensor) -> Tensor:
    """Return the l2 error divided by the l2 norm, or by _MIN_NORM if that is larger."""
    return (derivative.to(exact) - exact).norm() / exact.norm().clamp(min=_MIN_NORM)
