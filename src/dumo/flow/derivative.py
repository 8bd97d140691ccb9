"""How du/dt of a user's network is taken: by the first slope (`dumo.flow.slope`) that runs on it and is right.

Few-step objectives regress on du/dt. Where it is wrong the loss falls towards another target, in silence. So a slope is
compared with differences of passes before the first step. The order of events:

1. `copy_without_zero_layers` makes the copy of the network that is examined.
2. `choose_slope` takes differences of its passes as the exact derivative: in float64 where the network can, of several
   lengths, of which those two neighbours count that agree best.
3. It tries one slope after another against them, and returns the first that is near enough, as a `SlopeChoice`.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf, isfinite
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dumo.flow.check import inputs_of, short_text
from dumo.flow.passes import Passes
from dumo.flow.precision import precision_of
from dumo.flow.ranks import largest_of_ranks
from dumo.flow.slope import MAX_SLOPE_ERROR, CentralSlope, DualSlope, JvpSlope, Slope
from dumo.types import Frozen, Heads, Needs, Noised, Sample, Time, UserError, lift, mean_square, unwrap

# Lengths of the differences, in units of t, the longest first; float64 can bear shorter ones. All ours
_LENGTHS = (1e-2, 2e-3, 4e-4, 1e-4, 1e-5, 1e-6)
_FLOAT64_LENGTHS = (*_LENGTHS, 1e-7, 1e-8)
# Half-steps h of the central slope that are tried, in units of t: UCGM's first, the others ours
_HALF_STEPS = (0.005, 0.002, 0.001, 5e-4, 2e-4)
_MAX_COPIED_PARAMETERS = 400_000_000  # a larger network is not copied for the check: ours
_ZERO_NORM = 1e-6  # below it a derivative counts as zero: ours
# How far off an exact slope may be in fp32, over the derivative's norm; other slopes: MAX_SLOPE_ERROR. Ours: it is 1e-6
# off there, and 2e-4 with an embedding of 1000 radians.
_EXACT_LIMIT = 0.01
# The steepness (`SlopeChoice`) above which a line warns. Ours: fresh networks of .4 trained well, of 1.4 half as well,
# of 13 not at all.
_MAX_STEEPNESS = 1.0
_PROPOSED_STEEPNESS = 0.1  # that the line proposes: ours


@dataclass(frozen=True)
class SlopeChoice:
    """How du/dt is taken."""

    slope: Slope
    why: str  # the slope's name, how far off it is, and why those before it were not taken
    steepness: float  # the root mean square of t du/dt over that of v
    is_fallback: bool  # whether another slope was tried first, and did not serve

    def warnings(self, time_scale: float, *, again: bool) -> Iterator[str]:
        """Lines to log.

        time_scale: by which the network's times are multiplied now.
        again: whether the network was checked before, so that its user knows how du/dt is taken.
        """
        if self.is_fallback and not again:
            yield f"du/dt by {self.why}"
        if self.steepness > _MAX_STEEPNESS:
            proposed_scale = time_scale * _PROPOSED_STEEPNESS / self.steepness
            yield (
                f"t du/dt is {self.steepness:.3g} times v: above 1 this network is steep in t, and training on du/dt "
                f"may not settle. Give dumo.Flow(time_scale={proposed_scale:.2g}), which multiplies t, or embed t by "
                "waves of a few radians"
            )


def copy_without_zero_layers(net: Passes) -> Passes | None:
    """Passes of a copy of the network whose layers of zeros are drawn at random.

    A head that starts at zero has du/dt = 0, to which any slope is right. None where the network cannot be copied: it
    is large, sharded, or has parts that cannot be copied.
    """
    module = _copy_of(unwrap(net.net))
    if module is None:
        return None
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            noise = torch.randn(p.shape, generator=generator).to(p)
            if not p.any():
                std = 0.1 if p.ndim < 2 else p[0].numel() ** -0.5
                p.add_(noise * std)
    return net.with_net(module)


def _copy_of(net: nn.Module) -> nn.Module | None:
    """A deep copy of a network; None where it is sharded, large, or has parts that cannot be copied."""
    if any(isinstance(part, FSDPModule) for part in net.modules()):
        return None
    parameters = list(net.parameters())
    if any(isinstance(p, DTensor) for p in parameters):
        return None
    if sum(p.numel() for p in parameters) > _MAX_COPIED_PARAMETERS:
        return None
    try:
        return copy.deepcopy(net)
    except Exception:  # whatever the parts of somebody else's network raise
        return None


def choose_slope(
    named_slope: Slope | None,
    probe: Passes,
    b: Noised,
    needs: Needs,
    *,
    is_copy: bool,
    chosen_before: Slope | None = None,
) -> SlopeChoice:
    """The first slope that runs on this network and is its derivative.

    named_slope: that of the objective, which is the only one tried; None: dual, jvp and central are tried in turn.
    probe: the network, as objectives call it.
    b: a record of a few rows.
    is_copy: whether `probe` is of a copy (`copy_without_zero_layers`), which is compared in float64.
    chosen_before: the slope that an earlier check chose, which is tried first.

    Every rank must call it, and all choose alike. Raises UserError where no slope is within the limit.
    """
    inputs = inputs_of(b, needs)
    exact, gap = _exact_derivative(probe, b, inputs, is_copy=is_copy)
    is_unknown = largest_of_ranks(gap) > MAX_SLOPE_ERROR  # passes round so much that no two differences agree
    reasons: list[str] = []  # why each slope so far was not taken
    for slope in _candidates(named_slope, chosen_before):
        name = slope.kind
        if isinstance(slope, CentralSlope):
            name = f"central, h = {slope.h:g}"
        try:
            error = _slope_error(slope, probe, b, inputs, exact)
            reason = f"not {name}: du/dt is {100 * error:.2g} % off"
        except Exception as raised:  # whatever a network raises: the next slope is tried
            error = inf
            reason = f"not {name}: {short_text(raised)}"
        error = largest_of_ranks(error)
        serves = error <= _error_limit(slope, b)
        comparison = f"{100 * error:.2g} % off differences"
        if is_unknown and not isinstance(slope, CentralSlope):
            serves = error < inf
            comparison = "not compared, for passes round so that differences do not agree"
        if serves:
            why = "; ".join([f"{name}, {comparison}", *dict.fromkeys(reasons)])
            return SlopeChoice(slope, why, _steepness(exact, b), is_fallback=bool(reasons))
        reasons.append(reason)
    fix = " Leave out the slope, and one that serves is taken" if named_slope else ""
    raise UserError(f"no du/dt of {type(unwrap(probe.net)).__name__}: {'; '.join(dict.fromkeys(reasons))}.{fix}")


def _candidates(named_slope: Slope | None, chosen_before: Slope | None) -> list[Slope]:
    """The slopes to try, in order."""
    if named_slope is not None:
        return [named_slope]
    slopes: list[Slope] = [DualSlope(), JvpSlope(), *(CentralSlope(h=h) for h in _HALF_STEPS)]
    if chosen_before is not None:
        slopes = [chosen_before, *(slope for slope in slopes if slope != chosen_before)]
    return slopes


def _error_limit(slope: Slope, b: Noised) -> float:
    """How far off a slope may be in the precision that holds now, over the derivative's norm."""
    if isinstance(slope, CentralSlope) or precision_of(b.x_t) != "fp32":
        return MAX_SLOPE_ERROR
    return _EXACT_LIMIT


def _exact_derivative(probe: Passes, b: Noised, inputs: Mapping[str, Time], *, is_copy: bool) -> tuple[Heads, float]:
    """What `_differences` returns: of a copy in float64 where the network can, else in its own precision."""
    if is_copy:
        inputs_in_float64 = {name: values.double() for name, values in inputs.items()}
        try:
            return _differences(_net_in_float64(probe), _record_in_float64(b), inputs_in_float64, b.v_t)
        except RuntimeError:  # a network that names float32 itself
            pass
    return _differences(probe, b, inputs, b.v_t)


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
def _differences(net: Passes, b: Noised, inputs: Mapping[str, Time], w: Sample) -> tuple[Heads, float]:
    """The derivative of each head along w, and how far it is uncertain, of the worst head.

    The derivatives are central differences of several lengths. One of one length would agree with a central slope of
    that length, right or wrong. So the one is taken that agrees best with the next longer one, and the uncertainty is
    the relative error between these two. Where passes round to bf16, no two may agree.
    """
    w = w.to(b.x_t)
    lengths = _FLOAT64_LENGTHS if b.x_t.dtype == torch.float64 else _LENGTHS
    heads_by_length: list[Heads] = []
    with torch.autocast(b.x_t.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
        for h in lengths:
            behind = net(b.x_t - h * w, b.c, **{**inputs, "t": inputs["t"] - h})
            ahead = net(b.x_t + h * w, b.c, **{**inputs, "t": inputs["t"] + h})
            heads_by_length.append(tuple((end - start) / (2 * h) for start, end in zip(behind, ahead, strict=True)))
    best: list[Tensor] = []
    worst_gap = 0.0
    for differences in zip(*heads_by_length, strict=True):  # of one head, by length
        gaps = [float(_relative_error(longer, shorter)) for longer, shorter in pairwise(differences)]
        least_gap = min(gaps)
        best.append(differences[1 + gaps.index(least_gap)])
        worst_gap = max(worst_gap, least_gap)
    return tuple(best), worst_gap


def _slope_error(slope: Slope, net: Passes, b: Noised, inputs: Mapping[str, Time], exact: Heads) -> float:
    """How far off a slope is, over the derivative's norm, of the worst head; infinite where it is not finite.

    It is taken twice, with the direction known before the pass and without, because a slope may do these differently.
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


def _steepness(derivative: Heads, b: Noised) -> float:
    """The root mean square of t du/dt, of the steepest head, over that of v; gauges do not count."""
    sizes = [float(mean_square(lift(b.t, du_dt) * du_dt).mean().sqrt()) for du_dt in derivative if du_dt.ndim > 1]
    return max(sizes, default=0.0) / float(mean_square(b.v_t).mean().sqrt())
