"""Whether a network and a loss can be trained, tried once on a few rows: what would go wrong in silence is a line.

A step makes several passes of one network on the same rows: to learn, to be differentiated, for theta^-. And a resumed
run makes the passes that it would have made. So a pass draws nothing that is not keyed and changes nothing, its rows do
not mix, and a loss has a number for each row. And du/dt, on which few-step objectives regress, is compared with a
difference: where it is wrong, the loss falls towards another target.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf, isfinite
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dumo.flow.passes import Passes, inner
from dumo.flow.precision import Precision
from dumo.flow.slope import CentralSlope, DualSlope, JvpSlope, Slope, precision_of
from dumo.runtime import dist
from dumo.types import Frozen, Heads, Needs, Noised, Sample, Terms, Time, UserError, lift, mean_square
from dumo.types.outside import name_of

Stage = TypeVar("Stage")

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
# Ours: by how much two passes may differ on a GPU, whose kernels may add in another order; of the outputs' norm
MAX_DIFFERENCE: dict[Precision, float] = {"fp32": 1e-4, "tf32": 2e-3, "bf16": 2e-2}
KEYED = (
    "drop by dumo.flow.dropout, whose masks are functions of row, step and layer "
    "(docs/library.md, Dropout in a network of your own)"
)
LENGTHS = (1e-2, 2e-3, 4e-4, 1e-4, 1e-5, 1e-6)  # of differences in time: two neighbours that agree are the derivative
SHORTEST = (1e-7, 1e-8)  # in float64, too
COPIED = 400_000_000  # parameters up to which the check works on a copy: ours
MIXED = 1e-4  # ours: a change of one row may move another by this share, as kernels round
SMALL = 1e-6  # the norm below which a derivative counts as zero
SHORTER = (0.005, 0.002, 0.001, 5e-4, 2e-4)  # half-steps of the central slope that are tried, UCGM's first
LIMIT = 0.05  # ours: an exact slope is 1 to 2 % off under bf16, a broken one 40 % and more (measured)
EXACT = 0.01  # ours: the same in fp32, where it is 1e-6 off, and of waves of 1000 radians 2e-4


# ------------------------------------------------------------------------------------------------------ on every rank


def largest_of_ranks(value: float) -> float:
    """The largest of a number over the ranks that train together. Every rank must call it."""
    if dist.world() == 1:
        return value
    values: list[Any] = [None] * dist.world()
    torch.distributed.all_gather_object(values, value)
    return max(values)


def on_every_rank(stage: Callable[[], Stage]) -> Stage:
    """What this stage gives here. Raises UserError on all ranks where it does on any. Every rank must call it."""
    result: list[Stage] = []
    refusal: UserError | None = None
    try:
        result.append(stage())
    except UserError as error:
        refusal = error
    refused = largest_of_ranks(float(refusal is not None))
    if refusal is not None:
        raise refusal
    if refused:
        raise UserError("another rank's data or network was refused: its line says why")
    return result[0]


# ------------------------------------------------------------------------------------------------------- what a loss is


def require_terms(returned: object, rows: int, objective: str) -> Terms:
    """What a loss returned. Raises UserError where it is no `Terms` of one number per row, or has no gradient."""
    subject = f"objective '{objective}': its loss"
    expected = f"one number per row, shape ({rows},)"
    if isinstance(returned, Tensor):
        raise UserError(
            f"{subject} returned a tensor of shape {tuple(returned.shape)}: return dumo.types.Terms(loss, parts), "
            f"where loss has {expected}; the trainer takes the mean"
        )
    if not isinstance(returned, Terms):
        raise UserError(
            f"{subject} returned a {type(returned).__name__}: return dumo.types.Terms(loss, parts), where loss has "
            f"{expected}"
        )
    for field in ("parts", "notes"):
        value: object = getattr(returned, field)
        if not isinstance(value, Mapping):
            raise UserError(
                f"{subject} returned Terms whose {field} are a {type(value).__name__}: give a dict of names and "
                f"tensors of {expected}"
            )
    values: dict[str, object] = {"loss": returned.loss, **returned.parts, **returned.notes}
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{subject} returned Terms where '{name}' is a {type(value).__name__}: give {expected}")
        if value.shape != (rows,):
            raise UserError(
                f"{subject} returned Terms where '{name}' has shape {tuple(value.shape)}: give {expected}, for squares "
                "dumo.types.mean_square(e); the trainer takes the mean over rows"
            )
    if torch.is_grad_enabled() and not returned.loss.requires_grad:
        raise UserError(
            f"{subject} has no gradient: the pass that learns is net(...), without torch.no_grad() and detach()"
        )
    return returned


# ------------------------------------------------------------------------------------------------------- what a pass is


def inputs_of(b: Noised, needs: Needs) -> dict[str, Time]:
    """The times and knobs of a pass on a record."""
    known = {"t": b.t, "r": b.r}
    known |= {name: torch.full_like(b.t, value) for name, value in needs.knobs.items()}
    return {name: known.get(name, b.t) for name in needs.names}


@torch.no_grad()
def require_pure_net(net: nn.Module, b: Noised, needs: Needs, max_difference: float) -> None:
    """Raise UserError where a pass in training changes a buffer, or two on the same rows differ (`outputs_match`)."""
    inputs = inputs_of(b, needs)
    module = inner(net.net) if isinstance(net, Passes) else net
    subject = f"net {name_of(type(module))}"
    x = b.x_t.clone()
    first = net(x, b.c, **inputs)
    if not torch.allclose(x, b.x_t, rtol=0.0, atol=0.0, equal_nan=True):
        raise UserError(f"{subject}: a pass changes its input x in place, which later passes get: write x = x + ...")
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    again = net(b.x_t, b.c, **inputs)
    for name, buffer in module.named_buffers():
        if name in before and not torch.equal(buffer, before[name]):
            owner = type(module.get_submodule(name.rpartition(".")[0])).__name__
            raise UserError(
                f"{subject}: a pass in training changes its buffer '{name}' (of {owner}). A step makes several passes "
                "at different times t, so such a statistic mixes them: use a norm within one row, such as nn.GroupNorm "
                "or nn.LayerNorm"
            )
    if all(outputs_match(head, repeated, max_difference) for head, repeated in zip(first, again, strict=True)):
        return
    for name, part in module.named_modules():
        if isinstance(part, DROPOUTS) and part.p > 0 and not isinstance(net, Passes):  # which keys them
            raise UserError(
                f"{subject}: {type(part).__name__}(p={part.p:g}) at '{name}' draws another mask in every pass, so a "
                f"difference of two passes is no derivative, and a resumed run is another one: {KEYED}, or set p=0"
            )
    way = f"Draw nothing, or {KEYED}"
    if isinstance(net, Passes):  # in which torch's default generator is keyed
        way = (
            "Keep no state, and draw with torch's default generator alone, not with numpy's, Python's or one of its own"
        )
    raise UserError(
        f"{subject}: two passes in training on the same rows differ, so it draws random numbers or keeps a state: then "
        f"a difference of two passes is no derivative, and a resumed run is another one. {way}"
    )


def tolerance(x: Sample) -> float:
    """By how much two passes on x may differ (`outputs_match`): on a CPU not at all."""
    if x.device.type == "cpu":
        return 0.0
    match precision_of(x):
        case "fp32":
            return MAX_DIFFERENCE["fp32"]
        case "tf32":
            return MAX_DIFFERENCE["tf32"]
        case _:
            return MAX_DIFFERENCE["bf16"]


def outputs_match(first: Tensor, second: Tensor, max_difference: float) -> bool:
    """Whether two passes gave the same, what is not finite included.

    `max_difference`: the norm of their difference over the norm of the first; 0: they are equal to the bit.
    """
    if max_difference == 0:
        return torch.allclose(first, second, rtol=0.0, atol=0.0, equal_nan=True)
    finite = first.isfinite() & second.isfinite()
    if not torch.allclose(first[~finite], second[~finite], rtol=0.0, atol=0.0, equal_nan=True):
        return False
    values = first[finite].double()
    difference = torch.linalg.vector_norm(second[finite].double() - values)
    return bool(difference <= max_difference * torch.linalg.vector_norm(values))


@torch.no_grad()
def require_rows_apart(net: Passes, b: Noised, needs: Needs) -> None:
    """Raise UserError where a head is not finite, or another row changes with the first one."""
    inputs = inputs_of(b, needs)
    x = b.x_t.clone()
    x[0] += 1
    name = type(inner(net.net)).__name__
    for head, here, moved in zip(needs.heads, net(b.x_t, b.c, **inputs), net(x, b.c, **inputs), strict=False):
        if not here.isfinite().all():
            raise UserError(f"{name}: head '{head}' is not finite on the first rows: look at the data and the weights")
        if len(here) > 1 and (here[1:] - moved[1:]).abs().max() > MIXED * here[1:].abs().max():
            raise UserError(
                f"{name}: head '{head}' of one row changes with another row, so the rows of a batch mix (a batch norm, "
                "attention over the first axis, a reshape). Each row has a time of its own: keep them apart"
            )


# -------------------------------------------------------------------------------------------------------- what du/dt is


def is_copied(net: nn.Module) -> bool:
    """Whether the check works on a copy of a network: not where it is large, sharded, or of parts that refuse it."""
    if any(isinstance(part, FSDPModule) for part in net.modules()):
        return False
    parameters = list(net.parameters())
    if any(isinstance(p, DTensor) for p in parameters) or sum(p.numel() for p in parameters) > COPIED:
        return False
    try:
        copy.deepcopy(net)
    except Exception:  # whatever the parts of somebody else's network raise
        return False
    return True


def drawn_copy(net: Passes) -> Passes:
    """The same passes of a copy whose layers of zeros are drawn, for else du/dt is 0."""
    module = copy.deepcopy(inner(net.net))
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
def differences(net: Passes, b: Noised, inputs: Mapping[str, Time], w: Sample) -> Heads:
    """d/dt of each head along w by central differences, of the length that agrees best with the next longer one."""
    found: list[Heads] = []
    w = w.to(b.x_t)
    lengths = (*LENGTHS, *SHORTEST) if b.x_t.dtype == torch.float64 else LENGTHS
    with torch.autocast(b.x_t.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
        for h in lengths:
            ends = [net(b.x_t + s * h * w, b.c, **{**inputs, "t": inputs["t"] + s * h}) for s in (-1, 1)]
            found.append(tuple((ahead - behind) / (2 * h) for behind, ahead in zip(*ends, strict=True)))
    best: list[Tensor] = []
    for of_head in zip(*found, strict=True):
        gaps = [float(relative_error(a, e)) for a, e in pairwise(of_head)]
        best.append(of_head[1 + min(range(len(gaps)), key=gaps.__getitem__)])
    return tuple(best)


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


def choose_slope(
    given: Slope | None,
    net: Passes,
    b: Noised,
    needs: Needs,
    *,
    copied: bool,
    agreed: Callable[[float], float],
    before: Slope | None = None,
) -> Choice:
    """The slope that is given, or the first of dual, jvp and central that runs here and is the derivative.

    `copied`: whether the network may be copied, to draw its layers of zeros and to compare in float64. `agreed` makes
    of an error of this rank that of all ranks. `before`: what was chosen earlier, which is tried first. Raises
    UserError where none is within LIMIT.
    """
    inputs = inputs_of(b, needs)
    probe = drawn_copy(net) if copied else net
    exact = derivative_of(probe, b, inputs, copied=copied)
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
        error = agreed(error)
        if error <= limit_of(slope, b):
            why = "; ".join([f"{name}, {100 * error:.2g} % off differences", *dict.fromkeys(reasons)])
            return Choice(slope, why, steepness(exact, b), skipped=bool(reasons))
        reasons.append(reason)
    way = " Leave out the slope, and one that serves is taken" if given else ""
    raise UserError(f"no du/dt of {type(inner(net.net)).__name__}: {'; '.join(dict.fromkeys(reasons))}.{way}")


def limit_of(slope: Slope, b: Noised) -> float:
    """By how much a slope may be off in the precision that holds now."""
    differs = isinstance(slope, CentralSlope)
    return LIMIT if differs or precision_of(b.x_t) != "fp32" else EXACT


def derivative_of(probe: Passes, b: Noised, inputs: Mapping[str, Time], *, copied: bool) -> Heads:
    """d/dt of each head by differences: in float64 where the network can, else as it is."""
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


def short(error: BaseException) -> str:
    """What an error says, in a few words."""
    text = str(error).partition("\n")[0].partition(": use slope")[0][:140]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
