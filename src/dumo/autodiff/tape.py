"""Deferred forward-mode differentiation.

Record each operation's JVP during the forward pass, and evaluate it once the input tangent is known:

1. `flow.linearize` gives each network input a `DeferredTangent` without a JVP. Each operation
   (`dumo.autodiff.dual.carry`) creates a `DeferredTangent` of its JVP, its operands' tangents and `detach_saved` of
   the tensors that the JVP needs.
2. After the pass, the caller sets the `value` of the input tangents.
3. `is_complete` checks that the saved tensors are still in memory, and raises ModifiedInPlace if one has changed.
4. `evaluate`, or `compiled_evaluate`, computes the tangents of the outputs, once.

The tape is the graph of `DeferredTangent`s that is reachable from the outputs; no list of operations is kept.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Union, cast

import torch
from torch import Tensor

from dumo.types import UserError


class ModifiedInPlace(UserError, RuntimeError):  # noqa: N818, as `fallback.NoRule`
    """A saved tensor was modified in place before the tape was evaluated; the argument names the operation."""

    def __str__(self) -> str:
        """Return the message."""
        return (
            f"slope 'dual' cannot differentiate '{self.args[0]}': a tensor that its derivative needs was modified in "
            "place later in the forward pass. Modify a clone of the tensor, or use slope 'jvp'"
        )


class DeferredTangent:
    """A tangent to be computed later as `jvp(*tangents of operands, *saved)`.

    `value` is the tangent once it is computed. The caller sets it for an input of the pass.
    """

    def __init__(
        self,
        shape: Iterable[int],
        dtype: torch.dtype,
        jvp: Callable[..., Tensor] | None = None,
        operands: tuple["OperandTangent", ...] = (),
        saved: Sequence[object] = (),
        version_sum: int | None = None,
    ) -> None:
        """Defer the tangent of an operation's result, or, without `jvp`, of an input of the pass.

        shape, dtype: of the primal.
        jvp: a module-level function (`dumo.autodiff.rule`).
        operands: the tangents of the operands; None if an operand has no tangent.
        saved, version_sum: what `detach_saved` returned for the other arguments of `jvp`.
        """
        self.shape = tuple(shape)
        self.dtype = dtype
        self.jvp = jvp
        self.operands = operands
        self.saved = saved
        self.version_sum = version_sum
        self.value: Tensor | None = None


# None if the operand has no tangent.
OperandTangent = Union[Tensor, DeferredTangent, None]  # noqa: UP007, evaluated at import


def detach_saved(saved: Iterable[object]) -> tuple[Sequence[object], int | None]:
    """Detach the saved arguments of a JVP. Return them and the sum of their tensors' version counters.

    The sum is None under torch.compile, which has no version counters.
    """
    # This runs for every recorded operation, so it is a single loop of cheap operations.
    detached: list[object] = []
    version_sum = None if torch.compiler.is_dynamo_compiling() else 0
    for x in saved:
        if isinstance(x, Tensor):
            # A detached tensor shares its version counter.
            x = x.detach()
            if version_sum is not None:
                version_sum += version(x)
        elif version_sum is not None and isinstance(x, tuple | list | dict):
            # Indices and masks, which need no detaching.
            version_sum += sum(map(version, _tensors_in(x)))
        detached.append(x)
    return detached, version_sum


def _tensors_in(x: object) -> Iterator[Tensor]:
    """Yield the tensors in an argument, including those in nested tuples, lists and dicts."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, tuple | list | dict):
        for item in x.values() if isinstance(x, dict) else x:
            yield from _tensors_in(item)


def is_complete(outputs: Iterable[DeferredTangent]) -> bool:
    """Whether all saved tensors that the `outputs` need are still in memory. FSDP2 may have freed sharded weights.

    Raises ModifiedInPlace if a saved tensor was modified in place.
    """
    stack = list(outputs)
    visited = set[int]()
    while stack:
        tangent = stack.pop()
        if id(tangent) in visited:
            continue
        visited.add(id(tangent))
        version_sum = 0
        for x in _tensors_in(tangent.saved):
            if x.numel() and not x.untyped_storage().size():
                return False
            version_sum += version(x)
        if tangent.version_sum is not None and version_sum != tangent.version_sum:
            name = getattr(tangent.jvp, "__name__", "")
            raise ModifiedInPlace(name.lstrip("_").removeprefix("jvp_"))
        stack.extend(operand for operand in tangent.operands if isinstance(operand, DeferredTangent))
    return True


def evaluate(outputs: Iterable[DeferredTangent]) -> None:
    """Compute the tangents `outputs` and all tangents that they depend on, each once, and free the saved tensors.

    The inputs of the pass must have their `value`. The traversal is iterative, because the graph may be deeper than
    Python's recursion limit.
    """
    stack = list(outputs)
    with torch.no_grad():
        while stack:
            tangent = stack[-1]
            pending = [x for x in tangent.operands if isinstance(x, DeferredTangent) and x.value is None]
            if pending:
                stack.extend(pending)
                continue
            stack.pop()
            if tangent.value is None:
                assert tangent.jvp is not None, "an input of the pass was given no tangent"
                operands = [_computed(operand) for operand in tangent.operands]
                tangent.value = fit_to_primal(tangent.jvp(*operands, *tangent.saved), tangent.shape, tangent.dtype)
                tangent.operands = tangent.saved = ()
                tangent.version_sum = None


@cache
def compiled_evaluate() -> Callable[[Iterable[DeferredTangent]], None]:
    """Return `evaluate` compiled to one graph, for networks with compiled blocks."""
    return torch.compile(evaluate, fullgraph=True)


def version(x: Tensor) -> int:
    """Return the version counter of a tensor, which in-place operations increment; 0 for an inference tensor."""
    return 0 if x.is_inference() else x._version


def fit_to_primal(t: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Expand a tangent to its primal's shape and convert it to its dtype."""
    if t.shape != shape:
        t = t.expand(shape)
    if t.dtype != dtype:
        t = t.to(dtype)
    return t


def _computed(operand: OperandTangent) -> Tensor | None:
    """Return the computed tangent of an operand, in the operand's dtype; None if it has no tangent."""
    if not isinstance(operand, DeferredTangent) or operand.value is None:
        return cast(Tensor | None, operand)
    return fit_to_primal(operand.value, operand.shape, operand.dtype)
