"""The tangent of an operation without a rule, by torch's own derivatives of that one operation.

`dumo.autodiff.dual.differentiate` calls this file. `reason_without_tangent` refuses what would lose the tangent, or
write to an operand. Then one call gives the value and the tangent:

1. `call_in_forward_mode` calls the operation on torch's own dual tensors (`torch.autograd.forward_ad`). The value keeps
   its bits and its gradient.
2. Where torch has no forward derivative of the operation, `tangent_by_backward` differentiates its gradient, which is
   linear in the output's gradient v: the derivative of J^T v along v is J.
3. Where torch has no gradient of it either, NoRule is raised. `torch.func.jvp` would return zeros there.

On a tape, `tangent` does the same when the tape plays, by a second call of the operation.

A rule (`dumo.autodiff.rule`) is faster, and compiles: a compiler cannot follow this file.
"""

import inspect
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
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

# Methods of Tensor whose result has no tangent, though the tensor has one.
LOSE_TANGENT = frozenset(
    ("data", "detach", "detach_", "item", "tolist", "numpy", "grad", "requires_grad_", "retain_grad")
)
# Operations that draw random numbers, of which a tape cannot make the second call that it needs.
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

# torch takes the derivative of a sample of N(mean, sd) along mean and sd for zero, though it is not.
_ZERO_IN_TORCH = "normal"

# Functions whose first result is a permutation, which is constant though it holds floats.
_PERMUTING = frozenset(("linalg_lu", "lu_unpack"))


class NoRule(UserError, NotImplementedError):  # noqa: N818, a lack in the rules
    """A net uses an operation, named by the argument, for which there is no tangent."""

    def __str__(self) -> str:
        """The name and the way out. Not made by the constructor, which a compiler could not trace."""
        return (
            f"slope 'dual' has no tangent for '{self.args[0]}', which this net uses: use slope 'jvp', or another "
            "operation"
        )


class NoRecordedRule(NoRule):
    """The same in a loss that differentiates through the derivative, which no other slope takes."""

    def __str__(self) -> str:
        """The name and the way out."""
        return (
            f"this loss differentiates through a derivative, for which '{self.args[0]}', which this net uses, has no "
            "rule: use another operation, or objective 'meanflow'"
        )


class NoRuleOfAnySlope(NoRule):
    """The same where a derivative is taken by dual numbers, whatever the slope."""

    def __str__(self) -> str:
        """The name and the way out."""
        return (
            f"a derivative that is taken by dual numbers, whatever the slope, has no tangent for '{self.args[0]}', "
            "which this net uses: use another operation (x = x + y for x += y), or objective 'meanflow'"
        )


@contextmanager
def whatever_the_slope() -> Generator[None, None, None]:
    """Around a dual pass that no slope makes: NoRule does not propose another slope."""
    try:
        yield
    except NoRecordedRule:
        raise
    except NoRule as error:
        raise NoRuleOfAnySlope(*error.args) from error


@dataclass(frozen=True)
class OperationCall:
    """A call of an operation without its operands, and one of the results that it returns."""

    function: Callable[..., Any]
    spec: TreeSpec  # of (args, kwargs)
    dual_places: tuple[int, ...]  # of the operands that are Duals, among the leaves of (args, kwargs)
    result_index: int  # among the leaves of what the operation returns


def tangent(*arguments: Any) -> Tensor:  # noqa: ANN401, operands of any kind
    """The tangent of one result of an operation on a tape, by a second call of the operation.

    `arguments` are a tangent for each of the call's Duals (None: it rests), the OperationCall, and the leaves of its
    operands: what `carry` hands to every function of a tangent. Raises NoRule where torch has no derivative.
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
    except NotImplementedError:  # torch has no forward derivative
        pass
    return found if found is not None else tangent_by_backward(call, operands, tangents)


def call_in_forward_mode(
    function: Callable[..., Any], spec: TreeSpec, operands: Sequence[Any], tangents: Mapping[int, Tensor]
) -> tuple[list[Any], list[Tensor | None], TreeSpec]:
    """Call an operation on operands that move along `tangents`, by their place among the leaves of (args, kwargs).

    Returns the leaves of its result, the tangent of each (None: it has none), and their structure. An operand that the
    operation returns as it is stays the same object. Raises NotImplementedError where torch has no forward derivative.
    """
    # Fused kernels of attention have no forward derivative.
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
    """The tangent of one result of an operation, by differentiating its gradient. Raises NoRule where it has none.

    Calls the operation once more.
    """
    name = operation_name(call.function)
    with torch.inference_mode(mode=False), torch.enable_grad():
        # A view of each point, so that an operation may return it, or write to it, as to no leaf of autograd.
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


def reason_without_tangent(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why a call has no tangent here, or None if it has one. Asked before the call, which may write to its operands."""
    name = operation_name(function)
    if torch.compiler.is_compiling():
        return f"{name} under torch.compile"
    if name in LOSE_TANGENT:
        return f"{name}, which loses the tangent"
    if name == _ZERO_IN_TORCH:
        return f"{name}, whose derivative torch takes for zero"
    if name.endswith("_") and not name.startswith("__"):  # `w += x`, too: add_
        return f"{name}, in place"
    parameters = _parameter_names(function)
    if "inplace" in parameters:
        by_position = dict(zip(parameters, args, strict=False))
        if by_position.get("inplace", kwargs.get("inplace", False)):
            return f"{name} with inplace=True"
    return None


def draws_random(function: Callable[..., Any]) -> bool:
    """Whether an operation draws random numbers, by its name."""
    name = operation_name(function)
    return name in _DRAW_RANDOM or "dropout" in name


def operation_name(function: Callable[..., Any]) -> str:
    """The name of a function of torch, for messages."""
    return getattr(function, "__name__", str(function))


@cache
def _parameter_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a function's parameters, in order; () where Python does not know them."""
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


def num_writes(operands: Iterable[object]) -> int:
    """How often the operands have been written to."""
    return sum(x._version for x in operands if isinstance(x, Tensor) and not x.is_inference())


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie in one memory."""
    if a.layout != torch.strided or b.layout != torch.strided:
        return False
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def is_constant(function: Callable[..., Any], result: Tensor, index: int) -> bool:
    """Whether a result, by its number among the results, is constant though it holds floats and has no tangent."""
    return not result.numel() or (index == 0 and operation_name(function) in _PERMUTING)


def can_have_tangent(result: object) -> bool:
    """Whether a result is a tensor of real or complex floats: indices and truth values have no derivative."""
    return isinstance(result, Tensor) and (result.is_floating_point() or result.is_complex())


class RefuseMissingTangents(TorchFunctionMode):
    """Around a pass in torch's forward mode: NoRule where a function loses a tangent that an operand has.

    Forward mode, and so `torch.func.jvp`, takes the derivative of such a function for zero.
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
        # What is detached, and what is made like another tensor, are constants. So is `x.data`, whose function is
        # `__get__`; other properties hold no floats, or are views with a tangent.
        if name in LOSE_TANGENT or name == "__get__" or name.startswith("new_") or name.endswith("_like"):
            return results
        moves = _any_moves((args, kwargs))
        if moves and name == "__set__" and getattr(func, "__self__", None) is Tensor.data:
            raise NoRule("assignment to Tensor.data")
        if moves and (name == _ZERO_IN_TORCH or _any_rests(func, results)):
            raise NoRule(f"{name}, of which torch has no forward derivative")
        return results


def _any_moves(operands: object) -> bool:
    """Whether a tensor among the operands has a tangent in torch's forward mode."""
    return any(can_have_tangent(x) and forward_ad.unpack_dual(x).tangent is not None for x in tree_leaves(operands))


def _any_rests(function: Callable[..., Any], results: object) -> bool:
    """Whether a result that is no constant has no tangent in torch's forward mode."""
    for k, result in enumerate(tree_leaves(results)):
        is_moving = can_have_tangent(result) and not is_constant(function, result, k)
        if is_moving and forward_ad.unpack_dual(result).tangent is None:
            return True
    return False
