"""A tape: tangents that are computed later, kept as data, and the functions that play it.

Where the direction is known only after the pass, it goes like this:

1. `flow.linearize` gives the net's inputs a `Later` without a function. Every operation (`dumo.autodiff.dual.carry`)
   makes a `Later` of its function, its operands' tangents and `detach_saved` of the other tensors that it needs.
2. After the pass the direction is known, and is set as the inputs' `value`.
3. `is_complete` says whether the saved tensors are still there, and raises WrittenTo where one has changed.
4. `play`, or `compiled_play`, computes the tangents of the outputs. A tape plays once.

A `Later` refers to all that it needs, so nobody holds a list: the tape is what its ends refer to.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Union, cast

import torch
from torch import Tensor

from dumo.types import UserError


class WrittenTo(UserError, RuntimeError):  # noqa: N818, as `general.NoRule`
    """A tensor that a tape needs has been written to before the tape played; the argument names the rule."""

    def __str__(self) -> str:
        """What happened and the way out."""
        return (
            f"slope 'dual' cannot play its tape: this net has written in place to a tensor that '{self.args[0]}' "
            "needs as it was. Write to a clone of it, or use slope 'jvp'"
        )


class Later:
    """A tangent to be computed later as `push(*tangents of operands, *saved)`. Data, never a closure.

    `value` is the tangent once it is computed; of an input of the pass, it is set from outside.
    """

    def __init__(
        self,
        shape: Iterable[int],
        dtype: torch.dtype,
        push: Callable[..., Tensor] | None = None,
        operands: tuple["OperandTangent", ...] = (),
        saved: Sequence[object] = (),
        writes: int | None = None,
    ) -> None:
        """The tangent of an operation's result, or, without `push`, of an input of the pass.

        shape, dtype: those of the primal.
        push: the function of the tangent (`dumo.autodiff.rule`).
        operands: their tangents; None: that operand rests.
        saved, writes: what `detach_saved` returned for the push's other arguments.
        """
        self.shape = tuple(shape)
        self.dtype = dtype
        self.push = push
        self.operands = operands
        self.saved = saved
        self.writes = writes
        self.value: Tensor | None = None  # None: not computed yet


OperandTangent = Union[Tensor, Later, None]  # noqa: UP007, evaluated when the file is read; None: the operand rests


def detach_saved(saved: Iterable[object]) -> tuple[Sequence[object], int | None]:
    """Detach what a tangent needs, and count the writes to its tensors so far; None: a compiler does not count."""
    detached: list[object] = []  # every operation of a tape comes by: one loop, and nothing expensive
    writes = None if torch.compiler.is_dynamo_compiling() else 0
    for x in saved:
        if isinstance(x, Tensor):
            x = x.detach()  # which shares the count
            if writes is not None:
                writes += _num_writes(x)
        elif writes is not None and isinstance(x, tuple | list | dict):
            writes += sum(map(_num_writes, _tensors_in(x)))  # indices and masks, which have no gradient
        detached.append(x)
    return detached, writes


def _tensors_in(x: object) -> Iterator[Tensor]:
    """The tensors among an argument, and in tuples, lists and dicts of arguments."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, tuple | list | dict):
        for item in x.values() if isinstance(x, dict) else x:
            yield from _tensors_in(item)


def play(ends: Iterable[Later]) -> None:
    """Compute the tangents `ends`, and before them all that they need, each once; let go of what is no longer needed.

    The inputs of the pass must have their value. Depth first, with a stack of its own: a net is deeper than Python's.
    """
    stack = list(ends)
    with torch.no_grad():
        while stack:
            later = stack[-1]
            pending = [operand for operand in later.operands if isinstance(operand, Later) and operand.value is None]
            if pending:
                stack.extend(pending)
                continue
            stack.pop()
            if later.value is None:
                assert later.push is not None, "an input of the pass was given no tangent"
                tangents = [_computed(operand) for operand in later.operands]
                later.value = fit_to_primal(later.push(*tangents, *later.saved), later.shape, later.dtype)
                later.operands = later.saved = ()  # let go of what is no longer needed
                later.writes = None


@cache
def compiled_play() -> Callable[[Iterable[Later]], None]:
    """`play` as one graph, for nets whose blocks are compiled: where they return Duals, only data is left to play."""
    return torch.compile(play, fullgraph=True)


def is_complete(ends: Iterable[Later]) -> bool:
    """Whether all saved tensors that `ends` need are still in memory; sharded weights may have been given back.

    Raises WrittenTo where a tensor is there, but was written to since.
    """
    stack = list(ends)
    visited = set[int]()
    while stack:
        later = stack.pop()
        if id(later) in visited:
            continue
        visited.add(id(later))
        writes = 0
        for x in _tensors_in(later.saved):
            if x.numel() and not x.untyped_storage().size():
                return False
            writes += _num_writes(x)
        if later.writes is not None and writes != later.writes:
            name = getattr(later.push, "__name__", "")
            raise WrittenTo(name.lstrip("_").removeprefix("push_"))
        stack.extend(operand for operand in later.operands if isinstance(operand, Later))
    return True


def _num_writes(x: Tensor) -> int:
    """How often a tensor was written to. One of torch.inference_mode does not count, and gives 0."""
    return 0 if x.is_inference() else x._version


def fit_to_primal(t: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Expand a tangent to its primal's shape, and convert it to its dtype."""
    if t.shape != shape:
        t = t.expand(shape)
    if t.dtype != dtype:
        t = t.to(dtype)
    return t


def _computed(operand: OperandTangent) -> Tensor | None:
    """The tangent of an operand that is known by now; an input's may have been set in another dtype."""
    if not isinstance(operand, Later) or operand.value is None:
        return cast(Tensor | None, operand)
    return fit_to_primal(operand.value, operand.shape, operand.dtype)
