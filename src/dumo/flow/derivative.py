"""du/dt of a network: the first way that runs on it and is right.

Few-step objectives regress on du/dt. Where it is wrong the loss falls towards another target, in silence. So a slope is
compared with a difference of two passes, in float64 where the network can. A difference of one length would agree with
a wrong one of the same length: of several lengths the two neighbours that agree best are taken.

`copy_without_zero_layers` makes the copy that is examined. `choose_slope` takes differences of it as the exact
derivative, tries one slope after another against them, and returns the first that serves as a `SlopeChoice`.
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

# Lengths of the differences, in units of t, and those that float64 can bear, too: all ours
_LENGTHS = (1e-2, 2e-3, 4e-4, 1e-4, 1e-5, 1e-6)
_FLOAT64_LENGTHS = (*_LENGTHS, 1e-7, 1e-8)
# Half-steps h of the central slope that are tried, in units of t: UCGM's first, the others ours
_HALF_STEPS = (0.005, 0.002, 0.001, 5e-4, 2e-4)
_MAX_COPIED_PARAMETERS = 400_000_000  # ours: a larger network is not copied for the check
_ZERO_NORM = 1e-6  # ours: the norm below which a derivative counts as zero
# How far off an exact slope may be in fp32, a share of the derivative's norm; others: MAX_SLOPE_ERROR
_EXACT_LIMIT = 0.01  # ours: it is 1e-6 off there, and of waves of 1000 radians 2e-4
# The root mean square of t du/dt over that of v
_MAX_STEEPNESS = 1.0  # ours: fresh networks of .4 trained well, of 1.4 half as well, of 13 not at all
_PROPOSED_STEEPNESS = 0.1  # ours


@dataclass(frozen=True)
class SlopeChoice:
    """How du/dt is taken, why so, and the root mean square of t du/dt over that of v."""

    slope: Slope
    why: str
    steepness: float
    skipped: bool  # whether another slope came first, and did not serve

    def warnings(self, time_scale: float, *, again: bool) -> Iterator[str]:
        """Lines for the user of a network whose times are multiplied by `time_scale`.

        `again`: whether it was checked before, so that he knows already how du/dt is taken.
        """
        if self.skipped and not again:
            yield f"du/dt by {self.why}"
        if self.steepness > _MAX_STEEPNESS:
            proposed_scale = time_scale * _PROPOSED_STEEPNESS / self.steepness
            yield (
                f"t du/dt is {self.steepness:.3g} times v: above 1 this network is steep in t, and training on du/dt "
                f"may not settle. Give dumo.Flow(time_scale={proposed_scale:.2g}), which multiplies t, or embed t by "
                "waves of a few radians"
            )


def copy_without_zero_layers(net: Passes) -> Passes | None:
    """Passes of a copy of the network whose layers of zeros are drawn at random, for else du/dt is 0.

    None where the network cannot be copied: it is large, sharded, or has parts that refuse it.
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
    return net.of(module)


def _copy_of(net: nn.Module) -> nn.Module | None:
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
    given: Slope | None,
    probe: Passes,
    b: Noised,
    needs: Needs,
    *,
    copied: bool,
    before: Slope | None = None,
) -> SlopeChoice:
    """The first slope that runs on this network and is its derivative.

    given: the slope that an objective names, the only one tried; None: dual, jvp and central are tried in turn.
    probe: the network, as objectives call it.
    b: a record of a few rows.
    copied: whether `probe` is of a copy (`copy_without_zero_layers`), which is compared in float64.
    before: the slope that was chosen earlier, which is tried first.

    Every rank must call it, and all choose alike. Raises UserError where no slope is within the limit.
    """
    inputs = inputs_of(b, needs)
    exact, gap = _exact_derivative(probe, b, inputs, copied=copied)
    is_unknown = largest_of_ranks(gap) > MAX_SLOPE_ERROR  # passes round so much that no two differences agree
    reasons: list[str] = []
    for slope in _candidates(given, before):
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
            return SlopeChoice(slope, why, _steepness(exact, b), skipped=bool(reasons))
        reasons.append(reason)
    fix = " Leave out the slope, and one that serves is taken" if given else ""
    raise UserError(f"no du/dt of {type(unwrap(probe.net)).__name__}: {'; '.join(dict.fromkeys(reasons))}.{fix}")


def _candidates(given: Slope | None, before: Slope | None) -> list[Slope]:
    """The slopes that are tried, in their order."""
    if given is not None:
        return [given]
    slopes: list[Slope] = [DualSlope(), JvpSlope(), *(CentralSlope(h=h) for h in _HALF_STEPS)]
    if before is not None:
        slopes = [before, *(slope for slope in slopes if slope != before)]
    return slopes


def _error_limit(slope: Slope, b: Noised) -> float:
    """By how much a slope may be off in the precision that holds now."""
    if isinstance(slope, CentralSlope) or precision_of(b.x_t) != "fp32":
        return MAX_SLOPE_ERROR
    return _EXACT_LIMIT


def _exact_derivative(probe: Passes, b: Noised, inputs: Mapping[str, Time], *, copied: bool) -> tuple[Heads, float]:
    """d/dt of each head by `_differences`: in float64 where the network can, else in its own precision."""
    if copied:
        inputs_in_float64 = {name: values.double() for name, values in inputs.items()}
        try:
            return _differences(_net_in_float64(probe), _record_in_float64(b), inputs_in_float64, b.v_t)
        except RuntimeError:  # a network that names float32 itself
            pass
    return _differences(probe, b, inputs, b.v_t)


def _net_in_float64(net: Passes) -> Passes:
    """Passes of a copy of the network and of its conditions in float64."""
    passes = net.of(copy.deepcopy(net.net).double())
    if net.table is not None:
        passes.table = net.table.double()
    return passes


def _record_in_float64(b: Noised) -> Noised:
    changed: dict[str, Any] = {name: getattr(b, name).double() for name in ("x", "z", "t", "r", "x_t", "v_t")}
    return replace(b, **changed)


@torch.no_grad()
def _differences(net: Passes, b: Noised, inputs: Mapping[str, Time], w: Sample) -> tuple[Heads, float]:
    """d/dt of each head along w by central differences, of the length that agrees best with the next longer one.

    Second, how well these lengths agree, of the worst head: where passes round to bf16, no two may.
    """
    w = w.to(b.x_t)
    lengths = _FLOAT64_LENGTHS if b.x_t.dtype == torch.float64 else _LENGTHS
    by_length: list[Heads] = []
    with torch.autocast(b.x_t.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
        for h in lengths:
            behind = net(b.x_t - h * w, b.c, **{**inputs, "t": inputs["t"] - h})
            ahead = net(b.x_t + h * w, b.c, **{**inputs, "t": inputs["t"] + h})
            by_length.append(tuple((end - start) / (2 * h) for start, end in zip(behind, ahead, strict=True)))
    best: list[Tensor] = []
    worst_gap = 0.0
    for of_head in zip(*by_length, strict=True):
        gaps = [float(_relative_error(longer, shorter)) for longer, shorter in pairwise(of_head)]
        least_gap = min(gaps)
        best.append(of_head[1 + gaps.index(least_gap)])
        worst_gap = max(worst_gap, least_gap)
    return tuple(best), worst_gap


def _slope_error(slope: Slope, net: Passes, b: Noised, inputs: Mapping[str, Time], exact: Heads) -> float:
    """How far off a slope is, of the worst head: once with the direction known before the pass, once without."""
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
    """The l2 error over the l2 norm; of a derivative of zero, the error itself."""
    norm = exact.norm()
    return (derivative.to(exact) - exact).norm() / norm.where(norm > _ZERO_NORM, torch.ones_like(norm))


def _steepness(derivative: Heads, b: Noised) -> float:
    """The root mean square of t du/dt, of the steepest head, over that of v."""
    sizes = [float(mean_square(lift(b.t, du_dt) * du_dt).mean().sqrt()) for du_dt in derivative if du_dt.ndim > 1]
    return max(sizes, default=0.0) / float(mean_square(b.v_t).mean().sqrt())
