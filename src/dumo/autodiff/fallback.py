"""Fallback JVP for operations without a hand-written rule, by torch.autograd.

`dumo.autodiff.dual.differentiate` uses it. `unsupported_reason` names calls that would lose the tangent or modify an
operand. The value and the tangent come from one call if possible:

1. `call_in_forward_mode` calls the operation on `torch.autograd.forward_ad` dual tensors. The value is bit-identical
   and keeps its gradient.
2. If torch has no forward derivative, `tangent_by_backward` differentiates the gradient, which is linear in the output
   gradient v: the derivative of J^T v with respect to v gives J.
3. If torch has no gradient either, NoRule is raised. `torch.func.jvp` would return zeros.

If the direction is not known during the pass, `tangent` calls the operation a second time when the tape is evaluated.

A rule (`dumo.autodiff.rule`) is faster, and torch.compile supports it; it does not support the fallback.
"""

import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from dumo.types import UserError

# Tensor methods that drop the tangent.
LOSE_TANGENT = frozenset(
    ("data", "detach", "detach_", "item", "tolist", "numpy", "grad", "requires_grad_", "retain_grad")
)
# Operations that draw random numbers. The second call that a tape needs would draw different ones.
_DRAW_RANDOM = frozenset(
    (
        "bernoulli",
        "normal",
        "rrelu",
        "multinomial",
        "poisson",
        "gumbel_softmax",
        "rand_like",
        "randn_like",
        "randint_like",
    )
)

# torch returns a zero derivative of a sample of N(mean, sd) with respect to mean and sd, which is wrong.
_ZERO_IN_TORCH = "normal"

# Functions that return a constant permutation, as floats, first.
_PERMUTING = frozenset(("linalg_lu", "lu_unpack"))


class NoRule(UserError, NotImplementedError):  # noqa: N818, it names a missing rule
    """The network uses an operation without a tangent, which the argument names."""

    def __str__(self) -> str:
        """Return the message. The constructor does not format it, because torch.compile could not trace that."""
        return f"slope 'dual' has no tangent for '{self.args[0]}': use slope 'jvp', or another operation in the network"


class NoRecordedRule(NoRule):
    """The loss differentiates through a derivative, and the operation has no rule for that."""

    def __str__(self) -> str:
        """Return the message."""
        return (
            f"this loss differentiates through a derivative, and '{self.args[0]}' has no rule for that: use another "
            "operation in the network, or objective 'meanflow'"
        )


class NoRuleForAnySlope(NoRule):
    """The derivative always uses dual numbers, so another slope would not help."""

    def __str__(self) -> str:
        """Return the message."""
        return (
            f"this derivative uses dual numbers with every slope, and has no tangent for '{self.args[0]}': use another "
            "operation in the network (x = x + y for x += y), or objective 'meanflow'"
        )


@contextmanager
def without_slope_advice() -> Generator[None, None, None]:
    """Replace a NoRule by NoRuleForAnySlope, for dual passes that do not depend on the slope."""
    try:
        yield
    except NoRecordedRule:
        raise
    except NoRule as error:
        raise NoRuleForAnySlope(*error.args) from error


@dataclass(frozen=True)
class OperationCall:
    """An operation call without its operands, and the index of one of its results.

    spec: the tree structure of (args, kwargs).
    dual_places: the indices of the Duals among the leaves of (args, kwargs).
    result_index: the index of the result among the leaves of the returned value.
    """

    function: Callable[..., Any]
    spec: TreeSpec
    dual_places: tuple[int, ...]
    result_index: int


def tangent(*arguments: Any) -> Tensor:  # noqa: ANN401, operands of any kind
    """Compute the tangent of one result of an operation by calling the operation again.

    arguments: as `carry` passes them to a JVP: a tangent (or None) for each Dual of the call, the OperationCall, and
        the leaves of its operands.

    Raises NoRule if torch has no derivative.
    """
    call_place = next(i for i, x in enumerate(arguments) if isinstance(x, OperationCall))
    call = arguments[call_place]
    operands = arguments[call_place + 1 :]
    tangents = {i: d for i, d in zip(call.dual_places, arguments[:call_place], strict=True) if d is not None}
    found = None
    try:
        with torch.no_grad():
            _, tangents_of_results, _ = call_in_forward_mode(call.function, call.spec, operands, tangents)
        found = tangents_of_results[call.result_index]
    except NotImplementedError:
        # torch has no forward derivative.
        pass
    return found if found is not None else tangent_by_backward(call, operands, tangents)


def call_in_forward_mode(
    function: Callable[..., Any], spec: TreeSpec, operands: Sequence[Any], tangents: Mapping[int, Tensor]
) -> tuple[list[Any], list[Tensor | None], TreeSpec]:
    """Call an operation in torch's forward mode. `tangents` is keyed by index among the leaves of (args, kwargs).

    Return the leaves of the result, the tangent of each or None, and their structure. An operand that the operation
    returns unchanged stays the same object. Raises NotImplementedError if torch has no forward derivative.
    """
    # Fused attention kernels have no forward derivative.
    kernels = sdpa_kernel(SDPBackend.MATH) if "attention" in operation_name(function) else nullcontext()
    with forward_ad.dual_level(), kernels:
        leaves = list(operands)
        for i, d in tangents.items():
            leaves[i] = forward_ad.make_dual(leaves[i], d.to(leaves[i].dtype))
        args, kwargs = tree_unflatten(leaves, spec)
        results, results_spec = tree_flatten(function(*args, **kwargs))
        tangents_of_results: list[Tensor | None] = []
        for k, result in enumerate(results):
            place = next((i for i in tangents if result is leaves[i]), None)
            if place is not None:
                results[k] = operands[place]
                tangents_of_results.append(tangents[place])
            elif can_have_tangent(result):
                results[k], found = forward_ad.unpack_dual(result)
                tangents_of_results.append(None if found is None else found.detach())
            else:
                tangents_of_results.append(None)
    return results, tangents_of_results, results_spec


def tangent_by_backward(call: OperationCall, operands: Sequence[Any], tangents: Mapping[int, Tensor]) -> Tensor:
    """Compute the tangent of one result by calling the operation again and differentiating its gradient.

    Raises NoRule if the operation has no gradient.
    """
    name = operation_name(call.function)
    with torch.inference_mode(mode=False), torch.enable_grad():
        # Pass views, because an operation may return its operand or modify it, and autograd forbids that for leaves.
        points = {i: operands[i].detach().clone().requires_grad_() for i in tangents}
        leaves = [points[i].view_as(points[i]) if i in points else x for i, x in enumerate(operands)]
        args, kwargs = tree_unflatten(leaves, call.spec)
        try:
            result = tree_flatten(call.function(*args, **kwargs))[0][call.result_index]
            if not result.requires_grad:
                raise NoRule(f"{name}, of which torch has no derivative")
            v = torch.zeros_like(result, requires_grad=True)
            gradients: Sequence[Tensor | None] = cast(
                Any, torch.autograd.grad(result, list(points.values()), v, create_graph=True, allow_unused=True)
            )
            pairs = [(g, d) for g, d in zip(gradients, tangents.values(), strict=True) if g is not None]
            if not pairs or any(g.grad_fn is None for g, _ in pairs):
                raise NoRule(f"{name}, of which torch has no derivative")
            return torch.autograd.grad([g for g, _ in pairs], v, [d.to(g.dtype) for g, d in pairs])[0]
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, NoRule):
                raise
            raise NoRule(f"{name}, of which torch has no forward derivative") from error


def unsupported_reason(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Return why a call is not supported, or None. Checked before the call, which may modify its operands."""
    name = operation_name(function)
    if torch.compiler.is_compiling():
        return f"{name} under torch.compile"
    if name in LOSE_TANGENT:
        return f"{name}, which loses the tangent"
    if name == _ZERO_IN_TORCH:
        return f"{name}, for which torch returns a zero derivative"
    # `w += x` calls add_.
    if name.endswith("_") and not name.startswith("__"):
        return f"{name}, in place"
    parameters = _parameter_names(function)
    if "inplace" in parameters:
        by_position = dict(zip(parameters, args, strict=False))
        if by_position.get("inplace", kwargs.get("inplace", False)):
            return f"{name} with inplace=True"
    return None


def draws_random(function: Callable[..., Any]) -> bool:
    """Whether an operation draws random numbers, judged by its name."""
    name = operation_name(function)
    return name in _DRAW_RANDOM or "dropout" in name


def operation_name(function: Callable[..., Any]) -> str:
    """Return the name of a torch function, for messages."""
    return getattr(function, "__name__", str(function))


@cache
def _parameter_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of a function's parameters, in order, or () if it has no Python signature."""
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share one storage."""
    if a.layout != torch.strided or b.layout != torch.strided:
        return False
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def is_constant(function: Callable[..., Any], result: Tensor, index: int) -> bool:
    """Whether a floating-point result without a tangent, at this index among the results, is a constant."""
    return not result.numel() or (index == 0 and operation_name(function) in _PERMUTING)


def can_have_tangent(result: object) -> bool:
    """Whether a result is a real or complex floating-point tensor."""
    return isinstance(result, Tensor) and (result.is_floating_point() or result.is_complex())


class RefuseMissingTangents(TorchFunctionMode):
    """Raise NoRule for functions that drop the tangent of an operand in torch's forward mode.

    Forward mode, and thus `torch.func.jvp`, returns a zero derivative for them.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401, torch's results
        results = func(*args, **(kwargs or {}))
        name = operation_name(func)
        # Detached tensors and new tensors are constants. So is `x.data`, a call of `__get__`; the other properties
        # are not floating-point, or are views with a tangent.
        if name in LOSE_TANGENT or name == "__get__" or name.startswith("new_") or name.endswith("_like"):
            return results
        has_tangent = _any_has_tangent((args, kwargs))
        if has_tangent and name == "__set__" and getattr(func, "__self__", None) is Tensor.data:
            raise NoRule("assignment to Tensor.data")
        if has_tangent and (name == _ZERO_IN_TORCH or _any_tangent_missing(func, results)):
            raise NoRule(f"{name}, of which torch has no forward derivative")
        return results


def _any_has_tangent(operands: object) -> bool:
    """Whether a tensor among the operands has a tangent in torch's forward mode."""
    return any(can_have_tangent(x) and forward_ad.unpack_dual(x).tangent is not None for x in tree_leaves(operands))


def _any_tangent_missing(function: Callable[..., Any], results: object) -> bool:
    """Whether a result that is not constant has no tangent in torch's forward mode."""
    for k, result in enumerate(tree_leaves(results)):
        needs_tangent = can_have_tangent(result) and not is_constant(function, result, k)
        if needs_tangent and forward_ad.unpack_dual(result).tangent is None:
            return True
    return False
