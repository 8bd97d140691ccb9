"""`dumo.jvp`: a function's value, with its gradient, and its derivative along a direction, in one pass.

    u, du_dt = dumo.jvp(net, (x_t, t), (v, torch.ones_like(t)))
    loss = (u - (v - t * du_dt)).square().mean()            # MeanFlow with r = 0: the target has no gradient

`torch.func.jvp` says the same, where it runs. It has no forward derivative of fused attention, calls a checkpointed
block, DistributedDataParallel or a compiled module in ways that these do not take, and records a gradient of the
tangent that a target does not need. Here the tangent rides on the pass that is made anyway (`dumo.autodiff.dual`).
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from dumo.autodiff import rule as rule  # without which a Dual can do nothing
from dumo.autodiff.dual import Dual, NoRule, pair, primal
from dumo.autodiff.einops import teach_einops
from dumo.types import UserError

log = logging.getLogger("dumo")
ROUNDED = 0.03  # ours: passes in bf16 differ by less, of another mask of dropout by more
PLAIN = Tensor | Dual | int | float | complex | str | None  # what an output may hold


def jvp(
    fn: Callable[..., Any],
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    **kwargs: Any,  # noqa: ANN401, of fn
) -> tuple[Any, Any]:
    """fn(*primals, **kwargs), and its derivative along `tangents`, shaped like primals; None: that one rests.

    The value and its gradient are those of the plain call, to the bit. The derivative is exact in the precision of the
    pass and has no gradient; where the output does not move it is zero. Both have the structure of fn's output.

    Where an operation has no tangent, two passes are made, and a line of the log says so: fn as it is, and
    `torch.func.jvp` without gradients. Both draw the same random numbers, of torch's generator on the CPU, as the plain
    call; buffers of a module change once. Raises UserError where arguments do not fit, and where that fails, too.
    """
    require_arguments(primals, tangents)
    teach_einops()
    call_duals_tensors()
    before = Moment.of(fn)
    directions = [None if d is None else d.detach().to(p, copy=True) for p, d in zip(primals, tangents, strict=True)]
    try:
        moving = [p if d is None else pair(p, d) for p, d in zip(primals, directions, strict=True)]
        out = fn(*moving, **kwargs)
    except (NoRule, TypeError, AttributeError, RuntimeError) as error:  # also of code that asks for a Tensor
        before.restore()
        return _two_passes(fn, primals, directions, kwargs, before, error)
    for leaf in tree_flatten(out)[0]:
        if not isinstance(leaf, PLAIN):
            raise UserError(f"dumo.jvp: the function returned a {type(leaf).__name__}: return tensors, tuples or dicts")
    return tree_map(primal, out), tree_map(_derivative, out)


def require_arguments(primals: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> None:
    """Raise UserError where these are no tensors of floats in pairs of a shape."""
    if isinstance(primals, Tensor) or isinstance(tangents, Tensor):
        raise UserError("dumo.jvp takes primals and tangents as tuples: dumo.jvp(fn, (x,), (v,))")
    if len(primals) != len(tangents):
        raise UserError(
            f"{len(primals)} primals and {len(tangents)} tangents: give a tangent each, None for what rests"
        )
    for i, (p, d) in enumerate(zip(primals, tangents, strict=True)):
        if isinstance(p, Dual):
            raise UserError(f"primal {i} moves already: dumo.jvp does not nest, take torch.func.jvp")
        if d is None:
            continue
        if not torch.is_tensor(p) or not p.is_floating_point():
            raise UserError(f"primal {i} is no tensor of floats, so it cannot move: give None as its tangent")
        if d.shape != p.shape:
            raise UserError(f"primal {i} has shape {tuple(p.shape)}, its tangent {tuple(d.shape)}: they move together")


@cache
def call_duals_tensors() -> None:
    """From now on torch.is_tensor says yes to a Dual: models of diffusers ask it of times, also when recomputed."""
    is_tensor = torch.is_tensor
    torch.is_tensor = lambda obj: isinstance(obj, Dual) or is_tensor(obj)  # pyright: ignore[reportAttributeAccessIssue]


@dataclass(frozen=True)
class Moment:
    """What a call of fn changes: torch's generator on the CPU, and the buffers of a module."""

    fn: object
    random_state: Tensor
    buffers: list[Tensor]

    @classmethod
    def of(cls, fn: object) -> "Moment":
        """As it is now."""
        buffers = [buffer.clone() for buffer in fn.buffers()] if isinstance(fn, nn.Module) else []
        return cls(fn, torch.get_rng_state(), buffers)

    @torch.no_grad()
    def restore(self) -> None:
        """As it was then."""
        torch.set_rng_state(self.random_state)
        if isinstance(self.fn, nn.Module):
            for buffer, value in zip(self.fn.buffers(), self.buffers, strict=True):
                buffer.copy_(value)


def _derivative(x: object) -> object:
    """The tangent of an output; zeros of one that rests."""
    if isinstance(x, Dual) and x.t is not None:
        return x.t
    return torch.zeros_like(primal(x)) if isinstance(x, Tensor | Dual) else x


def _two_passes(
    fn: Callable[..., Any],
    primals: Sequence[Tensor],
    directions: Sequence[Tensor | None],
    kwargs: dict[str, Any],
    before: Moment,
    error: Exception,
) -> tuple[Any, Any]:
    """The value by the plain call, the derivative by torch; `error` says why not in one pass."""
    points = [p if d is None else p.detach().clone() for p, d in zip(primals, directions, strict=True)]
    value = fn(*primals, **kwargs)  # raises what is no matter of tangents, and may write to primals
    after = Moment.of(fn)
    inner = fn.module if isinstance(fn, DistributedDataParallel) else fn  # which torch.func.jvp does not pass
    leaves, spec = tree_flatten(value)
    places = [i for i, d in enumerate(directions) if d is not None]
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def tensors_along(*some: Tensor) -> tuple[Tensor, ...]:
        operands = list(points)
        for i, x in zip(places, some, strict=True):
            operands[i] = x.clone()  # it may be written to
        results = tree_flatten(inner(*operands, **kwargs))[0]
        return tuple(results[i] for i in tensors)

    at = tuple(points[i] for i in places)
    along = tuple(d for d in directions if d is not None)
    name = getattr(fn, "__name__", type(fn).__name__)
    before.restore()
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            again, slopes = torch.func.jvp(tensors_along, at, along)[:2]
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as failed:
        raise UserError(
            f"{name} has no derivative: {_first_line(error)}; and by torch.func.jvp: {_first_line(failed)}"
        ) from failed
    finally:
        after.restore()
    for i, repeated in zip(tensors, again, strict=True):
        if _differs(leaves[i].detach(), repeated):
            raise UserError(
                f"{name} has no derivative: {_first_line(error)}; and torch.func.jvp draws other random numbers, as "
                "it lays tensors out in another way: leave out the dropout, or let it follow contiguous()"
            )
    log.warning("dumo.jvp makes two passes of %s: %s", name, _first_line(error))
    derivative = list(leaves)
    for i, slope in zip(tensors, slopes, strict=True):
        derivative[i] = slope
    return value, tree_unflatten(derivative, spec)


def _differs(value: Tensor, repeated: Tensor) -> bool:
    """Whether two passes on the same differ by more than rounding."""
    if not value.is_floating_point():
        return False
    return bool((repeated - value).norm() > ROUNDED * value.norm())


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
