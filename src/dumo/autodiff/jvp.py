"""`dumo.jvp`: a function's value, with its gradient, and its derivative along a direction, in one pass.

    u, du_dt = dumo.jvp(net, (x_t, t), (v, torch.ones_like(t)))
    loss = (u - (v - t * du_dt)).square().mean()            # MeanFlow with r = 0: the target has no gradient

`torch.func.jvp` computes both, where it runs. It has no forward derivative of fused attention, calls a checkpointed
block, DistributedDataParallel or a compiled module in ways that these do not take, and records a gradient of the
tangent that a target does not need. `jvp`, the entrance, goes like this:

1. Check the arguments, and remember what a call changes: random state and buffers (`_CallState`).
2. Call fn on Duals (`_call_on_duals`): the tangent rides on the pass that is made anyway (`dumo.autodiff.dual`).
3. Where fn fails on Duals, restore the state and make two passes (`_two_passes`): fn as it is, and then in torch's
   own forward mode (`torch.autograd.forward_ad`). A function that loses a tangent there is refused: forward mode, and
   so `torch.func.jvp`, takes its derivative for zero.
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

from dumo.autodiff import general
from dumo.autodiff import rule as rule  # without which a Dual can do nothing
from dumo.autodiff.dual import RAISED_ON_DUALS, Dual, NoRule, pair, primal, tangent, teach_others
from dumo.autodiff.tape import Later
from dumo.types import UserError

log = logging.getLogger("dumo")
_MAX_ROUNDING = 0.03  # relative, ours: two passes in bf16 differ by less, with two masks of dropout by more
_FIELDS_OF_MODULES = frozenset(vars(nn.Module()))
_OutputLeaf = Tensor | Dual | int | float | complex | str | None  # what an output may hold


def jvp(
    fn: Callable[..., Any],
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    **kwargs: Any,  # noqa: ANN401, of fn
) -> tuple[Any, Any]:
    """Return fn(*primals, **kwargs) and its derivative along `tangents`, shaped like primals; None: that one rests.

    The value and its gradient are those of the plain call, to the bit. The derivative is exact in the precision of the
    pass and has no gradient; where the output does not move it is zero. Both have the structure of fn's output.

    Where an operation has no tangent, two passes are made, and the first time a line of the log says so: fn as it is,
    and in torch's forward mode without gradients. Both draw the same random numbers as the plain call, of torch's
    generators of the CPU and of the GPUs of primals; buffers change once where fn is a module or its method. Raises
    UserError where arguments do not fit, and where torch's forward mode fails, too, or loses a tangent.
    """
    _require_arguments(primals, tangents)
    teach_others()
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
    """What fn returns, and None; or, where it does not take Duals, None and why. Raises UserError as fn does.

    Why is a text. The error itself would keep all tensors of this pass in memory while two others are made.
    """
    try:
        return fn(*operands, **kwargs), None
    except RAISED_ON_DUALS as error:
        if isinstance(error, UserError) and not isinstance(error, RuntimeError):
            raise
        return None, _first_line(error)


def _require_arguments(primals: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> None:
    """Raise UserError unless there is a tangent or None for each primal, and both are floats of one shape."""
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
        if not torch.is_tensor(d):
            raise UserError(f"tangent {i} is a {type(d).__name__}: give a tensor like primal {i}, or None if it rests")
        if d.shape != p.shape:
            raise UserError(f"primal {i} has shape {tuple(p.shape)}, its tangent {tuple(d.shape)}: they move together")


@dataclass(frozen=True)
class _Registry:
    """The buffers that a module has registered."""

    module: nn.Module
    buffers: dict[str, Tensor | None]  # by name
    temporary: set[str]  # the names that a state dict leaves out

    @classmethod
    def of(cls, module: nn.Module) -> "_Registry":
        """The registry of a module as it is now."""
        return cls(module, dict(module._buffers), set(module._non_persistent_buffers_set))

    def restore(self, copies: Mapping[int, Tensor]) -> None:
        """Register these buffers and no others, or, in place of those that have one, their copies by id."""
        for name in self.buffers:
            self.module.__dict__.pop(name, None)  # an attribute that a call has set after it deleted the buffer
        self.module._buffers.clear()
        self.module._buffers.update({name: copies.get(id(buffer), buffer) for name, buffer in self.buffers.items()})
        self.module._non_persistent_buffers_set.clear()
        self.module._non_persistent_buffers_set.update(self.temporary)


@dataclass(frozen=True)
class _CallState:
    """What a call of fn may change: torch's generators of the CPU and of the primals' GPUs, and a module's buffers."""

    random_state: Tensor
    cuda_states: dict[torch.device, Tensor]
    registries: list[_Registry]
    buffers: list[Tensor]
    values: list[Tensor]  # what the buffers held

    @classmethod
    def of(cls, fn: object, primals: Sequence[Tensor]) -> "_CallState":
        """Copy the present state."""
        gpus = {p.device for p in primals if torch.is_tensor(p) and p.is_cuda}
        cuda_states = {gpu: torch.cuda.get_rng_state(gpu) for gpu in gpus}
        root = fn if isinstance(fn, nn.Module) else getattr(fn, "__self__", None)  # whose method fn is
        registries: list[_Registry] = []
        buffers: list[Tensor] = []
        if isinstance(root, nn.Module):
            # a scripted module keeps its registry to itself
            registries = [_Registry.of(module) for module in root.modules() if not isinstance(module, ScriptModule)]
            buffers = [buffer for buffer in root.buffers() if not is_lazy(buffer)]
        return cls(torch.get_rng_state(), cuda_states, registries, buffers, [buffer.clone() for buffer in buffers])

    @torch.no_grad()
    def restore(self) -> None:
        """Bring the state back. A buffer is written to only where it has changed, for gradients may need it."""
        self.restore_generators()
        for registry in self.registries:
            registry.restore({})
        for buffer, value in zip(self.buffers, self.values, strict=True):
            if not torch.equal(buffer, value):
                buffer.copy_(value)

    def restore_generators(self) -> None:
        """Bring the states of torch's generators back."""
        torch.set_rng_state(self.random_state)
        for gpu, state in self.cuda_states.items():
            torch.cuda.set_rng_state(state, gpu)

    def register_copies(self) -> None:
        """Register new copies of what the buffers held: what a call writes to."""
        copies = {id(b): value.clone() for b, value in zip(self.buffers, self.values, strict=True)}
        for registry in self.registries:
            registry.restore(copies)


def _release_attributes(function: object) -> None:
    """Put primals in place of the Duals that a pass has left in attributes of modules, for these outlive the pass.

    `function` is what was called: a module, or a function that calls modules.
    """
    for owner in _owners_of_attributes(function):
        attributes = vars(owner)
        for name, value in list(attributes.items()):
            # A module's own fields, such as its hooks and parameters, hold no Duals.
            if name in _FIELDS_OF_MODULES or not isinstance(value, Dual | list | tuple | dict):
                continue
            if tree_any(lambda x: isinstance(x, Dual), value):
                attributes[name] = tree_map(primal, value)


def _owners_of_attributes(function: object) -> list[object]:
    """The modules and other objects that a call of a function may set attributes of."""
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
    """The tangent of an output; zeros of a tensor that does not move; anything else as it is.

    Raises UserError for a tangent that is not known yet.
    """
    t = tangent(x)
    if isinstance(t, Later):
        raise UserError("the function moves with a pass around dumo.jvp: dumo.jvp does not nest, take torch.func.jvp")
    if t is not None:
        is_expanded = 0 in t.stride()  # numbers that share their place, so nobody could write to them
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
    """The value by the plain call, the derivative by torch's forward mode. `reason`: why one pass did not do.

    Raises UserError where forward mode fails, or draws other random numbers than the plain call.
    """
    points = [p if d is None else p.detach().clone() for p, d in zip(primals, directions, strict=True)]
    value = fn(*primals, **kwargs)  # raises what is no matter of tangents, and may write to primals
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
                f"{refusal} torch's forward mode draws other random numbers, as it lays tensors out in another way: "
                "leave out the dropout, or let it follow contiguous()"
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
    """Tensors at `tensor_places` among the leaves that fn returns, and their derivatives, in torch's forward mode."""
    inner = fn.module if isinstance(fn, DistributedDataParallel) else fn  # forward mode does not pass the wrapper
    values: list[Tensor] = []
    derivatives: list[Tensor] = []
    # Fused kernels of attention have no forward derivative.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        operands: list[Tensor] = []
        for point, direction in zip(points, directions, strict=True):
            # A copy, which fn may write to.
            operands.append(point if direction is None else forward_ad.make_dual(point.clone(), direction))
        before.register_copies()
        with general.RefuseMissingTangents():
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
    """Log a warning, unless this process has: the next step of a training would say the same."""
    log.warning(message)


def _first_line(error: Exception) -> str:
    """What an error says, in a line."""
    if isinstance(error, NoRule):
        return f"no tangent for {error.args[0]}"
    line = str(error).partition("\n")[0] or type(error).__name__
    return re.sub(r" at 0x[0-9a-f]+", "", line)  # which is another in every call
