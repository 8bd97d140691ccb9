"""Operations without a rule: the tangent by `torch.func.jvp` of that one operation, which a net need not survive whole.

It is exact, and the value keeps its bits and gradient. It costs the operation once more and, of attention, its scores.
So what nets use often has a rule (`dumo.autodiff.rule`), as has what is to be compiled: a compiler cannot follow this.
Refused is what would lose the tangent or draw other numbers the second time.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from dumo.autodiff.error import NoRule

LOSES = frozenset(("data", "detach", "detach_", "item", "tolist", "numpy", "grad", "requires_grad_", "retain_grad"))
DRAWS = frozenset(
    [
        "bernoulli",
        "normal",
        "rrelu",
        "multinomial",
        "poisson",
        "gumbel_softmax",
        "rand_like",
        "randn_like",
        "randint_like",
    ]
)  # and all dropouts


@dataclass(frozen=True)
class Call:
    """A call of an operation, without its operands: which of them moved, and which result is meant."""

    function: Callable[..., Any]
    spec: TreeSpec  # of (args, kwargs)
    place: tuple[int, ...]  # of those that are Duals, among the leaves
    result: int

    def results(self, leaves: list[Any]) -> list[Any]:
        """What the operation makes of these operands, one after the other."""
        args, kwargs = tree_unflatten(leaves, self.spec)
        return tree_flatten(self.function(*args, **kwargs))[0]


def tangent(*rest: Any) -> Tensor:  # noqa: ANN401, operands of any kind
    """The tangent of one result: `rest` are the tangents of what moves, the call, and its operands."""
    n = next(i for i, x in enumerate(rest) if isinstance(x, Call))
    moved = rest[:n]
    call = rest[n]
    operands = rest[n + 1 :]
    place = [i for i, d in zip(call.place, moved, strict=True) if d is not None]
    tangents = tuple(d for d in moved if d is not None)

    def result(*some: Tensor) -> Tensor:
        leaves = list(operands)
        for i, x in zip(place, some, strict=True):
            leaves[i] = x
        return call.results(leaves)[call.result]

    try:
        with sdpa_kernel(SDPBackend.MATH):  # fused kernels of attention have no forward derivative
            return torch.func.jvp(result, tuple(operands[i] for i in place), tangents)[1]
    except NotImplementedError as error:
        raise NoRule(f"{name_of(call.function)}, of which torch has no forward derivative") from error


def fault(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why an operation has no tangent here; None: it has one. Asked before it is called, for it may write."""
    name = name_of(function)
    if torch.compiler.is_compiling():
        return f"{name} under torch.compile"
    if name in LOSES:
        return f"{name}, which loses the tangent"
    if name.endswith("_") and not name.startswith("__"):  # `w += x`, too: add_
        return f"{name}, in place"
    names = parameters(function)
    if "inplace" in names and dict(zip(names, args, strict=False)).get("inplace", kwargs.get("inplace", False)):
        return f"{name} with inplace=True"
    if name in DRAWS or "dropout" in name:
        return f"{name}, which draws random numbers"
    return None


def name_of(function: Callable[..., Any]) -> str:
    """An operation's name."""
    return getattr(function, "__name__", str(function))


@cache
def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of an operation's parameters, in order; () where Python does not know them."""
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


def state_of(operands: Iterable[object]) -> tuple[int, bytes]:
    """How often operands have been written to, and where torch's generator on the CPU stands."""
    writes = sum(x._version for x in operands if isinstance(x, Tensor) and not x.is_inference())
    return writes, torch.get_rng_state().numpy().tobytes()


def shares(result: Tensor, operands: Iterable[object]) -> bool:
    """Whether a result lies in the memory of an operand."""
    place = result.untyped_storage().data_ptr()
    return any(isinstance(x, Tensor) and x.untyped_storage().data_ptr() == place for x in operands)


def differentiable(result: object) -> bool:
    """Whether a result can have a tangent: of numbers of places and of what holds there is none."""
    return isinstance(result, Tensor) and (result.is_floating_point() or result.is_complex())
