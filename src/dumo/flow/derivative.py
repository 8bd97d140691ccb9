"""How du/dt of a user's network is taken: by the first slope (`dumo.flow.slope`) that runs on it and is right.

Few-step objectives regress on du/dt. Where it is wrong the loss falls towards another target, in silence. So a slope is
compared with differences of passes before the first step. `LoopFlow.check` calls, in this order:

1. `copy_without_zero_layers` makes the copy of the network that is examined.
2. `choose_slope` takes differences of its passes as the exact derivative (`_exact_derivative`): in float64 where the
   network can, with several half-steps, of which those two neighbours count that agree best.
3. It compares one slope after another with that (`_try_slope`), and returns the first that is near enough, as a
   `SlopeChoice`.

Names in all functions: `net` is the network, or its copy, as objectives call it. `b` is a record of a few rows, and
`inputs` has the times and knobs (rows,) of a pass on it. `exact` and `derivatives` have du/dt of each of the heads, in
their order and shape: heads (rows, ...), then gauges (rows,).
"""

import copy
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf, isfinite
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy

from dumo.flow.check import inputs_of, short_text
from dumo.flow.passes import Passes
from dumo.flow.precision import HALVES, precision_of
from dumo.flow.ranks import largest_of_ranks
from dumo.flow.slope import MAX_SLOPE_ERROR, CentralSlope, DualSlope, JvpSlope, Slope
from dumo.types import Frozen, Heads, Needs, Noised, Time, UserError, lift, mean_square, unwrap

# Half-steps h of the differences that are taken as exact, in units of t, the longest first. In float64 shorter ones are
# right, too. All ours
_EXACT_HALF_STEPS = (1e-2, 2e-3, 4e-4, 1e-4, 1e-5, 1e-6)
_EXACT_HALF_STEPS_IN_FLOAT64 = (*_EXACT_HALF_STEPS, 1e-7, 1e-8)
# Half-steps h of the central slope that are tried, in units of t: UCGM's first, the others ours
_CENTRAL_HALF_STEPS = (0.005, 0.002, 0.001, 5e-4, 2e-4)
_MAX_COPIED_PARAMETERS = 400_000_000  # a larger network is not copied for the check: ours
_ZERO_NORM = 1e-6  # an l2 norm of du/dt below it counts as zero: ours
# The largest relative error of an exact slope (jvp, dual) in fp32; in other precisions, and of central, it is
# MAX_SLOPE_ERROR. Ours: measured errors are 1e-6, and 2e-4 with an embedding of 1000 radians.
_EXACT_LIMIT = 0.01
# A warning is logged where the steepness (`SlopeChoice.steepness`) is above this ratio. Ours: new networks of
# steepness 0.4 trained well, of 1.4 half as well, of 13 not at all.
_MAX_STEEPNESS = 1.0
_PROPOSED_STEEPNESS = 0.1  # the warning proposes the time_scale that leads to this steepness: ours


@dataclass(frozen=True)
class SlopeChoice:
    """How du/dt is taken."""

    slope: Slope
    reason: str  # the slope's name, its error, and why those before it were not taken
    steepness: float  # the root mean square of t du/dt over that of v, a ratio; 0 where it is not known
    is_fallback: bool  # whether another slope was tried first, and did not serve

    def warnings(self, time_scale: float, *, again: bool) -> Iterator[str]:
        """Lines to log.

        time_scale: by which the network's times are multiplied now.
        again: whether the network was checked before, so that its user knows how du/dt is taken.
        """
        if self.is_fallback and not again:
            yield f"du/dt by {self.reason}"
        if self.steepness > _MAX_STEEPNESS:
            proposed_scale = time_scale * _PROPOSED_STEEPNESS / self.steepness
            yield (
                f"t du/dt is {self.steepness:.3g} times v: above {_MAX_STEEPNESS:g} this network is steep in t, "
                f"and training on du/dt may not settle. Give dumo.Flow(time_scale={proposed_scale:.2g}), which "
                "multiplies t, or embed t by waves of a few radians"
            )


def copy_without_zero_layers(net: Passes) -> Passes | None:
    """Passes of a copy of the network whose layers of zeros are drawn at random.

    A head that starts at zero has du/dt = 0, to which any slope is right. None where the network cannot be copied: it
    is large, sharded, lazy, or has parts that cannot be copied.
    """
    module = _copy_of(unwrap(net.net))
    if module is None:
        return None
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            # drawn for every parameter, so that its noise does not depend on which others are zero
            noise = torch.randn(p.shape, generator=generator, device="cpu").to(p)
            if not p.any():
                std = 0.1 if p.ndim < 2 else p[0].numel() ** -0.5
                p.add_(noise * std)
    return net.with_net(module)


def _copy_of(net: nn.Module) -> nn.Module | None:
    """A deep copy of a network; None where it is sharded, large, lazy, or has parts that cannot be copied."""
    if any(isinstance(part, FSDPModule) for part in net.modules()):
        return None
    parameters = list(net.parameters())
    if any(isinstance(p, DTensor) or is_lazy(p) for p in parameters):
        return None
    if sum(p.numel() for p in parameters) > _MAX_COPIED_PARAMETERS:
        return None
    try:
        return copy.deepcopy(net)
    except Exception:  # whatever the parts of somebody else's network raise
        return None


def choose_slope(
    named_slope: Slope | None,
    net: Passes,
    b: Noised,
    needs: Needs,
    *,
    is_copy: bool,
    chosen_before: Slope | None = None,
) -> SlopeChoice:
    """The first slope that runs on this network and is its derivative.

    named_slope: that of the objective, which is the only one tried; None: dual, jvp and central are tried in turn.
    net: the network, or its copy, as objectives call it.
    b: a record of a few rows.
    needs: the objective's, which name the inputs of a pass.
    is_copy: whether `net` is of a copy (`copy_without_zero_layers`), which is compared in float64.
    chosen_before: the slope that an earlier check chose, which is tried first.

    Every rank must call it, and all choose alike. Raises UserError where no slope is within the limit.
    """
    inputs = inputs_of(b, needs)
    exact, gap = _exact_derivative(net, b, inputs, is_copy=is_copy)
    is_uncertain = largest_of_ranks(gap) > MAX_SLOPE_ERROR  # passes round so much that no two differences agree
    steepness = _steepness(exact, b) if gap < inf else 0.0  # not known
    failures: list[str] = []  # why each slope so far was not taken
    for slope in _candidates(named_slope, chosen_before):
        attempt = _try_slope(slope, net, b, inputs, exact, is_uncertain=is_uncertain)
        if attempt.serves:
            reason = "; ".join([attempt.text, *dict.fromkeys(failures)])
            return SlopeChoice(slope, reason, steepness, is_fallback=bool(failures))
        failures.append(attempt.text)
    fix = " Leave out the slope, and one that serves is taken" if named_slope else ""
    raise UserError(f"no du/dt of {type(unwrap(net.net)).__name__}: {'; '.join(dict.fromkeys(failures))}.{fix}")


@dataclass(frozen=True)
class _Attempt:
    """What came of trying a slope."""

    serves: bool  # whether it may be taken
    text: str  # its name and error, or why it was not taken


def _try_slope(
    slope: Slope, net: Passes, b: Noised, inputs: Mapping[str, Time], exact: Heads, *, is_uncertain: bool
) -> _Attempt:
    """Compare a slope with the exact derivative. Every rank must call it, and all decide alike.

    is_uncertain: whether `exact` is too rough to refuse an exact slope by. Such a slope then serves if it runs.
    """
    name = slope.kind
    if isinstance(slope, CentralSlope):
        name = f"central, h = {slope.h:g}"
    try:
        error = _slope_error(slope, net, b, inputs, exact)
        failure = f"du/dt is {100 * error:.2g} % off"
    except Exception as raised:  # whatever a network raises: the next slope is tried
        error = inf
        failure = short_text(raised)
    error = largest_of_ranks(error)
    if is_uncertain and not isinstance(slope, CentralSlope):
        serves = error < inf
        comparison = "not compared, for passes round so that differences do not agree"
    else:
        serves = error <= _error_limit(slope, b)
        comparison = f"{100 * error:.2g} % off differences"
    text = f"{name}, {comparison}" if serves else f"not {name}: {failure}"
    return _Attempt(serves, text)


def _candidates(named_slope: Slope | None, chosen_before: Slope | None) -> list[Slope]:
    """The slopes to try, in order."""
    if named_slope is not None:
        return [named_slope]
    slopes: list[Slope] = [DualSlope(), JvpSlope(), *(CentralSlope(h=h) for h in _CENTRAL_HALF_STEPS)]
    if chosen_before is not None:
        slopes = [chosen_before, *(slope for slope in slopes if slope != chosen_before)]
    return slopes


def _error_limit(slope: Slope, b: Noised) -> float:
    """The largest relative error that a slope may have in the precision that holds now."""
    if isinstance(slope, CentralSlope) or precision_of(b.x_t) != "fp32":
        return MAX_SLOPE_ERROR
    return _EXACT_LIMIT


def _exact_derivative(net: Passes, b: Noised, inputs: Mapping[str, Time], *, is_copy: bool) -> tuple[Heads, float]:
    """What `_differences` returns: of a copy in float64 where the network can, else in its own precision.

    Where it runs under the caller's autocast alone, or x has 16 bits, the uncertainty is infinite: x ± h v is then x
    itself, and differences agree on what is wrong.
    """
    if is_copy:
        try:
            inputs_in_float64 = {name: values.double() for name, values in inputs.items()}
            return _differences(_net_in_float64(net), _record_in_float64(b), inputs_in_float64)
        except (RuntimeError, TypeError):  # a network that names float32 itself; MPS, which has no float64
            pass
    try:
        derivatives, gap = _differences(net, b, inputs)
    except Exception:  # whatever a network raises that asks for autocast, or for another kernel of attention
        return _differences(net, b, inputs, as_called=True)[0], inf
    return derivatives, inf if b.x_t.dtype in HALVES else gap


def _net_in_float64(net: Passes) -> Passes:
    """Passes of a copy of the network and of its conditions in float64."""
    passes = net.with_net(copy.deepcopy(net.net).double())
    if net.table is not None:
        passes.table = net.table.to_float64()
    return passes


def _record_in_float64(b: Noised) -> Noised:
    """The record with data, noise, times and velocity in float64."""
    changed: dict[str, Any] = {name: getattr(b, name).double() for name in ("x", "z", "t", "r", "x_t", "v_t")}
    return replace(b, **changed)


@torch.no_grad()
def _differences(net: Passes, b: Noised, inputs: Mapping[str, Time], *, as_called: bool = False) -> tuple[Heads, float]:
    """The derivative of each head along the velocity, and how uncertain it is: a relative error, of the worst head.

    The derivatives are central differences with half-steps h. A difference of the same h as a central slope would agree
    with it even if both are wrong. So several h are tried, and the one is taken that agrees best with its longer
    neighbour. The uncertainty is the relative error between these two. Where passes round to bf16, no two may agree.

    as_called: whether passes are under the caller's autocast, with any kernel of attention; else they are in the types
    of x and the weights, with that of math.
    """
    velocity = b.v_t.to(b.x_t)
    half_steps = _EXACT_HALF_STEPS_IN_FLOAT64 if b.x_t.dtype == torch.float64 else _EXACT_HALF_STEPS
    derivatives_by_half_step: list[Heads] = []
    with nullcontext() if as_called else _in_own_precision(b.x_t.device.type):
        for h in half_steps:
            behind = net(b.x_t - h * velocity, b.c, **{**inputs, "t": inputs["t"] - h})
            ahead = net(b.x_t + h * velocity, b.c, **{**inputs, "t": inputs["t"] + h})
            derivatives = tuple((end - start) / (2 * h) for start, end in zip(behind, ahead, strict=True))
            derivatives_by_half_step.append(derivatives)
    best: list[Tensor] = []
    worst_gap = 0.0
    for differences in zip(*derivatives_by_half_step, strict=True):  # of one head, the longest half-step first
        gaps = [float(_relative_error(longer, shorter)) for longer, shorter in pairwise(differences)]
        least_gap = min(gaps)
        best.append(differences[1 + gaps.index(least_gap)])
        worst_gap = max(worst_gap, least_gap)
    return tuple(best), worst_gap


@contextmanager
def _in_own_precision(device_type: str) -> Generator[None, None, None]:
    """Inside, passes are in the types of x and the weights, and attention rounds least."""
    with torch.autocast(device_type, enabled=False), sdpa_kernel(SDPBackend.MATH):
        yield


def _slope_error(slope: Slope, net: Passes, b: Noised, inputs: Mapping[str, Time], exact: Heads) -> float:
    """The relative error of a slope, of the worst head; infinite where it is not finite.

    The slope is called twice: with the direction said before the pass (`toward`), and with it said to `along` alone. It
    may take these two ways differently.
    """
    worst = 0.0
    for toward in (b.v_t, None):
        _, along = slope(net, Frozen(net), b.x_t, b.c, toward=toward, **cast(dict[str, Any], inputs))
        with torch.no_grad():
            derivatives = along(b.v_t)
        for derivative, exact_derivative in zip(derivatives, exact, strict=True):
            error = float(_relative_error(derivative, exact_derivative))
            worst = max(worst, error if isfinite(error) else inf)
    return worst


def _relative_error(derivative: Tensor, exact: Tensor) -> Tensor:
    """The l2 error over the l2 norm; the error itself, where the exact derivative is zero."""
    norm = exact.norm()
    return (derivative.to(exact) - exact).norm() / norm.where(norm > _ZERO_NORM, torch.ones_like(norm))


def _steepness(exact: Heads, b: Noised) -> float:
    """The root mean square of t du/dt, of the steepest head, over that of v; 0 where there are gauges alone."""
    rms_by_head: list[float] = []
    for du_dt in exact:
        is_gauge = du_dt.ndim == 1  # one number a row: it has no velocity to compare with
        if not is_gauge:
            t_du_dt = lift(b.t, du_dt) * du_dt
            rms_by_head.append(float(mean_square(t_du_dt).mean().sqrt()))
    return max(rms_by_head, default=0.0) / float(mean_square(b.v_t).mean().sqrt())
