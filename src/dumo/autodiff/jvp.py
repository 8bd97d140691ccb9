"""`dumo.jvp`: compute a function's value, with its gradient, and its directional derivative in one pass.

    u, du_dt = dumo.jvp(net, (x_t, t), (v, torch.ones_like(t)))
    loss = (u - (v - t * du_dt)).square().mean()            # MeanFlow with r = 0: the target has no gradient

`torch.func.jvp` does not support fused attention, checkpointed blocks, DistributedDataParallel or compiled modules, and
records a gradient of the tangent that a regression target does not need. `jvp`:

1. Check the arguments, and save the state that a call changes: random state and buffers (`_CallState`).
2. Call fn on Duals (`_call_on_duals`), which computes the tangent in the same pass (`dumo.autodiff.dual`).
3. If fn fails on Duals, restore the state and make two passes (`_two_passes`): a plain call, and one in torch's forward
   mode (`torch.autograd.forward_ad`). Functions that drop a tangent there are refused, because forward mode, and thus
   `torch.func.jvp`, would return a zero derivative.
"""

import inspect
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.jit import ScriptModule
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_any, tree_flatten, tree_map, tree_unflatten

from dumo.autodiff import fallback
from dumo.autodiff import rule as rule  # its import registers the rules of torch's operations for Duals
from dumo.autodiff.dual import RAISED_ON_DUALS, Dual, NoRule, accept_duals, pair, primal, tangent
from dumo.autodiff.tape import DeferredTangent
from dumo.types import UserError

log = logging.getLogger("dumo")
# The largest relative difference of two passes: those in bf16 differ by less, those with other dropout masks by more.
_MAX_ROUNDING = 0.03
_FIELDS_OF_MODULES = frozenset(vars(nn.Module()))
# The types that an output may contain.
_OutputLeaf = Tensor | Dual | int | float | complex | str | None


def jvp(
    fn: Callable[..., Any],
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    **kwargs: Any,  # noqa: ANN401, of fn
) -> tuple[Any, Any]:
    """Return fn(*primals, **kwargs) and its derivative along `tangents`.

    Each tangent has the shape of its primal, or is None for a primal that is held constant. The value and its gradient
    are bit-identical to a plain call. The derivative is exact in the precision of the pass and has no gradient; it is
    zero for outputs that do not depend on the primals. Both have the structure of fn's output.

    If an operation has no tangent, two passes are made, and a warning is logged once: a plain call, and one in torch's
    forward mode without gradients. Both draw the same random numbers from torch's generators of the CPU and of the
    primals' GPUs. Buffers are updated once if fn is a module or a module's method. Raises UserError if the arguments
    do not match, and if torch's forward mode fails as well or drops a tangent.
    """
    _require_arguments(primals, tangents)
    accept_duals()
    before = _CallState.of(fn, primals)
    directions = [None if d is None else d.detach().to(p, copy=True) for p, d in zip(primals, tangents, strict=True)]
    operands = [p if d is None else pair(p, d) for p, d in zip(primals, directions, strict=True)]
    out, reason = _call_on_duals(fn, operands, kwargs)
    _release_attributes(fn)
    if reason is not None:
        before.restore()
        return _two_passes(fn, primals, directions, kwargs, before, reason)
    for leaf in tree_flatten(out)[0]:
        if not isinstance(leaf, _OutputLeaf):
            raise UserError(f"dumo.jvp: the function returned a {type(leaf).__name__}: return tensors, tuples or dicts")
    return tree_map(primal, out), tree_map(_tangent_or_zeros, out)


def _call_on_duals(
    fn: Callable[..., Any], operands: Sequence[Tensor], kwargs: dict[str, Any]
) -> tuple[Any, str | None]:
    """Return fn's output and None, or None and the reason why fn failed on Duals. UserErrors of fn are raised.

    The reason is a string, because the exception would keep the tensors of this pass in memory during the next two.
    """
    try:
        return fn(*operands, **kwargs), None
    except RAISED_ON_DUALS as error:
        if isinstance(error, UserError) and not isinstance(error, RuntimeError):
            raise
        return None, _first_line(error)


def _require_arguments(primals: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> None:
    """Raise UserError unless each primal has a floating-point tangent of its shape, or None."""
    if isinstance(primals, Tensor) or isinstance(tangents, Tensor):
        raise UserError("dumo.jvp takes primals and tangents as tuples: dumo.jvp(fn, (x,), (v,))")
    if len(primals) != len(tangents):
        raise UserError(
            f"{len(primals)} primals and {len(tangents)} tangents: give one tangent per primal, or None for a constant"
        )
    for i, (p, d) in enumerate(zip(primals, tangents, strict=True)):
        if isinstance(p, Dual):
            raise UserError(f"primal {i} has a tangent already: dumo.jvp does not nest, use torch.func.jvp")
        if d is None:
            continue
        if not torch.is_tensor(p) or not p.is_floating_point():
            raise UserError(f"primal {i} is not a floating-point tensor: give None as its tangent")
        if not torch.is_tensor(d):
            raise UserError(f"tangent {i} is a {type(d).__name__}: give a tensor like primal {i}, or None")
        if d.shape != p.shape:
            raise UserError(f"primal {i} has shape {tuple(p.shape)}, its tangent {tuple(d.shape)}: give equal shapes")


@dataclass(frozen=True)
class _Registry:
    """The buffers that are registered in a module, by name."""

    module: nn.Module
    buffers: dict[str, Tensor | None]
    non_persistent: set[str]

    @classmethod
    def of(cls, module: nn.Module) -> "_Registry":
        """Return the current registry of a module."""
        return cls(module, dict(module._buffers), set(module._non_persistent_buffers_set))

    def restore(self, copies: Mapping[int, Tensor]) -> None:
        """Register exactly these buffers, replacing those that have a copy, by id."""
        for name in self.buffers:
            # A call may have deleted the buffer and set an attribute of its name.
            self.module.__dict__.pop(name, None)
        self.module._buffers.clear()
        self.module._buffers.update({name: copies.get(id(buffer), buffer) for name, buffer in self.buffers.items()})
        self.module._non_persistent_buffers_set.clear()
        self.module._non_persistent_buffers_set.update(self.non_persistent)


@dataclass(frozen=True)
class _CallState:
    """The state that a call of fn may change: generators of the CPU and the primals' GPUs, and buffers.

    values: copies of the buffers' values.
    """

    random_state: Tensor
    cuda_states: dict[torch.device, Tensor]
    registries: list[_Registry]
    buffers: list[Tensor]
    values: list[Tensor]

    @classmethod
    def of(cls, fn: object, primals: Sequence[Tensor]) -> "_CallState":
        """Copy the current state."""
        gpus = {p.device for p in primals if torch.is_tensor(p) and p.is_cuda}
        cuda_states = {gpu: torch.cuda.get_rng_state(gpu) for gpu in gpus}
        # The module, or the object of which fn is a method.
        root = fn if isinstance(fn, nn.Module) else getattr(fn, "__self__", None)
        registries: list[_Registry] = []
        buffers: list[Tensor] = []
        if isinstance(root, nn.Module):
            # A scripted module does not expose its registry.
            registries = [_Registry.of(module) for module in root.modules() if not isinstance(module, ScriptModule)]
            buffers = [buffer for buffer in root.buffers() if not is_lazy(buffer)]
        return cls(torch.get_rng_state(), cuda_states, registries, buffers, [buffer.clone() for buffer in buffers])

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the state. A buffer is written only if it has changed, because a backward pass may need it."""
        self.restore_generators()
        for registry in self.registries:
            registry.restore({})
        for buffer, value in zip(self.buffers, self.values, strict=True):
            if not torch.equal(buffer, value):
                buffer.copy_(value)

    def restore_generators(self) -> None:
        """Restore the states of torch's generators."""
        torch.set_rng_state(self.random_state)
        for gpu, state in self.cuda_states.items():
            torch.cuda.set_rng_state(state, gpu)

    def register_copies(self) -> None:
        """Register new copies of the saved buffers, for a call to modify."""
        copies = {id(b): value.clone() for b, value in zip(self.buffers, self.values, strict=True)}
        for registry in self.registries:
            registry.restore(copies)


def _release_attributes(function: object) -> None:
    """Replace the Duals that a pass has left in module attributes by their primals.

    function: the called module, or a function that calls modules.
    """
    for owner in _owners_of_attributes(function):
        attributes = vars(owner)
        for name, value in list(attributes.items()):
            # The fields of nn.Module, such as hooks and parameters, contain no Duals.
            if name in _FIELDS_OF_MODULES or not isinstance(value, Dual | list | tuple | dict):
                continue
            if tree_any(lambda x: isinstance(x, Dual), value):
                attributes[name] = tree_map(primal, value)


def _owners_of_attributes(function: object) -> list[object]:
    """Return the modules and other objects on which a call of a function may set attributes."""
    if isinstance(function, partial):
        return [
            owner
            for x in (function.func, *function.args, *function.keywords.values())
            for owner in _owners_of_attributes(x)
        ]
    if isinstance(function, nn.Module):
        return list(function.modules())
    owners: list[object] = []
    if inspect.ismethod(function):
        owners.append(function.__self__)
        function = function.__func__
    if inspect.isfunction(function):
        used = inspect.getclosurevars(function)
        owners += [*used.nonlocals.values(), *used.globals.values()]
    found: list[object] = []
    for owner in owners:
        if isinstance(owner, nn.Module):
            found += owner.modules()
        elif hasattr(owner, "__dict__") and not isinstance(owner, type | ModuleType) and not callable(owner):
            found.append(owner)
    return found


def _tangent_or_zeros(x: object) -> object:
    """Return the tangent of an output, zeros for a tensor without a tangent, and anything else unchanged.

    Raises UserError for a deferred tangent.
    """
    t = tangent(x)
    if isinstance(t, DeferredTangent):
        raise UserError("fn uses a Dual of an enclosing pass: dumo.jvp does not nest, use torch.func.jvp")
    if t is not None:
        # An expanded tensor could not be modified in place.
        is_expanded = 0 in t.stride()
        return t.clone(memory_format=torch.contiguous_format) if is_expanded else t
    if isinstance(x, Tensor | Dual):
        return torch.zeros_like(primal(x))
    return x


def _two_passes(
    fn: Callable[..., Any],
    primals: Sequence[Tensor],
    directions: Sequence[Tensor | None],
    kwargs: dict[str, Any],
    before: _CallState,
    reason: str,
) -> tuple[Any, Any]:
    """Compute the value by a plain call and the derivative in torch's forward mode. `reason`: why fn failed on Duals.

    Raises UserError if forward mode fails, or draws other random numbers than the plain call.
    """
    # Copy the primals, because fn may modify them.
    points = [p if d is None else p.detach().clone() for p, d in zip(primals, directions, strict=True)]
    value = fn(*primals, **kwargs)
    after = _CallState.of(fn, primals)
    leaves, spec = tree_flatten(value)
    tensor_places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    name = getattr(fn, "__name__", type(fn).__name__)
    refusal = f"{name} has no derivative: {reason}; and"
    before.restore_generators()
    try:
        repeated_values, derivatives = _tensors_and_derivatives(fn, points, directions, kwargs, before, tensor_places)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as two_pass_error:
        raise UserError(f"{refusal} in torch's forward mode: {_first_line(two_pass_error)}") from two_pass_error
    finally:
        after.restore()
    for i, repeated_value in zip(tensor_places, repeated_values, strict=True):
        if _differs(leaves[i].detach(), repeated_value):
            raise UserError(
                f"{refusal} torch's forward mode draws other random numbers, because its tensors have another memory "
                "layout: remove the dropout, or call contiguous() before it"
            )
    _warn_once(f"dumo.jvp makes two passes of {name}: {reason}")
    derivative_leaves = list(leaves)
    for i, derivative in zip(tensor_places, derivatives, strict=True):
        derivative_leaves[i] = derivative
    return value, tree_unflatten(derivative_leaves, spec)


def _tensors_and_derivatives(
    fn: Callable[..., Any],
    points: Sequence[Tensor],
    directions: Sequence[Tensor | None],
    kwargs: dict[str, Any],
    before: _CallState,
    tensor_places: Sequence[int],
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors at `tensor_places` among the leaves of fn's output, and their derivatives, in forward mode."""
    # DistributedDataParallel does not support forward mode.
    inner = fn.module if isinstance(fn, DistributedDataParallel) else fn
    values: list[Tensor] = []
    derivatives: list[Tensor] = []
    # Fused attention kernels have no forward derivative.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        operands: list[Tensor] = []
        for point, direction in zip(points, directions, strict=True):
            # Copy the point, because fn may modify it.
            operands.append(point if direction is None else forward_ad.make_dual(point.clone(), direction))
        before.register_copies()
        with fallback.RefuseMissingTangents():
            leaves, _ = tree_flatten(inner(*operands, **kwargs))
        for place in tensor_places:
            value, derivative = forward_ad.unpack_dual(leaves[place])
            values.append(value)
            derivatives.append(torch.zeros_like(value) if derivative is None else derivative)
    return values, derivatives


def _differs(value: Tensor, repeated_value: Tensor) -> bool:
    """Whether two passes on the same inputs differ by more than rounding."""
    if not value.is_floating_point():
        return False
    return bool((repeated_value - value).norm() > _MAX_ROUNDING * value.norm())


@cache
def _warn_once(message: str) -> None:
    """Log a warning once per process."""
    log.warning(message)


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message, without memory addresses, which differ between calls."""
    if isinstance(error, NoRule):
        return f"no tangent for {error.args[0]}"
    line = str(error).partition("\n")[0] or type(error).__name__
    return re.sub(r" at 0x[0-9a-f]+", "", line)
