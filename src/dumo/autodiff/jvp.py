"""`dumo.jvp`: a function's value, with its gradient, and its derivative along a direction, in one pass.

    u, du_dt = dumo.jvp(net, (x_t, t), (v, torch.ones_like(t)))
    loss = (u - (v - t * du_dt)).square().mean()            # MeanFlow with r = 0: the target has no gradient

`torch.func.jvp` says the same, where it runs. It has no forward derivative of fused attention, calls a checkpointed
block, DistributedDataParallel or a compiled module in ways that these do not take, and records a gradient of the
tangent that a target does not need. Here the tangent rides on the pass that is made anyway (`dumo.autodiff.dual`).
"""

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from dumo.autodiff import rule as rule  # without which a Dual can do nothing
from dumo.autodiff.dual import Dual, pair, primal
from dumo.autodiff.einops import teach_einops
from dumo.types import UserError

log = logging.getLogger("dumo")


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
    `torch.func.jvp` without gradients. Raises UserError where shapes differ, and where that fails, too.
    """
    if len(primals) != len(tangents):
        raise UserError(
            f"{len(primals)} primals and {len(tangents)} tangents: give a tangent each, None for what rests"
        )
    for i, (p, d) in enumerate(zip(primals, tangents, strict=True)):
        if d is not None and d.shape != p.shape:
            raise UserError(f"primal {i} has shape {tuple(p.shape)}, its tangent {tuple(d.shape)}: they move together")
    teach_einops()
    moving = [p if d is None else pair(p, d.detach().to(p)) for p, d in zip(primals, tangents, strict=True)]
    try:
        with duals_are_tensors():
            out = fn(*moving, **kwargs)
    except Exception as error:  # NoRule, and whatever code raises that asks whether its input is a Tensor
        return _two_passes(fn, primals, tangents, kwargs, error)
    return tree_map(primal, out), tree_map(_derivative, out)


@contextmanager
def duals_are_tensors() -> Generator[None, None, None]:
    """Inside, torch.is_tensor says yes to a Dual: models of diffusers ask it of times."""
    before = torch.is_tensor
    torch.is_tensor = lambda obj: isinstance(obj, Dual) or before(obj)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch.is_tensor = before


def _derivative(x: object) -> object:
    """The tangent of an output; zeros of one that rests."""
    if isinstance(x, Dual) and x.t is not None:
        return x.t
    return torch.zeros_like(primal(x)) if isinstance(x, Tensor | Dual) else x


def _two_passes(
    fn: Callable[..., Any],
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    kwargs: dict[str, Any],
    error: Exception,
) -> tuple[Any, Any]:
    """The value by the plain call, the derivative by torch; `error` says why not in one pass."""
    value = fn(*primals, **kwargs)  # raises what is no matter of tangents
    place = [i for i, d in enumerate(tangents) if d is not None]
    inner = fn
    while isinstance(inner, nn.Module) and isinstance(wrapped := getattr(inner, "module", None), nn.Module):
        inner = wrapped  # torch.func.jvp does not pass DistributedDataParallel

    def along(*some: Tensor) -> Any:  # noqa: ANN401, as fn
        operands = list(primals)
        for i, x in zip(place, some, strict=True):
            operands[i] = x
        return inner(*operands, **kwargs)

    at = tuple(primals[i].detach() for i in place)
    directions = tuple(d.detach().to(p) for p, d in zip(primals, tangents, strict=True) if d is not None)
    name = getattr(fn, "__name__", type(fn).__name__)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            derivative = torch.func.jvp(along, at, directions)[1]
    except (RuntimeError, NotImplementedError) as failed:
        raise UserError(
            f"{name} has no derivative: {_first_line(error)}; and by torch.func.jvp: {_first_line(failed)}"
        ) from failed
    log.warning("dumo.jvp makes two passes of %s: %s", name, _first_line(error))
    return value, derivative


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
