"""The tangent of an operation without a rule, by `torch.func.jvp` of that one operation.

`dumo.autodiff.dual.differentiate` calls this file: `reason_without_tangent` refuses what would lose the tangent, write
or draw; `side_effects` before and after the call refuses what did so all the same; `tangent` then calls the operation
once more, with its tangents, now or when a tape plays. A net as a whole need not survive `torch.func.jvp`.

The tangent is exact, and the value keeps its bits and gradient. The price is the operation once more and, of attention,
its scores in memory. So what nets use often has a rule (`dumo.autodiff.rule`), as has what is to be compiled: a
compiler cannot follow this.
"""

import inspect
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from dumo.types import UserError

# Methods of Tensor whose result has no tangent, though the tensor has one.
LOSE_TANGENT = frozenset(
    ("data", "detach", "detach_", "item", "tolist", "numpy", "grad", "requires_grad_", "retain_grad")
)
# Operations that draw random numbers; those whose name has "dropout" do too.
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

    def result(self, leaves: list[Any]) -> Tensor:
        """Call the operation with the leaves of (args, kwargs), and return the one result."""
        args, kwargs = tree_unflatten(leaves, self.spec)
        results = tree_flatten(self.function(*args, **kwargs))[0]
        return results[self.result_index]


def tangent(*arguments: Any) -> Tensor:  # noqa: ANN401, operands of any kind
    """The tangent of one result of an operation.

    `arguments` are a tangent for each of the call's Duals (None: it rests), the OperationCall, and the leaves of its
    operands: what `carry` hands to every function of a tangent. Raises NoRule where torch has no forward derivative.
    """
    call_place = next(i for i, x in enumerate(arguments) if isinstance(x, OperationCall))
    dual_tangents = arguments[:call_place]
    call = arguments[call_place]
    operands = arguments[call_place + 1 :]
    moving_places = [i for i, d in zip(call.dual_places, dual_tangents, strict=True) if d is not None]
    tangents = tuple(d for d in dual_tangents if d is not None)

    def result(*moving: Tensor) -> Tensor:
        leaves = list(operands)
        for i, x in zip(moving_places, moving, strict=True):
            leaves[i] = x
        return call.result(leaves)

    try:
        with sdpa_kernel(SDPBackend.MATH):  # fused kernels of attention have no forward derivative
            return torch.func.jvp(result, tuple(operands[i] for i in moving_places), tangents)[1]
    except NotImplementedError as error:
        raise NoRule(f"{operation_name(call.function)}, of which torch has no forward derivative") from error


def reason_without_tangent(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why a call has no tangent here, or None if it has one. Asked before the call, which may write to its operands."""
    name = operation_name(function)
    if torch.compiler.is_compiling():
        return f"{name} under torch.compile"
    if name in LOSE_TANGENT:
        return f"{name}, which loses the tangent"
    if name.endswith("_") and not name.startswith("__"):  # `w += x`, too: add_
        return f"{name}, in place"
    parameters = _parameter_names(function)
    if "inplace" in parameters:
        by_position = dict(zip(parameters, args, strict=False))
        if by_position.get("inplace", kwargs.get("inplace", False)):
            return f"{name} with inplace=True"
    if name in _DRAW_RANDOM or "dropout" in name:
        return f"{name}, which draws random numbers"
    return None


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


def side_effects(operands: Iterable[object]) -> tuple[int, bytes]:
    """How often the operands have been written to, and the state of torch's generator on the CPU."""
    writes = sum(x._version for x in operands if isinstance(x, Tensor) and not x.is_inference())
    return writes, torch.get_rng_state().numpy().tobytes()


def shares_memory(result: Tensor, operands: Iterable[object]) -> bool:
    """Whether a result lies in the memory of an operand."""
    address = result.untyped_storage().data_ptr()
    return any(isinstance(x, Tensor) and x.untyped_storage().data_ptr() == address for x in operands)


def can_have_tangent(result: object) -> bool:
    """Whether a result is a tensor of real or complex floats: indices and truth values have no derivative."""
    return isinstance(result, Tensor) and (result.is_floating_point() or result.is_complex())
