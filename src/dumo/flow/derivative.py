"""du/dt of a network: the first way that runs on it and is right.

Few-step objectives regress on du/dt. Where it is wrong the loss falls towards another target, in silence. So a slope is
compared with a difference of two passes, in float64 where the network can. A difference of one length would agree with
a wrong one of the same length: of several lengths the two neighbours that agree best are taken.
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

from dumo.flow.check import inputs_of, short
from dumo.flow.passes import Passes, inner
from dumo.flow.ranks import largest_of_ranks
from dumo.flow.slope import CentralSlope, DualSlope, JvpSlope, Slope, precision_of
from dumo.types import Frozen, Heads, Needs, Noised, Sample, Time, UserError, lift, mean_square

LENGTHS = (1e-2, 2e-3, 4e-4, 1e-4, 1e-5, 1e-6)  # of differences in time: two neighbours that agree are the derivative
SHORTEST = (1e-7, 1e-8)  # in float64, too
COPIED = 400_000_000  # parameters up to which the check works on a copy: ours
SMALL = 1e-6  # the norm below which a derivative counts as zero
SHORTER = (0.005, 0.002, 0.001, 5e-4, 2e-4)  # half-steps of the central slope that are tried, UCGM's first
LIMIT = 0.05  # ours: an exact slope is 1 to 2 % off under bf16, a broken one 40 % and more (measured)
EXACT = 0.01  # ours: the same in fp32, where it is 1e-6 off, and of waves of 1000 radians 2e-4
STEEP = 1.0  # ours, of t du/dt over v: fresh networks of .4 trained well, of 1.4 half as well, of 13 not at all
GENTLE = 0.1  # of the same, that we propose


def copy_of(net: nn.Module) -> nn.Module | None:
    """A copy of a network, for the check; None where it is large, sharded, or of parts that refuse it."""
    if any(isinstance(part, FSDPModule) for part in net.modules()):
        return None
    parameters = list(net.parameters())
    if any(isinstance(p, DTensor) for p in parameters) or sum(p.numel() for p in parameters) > COPIED:
        return None
    try:
        return copy.deepcopy(net)
    except Exception:  # whatever the parts of somebody else's network raise
        return None


def drawn_copy(net: Passes) -> Passes | None:
    """The same passes of a copy whose layers of zeros are drawn, for else du/dt is 0; None as `copy_of`."""
    module = copy_of(inner(net.net))
    if module is None:
        return None
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            noise = torch.randn(p.shape, generator=generator).to(p)
            if not p.any():
                p.add_(noise * (0.1 if p.ndim < 2 else p[0].numel() ** -0.5))
    return net.of(module)


def in_double(net: Passes) -> Passes:
    """The same passes of a copy in float64."""
    found = net.of(copy.deepcopy(net.net).double())
    found.table = net.table and net.table.double()
    return found


def doubled(b: Noised) -> Noised:
    """A record in float64."""
    changed: dict[str, Any] = {name: getattr(b, name).double() for name in ("x", "z", "t", "r", "x_t", "v_t")}
    return replace(b, **changed)


@torch.no_grad()
def differences(net: Passes, b: Noised, inputs: Mapping[str, Time], w: Sample) -> tuple[Heads, float]:
    """d/dt of each head along w by central differences, of the length that agrees best with the next longer one.

    And how well they agree, the worst head: where passes round to bf16, no two lengths may.
    """
    found: list[Heads] = []
    w = w.to(b.x_t)
    lengths = (*LENGTHS, *SHORTEST) if b.x_t.dtype == torch.float64 else LENGTHS
    with torch.autocast(b.x_t.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
        for h in lengths:
            ends = [net(b.x_t + s * h * w, b.c, **{**inputs, "t": inputs["t"] + s * h}) for s in (-1, 1)]
            found.append(tuple((ahead - behind) / (2 * h) for behind, ahead in zip(*ends, strict=True)))
    best: list[Tensor] = []
    worst = 0.0
    for of_head in zip(*found, strict=True):
        gaps = [float(relative_error(a, e)) for a, e in pairwise(of_head)]
        best.append(of_head[1 + min(range(len(gaps)), key=gaps.__getitem__)])
        worst = max(worst, min(gaps))
    return tuple(best), worst


def relative_error(found: Tensor, exact: Tensor) -> Tensor:
    """The l2 error over the l2 norm; of a derivative of zero, the error itself."""
    norm = exact.norm()
    return (found.to(exact) - exact).norm() / norm.where(norm > SMALL, torch.ones_like(norm))


def slope_error(slope: Slope, net: Passes, b: Noised, inputs: Mapping[str, Time], exact: Heads) -> float:
    """How far a slope is from these derivatives, the worst head; of its two uses the worse."""
    worst = 0.0
    for toward in (b.v_t, None):
        _, along = slope(net, Frozen(net), b.x_t, b.c, toward=toward, **cast(dict[str, Any], inputs))
        with torch.no_grad():
            found = along(b.v_t)
        for head, exactly in zip(found, exact, strict=True):
            error = float(relative_error(head, exactly))
            worst = max(worst, error if isfinite(error) else inf)
    return worst


@dataclass(frozen=True)
class Choice:
    """How du/dt is taken, why so, and the root mean square of t du/dt over that of v."""

    slope: Slope
    why: str
    steepness: float
    skipped: bool  # whether another way came first, and did not serve

    def warnings(self, time_scale: float, *, again: bool) -> Iterator[str]:
        """What a user should hear of, of a network whose times are scaled so; `again`: he has heard how it is taken."""
        if self.skipped and not again:
            yield f"du/dt by {self.why}"
        if self.steepness > STEEP:
            gentle = time_scale * GENTLE / self.steepness
            yield (
                f"t du/dt is {self.steepness:.3g} times v: above 1 this network is steep in t, and training on du/dt "
                f"may not settle. Give dumo.Flow(time_scale={gentle:.2g}), which multiplies t, or embed t by waves of "
                "a few radians"
            )


def choose_slope(
    given: Slope | None,
    probe: Passes,
    b: Noised,
    needs: Needs,
    *,
    copied: bool,
    before: Slope | None = None,
) -> Choice:
    """The slope that is given, or the first of dual, jvp and central that runs here and is the derivative.

    `copied`: whether `probe` is of a copy (`drawn_copy`), which is compared in float64. `before`: what was chosen
    earlier, which is tried first. Every rank must call it, and all choose alike. Raises UserError where none is within
    the limit.
    """
    inputs = inputs_of(b, needs)
    exact, gap = derivative_of(probe, b, inputs, copied=copied)
    unknown = largest_of_ranks(gap) > LIMIT
    tries = [DualSlope(), JvpSlope(), *(CentralSlope(h=h) for h in SHORTER)]
    if before is not None:
        tries = [before, *(slope for slope in tries if slope != before)]
    if given is not None:
        tries = [given]
    reasons: list[str] = []
    for slope in tries:
        name = f"central, h = {slope.h:g}" if isinstance(slope, CentralSlope) else slope.kind
        try:
            error = slope_error(slope, probe, b, inputs, exact)
            reason = f"not {name}: du/dt is {100 * error:.2g} % off"
        except Exception as raised:  # whatever a network raises: the next way is tried
            error = inf
            reason = f"not {name}: {short(raised)}"
        error = largest_of_ranks(error)
        serves = error <= limit_of(slope, b)
        compared = f"{100 * error:.2g} % off differences"
        if unknown and not isinstance(slope, CentralSlope):
            serves = error < inf
            compared = "not compared, for passes round so that differences do not agree"
        if serves:
            why = "; ".join([f"{name}, {compared}", *dict.fromkeys(reasons)])
            return Choice(slope, why, steepness(exact, b), skipped=bool(reasons))
        reasons.append(reason)
    way = " Leave out the slope, and one that serves is taken" if given else ""
    raise UserError(f"no du/dt of {type(inner(probe.net)).__name__}: {'; '.join(dict.fromkeys(reasons))}.{way}")


def limit_of(slope: Slope, b: Noised) -> float:
    """By how much a slope may be off in the precision that holds now."""
    differs = isinstance(slope, CentralSlope)
    return LIMIT if differs or precision_of(b.x_t) != "fp32" else EXACT


def derivative_of(probe: Passes, b: Noised, inputs: Mapping[str, Time], *, copied: bool) -> tuple[Heads, float]:
    """`differences` in float64 where the network can, else as it is."""
    if copied:
        try:
            return differences(in_double(probe), doubled(b), {name: s.double() for name, s in inputs.items()}, b.v_t)
        except RuntimeError:  # a network that names float32 itself
            pass
    return differences(probe, b, inputs, b.v_t)


def steepness(derivative: Heads, b: Noised) -> float:
    """The root mean square of t du/dt, of the steepest head, over that of v."""
    sizes = [float(mean_square(lift(b.t, du_dt) * du_dt).mean().sqrt()) for du_dt in derivative if du_dt.ndim > 1]
    return max(sizes, default=0.0) / float(mean_square(b.v_t).mean().sqrt())
